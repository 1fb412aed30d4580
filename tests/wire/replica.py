"""The simplest reader of the log that can be right: tables as lists of rows, transactions applied where they commit."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cdc.record import NULL, UNCHANGED, Value
from cdc.wire.pgoutput import (
    Begin,
    BeginPrepare,
    Commit,
    CommitPrepared,
    Delete,
    Insert,
    LogicalMessage,
    Msg,
    Origin,
    Prepare,
    RelationMessage,
    RollbackPrepared,
    StreamAbort,
    StreamCommit,
    StreamPrepare,
    StreamStart,
    StreamStop,
    Truncate,
    TypeMessage,
    Update,
    decode,
    decode_keepalive,
    decode_xlogdata,
)
from tests.wire.record_golden import TABLES

Row = dict[str, Value]


def messages(frames: Iterable[bytes], protocol: int) -> list[tuple[bytes, bool, Msg]]:
    """Each message of a recorded stream: its bytes, whether it stood in a stream block, and what it says."""
    told: list[tuple[bytes, bool, Msg]] = []
    in_stream = False
    for frame in frames:
        if frame[:1] == b"k":
            decode_keepalive(frame)
            continue
        payload = decode_xlogdata(frame)[3]
        message = decode(payload, in_stream=in_stream, protocol=protocol)
        told.append((payload, in_stream, message))
        in_stream = isinstance(message, StreamStart) or (in_stream and not isinstance(message, StreamStop))
    return told


@dataclass
class Replica:
    """Feed it messages in order; ``tables`` is what has been committed, by relation name."""

    tables: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    relations: dict[int, RelationMessage] = field(default_factory=dict)
    forms: dict[tuple[str, str], int] = field(default_factory=dict)
    open: list[Msg] = field(default_factory=list)
    streamed: dict[int, list[Msg]] = field(default_factory=dict)
    streaming: int | None = None
    prepared: dict[str, list[Msg]] = field(default_factory=dict)

    def feed(self, message: Msg) -> None:  # noqa: C901, PLR0912 (one case for each message)
        match message:
            case Begin() | BeginPrepare():
                assert not self.open
                assert self.streaming is None
            case Commit():
                self._apply(self.open)
                self.open = []
            case Prepare(gid=gid):
                self.prepared[gid], self.open = self.open, []
            case StreamStart(xid=xid, first=first):
                assert self.streaming is None
                assert first == (xid not in self.streamed)
                self.streaming = xid
                self.streamed.setdefault(xid, [])
            case StreamStop():
                self.streaming = None
            case StreamAbort(xid=xid, subxid=subxid) if xid == subxid:
                del self.streamed[xid]
            case StreamAbort(xid=xid, subxid=subxid):
                self.streamed[xid] = [told for told in self.streamed[xid] if getattr(told, "xid", None) != subxid]
            case StreamCommit(xid=xid):
                self._apply(self.streamed.pop(xid))
            case StreamPrepare(xid=xid, gid=gid):
                self.prepared[gid] = self.streamed.pop(xid)
            case CommitPrepared(gid=gid):
                self._apply(self.prepared.pop(gid))
            case RollbackPrepared(gid=gid):
                del self.prepared[gid]
            case LogicalMessage(transactional=False):
                pass
            case RelationMessage() if self.streaming is None:
                # At once, not at the commit: a transaction that is only prepared may be the one to tell it, and the
                # server does not repeat it for those that commit before.
                self.relations[message.id] = message
            case _ if self.streaming is not None:
                self.streamed[self.streaming].append(message)
            case _:
                self.open.append(message)

    def _apply(self, changes: Sequence[Msg]) -> None:
        for change in changes:
            match change:
                case RelationMessage():
                    self.relations[change.id] = change
                case Insert():
                    self._table(change.relation_id).append(self._row(change.relation_id, change.after, change.forms))
                case Update():
                    self._update(change)
                case Delete():
                    before = self._row(change.relation_id, change.before, change.forms)
                    self._table(change.relation_id).remove(self._find(change.relation_id, before))
                case Truncate():
                    for relation_id in change.relation_ids:
                        self._table(relation_id).clear()
                case TypeMessage() | Origin() | LogicalMessage():
                    pass
                case _:
                    raise AssertionError(change)

    def _update(self, change: Update) -> None:
        after = self._row(change.relation_id, change.after, change.forms)
        before = after if change.before is None else self._row(change.relation_id, change.before, change.forms)
        row = self._find(change.relation_id, before)
        row.update({name: value for name, value in after.items() if value is not UNCHANGED})

    def _row(self, relation_id: int, values: Sequence[Value], forms: bytes) -> Row:
        relation = self.relations[relation_id]
        assert len(values) == len(forms) == len(relation.columns)
        for column, value, form in zip(relation.columns, values, forms, strict=True):
            if value is not UNCHANGED and value != NULL:
                assert self.forms.setdefault((relation.name, column.name), form) == form
        return {column.name: value for column, value in zip(relation.columns, values, strict=True)}

    def _find(self, relation_id: int, image: Row) -> Row:
        keys = [column.name for column in self.relations[relation_id].columns if column.key]
        assert keys
        return next(row for row in self._table(relation_id) if all(row[key] == image[key] for key in keys))

    def _table(self, relation_id: int) -> list[Row]:
        return self.tables[self.relations[relation_id].name]


PUBLISHED = {name.rsplit(".", 1)[-1] for name in TABLES} - {"unpublished"}


def assert_same_tables(tables: dict[str, Any], said: Iterable[Msg], expected: set[str]) -> None:
    """What a replica makes of a recording's messages is what the server's tables held (record_golden.py)."""
    replica = Replica()
    for message in said:
        replica.feed(message)
    assert (replica.open, replica.streamed, replica.prepared) == ([], {}, {})
    assert set(replica.tables) == expected
    by_name = {name.rsplit(".", 1)[-1]: table for name, table in tables.items()}
    for name in expected - {"plain"}:  # plain's columns changed: there is a test of its own
        assert sorted(_replayed(replica, name)) == sorted(_stored(replica, name, by_name[name])), name


def _replayed(replica: Replica, name: str) -> Iterator[str]:
    for row in replica.tables[name]:
        yield repr([None if value is UNCHANGED or value == NULL else value[4:].hex() for value in row.values()])


def _stored(replica: Replica, name: str, table: dict[str, Any]) -> Iterator[str]:
    """The server's rows, each column in the form the log gave it in, without those that the log leaves out."""
    relation = next(relation for relation in replica.relations.values() if relation.name == name)
    picks = [
        (
            table["columns"].index(column.name),
            "binary" if replica.forms.get((name, column.name)) == ord("b") else "text",
        )
        for column in relation.columns
    ]
    for rows in zip(table["text"], table["binary"], strict=True):
        by_form = dict(zip(("text", "binary"), rows, strict=True))
        yield repr([by_form[form][at] for at, form in picks])
