"""A consistent image of the leader, tied to the exact log position the stream continues from.

:class:`PostgresSnapshot` reads any exported snapshot. For the logical log a temporary slot is created
for its exported snapshot: the snapshot sees exactly the transactions that committed before the slot's consistent point,
and the stream tells exactly those that commit after it.
https://www.postgresql.org/docs/current/logicaldecoding-explanation.html#LOGICALDECODING-EXPLANATION-EXPORTED-SNAPSHOTS
"""

import os
import select
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final, Protocol

from psycopg import pq
from psycopg.errors import error_from_result

from cdc.errors import TransientError
from cdc.ports import ImageChunk
from cdc.position import Position, parse_lsn
from cdc.record import ChunkPlan, Relation
from cdc.sql.capture import parenthesized
from cdc.sql.quote import identifier, literal, qualified
from cdc.stores.postgresql.connect import Connection, connect, translate, translated
from cdc.stores.postgresql.describe import describe, filters
from cdc.wire import copy

_WAIT_S: Final = 0.5
CHUNK_BYTES: Final = 8 << 20  # of table per chunk: what a killed shipper or applier does again
PART_BYTES: Final = 900 << 10  # of rows per message
_UNKNOWN_ROW_BYTES: Final = 100  # where the table was never analyzed


class Scope(Protocol):
    """What of the leader is copied."""

    def relations(self, connection: Connection) -> Sequence[Relation]:
        """As of the session's snapshot."""
        ...

    def conditions(self, connection: Connection) -> Mapping[int, str]:
        """Of the rows that are copied, over the alias ``n``, by relation id; all where there is none."""
        ...

    def select(self, relation: Relation) -> Sequence[str]:
        """The expression of each column, over the alias ``n``."""
        ...


class Published:
    """What a publication shows."""

    def __init__(self, publication: str) -> None:
        self._publication = publication

    def relations(self, connection: Connection) -> Sequence[Relation]:
        return describe(connection, publication=self._publication)

    def conditions(self, connection: Connection) -> Mapping[int, str]:
        return filters(connection, publication=self._publication)

    def select(self, relation: Relation) -> Sequence[str]:
        return [f"n.{identifier(column.name)}" for column in relation.columns]


@dataclass(frozen=True, slots=True)
class _Source:
    """How a relation's rows are selected, in a form its types have."""

    table: str
    where: str
    form: str
    size_bytes: int
    rows: float


class PostgresSnapshot:
    """Reads through as many connections as there are threads asking, all in the same snapshot."""

    def __init__(self, url: str, name: str, position: Position, scope: Scope, *, text: bool) -> None:
        self._url = url
        self._name = name
        self._position = position
        self._scope = scope
        self._text = text
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._sources: dict[int, _Source] = {}
        self._held: Sequence[Relation] = ()
        self._crowded = False
        self._failed = False

    @property
    def position(self) -> Position:
        return self._position

    def relations(self) -> Sequence[Relation]:
        with self._connection() as connection:
            relations = self._scope.relations(connection)
            _lock(connection, relations)
            _check_untouched(connection, relations)
            self._sources = _sources(connection, self._scope, relations, text=self._text)
            self._held = relations
        return relations

    def plan(self, relation: Relation) -> ChunkPlan:
        source = self._sources[relation.id]
        shown = self._scope.select(relation)
        # A bound stands in the topic as it is: a key that is masked has none.
        plain = all(f"n.{identifier(name)}" in shown for name in relation.primary_key)
        if source.size_bytes <= 2 * CHUNK_BYTES or not relation.primary_key or not plain:
            return ChunkPlan(relation.id, ())
        width = source.size_bytes / source.rows if source.rows > 0 else _UNKNOWN_ROW_BYTES
        step = max(1, int(CHUNK_BYTES / max(1.0, width)))
        with self._connection() as connection:
            return ChunkPlan(relation.id, tuple(_bounds(connection, relation, source, step)))

    def read(self, relation: Relation, plan: ChunkPlan, chunk: int) -> Iterator[ImageChunk]:
        source = self._sources[relation.id]
        columns = ", ".join(self._scope.select(relation))
        where = " AND ".join(filter(None, [source.where, *_range(relation, plan, chunk)]))
        query = f"SELECT {columns} FROM {source.table} n" + (f" WHERE {where}" if where else "")
        with self._connection() as connection:
            yield from _copy_out(connection, query, source.form)

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        connection = self._another()
        # Not put back after an error: its transaction is over, so it no longer reads the snapshot.
        try:
            yield connection
        except BaseException:
            self._failed = True
            connection.close()
            raise
        self._idle.put(connection)

    def _another(self) -> Connection:
        """An idle connection, or a new one; where no new one gets at the tables, the next that becomes idle."""
        with suppress(Empty):
            return self._idle.get_nowait()
        if not self._crowded:
            try:
                return self._join()
            except TransientError:
                # A TRUNCATE waits for the locks that we hold until the image is read, and whoever comes later waits
                # behind it. The connection that holds them need not wait.
                self._crowded = True
        while not self._failed:
            with suppress(Empty):
                return self._idle.get(timeout=_WAIT_S)
        raise TransientError("another reader of the image failed")

    def _join(self) -> Connection:
        connection = connect(self._url, application_name="cdc ship image")
        try:
            with translated():
                connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                connection.execute(f"SET TRANSACTION SNAPSHOT {literal(self._name)}")
                connection.execute("SET LOCAL lock_timeout = '2s'")
            _lock(connection, self._held)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        while not self._idle.empty():
            self._idle.get().close()


@contextmanager
def snapshot(
    url: str, slot: str, publication: str, source: str, timeline: int, *, text: bool
) -> Iterator[PostgresSnapshot]:
    """Open a snapshot; its temporary slot and its connections live as long as the context.

    Waits until every transaction that is open on the leader now has ended, as creating a slot does.
    """
    temporary = f"{slot[:40]}_image_{os.getpid()}"
    with connect(url, replication=True, application_name="cdc ship image") as keeper:
        command = f"CREATE_REPLICATION_SLOT {identifier(temporary)} TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')"
        result = keeper.pgconn.exec_(command.encode())
        if result.status != pq.ExecStatus.TUPLES_OK:
            raise translate(error_from_result(result))
        point = (result.get_value(0, 1) or b"").decode()
        name = (result.get_value(0, 2) or b"").decode()
        image = PostgresSnapshot(
            url, name, Position(source, timeline, parse_lsn(point)), Published(publication), text=text
        )
        try:
            yield image
        finally:
            image.close()


def _lock(connection: Connection, relations: Sequence[Relation]) -> None:
    """Keep TRUNCATE and rewrites away until the image is read: they would empty a table for our snapshot too.

    https://www.postgresql.org/docs/current/mvcc-caveats.html
    """
    with translated():
        for relation in relations:
            connection.execute(f"LOCK TABLE {qualified(relation.schema, relation.name)} IN ACCESS SHARE MODE".encode())


def _check_untouched(connection: Connection, relations: Sequence[Relation]) -> None:
    """:raises TransientError: a rewrite came between snapshot and lock; the next attempt takes another snapshot."""
    with translated():
        rows = connection.execute(_REWRITTEN, ([relation.id for relation in relations],)).fetchall()
    if rows:
        raise TransientError(f"{rows[0][0]} was truncated or rewritten while its image began")


# The snapshot's pg_class beside the cache, which knows today's.
_REWRITTEN: Final = """
    SELECT c.oid::regclass::text FROM pg_class c
    WHERE c.oid IN (SELECT coalesce(p.relid::oid, r.id) FROM unnest(%s::oid[]) r(id)
                    LEFT JOIN LATERAL pg_partition_tree(r.id) p ON true)
      AND c.relkind = 'r' AND c.relfilenode <> pg_relation_filenode(c.oid)
"""


def _sources(connection: Connection, scope: Scope, relations: Sequence[Relation], *, text: bool) -> dict[int, _Source]:
    where = {id_: parenthesized(condition) for id_, condition in scope.conditions(connection).items()}
    with translated():
        rows = connection.execute(
            """
            SELECT c.oid, c.relkind, pg_table_size(c.oid), c.reltuples,
                   EXISTS (SELECT FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                           WHERE a.attrelid = c.oid AND a.attnum > 0 AND t.typsend = 0)
            FROM pg_class c WHERE c.oid = ANY (%s)
            """,
            ([relation.id for relation in relations],),
        ).fetchall()
    names = {relation.id: qualified(relation.schema, relation.name) for relation in relations}
    return {
        oid: _Source(
            # A parent's other children are published as themselves; a partitioned table holds nothing but its leaves.
            names[oid] if kind == "p" else f"ONLY {names[oid]}",
            where.get(oid, ""),
            "text" if text or unsendable else "binary",
            size,
            tuples,
        )
        for oid, kind, size, tuples, unsendable in rows
    }


def _bounds(connection: Connection, relation: Relation, source: _Source, step: int) -> Iterator[tuple[str, ...]]:
    """Every ``step``-th key, walking the primary key's index."""
    keys = [identifier(name) for name in relation.primary_key]
    texts = ", ".join(f"{key}::text" for key in keys)
    order = ", ".join(keys)
    after = ""
    while True:
        query = f"SELECT {texts} FROM {source.table} {after} ORDER BY {order} OFFSET {step} LIMIT 1"
        with translated():
            row = connection.execute(query).fetchone()
        if row is None:
            return
        yield row
        after = "WHERE " + _beyond(relation, row)


def _range(relation: Relation, plan: ChunkPlan, chunk: int) -> Iterator[str]:
    """The conditions that select chunk ``chunk``: beyond the bound before it, up to its own."""
    if chunk > 0:
        yield _beyond(relation, plan.bounds[chunk - 1])
    if chunk < len(plan.bounds):
        yield f"NOT ({_beyond(relation, plan.bounds[chunk])})"


def _beyond(relation: Relation, key: Sequence[str]) -> str:
    names = ", ".join(identifier(name) for name in relation.primary_key)
    return f"({names}) > ({', '.join(literal(text) for text in key)})"


def _copy_out(connection: Connection, query: str, form: str) -> Iterator[ImageChunk]:
    """Rows in parts of about PART_BYTES, each a complete COPY body."""
    head, tail = (copy.HEADER, copy.TRAILER) if form == "binary" else (b"", b"")
    rows: list[bytes] = []
    size = 0
    for row in copy_rows(connection, query, form):
        rows.append(row)
        size += len(row)
        if size >= PART_BYTES:
            yield ImageChunk(head + b"".join(rows) + tail, len(rows), form)
            rows.clear()
            size = 0
    yield ImageChunk(head + b"".join(rows) + tail, len(rows), form)


def copy_rows(connection: Connection, query: str, form: str) -> Iterator[bytes]:
    """The rows of COPY TO, one message each, without the binary form's header and trailer."""
    wire = connection.pgconn
    result = wire.exec_(f"COPY ({query}) TO STDOUT (FORMAT {form})".encode())
    if result.status != pq.ExecStatus.COPY_OUT:
        raise translate(error_from_result(result))
    get, skip = wire.get_copy_data, len(copy.HEADER) if form == "binary" else 0
    poll = select.poll()
    poll.register(wire.socket, select.POLLIN)
    with translated():
        while True:
            # Waiting in poll, not in libpq, lets the other threads work meanwhile.
            length, data = get(1)
            if length > 0:
                row = bytes(data[skip:])  # the header stands before the first row in the same message
                skip = 0
                if row != copy.TRAILER:
                    yield row
            elif length == 0:
                poll.poll()
                wire.consume_input()
            else:
                break
        ended = wire.get_result()
        if ended is not None and ended.status != pq.ExecStatus.COMMAND_OK:
            raise error_from_result(ended)
        while wire.get_result() is not None:
            pass
