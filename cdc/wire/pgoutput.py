"""PostgreSQL's logical log as pgoutput tells it: protocol versions 1 to 4, servers 15 to 18. Bytes in, tuples out.

Messages: https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html
Their order: https://www.postgresql.org/docs/current/protocol-logical-replication.html
The frames around them: https://www.postgresql.org/docs/current/protocol-replication.html

Everything here is a pure function of its bytes. What is not exactly as documented raises
:class:`~cdc.errors.DecodeError` with the message's type and the byte's offset, and nothing else is ever raised. A
decoder allocates in proportion to the bytes it was given, whatever lengths they claim. Times are microseconds since
1970-01-01 UTC, LSNs are plain integers.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice, repeat
from struct import Struct
from struct import error as StructError  # noqa: N812
from typing import Final, Literal, NamedTuple, cast

from cdc.errors import DecodeError
from cdc.record import NULL, UNCHANGED, Value

PG_EPOCH_US: Final = 946_684_800_000_000  # 2000-01-01, from which PostgreSQL counts

Op = Literal["I", "U", "D"]
BeforeKind = Literal["K", "O"]


class Begin(NamedTuple):
    """``final_lsn`` is where the commit record begins, equal to ``commit_lsn`` of the Commit that follows."""

    final_lsn: int
    committed_us: int
    xid: int


class Commit(NamedTuple):
    """``end_lsn`` is the byte after the commit record: the transaction's position."""

    flags: int
    commit_lsn: int
    end_lsn: int
    committed_us: int


class Origin(NamedTuple):
    """The transaction came to this server from elsewhere; ``commit_lsn`` is its commit over there."""

    commit_lsn: int
    name: str


class ColumnMessage(NamedTuple):
    """``key``: part of the replica identity. ``modifier``: ``atttypmod``, -1 for none."""

    key: bool
    name: str
    type_oid: int
    modifier: int


class RelationMessage(NamedTuple):
    """``identity`` is ``pg_class.relreplident``: d(efault), n(othing), f(ull), i(ndex).

    ``xid`` here and below is that of the (sub)transaction, only in a streamed transaction; None elsewhere.
    """

    xid: int | None
    id: int
    schema: str
    name: str
    identity: str
    columns: tuple[ColumnMessage, ...]


class TypeMessage(NamedTuple):
    """The name of a type that is not built in. For a domain the server sends the OID with its base type's name."""

    xid: int | None
    oid: int
    schema: str
    name: str


class Insert(NamedTuple):
    xid: int | None
    relation_id: int
    after: list[Value]
    forms: bytes


class Update(NamedTuple):
    """``before`` and ``forms`` as in :class:`Change`."""

    xid: int | None
    relation_id: int
    before: list[Value] | None
    before_kind: BeforeKind | None
    after: list[Value]
    forms: bytes


class Delete(NamedTuple):
    xid: int | None
    relation_id: int
    before: list[Value]
    before_kind: BeforeKind
    forms: bytes


class Truncate(NamedTuple):
    xid: int | None
    relation_ids: tuple[int, ...]
    cascade: bool
    restart_identity: bool


class LogicalMessage(NamedTuple):
    """What ``pg_logical_emit_message`` wrote. ``transactional``: it belongs to the transaction around it.

    In a stream the server gives the xid of the top transaction, even where a subtransaction wrote the message.
    """

    xid: int | None
    transactional: bool
    lsn: int
    prefix: str
    content: bytes


class StreamStart(NamedTuple):
    """A block of an in-progress transaction begins; ``first`` where it is the transaction's first."""

    xid: int
    first: bool


class StreamStop(NamedTuple):
    pass


class StreamCommit(NamedTuple):
    xid: int
    flags: int
    commit_lsn: int
    end_lsn: int
    committed_us: int


class StreamAbort(NamedTuple):
    """All of ``xid`` is to be forgotten where ``subxid`` equals it, else what ``subxid`` did.

    LSN and time come only with ``streaming 'parallel'`` (protocol 4); None otherwise.
    """

    xid: int
    subxid: int
    abort_lsn: int | None
    aborted_us: int | None


class BeginPrepare(NamedTuple):
    prepare_lsn: int
    end_lsn: int
    prepared_us: int
    xid: int
    gid: str


class Prepare(NamedTuple):
    flags: int
    prepare_lsn: int
    end_lsn: int
    prepared_us: int
    xid: int
    gid: str


class CommitPrepared(NamedTuple):
    flags: int
    commit_lsn: int
    end_lsn: int
    committed_us: int
    xid: int
    gid: str


class RollbackPrepared(NamedTuple):
    """``prepare_end_lsn`` and ``prepared_us`` tell which PREPARE is meant, should its gid have been used twice."""

    flags: int
    prepare_end_lsn: int
    rollback_end_lsn: int
    prepared_us: int
    rolled_back_us: int
    xid: int
    gid: str


class StreamPrepare(NamedTuple):
    flags: int
    prepare_lsn: int
    end_lsn: int
    prepared_us: int
    xid: int
    gid: str


Msg = (
    Begin
    | Commit
    | Origin
    | RelationMessage
    | TypeMessage
    | Insert
    | Update
    | Delete
    | Truncate
    | LogicalMessage
    | StreamStart
    | StreamStop
    | StreamCommit
    | StreamAbort
    | BeginPrepare
    | Prepare
    | CommitPrepared
    | RollbackPrepared
    | StreamPrepare
)


class Change(NamedTuple):
    """One row change. The three before images are told apart by ``before_kind``.

    - None: the log has none (``before`` is None): an insert, or an update that left the identity alone;
    - ``K``: the identity's columns only. The others stand as NULL, which here means absent: a key is never NULL;
    - ``O``: the whole old row (``REPLICA IDENTITY FULL``).

    ``after`` is None for a delete. ``forms`` has one byte for each column: ``b`` (binary) or ``t`` (text) where either
    image holds a value; else that of ``after`` (or, for a delete, of ``before``), ``n`` (NULL) or ``u`` (unchanged).
    """

    op: Op
    relation_id: int
    before: list[Value] | None
    before_kind: BeforeKind | None
    after: list[Value] | None
    forms: bytes


# Row messages ---------------------------------------------------------------------------------------------------------

_INSERT, _DELETE = b"ID"
_NEW = ord("N")
_BEFORE_KINDS: Final[dict[int, BeforeKind]] = {ord("K"): "K", ord("O"): "O"}
_BINARY, _NULL, _UNCHANGED = b"bnu"

_length = Struct(">I").unpack_from
_kind_and_length = Struct(">BI").unpack_from
_relation_and_image = Struct(">IB").unpack_from


def read_tuple(message: bytes, at: int) -> tuple[list[Value], bytes, int]:
    """Read the TupleData at offset ``at``: its values, their forms, and the offset after it.

    Each value is its bytes behind a four-byte length, NULL, or UNCHANGED (:mod:`cdc.record`); the forms are a byte for
    each column: ``b``, ``t``, ``n`` or ``u``.

    :raises DecodeError: the tuple is cut short or has a column of an unknown kind.
    """
    # The hot path: several hundred thousand calls a second. Most tuples are binary without a NULL; the first column
    # that is not goes on in _read_mixed with what is read so far. A slice that reaches past the end is short, and
    # found out by the last comparison; no length makes it longer than the message.
    values: list[Value] = []
    try:
        count = message[at] << 8 | message[at + 1]
        at += 2
        for _ in repeat(None, count):
            if message[at] != _BINARY:
                return _read_mixed(message, at, count, values)
            (length,) = _length(message, at + 1)
            values.append(message[at + 1 : (at := at + 5 + length)])
    except (IndexError, StructError):
        raise _malformed(message, at, f"column {len(values) + 1} is cut short") from None
    if at > len(message):
        raise _malformed(message, at, "the last value reaches past the end")
    return values, b"b" * count, at


def _read_mixed(message: bytes, at: int, count: int, values: list[Value]) -> tuple[list[Value], bytes, int]:
    forms = [_BINARY] * len(values)
    try:
        for _ in repeat(None, count - len(values)):
            kind = message[at]
            forms.append(kind)
            if kind == _NULL:
                values.append(NULL)
                at += 1
            elif kind in b"bt":
                (length,) = _length(message, at + 1)
                values.append(message[at + 1 : (at := at + 5 + length)])
            elif kind == _UNCHANGED:
                values.append(UNCHANGED)
                at += 1
            else:
                raise _malformed(message, at, f"column {len(values) + 1} is of unknown kind {chr(kind)!r}")
    except (IndexError, StructError):
        raise _malformed(message, at, f"column {len(values) + 1} is cut short") from None
    if at > len(message):
        raise _malformed(message, at, "the last value reaches past the end")
    return values, bytes(forms), at


def copy_inserts(body: bytes, at: int, lengths: Sequence[int], first: int, rows: list[bytes]) -> tuple[int, int]:
    """Turn consecutive Inserts into one relation into rows of binary COPY data, without a look at their values.

    ``body`` holds the messages end to end, ``lengths`` their lengths; the ``first``-th begins at ``at``. Stops before a
    message that is no Insert into the same relation with as many columns, or that holds text. Appends to ``rows`` the
    pieces, to be joined, and returns how many messages they are and the offset after them. A malformed message stops it
    too: :func:`decode_change` tells what is wrong with it.
    """
    prefix = body[at : at + 8]  # opcode, relation id, "N", number of columns
    count, columns = prefix[6:], range(int.from_bytes(prefix[6:]))
    padded = body + bytes(4)  # so that a kind and a length can be read at once at the very end
    done = 0
    for length in islice(lengths, first, None):
        end = at + length
        mark = len(rows)
        rows.append(count)
        place = at + 8
        for _ in columns:
            kind, size = _kind_and_length(padded, place) if place < end else (0, 0)
            if kind == _BINARY:
                rows.append(body[place + 1 : (place := place + 5 + size)])
            elif kind == _NULL:
                rows.append(NULL)
                place += 1
            else:
                place = -1
                break
        if place != end or body[at : at + 8] != prefix:
            del rows[mark:]
            break
        at = end
        done += 1
    return done, at


def decode_change(message: bytes) -> Change:
    """Decode an Insert, Update or Delete that stands outside of a stream (without the streaming xid).

    :raises DecodeError: it is another message, or malformed.
    """
    return _decode_change(message, 1)


def _decode_change(message: bytes, at: int) -> Change:
    try:
        relation_id, image = _relation_and_image(message, at)
    except StructError:
        raise _malformed(message, at, "the relation id is cut short") from None
    op = message[0]
    at += 5
    if op not in b"IUD":
        raise _malformed(message, 0, "not a row message")
    if image == _NEW and op != _DELETE:
        after, forms, end = read_tuple(message, at)
        change = Change("I" if op == _INSERT else "U", relation_id, None, None, after, forms)
    elif op != _INSERT and (kind := _BEFORE_KINDS.get(image)) is not None:
        before, forms, end = read_tuple(message, at)
        if op == _DELETE:
            change = Change("D", relation_id, before, kind, None, forms)
        else:
            after, forms, end = _read_after(message, end, forms)
            change = Change("U", relation_id, before, kind, after, forms)
    else:
        raise _malformed(message, at - 1, f"unknown row image {chr(image)!r}")
    if end != len(message):
        raise _malformed(message, end, "unexpected bytes after the message")
    return change


def _read_after(message: bytes, at: int, old: bytes) -> tuple[list[Value], bytes, int]:
    if message[at : at + 1] != b"N":
        raise _malformed(message, at, "the new row is missing")
    after, new, end = read_tuple(message, at + 1)
    merged = _merge_forms(old, new)
    if merged is None:
        raise _malformed(message, at, f"rows of {len(old)} and {len(new)} columns do not agree in number or forms")
    return after, merged, end


@lru_cache(maxsize=64)  # a table has few pairs of them, repeated for every row
def _merge_forms(old: bytes, new: bytes) -> bytes | None:
    if len(old) != len(new):
        return None
    pairs = list(zip(old, new, strict=True))
    if any({was, now} == {*b"bt"} for was, now in pairs):
        return None
    return bytes(was if was in b"bt" else now for was, now in pairs)


def _insert(message: bytes, at: int, xid: int | None) -> Insert:
    change = _decode_change(message, at)
    return Insert(xid, change.relation_id, cast("list[Value]", change.after), change.forms)


def _update(message: bytes, at: int, xid: int | None) -> Update:
    change = _decode_change(message, at)
    after = cast("list[Value]", change.after)
    return Update(xid, change.relation_id, change.before, change.before_kind, after, change.forms)


def _delete(message: bytes, at: int, xid: int | None) -> Delete:
    change = _decode_change(message, at)
    before, kind = cast("list[Value]", change.before), cast("BeforeKind", change.before_kind)
    return Delete(xid, change.relation_id, before, kind, change.forms)


# The other messages ---------------------------------------------------------------------------------------------------


class _Reader:
    """Walks a message and says where it went wrong."""

    __slots__ = ("at", "message")

    def __init__(self, message: bytes, at: int) -> None:
        self.message = message
        self.at = at

    def take(self, count: int, what: str) -> bytes:
        taken = self.message[self.at : self.at + count]
        if len(taken) < count:
            raise self.malformed(f"{what} is cut short")
        self.at += count
        return taken

    def unsigned(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "big")

    def signed(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "big", signed=True)

    def lsn(self, what: str = "the LSN") -> int:
        return self.unsigned(8, what)

    def xid(self) -> int:
        return self.unsigned(4, "the transaction id")

    def oid(self) -> int:
        return self.unsigned(4, "the object id")

    def flags(self, known: int = 0xFF) -> int:
        value = self.unsigned(1, "the flag byte")
        if value & ~known:
            self.at -= 1
            raise self.malformed(f"unknown flags {value:#04x}")
        return value

    def time_us(self) -> int:
        return self.signed(8, "the time") + PG_EPOCH_US

    def string(self, what: str) -> str:
        end = self.message.find(b"\0", self.at)
        if end < 0:
            raise self.malformed(f"{what} does not end")
        try:
            text = self.message[self.at : end].decode()
        except UnicodeDecodeError as error:
            raise self.malformed(f"{what} is not UTF-8: {error.reason}") from None
        self.at = end + 1
        return text

    def schema(self) -> str:
        return self.string("the schema name") or "pg_catalog"

    def end(self) -> None:
        if self.at != len(self.message):
            raise self.malformed("unexpected bytes after the message")

    def malformed(self, what: str) -> DecodeError:
        return _malformed(self.message, self.at, what)


# Every transaction has these two: they are read in one step.
_begin_fields = Struct(">QqI")
_commit_fields = Struct(">BQQq")


def _begin(r: _Reader) -> Begin:
    final_lsn, committed, xid = _begin_fields.unpack(r.take(_begin_fields.size, "the transaction's beginning"))
    return Begin(final_lsn, committed + PG_EPOCH_US, xid)


def _commit(r: _Reader) -> Commit:
    flags, commit_lsn, end_lsn, committed = _commit_fields.unpack(r.take(_commit_fields.size, "the commit"))
    return Commit(flags, commit_lsn, end_lsn, committed + PG_EPOCH_US)


def _origin(r: _Reader) -> Origin:
    return Origin(r.lsn(), r.string("the origin's name"))


def _relation(r: _Reader, xid: int | None) -> RelationMessage:
    oid, schema, name = r.oid(), r.schema(), r.string("the table name")
    identity = r.take(1, "the replica identity")
    if identity not in (b"d", b"n", b"f", b"i"):
        r.at -= 1
        raise r.malformed(f"unknown replica identity {identity.decode('latin-1')!r}")
    count = r.unsigned(2, "the number of columns")
    return RelationMessage(xid, oid, schema, name, identity.decode(), tuple(_column(r) for _ in range(count)))


def _column(r: _Reader) -> ColumnMessage:
    return ColumnMessage(r.flags(1) == 1, r.string("the column name"), r.oid(), r.signed(4, "the type modifier"))


def _type(r: _Reader, xid: int | None) -> TypeMessage:
    return TypeMessage(xid, r.oid(), r.schema(), r.string("the type name"))


def _truncate(r: _Reader, xid: int | None) -> Truncate:
    count, options = r.unsigned(4, "the number of tables"), r.flags(3)
    if len(r.message) - r.at < 4 * count:  # before anything is made of that number
        raise r.malformed(f"{count} table ids are cut short")
    return Truncate(xid, tuple(r.oid() for _ in range(count)), options & 1 == 1, options & 2 == 2)


def _message(r: _Reader, xid: int | None) -> LogicalMessage:
    transactional, lsn, prefix = r.flags(1) == 1, r.lsn(), r.string("the prefix")
    length = r.unsigned(4, "the content's length")
    return LogicalMessage(xid, transactional, lsn, prefix, r.take(length, f"the content of {length} bytes"))


def _stream_start(r: _Reader) -> StreamStart:
    return StreamStart(r.xid(), r.flags(1) == 1)


def _stream_stop(_: _Reader) -> StreamStop:
    return StreamStop()


def _stream_commit(r: _Reader) -> StreamCommit:
    return StreamCommit(r.xid(), r.flags(), r.lsn(), r.lsn(), r.time_us())


def _stream_abort(r: _Reader, protocol: int) -> StreamAbort:
    xid, subxid = r.xid(), r.xid()
    if protocol < 4 or r.at == len(r.message):
        return StreamAbort(xid, subxid, None, None)
    return StreamAbort(xid, subxid, r.lsn(), r.time_us())


def _begin_prepare(r: _Reader) -> BeginPrepare:
    return BeginPrepare(r.lsn(), r.lsn(), r.time_us(), r.xid(), r.string("the gid"))


def _prepare(r: _Reader) -> Prepare:
    return Prepare(r.flags(), r.lsn(), r.lsn(), r.time_us(), r.xid(), r.string("the gid"))


def _commit_prepared(r: _Reader) -> CommitPrepared:
    return CommitPrepared(*_prepare(r))


def _rollback_prepared(r: _Reader) -> RollbackPrepared:
    return RollbackPrepared(r.flags(), r.lsn(), r.lsn(), r.time_us(), r.time_us(), r.xid(), r.string("the gid"))


def _stream_prepare(r: _Reader) -> StreamPrepare:
    return StreamPrepare(*_prepare(r))


_ROWS: Final[dict[int, Callable[[bytes, int, int | None], Msg]]] = dict(
    zip(b"IUD", (_insert, _update, _delete), strict=True)
)
_WITH_XID: Final[dict[int, Callable[[_Reader, int | None], Msg]]] = dict(
    zip(b"RYTM", (_relation, _type, _truncate, _message), strict=True)
)
_PLAIN: Final[dict[int, Callable[[_Reader], Msg]]] = dict(
    zip(
        b"BCOSEcbPKrp",
        (
            _begin,
            _commit,
            _origin,
            _stream_start,
            _stream_stop,
            _stream_commit,
            _begin_prepare,
            _prepare,
            _commit_prepared,
            _rollback_prepared,
            _stream_prepare,
        ),
        strict=True,
    )
)
_ABORT: Final = ord("A")
_SINCE: Final = {**dict.fromkeys(b"SEcA", 2), **dict.fromkeys(b"bPKrp", 3)}


def decode(message: bytes, *, in_stream: bool = False, protocol: int = 4) -> Msg:
    """Decode any message.

    ``in_stream``: it came between StreamStart and StreamStop, where R, Y, I, U, D, T and M begin with the id of their
    (sub)transaction. ``protocol`` is the version that was negotiated, 1 to 4.

    :raises DecodeError: unknown, malformed, longer or shorter than it should be, or not of that protocol.
    """
    if not message:
        raise DecodeError("empty pgoutput message at byte 0")
    kind = message[0]
    if _SINCE.get(kind, 1) > protocol:
        raise _malformed(message, 0, f"it came with protocol {_SINCE[kind]}, but {protocol} was agreed on")
    reader = _Reader(message, 1)
    if (rows := _ROWS.get(kind)) is not None:
        xid = reader.xid() if in_stream else None
        return rows(message, reader.at, xid)
    decoded: Msg
    if (with_xid := _WITH_XID.get(kind)) is not None:
        decoded = with_xid(reader, reader.xid() if in_stream else None)
    elif (plain := _PLAIN.get(kind)) is not None:
        decoded = plain(reader)
    elif kind == _ABORT:
        decoded = _stream_abort(reader, protocol)
    else:
        raise _malformed(message, 0, "unknown message type")
    reader.end()
    return decoded


def _malformed(message: bytes, at: int, what: str) -> DecodeError:
    kind = message[:1].decode("latin-1")
    return DecodeError(f"pgoutput message {kind!r} of {len(message)} bytes: {what}, at byte {at}")


# The frames of the replication protocol -------------------------------------------------------------------------------

_xlogdata = Struct(">cQQq")
_keepalive = Struct(">cQqB")
_status = Struct(">cQQQqB")


def decode_xlogdata(data: bytes | memoryview) -> tuple[int, int, int, bytes]:
    """Open a ``w`` frame: the payload's LSN, the end of the server's log, when it was sent (µs), the payload.

    :raises DecodeError: it is not one, or cut short.
    """
    start_lsn, end_lsn, sent_us = _open(_xlogdata, b"w", data)[1:]
    return start_lsn, end_lsn, sent_us + PG_EPOCH_US, bytes(data[_xlogdata.size :])


def decode_keepalive(data: bytes | memoryview) -> tuple[int, int, bool]:
    """Open a ``k`` frame: the end of the server's log, when it was sent (µs), whether it wants an answer at once.

    :raises DecodeError: it is not one, or not of its length.
    """
    end_lsn, sent_us, reply = _open(_keepalive, b"k", data)[1:]
    if len(data) > _keepalive.size or reply > 1:
        raise DecodeError(f"malformed keepalive frame of {len(data)} bytes, asking for reply {reply}, at byte 17")
    return end_lsn, sent_us + PG_EPOCH_US, reply == 1


def encode_status(written: int, flushed: int, applied: int, *, reply: bool, now_us: int) -> bytes:
    """Make the ``r`` frame that tells the server how far we are, each LSN the byte after the last one meant.

    ``flushed`` allows the server to forget what is below. ``reply`` asks it to answer at once.
    """
    return _status.pack(b"r", written, flushed, applied, now_us - PG_EPOCH_US, reply)


def _open(frame: Struct, kind: bytes, data: bytes | memoryview) -> tuple[int, ...]:
    try:
        fields = frame.unpack_from(data)
    except StructError:
        raise DecodeError(f"replication frame of {len(data)} bytes is cut short, at byte {len(data)}") from None
    if fields[0] != kind:
        raise DecodeError(f"replication frame {fields[0]!r} where {kind!r} was expected, at byte 0")
    return fields
