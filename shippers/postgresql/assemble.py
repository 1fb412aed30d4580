"""From pgoutput messages to committed transactions, in commit order. No I/O but the spool's.

Rows are not decoded: of each message only the opcode and the relation id are looked at, to attach the description of
the relation. :attr:`Assembler.known` holds those prefixes that need nothing else, so that the caller's loop can put the
message aside without a call. Begin and Commit of ordinary transactions go through :meth:`Assembler.quick`, which puts
small ones together as bundles; everything else goes through :meth:`Assembler.feed`, after :meth:`Assembler.bundle`.
"""

import struct
from collections.abc import Callable
from typing import Final

from cdc.errors import DecodeError, GapError
from cdc.position import Position, format_lsn
from cdc.record import Bundle, Relation, Run, Transaction, TransactionHead
from cdc.wire import pgoutput
from shippers.postgresql.spool import Spool

RUN_BYTES: Final = 900 << 10  # a run fits one message of Kafka's default size
BUNDLE_BYTES: Final = RUN_BYTES // 2  # of messages, which together with their table of transactions do too
_BUNDLE_MAX: Final = 4_000  # transactions
_SHARED_MAX: Final = 16  # relations that consecutive small transactions describe together
FRAME_BYTES: Final = 25  # of the XLogData header before each pgoutput message
_XID: Final = slice(FRAME_BYTES + 1, FRAME_BYTES + 5)
_PLAIN: Final = slice(FRAME_BYTES, FRAME_BYTES + 5)  # opcode, relation id
_STREAMED: Final = slice(FRAME_BYTES, FRAME_BYTES + 9)  # opcode, xid, relation id
_BEGIN, _COMMIT = ord("B"), ord("C")
_BEGIN_FIELDS: Final = struct.Struct(">qI")  # when it was committed, and its xid
_BEGIN_AT: Final = FRAME_BYTES + 9
_BEGIN_BYTES: Final = _BEGIN_AT + _BEGIN_FIELDS.size
_COMMIT_END: Final = slice(FRAME_BYTES + 10, FRAME_BYTES + 18)
_COMMIT_BYTES: Final = FRAME_BYTES + 26


class _Open:
    """A transaction that has begun. ``relations`` are those that only its own stream has described so far."""

    __slots__ = ("aborted", "committed_us", "prepare_lsn", "relations", "spool", "xid")

    def __init__(self, xid: int, committed_us: int = 0) -> None:
        self.xid = xid
        self.committed_us = committed_us
        self.spool = Spool()
        self.relations: dict[int, Relation] = {}
        self.aborted: set[int] = set()
        self.prepare_lsn = 0


class Assembler:
    """Collects one replication stream.

    ``describe`` turns a Relation message into a :class:`~cdc.record.Relation`, or into None where the table's changes
    are to be left out. :attr:`position` is the end of the last transaction seen whole. Transactions at or below
    ``after`` are dropped: the broker has them.
    """

    def __init__(self, after: Position, describe: Callable[[pgoutput.RelationMessage], Relation | None]) -> None:
        self.position = after
        self._after = after
        self._describe = describe
        self._relations: dict[int, Relation] = {}
        self._latest: dict[int, Relation] = {}  # by whichever transaction it was described last
        self._left_out: set[int] = set()
        self._streams: dict[int, _Open] = {}
        self._prepared: dict[tuple[int, str], _Open] = {}
        self._open: _Open | None = None
        self._subxid = 0
        self._in_stream = False
        self._run: dict[int, Relation] = {}
        # An ordinary transaction that has begun, and those before it that wait in `frames` to be a bundle.
        self._begun: bytes | None = None
        self._heads: list[TransactionHead] = []
        self._bundled = 0
        # The three below are the hot loop's: which prefix to look at, which prefixes need no more, where frames go.
        self.prefix = _PLAIN
        self.known: set[bytes] = set()
        self.frames: list[bytes] = []

    @property
    def idle(self) -> bool:
        """No transaction is half read: a keepalive's position may be believed."""
        return self._open is None and self._begun is None and not self._heads

    @property
    def floor(self) -> int | None:
        """The start of the oldest transaction prepared but not decided, which the leader must not forget yet."""
        return min((prepared.prepare_lsn for prepared in self._prepared.values()), default=None)

    def idle_at(self, lsn: int) -> None:
        """The leader has told everything below ``lsn``."""
        if self.idle and lsn > self.position.lsn:
            self.position = self.position.at(lsn)

    def quick(self, frame: bytes) -> bool:
        """Take the Begin or Commit of an ordinary transaction; False where it is none, and nothing was done."""
        opcode = frame[FRAME_BYTES]
        if opcode == _BEGIN:
            if self._begun is not None or self._open is not None or len(frame) != _BEGIN_BYTES:
                return False
            self._begun = frame
            return True
        if opcode != _COMMIT or self._begun is None or len(frame) != _COMMIT_BYTES:
            return False
        messages = len(self.frames) - self._bundled
        end_lsn = int.from_bytes(frame[_COMMIT_END])
        if end_lsn > self.position.lsn:
            self.position = self.position.at(end_lsn)
        if messages:
            if end_lsn > self._after.lsn:
                committed_us, xid = _BEGIN_FIELDS.unpack_from(self._begun, _BEGIN_AT)
                self._heads.append(TransactionHead(end_lsn, xid, committed_us + pgoutput.PG_EPOCH_US, messages))
                self._bundled += messages
            else:
                del self.frames[self._bundled :]
        self._begun = None
        return True

    @property
    def waiting(self) -> bool:
        """Is there a bundle to be had?"""
        return bool(self._heads)

    @property
    def full(self) -> bool:
        """Are there enough transactions for a bundle, or tables?"""
        return len(self._heads) >= _BUNDLE_MAX or len(self._run) > _SHARED_MAX

    def bundle(self) -> Bundle | None:
        """The small transactions that have ended since the last call; one that has not goes on by itself."""
        heads, frames = self._heads, self.frames[: self._bundled]
        del self.frames[: self._bundled]
        self._heads, self._bundled = [], 0
        if self._begun is not None:
            begun, self._begun = self._begun, None
            committed_us, xid = _BEGIN_FIELDS.unpack_from(begun, _BEGIN_AT)
            self._open = _Open(xid, committed_us + pgoutput.PG_EPOCH_US)
        if not heads:
            return None
        made = Bundle(self.position.at(heads[-1].lsn), heads, _run(self._run, frames, streamed=False))
        if len(self._run) <= _SHARED_MAX:
            self._run = dict(self._run)  # the next one may name the same tables
        elif self._open is None:
            self._forget_run()
        return made

    def feed(self, frame: bytes) -> Transaction | None:
        """Take a whole XLogData frame that is not in :attr:`known`. Returns a transaction where it completes one."""
        opcode = frame[FRAME_BYTES]
        if opcode in b"IUD":
            self._change(frame)
            return None
        message = pgoutput.decode(frame[FRAME_BYTES:], in_stream=self._in_stream)
        return self._dispatch(message, frame)

    def _dispatch(self, message: pgoutput.Msg, frame: bytes) -> Transaction | None:  # noqa: C901, PLR0912
        match message:
            case pgoutput.Begin():
                self._open = _Open(message.xid, message.committed_us)
            case pgoutput.Commit():
                return self._finish(self._take(), message.end_lsn)
            case pgoutput.RelationMessage():
                self._learn(message)
            case pgoutput.TypeMessage():
                pass  # the relation's description carries its types
            case pgoutput.StreamStart():
                self._stream(message.xid)
            case pgoutput.StreamStop():
                self._stop()
            case pgoutput.StreamCommit():
                opened = self._ended(message.xid)
                opened.committed_us = message.committed_us
                return self._finish(opened, message.end_lsn)
            case pgoutput.StreamAbort():
                self._abort(message.xid, message.subxid)
            case pgoutput.Truncate():
                self._truncate(message, frame)
            case pgoutput.LogicalMessage():
                return self._message(message, frame)
            case pgoutput.Origin():
                self._origin(frame)
            case pgoutput.BeginPrepare():
                self._open = _Open(message.xid)
            case pgoutput.Prepare():
                self._prepare(self._take(), message.prepare_lsn, message.gid)
            case pgoutput.StreamPrepare():
                opened = self._ended(message.xid)
                self._prepare(opened, message.prepare_lsn, message.gid)
            case pgoutput.CommitPrepared():
                return self._commit_prepared(message)
            case pgoutput.RollbackPrepared():
                prepared = self._prepared.pop((message.xid, message.gid), None)
                if prepared is not None:
                    prepared.spool.close()
            case _:
                raise DecodeError(f"no place for a {type(message).__name__} message in a replication stream")
        return None

    def cut(self) -> None:
        """End the run: what is in :attr:`frames` goes to the open transaction's spool."""
        self._put_away()
        self._forget_run()

    def _forget_run(self) -> None:
        self._run = {}
        self.known.clear()

    def _put_away(self) -> None:
        """End the run; the next one may share its descriptions."""
        if self.frames:
            if self._open is None:
                raise DecodeError(f"a row message came outside of a transaction after {self.position}")
            self._open.spool.add(self._subxid, _run(self._run, self.frames, streamed=self._in_stream))
            self.frames.clear()

    def _change(self, frame: bytes) -> None:
        """The first message of this run for its relation (and subtransaction)."""
        if self._in_stream:
            subxid = int.from_bytes(frame[_XID])
            if subxid != self._subxid:
                self.cut()
                self._subxid = subxid
        key = frame[self.prefix]
        relation_id = int.from_bytes(key[-4:])
        if relation_id in self._left_out:
            return
        self._name(relation_id)
        self.known.update(opcode + key[1:] for opcode in (b"I", b"U", b"D"))
        self.frames.append(frame)

    def _name(self, relation_id: int) -> None:
        """Describe a relation in the current run."""
        relation = self._relation(relation_id)
        if relation is None:
            raise DecodeError(f"a change names relation {relation_id}, which the leader has not described")
        self._run[relation_id] = relation

    def _relation(self, relation_id: int) -> Relation | None:
        own = self._open.relations.get(relation_id) if self._open is not None else None
        return own or self._relations.get(relation_id)

    def _learn(self, message: pgoutput.RelationMessage) -> None:
        relation = self._describe(message)
        if relation is None:
            self._left_out.add(message.id)
            return
        self._left_out.discard(message.id)
        self._latest[message.id] = relation
        if relation == self._relation(message.id):
            return
        if message.id in self._run:
            self.cut()
        (self._open.relations if self._in_stream and self._open else self._relations)[message.id] = relation

    def _origin(self, frame: bytes) -> None:
        """It alone carries no xid in a stream; :func:`_run` takes four bytes from each message."""
        here = _XID.start
        self.frames.append(frame[:here] + bytes(4) + frame[here:] if self._in_stream else frame)

    def _truncate(self, message: pgoutput.Truncate, frame: bytes) -> None:
        if self._in_stream and int.from_bytes(frame[_XID]) != self._subxid:
            self.cut()
            self._subxid = int.from_bytes(frame[_XID])
        kept = [relation_id for relation_id in message.relation_ids if relation_id not in self._left_out]
        for relation_id in kept:
            self._name(relation_id)
        if len(kept) < len(message.relation_ids):
            at = _XID.stop if self._in_stream else _XID.start
            ids = b"".join([each.to_bytes(4) for each in kept])
            frame = frame[:at] + len(kept).to_bytes(4) + frame[at + 4 : at + 5] + ids
        if kept:
            self.frames.append(frame)

    def _message(self, message: pgoutput.LogicalMessage, frame: bytes) -> Transaction | None:
        if message.transactional:
            if self._in_stream and int.from_bytes(frame[_XID]) != self._subxid:
                self.cut()
                self._subxid = int.from_bytes(frame[_XID])
            self.frames.append(frame)
            return None
        # It belongs to no transaction and takes effect at once; between commits its LSN is in order.
        if not self.idle or message.lsn < self.position.lsn:
            return None
        alone = _Open(0)
        alone.spool.add(0, _run({}, [frame], streamed=self._in_stream))
        # The LSN is where the message begins, which the end of a commit right before it equals.
        return self._finish(alone, message.lsn + 1)

    def _stream(self, xid: int) -> None:
        self.cut()
        self._open = self._streams.setdefault(xid, _Open(xid))
        self._in_stream = True
        self._subxid = xid
        self.prefix = _STREAMED

    def _ended(self, xid: int) -> _Open:
        """The streamed transaction ``xid``, complete. Its descriptions hold for all, but for those made anew since."""
        opened = self._streams.pop(xid, None)
        if opened is None:
            raise DecodeError(f"the leader ended the stream of transaction {xid}, which had not begun")
        self.cut()
        self._relations |= {id_: each for id_, each in opened.relations.items() if self._latest[id_] == each}
        return opened

    def _stop(self) -> None:
        self.cut()
        self._open = None
        self._in_stream = False
        self._subxid = 0
        self.prefix = _PLAIN

    def _abort(self, xid: int, subxid: int) -> None:
        if xid == subxid:
            opened = self._streams.pop(xid, None)
            if opened is not None:
                opened.spool.close()
        elif xid in self._streams:
            self._streams[xid].aborted.add(subxid)

    def _prepare(self, opened: _Open, prepare_lsn: int, gid: str) -> None:
        opened.prepare_lsn = prepare_lsn
        self._prepared[opened.xid, gid] = opened

    def _commit_prepared(self, message: pgoutput.CommitPrepared) -> Transaction | None:
        opened = self._prepared.pop((message.xid, message.gid), None)
        if opened is None:
            if message.end_lsn <= self._after.lsn:
                return None
            raise GapError(
                f"transaction {message.gid!r} was committed at {format_lsn(message.commit_lsn)}, "
                "but the leader no longer sends what it prepared"
            )
        opened.committed_us = message.committed_us
        return self._finish(opened, message.end_lsn)

    def _take(self) -> _Open:
        """The open transaction, which ends here."""
        if len(self._run) > _SHARED_MAX:
            self.cut()
        else:
            self._put_away()
        opened, self._open = self._open, None
        if opened is None:
            raise DecodeError(f"the leader ended a transaction that had not begun, after {self.position}")
        return opened

    def _finish(self, opened: _Open, end_lsn: int) -> Transaction | None:
        if end_lsn > self.position.lsn:
            self.position = self.position.at(end_lsn)
        if not opened.spool or end_lsn <= self._after.lsn:
            opened.spool.close()
            return None
        spool = opened.spool
        position = self.position.at(end_lsn)
        return Transaction(position, opened.xid, opened.committed_us, spool.runs(opened.aborted), spool.size_bytes)

    def close(self) -> None:
        """Give back what uncommitted transactions hold."""
        for opened in (*self._streams.values(), *self._prepared.values()):
            opened.spool.close()


def _run(relations: dict[int, Relation], frames: list[bytes], *, streamed: bool) -> Run:
    """Strip the frames; a streamed message also loses its xid, so that a topic knows one form only."""
    if streamed:
        messages = [frame[FRAME_BYTES : FRAME_BYTES + 1] + frame[FRAME_BYTES + 5 :] for frame in frames]
    else:
        messages = [frame[FRAME_BYTES:] for frame in frames]
    return Run(relations, list(map(len, messages)), b"".join(messages))
