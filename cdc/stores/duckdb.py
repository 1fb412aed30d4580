"""DuckDB as follower and as store to look at.

Schema ``public`` becomes ``main``, other schemas are created under their name; our own tables are ``cdc.checkpoint``
and ``cdc.relation``. A DuckDB file belongs to one process at a time, readers included.

It is given 32 MiB, enough for transactions of any length with rows of some KiB. Where many wider ones need more, since
it holds up to 2,048 values of a column at once, the transaction ends in a TransientError and the next one is given four
times as much.

Rows go in as one list per column that ``unnest`` turns into a table: DuckDB takes a quarter of a million rows a second
that way and three thousand with ``executemany``. There are no savepoints.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
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
from cdc.sql.mapping import Kind, key_of, postgresql_date, storage, types_of
from cdc.sql.quote import identifier, literal
from cdc.sql.sets import changing, waves
from cdc.stores.foreign import (
    ForeignFollower,
    Printer,
    Rows,
    database_path,
    decoded,
    internal,
    lines_of,
    missing,
    printer,
    reserved,
)

try:
    import duckdb
except ImportError as error:
    raise ConfigurationError("the DuckDB driver is not installed", remedy="pip install 'cdc[duckdb]'") from error
if int(duckdb.__version__.partition(".")[0]) < 2:  # 1.x neither writes nor prints all of what is relied upon here
    raise ConfigurationError(f"DuckDB {duckdb.__version__} is too old", remedy="pip install 'duckdb>=2'")

_SET_ROWS: Final = 4_096
_SET_BYTES: Final = 2 << 20
_MEMORY_MIB: Final = 32
_MEMORY_MIB_MAX: Final = 4_096
_FETCH_ROWS: Final = 2_048
_OURS: Final = ("checkpoint", "relation")
_SETTINGS: Final[dict[str, str | bool | int | float | list[str]]] = {
    "threads": 1,
    "memory_limit": f"{_MEMORY_MIB}MiB",
    "preserve_insertion_order": False,
}


def connect_follower(url: str) -> "DuckdbFollower":
    """Open, and create where it is not, the file of ``duckdb:///relative`` or ``duckdb:////absolute``.

    :raises UsageError: not such a URL.
    :raises UnavailableError: another process has the file open.
    :raises LocalIOError: the file cannot be opened.
    """
    path = str(database_path(url, "duckdb"))
    with translated(path):
        return DuckdbFollower(path, _connect(path, read_only=False))


def connect_store(url: str) -> "DuckdbStore":
    """Open an existing file for reading.

    :raises ConfigurationError: there is no such file.
    :raises UnavailableError: another process has the file open for writing.
    """
    path = database_path(url, "duckdb")
    if not path.exists():
        raise missing(path)
    with translated(str(path)):
        return DuckdbStore(str(path), _connect(str(path), read_only=True))


def _connect(path: str, *, read_only: bool) -> duckdb.DuckDBPyConnection:
    settings = {k: v for k, v in _SETTINGS.items() if not read_only or k != "memory_limit"}
    connection = duckdb.connect(path, read_only=read_only, config=settings)
    connection.execute("SET TimeZone = 'UTC'")
    return connection


class DuckdbFollower(ForeignFollower):
    """See :class:`cdc.ports.Follower`."""

    dialect: ClassVar[str] = "duckdb"
    memory_mib: ClassVar[int] = _MEMORY_MIB  # of every follower from its next transaction on

    def __init__(self, path: str, connection: duckdb.DuckDBPyConnection) -> None:
        super().__init__()
        self._path = path
        self._connection = connection
        self._open = False
        # Three-part names throughout: a schema may be named like the file.
        [(catalog,)] = self.run("SELECT current_database()")
        self._catalog = str(catalog)
        ours = f"{identifier(self._catalog)}.cdc"
        self.checkpoint_table = f"{ours}.checkpoint"
        self.relation_table = f"{ours}.relation"

    def begin(self) -> None:
        with translated("begin"):
            self._connection.execute(f"SET memory_limit = '{self.memory_mib}MiB'")
            self._connection.execute("BEGIN TRANSACTION")
        self._open = True

    def commit(self) -> None:
        self._open = False
        try:
            with translated("commit"):
                self.run("COMMIT")
        except CdcError:
            self._reopen()
            raise

    def _reopen(self) -> None:
        """A commit that fails leaves in memory the keys of rows that are not there: they must not reach the file."""
        self.forget_state()
        with translated(self._path):
            with suppress(duckdb.FatalException):  # after which nothing is written any more
                self._connection.execute("PRAGMA disable_checkpoint_on_shutdown")
            self._connection.close()
            self._connection = _connect(self._path, read_only=False)

    def rollback(self) -> None:
        self.forget_state()
        if not self._open:
            return
        self._open = False
        with suppress(duckdb.TransactionException):  # a fatal error has rolled back already
            self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()

    def savepoint(self) -> None:
        raise NotImplementedError("DuckDB has no savepoints")

    def rollback_to_savepoint(self) -> None:
        raise NotImplementedError("DuckDB has no savepoints")

    def run(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        try:
            return self._connection.execute(sql, list(values)).fetchall()
        except duckdb.Error as error:
            if _is_out_of_memory(error):
                DuckdbFollower.memory_mib = min(4 * self.memory_mib, _MEMORY_MIB_MAX)
            raise

    def translated(self, subject: str) -> AbstractContextManager[None]:
        return translated(subject)

    def table(self, relation: Relation) -> str:
        return f"{self._schema(relation)}.{identifier(relation.name)}"

    def _schema(self, relation: Relation) -> str:
        return f"{identifier(self._catalog)}.{identifier(schema_name(relation))}"

    def has_state(self) -> bool:
        sql = "SELECT 1 FROM duckdb_tables() WHERE (database_name, schema_name, table_name) = (?, 'cdc', 'checkpoint')"
        return bool(self.run(sql, [self._catalog]))

    def prepare_state(self) -> None:
        self.run(f"CREATE SCHEMA IF NOT EXISTS {identifier(self._catalog)}.cdc")

    def prepare_table(self, relation: Relation) -> None:
        if relation.schema.lower() == "cdc" and relation.name.lower() in _OURS:
            raise reserved(relation.label, f"{relation.schema}.{relation.name}")
        if relation.schema.lower() == "main":
            raise reserved(relation.label, "schema main, which is the leader's schema public")
        if relation.schema != "public":
            self.run(f"CREATE SCHEMA IF NOT EXISTS {self._schema(relation)}")

    def columns(self, relation: Relation) -> Mapping[str, str] | None:
        with translated(relation.label):
            found = self.run(
                "SELECT column_name, data_type FROM duckdb_columns() "
                "WHERE database_name = ? AND schema_name = ? AND table_name = ? ORDER BY column_index",
                [self._catalog, schema_name(relation), relation.name],
            )
        return dict(found) or None

    def constant(self, value: Any, declared: str) -> str:
        if isinstance(value, bytes):
            return f"from_hex('{value.hex()}')"
        return f"CAST({literal(str(value))} AS {declared})"

    def move(self, old: Relation, relation: Relation) -> None:
        if old.schema == relation.schema:
            self.rename(old, relation)
        else:
            self.rebuild(old, relation, dict(self._present(old)), {})

    def rename(self, old: Relation, relation: Relation) -> None:
        self.run(f"ALTER TABLE {self.table(old)} RENAME TO {identifier(relation.name)}")

    def drops_in_place(self, relation: Relation, name: str) -> bool:  # noqa: ARG002
        """DuckDB drops no column of the key, nor one that stands before it."""
        sql = "SELECT 1 FROM duckdb_constraints() WHERE (database_name, schema_name, table_name) = (?, ?, ?)"
        keyed = self.run(
            f"{sql} AND constraint_type = 'PRIMARY KEY'", [self._catalog, schema_name(relation), relation.name]
        )
        return not keyed

    def conversion_statement(self, relation: Relation, name: str, declared: str) -> str:
        return f"ALTER TABLE {self.table(relation)} ALTER COLUMN {identifier(name)} TYPE {declared}"

    # Rows.

    def insert(self, rows: RowSet, *, replace: bool = False) -> int:
        key = key_of(rows.relation)
        names = [column.name for column in self._columns(rows, rows.columns)]
        sql = f"INSERT INTO {self.table(rows.relation)} ({_list(names)}) SELECT {self._unnest(rows, rows.columns)}"
        if replace and key:
            return self._replace(rows, sql, key, names)
        return sum(self._set(rows, sql, (rows.columns, rows.rows[part])) for part in _parts(rows.rows))

    def _replace(self, rows: RowSet, sql: str, key: Sequence[str], names: Sequence[str]) -> int:
        sets = ", ".join(f"{identifier(name)} = excluded.{identifier(name)}" for name in names if name not in key)
        sql += f" ON CONFLICT ({_list(key)}) " + (f"DO UPDATE SET {sets}" if sets else "DO NOTHING")
        places = [names.index(name) for name in key]
        for wave in waves([tuple(row[place] for place in places) for row in rows.rows]):
            for part in _parts(rows.rows[wave]):
                self._set(rows, sql, (rows.columns, rows.rows[wave][part]))
        return len(rows.rows)

    def update(self, rows: RowSet) -> int:
        columns, values = changing(rows)
        moves = values is not rows.matches and not set(columns).isdisjoint(rows.match)
        if moves or not rows.unique:
            return self._update_singly(rows, columns, values)
        return self._update_sets(rows, columns, values)

    def _update_sets(self, rows: RowSet, columns: tuple[int, ...], values: list[tuple[bytes, ...]]) -> int:
        table, names = self.table(rows.relation), [column.name for column in self._columns(rows, columns)]
        sets = ", ".join(f"{identifier(name)} = s.c{place}" for place, name in enumerate(names))
        source = f"{self._unnest(rows, columns, 'c')}, {self._unnest(rows, rows.match, 'k', after=len(columns))}"
        sql = f"UPDATE {table} t SET {sets} FROM (SELECT {source}) s WHERE {self._equal(rows, '=')}"
        count = 0
        for wave in waves(rows.matches):
            new, matches = values[wave], rows.matches[wave]
            for part in _parts(new, matches):
                count += self._set(rows, sql, (columns, new[part]), (rows.match, matches[part]))
        return count

    def _update_singly(self, rows: RowSet, columns: tuple[int, ...], values: list[tuple[bytes, ...]]) -> int:
        """One row after the other, where a later one may find what an earlier one made."""
        sets = ", ".join(
            f"{identifier(column.name)} = CAST(? AS {self._declared(rows, index)})"
            for index, column in zip(columns, self._columns(rows, columns), strict=True)
        )
        sql = f"UPDATE {self.table(rows.relation)} SET {sets} WHERE {self._one(rows)}"
        found = [decoded(values, columns, rows, self.dialect), decoded(rows.matches, rows.match, rows, self.dialect)]
        count = 0
        with translated(f"update {rows.relation.label}"):
            for row in zip(*found[0], *found[1], strict=True):
                [(changed,)] = self.run(sql, row)
                count += int(changed)
        return count

    def _one(self, rows: RowSet) -> str:
        equal = " AND ".join(
            f"{identifier(column.name)} IS NOT DISTINCT FROM CAST(? AS {self._declared(rows, index)})"
            for index, column in zip(rows.match, self._columns(rows, rows.match), strict=True)
        )
        if rows.unique:
            return equal
        _check_row_number(rows.relation)
        return f"rowid = (SELECT min(rowid) FROM {self.table(rows.relation)} WHERE {equal})"

    def delete(self, rows: RowSet) -> int:
        return self._delete_keys(rows) if rows.unique else self._delete_equal(rows)

    def _delete_keys(self, rows: RowSet) -> int:
        source = self._unnest(rows, rows.match, "k")
        sql = f"DELETE FROM {self.table(rows.relation)} t USING (SELECT {source}) s WHERE {self._equal(rows, '=')}"
        return sum(self._set(rows, sql, (rows.match, rows.matches[part])) for part in _parts(rows.matches))

    def _delete_equal(self, rows: RowSet) -> int:
        """As many of the rows equal to a match as there are equal matches."""
        _check_row_number(rows.relation)
        counted = Counter(rows.matches)
        source = f"{self._unnest(rows, rows.match, 'k')}, unnest(${len(rows.match) + 1}::BIGINT[]) AS n"
        source += f", unnest(${len(rows.match) + 2}::BIGINT[]) AS wanted"
        table = self.table(rows.relation)
        numbered = (
            "SELECT t.rowid AS r, s.wanted, row_number() OVER (PARTITION BY s.n ORDER BY t.rowid) AS place "
            f"FROM {table} t JOIN (SELECT {source}) s ON {self._equal(rows, 'IS NOT DISTINCT FROM')}"
        )
        sql = f"DELETE FROM {table} WHERE rowid IN (SELECT r FROM ({numbered}) WHERE place <= wanted)"
        distinct, count = list(counted), 0
        for part in _parts(distinct):
            matches = distinct[part]
            more = [list(range(len(matches))), [counted[match] for match in matches]]
            count += self._set(rows, sql, (rows.match, matches), more=more)
        return count

    def _equal(self, rows: RowSet, operator: str) -> str:
        names = [column.name for column in self._columns(rows, rows.match)]
        return " AND ".join(f"t.{identifier(name)} {operator} s.k{place}" for place, name in enumerate(names))

    def _unnest(self, rows: RowSet, columns: Sequence[int], alias: str = "c", *, after: int = 0) -> str:
        """``unnest($1::INTEGER[]) AS c0, …``: the parameters from ``after`` + 1 on."""
        return ", ".join(
            f"unnest(${after + place + 1}::{self._declared(rows, index)}[]) AS {alias}{place}"
            for place, index in enumerate(columns)
        )

    def _declared(self, rows: RowSet, index: int) -> str:
        return storage(rows.relation.columns[index], types_of(rows.relation), self.dialect).declared

    def _columns(self, rows: RowSet, columns: Sequence[int]) -> list[Any]:
        return [rows.relation.columns[index] for index in columns]

    def _set(
        self,
        rows: RowSet,
        sql: str,
        *parts: tuple[Sequence[int], list[tuple[bytes, ...]]],
        more: Sequence[list[int]] = (),
    ) -> int:
        values = [column for columns, part in parts for column in decoded(part, columns, rows, self.dialect)]
        with translated(f"{sql.partition(' ')[0].lower()} {rows.relation.label}"):
            [(count,)] = self.run(sql, [*values, *more])
        return int(count)


def _parts(*sides: list[tuple[bytes, ...]]) -> Iterator[slice]:
    """Cut parallel lists of rows into parts of bounded length and size, a single large row being one."""
    for start in range(0, len(sides[0]), _SET_ROWS):
        yield from _halves(sides, start, min(start + _SET_ROWS, len(sides[0])))


def _halves(sides: Sequence[list[tuple[bytes, ...]]], start: int, stop: int) -> Iterator[slice]:
    if stop - start == 1 or sum(_size(side[start:stop]) for side in sides) <= _SET_BYTES:
        yield slice(start, stop)
        return
    middle = (start + stop) // 2
    yield from _halves(sides, start, middle)
    yield from _halves(sides, middle, stop)


def _size(rows: list[tuple[bytes, ...]]) -> int:
    return sum(map(len, chain.from_iterable(rows)))


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(identifier, names))


def _check_row_number(relation: Relation) -> None:
    if any(column.name.lower() == "rowid" for column in relation.columns):
        raise SchemaError(
            f"a column of {relation.label} hides DuckDB's row number", remedy="give the leader's table a primary key"
        )


def schema_name(relation: Relation) -> str:
    """The schema of the relation's table here."""
    return "main" if relation.schema == "public" else relation.schema


class DuckdbStore:
    """See :class:`cdc.ports.Store`."""

    def __init__(self, path: str, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._names = DuckdbFollower(path, connection)

    def checkpoints(self) -> Mapping[str, Checkpoint]:
        return self._names.all_checkpoints()

    def lines(self, relation: Relation) -> Iterator[tuple[bytes, bytes]]:
        types = types_of(relation)
        kinds = [storage(column, types, "duckdb").kind for column in relation.columns]
        shown = [_shown(f"t.{identifier(c.name)}", kind) for c, kind in zip(relation.columns, kinds, strict=True)]
        with translated(relation.label):
            # A cursor of its own: another table may be read meanwhile.
            cursor = self._connection.cursor()
            cursor.execute("SET TimeZone = 'UTC'")
            cursor.execute(f"SELECT {', '.join(shown)} FROM {self._names.table(relation)} t")
            yield from lines_of(relation, [_printer(kind) for kind in kinds], _fetch(cursor))
            cursor.close()

    def close(self) -> None:
        self._connection.close()


_NATIVE: Final = (Kind.BOOL, Kind.INT, Kind.FLOAT4, Kind.FLOAT8, Kind.BYTES, Kind.TEXT)


def _shown(name: str, kind: Kind) -> str:
    return name if kind in _NATIVE else f"CAST({name} AS VARCHAR)"


def _printer(kind: Kind) -> Printer:
    return postgresql_date if kind in (Kind.DATE, Kind.TIMESTAMP, Kind.TIMESTAMPTZ) else printer(kind)


def _fetch(cursor: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while rows := cursor.fetchmany(_FETCH_ROWS):
        yield from rows


@contextmanager
def translated(subject: str) -> Iterator[None]:
    """Errors of DuckDB come out as those of :mod:`cdc.errors`."""
    try:
        yield
    except duckdb.Error as error:
        raise _translate(error, f"{subject}: {_first_line(error)}") from error


def _first_line(error: duckdb.Error) -> str:
    """Without the statement DuckDB quotes below its message."""
    return str(error).partition("\n\nLINE ")[0].replace("\n", " ")


def _is_out_of_memory(error: duckdb.Error) -> bool:
    return isinstance(error, duckdb.OutOfMemoryException) or "failed to pin block" in str(error)


def _translate(error: duckdb.Error, message: str) -> CdcError:
    if _is_out_of_memory(error):
        return TransientError(message, remedy="the next attempt gives DuckDB four times the memory, up to 4 GiB")
    if isinstance(error, duckdb.ConstraintException) or (
        isinstance(error, duckdb.TransactionException) and "constraint" in str(error)
    ):
        return ConflictError(message)
    if isinstance(error, duckdb.ConnectionException) or "Could not set lock on file" in message:
        return UnavailableError(
            message, remedy="a DuckDB file belongs to one process at a time: close the other one, then start again"
        )
    for kinds, translation in _BY_CLASS:
        if isinstance(error, kinds):
            return translation(message)
    return internal(error, message)


_BY_CLASS: Final[Sequence[tuple[tuple[type[duckdb.Error], ...], type[CdcError]]]] = (
    ((duckdb.TransactionException,), TransientError),
    ((duckdb.PermissionException,), AccessError),
    ((duckdb.IOException, duckdb.SerializationException), LocalIOError),
    ((duckdb.DataError, duckdb.ProgrammingError, duckdb.NotSupportedError), SchemaError),
)
