"""PostgreSQL as a follower. Values stay in the bytes the leader sent wherever both sides mean the same type by them.

Inserts go in by binary COPY; updates and deletes, and inserts that COPY cannot take, as arrays: one array per column,
``unnest`` back into rows on the server. An array's elements in binary form are the values with their lengths, one
after the other, so that neither way looks into a value.
(https://www.postgresql.org/docs/current/sql-copy.html, ``array_recv`` in ``src/backend/utils/adt/arrayfuncs.c``)
"""

import json
import re
import select
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as replace_in
from typing import ClassVar, Final

from psycopg import pq
from psycopg.errors import error_from_result

from cdc.codec import progress_from_json, progress_json, relation_from_json, relation_json
from cdc.errors import (
    AccessError,
    CdcError,
    ConfigurationError,
    ConflictError,
    FencedError,
    OutcomeUnknownError,
    SchemaError,
    UnavailableError,
)
from cdc.ports import AddColumn, ChangeType, DropColumn, RenameColumn, RenameTable, SchemaChange
from cdc.position import Position, format_lsn, parse_lsn
from cdc.record import NULL, Checkpoint, Column, Relation, RowSet, TypeDescription
from cdc.sql.quote import identifier, literal, qualified
from cdc.sql.sets import changing, waves
from cdc.stores.postgresql.connect import Connection, connect, translate, translated
from cdc.stores.postgresql.describe import FIRST_UNSTABLE_OID
from cdc.wire import copy
from cdc.wire.oids import type_sql
from cdc.wire.values import text_reader

_TEXT_OID: Final = 25
_ARRAY: Final = struct.Struct(">iiIii")
_LENGTH: Final = struct.Struct(">I")
_LOAD_ROWS: Final = 10_000
_UNKNOWN_LABEL: Final = re.compile(r'invalid input value for enum (.+): "(.*)".*', re.DOTALL)
_LABELS: Final = "SELECT enumlabel FROM pg_enum WHERE enumtypid = to_regtype($1)"

# pgoutput is decoded as UTF-8, and constraints between tables were the leader's to check.
_SESSION: Final = "SET session_replication_role = replica"

_STATE: Final = """
CREATE SCHEMA IF NOT EXISTS cdc;
CREATE TABLE IF NOT EXISTS cdc.checkpoint (
    stream text PRIMARY KEY,
    owner bigint NOT NULL,
    source text,
    epoch bigint,
    lsn pg_lsn,
    next_offset bigint,
    image jsonb,
    applied_at timestamptz
);
CREATE TABLE IF NOT EXISTS cdc.relation (
    stream text NOT NULL,
    id bigint NOT NULL,
    body jsonb NOT NULL,
    PRIMARY KEY (stream, id)
)
"""


@dataclass(frozen=True, slots=True)
class _Target:
    """A column here: ``array_oid`` is the array type to send it in, 0 where it must go as text."""

    name: str
    type_oid: int
    sql: str
    array_oid: int


def connect_follower(url: str) -> "PostgresFollower":
    """Connect as an applier.

    :raises AccessError: the role may not set ``session_replication_role``.
    """
    connection = connect(url, application_name="cdc apply")
    try:
        if connection.info.parameter_status("server_encoding") != "UTF8":
            raise ConfigurationError(
                f"the follower's encoding is {connection.info.parameter_status('server_encoding')}, not UTF8",
                remedy="create the follower database with ENCODING 'UTF8' TEMPLATE template0",
            )
        follower = PostgresFollower(connection, url)
        follower.prepare_session()
    except BaseException:
        connection.close()
        raise
    return follower


class PostgresFollower:
    """A :class:`cdc.ports.Follower`."""

    dialect: ClassVar[str] = "postgresql"
    bulk: ClassVar[bool] = True

    def __init__(self, connection: Connection, url: str) -> None:
        self._connection = connection
        self._url = url
        self._wire = connection.pgconn
        self._poll = select.poll()
        self._targets: dict[tuple[str, str], dict[str, _Target]] = {}
        self._prepared: dict[str, bytes] = {}
        self._open = False
        self._claimed = False

    def prepare_session(self) -> None:
        try:
            self._run(_SESSION)
        except AccessError as error:
            user = identifier(self._connection.info.user)
            raise AccessError(
                f"{error}: the applier must not fire the follower's own triggers and foreign keys",
                remedy=f"as a superuser: GRANT SET ON PARAMETER session_replication_role TO {user}",
            ) from error

    def begin(self) -> None:
        self._run("BEGIN")
        self._open = True

    def commit(self) -> None:
        try:
            self._run("COMMIT")
        except UnavailableError as error:
            raise OutcomeUnknownError(f"the follower went away during COMMIT: {error}") from error
        finally:
            self._open = False

    def rollback(self) -> None:
        if self._open:
            self._open = False
            self._targets.clear()
            if self._wire.status == pq.ConnStatus.OK:
                self._run("ROLLBACK")

    def close(self) -> None:
        self._connection.close()

    def savepoint(self) -> None:
        # A second savepoint of the same name would hide the first and keep it.
        self._run("SAVEPOINT cdc_none; RELEASE cdc_none; SAVEPOINT cdc")

    def rollback_to_savepoint(self) -> None:
        self._targets.clear()
        self._run("ROLLBACK TO cdc")

    # State.

    def claim(self, stream: str) -> int:
        self._make_state()
        owner = self._values(
            "INSERT INTO cdc.checkpoint AS c (stream, owner) VALUES ($1, 1)"
            " ON CONFLICT (stream) DO UPDATE SET owner = c.owner + 1 RETURNING owner",
            stream,
        )[0][0]
        return int(owner or 0)

    def _has_state(self) -> bool:
        return self._values("SELECT to_regclass('cdc.relation')")[0][0] is not None

    def _make_state(self) -> None:
        if not self._has_state():
            self._run(_STATE)

    def read_checkpoint(self, stream: str) -> Checkpoint | None:
        if not self._has_state():
            return None
        rows = self._values(
            "SELECT source, epoch, lsn, next_offset, owner, image FROM cdc.checkpoint"
            " WHERE stream = $1 AND lsn IS NOT NULL",
            stream,
        )
        if not rows:
            return None
        source, epoch, lsn, offset, owner, image = rows[0]
        position = Position(str(source), int(epoch or 0), parse_lsn(str(lsn)))
        progress = progress_from_json(json.loads(image)) if image is not None else None
        return Checkpoint(position, int(offset or 0), int(owner or 0), progress)

    def write_checkpoint(self, stream: str, checkpoint: Checkpoint) -> None:
        if not self._claimed:
            self._make_state()
            self._claimed = True
        at = checkpoint.position
        result = self._execute(
            "UPDATE cdc.checkpoint SET source = $3, epoch = $4, lsn = $5, next_offset = $6, image = $7,"
            " applied_at = clock_timestamp() WHERE stream = $1 AND owner = $2",
            _text(stream),
            _text(checkpoint.epoch),
            _text(at.source),
            _text(at.epoch),
            _text(format_lsn(at.lsn)),
            _text(checkpoint.offset),
            _text(json.dumps(progress_json(checkpoint.image))) if checkpoint.image is not None else None,
        )
        if result.command_tuples != 1:
            raise FencedError(f"stream {stream!r} has another applier on this follower")

    def read_relations(self, stream: str) -> Mapping[int, Relation]:
        if not self._has_state():
            return {}
        rows = self._values("SELECT body FROM cdc.relation WHERE stream = $1", stream)
        relations = [relation_from_json(json.loads(body or "")) for (body,) in rows]
        return {relation.id: relation for relation in relations}

    def write_relation(self, stream: str, relation: Relation) -> None:
        self._make_state()
        self._execute(
            "INSERT INTO cdc.relation VALUES ($1, $2, $3) ON CONFLICT (stream, id) DO UPDATE SET body = EXCLUDED.body",
            _text(stream),
            _text(relation.id),
            _text(json.dumps(relation_json(relation))),
        )

    # Tables.

    def columns(self, relation: Relation) -> Mapping[str, str] | None:
        targets = self._look(relation)
        return {name: target.sql for name, target in targets.items()} if targets else None

    def create(self, relation: Relation) -> None:
        types = _types(relation)
        self._run(f"CREATE SCHEMA IF NOT EXISTS {identifier(relation.schema)}")
        for description in relation.types:
            self._create_type(description, types)
        key = relation.primary_key or _identity_key(relation)
        lines = [
            f"{identifier(column.name)} {type_sql(column.type_oid, column.modifier, types)}"
            + (" NOT NULL" if column.not_null or column.name in key else "")
            for column in relation.columns
        ]
        if key:
            lines.append(f"PRIMARY KEY ({', '.join(map(identifier, key))})")
        with _naming(relation):
            self._run(f"CREATE TABLE {_name(relation)} ({', '.join(lines)})")
        self._forget(relation)

    def _create_type(self, description: TypeDescription, types: Mapping[int, TypeDescription]) -> None:
        """Have the type, and what it is made of."""
        name = qualified(description.schema, description.name)
        base = types.get(description.base)
        if base is not None:
            self._create_type(base, types)
        if self._values("SELECT to_regtype($1)", name)[0][0] is not None:
            if description.kind == "enum":
                self._add_labels(name, description.labels)
            return
        self._run(f"CREATE SCHEMA IF NOT EXISTS {identifier(description.schema)}")
        if description.kind == "enum":
            self._run(f"CREATE TYPE {name} AS ENUM ({', '.join(map(literal, description.labels))})")
        elif description.kind == "domain":
            self._run(f"CREATE DOMAIN {name} AS {type_sql(description.base, -1, types)}")
        elif description.kind == "range":
            self._create_range(name, description, types)
        elif description.kind not in {"array", "multirange"}:  # which come with what they are made of
            raise SchemaError(
                f"the follower has no type {name}, and the log does not tell how to make it",
                remedy=f"create {description.kind} type {name} on the follower as it is on the leader",
            )

    def _create_range(self, name: str, description: TypeDescription, types: Mapping[int, TypeDescription]) -> None:
        """The leader's values come in canonical form: the range needs no function of its own for that."""
        many = [each for each in types.values() if each.kind == "multirange" and each.base == description.oid]
        options = [f"SUBTYPE = {type_sql(description.base, -1, types)}"]
        options += [f"MULTIRANGE_TYPE_NAME = {qualified(each.schema, each.name)}" for each in many]
        self._run(f"CREATE TYPE {name} AS RANGE ({', '.join(options)})")

    def _add_labels(self, name: str, labels: Sequence[str]) -> None:
        """Labels that the leader has and we lack, in the leader's order."""
        there = {label for (label,) in self._values(_LABELS, name)}
        for index, label in enumerate(labels):
            if label in there:
                continue
            place = f" AFTER {literal(labels[index - 1])}" if index else ""
            place = place or next((f" BEFORE {literal(other)}" for other in labels if other in there), "")
            self._run_apart(name, f"ALTER TYPE {name} ADD VALUE {literal(label)}{place}")
            there.add(label)

    def _run_apart(self, name: str, statement: str) -> None:
        """Run what a transaction cannot both do and use in a session of its own, unless the type itself is new here.

        https://www.postgresql.org/docs/current/sql-altertype.html, "Notes"
        """
        with connect(self._url, application_name="cdc apply") as apart, translated():
            row = apart.execute("SELECT to_regtype(%s) IS NOT NULL", [name]).fetchone()
            if row is not None and row[0]:
                apart.execute(statement.encode())
                return
        self._run(statement)

    def evolve(self, relation: Relation, change: SchemaChange) -> None:
        if isinstance(change, RenameTable):
            self._rename(change.old, relation)
        elif isinstance(change, AddColumn):
            self._add(relation, change.column)
        elif isinstance(change, DropColumn):
            self._alter(relation, f"DROP COLUMN IF EXISTS {identifier(change.name)}")
        elif isinstance(change, RenameColumn):
            self._alter(relation, f"RENAME COLUMN {identifier(change.old)} TO {identifier(change.new)}")
        else:
            self._change_type(relation, change)

    def _rename(self, old: Relation, new: Relation) -> None:
        if old.schema != new.schema:
            self._run(f"CREATE SCHEMA IF NOT EXISTS {identifier(new.schema)}")
            self._run(f"ALTER TABLE {_name(old)} SET SCHEMA {identifier(new.schema)}")
        if old.name != new.name:
            self._run(f"ALTER TABLE {qualified(new.schema, old.name)} RENAME TO {identifier(new.name)}")
        self._forget(old)
        self._forget(new)

    def _add(self, relation: Relation, column: Column) -> None:
        types = _types(relation)
        sql = type_sql(column.type_oid, column.modifier, types)
        name = identifier(column.name)
        if column.name in self._look(relation):
            return
        if (column.untold or (column.not_null and column.missing is None)) and not self.is_empty(relation):
            raise SchemaError(
                f"the rows of {relation.label} may have values in new column {column.name!r} that the log lacks",
                remedy=f"ALTER TABLE {_name(relation)} ADD COLUMN {name} {sql}, fill it from the leader, start again "
                "with `--schema-changed`; or take a new image with `cdc ship --image new`",
            )
        for description in relation.types:
            self._create_type(description, types)
        default = f" DEFAULT {literal(column.missing)}" if column.missing is not None else ""
        not_null = " NOT NULL" if column.not_null else ""
        self._alter(relation, f"ADD COLUMN {name} {sql}{default}{not_null}")
        if default:
            self._alter(relation, f"ALTER COLUMN {name} DROP DEFAULT")

    def _change_type(self, relation: Relation, change: ChangeType) -> None:
        types = _types(relation)
        target = self._look(relation).get(change.new.name)
        if target is None or not self._is(target, change.old, types):
            return  # the follower has a type of its own choice there
        for description in relation.types:
            self._create_type(description, types)
        name = identifier(change.new.name)
        sql = type_sql(change.new.type_oid, change.new.modifier, types)
        if self._is(target, change.new, types):
            return  # no other type: one with more labels
        empty = f" USING NULL::{sql}" if self.is_empty(relation) else ""  # there is nothing to convert
        try:
            self._alter(relation, f"ALTER COLUMN {name} TYPE {sql}{empty}")
        except CdcError as error:
            raise SchemaError(
                f"column {relation.label}.{change.new.name} became {sql}, which does not follow: {error}",
                remedy=f"as on the leader: ALTER TABLE {_name(relation)} ALTER COLUMN {name} TYPE {sql} USING …",
            ) from error

    def _is(self, target: _Target, column: Column, types: Mapping[int, TypeDescription]) -> bool:
        """Is our column of the leader's type? Of one that the leader no longer describes we do not know otherwise."""
        if column.type_oid >= FIRST_UNSTABLE_OID:
            if column.type_oid not in types:
                return True
            sql = type_sql(column.type_oid, -1, types)
            return self._values("SELECT to_regtype($1)::oid", sql)[0][0] == str(target.type_oid)
        return target.sql == type_sql(column.type_oid, column.modifier, types)

    def _alter(self, relation: Relation, action: str) -> None:
        self._run(f"ALTER TABLE {_name(relation)} {action}")
        self._forget(relation)

    def is_empty(self, relation: Relation) -> bool:
        return self._values(f"SELECT NOT EXISTS (SELECT FROM {_name(relation)})")[0][0] == "t"

    def truncate(self, relations: Sequence[Relation], *, cascade: bool, restart_identity: bool) -> None:  # noqa: ARG002
        """Like PostgreSQL's own apply, never cascades to tables that the leader did not name."""
        names = ", ".join(map(_name, relations))
        self._run(f"TRUNCATE {names}{' RESTART IDENTITY' if restart_identity else ''}")

    # Rows.

    def insert(self, rows: RowSet, *, replace: bool = False) -> int:
        if not rows.rows:
            return 0
        targets = self._resolve(rows, rows.columns)
        with _naming(rows.relation):
            if not replace and all(target.array_oid for target in targets) and b"t" not in rows.forms:
                head = len(rows.columns).to_bytes(2)
                body = b"".join([copy.HEADER, *[head + b"".join(row) for row in rows.rows], copy.TRAILER])
                return self._copy(rows.relation, [target.name for target in targets], body, "binary")
            return self._insert(rows, targets, replace=replace)

    def _insert(self, rows: RowSet, targets: Sequence[_Target], *, replace: bool) -> int:
        names = ", ".join(identifier(target.name) for target in targets)
        values = ", ".join(f"u.c{i}::{target.sql}" for i, target in enumerate(targets))
        query = (
            f"INSERT INTO {_name(rows.relation)} ({names}) OVERRIDING SYSTEM VALUE"
            f" SELECT {values} FROM {_unnest(targets)} {_on_conflict(rows.relation, targets) if replace else ''}"
        )
        key = rows.relation.primary_key or _identity_key(rows.relation)
        places = [place for place, target in enumerate(targets) if target.name in key]
        parts = (
            waves([tuple(row[place] for place in places) for row in rows.rows]) if replace and places else [slice(None)]
        )
        count = 0
        for part in parts:
            count += (
                self._execute(query, *self._arrays(rows, rows.columns, rows.rows[part], targets)).command_tuples or 0
            )
        return count

    def update(self, rows: RowSet) -> int:
        if not rows.matches:
            return 0
        columns, values = changing(rows)
        moved = any(index in rows.match for index in columns) and values is not rows.matches
        rows = replace_in(rows, columns=columns, rows=values)
        targets = self._resolve(rows, columns)
        found = self._resolve(rows, rows.match)
        setting = ", ".join(f"{identifier(target.name)} = u.c{i}::{target.sql}" for i, target in enumerate(targets))
        where = _matching(found, len(targets)) if rows.unique else self._one(rows, found, len(targets))
        query = f"UPDATE {_name(rows.relation)} t SET {setting} FROM {_unnest([*targets, *found])} WHERE {where}"
        # A row that gets another key may be what a later change looks for.
        parts = _each(len(rows.matches)) if moved or not rows.unique else waves(rows.matches)
        with _naming(rows.relation):
            return self._in_parts(rows, query, targets, found, parts)

    def delete(self, rows: RowSet) -> int:
        if not rows.matches:
            return 0
        found = self._resolve(rows, rows.match)
        where = _matching(found, 0) if rows.unique else self._one(rows, found, 0)
        query = f"DELETE FROM {_name(rows.relation)} t USING {_unnest(found)} WHERE {where}"
        parts = [slice(None)] if rows.unique else _each(len(rows.matches))
        with _naming(rows.relation):
            return self._in_parts(rows, query, [], found, parts)

    def load(self, relation: Relation, body: bytes, form: str, *, replace: bool = False) -> int:
        rows = RowSet(relation, (b"b" if form == "binary" else b"t") * len(relation.columns))
        rows.columns = tuple(range(len(relation.columns)))
        targets = self._resolve(rows, rows.columns)
        if not replace and (form == "text" or all(target.array_oid for target in targets)):
            return self._copy(relation, [target.name for target in targets], body, form)
        count = 0
        for row in copy.rows(body, form):
            rows.rows.append(row)
            if len(rows.rows) == _LOAD_ROWS:
                count += self.insert(rows, replace=replace)
                rows.rows.clear()
        return count + (self.insert(rows, replace=replace) if rows.rows else 0)

    def _one(self, rows: RowSet, found: Sequence[_Target], at: int) -> str:
        """One of possibly several rows equal to the one sought, in whatever partition it lies."""
        equal = " AND ".join(
            f"o.{identifier(target.name)}::text IS NOT DISTINCT FROM u.c{at + i}::{target.sql}::text"
            for i, target in enumerate(found)
        )
        return f"(t.tableoid, t.ctid) = (SELECT o.tableoid, o.ctid FROM {_name(rows.relation)} o WHERE {equal} LIMIT 1)"

    def _in_parts(
        self, rows: RowSet, query: str, targets: Sequence[_Target], found: Sequence[_Target], parts: Iterable[slice]
    ) -> int:
        """One statement for each part: an earlier one may change what a later one finds."""
        count = 0
        for part in parts:
            arrays = self._arrays(rows, rows.columns, rows.rows[part], targets) if targets else []
            arrays += self._arrays(rows, rows.match, rows.matches[part], found) if found else []
            count += self._execute(query, *arrays).command_tuples or 0
        return count

    # How a relation's columns stand here.

    def _look(self, relation: Relation) -> dict[str, _Target]:
        key = (relation.schema, relation.name)
        if key not in self._targets:
            rows = self._values(
                "SELECT a.attname, a.atttypid, format_type(a.atttypid, a.atttypmod), t.typarray"
                " FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid"
                " JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace s ON s.oid = c.relnamespace"
                " WHERE s.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')"
                " AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
                relation.schema,
                relation.name,
            )
            self._targets[key] = {
                str(name): _Target(str(name), int(oid or 0), str(sql), int(array or 0))
                for name, oid, sql, array in rows
            }
        return self._targets[key]

    def _forget(self, relation: Relation) -> None:
        self._targets.pop((relation.schema, relation.name), None)

    def _resolve(self, rows: RowSet, columns: Iterable[int]) -> list[_Target]:
        """The columns here for those of the leader, going as text where the two types are not the very same."""
        there = self._look(rows.relation)
        found = []
        for index in columns:
            column = rows.relation.columns[index]
            target = there.get(column.name)
            if target is None:
                raise SchemaError(
                    f"the follower's table {rows.relation.label} has no column {column.name!r}",
                    remedy=f"ALTER TABLE {_name(rows.relation)} ADD COLUMN {identifier(column.name)} "
                    f"{type_sql(column.type_oid, column.modifier, _types(rows.relation))}",
                )
            same = target.type_oid == column.type_oid < FIRST_UNSTABLE_OID and rows.forms[index] == ord("b")
            found.append(target if same else _Target(target.name, target.type_oid, target.sql, 0))
        return found

    def _arrays(
        self, rows: RowSet, columns: Sequence[int], values: Sequence[tuple[bytes, ...]], targets: Sequence[_Target]
    ) -> list[bytes | None]:
        """One binary array per column."""
        found: list[bytes | None] = []
        for index, target, column in zip(columns, targets, zip(*values, strict=True), strict=True):
            if target.array_oid:
                found.append(_array(target.type_oid, column))
            elif rows.forms[index] == ord("t"):
                found.append(_array(_TEXT_OID, column))
            else:
                read = text_reader(rows.relation.columns[index].type_oid, _types(rows.relation))
                found.append(_array(_TEXT_OID, [_as_text(read, value) for value in column]))
        return found

    # The wire.

    def _copy(self, relation: Relation, names: Sequence[str], body: bytes, form: str) -> int:
        columns = ", ".join(map(identifier, names))
        self._run(f"COPY {_name(relation)} ({columns}) FROM STDIN (FORMAT {form})")
        with translated():
            self._wire.put_copy_data(body)
            self._wire.put_copy_end()
            result = self._answer()
        return self._check(result).command_tuples or 0

    def _run(self, query: str) -> None:
        with translated():
            self._wire.send_query(query.encode())
            result = self._answer()
        self._check(result)

    def _execute(self, query: str, *values: bytes | None) -> "pq.abc.PGresult":
        """Run a statement that will come again; values are binary arrays, or text where the query takes text."""
        name = self._prepared.get(query)
        with translated():
            if name is None:
                name = f"cdc{len(self._prepared)}".encode()
                self._check(self._wire.prepare(name, query.encode()))
                self._prepared[query] = name
            formats = [1 if value is not None and "unnest(" in query else 0 for value in values]
            self._wire.send_query_prepared(name, values, formats)  # None is NULL
            result = self._answer()
        return self._check(result)

    def _answer(self) -> "pq.abc.PGresult | None":
        """Send what was queued, and wait for the answer here: libpq would hold the interpreter's lock meanwhile."""
        wire, poll = self._wire, self._poll
        poll.register(wire.socket, select.POLLIN | select.POLLOUT)
        while wire.flush():
            if any(event & select.POLLIN for _, event in poll.poll()):
                wire.consume_input()
        poll.register(wire.socket, select.POLLIN)
        answer = None
        while True:
            while wire.is_busy():
                poll.poll()
                wire.consume_input()
            result = wire.get_result()
            if result is None:
                return answer
            if answer is None or answer.status != pq.ExecStatus.FATAL_ERROR:
                answer = result
            # The server waits for rows; or the connection is lost, which would be told again and again.
            if result.status == pq.ExecStatus.COPY_IN or wire.status != pq.ConnStatus.OK:
                return answer

    def _values(self, query: str, *values: str) -> list[tuple[str | None, ...]]:
        with translated():
            result = self._wire.exec_params(query.encode(), [value.encode() for value in values])
        self._check(result)
        return [
            tuple(_decoded(result.get_value(row, column)) for column in range(result.nfields))
            for row in range(result.ntuples)
        ]

    def _check(self, result: "pq.abc.PGresult | None") -> "pq.abc.PGresult":
        if result is None or self._wire.status != pq.ConnStatus.OK:
            raise UnavailableError(
                f"the follower went away: {self._wire.error_message.decode(errors='replace').strip()}"
            )
        if result.status in {pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.BAD_RESPONSE}:
            raise _explained(translate(error_from_result(result)))
        return result


def _explained(error: CdcError) -> CdcError:
    """The log does not tell of labels an enum got, unless its table's description comes anew."""
    match = _UNKNOWN_LABEL.fullmatch(str(error))
    if match is not None:
        error.remedy = f"ALTER TYPE {match[1]} ADD VALUE {literal(match[2])}"
    return error


@contextmanager
def _naming(relation: Relation) -> Iterator[None]:
    """A conflict names the table it is in."""
    try:
        yield
    except ConflictError as error:
        raise type(error)(f"{relation.label}: {error}", remedy=error.remedy) from error


def _each(count: int) -> Iterator[slice]:
    return (slice(index, index + 1) for index in range(count))


def _name(relation: Relation) -> str:
    return qualified(relation.schema, relation.name)


def _types(relation: Relation) -> Mapping[int, TypeDescription]:
    return {description.oid: description for description in relation.types}


def _identity_key(relation: Relation) -> tuple[str, ...]:
    if relation.identity not in {"d", "i"}:
        return ()
    return tuple(column.name for column in relation.columns if column.key)


def _unnest(targets: Sequence[_Target]) -> str:
    parameters = ", ".join(
        f"${i}::{target.sql}[]" if target.array_oid else f"${i}::text[]" for i, target in enumerate(targets, 1)
    )
    return f"unnest({parameters}) u({', '.join(f'c{i}' for i in range(len(targets)))})"


def _matching(found: Sequence[_Target], at: int) -> str:
    return " AND ".join(f"t.{identifier(target.name)} = u.c{at + i}::{target.sql}" for i, target in enumerate(found))


def _on_conflict(relation: Relation, targets: Sequence[_Target]) -> str:
    key = relation.primary_key or _identity_key(relation)
    if not key:
        return ""
    others = [identifier(target.name) for target in targets if target.name not in key]
    # Where all columns are key, one is set to itself: the row then counts as changed.
    setting = ", ".join(f"{name} = EXCLUDED.{name}" for name in others or map(identifier, key[:1]))
    return f"ON CONFLICT ({', '.join(map(identifier, key))}) DO UPDATE SET {setting}"


def _array(element_oid: int, values: Sequence[bytes]) -> bytes:
    return _ARRAY.pack(1, int(NULL in values), element_oid, len(values), 1) + b"".join(values)


def _as_text(read: Callable[[bytes], str], value: bytes) -> bytes:
    if value == NULL:
        return NULL
    text = read(value[4:]).encode()
    return _LENGTH.pack(len(text)) + text


def _text(value: str | int) -> bytes:
    return str(value).encode()


def _decoded(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
