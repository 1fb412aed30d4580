"""Batches tell exactly the transactions given, in order, without a hole, and none is too large."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from cdc.batcher import BATCH_BYTES, Batcher
from cdc.codec import EnvelopeCodec
from cdc.position import Position
from cdc.record import Batch, Bundle, Column, Format, Fragment, Kind, Relation, Run, Transaction, TransactionHead

_START = Position("leader", 1, 1000)


def _relation(relation_id: int, version: int) -> Relation:
    columns = tuple(Column(f"c{n}", 23) for n in range(version + 1))
    return Relation(relation_id, "public", f"t{relation_id}", "d", columns)


_RELATIONS = {(relation_id, version): _relation(relation_id, version) for relation_id in (1, 2) for version in (0, 1)}


class Told(NamedTuple):
    """A transaction as its reader sees it: its position, and each message with the description it was written under."""

    lsn: int
    messages: list[tuple[bytes, Relation]]


def _message(relation_id: int, number: int, size: int) -> bytes:
    return b"I" + relation_id.to_bytes(4) + number.to_bytes(4) + b"x" * size


def _transaction(lsn: int, runs: list[tuple[dict[int, int], list[bytes]]]) -> tuple[Transaction, Told]:
    made, messages = [], []
    for versions, bodies in runs:
        relations = {id_: _RELATIONS[id_, version] for id_, version in versions.items()}
        made.append(Run(relations, [len(body) for body in bodies], b"".join(bodies)))
        messages += [(body, relations[int.from_bytes(body[1:5])]) for body in bodies]
    size = sum(len(run.body) for run in made)
    return Transaction(_START.at(lsn), lsn & 0xFFFF, lsn * 10, iter(made), size), Told(lsn, messages)


_SIZES = st.sampled_from([0, 10, 1000, BATCH_BYTES // 3, BATCH_BYTES - 9, BATCH_BYTES + 5])


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[Transaction, Told]]:
    lsn, found, number = _START.lsn, [], 0
    for _ in range(draw(st.integers(0, 6))):
        lsn += draw(st.integers(1, 50))
        runs = []
        for _ in range(draw(st.integers(0, 4))):
            versions = {1: draw(st.integers(0, 1)), 2: draw(st.integers(0, 1))}
            bodies = []
            for _ in range(draw(st.integers(1, 3))):
                number += 1
                bodies.append(_message(draw(st.integers(1, 2)), number, draw(_SIZES)))
            runs.append((versions, bodies))
        found.append(_transaction(lsn, runs))
    return found


def _batched(transactions: Iterable[Transaction], batcher: Batcher) -> Iterator[Batch]:
    for transaction in transactions:
        yield from batcher.add(transaction)
    yield from batcher.flush()


def _told(batches: list[Batch]) -> list[Told]:
    told: list[Told] = []
    for batch in batches:
        relations = {relation.id: relation for relation in batch.relations}
        assert len(relations) == len(batch.relations)
        at, lengths = 0, iter(batch.lengths)
        for head in batch.transactions:
            if batch.fragment is None or batch.fragment.number == 0:
                told.append(Told(head.lsn, []))
            assert told[-1].lsn == head.lsn
            for _ in range(head.messages):
                size = next(lengths)
                body = batch.body[at : at + size]
                told[-1].messages.append((body, relations[int.from_bytes(body[1:5])]))
                at += size
        assert at == len(batch.body)
        assert next(lengths, None) is None
    return told


@settings(max_examples=150, deadline=None)
@given(histories())
def test_batches_tell_what_was_given(history: list[tuple[Transaction, Told]]) -> None:
    batcher = Batcher("s", Format.LOGICAL, _START)
    batches = list(_batched((transaction for transaction, _ in history), batcher))
    assert _told(batches) == [told for _, told in history]
    _assert_chained(batches)
    assert not batcher
    assert batcher.position.lsn == (history[-1][1].lsn if history else _START.lsn)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 20), st.sampled_from([0, 10, 1000, 40_000])), max_size=8))
def test_bundles_are_told_as_their_transactions(shapes: list[tuple[int, int, int]]) -> None:
    batcher, lsn = Batcher("s", Format.LOGICAL, _START), _START.lsn
    batches: list[Batch] = []
    expected: list[Told] = []
    for version, count, size in shapes:
        relation = _RELATIONS[1, version]
        bodies = [_message(1, number, size) for number in range(count)]
        heads = [TransactionHead(lsn + 1 + number, 1, 0, 1) for number in range(count)]
        lsn += count
        expected += [Told(head.lsn, [(body, relation)]) for head, body in zip(heads, bodies, strict=True)]
        run = Run({1: relation}, [len(body) for body in bodies], b"".join(bodies))
        batches += batcher.add_bundle(Bundle(_START.at(lsn), heads, run))
    batches += batcher.flush()
    assert _told(batches) == expected
    _assert_chained(batches)


def _assert_chained(batches: list[Batch]) -> None:
    """Every batch begins where the one before it ended; fragments all stand between the same two positions."""
    expected, number = _START, 0
    for batch in batches:
        assert batch.previous == expected
        assert batch.position > expected
        assert batch.position.lsn == batch.transactions[-1].lsn
        if batch.fragment is None:
            assert number == 0
            expected = batch.position
            continue
        assert batch.fragment.number == number
        assert len(batch.transactions) == 1
        number = 0 if batch.fragment.last else number + 1
        expected = batch.position if batch.fragment.last else expected
    assert number == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 60), st.integers(1, 6000)), max_size=60))
def test_an_encoded_batch_is_bounded_whatever_it_is_made_of(shapes: list[tuple[int, int, int]]) -> None:
    """Tiny messages cost more in heads and lengths than in bytes."""
    transactions = []
    for lsn, (runs, size, count) in enumerate(shapes, _START.lsn + 1):
        body = _message(1, 0, size)
        transactions.append(_transaction(lsn, [({1: 0}, [body] * count)] * runs)[0])
    codec = EnvelopeCodec()
    for batch in _batched(transactions, Batcher("s", Format.LOGICAL, _START)):
        largest_run = 6000 * (9 + 60 + 4)
        assert len(codec.encode(batch)) <= max(BATCH_BYTES, largest_run) + 1000


def test_many_tiny_transactions_make_bounded_batches() -> None:
    made = [_transaction(_START.lsn + n, [({1: 0}, [_message(1, n, 8)])])[0] for n in range(1, 100_000)]
    batches = list(_batched(made, Batcher("s", Format.LOGICAL, _START)))
    codec = EnvelopeCodec()
    sizes = [len(codec.encode(batch)) for batch in batches]
    assert max(sizes) <= BATCH_BYTES + 1000
    assert min(sizes[:-1]) >= BATCH_BYTES * 0.9
    assert sum(len(batch.transactions) for batch in batches) == len(made)


def test_a_schema_change_ends_a_batch() -> None:
    before, after = (_transaction(_START.lsn + n, [({1: n}, [_message(1, n, 4)])])[0] for n in (0, 1))
    batcher = Batcher("s", Format.LOGICAL, _START.at(0))
    batches = list(_batched([before, after], batcher))
    assert [batch.relations for batch in batches] == [(_RELATIONS[1, 0],), (_RELATIONS[1, 1],)]
    assert [batch.fragment for batch in batches] == [None, None]


def test_a_schema_change_inside_a_transaction_makes_fragments() -> None:
    transaction, _ = _transaction(_START.lsn + 1, [({1: n % 2}, [_message(1, n, 4)]) for n in range(3)])
    batches = list(_batched([transaction], Batcher("s", Format.LOGICAL, _START)))
    assert [batch.fragment for batch in batches] == [Fragment(0, False), Fragment(1, False), Fragment(2, True)]


def test_a_large_transaction_is_read_no_further_than_asked() -> None:
    """Both sides hold no more than a fragment."""
    read = 0

    def runs() -> Iterator[Run]:
        nonlocal read
        body = _message(1, 0, BATCH_BYTES // 2 + 1)
        for _ in range(10):
            read += 1
            yield Run({1: _RELATIONS[1, 0]}, [len(body)], body)

    large = Transaction(_START.at(2000), 1, 1, runs(), 10 * BATCH_BYTES)
    fragments = Batcher("s", Format.LOGICAL, _START).add(large)
    for count, _ in enumerate(fragments, 1):
        assert read <= count + 1
    assert read == 10


def test_what_waits_goes_before_a_large_transaction() -> None:
    small, _ = _transaction(1001, [({1: 0}, [_message(1, 1, 4)])])
    large, _ = _transaction(1002, [({1: 0}, [_message(1, 2, BATCH_BYTES)])] * 2)
    batches = list(_batched([small, large], Batcher("s", Format.LOGICAL, _START)))
    assert [batch.position.lsn for batch in batches] == [1001, 1002, 1002]
    assert all(a.position == b.previous or a.fragment == Fragment(0, False) for a, b in pairwise(batches))


def test_a_transaction_of_which_nothing_is_left_still_moves_the_position() -> None:
    """All of its subtransactions were aborted."""
    for size_bytes in (10, 2 * BATCH_BYTES):
        batcher = Batcher("s", Format.LOGICAL, _START)
        [batch] = _batched([Transaction(_START.at(1005), 1, 1, iter(()), size_bytes)], batcher)
        assert (batch.position.lsn, batch.body, batcher.position.lsn) == (1005, b"", 1005)


def test_a_heartbeat_moves_the_position_alone() -> None:
    batcher = Batcher("s", Format.LOGICAL, _START)
    beat = batcher.heartbeat(_START.at(1234))
    assert (beat.kind, beat.previous, beat.position) == (Kind.HEARTBEAT, _START, _START.at(1234))
    assert batcher.position == _START.at(1234)
    assert list(batcher.flush()) == []
