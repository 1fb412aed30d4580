"""PostgreSQL's writes as triggers captured them: no replication privilege, no slot, no ``wal_level``.

The change tables (:mod:`cdc.sql.capture`) are read in ticks, as PgQ's are: tick ``n`` is a snapshot that the leader
keeps, and what is read between two ticks are the transactions that the later snapshot sees and the earlier does not. A
transaction that commits late is of a later tick, whatever it wrote when, so none is passed over and each tick is a
consistent step. https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT

A position's number is a tick that is done and, in its low :data:`ORDINAL_BITS` bits, how many transactions of the next
one are. Inside a tick transactions stand in the order of their last change. A row that two of them changed
was changed by the later one after the earlier had committed, so that this order is one in which all of it fits.
"""

import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar, Final, NamedTuple

from psycopg.types.json import Jsonb

from cdc.errors import ConfigurationError, DivergedError, GapError
from cdc.ports import Snapshot
from cdc.position import Position
from cdc.record import Bundle, Format, Heartbeat, Relation, Run, Transaction, TransactionHead
from cdc.sql.capture import ORDERED, PLACED, SLOTS, change_table
from cdc.sql.quote import identifier, literal, qualified
from cdc.stores.postgresql import capture
from cdc.stores.postgresql.capture import ORDINAL_BITS, Captured
from cdc.stores.postgresql.connect import Connection, connect, fetch, translated
from cdc.wire import record
from shippers.postgresql.assemble import BUNDLE_BYTES, RUN_BYTES
from shippers.postgresql.image import PostgresSnapshot, copy_rows
from shippers.postgresql.leader import IDLE_S, Leader

_ORDINALS: Final = (1 << ORDINAL_BITS) - 1
TICK_S: Final = 0.01  # between two ticks at least: what is committed meanwhile shares the next
_SMALL_BYTES: Final = 64 << 10  # of a transaction's records that shares a bundle with others
UNWOKEN_S: Final = 0.05
_FORGET_S: Final = 1.0
# Nothing is known of the change tables' contents, which come and go: the index it is to be. What a tick sees is made
# durable by its commit, whatever those who wrote it chose.
_SETTINGS: Final = b"SET work_mem = '64MB'; SET enable_seqscan = off; SET synchronous_commit = 'on'"
_ANEW: Final = "take a new image with `cdc ship --image new`, then load it with `cdc apply --reload`"
_SET_UP_ANEW: Final = f"run `cdc setup --format trigger` again, then {_ANEW}"


class Tick(NamedTuple):
    """A snapshot of the leader, as the leader keeps it. ``made_us``: microseconds since 1970-01-01 UTC."""

    number: int
    snapshot: str
    timeline: int
    made_us: int


class TriggerShipper:
    """Ships one schema's change tables. While open it holds a session lock on the leader."""

    format: ClassVar[Format] = Format.TRIGGER

    def __init__(self, url: str, schema: str, leader: Leader) -> None:
        self._url = url
        self._schema = schema
        self._leader = leader
        self._catalog = leader.catalog
        self._shapes = _Shapes(leader.catalog, schema)
        self._described = _Described(leader.catalog, schema)
        self._checked = ""
        self._confirmed = 0
        self._forget_due = 0.0
        self._asleep = False
        # Where transactions may be prepared none of them wakes us (cdc.sql.capture).
        [row] = fetch(leader.catalog, "SELECT current_setting('max_prepared_transactions') = '0' AS wakes")
        self._sleep_s = IDLE_S if row.wakes else UNWOKEN_S

    @classmethod
    def open(cls, url: str, schema: str) -> "TriggerShipper":
        """Connect and become the only shipper of this schema.

        :raises FencedError: another shipper has it.
        :raises ConfigurationError: nothing is captured there.
        """
        leader = Leader.own(url, "", schema)
        try:
            capture.fetch_captured(leader.catalog, schema)
            with translated():
                leader.catalog.execute(_SETTINGS)
            return cls(url, schema, leader)
        except BaseException:
            leader.close()
            raise

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        self._check_triggers()
        with closing(connect(self._url, application_name="cdc ship image", autocommit=False)) as keeper:
            with translated():
                keeper.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            [row] = fetch(keeper, "SELECT pg_current_snapshot()::text AS seen, pg_export_snapshot() AS name")
            captured = capture.describe_captured(keeper, self._schema)
            tick = self._keep(row.seen, captured)
            self._described.note(captured)
            image = PostgresSnapshot(self._url, row.name, self._position(tick.number), _Scope(self._schema), text=False)
            try:
                yield image
            finally:
                image.close()

    def end(self) -> Position:
        return self._position(self._make_tick().number)

    def confirm(self, position: Position) -> None:
        self._confirmed = max(self._confirmed, position.lsn >> ORDINAL_BITS)

    def close(self) -> None:
        self._leader.close()

    def stream(self, after: Position, *, wait_s: float) -> Iterator[Transaction | Bundle | Heartbeat]:
        tick = self._begin(after)
        return self._read(tick, after.lsn & _ORDINALS, wait_s)

    def _read(self, tick: Tick, done: int, wait_s: float) -> Iterator[Transaction | Bundle | Heartbeat]:
        wait = wait_s
        while True:
            self._forget()
            following = self._next(tick)
            if following is None:
                yield Heartbeat(self._position(tick.number))
                self._sleep(wait)
                wait = self._sleep_s
                continue
            self._wake()
            due = time.monotonic() + TICK_S
            empty = True
            for told in self._between(tick, following, done):
                empty = False
                yield told
            tick, done, wait = following, 0, wait_s
            if empty:
                yield Heartbeat(self._position(tick.number))
            time.sleep(max(0.0, due - time.monotonic()))

    # Ticks.

    def _begin(self, after: Position) -> Tick:
        """The tick that ``after`` has whole.

        :raises GapError: the leader does not know it any more.
        :raises ConfigurationError: a table's writes may have been missed.
        """
        self._leader.check_history(after, lambda _: after.lsn)
        self._check_triggers()
        number, part = after.lsn >> ORDINAL_BITS, after.lsn & _ORDINALS
        ticks = self._ticks("WHERE id >= %(from)s ORDER BY id LIMIT 2", number)
        if not ticks or ticks[0].number != number or (part and len(ticks) < 2):
            raise GapError(
                f"the leader no longer knows the tick that the topic ends at ({after}): "
                "triggers were set up anew, or their schema was restored",
                remedy=_ANEW,
            )
        tick = ticks[0]
        if tick.timeline > after.epoch:
            raise DivergedError(f"tick {number} is of timeline {tick.timeline}, the topic of {after.epoch}")
        self._confirmed = number
        self._shapes.load(number)
        return tick

    def _next(self, tick: Tick) -> Tick | None:
        """The tick after it: one that the leader keeps already, or a new one; None where nothing was committed."""
        for known in self._ticks("WHERE id > %(from)s ORDER BY id LIMIT 1", tick.number):
            return known
        return self._make_tick() if self._has_more(tick) else None

    def _ticks(self, which: str, number: int) -> list[Tick]:
        query = f"""
            SELECT id, snapshot::text, timeline, (extract(epoch FROM made) * 1000000)::int8 AS made_us
            FROM {identifier(self._schema)}.tick {which}
        """
        return [Tick(*row) for row in fetch(self._catalog, query, {"from": number})]

    def _has_more(self, tick: Tick) -> bool:
        """Did anything commit since that snapshot? Looks at the catalog too: a fault must not wait for a write."""
        some = " OR ".join(
            f"EXISTS (SELECT FROM {qualified(self._schema, change_table(slot))} WHERE {_beyond(tick.snapshot)})"
            for slot in SLOTS
        )
        query = f"SELECT {some} AS some, {capture.FINGERPRINT} AS catalog"
        row = fetch(self._catalog, query, {"origins": self._described.origins})[0]
        if row.catalog != self._checked:
            self._check_triggers()
            self._checked = row.catalog
        return bool(row.some)

    def _make_tick(self) -> Tick:
        """A new tick, with the description of every table that has another one than before, as of its snapshot."""
        with translated(), self._catalog.transaction():
            self._catalog.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            [row] = fetch(self._catalog, "SELECT pg_current_snapshot()::text AS seen")
            changed = self._described.changed()
        return self._keep(row.seen, changed)

    def _keep(self, snapshot: str, shapes: Sequence[Captured]) -> Tick:
        """Have the leader keep a tick. Its commit makes everything durable that its snapshot sees."""
        query = f"SELECT {identifier(self._schema)}.tick(%s::pg_snapshot, %s, %s) AS number"
        described = Jsonb([shape.to_json() for shape in shapes])
        [row] = fetch(self._catalog, query, [snapshot, self._leader.timeline, described])
        [tick] = self._ticks("WHERE id = %(from)s", row.number)
        return tick

    def _position(self, tick: int, transactions: int = 0) -> Position:
        return Position(self._leader.source, self._leader.timeline, tick << ORDINAL_BITS | transactions)

    def _check_triggers(self) -> None:
        """
        :raises ConfigurationError: a table's writes may have been missed.
        """
        if found := capture.faults(self._catalog, self._schema):
            raise ConfigurationError(f"{found[0].message}: writes may have been missed since", remedy=_SET_UP_ANEW)

    def _forget(self) -> None:
        """Let the leader empty what is not needed any more. Not while we read ourselves: it takes the table alone."""
        if self._confirmed and time.monotonic() >= self._forget_due:
            fetch(self._catalog, f"SELECT {identifier(self._schema)}.forget(%s)", [self._confirmed])
            self._forget_due = time.monotonic() + _FORGET_S

    # Sleeping. A writer that finds the lock taken wakes us; others are spared the notification.

    def _sleep(self, wait_s: float) -> None:
        if not self._asleep:
            with translated():
                self._catalog.execute(f"LISTEN {identifier(self._schema)}".encode())
            self._asleep = bool(
                fetch(self._catalog, "SELECT pg_try_advisory_lock(%s) AS got", [capture.wake_of(self._schema)])[0].got
            )
            if self._asleep:
                return  # what was written before the lock was ours woke nobody: look once more
        with translated():
            for _ in self._catalog.notifies(timeout=wait_s, stop_after=1):
                break

    def _wake(self) -> None:
        if self._asleep:
            fetch(self._catalog, "SELECT pg_advisory_unlock(%s)", [capture.wake_of(self._schema)])
            self._asleep = False

    # Transactions.

    def _between(self, tick: Tick, following: Tick, done: int) -> Iterator[Transaction | Bundle]:
        """Every transaction of ``following`` but the first ``done``, each to be read before the next is asked for."""
        self._shapes.load(following.number)
        changes = _changes(self._catalog, self._schema, tick.snapshot, following.snapshot)
        small = _Small(self._position(tick.number))
        seen = 0
        for number, first in enumerate(changes, 1):
            seen += first.of_transaction
            if number > _ORDINALS:
                raise ConfigurationError(f"more than {_ORDINALS} transactions since tick {tick.number}", remedy=_ANEW)
            last = seen == first.of_all
            position = self._position(following.number) if last else self._position(tick.number, number)
            reader = _Reader(self._shapes, first, islice(changes, first.of_transaction - 1))
            if number > done:
                made = Transaction(position, first.xid & 0xFFFFFFFF, following.made_us, reader.runs(), first.size_bytes)
                yield from small.take(made)
            reader.skip_rest()
        yield from small.flush()


class _Small:
    """Puts small transactions together as bundles."""

    def __init__(self, position: Position) -> None:
        self._position = position
        self._clear()

    def _clear(self) -> None:
        self._heads: list[TransactionHead] = []
        self._relations: dict[int, Relation] = {}
        self._lengths: list[int] = []
        self._bodies: list[bytes] = []
        self._size = 0

    def take(self, transaction: Transaction) -> Iterator[Transaction | Bundle]:
        """Yields what has to be told now: the transaction itself where it is not small."""
        if transaction.size_bytes > _SMALL_BYTES:
            yield from self.flush()
            yield transaction
            return
        runs = list(transaction.runs)
        if self._size >= BUNDLE_BYTES or not self._agrees(runs):
            yield from self.flush()
        if not self._agrees(runs):
            yield transaction._replace(runs=iter(runs))
            return
        for run in runs:
            self._relations.update(run.relations)
            self._lengths.extend(run.lengths)
            self._bodies.append(run.body)
            self._size += len(run.body)
        messages = sum(len(run.lengths) for run in runs)
        self._heads.append(
            TransactionHead(transaction.position.lsn, transaction.xid, transaction.committed_us, messages)
        )

    def flush(self) -> Iterator[Bundle]:
        if self._heads:
            run = Run(self._relations, self._lengths, b"".join(self._bodies))
            yield Bundle(self._position.at(self._heads[-1].lsn), self._heads, run)
            self._clear()

    def _agrees(self, runs: Sequence[Run]) -> bool:
        """Does each relation have one description in all of them?"""
        known = dict(self._relations)
        return all(
            known.setdefault(id_, relation) is relation for run in runs for id_, relation in run.relations.items()
        )


class _Change(NamedTuple):
    """A row of a change table, and how many rows there are of its transaction, and of all."""

    xid: int
    of_transaction: int
    of_all: int
    size_bytes: int
    origin: int
    op: bytes
    data: bytes


# The fields of a row of binary COPY data: each behind its length, the last one at the end.
_ROW: Final = struct.Struct(">hiqiqiqiqiIici")


def _changes(connection: Connection, schema: str, earlier: str, later: str) -> Iterator[_Change]:
    """What committed between two snapshots, in order (:mod:`cdc.sql.capture`)."""
    seen = f"txid_visible_in_snapshot(xid, {literal(later)}::txid_snapshot)"
    some = " UNION ALL ".join(
        f"SELECT * FROM {qualified(schema, change_table(slot))} WHERE {_beyond(earlier)} AND {seen}" for slot in SLOTS
    )
    query = f"""
        WITH c AS (
            SELECT s.*, coalesce(t.relation, s.origin::int8) AS relation FROM ({some}) s
            LEFT JOIN (SELECT relation, unnest(origins) AS origin FROM {identifier(schema)}.captured) t
                ON t.origin = s.origin::int8)
        SELECT xid, count(*) OVER of_xid, count(*) OVER (),
               coalesce(sum(length(data)) OVER of_xid, 0), origin, op, data
        FROM ({PLACED}) placed WINDOW of_xid AS (PARTITION BY xid) ORDER BY {ORDERED}
    """
    for row in copy_rows(connection, query, "binary"):
        yield _change(row)


def _change(row: bytes) -> _Change:
    """A row of binary COPY data."""
    _, _, xid, _, of_transaction, _, of_all, _, size_bytes, _, origin, _, op, _ = _ROW.unpack_from(row)
    return _Change(xid, of_transaction, of_all, size_bytes, origin, op, row[_ROW.size :])


def _beyond(snapshot: str) -> str:
    """The condition that a snapshot (``xmin:xmax:xip,…``) does not see a transaction, which an index on xid serves."""
    _, xmax, running = snapshot.split(":")
    open_then = f" OR xid IN ({', '.join(str(int(xid)) for xid in running.split(','))})" if running else ""
    return f"(xid >= {int(xmax)}{open_then})"


class _Reader:
    """One transaction's changes as pgoutput messages."""

    def __init__(self, shapes: "_Shapes", first: _Change, rest: Iterator[_Change]) -> None:
        self._shapes = shapes
        self._first: _Change | None = first
        self._rest = rest
        self._emptied: set[int] = set()  # relations that nothing was written to since

    def runs(self) -> Iterator[Run]:
        relations: dict[int, Relation] = {}
        messages: list[bytes] = []
        size = 0
        for change in self._changes():
            captured = self._shapes.of(change)
            relation = captured.relation
            if relations.setdefault(relation.id, relation) is not relation or size >= RUN_BYTES:
                yield _run(relations, messages)
                relations, messages, size = {relation.id: relation}, [], 0
            for message in self._checked(change, captured):
                if size >= RUN_BYTES:
                    yield _run(relations, messages)
                    relations, messages, size = {relation.id: relation}, [], 0
                messages.append(message)
                size += len(message)
        if messages:
            yield _run(relations, messages)

    def skip_rest(self) -> None:
        for _ in self._changes():
            pass

    def _changes(self) -> Iterator[_Change]:
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        yield from self._rest

    def _checked(self, change: _Change, captured: Captured) -> Iterator[bytes]:
        """
        :raises GapError: the change is of a shape that the table never was known to have.
        """
        try:
            yield from self._messages(change, captured)
        except record.MisfitError as error:
            raise GapError(f"a change of {captured.relation.label} cannot be read: {error}", remedy=_ANEW) from error

    def _messages(self, change: _Change, captured: Captured) -> Iterator[bytes]:
        relation = captured.relation
        if change.op == b"T":
            # The TRUNCATE of a partitioned table is told by each of its partitions, too.
            if relation.id not in self._emptied:
                _check_whole(captured)
                self._emptied.add(relation.id)
                yield record.truncate([relation.id])
            return
        self._emptied.discard(relation.id)
        rows = record.rows(change.data, captured.layout)
        if change.op in b"DP":
            for row in rows:
                yield _gone(relation, row)
        else:
            start = change.op + relation.id.to_bytes(4) + b"N" + len(relation.columns).to_bytes(2)
            for row in rows:
                yield start + b"".join(row)


def _gone(relation: Relation, row: Sequence[bytes]) -> bytes:
    if relation.identity == "f":
        return record.message(b"D", relation.id, b"O", row)
    key = [column.key for column in relation.columns]
    return record.message(b"D", relation.id, b"K", record.key_only(row, key))


def _run(relations: Mapping[int, Relation], messages: Sequence[bytes]) -> Run:
    return Run(relations, list(map(len, messages)), b"".join(messages))


class _Scope:
    """What triggers capture, as an image's scope."""

    def __init__(self, schema: str) -> None:
        self._schema = schema
        self._captured: dict[int, Captured] = {}

    def relations(self, connection: Connection) -> Sequence[Relation]:
        found = capture.describe_captured(connection, self._schema)
        self._captured = {each.origin: each for each in found if each.origin == each.relation.id}
        return [each.relation for each in self._captured.values()]

    def conditions(self, connection: Connection) -> Mapping[int, str]:  # noqa: ARG002 - they came with the relations
        return {id_: each.condition for id_, each in self._captured.items() if each.condition}

    def select(self, relation: Relation) -> Sequence[str]:
        return self._captured[relation.id].select


class _Described:
    """Every table as the newest tick describes it, to notice what is described otherwise now."""

    def __init__(self, catalog: Connection, schema: str) -> None:
        self._catalog = catalog
        self._schema = schema
        self._known: dict[int, Captured] = {}
        self._fingerprint = ""

    @property
    def origins(self) -> list[int]:
        if not self._known:
            query = f"""
                SELECT DISTINCT ON (origin) description FROM {identifier(self._schema)}.shape ORDER BY origin, tick DESC
            """
            self.note([Captured.from_json(row.description) for row in fetch(self._catalog, query)])
        return list(self._known)

    def changed(self) -> list[Captured]:
        """What is described otherwise in the session's snapshot; looked at only where the catalog has changed."""
        now = capture.fingerprint(self._catalog, self.origins)
        if now == self._fingerprint:
            return []
        found = [
            captured
            for captured in capture.describe_captured(self._catalog, self._schema)
            if self._known.get(captured.origin) != captured
        ]
        self.note(found)
        self._fingerprint = capture.fingerprint(self._catalog, self.origins)
        return found

    def note(self, described: Sequence[Captured]) -> None:
        self._known |= {captured.origin: captured for captured in described}


@dataclass(slots=True)
class _Known:
    """How an origin is described: since which tick, and before that."""

    tick: int
    now: Captured
    before: Captured | None = None


class _Shapes:
    """What the records of each table hold, as of the tick that is read.

    A record tells the types of its columns, not their names. Between two ticks a table may have got another shape: its
    records are then told apart by their types, and where those are alike while the columns are not, we stop.
    """

    def __init__(self, catalog: Connection, schema: str) -> None:
        self._catalog = catalog
        self._schema = schema
        self._known: dict[int, _Known] = {}
        self._relations: dict[Relation, Relation] = {}
        self._tick = 0

    def load(self, tick: int) -> None:
        """Know every description up to ``tick``."""
        query = f"""
            SELECT origin, tick, description FROM {identifier(self._schema)}.shape
            WHERE tick > %s AND tick <= %s ORDER BY tick
        """
        for row in fetch(self._catalog, query, [self._tick, tick]):
            known = self._known.get(row.origin)
            captured = Captured.from_json(row.description)
            # One object for all partitions of a table: what is the same need not be compared.
            relation = self._relations.setdefault(captured.relation, captured.relation)
            captured = replace(captured, relation=relation)
            self._known[row.origin] = _Known(row.tick, captured, known.now if known is not None else None)
        self._tick = tick

    def of(self, change: _Change) -> Captured:
        """The description of a change's records.

        :raises ConfigurationError: it was not captured.
        :raises GapError: its columns cannot be told.
        """
        known = self._known.get(change.origin)
        if known is None:
            raise GapError(f"table {change.origin} of a change is not described", remedy=_ANEW)
        label = known.now.relation.label
        if change.op == b"!":
            raise ConfigurationError(
                f"a write to {label} could not be captured: {change.data.decode(errors='replace')}",
                remedy=f"mend --columns, --mask or --where of {label}: {_SET_UP_ANEW}",
            )
        if change.op == b"T":
            return known.now
        if known.before is None or known.tick < self._tick:
            found = known.now
        else:
            found = self._choose(known, record.type_oids(change.data))
        if change.op == b"U" and found.relation.identity == "f":
            raise ConfigurationError(f"{label} has lost its key since it was set up", remedy=_SET_UP_ANEW)
        return found

    def _choose(self, known: _Known, types: tuple[int, ...]) -> Captured:
        now = known.now
        before = known.before if known.tick == self._tick else None
        fitting = [each for each in (now, before) if each is not None and each.layout.type_oids == types]
        alike = bool(fitting) and all(each.numbers == fitting[0].numbers for each in fitting)
        # A column that came and went in between may have been where another one is now.
        came = set(range(before.highest + 1, now.highest + 1)) if before is not None else set()
        if alike and (fitting[0] is before or came <= set(now.numbers)):
            return fitting[0]
        raise GapError(
            f"columns of {now.relation.label} came and went between two ticks: which of them a change of types {types} "
            "holds cannot be told",
            remedy=_ANEW,
        )


def _check_whole(captured: Captured) -> None:
    """
    :raises GapError: only a partition was: which rows those were is not told.
    """
    if captured.origin != captured.relation.id:
        raise GapError(
            f"a partition of {captured.relation.label} was truncated: followers, with one table, cannot tell its rows",
            remedy=f"DELETE from a partition instead of TRUNCATE; now {_ANEW}",
        )
