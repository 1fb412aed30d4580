"""``cdc verify``: read two stores, compare them table by table, and show the keys that differ.

The follower is read first, or at least fixed first, so that it is never ahead of the leader it is compared with.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any, Final, LiteralString, Protocol, runtime_checkable

from cdc import registry
from cdc.cli.console import Console
from cdc.cli.options import Settings
from cdc.cli.session import names_for
from cdc.cli.urls import must_be_postgresql, shown
from cdc.errors import CdcError, ConfigurationError, ConflictError, SchemaError, TransientError, UsageError
from cdc.ports import Store
from cdc.position import Position
from cdc.record import Checkpoint, Format, Relation
from cdc.sql.quote import identifier
from cdc.stores.postgresql import capture
from cdc.stores.postgresql.capture import Captured
from cdc.stores.postgresql.connect import Connection, connect, fetch
from cdc.stores.postgresql.describe import describe, describe_tables, filters
from cdc.stores.postgresql.eyes import PostgresStore
from cdc.stores.postgresql.setup import Names
from cdc.verify import (
    EXAMINED_BUCKETS_MAX,
    Differences,
    Digest,
    Verdict,
    differences,
    differing_buckets,
    digest,
    judge,
    key_text,
    overall,
    rows_in,
)

_POLL_S: Final = 0.2
_DIGITS_SHOWN: Final = 8
_EXITS: Final = {
    Verdict.EQUAL: 0,
    Verdict.DIFFERS: ConflictError.exit_code,
    Verdict.BEHIND: TransientError.exit_code,
}


@runtime_checkable
class _Freezable(Protocol):
    """A store that can show one moment for as long as it is asked to."""

    def freeze(self) -> Position: ...

    def thaw(self) -> None: ...


@dataclass(slots=True)
class _Table:
    """One table's comparison. A digest is None where there is no such table."""

    relation: Relation
    leader: Digest
    follower: Digest | None
    verdict: Verdict
    note: str = ""
    differences: Differences | None = None


@dataclass(slots=True)
class _Round:
    """One pass over the tables: where both sides stood, and what was found."""

    position: Position
    applied: Position | None
    tables: list[_Table] = field(default_factory=list)


def run(settings: Settings) -> int:
    must_be_postgresql(settings.leader)
    plug = registry.store(settings.follower)
    console = Console(settings)
    with ExitStack() as stack:
        session = stack.enter_context(closing(connect(settings.leader)))
        leader = stack.enter_context(closing(PostgresStore(connect(settings.leader, application_name="cdc verify"))))
        follower = stack.enter_context(closing(plug.connect_store(settings.follower)))
        names = names_for(session.info.dbname, settings)
        captured = _captured(session, names, settings)
        relations = _chosen(_relations(session, names, settings, captured), settings)
        leader.conditions = _conditions(session, names, captured)
        console.note(f"comparing {len(relations)} tables of {shown(settings.leader)} with {shown(settings.follower)}")
        schema = capture.schema_of(names.slot)
        log = _LogicalLog(session, names) if captured is None else _TriggerLog(session, leader, schema)
        comparison = _Comparison(log, leader, follower, names)
        result = comparison.run(relations, wait_s=settings.wait)
        for table in result.tables:
            comparison.find_keys(table, limit=settings.keys)
        _note_filters(leader.conditions, captured or (), result)
        if registry.scheme_of(settings.follower) == "postgresql":
            _note_extra_columns(settings.follower, result)
    verdict = overall(table.verdict for table in result.tables)
    if console.json:
        console.out_json(_json(result, verdict))
    else:
        _print(console, result, verdict)
    return _EXITS[verdict]


class _Comparison:
    """Both stores, and what is known of how far the follower is."""

    def __init__(self, log: "_Log", leader: PostgresStore, follower: Store, names: Names) -> None:
        self._log = log
        self._leader = leader
        self._follower = follower
        self._names = names

    def run(self, relations: Sequence[Relation], *, wait_s: float) -> _Round:
        """Compare, then look again at what differs, until the time is up or there is nothing left to learn."""
        deadline = time.monotonic() + wait_s
        result = self._round(relations, {})
        while Verdict.BEHIND in {table.verdict for table in result.tables}:
            if not self._await(result.position, deadline):
                break
            again = [table for table in result.tables if table.verdict is Verdict.BEHIND]
            newer = self._round([table.relation for table in again], {t.relation.id: t.leader for t in again})
            found = {table.relation.id: table for table in newer.tables}
            newer.tables = [found.get(table.relation.id, table) for table in result.tables]
            result = newer
        return result

    def find_keys(self, table: _Table, *, limit: int) -> None:
        """The keys that differ, from a second look at a few buckets."""
        if table.verdict is Verdict.EQUAL or table.follower is None or not limit:
            return
        buckets = differing_buckets(table.leader, table.follower)
        examined = buckets[:EXAMINED_BUCKETS_MAX]
        table.differences = differences(
            rows_in(self._leader.lines(table.relation), examined),
            rows_in(self._follower.lines(table.relation), examined),
            limit=limit,
            complete=len(buckets) == len(examined),
        )

    def _round(self, relations: Sequence[Relation], earlier: Mapping[int, Digest]) -> _Round:
        """``earlier``: digests of the leader at a position that the follower has passed."""
        if isinstance(self._follower, _Freezable):
            self._follower.freeze()
        before = self._applied()
        # One after the other: two threads that take turns at every row are slower than one.
        followers = [_digest_or_none(self._follower, relation) for relation in relations]
        applied = self._applied()
        position = self._leader.freeze()
        self._log.freeze()
        leaders = [digest(self._leader.lines(relation)) for relation in relations]
        still = applied == before
        # A follower that moved while it was read shows no one moment, and convicts nobody.
        settled = still and self._is_settled(applied, position)
        earlier = earlier if still else {}
        tables = [
            _compared(relation, ours, theirs, settled=settled, earlier=earlier.get(relation.id))
            for relation, ours, theirs in zip(relations, leaders, followers, strict=True)
        ]
        return _Round(position, applied, tables)

    def _applied(self) -> Position | None:
        """How far the follower is with this leader, as far as it says so; None where it is no follower of it."""
        source = self._leader.position().source
        return _furthest(self._follower.checkpoints(), source, self._names.stream)

    def _is_settled(self, applied: Position | None, position: Position) -> bool:
        """Has the follower everything that the leader's snapshot saw? What does not follow cannot be behind."""
        return applied is None or self._log.covers(applied, position) or not self._log.goes_beyond(applied)

    def _await(self, position: Position, deadline: float) -> bool:
        """Wait for the follower to reach a position of the leader's; False where the time is up first."""
        while time.monotonic() < deadline:
            self._thaw()
            applied = self._applied()
            if applied is not None and self._log.covers(applied, position):
                return True
            time.sleep(_POLL_S)
        return False

    def _thaw(self) -> None:
        """Let the snapshots go: both servers keep dead rows for them."""
        self._leader.thaw()
        if isinstance(self._follower, _Freezable):
            self._follower.thaw()


def _note_filters(conditions: Mapping[int, str], captured: Sequence[Captured], result: _Round) -> None:
    """What is held back of a table is no difference, but worth a word."""
    masked = {each.relation.id: _masked(each) for each in captured}
    for table in result.tables:
        notes = []
        if condition := conditions.get(table.relation.id):
            notes.append(f"only rows where {condition}")
        if names := masked.get(table.relation.id):
            notes.append(f"masked, not compared: {', '.join(names)}")
        table.note = "; ".join(filter(None, [table.note, *notes]))


def _note_extra_columns(url: str, result: _Round) -> None:
    """Columns that only the follower has are its own business, but worth a word."""
    with closing(connect(url)) as session:
        for table in result.tables:
            relation = table.relation
            there = fetch(session, _COLUMNS, [relation.schema, relation.name])
            known = {column.name for column in relation.columns}
            if extra := [row.name for row in there if row.name not in known]:
                table.note = f"{table.note}; " * bool(table.note) + f"not compared: {', '.join(extra)}"


_COLUMNS: Final[LiteralString] = """
    SELECT a.attname AS name FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE s.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""


def _is_published(session: Connection, names: Names) -> bool:
    return bool(fetch(session, "SELECT 1 FROM pg_publication WHERE pubname = %s", [names.publication]))


def _digest_or_none(store: Store, relation: Relation) -> "Digest | CdcError":
    """A table that is not there, or lacks a column, is a finding, not a failure."""
    try:
        return digest(store.lines(relation))
    except SchemaError as error:
        return error


def _compared(
    relation: Relation, leader: Digest, follower: "Digest | CdcError", *, settled: bool, earlier: Digest | None
) -> _Table:
    if isinstance(follower, CdcError):
        return _Table(relation, leader, None, Verdict.DIFFERS if settled else Verdict.BEHIND, str(follower))
    return _Table(relation, leader, follower, judge(leader, follower, settled=settled, earlier=earlier))


def _furthest(checkpoints: Mapping[str, Checkpoint], source: str, stream: str) -> Position | None:
    mine = {name: _whole(kept) for name, kept in checkpoints.items() if kept.position.source == source}
    return mine.get(stream) or max(mine.values(), default=None)


def _whole(checkpoint: Checkpoint) -> Position:
    """What a follower holds completely: nothing while an image loads."""
    loading = checkpoint.image is not None and checkpoint.image.sequence >= 0
    return checkpoint.position.at(0) if loading else checkpoint.position


def _captured(session: Connection, names: Names, settings: Settings) -> list[Captured] | None:
    """What triggers capture, where it is their log that is followed; None where it is not."""
    schema = capture.schema_of(names.slot)
    chosen = settings.format
    if chosen is None and (_is_published(session, names) or not capture.is_there(session, schema)):
        return None
    if chosen not in {None, Format.TRIGGER}:
        return None
    return [each for each in capture.describe_captured(session, schema) if each.origin == each.relation.id]


def _conditions(session: Connection, names: Names, captured: Sequence[Captured] | None) -> Mapping[int, str]:
    """The rows of each table that the log tells of."""
    if captured is not None:
        return {each.origin: each.condition for each in captured if each.condition}
    return filters(session, publication=names.publication) if _is_published(session, names) else {}


def _masked(captured: Captured) -> list[str]:
    """The columns that hold something else on a follower."""
    shown = zip(captured.relation.columns, captured.select, strict=True)
    return [column.name for column, select in shown if select != f"n.{identifier(column.name)}"]


def _relations(
    session: Connection, names: Names, settings: Settings, captured: Sequence[Captured] | None
) -> list[Relation]:
    """What the stream tells of where there is one, else every ordinary table.

    :raises ConfigurationError: there is no such publication.
    """
    if captured is not None:
        return [
            replace(
                each.relation,
                columns=tuple(column for column in each.relation.columns if column.name not in _masked(each)),
            )
            for each in captured
        ]
    if _is_published(session, names) or settings.publication is not None:
        return describe(session, publication=names.publication)
    return describe_tables(session, [row.id for row in fetch(session, _ORDINARY)])


def _chosen(relations: list[Relation], settings: Settings) -> list[Relation]:
    """Those of them that are asked for.

    :raises ConfigurationError, UsageError: there is no such table or schema among them.
    """
    wanted = [label if "." in label else f"public.{label}" for label in settings.tables or ()]
    labels = {relation.label for relation in relations}
    if absent := [label for label in wanted if label not in labels]:
        raise ConfigurationError(
            f"the leader has no table {absent[0]} to compare", remedy=f"choose of {', '.join(sorted(labels)) or 'none'}"
        )
    schemas = set(settings.schemas or ())
    if unknown := sorted(schemas - {relation.schema for relation in relations}):
        raise UsageError(f"no table to compare in schema {unknown[0]!r}", remedy="mend --schemas")
    if wanted or schemas:
        relations = [relation for relation in relations if relation.label in wanted or relation.schema in schemas]
    return relations


_ORDINARY: Final[LiteralString] = """
    SELECT c.oid::int8 AS id FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence = 'p' AND c.oid >= 16384
      AND s.nspname NOT IN ('information_schema', 'cdc') AND s.nspname !~ '^(pg|cdc)_'
"""

# A commit of pgoutput: 'C', flags, the commit's LSN, and at byte 10 the LSN of its end.
_BETWEEN: Final[LiteralString] = """
    SELECT 1 FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, 'proto_version', '1', 'publication_names', %s)
    WHERE get_byte(data, 0) = 67 AND ('x' || encode(substr(data, 11, 8), 'hex'))::bit(64)::int8 > %s LIMIT 1
"""
_CONFIRMED: Final[LiteralString] = """
    SELECT (confirmed_flush_lsn - '0/0')::int8 AS lsn FROM pg_replication_slots
    WHERE slot_name = %s AND plugin = 'pgoutput' AND database = current_database() AND NOT active
"""


class _Log(Protocol):
    """What a stream's log tells of how far a follower is."""

    def freeze(self) -> None:
        """The leader's snapshot was just taken."""
        ...

    def covers(self, applied: Position, position: Position) -> bool:
        """Has whoever applied that everything that the leader's snapshot sees, at ``position``?"""
        ...

    def goes_beyond(self, applied: Position) -> bool:
        """Has the leader committed anything of this stream beyond ``applied``? Where only time can tell: yes."""
        ...


class _LogicalLog:
    def __init__(self, session: Connection, names: Names) -> None:
        self._session = session
        self._names = names

    def freeze(self) -> None:
        pass

    def covers(self, applied: Position, position: Position) -> bool:
        return applied >= position

    def goes_beyond(self, applied: Position) -> bool:
        """The slot is looked into, which a running shipper does not allow, and shows only what was not shipped yet."""
        slots = fetch(self._session, _CONFIRMED, [self._names.slot])
        if not slots or slots[0].lsn is None or slots[0].lsn > applied.lsn:
            return True
        try:
            publication = identifier(self._names.publication)
            return bool(fetch(self._session, _BETWEEN, [self._names.slot, publication, applied.lsn]))
        except CdcError:  # taken by a shipper just now, or not ours to read
            return True


class _TriggerLog:
    """Its positions are ticks: what the leader's snapshot sees is compared with what the follower's tick saw."""

    def __init__(self, session: Connection, leader: PostgresStore, schema: str) -> None:
        self._session = session
        self._leader = leader
        self._schema = schema
        self._seen = ""

    def freeze(self) -> None:
        self._seen = self._leader.snapshot()

    def covers(self, applied: Position, position: Position) -> bool:  # noqa: ARG002 - a place in another log
        return not capture.changed_between(self._session, self._schema, applied, self._seen)

    def goes_beyond(self, applied: Position) -> bool:
        return capture.changed_between(self._session, self._schema, applied, self._seen)


def _json(result: _Round, verdict: Verdict) -> dict[str, Any]:
    return {
        "verdict": verdict.value,
        "leader_position": str(result.position),
        "follower_position": None if result.applied is None else str(result.applied),
        "tables": [_table_json(table) for table in result.tables],
    }


def _table_json(table: _Table) -> dict[str, Any]:
    found = table.differences
    names = _key_columns(table.relation)
    keys = (
        None
        if found is None
        else {
            "missing": [key_text(key, names) for key in found.missing],
            "extra": [key_text(key, names) for key in found.extra],
            "different": [key_text(key, names) for key in found.different],
            "complete": found.complete,
        }
    )
    return {
        "table": table.relation.label,
        "verdict": table.verdict.value,
        "leader_rows": table.leader.rows,
        "follower_rows": None if table.follower is None else table.follower.rows,
        "leader_digest": table.leader.hex,
        "follower_digest": None if table.follower is None else table.follower.hex,
        "note": table.note or None,
        "keys": keys,
    }


def _key_columns(relation: Relation) -> list[str]:
    """The names of the columns of a row's key, all where it has none."""
    key = [column.name for column in relation.columns if column.key]
    return key or [column.name for column in relation.columns]


def _print(console: Console, result: _Round, verdict: Verdict) -> None:
    header = ("table", "leader rows", "digest", "follower rows", "digest", "verdict")
    console.table(header, [_cells(table) for table in result.tables], right=(1, 3))
    for table in result.tables:
        _print_keys(console, table)
    applied = "keeps no position of this leader" if result.applied is None else f"has applied {result.applied}"
    console.out(f"leader at {result.position}; the follower {applied}")
    console.out(_sentence(result, verdict))


def _cells(table: _Table) -> tuple[str, ...]:
    there = table.follower
    rows, shown_digest = ("-", "-") if there is None else (f"{there.rows:,}", there.hex[:_DIGITS_SHOWN])
    leader = table.leader
    return (
        table.relation.label,
        f"{leader.rows:,}",
        leader.hex[:_DIGITS_SHOWN],
        rows,
        shown_digest,
        table.verdict,
    )


def _print_keys(console: Console, table: _Table) -> None:
    if table.note:
        console.out(f"{table.relation.label}: {table.note}")
    if table.differences is None:
        return
    names = _key_columns(table.relation)
    kinds = ("missing on the follower", "extra on the follower", "different")
    for kind, keys in zip(kinds, table.differences[:3], strict=True):
        for key in keys:
            console.out(f"{table.relation.label}: {kind}: {key_text(key, names)}")
    if not table.differences.complete:
        console.out(f"{table.relation.label}: and more")


def _sentence(result: _Round, verdict: Verdict) -> str:
    count = len(result.tables)
    if verdict is Verdict.EQUAL:
        return f"equal: {count} tables, {sum(table.leader.rows for table in result.tables):,} rows"
    differing = sum(table.verdict is verdict for table in result.tables)
    if verdict is Verdict.DIFFERS:
        return f"differs: {differing} of {count} tables\nremedy: mend the follower's rows, or rebuild it from an image"
    return (
        f"unknown: {differing} of {count} tables differ, but the follower has not applied all yet\n"
        "remedy: let `cdc ship` and `cdc apply` run, and verify again with --wait SECONDS"
    )
