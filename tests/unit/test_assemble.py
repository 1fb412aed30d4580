"""From hand-made replication frames to transactions, in memory and by way of the disk."""

import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import DecodeError, GapError
from cdc.position import Position
from cdc.record import Bundle, Column, Relation, Run, Transaction, TransactionHead
from cdc.wire import pgoutput
from shippers.postgresql.assemble import Assembler
from shippers.postgresql.spool import Spool

_START = Position("leader", 1, 1000)
_HEADER = b"w" + pack(">QQq", 1, 2, 3)

# The messages, as the server writes them. ``xid`` is the (sub)transaction's inside of a stream.


def _frame(payload: bytes, xid: int | None = None) -> bytes:
    return _HEADER + payload[:1] + (b"" if xid is None else pack(">I", xid)) + payload[1:]


def begin(xid: int, final_lsn: int) -> bytes:
    return _frame(b"B" + pack(">QqI", final_lsn, 0, xid))


def commit(end_lsn: int) -> bytes:
    return _frame(b"C\0" + pack(">QQq", end_lsn - 8, end_lsn, 0))


def relation(relation_id: int, columns: int = 1, xid: int | None = None) -> bytes:
    described = b"".join([b"\1" + f"c{n}".encode() + b"\0" + pack(">Ii", 23, -1) for n in range(columns)])
    return _frame(b"R" + pack(">I", relation_id) + b"public\0t\0d" + pack(">H", columns) + described, xid)


def _row(relation_id: int, value: int, columns: int = 1) -> bytes:
    return b"I" + pack(">I", relation_id) + b"N" + pack(">H", columns) + (b"b" + pack(">II", 4, value)) * columns


def insert(relation_id: int, value: int, xid: int | None = None, columns: int = 1) -> bytes:
    return _frame(_row(relation_id, value, columns), xid)


def _truncation(*relation_ids: int) -> bytes:
    return b"T" + pack(">IB", len(relation_ids), 0) + b"".join([pack(">I", id_) for id_ in relation_ids])


def _emitted(content: bytes, lsn: int, *, transactional: bool) -> bytes:
    return b"M" + bytes([transactional]) + pack(">Q", lsn) + b"prefix\0" + pack(">I", len(content)) + content


def _origin(name: str) -> bytes:
    return b"O" + pack(">Q", 77) + name.encode() + b"\0"


def stream_start(xid: int, *, first: bool) -> bytes:
    return _frame(b"S" + pack(">IB", xid, first))


STREAM_STOP = _frame(b"E")


def stream_commit(xid: int, end_lsn: int) -> bytes:
    return _frame(b"c" + pack(">IBQQq", xid, 0, end_lsn - 8, end_lsn, 0))


def stream_abort(xid: int, subxid: int) -> bytes:
    return _frame(b"A" + pack(">II", xid, subxid))


def _two_phase(opcode: bytes, lsn: int, xid: int, gid: str) -> bytes:
    flags = b"" if opcode == b"b" else b"\0"
    times = pack(">qq", 0, 0) if opcode == b"r" else pack(">q", 0)
    return _frame(opcode + flags + pack(">QQ", lsn - 8, lsn) + times + pack(">I", xid) + gid.encode() + b"\0")


# What is read of them.


def _describe(message: pgoutput.RelationMessage) -> Relation:
    columns = tuple(Column(c.name, c.type_oid, c.modifier, c.key) for c in message.columns)
    return Relation(message.id, message.schema, message.name, message.identity, columns)


Told = tuple[int, int, list[tuple[bytes, int | None]]]


def _told(transaction: Transaction) -> Told:
    """Position, xid, and each message with the width its relation was described with."""
    messages: list[tuple[bytes, int | None]] = []
    for run in transaction.runs:
        at = 0
        for length in run.lengths:
            message = bytes(run.body[at : at + length])
            at += length
            relation_id = int.from_bytes(message[1:5]) if message[0] in b"IUD" else None
            messages.append((message, None if relation_id is None else len(run.relations[relation_id].columns)))
        assert at == len(run.body)
    return transaction.position.lsn, transaction.xid, messages


def _alone(bundle: Bundle) -> Iterator[Transaction]:
    """The transactions of a bundle, one by one."""
    run, number, at = bundle.run, 0, 0
    for head in bundle.heads:
        lengths = run.lengths[number : number + head.messages]
        size = sum(lengths)
        own = Run(run.relations, lengths, run.body[at : at + size])
        yield Transaction(bundle.position.at(head.lsn), head.xid, head.committed_us, iter([own]), size)
        number, at = number + head.messages, at + size
    assert at == len(run.body)
    assert bundle.position.lsn == bundle.heads[-1].lsn


class _Caller:
    """The shipper's hot loop: what is known is put aside, everything else is fed.

    ``bundles``: "never" leaves out the short cut for small transactions, "late" takes bundles as seldom as may be, and
    "soon" after every frame, as where the leader is slow.
    """

    def __init__(self, assembler: Assembler, bundles: str = "never") -> None:
        self.assembler = assembler
        self._bundles = bundles

    def feed(self, frames: Iterable[bytes]) -> Iterator[Transaction]:
        assembler = self.assembler
        for frame in frames:
            if frame[assembler.prefix] in assembler.known:
                assembler.frames.append(frame)
            elif self._bundles == "never" or not assembler.quick(frame):
                yield from self._bundle()
                if (transaction := assembler.feed(frame)) is not None:
                    yield transaction
            if self._bundles == "soon" and assembler.waiting:
                yield from self._bundle()
        yield from self._bundle()

    def _bundle(self) -> Iterator[Transaction]:
        if (bundle := self.assembler.bundle()) is not None:
            yield from _alone(bundle)


def _assembled(frames: Iterable[bytes], after: Position = _START) -> list[Told]:
    """However small transactions are put together, the same is told."""
    frames = list(frames)
    ways = [
        [_told(transaction) for transaction in _Caller(Assembler(after, _describe), bundles).feed(frames)]
        for bundles in ("never", "late", "soon")
    ]
    assert ways[0] == ways[1] == ways[2]
    return ways[0]


@pytest.fixture(params=[None, 0, 40], ids=["memory", "disk", "both"])
def memory_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(Spool.__init__, "__defaults__", (request.param,))


pytestmark = pytest.mark.usefixtures("memory_bytes")


def test_plain_transactions_come_as_they_are() -> None:
    frames = [
        begin(5, 1092), relation(1), relation(2, 2),
        insert(1, 10), insert(2, 11, columns=2), insert(1, 12), commit(1100),
        begin(6, 1192), insert(2, 13, columns=2), commit(1200),
    ]  # fmt: skip
    assert _assembled(frames) == [
        (1100, 5, [(_row(1, 10), 1), (_row(2, 11, 2), 2), (_row(1, 12), 1)]),
        (1200, 6, [(_row(2, 13, 2), 2)]),
    ]


def test_an_empty_transaction_only_moves_the_position() -> None:
    assembler = Assembler(_START, _describe)
    assert list(_Caller(assembler).feed([begin(5, 1092), commit(1100)])) == []
    assert assembler.position.lsn == 1100
    assert assembler.idle


def test_a_keepalive_is_believed_only_between_transactions() -> None:
    assembler = Assembler(_START, _describe)
    caller = _Caller(assembler)
    list(caller.feed([begin(5, 1092), relation(1), insert(1, 1)]))
    assembler.idle_at(5000)
    assert assembler.position.lsn == 1000
    list(caller.feed([commit(1100)]))
    assembler.idle_at(5000)
    assembler.idle_at(4000)
    assert assembler.position.lsn == 5000


def test_a_schema_change_inside_a_transaction_cuts_it() -> None:
    frames = [begin(5, 1092), relation(1), insert(1, 1), relation(1, 2), insert(1, 2, columns=2), commit(1100)]
    assert _assembled(frames) == [(1100, 5, [(_row(1, 1), 1), (_row(1, 2, 2), 2)])]


def test_what_the_topic_holds_is_left_out() -> None:
    frames = [
        begin(5, 1092), relation(1), insert(1, 1), commit(1100),
        begin(6, 1192), insert(1, 2), commit(1200),
        begin(7, 1292), insert(1, 3), commit(1300),
    ]  # fmt: skip
    assert [lsn for lsn, *_ in _assembled(frames, _START.at(1200))] == [1300]


def test_streams_interleave_and_commit_in_their_own_order() -> None:
    frames = [
        stream_start(5, first=True), relation(1, xid=5), insert(1, 1, 5), STREAM_STOP,
        stream_start(6, first=True), relation(1, xid=6), insert(1, 2, 6), STREAM_STOP,
        begin(7, 1092), relation(1), insert(1, 3), commit(1100),
        stream_start(5, first=False), insert(1, 4, 5), STREAM_STOP,
        stream_commit(6, 1200),
        stream_commit(5, 1300),
        begin(8, 1392), insert(1, 5), commit(1400),
    ]  # fmt: skip
    assert _assembled(frames) == [
        (1100, 7, [(_row(1, 3), 1)]),
        (1200, 6, [(_row(1, 2), 1)]),
        (1300, 5, [(_row(1, 1), 1), (_row(1, 4), 1)]),
        (1400, 8, [(_row(1, 5), 1)]),
    ]


def test_a_description_from_a_stream_does_not_undo_a_younger_one() -> None:
    """The columns published may change while a transaction runs; the leader describes the table once more for those
    that come after, and not again when the older transaction commits."""
    frames = [
        stream_start(5, first=True), relation(1, 2, xid=5), insert(1, 1, 5, columns=2), STREAM_STOP,
        begin(6, 1092), relation(1, 1), insert(1, 2), commit(1100),
        stream_commit(5, 1200),
        begin(7, 1292), insert(1, 3), commit(1300),
    ]  # fmt: skip
    assert _assembled(frames)[-1] == (1300, 7, [(_row(1, 3), 1)])


def test_two_streams_of_two_descriptions_leave_the_younger() -> None:
    frames = [
        stream_start(5, first=True), relation(1, 2, xid=5), insert(1, 1, 5, columns=2), STREAM_STOP,
        stream_start(6, first=True), relation(1, 1, xid=6), insert(1, 2, 6), STREAM_STOP,
        stream_commit(6, 1100),
        stream_commit(5, 1200),
        begin(7, 1292), insert(1, 3), commit(1300),
    ]  # fmt: skip
    assert _assembled(frames)[-1] == (1300, 7, [(_row(1, 3), 1)])


def test_aborted_subtransactions_are_left_out() -> None:
    frames = [
        stream_start(5, first=True), relation(1, xid=5), insert(1, 1, 5), insert(1, 2, 6), insert(1, 3, 7),
        insert(1, 4, 6), insert(1, 5, 5), STREAM_STOP,
        stream_abort(5, 6),
        stream_start(5, first=False), insert(1, 6, 8), STREAM_STOP,
        stream_commit(5, 1100),
    ]  # fmt: skip
    assert _assembled(frames) == [(1100, 5, [(_row(1, n), 1) for n in (1, 3, 5, 6)])]


def test_a_description_learnt_in_an_aborted_subtransaction_still_serves() -> None:
    """The leader sends a description once for the whole stream, whoever of its subtransactions comes first."""
    frames = [
        stream_start(5, first=True), relation(1, xid=6), insert(1, 1, 6), insert(1, 2, 5), STREAM_STOP,
        stream_start(5, first=False), insert(1, 3, 7), STREAM_STOP,
        stream_abort(5, 6),
        stream_commit(5, 1100),
    ]  # fmt: skip
    assert _assembled(frames) == [(1100, 5, [(_row(1, 2), 1), (_row(1, 3), 1)])]


def test_a_schema_change_of_an_aborted_subtransaction_is_not_the_others() -> None:
    frames = [
        stream_start(5, first=True), relation(1, xid=5), insert(1, 1, 5),
        relation(1, 2, xid=6), insert(1, 2, 6, columns=2), STREAM_STOP,
        stream_abort(5, 6),
        stream_start(5, first=False), relation(1, xid=5), insert(1, 3, 5), STREAM_STOP,
        stream_commit(5, 1100),
        begin(7, 1192), relation(1), insert(1, 4), commit(1200),
    ]  # fmt: skip
    assert _assembled(frames) == [
        (1100, 5, [(_row(1, 1), 1), (_row(1, 3), 1)]),
        (1200, 7, [(_row(1, 4), 1)]),
    ]


def test_an_aborted_stream_is_forgotten() -> None:
    frames = [
        stream_start(5, first=True), relation(1, 2, xid=5), insert(1, 1, 5, columns=2), STREAM_STOP,
        stream_abort(5, 5),
        begin(6, 1092), relation(1), insert(1, 2), commit(1100),
    ]  # fmt: skip
    assert _assembled(frames) == [(1100, 6, [(_row(1, 2), 1)])]


def test_a_stream_whose_every_part_was_aborted_tells_nothing() -> None:
    frames = [
        stream_start(5, first=True), relation(1, xid=6), insert(1, 1, 6), STREAM_STOP,
        stream_abort(5, 6), stream_commit(5, 1100),
    ]  # fmt: skip
    assert _assembled(frames) in ([], [(1100, 5, [])])


def test_truncates_messages_and_origins_lose_only_the_streaming_xid() -> None:
    inside = [_truncation(1), _row(1, 1), _emitted(b"hello", 50, transactional=True), _row(1, 2)]
    plain = [begin(5, 1092), _frame(_origin("far")), relation(1), *map(_frame, inside), commit(1100)]
    streamed = [
        stream_start(5, first=True), _frame(_origin("far")), relation(1, xid=5),
        *[_frame(payload, 5) for payload in inside], STREAM_STOP, stream_commit(5, 1100),
    ]  # fmt: skip
    for frames in (plain, streamed):
        [(lsn, xid, messages)] = _assembled(frames)
        assert (lsn, xid) == (1100, 5)
        assert [message for message, _ in messages] == [_origin("far"), *inside]


def test_a_truncate_of_an_aborted_subtransaction_is_left_out() -> None:
    frames = [
        stream_start(5, first=True), relation(1, xid=5), insert(1, 1, 5), _frame(_truncation(1), 6), insert(1, 2, 5),
        STREAM_STOP, stream_abort(5, 6), stream_commit(5, 1100),
    ]  # fmt: skip
    assert _assembled(frames) == [(1100, 5, [(_row(1, 1), 1), (_row(1, 2), 1)])]


def _shouted(content: bytes, lsn: int) -> bytes:
    return _frame(_emitted(content, lsn, transactional=False))


def test_tables_that_are_left_out_leave_no_trace() -> None:
    inside = [_row(1, 1), _row(2, 2), _truncation(1, 2), _truncation(1), _row(2, 3)]
    plain = [begin(5, 1092), relation(1), relation(2), *map(_frame, inside), commit(1100)]
    streamed = [
        stream_start(5, first=True), relation(1, xid=5), relation(2, xid=5),
        *[_frame(payload, 5) for payload in inside], STREAM_STOP, stream_commit(5, 1100),
    ]  # fmt: skip
    for frames in (plain, streamed):
        assembler = Assembler(_START, lambda message: _describe(message) if message.id == 2 else None)
        [(_, _, messages)] = map(_told, _Caller(assembler).feed(frames))
        assert [message for message, _ in messages] == [_row(2, 2), _truncation(2), _row(2, 3)]


def test_a_table_left_out_at_first_comes_back() -> None:
    wanted = iter([None, Relation(1, "public", "t", "d", (Column("c0", 23),))])
    frames = [begin(5, 1092), relation(1), insert(1, 1), relation(1), insert(1, 2), commit(1100)]
    assert list(map(_told, _Caller(Assembler(_START, lambda _: next(wanted))).feed(frames))) == [
        (1100, 5, [(_row(1, 2), 1)])
    ]


def test_a_message_of_no_transaction_stands_alone() -> None:
    frames = [
        begin(5, 1092), relation(1), insert(1, 1), commit(1100),
        _shouted(b"hello", 1150),
        begin(6, 1292), insert(1, 2), commit(1300),
    ]  # fmt: skip
    told = _assembled(frames)
    hello = _emitted(b"hello", 1150, transactional=False)
    assert [messages[0][0] for _, _, messages in told] == [_row(1, 1), hello, _row(1, 2)]
    assert [lsn for lsn, *_ in told] == sorted({lsn for lsn, *_ in told})
    # Told again after a restart, it is not shipped again.
    assert _assembled(frames, _START.at(told[1][0])) == told[2:]


def test_a_message_right_behind_a_commit_is_not_taken_for_an_old_one() -> None:
    """The log tells where the message's record begins: where the commit's ends."""
    frames = [
        begin(5, 1092), relation(1), insert(1, 1), commit(1100),
        _shouted(b"one", 1100), _shouted(b"two", 1160),
        begin(6, 1292), insert(1, 2), commit(1300),
    ]  # fmt: skip
    told = _assembled(frames)
    assert len(told) == 4
    for cut in range(4):
        assert _assembled(frames, _START.at(told[cut][0])) == told[cut + 1 :]


def test_two_phase() -> None:
    frames = [
        _two_phase(b"b", 1050, 5, "kept"), relation(1), insert(1, 1), _two_phase(b"P", 1050, 5, "kept"),
        _two_phase(b"b", 1060, 6, "dropped"), insert(1, 2), _two_phase(b"P", 1060, 6, "dropped"),
        begin(7, 1092), insert(1, 3), commit(1100),
        _two_phase(b"r", 1150, 6, "dropped"),
        _two_phase(b"K", 1200, 5, "kept"),
    ]  # fmt: skip
    assembler = Assembler(_START, _describe)
    caller = _Caller(assembler)
    floors = []
    told = []
    for frame in frames:
        told += [_told(transaction) for transaction in caller.feed([frame])]
        floors.append(assembler.floor)
    assert told == [(1100, 7, [(_row(1, 3), 1)]), (1200, 5, [(_row(1, 1), 1)])]
    # What is prepared holds back what the leader may forget, until it is decided.
    assert floors == [None] * 3 + [1042] * 8 + [None]


def test_two_phase_streamed() -> None:
    frames = [
        stream_start(5, first=True), relation(1, xid=5), insert(1, 1, 5), insert(1, 2, 6), STREAM_STOP,
        stream_abort(5, 6),
        _two_phase(b"p", 1050, 5, "gid"),
        _two_phase(b"K", 1200, 5, "gid"),
    ]  # fmt: skip
    assert _assembled(frames) == [(1200, 5, [(_row(1, 1), 1)])]


def test_two_phase_told_again_after_a_restart() -> None:
    prepare = [_two_phase(b"b", 1050, 5, "gid"), relation(1), insert(1, 1), _two_phase(b"P", 1050, 5, "gid")]
    decision = [_two_phase(b"K", 1200, 5, "gid")]
    assert _assembled(prepare + decision, _START.at(1200)) == []
    assert _assembled(decision, _START.at(1200)) == []
    with pytest.raises(GapError, match="gid"):
        _assembled(decision, _START.at(1100))


@pytest.mark.parametrize(
    "frames",
    [
        [commit(1100)],
        [insert(1, 1)],
        [begin(5, 1092), insert(1, 1)],
        [relation(1), insert(1, 1), commit(1100)],
        [begin(5, 1092), _frame(_truncation(9))],
        [_frame(_emitted(b"x", 50, transactional=True)), commit(1100)],
        [stream_commit(5, 1100)],
        [_two_phase(b"p", 1050, 5, "gid")],
        [_two_phase(b"P", 1050, 5, "gid")],
        [_frame(b"?")],
        [_frame(b"B")],
    ],
)
def test_what_makes_no_sense_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(DecodeError):
        _assembled(frames)


@contextmanager
def _closing(spool: Spool) -> Iterator[Spool]:
    try:
        yield spool
    finally:
        spool.close()


_RUNS = st.lists(st.tuples(st.integers(1, 3), st.lists(st.binary(max_size=30), min_size=1, max_size=4)), max_size=8)


@given(_RUNS, st.sets(st.integers(1, 3)), st.sampled_from([0, 25, 1 << 20]))
def test_a_spool_gives_back_what_it_took(
    runs: list[tuple[int, list[bytes]]], without: set[int], memory_bytes: int
) -> None:
    relations = {1: Relation(1, "public", "t", "d", ())}
    with _closing(Spool(memory_bytes)) as spool:
        for subxid, messages in runs:
            spool.add(subxid, Run(relations, [len(message) for message in messages], b"".join(messages)))
        assert bool(spool) == bool(runs)
        assert spool.size_bytes == sum(len(b"".join(messages)) for _, messages in runs)
        told = [(list(run.lengths), run.body, run.relations is relations) for run in spool.runs(without)]
        assert told == [([*map(len, ms)], b"".join(ms), True) for subxid, ms in runs if subxid not in without]
        assert not spool


def test_a_spool_on_a_full_disk_says_so_and_keeps_no_half() -> None:
    """A limit on the size of files stands for the full disk: the last write is cut short, the next one fails."""
    program = textwrap.dedent(
        """
        import resource
        from cdc.errors import LocalIOError
        from cdc.record import Run
        from shippers.postgresql.spool import Spool

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        spool, body = Spool(0), bytes(30_000)
        taken = 0
        try:
            while taken < 10:
                spool.add(1, Run({}, [len(body)], body))
                taken += 1
        except LocalIOError as error:
            print("refused after", taken, "TMPDIR" in error.remedy)
        """
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "refused after 3 True\n"


def test_closing_gives_back_every_file() -> None:
    assembler = Assembler(_START, _describe)
    list(
        _Caller(assembler).feed(
            [stream_start(5, first=True), relation(1, xid=5), insert(1, 1, 5), STREAM_STOP,
             _two_phase(b"b", 1050, 6, "gid"), relation(1), insert(1, 1), _two_phase(b"P", 1050, 6, "gid")]
        )
    )  # fmt: skip
    assembler.close()
    assembler.close()


def test_small_transactions_come_as_one_bundle() -> None:
    assembler = Assembler(_START, _describe)
    made: list[Bundle | None] = []
    frames = [begin(4, 1042), relation(1), insert(1, 0), commit(1050)]
    list(_Caller(assembler, "late").feed(frames))
    for number in range(3):
        assert assembler.quick(begin(5 + number, 1092 + 100 * number))
        assembler.frames.append(insert(1, number))
        assert not assembler.idle
        assert assembler.quick(commit(1100 + 100 * number))
    made.append(assembler.bundle())
    assert made[0] is not None
    assert [(head.lsn, head.xid, head.messages) for head in made[0].heads] == [(1100, 5, 1), (1200, 6, 1), (1300, 7, 1)]
    assert made[0].run.body == b"".join(_row(1, number) for number in range(3))
    assert assembler.idle
    assert assembler.bundle() is None


def test_a_bundle_up_to_a_position() -> None:
    run = Run({}, [1, 2, 3], b"abbccc")
    heads = [TransactionHead(10, 1, 0, 1), TransactionHead(20, 2, 0, 2)]
    bundle = Bundle(_START.at(20), heads, run)
    assert bundle.upto(9) is None
    assert bundle.upto(10) == Bundle(_START.at(10), heads[:1], Run({}, [1], b"a"))
    assert bundle.upto(25) == bundle
