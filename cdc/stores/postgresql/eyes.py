"""What verify and the lab see of a PostgreSQL database: every row as COPY text, under pinned settings."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, LiteralString

from cdc.codec import progress_from_json
from cdc.errors import SchemaError
from cdc.position import Position, parse_lsn
from cdc.record import Checkpoint, Column, Relation
from cdc.sql.capture import parenthesized
from cdc.sql.quote import identifier, qualified
from cdc.stores.postgresql.connect import Connection, connect, fetch, source_of, translated
from cdc.wire.oids import MONEY


def connect_store(url: str) -> "PostgresStore":
    """The eyes on the database that ``url`` names; raises what :func:`~cdc.stores.postgresql.connect.connect` does."""
    return PostgresStore(connect(url, application_name="cdc eyes"))


class PostgresStore:
    """A :class:`cdc.ports.Store`. Every call sees what is committed then, or after ``freeze`` one snapshot."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._frozen: Position | None = None
        self.conditions: Mapping[int, str] = {}
        """Of the rows that are seen, over the alias ``n``, by relation id."""

    def freeze(self) -> Position:
        """Take a snapshot that every call sees until ``thaw``, and tell its position.

        Everything the snapshot sees was committed at or below that position; something committed just below it may be
        unseen where others write meanwhile.
        """
        self.thaw()
        with translated():
            self._connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        self._frozen = self._read_position()
        return self._frozen

    def thaw(self) -> None:
        """Let the snapshot go. Does nothing where there is none."""
        if self._frozen is not None:
            self._frozen = None
            with translated():
                self._connection.execute("ROLLBACK")

    def position(self) -> Position:
        """The position of the snapshot, or the end of the log now."""
        return self._frozen or self._read_position()

    def _read_position(self) -> Position:
        # The query's snapshot is taken before the function runs: what it sees lies below what it reads.
        lsn: str = fetch(self._connection, _END_OF_LOG)[0].lsn
        source, epoch = source_of(self._connection)
        return Position(source, epoch, parse_lsn(lsn))

    def snapshot(self) -> str:
        """What is seen, as ``pg_snapshot``."""
        text: str = fetch(self._connection, "SELECT pg_current_snapshot()::text AS text")[0].text
        return text

    def checkpoints(self) -> Mapping[str, Checkpoint]:
        """What was applied here, by stream. Empty for a database that is no follower."""
        if not fetch(self._connection, "SELECT 1 WHERE to_regclass('cdc.checkpoint') IS NOT NULL"):
            return {}
        return {
            row.stream: Checkpoint(
                Position(row.source, row.epoch, parse_lsn(row.lsn)),
                row.next_offset,
                row.owner,
                progress_from_json(row.image) if row.image is not None else None,
            )
            for row in fetch(self._connection, _CHECKPOINTS)
        }

    def lines(self, relation: Relation) -> Iterator[tuple[bytes, bytes]]:
        """Every row as (key, line): see :class:`cdc.ports.Store`.

        :raises SchemaError: there is no such table or column here.
        """
        names = [_shown(column) for column in relation.columns]
        keys = [_shown(column) for column in relation.columns if column.key]
        if not keys or keys == names:
            for line in self._copy(relation, names):
                yield line, line
        elif len(keys) == 1 and keys == names[:1]:
            for line in self._copy(relation, names):
                yield line[: line.index(b"\t")], line
        else:
            # A tab inside a value is escaped: every one that is seen stands between two values.
            count = len(keys)
            for both in self._copy(relation, [*keys, *names]):
                *key, line = both.split(b"\t", count)
                yield b"\t".join(key), line

    def close(self) -> None:
        self._connection.close()

    def _copy(self, relation: Relation, shown: Sequence[str]) -> Iterator[bytes]:
        """The lines of COPY TO, without their newlines. The server sends one per message."""
        query = f"COPY (SELECT {', '.join(shown)} FROM {self._rows_of(relation)}) TO STDOUT"
        with translated(), self._guarded(), self._connection.cursor() as cursor, cursor.copy(query.encode()) as copy:
            for line in copy:
                yield bytes(line)[:-1]

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Keep the snapshot when a COPY fails, or is left before its end."""
        if self._frozen is None:
            yield
            return
        self._connection.execute("SAVEPOINT eyes")
        try:
            yield
        except BaseException:
            if not self._connection.broken:
                self._connection.execute("ROLLBACK TO eyes")
            raise
        self._connection.execute("RELEASE eyes")

    def _rows_of(self, relation: Relation) -> str:
        """What to read from: a table alone, since its children are relations of their own; a root with its leaves."""
        found = fetch(self._connection, _KIND, [relation.schema, relation.name])
        if not found:
            raise SchemaError(
                f"there is no table {relation.label} in database {self._connection.info.dbname!r}",
                remedy="create it, or let `cdc apply` create it from the leader's description",
            )
        table = qualified(relation.schema, relation.name)
        rows = f"{table} n" if found[0].kind == "p" else f"ONLY {table} n"
        condition = self.conditions.get(relation.id)
        return f"{rows} WHERE {parenthesized(condition)}" if condition else rows


def _shown(column: Column) -> str:
    """The column as every store prints it: money without the currency that only this server's locale knows."""
    plain = {MONEY: "::numeric", _MONEY_ARRAY: "::numeric[]"}.get(column.type_oid, "")
    return f"{identifier(column.name)}{plain}"


_MONEY_ARRAY: Final = 791
_END_OF_LOG: Final[LiteralString] = """
    SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END)::text
           AS lsn
"""
_CHECKPOINTS: Final[LiteralString] = """
    SELECT stream, owner, source, epoch, lsn::text AS lsn, next_offset, image::jsonb AS image FROM cdc.checkpoint
    WHERE lsn IS NOT NULL
"""
_KIND: Final[LiteralString] = """
    SELECT c.relkind AS kind FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE s.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p', 'f')
"""
