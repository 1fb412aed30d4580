"""Rebuilds a follower from Debezium's topics: ours, or those of Debezium itself.

Where the transaction topic is there, a transaction of the leader is a transaction of the follower. Elsewhere each key
comes to its last state, in the order of its partition. Either way a row is overwritten by its key or deleted by it, so
that events told twice change nothing in the end; and where each partition is to be read on is kept in the follower, in
the same commit: a checkpoint for each, under the name ``<stream> <topic>[<partition>]``.

Key by key one thing cannot be told: whether an update that leaves out unchanged values and finds no row was
told again, after the row was deleted, or misses a row that should be there. It is taken for the first.
"""

import gc
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final, NamedTuple

from cdc.debezium.assemble import Assembler, Unit
from cdc.debezium.decode import Decoder, Event, Item, Table
from cdc.debezium.schema import Modes
from cdc.errors import ConflictError, GapError, SchemaError
from cdc.events import EventBroker, Place, StoredEvent
from cdc.ports import Follower
from cdc.position import Position
from cdc.record import UNCHANGED, Checkpoint, Relation, Row, RowSet

_FETCH_BYTES: Final = 4 << 20
_NOT_DATA: Final = (".cdc", ".message")
_TRANSACTIONS: Final = ".transaction"
_ROWS_MAX: Final = 5_000  # of one table in one statement
_STUCK_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class EventApplyOptions:
    """``stream`` names what was applied, in the follower. ``until_end``: stop at what the topics hold at start.

    ``transactions``: keep together what a transaction block says belongs together; False applies key by key.
    ``stuck_s``: how long a transaction may lack its end, or events that its end has counted.
    """

    stream: str
    prefix: str
    modes: Modes = field(default_factory=Modes)
    until_end: bool = False
    transactions: bool = True
    stuck_s: float = _STUCK_S
    limit_bytes: int = 256 << 20


def apply_events(
    broker: EventBroker,
    follower: Follower,
    options: EventApplyOptions,
    *,
    stop: threading.Event,
    progressed: Callable[[int], None] = lambda _: None,
    fetched: Callable[[Sequence[StoredEvent]], None] = lambda _: None,
) -> None:
    """Apply until told to stop, or until the end. ``progressed`` hears how many events each commit held, ``fetched``
    what was read, also where it was nothing: what came before is then applied as far as it is complete.

    :raises GapError: records are missing: retention has passed, or a transaction lacks events.
    :raises CdcError: as the broker and the follower do; the follower is then at its last commit.
    """
    with closing(follower):
        _Apply(broker, follower, options, _Hooks(progressed, fetched)).run(stop)


_Read = tuple[Sequence[StoredEvent], list[Item]]


class _Hooks(NamedTuple):
    progressed: Callable[[int], None]
    fetched: Callable[[Sequence[StoredEvent]], None]


@contextmanager
def _no_collections() -> Iterator[None]:
    """Parsed JSON holds no cycles, and looking for some in all of it again and again takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Apply:
    """One attempt."""

    def __init__(self, broker: EventBroker, follower: Follower, options: EventApplyOptions, hooks: "_Hooks") -> None:
        self._broker = broker
        self._follower = follower
        self._options = options
        self._progressed, self._fetched = hooks
        self._decoder = Decoder()
        self._writer = EventWriter(follower, options.stream, options.modes)
        self._offsets: dict[Place, int] = {}
        self._read: dict[Place, int] = {}
        self._positions: dict[Place, Position] = {}
        self._epochs: dict[Place, int] = {}
        self._applied_lsn = -1
        self._assembler = Assembler(limit_bytes=options.limit_bytes)
        self._opened: _Opened | None = None

    def run(self, stop: threading.Event) -> None:
        try:
            with _no_collections(), ThreadPoolExecutor(1, "cdc-fetch") as reading:
                self._run(stop, reading)
        finally:
            if self._opened:
                self._follower.rollback()

    def _run(self, stop: threading.Event, reading: ThreadPoolExecutor) -> None:
        """What comes next is read while the follower writes."""
        self._discover()
        ends = {place: self._broker.bounds(place)[1] for place in self._read} if self._options.until_end else None
        fed = time.monotonic()
        ahead: Future[_Read] | None = None
        while not stop.is_set() and not self._reached(ends):
            records, items = (ahead or reading.submit(self._fetch, dict(self._read))).result()
            self._fetched(records)
            for record in records:
                self._read[record.place] = record.offset + 1
            is_more = records and (ends is None or any(self._read[place] < end for place, end in ends.items()))
            ahead = reading.submit(self._fetch, dict(self._read)) if is_more else None
            self._take(records, items)
            if self._apply(self._assembler.units()):
                fed = time.monotonic()
            if records:
                continue
            self._check(ends is not None, fed)
            if ends is not None:
                return  # what is left belongs to a transaction whose end is not told yet
            if not self._opened:
                self._discover()

    def _fetch(self, offsets: Mapping[Place, int]) -> "_Read":
        records = self._broker.fetch(offsets, limit_bytes=_FETCH_BYTES, wait_s=0.5)
        return records, self._decoder.decode_all(records)

    def _reached(self, ends: Mapping[Place, int] | None) -> bool:
        return ends is not None and all(self._offsets[place] >= end for place, end in ends.items())

    def _check(self, at_end: bool, fed: float) -> None:
        """Nothing came: is anything amiss?"""
        lacking = self._assembler.waiting
        if lacking is None and self._assembler.holds and not at_end:
            lacking = "the end of a transaction"
        if lacking is not None and (at_end or time.monotonic() - fed > self._options.stuck_s):
            raise GapError(
                f"nothing more came for {lacking}",
                remedy="let every topic of the prefix be kept and be readable, or apply without transactions",
            )

    def _discover(self) -> None:
        """Own every partition there is by now."""
        prefix = self._options.prefix + "."
        found = [place for place in self._broker.places() if place.topic.startswith(prefix) and place not in self._read]
        # By whole name: a table may be called `message` too.
        apart = {self._options.prefix + name for name in _NOT_DATA}
        if not self._options.transactions:
            apart.add(self._options.prefix + _TRANSACTIONS)
        found = [place for place in found if place.topic not in apart]
        if found:
            self._follower.begin()
            for place in found:
                self._claim(place)
            self._follower.commit()

    def _claim(self, place: Place) -> None:
        name = self._name(place)
        self._epochs[place] = self._follower.claim(name)
        checkpoint = self._follower.read_checkpoint(name)
        offset = checkpoint.offset if checkpoint is not None else self._broker.bounds(place)[0]
        self._offsets[place] = self._read[place] = offset
        if checkpoint is not None:
            self._positions[place] = checkpoint.position
            if place.topic == self._options.prefix + _TRANSACTIONS:
                self._applied_lsn = self._assembler.applied_lsn = checkpoint.position.lsn

    def _name(self, place: Place) -> str:
        return f"{self._options.stream} {place}"

    def _take(self, records: Sequence[StoredEvent], items: Sequence[Item]) -> None:
        add, apart = self._assembler.add, not self._options.transactions
        for record, item in zip(records, items, strict=True):
            place, offset, _, value, _ = record
            if isinstance(item, Event):
                self._positions[place] = item.position
                if apart and item.xid is not None:
                    item = item.alone()
            add(place, offset, item, 0 if value is None else len(value))

    def _apply(self, units: Iterator[Unit]) -> bool:
        """Write what is complete and commit it, about a fetch at a time. Whether anything was."""
        done = False
        waiting: list[Unit] = []
        events = 0
        for unit in units:
            waiting.append(unit)
            events += len(unit.events)
            if unit.open or events >= _ROWS_MAX:
                self._write(waiting)
                waiting, events = [], 0
            done = True
        if waiting:
            self._write(waiting)
        return done

    def _write(self, units: list[Unit]) -> None:
        """Write events, and commit them with their checkpoints unless a transaction stays open."""
        if not self._opened:
            self._follower.begin()
        try:
            events = [event for unit in units for event in unit.events]
            self._writer.write(events)
            opened = self._opened or _Opened()
            opened.events += len(events)
            for unit in units:
                opened.offsets |= unit.offsets
                opened.lsn = unit.lsn if unit.lsn is not None else opened.lsn
            self._opened = opened
            if not self._assembler.is_open:
                self._commit(opened)
        except BaseException:
            self._opened = None
            self._follower.rollback()
            self._writer.forget()
            raise

    def _commit(self, opened: "_Opened") -> None:
        for place, offset in opened.offsets.items():
            self._checkpoint(place, offset, opened.lsn)
        self._follower.commit()
        self._opened = None
        self._offsets |= opened.offsets
        self._applied_lsn = opened.lsn if opened.lsn is not None else self._applied_lsn
        self._progressed(opened.events)

    def _checkpoint(self, place: Place, offset: int, lsn: int | None) -> None:
        at = self._positions.get(place, Position(self._options.prefix, 1, 0))
        if place.topic == self._options.prefix + _TRANSACTIONS:
            at = Position(self._options.prefix, 1, max(lsn if lsn is not None else self._applied_lsn, 0))
        self._follower.write_checkpoint(self._name(place), Checkpoint(at, offset, self._epochs[place]))


@dataclass(slots=True)
class _Opened:
    """What was written into the follower's open transaction."""

    events: int = 0
    offsets: dict[Place, int] = field(default_factory=dict)
    lsn: int | None = None


class EventWriter:
    """Writes events into a follower's open transaction."""

    def __init__(self, follower: Follower, stream: str, modes: Modes) -> None:
        self._follower = follower
        self._stream = stream
        self._modes = modes
        self._tables: dict[str, tuple[object, Table]] = {}

    def forget(self) -> None:
        """What was learned of the follower may have been rolled back."""
        self._tables.clear()

    def write(self, events: Iterable[Event]) -> None:
        """Write the net effect of events, each table's in order.

        :raises ConflictError, SchemaError: a change does not fit the follower.
        """
        pending: dict[str, _Net] = {}
        for _, alike in groupby(events, _kind):
            group = list(alike)
            table = self._table(group[0])
            label = group[0].label
            net = pending.get(label)
            if net is not None and net.table is not table:
                self._flush(pending.pop(label))
                net = None
            if group[0].op != "t" and not table.relation.primary_key:
                for event in group:
                    self._write_keyless(table, event)
                continue
            for at in range(0, len(group), _ROWS_MAX):
                net = pending.setdefault(label, _Net(table))
                self._take(net, group[at : at + _ROWS_MAX])
                if len(net) >= _ROWS_MAX or group[0].op == "t":
                    self._flush(pending.pop(label))
        for net in pending.values():
            self._flush(net)

    def _take(self, net: "_Net", events: list[Event]) -> None:
        """Events of one kind, see :func:`_kind`."""
        if events[0].op == "t":
            net.clear()  # what was before it does not matter
            self._follower.truncate([net.table.relation], cascade=False, restart_identity=False)
        elif not net.take_whole(events):
            for event in events:
                net.take(event)

    def _table(self, event: Event) -> Table:
        # Without a schema the names must do.
        shape: object = event.fields if event.fields is not None else list(event.after or event.before or ())
        known = self._tables.get(event.label)
        if known is not None and (known[0] is shape or known[0] == shape):
            return known[1]
        if event.op == "t" and known is not None:
            return known[1]
        bare = Relation(0, event.schema, event.table, "d", ())
        table = Table(event, self._follower.columns(bare), self._modes)
        declared = self._follower.columns(table.relation)
        if declared is None:
            self._follower.create(table.relation)
            table = Table(event, self._follower.columns(table.relation), self._modes)
        elif missing := [c.name for c in table.relation.columns if c.name not in declared]:
            raise SchemaError(
                f"the follower's table {event.label} has no column {', '.join(map(repr, missing))}",
                remedy="add it there, with the leader's type",
            )
        if event.op != "t":  # which has no key
            self._tables[event.label] = shape, table
        return table

    def _flush(self, net: "_Net") -> None:
        deletes, updates, upserts = net.sets()
        if deletes.matches:
            self._follower.delete(deletes)
        for update in updates:
            if self._follower.update(update) != len(update.matches) and not net.tolerant:
                raise _lacking(net.table.relation)
        if upserts.rows:
            self._upsert(net, upserts)

    def _upsert(self, net: "_Net", upserts: RowSet) -> None:
        """Overwrite; and where rows trade values of another unique column, take all of them out first."""
        try:
            self._follower.savepoint()
        except NotImplementedError:
            self._follower.insert(upserts, replace=True)
            return
        try:
            self._follower.insert(upserts, replace=True)
        except ConflictError:
            self._follower.rollback_to_savepoint()
            self._follower.delete(net.matching(upserts))
            self._follower.insert(upserts)

    def _write_keyless(self, table: Table, event: Event) -> None:
        relation = table.relation
        if event.xid is None:
            raise SchemaError(
                f"table {relation.label} has no key, so events of it that are told twice could not be told apart",
                remedy="give it a primary key on the leader, or leave it out",
            )
        every = tuple(range(len(relation.columns)))
        rows = RowSet(relation, b"t" * len(every), unique=False)
        if event.before is not None:
            rows.match, rows.matches = every, [_whole(table, table.row(event.before))]
        if event.after is not None:
            rows.columns, rows.rows = every, [_whole(table, table.row(event.after))]
        if event.op == "c":
            self._follower.insert(rows)
            return
        if event.before is None:
            raise SchemaError(
                f"a change of {relation.label}, which has no key, comes without the old row",
                remedy=f'ALTER TABLE "{relation.schema}"."{relation.name}" REPLICA IDENTITY FULL, on the leader',
            )
        changed = self._follower.update(rows) if event.op == "u" else self._follower.delete(rows)
        if changed != 1:
            raise ConflictError(f"a change of {relation.label}, which has no key, finds {changed} rows on the follower")


def _kind(event: Event) -> tuple[object, ...]:
    """Consecutive events that agree in this are written together."""
    shape = id(event.fields) if event.fields is not None else tuple(event.after or event.before or ())
    return event.schema, event.table, event.op == "t", event.after is None, shape


def _lacking(relation: Relation) -> ConflictError:
    return ConflictError(
        f"a row of {relation.label} lacks values that did not change, and is not on the follower",
        remedy="read the topics from their beginning, or set REPLICA IDENTITY FULL on the leader",
    )


def _whole(table: Table, row: Row) -> tuple[bytes, ...]:
    if UNCHANGED in row:
        raise SchemaError(f"a row of {table.relation.label}, which has no key, lacks values that did not change")
    return row  # type: ignore[return-value]


class _Net:
    """The last state of each key of a table that events have touched."""

    def __init__(self, table: Table) -> None:
        self.table = table
        names = [column.name for column in table.relation.columns]
        self._key = tuple(names.index(name) for name in table.relation.primary_key)
        self._rows: dict[tuple[bytes, ...], Row | None] = {}
        self.tolerant = False

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        self._rows.clear()

    def take_whole(self, events: list[Event]) -> bool:
        """Take rows that say all there is to say of their keys, if that is what they are."""
        after = [event.after for event in events if event.after is not None]
        found = self.table.rows(after) if len(after) == len(events) else None
        if found is None:
            return False
        self._rows.update(zip(*found, strict=True))
        return True

    def take(self, event: Event) -> None:
        """
        :raises DecodeError: the event is not of the table's shape.
        """
        key = self.table.key(event.key or {})
        if event.after is None:
            self._rows[key] = None
            return
        row = self.table.row(event.after)
        if UNCHANGED in row:
            # Told again after its row was deleted? In a transaction we would know.
            self.tolerant = self.tolerant or event.xid is None
            known = self._rows.get(key)
            if known is not None:
                row = tuple([old if new is UNCHANGED else new for old, new in zip(known, row, strict=True)])
            elif key in self._rows:
                if self.tolerant:
                    return
                raise _lacking(self.table.relation)
        self._rows[key] = row

    def sets(self) -> tuple[RowSet, list[RowSet], RowSet]:
        """Deletes, updates by the columns they carry, and rows to insert or overwrite."""
        deletes, upserts = self._set(()), self._set(tuple(range(len(self.table.relation.columns))))
        updates: dict[tuple[int, ...], RowSet] = {}
        for key, row in self._rows.items():
            if row is None:
                deletes.matches.append(key)
            elif UNCHANGED not in row:
                upserts.rows.append(row)  # type: ignore[arg-type]
            else:
                columns = tuple(index for index, value in enumerate(row) if value is not UNCHANGED)
                update = updates.setdefault(columns, self._set(columns))
                update.matches.append(key)
                update.rows.append(tuple([row[index] for index in columns]))  # type: ignore[misc]
        return deletes, list(updates.values()), upserts

    def matching(self, upserts: RowSet) -> RowSet:
        """What deletes the rows that ``upserts`` overwrites."""
        deletes = self._set(())
        deletes.matches = [tuple([row[index] for index in self._key]) for row in upserts.rows]
        return deletes

    def _set(self, columns: tuple[int, ...]) -> RowSet:
        relation = self.table.relation
        return RowSet(relation, b"t" * len(relation.columns), columns, [], self._key, [])
