"""What the followers and eyes on engines other than PostgreSQL have in common.

An engine says how it runs a statement, names tables and lists columns; sets of rows are its own business, since that
is where engines differ in what is fast.
"""

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final

from cdc.codec import progress_from_json, progress_json, relation_from_json, relation_json
from cdc.errors import CdcError, ConfigurationError, FencedError, SchemaError, UsageError
from cdc.ports import AddColumn, ChangeType, DropColumn, RenameColumn, RenameTable, SchemaChange
from cdc.position import Position, format_lsn, parse_lsn
from cdc.record import NULL, Checkpoint, Column, Relation, RowSet, TypeDescription
from cdc.sql.mapping import Kind, conversion, declarations, key_of, storage, types_of, writer
from cdc.sql.quote import identifier
from cdc.wire import copy
from cdc.wire.values import python_reader, text_reader

Rows = list[tuple[Any, ...]]
Printer = Callable[[Any], str]

_LOAD_ROWS: Final = 5_000
_FLOAT4, _FLOAT8 = struct.Struct("!f"), struct.Struct("!d")
_float4_text = text_reader(700, {})
_float8_text = text_reader(701, {})


def database_path(url: str, scheme: str) -> Path:
    """The file of ``scheme:///relative/path`` or ``scheme:////absolute/path``, as SQLAlchemy reads them.

    :raises UsageError: the URL is of another form, names no file, or carries options.
    """
    remedy = f"write {scheme}:////absolute/path or {scheme}:///relative/path"
    prefix = f"{scheme}:///"
    path = url.removeprefix(prefix)
    if not url.startswith(prefix) or not path or path.endswith("/"):
        raise UsageError(f"not the URL of a {scheme} file: {url!r}", remedy=remedy)
    if path == ":memory:" or "?" in path or "\0" in path:
        raise UsageError(f"a follower is a plain file, without options: {url!r}", remedy=remedy)
    return Path(path)


def missing(path: Path) -> ConfigurationError:
    """There is nothing to look at."""
    return ConfigurationError(
        f"there is no file {str(path)!r}", remedy="check the path: a relative one has three slashes"
    )


def decoded(rows: Sequence[tuple[bytes, ...]], columns: Sequence[int], of: RowSet, dialect: str) -> list[list[Any]]:
    """The rows' values as the driver binds them, one list per column."""
    if not rows:
        return [[] for _ in columns]
    types = of.relation.types
    found = []
    for index, values in zip(columns, zip(*rows, strict=True), strict=True):
        read = _reader(of.relation.columns[index], types, chr(of.forms[index]), dialect)
        found.append([None if value == NULL else read(value[4:]) for value in values])
    return found


@lru_cache(maxsize=4096)
def _reader(column: Column, types: tuple[TypeDescription, ...], form: str, dialect: str) -> Callable[[bytes], Any]:
    described = {each.oid: each for each in types}
    read = python_reader(column.type_oid, form, described)
    write = writer(storage(column, described, dialect).kind, dialect)
    return read if write is None else lambda value: write(read(value))


class ForeignFollower(ABC):
    """The part of a :class:`~cdc.ports.Follower` that one SQL text serves for every engine."""

    dialect: ClassVar[str]
    bulk: ClassVar[bool] = False
    checkpoint_table: str
    relation_table: str

    def __init__(self) -> None:
        self._has_state = False

    @abstractmethod
    def run(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        """Execute one statement and return what it returns."""

    @abstractmethod
    def translated(self, subject: str) -> AbstractContextManager[Any]:
        """Errors of the engine come out as those of :mod:`cdc.errors`, ``subject`` in front."""

    @abstractmethod
    def table(self, relation: Relation) -> str:
        """The quoted name of the relation's table here."""

    @abstractmethod
    def columns(self, relation: Relation) -> Mapping[str, str] | None: ...

    @abstractmethod
    def insert(self, rows: RowSet, *, replace: bool = False) -> int: ...

    @abstractmethod
    def prepare_state(self) -> None:
        """Make what must be there before our tables can be created."""

    @abstractmethod
    def prepare_table(self, relation: Relation) -> None:
        """Make what must be there before the relation's table can be created, or refuse its name."""

    @abstractmethod
    def has_state(self) -> bool: ...

    @abstractmethod
    def constant(self, value: Any, declared: str) -> str:
        """A stored value as SQL text."""

    @abstractmethod
    def move(self, old: Relation, relation: Relation) -> None:
        """Give the table of ``old`` the name of ``relation``."""

    # State.

    def read_checkpoint(self, stream: str) -> Checkpoint | None:
        if not self._known():
            return None
        return self._checkpoints(" WHERE stream = ?", [stream]).get(stream)

    def all_checkpoints(self) -> dict[str, Checkpoint]:
        """What was applied, by stream."""
        return self._checkpoints("", []) if self.has_state() else {}

    def _checkpoints(self, where: str, values: list[str]) -> dict[str, Checkpoint]:
        with self.translated("the checkpoint"):
            columns = 'stream, owner, source, timeline, lsn, "offset", image'
            found = self.run(f"SELECT {columns} FROM {self.checkpoint_table}{where}", values)
        return {row[0]: _checkpoint(row[1:]) for row in found if row[2] is not None}

    def claim(self, stream: str) -> int:
        with self.translated(f"claiming {stream}"):
            self._make_state()
            table = self.checkpoint_table
            self.run(f"INSERT INTO {table}(stream, owner) VALUES (?, 0) ON CONFLICT DO NOTHING", [stream])
            self.run(f"UPDATE {table} SET owner = owner + 1 WHERE stream = ?", [stream])
            [(owner,)] = self.run(f"SELECT owner FROM {table} WHERE stream = ?", [stream])
        return int(owner)

    def write_checkpoint(self, stream: str, checkpoint: Checkpoint) -> None:
        at, image = checkpoint.position, checkpoint.image
        progress = None if image is None else json.dumps(progress_json(image), separators=(",", ":"))
        with self.translated("the checkpoint"):
            self._make_state()
            written = self.run(
                f'UPDATE {self.checkpoint_table} SET source = ?, timeline = ?, lsn = ?, "offset" = ?, image = ? '
                "WHERE stream = ? AND owner = ? RETURNING owner",
                [at.source, at.epoch, format_lsn(at.lsn), checkpoint.offset, progress, stream, checkpoint.epoch],
            )
        if not written:
            raise FencedError(f"applier number {checkpoint.epoch} of this follower no longer owns stream {stream!r}")

    def read_relations(self, stream: str) -> Mapping[int, Relation]:
        if not self._known():
            return {}
        with self.translated("the relations"):
            found = self.run(f"SELECT id, description FROM {self.relation_table} WHERE stream = ?", [stream])
        return {int(number): relation_from_json(json.loads(text)) for number, text in found}

    def write_relation(self, stream: str, relation: Relation) -> None:
        text = json.dumps(relation_json(relation), separators=(",", ":"), ensure_ascii=False)
        with self.translated("the relations"):
            self._make_state()
            self.run(
                f"INSERT INTO {self.relation_table}(stream, id, description) VALUES (?, ?, ?) "
                "ON CONFLICT (stream, id) DO UPDATE SET description = excluded.description",
                [stream, relation.id, text],
            )

    def _known(self) -> bool:
        with self.translated("our tables"):
            self._has_state = self._has_state or self.has_state()
        return self._has_state

    def _make_state(self) -> None:
        if self._known():
            return
        self.prepare_state()
        self.run(
            f"CREATE TABLE {self.checkpoint_table}(stream TEXT PRIMARY KEY, owner BIGINT NOT NULL, source TEXT, "
            'timeline BIGINT, lsn TEXT, "offset" BIGINT, image TEXT)'
        )
        self.run(
            f"CREATE TABLE {self.relation_table}(stream TEXT, id BIGINT, description TEXT NOT NULL, "
            "PRIMARY KEY (stream, id))"
        )

    def forget_state(self) -> None:
        """After a rollback our tables may be gone."""
        self._has_state = False

    # Tables.

    def create(self, relation: Relation) -> None:
        if not relation.columns:
            raise SchemaError(
                f"{relation.label} has no columns, which {self.dialect} does not take",
                remedy=f"leave it out of the publication: ALTER PUBLICATION … DROP TABLE {relation.label}",
            )
        with self.translated(f"creating {relation.label}"):
            self.prepare_table(relation)
            self._create(self.table(relation), declarations(relation, self.dialect), key_of(relation))

    def _create(self, table: str, columns: Mapping[str, str], key: Sequence[str]) -> None:
        """No NOT NULL beyond the key: the log does not tell when the leader drops one."""
        parts = [f"{identifier(name)} {declared}" for name, declared in columns.items()]
        if key:
            parts.append(f"PRIMARY KEY ({', '.join(map(identifier, key))})")
        self.run(f"CREATE TABLE {table} ({', '.join(parts)})")

    def is_empty(self, relation: Relation) -> bool:
        with self.translated(relation.label):
            return not self.run(f"SELECT 1 FROM {self.table(relation)} LIMIT 1")

    def truncate(self, relations: Sequence[Relation], *, cascade: bool, restart_identity: bool) -> None:  # noqa: ARG002
        """The log names every table a cascade reached, and there are no sequences here."""
        for relation in relations:
            with self.translated(f"truncating {relation.label}"):
                self.run(f"DELETE FROM {self.table(relation)}")

    def load(self, relation: Relation, body: bytes, form: str, *, replace: bool = False) -> int:
        forms = (b"b" if form == "binary" else b"t") * len(relation.columns)
        columns = tuple(range(len(relation.columns)))
        rows, count = copy.rows(body, form), 0
        while chunk := list(islice(rows, _LOAD_ROWS)):
            count += self.insert(RowSet(relation, forms, columns, chunk), replace=replace)
        return count

    # Schema changes.

    def evolve(self, relation: Relation, change: SchemaChange) -> None:
        with self.translated(f"changing {relation.label}"):
            if isinstance(change, RenameTable):
                self.prepare_table(relation)
                self.move(change.old, relation)
            elif isinstance(change, RenameColumn):
                names = f"{identifier(change.old)} TO {identifier(change.new)}"
                self.run(f"ALTER TABLE {self.table(relation)} RENAME COLUMN {names}")
            elif isinstance(change, AddColumn):
                self._add(relation, change.column)
            elif isinstance(change, DropColumn):
                self._drop(relation, change.name)
            else:
                self._change_type(relation, change)

    def _add(self, relation: Relation, column: Column) -> None:
        table, name, types = self.table(relation), identifier(column.name), types_of(relation)
        declared = storage(column, types, self.dialect).declared
        if column.untold or (column.missing is None and column.not_null) or column.name in key_of(relation):
            if not self.is_empty(relation):
                raise SchemaError(
                    f"the rows of {relation.label} may have values in new column {column.name!r} that the log lacks",
                    remedy=f"ALTER TABLE {table} ADD COLUMN {name} {declared}, fill it from the leader, start again "
                    "with `--schema-changed`; or take a new image with `cdc ship --image new`",
                )
            self._create_anew(relation)
            return
        default = ""
        if column.missing is not None:
            value = _reader(column, relation.types, "t", self.dialect)(column.missing.encode())
            default = f" DEFAULT {self.constant(value, declared)}"
        self.run(f"ALTER TABLE {table} ADD COLUMN {name} {declared}{default}")

    def _create_anew(self, relation: Relation) -> None:
        self.run(f"DROP TABLE {self.table(relation)}")
        self._create(self.table(relation), declarations(relation, self.dialect), key_of(relation))

    def _drop(self, relation: Relation, name: str) -> None:
        if self.drops_in_place(relation, name):
            self.run(f"ALTER TABLE {self.table(relation)} DROP COLUMN {identifier(name)}")
            return
        kept = dict(self._present(relation))
        kept.pop(name, None)
        self.rebuild(relation, relation, kept, {})

    @abstractmethod
    def drops_in_place(self, relation: Relation, name: str) -> bool: ...

    def _change_type(self, relation: Relation, change: ChangeType) -> None:
        old, new, types = change.old, change.new, types_of(relation)
        declared = storage(new, types, self.dialect).declared
        convert = conversion(old, new, types, self.dialect)
        if convert is None and not self.is_empty(relation):
            raise SchemaError(
                f"{relation.label}.{new.name} changed its type and the log does not carry how its values changed",
                remedy="take a new image with `cdc ship --image new`, or convert the column by hand: "
                f"{self.conversion_statement(relation, new.name, declared)}",
            )
        if convert is None:
            self._create_anew(relation)
            return
        same = declared == storage(old, types, self.dialect).declared
        if same and convert == f"CAST({{}} AS {declared})":
            return
        columns = dict(self._present(relation)) | {new.name: declared}
        self.rebuild(relation, relation, columns, {new.name: convert.replace("{}", identifier(new.name))})

    @abstractmethod
    def conversion_statement(self, relation: Relation, name: str, declared: str) -> str: ...

    def _present(self, relation: Relation) -> Mapping[str, str]:
        found = self.columns(relation)
        if found is None:
            raise SchemaError(f"there is no table {self.table(relation)}")
        return found

    def rebuild(
        self, old: Relation, relation: Relation, columns: Mapping[str, str], expressions: Mapping[str, str]
    ) -> None:
        """Copy the table of ``old`` into a new one of other columns, values or name, and drop it.

        For what the engine's ALTER TABLE cannot do. Indexes somebody added are lost.
        """
        interim = Relation(relation.id, relation.schema, "cdc_rebuild", "n", ())
        self._create(self.table(interim), columns, key_of(relation))
        names = ", ".join(map(identifier, columns))
        values = ", ".join(expressions.get(name, identifier(name)) for name in columns)
        self.run(f"INSERT INTO {self.table(interim)}({names}) SELECT {values} FROM {self.table(old)}")
        self.run(f"DROP TABLE {self.table(old)}")
        self.rename(interim, relation)

    @abstractmethod
    def rename(self, old: Relation, relation: Relation) -> None:
        """Rename a table within its schema."""


def _checkpoint(row: Sequence[Any]) -> Checkpoint:
    owner, source, timeline, lsn, offset, image = row
    progress = None if image is None else progress_from_json(json.loads(image))
    return Checkpoint(Position(source, timeline, parse_lsn(lsn)), offset, owner, progress)


def reserved(label: str, ours: str) -> SchemaError:
    """The leader has a table that would stand where we keep our own."""
    return SchemaError(
        f"the leader's table {label} would take the place of {ours} on this follower",
        remedy="rename it on the leader, or leave it out of the publication",
    )


# Eyes.


def printer(kind: Kind) -> Printer:
    """A stored value, not NULL, as PostgreSQL's text."""
    return _PRINTERS.get(kind, str)


def _bool_text(value: Any) -> str:
    return ("f", "t")[value] if value in (0, 1) else str(value)


def _bytes_text(value: Any) -> str:
    return "\\x" + value.hex() if isinstance(value, bytes) else str(value)


def _float4(value: Any) -> str:
    return _float4_text(_FLOAT4.pack(value)) if isinstance(value, float) else _odd(value)


def _float8(value: Any) -> str:
    return _float8_text(_FLOAT8.pack(value)) if isinstance(value, float) else _odd(value)


def _odd(value: Any) -> str:
    """NaN and negative zero, which SQLite keeps as something else than a number."""
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)


_PRINTERS: Final[Mapping[Kind, Printer]] = {
    Kind.BOOL: _bool_text,
    Kind.BYTES: _bytes_text,
    Kind.FLOAT4: _float4,
    Kind.FLOAT8: _float8,
}


def lines_of(
    relation: Relation, printers: Sequence[Printer], rows: Iterator[tuple[Any, ...]]
) -> Iterator[tuple[bytes, bytes]]:
    """(key, line) of each row: see :meth:`cdc.ports.Store.lines`."""
    key = [index for index, column in enumerate(relation.columns) if column.key]
    whole = len(key) in (0, len(relation.columns))
    for row in rows:
        texts = [None if value is None else show(value) for show, value in zip(printers, row, strict=True)]
        line = copy.text_line(texts)
        yield (line if whole else copy.text_line([texts[index] for index in key])), line


def internal(error: Exception, subject: str) -> CdcError:
    """An error nobody foresaw."""
    return CdcError(f"{subject}: {error}")
