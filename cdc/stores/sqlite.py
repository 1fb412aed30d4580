"""SQLite as follower and as store to look at.

A table of schema ``public`` keeps its name, ``other.t`` becomes ``"other.t"``. Our own tables are ``cdc_checkpoint``
and ``cdc_relation``. The journal is a write-ahead log, fully synchronous: what ``commit`` returned from is on disk.
"""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, ClassVar, Final

from cdc.errors import (
    AccessError,
    CdcError,
    ConfigurationError,
    ConflictError,
    LocalIOError,
    SchemaError,
    TransientError,
    UnavailableError,
)
from cdc.record import Checkpoint, Relation, RowSet
from cdc.sql.mapping import key_of, storage, types_of
from cdc.sql.quote import identifier, literal, qualified
from cdc.sql.sets import changing
from cdc.stores.foreign import (
    ForeignFollower,
    Rows,
    database_path,
    decoded,
    internal,
    lines_of,
    missing,
    printer,
    reserved,
)

_BUSY_WAIT_S: Final = 10.0
_CACHE_KIB: Final = 16_384
_OURS: Final = ("cdc_checkpoint", "cdc_relation", "cdc_rebuild")
_VERSION_MIN: Final = (3, 35)  # DROP COLUMN, RETURNING
_SETTINGS: Final = (
    "journal_mode = WAL",
    "synchronous = FULL",
    f"cache_size = -{_CACHE_KIB}",
    "journal_size_limit = 67108864",
)


def connect_follower(url: str) -> "SqliteFollower":
    """Open, and create where it is not, the file of ``sqlite:///relative`` or ``sqlite:////absolute``.

    :raises UsageError: not such a URL.
    :raises LocalIOError, AccessError: the file cannot be opened.
    :raises ConfigurationError: the file is not an SQLite database, or the library is older than 3.35.
    """
    path = database_path(url, "sqlite")
    if sqlite3.sqlite_version_info < _VERSION_MIN:
        raise ConfigurationError(
            f"SQLite {sqlite3.sqlite_version} is too old", remedy="use a Python built with SQLite 3.35 or newer"
        )
    with translated(str(path)):
        return SqliteFollower(_connect(str(path)))


def connect_store(url: str) -> "SqliteStore":
    """Open an existing file for reading.

    :raises ConfigurationError: there is no such file, or it is not an SQLite database.
    """
    path = database_path(url, "sqlite")
    if not path.exists():
        raise missing(path)
    with translated(str(path)):
        connection = _connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
        return SqliteStore(connection)


def _connect(path: str, *, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=_BUSY_WAIT_S, isolation_level=None, check_same_thread=False, cached_statements=256, uri=uri
    )
    if not uri:
        for setting in _SETTINGS:
            connection.execute(f"PRAGMA {setting}").fetchall()
    return connection


class SqliteFollower(ForeignFollower):
    """See :class:`cdc.ports.Follower`."""

    dialect: ClassVar[str] = "sqlite"
    checkpoint_table = "cdc_checkpoint"
    relation_table = "cdc_relation"

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__()
        self._connection = connection
        self._marked = False

    def begin(self) -> None:
        self._marked = False
        with translated("begin"):
            self._connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        with translated("commit"):
            self._connection.execute("COMMIT")

    def rollback(self) -> None:
        self.forget_state()
        if self._connection.in_transaction:
            with translated("rollback"):
                self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()

    def savepoint(self) -> None:
        with translated("savepoint"):
            if self._marked:
                self._connection.execute("RELEASE cdc")
            self._connection.execute("SAVEPOINT cdc")
        self._marked = True

    def rollback_to_savepoint(self) -> None:
        self.forget_state()
        with translated("rollback to savepoint"):
            self._connection.execute("ROLLBACK TO cdc")

    def run(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        return self._connection.execute(sql, values).fetchall()

    def translated(self, subject: str) -> AbstractContextManager[list[str]]:
        return translated(subject)

    def table(self, relation: Relation) -> str:
        return identifier(table_name(relation))

    def has_state(self) -> bool:
        return bool(self.run("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'cdc_checkpoint'"))

    def prepare_state(self) -> None:
        pass

    def prepare_table(self, relation: Relation) -> None:
        name = table_name(relation).lower()
        if name in _OURS:
            raise reserved(relation.label, name)

    def columns(self, relation: Relation) -> Mapping[str, str] | None:
        name = table_name(relation)
        with translated(relation.label):
            if not self.run("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", [name]):
                return None
            return dict(self.run("SELECT name, type FROM pragma_table_info(?)", [name]))

    def constant(self, value: Any, declared: str) -> str:  # noqa: ARG002
        if isinstance(value, bytes):
            return f"x'{value.hex()}'"
        if isinstance(value, str):
            return literal(value)
        return repr(value).replace("inf", "9e999") if isinstance(value, float) else str(int(value))

    def move(self, old: Relation, relation: Relation) -> None:
        self.rename(old, relation)

    def rename(self, old: Relation, relation: Relation) -> None:
        self.run(f"ALTER TABLE {self.table(old)} RENAME TO {self.table(relation)}")

    def drops_in_place(self, relation: Relation, name: str) -> bool:
        key = self.run("SELECT 1 FROM pragma_table_info(?) WHERE name = ? AND pk", [table_name(relation), name])
        return not key

    def conversion_statement(self, relation: Relation, name: str, declared: str) -> str:
        table, column, interim = self.table(relation), identifier(name), identifier(f"{name} new")
        return (
            f"ALTER TABLE {table} ADD COLUMN {interim} {declared}; UPDATE {table} SET {interim} = {column}; "
            f"ALTER TABLE {table} DROP COLUMN {column}; ALTER TABLE {table} RENAME {interim} TO {column}"
        )

    # Rows.

    def insert(self, rows: RowSet, *, replace: bool = False) -> int:
        names = [identifier(rows.relation.columns[index].name) for index in rows.columns]
        places = ", ".join("?" * len(names))
        sql = f"INSERT INTO {self.table(rows.relation)} ({', '.join(names)}) VALUES ({places})"
        key = key_of(rows.relation)
        if replace and key:
            sets = ", ".join(f"{name} = excluded.{name}" for name in names)
            sql += f" ON CONFLICT ({', '.join(map(identifier, key))}) DO UPDATE SET {sets}"
        return self._many(rows, "insert into", sql, decoded(rows.rows, rows.columns, rows, self.dialect))

    def update(self, rows: RowSet) -> int:
        columns, new = changing(rows)
        sets = ", ".join(f"{identifier(rows.relation.columns[index].name)} = ?" for index in columns)
        sql = f"UPDATE {self.table(rows.relation)} SET {sets} WHERE {self._where(rows)}"
        values = decoded(new, columns, rows, self.dialect) + decoded(rows.matches, rows.match, rows, self.dialect)
        return self._many(rows, "update", sql, values)

    def delete(self, rows: RowSet) -> int:
        sql = f"DELETE FROM {self.table(rows.relation)} WHERE {self._where(rows)}"
        return self._many(rows, "delete from", sql, decoded(rows.matches, rows.match, rows, self.dialect))

    def _where(self, rows: RowSet) -> str:
        """Qualified names: SQLite reads a bare quoted one that is no column as a string."""
        table = self.table(rows.relation)
        names = [f"{table}.{identifier(rows.relation.columns[index].name)}" for index in rows.match]
        if rows.unique:
            return " AND ".join(f"{name} = ?" for name in names)
        row = _row_number(rows.relation)
        equal = " AND ".join(f"{name} IS ?" for name in names)
        return f"{row} = (SELECT {row} FROM {table} WHERE {equal} LIMIT 1)"

    def _many(self, rows: RowSet, verb: str, sql: str, columns: list[list[Any]]) -> int:
        """The driver draws one row at a time, so what is left tells which one failed."""
        waiting = zip(*columns, strict=True)
        with translated(f"{verb} {rows.relation.label}") as context:
            try:
                return self._connection.executemany(sql, waiting).rowcount if columns and columns[0] else 0
            except sqlite3.Error:
                failed = len(columns[0]) - sum(1 for _ in waiting) - 1
                if failed >= 0:
                    context.append(_excerpt(tuple(column[failed] for column in columns)))
                raise


def _excerpt(row: tuple[Any, ...]) -> str:
    text = repr(row)
    return f" row {text if len(text) <= 200 else text[:200] + '…'}"


def table_name(relation: Relation) -> str:
    """The table's name here. Names that hold a dot or a quote are kept apart by quoting both halves."""
    if not set('."').isdisjoint(relation.schema + relation.name):
        return qualified(relation.schema, relation.name)
    return relation.name if relation.schema == "public" else f"{relation.schema}.{relation.name}"


def _row_number(relation: Relation) -> str:
    taken = {column.name.lower() for column in relation.columns}
    for name in ("rowid", "_rowid_", "oid"):
        if name not in taken:
            return name
    raise SchemaError(
        f"the columns of {relation.label} hide SQLite's row number", remedy="give the leader's table a primary key"
    )


class SqliteStore:
    """See :class:`cdc.ports.Store`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def checkpoints(self) -> Mapping[str, Checkpoint]:
        return SqliteFollower(self._connection).all_checkpoints()

    def lines(self, relation: Relation) -> Iterator[tuple[bytes, bytes]]:
        types = types_of(relation)
        printers = [printer(storage(column, types, "sqlite").kind) for column in relation.columns]
        # Qualified: SQLite reads a quoted name that is no column as a string.
        names = ", ".join(f"t.{identifier(column.name)}" for column in relation.columns)
        with translated(relation.label):
            rows = self._connection.execute(f"SELECT {names} FROM {identifier(table_name(relation))} t")
            yield from lines_of(relation, printers, rows)

    def close(self) -> None:
        self._connection.close()


@contextmanager
def translated(subject: str) -> Iterator[list[str]]:
    """Errors of SQLite come out as those of :mod:`cdc.errors`. What is put into the list is added to the subject."""
    more: list[str] = []
    try:
        yield more
    except sqlite3.Error as error:
        raise _translate(error, "".join(chain([subject], more))) from error
    except UnicodeEncodeError as error:
        raise SchemaError(f"{subject}: {error}") from error


def _translate(error: sqlite3.Error, subject: str) -> CdcError:
    """By primary result code: https://sqlite.org/rescode.html."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    message = f"{subject}: {error}"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return TransientError(
            f"{message} for {_BUSY_WAIT_S:g} s",
            remedy="end what holds the file's write lock; the stream resumes where it was",
        )
    kind = _BY_CODE.get(code)
    if kind is not None:
        return kind(message)
    if code == sqlite3.SQLITE_NOTADB:
        return ConfigurationError(message, remedy="point the follower at another path: this file is something else")
    if code == sqlite3.SQLITE_CORRUPT:
        return LocalIOError(message, remedy="restore the file or build the follower anew: the database is damaged")
    return internal(error, subject)


_BY_CODE: Final[Mapping[int, type[CdcError]]] = {
    sqlite3.SQLITE_CONSTRAINT: ConflictError,
    sqlite3.SQLITE_ERROR: SchemaError,  # no such table, no such column, duplicate column
    sqlite3.SQLITE_MISMATCH: SchemaError,
    sqlite3.SQLITE_TOOBIG: SchemaError,
    sqlite3.SQLITE_RANGE: SchemaError,
    sqlite3.SQLITE_SCHEMA: TransientError,
    sqlite3.SQLITE_FULL: LocalIOError,
    sqlite3.SQLITE_IOERR: LocalIOError,
    sqlite3.SQLITE_CANTOPEN: LocalIOError,
    sqlite3.SQLITE_NOMEM: LocalIOError,
    sqlite3.SQLITE_READONLY: AccessError,
    sqlite3.SQLITE_PERM: AccessError,
    sqlite3.SQLITE_AUTH: AccessError,
    sqlite3.SQLITE_PROTOCOL: UnavailableError,
}
