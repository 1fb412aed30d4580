"""The trigger log on a leader: what is captured, how it is set up, and whether it is still as it was set up.

The SQL stands in :mod:`cdc.sql.capture`. Setup needs CREATE on the database and TRIGGER on the tables; with CREATEROLE
(or as superuser) the functions belong to a role of their own that nobody can log in as, else to whoever runs it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, LiteralString, NamedTuple

from cdc.codec import relation_from_json, relation_json
from cdc.errors import AccessError, CdcError, ConfigurationError
from cdc.position import Position
from cdc.record import Column, Relation
from cdc.sql import capture as sql
from cdc.sql.quote import identifier, literal, qualified
from cdc.stores.postgresql.connect import Connection, fetch
from cdc.stores.postgresql.describe import describe_tables
from cdc.stores.postgresql.setup import TABLES, Names, Step, scope
from cdc.wire.oids import TEXT
from cdc.wire.record import Layout


class Shape(NamedTuple):
    """What of a table is captured. ``columns`` None is all of them; ``masks`` are "hash", "null" or "drop"."""

    columns: tuple[str, ...] | None
    masks: Mapping[str, str]
    condition: str


class Shaping(NamedTuple):
    """What is asked for of the tables, each by ``schema.table``.

    Under "" stands what names no table: columns and a condition for the only one there is, a mask for every table that
    has such a column.
    """

    columns: Mapping[str, tuple[str, ...]] = {}
    masks: Mapping[tuple[str, str], str] = {}
    conditions: Mapping[str, str] = {}

    def of(self, label: str, columns: Sequence[str]) -> Shape:
        masks = {name: mask for (table, name), mask in self.masks.items() if not table and name in columns}
        masks |= {name: mask for (table, name), mask in self.masks.items() if table == label}
        wanted = self.columns.get(label, self.columns.get(""))
        return Shape(wanted, masks, self.conditions.get(label, self.conditions.get("", "")))

    def check(self, tables: Mapping[str, Sequence[str]]) -> None:
        """``tables``: the columns of each that is captured.

        :raises ConfigurationError: something is asked for of nobody, or of whom is not said.
        """
        for label in (*self.columns, *self.conditions, *(table for table, _ in self.masks)):
            if label and label not in tables:
                raise ConfigurationError(
                    f"{label!r} is given a shape and is not among the tables that are captured",
                    remedy="write schema.table as the catalog has it, and name it among --tables",
                )
        if len(tables) != 1 and ("" in self.columns or "" in self.conditions):
            raise ConfigurationError(
                f"--columns or --where names no table, and {len(tables)} are captured",
                remedy="write --columns 'schema.table(column, …)' and --where 'schema.table: condition'",
            )
        for table, name in self.masks:
            if not table and not any(name in columns for columns in tables.values()):
                raise ConfigurationError(f"no captured table has a column {name!r}", remedy="mend --mask")


@dataclass(frozen=True, slots=True)
class Captured:
    """A table, or a partition of one, whose changes are captured: ``relation`` is the table as followers see it.

    ``layout``: what its records hold; ``highest``: the highest attribute number it ever gave, which tells of columns
    that came and went. ``select`` and ``condition`` take the same from the table itself.
    """

    origin: int
    relation: Relation
    layout: Layout
    highest: int
    plain: bool
    select: tuple[str, ...] = field(default=(), compare=False)
    condition: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "relation": relation_json(self.relation),
            "types": list(self.layout.type_oids),
            "places": list(self.layout.places),
            "highest": self.highest,
            "plain": self.plain,
        }

    @property
    def numbers(self) -> tuple[int | None, ...]:
        """The attribute numbers behind the columns, by which two descriptions are told apart that look alike."""
        return tuple(column.number for column in self.relation.columns)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Captured":
        relation = relation_from_json(value["relation"])
        layout = Layout(tuple(map(int, value["types"])), tuple(map(int, value["places"])))
        return cls(int(value["origin"]), relation, layout, int(value["highest"]), bool(value["plain"]))


def schema_of(slot: str) -> str:
    """The schema of a stream's trigger log: named so that nobody takes it for data (:func:`describe.is_ours`)."""
    return slot if slot.startswith("cdc_") else f"cdc_{slot}"[:63]


def wake_of(schema: str) -> int:
    """The advisory lock that a sleeping shipper holds, so that writers know to wake it."""
    return int.from_bytes(hashlib.sha256(schema.encode()).digest()[:8], signed=True)


EVERYTHING: Final = Shaping()

# Setting up ----------------------------------------------------------------------------------------------------------


def plan_setup(
    connection: Connection,
    names: Names,
    *,
    tables: Sequence[str] = (),
    schemas: Sequence[str] = (),
    shaping: Shaping = EVERYTHING,
    reader: str | None = None,
) -> list[Step]:
    """What makes the leader capture these tables, by default all there are, in the shape asked for.

    Tables that are captured already stay so. Where what is captured changes, the stream needs a new image: its ticks
    are taken away, and a shipper says so. ``reader`` is the role that ships, where that is another one.

    :raises ConfigurationError: a table cannot be captured, or not in that shape.
    :raises AccessError: the role may not do it.
    """
    schema = schema_of(names.slot)
    if _one(connection, "SELECT pg_is_in_recovery() AS yes").yes:
        raise ConfigurationError("the server is a standby, which has no triggers", remedy="run setup on its primary")
    owner, role_step = _owner(connection, schema)
    there = is_there(connection, schema)
    wanted = _wanted(connection, scope(connection, tables, schemas, EVERY_TABLE), schema, shaping)
    return [
        *role_step,
        Step(f"schema {schema}", sql.create_schema(schema, owner, wake_of(schema)), done=there),
        *_table_steps(connection, schema, owner, wanted, there=there),
        *_reader_steps(connection, schema, reader, wanted),
    ]


def plan_teardown(connection: Connection, names: Names) -> list[Step]:
    """What takes the triggers, the schema and its role away again."""
    schema = schema_of(names.slot)
    owner = _owner_name(schema)
    there = is_there(connection, schema)
    granted = fetch(connection, f"SELECT revoke FROM {identifier(schema)}.granted ORDER BY revoke") if there else []
    has_role = _one(connection, _HAS_ROLE, owner).yes
    return [
        *(Step("what a role was granted to ship", row.revoke, done=False) for row in granted),
        # The triggers depend on its functions, and go along.
        Step(f"schema {schema}", sql.drop_schema(schema), done=not there, locks=True),
        Step(f"role {owner}", f"DROP ROLE IF EXISTS {identifier(owner)}", done=not has_role),
    ]


_HAS_ROLE: Final[LiteralString] = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = %s) AS yes"

EVERY_TABLE: Final[LiteralString] = TABLES.replace("c.relpersistence = 'p'", "c.relpersistence <> 't'")
"""Unlogged ones too: triggers do not look at the WAL."""


def _one(connection: Connection, query: LiteralString, *values: Any) -> Any:
    return fetch(connection, query, values or None)[0]


class _Wanted(NamedTuple):
    """A table to be captured: what it and its partitions are given."""

    id: int
    label: str
    origins: tuple[sql.Table, ...]
    columns: tuple[str, ...] | None
    masks: tuple[str, ...] | None
    condition: str


def _owner_name(schema: str) -> str:
    return f"{schema[:57]}_owner"


def _owner(connection: Connection, schema: str) -> tuple[str, list[Step]]:
    """Whose the functions are, or will be."""
    row = _one(
        connection,
        "SELECT current_user::text AS me, rolsuper OR rolcreaterole AS may_create,"
        " has_database_privilege(current_database(), 'CREATE') AS may_place,"
        " (SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = %s) AS owner"
        " FROM pg_roles WHERE rolname = current_user",
        schema,
    )
    if row.owner is not None:
        return row.owner, []
    if not row.may_place:
        raise AccessError(
            f"role {row.me!r} may not make schema {schema!r}",
            remedy=f"GRANT CREATE ON DATABASE {identifier(connection.info.dbname)} TO {identifier(row.me)}",
        )
    if not row.may_create:
        return row.me, []
    name = _owner_name(schema)
    create = "" if _one(connection, _HAS_ROLE, name).yes else f"CREATE ROLE {identifier(name)} NOLOGIN; "
    return name, [Step(f"role {name}", f"{create}GRANT {identifier(name)} TO CURRENT_USER", done=False)]


def is_there(connection: Connection, schema: str) -> bool:
    """Is the schema there?

    :raises ConfigurationError: there is such a schema, and it is not ours.
    """
    row = _one(
        connection,
        "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = %s) AS exists, to_regclass(%s) IS NOT NULL AS ours",
        schema,
        qualified(schema, "captured"),
    )
    if row.exists and not row.ours:
        raise ConfigurationError(f"schema {schema!r} is there and not ours", remedy="name another one with --slot")
    return bool(row.exists)


_ROOTS: Final[LiteralString] = """
    WITH RECURSIVE acting AS (
        SELECT confrelid AS above, conrelid AS below FROM pg_constraint
        WHERE contype = 'f' AND (confdeltype IN ('c', 'n', 'd') OR confupdtype IN ('c', 'n', 'd'))
    ), reached AS (
        SELECT above AS root, below AS id FROM acting
        UNION SELECT r.root, a.below FROM reached r JOIN acting a ON a.above = r.id
    )
    SELECT c.oid::int8 AS id, s.nspname AS schema, c.relname AS name, c.relkind = 'p' AS partitioned,
           c.relispartition AS is_partition,
           c.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid) AS inherited,
           ARRAY(SELECT t.relid::oid::int8 FROM pg_partition_tree(c.oid) t JOIN pg_class p ON p.oid = t.relid
                 WHERE p.relkind IN ('r', 'p') ORDER BY t.level, t.relid::oid) AS partitions,
           EXISTS (SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                   WHERE (t.tgrelid = c.oid OR t.tgrelid IN (SELECT relid FROM pg_partition_tree(c.oid)))
                     AND NOT t.tgisinternal AND p.pronamespace IS DISTINCT FROM to_regnamespace(%(schema)s)::oid)
               AS triggered,
           EXISTS (SELECT FROM reached WHERE root = c.oid AND id = c.oid) AS looping,
           ARRAY(SELECT a.attname::text FROM (
                   SELECT x.indkey::int2[] AS numbers, x.indnkeyatts AS count FROM pg_index x
                   JOIN pg_class i ON i.oid = x.indexrelid
                   WHERE x.indrelid = c.oid AND x.indisunique AND x.indisvalid AND x.indimmediate
                     AND x.indpred IS NULL AND x.indexprs IS NULL
                     AND NOT EXISTS (SELECT FROM pg_attribute n WHERE n.attrelid = c.oid AND NOT n.attnotnull
                                     AND n.attnum = ANY ((x.indkey::int2[])[0:x.indnkeyatts - 1]))
                   ORDER BY x.indisprimary DESC, x.indnkeyatts, i.relname LIMIT 1
                 ) k CROSS JOIN LATERAL unnest(k.numbers[0:k.count - 1]) WITH ORDINALITY u(number, place)
                 JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = u.number ORDER BY u.place) AS key,
           ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0
                 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum) AS columns,
           ARRAY(SELECT a.attname::text FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                 WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND t.typsend = 0) AS unsendable,
           has_table_privilege(c.oid, 'TRIGGER') AS allowed, has_table_privilege(c.oid, 'SELECT') AS readable
    FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE c.oid = ANY (%(ids)s::oid[]) ORDER BY s.nspname, c.relname
"""


def _wanted(connection: Connection, asked: Sequence[Any], schema: str, shaping: Shaping) -> list[_Wanted]:
    ids = [row.id for row in asked if row.schema != schema and not (row.is_partition and not _is_alone(row, asked))]
    roots = [row for row in fetch(connection, _ROOTS, {"ids": ids, "schema": identifier(schema)}) if not _ours(row)]
    shaping.check({f"{row.schema}.{row.name}": row.columns for row in roots})
    return [_checked(connection, row, schema, shaping.of(f"{row.schema}.{row.name}", row.columns)) for row in roots]


def _is_alone(row: Any, asked: Sequence[Any]) -> bool:
    """A partition that was named without any partitioned table: refused further down, not left out."""
    return row.kind == "r" and not any(other.kind == "p" for other in asked)


def _ours(row: Any) -> bool:
    return str(row.schema) == "cdc" or str(row.schema).startswith("cdc_")


def _checked(connection: Connection, row: Any, schema: str, shape: Shape) -> _Wanted:
    """The table as it is to be captured.

    :raises ConfigurationError: it cannot be, or not in that shape.
    :raises AccessError: the role may not make triggers on it.
    """
    label = f"{row.schema}.{row.name}"
    if row.is_partition:
        raise ConfigurationError(f"{label} is a partition", remedy="name the partitioned table")
    if row.inherited:
        raise ConfigurationError(
            f"{label} has children that inherit from it: a statement on it tells their rows as its own",
            remedy="leave it out with --tables, or make it a partitioned table",
        )
    if not row.allowed:
        raise AccessError(
            f"no privilege to make triggers on {label}", remedy=f"GRANT TRIGGER ON {qualified(row.schema, row.name)}"
        )
    columns, masks = _columns(label, row, shape)
    if shape.condition:
        _try_condition(connection, row, label, shape.condition)
    expressions = None
    if columns is not None and masks is not None:
        expressions = tuple(sql.masked(schema, column, mask) for column, mask in zip(columns, masks, strict=True))
    plain = expressions is None and not shape.condition and not (row.partitioned or row.triggered or row.looping)
    names = {each.id: each for each in fetch(connection, _NAMES, [row.partitions or [row.id]])}
    origins = tuple(
        sql.Table(
            id_,
            row.id,
            names[id_].schema,
            names[id_].name,
            tuple(row.key) if plain else (),
            expressions,
            shape.condition,
            (row.triggered or row.looping) and id_ == row.id,
            row.looping,
        )
        for id_ in row.partitions or [row.id]
    )
    return _Wanted(row.id, label, origins, columns, masks, shape.condition)


def _try_condition(connection: Connection, row: Any, label: str, condition: str) -> None:
    """
    :raises ConfigurationError: it is none for that table.
    """
    if not row.readable:
        return
    query = f"SELECT FROM {qualified(row.schema, row.name)} n WHERE {sql.parenthesized(condition)} LIMIT 0"
    try:
        fetch(connection, query)
    except CdcError as error:
        raise ConfigurationError(f"not a condition for {label}: {error}", remedy="mend --where") from error


_NAMES: Final[LiteralString] = """
    SELECT c.oid::int8 AS id, s.nspname AS schema, c.relname AS name
    FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace WHERE c.oid = ANY (%s::oid[])
"""


def _columns(label: str, row: Any, shape: Shape) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The columns that are captured and how each is masked; None where rows are captured as they are."""
    for name in (*(shape.columns or ()), *shape.masks):
        if name not in row.columns:
            raise ConfigurationError(f"{label} has no column {name!r}", remedy="mend --columns or --mask")
    dropped = {name for name, mask in shape.masks.items() if mask == "drop"}
    kept = tuple(name for name in row.columns if name not in dropped and name in (shape.columns or row.columns))
    for name in row.key:
        if name not in kept or shape.masks.get(name) == "null":
            raise ConfigurationError(
                f"{label}.{name} is part of the key, without which no row is found", remedy="keep it, or hash it"
            )
    if not kept:
        raise ConfigurationError(f"nothing of {label} is left to capture", remedy="mend --columns or --mask")
    if opaque := [name for name in row.unsendable if name in kept]:
        raise ConfigurationError(
            f"{label}.{opaque[0]} is of a type without a binary form", remedy=f"--mask {label}.{opaque[0]}=drop"
        )
    if shape.columns is None and not shape.masks:
        return None, None
    return kept, tuple(shape.masks.get(name, "") for name in kept)


def _table_steps(
    connection: Connection, schema: str, owner: str, wanted: Iterable[_Wanted], *, there: bool
) -> list[Step]:
    s = identifier(schema)
    before = {row.relation: row for row in fetch_captured(connection, schema)} if there else {}
    damaged = {fault.relation for fault in faults(connection, schema)} if there else set()
    gone = [id_ for id_, row in before.items() if row.name is None]
    steps = [
        Step(f"table {id_}, which is gone", f"DELETE FROM {s}.captured WHERE relation = {id_}", done=False)
        for id_ in gone
    ]
    anew = f"; DELETE FROM {s}.tick; DELETE FROM {s}.shape"
    for table in wanted:
        known = before.get(table.id)
        same = known is not None and table.id not in damaged and _is_same(known, table)
        made = [sql.create_triggers(schema, owner, wake_of(schema), origin) for origin in table.origins]
        text = "; ".join([*made, _remember(schema, table)]) + (anew if there else "")
        steps.append(Step(f"triggers of {table.label}", text, done=same, locks=True))
    return steps


def _is_same(known: Any, table: _Wanted) -> bool:
    first = table.origins[0]
    return (
        set(known.origins) == {origin.id for origin in table.origins}
        and (known.plain, known.condition) == (bool(first.key), table.condition)
        and (known.columns, known.masks)
        == (None if table.columns is None else [*table.columns], None if table.masks is None else [*table.masks])
    )


def _remember(schema: str, table: _Wanted) -> str:
    """The statement that notes what is captured, and how its triggers are now."""
    s, first = identifier(schema), table.origins[0]
    origins = f"ARRAY[{', '.join(str(origin.id) for origin in table.origins)}]::int8[]"
    triggers = _TRIGGERS.format(schema=literal(s), origins=origins)
    return (
        f"INSERT INTO {s}.captured SELECT {table.id}, {origins}, {str(bool(first.key)).lower()},"
        f" {_texts(table.columns)}, {_texts(table.masks)}, {literal(table.condition)},"
        f" ({triggers}) ON CONFLICT (relation) DO UPDATE SET origins = excluded.origins, plain = excluded.plain,"
        " columns = excluded.columns, masks = excluded.masks,"
        " condition = excluded.condition, triggers = excluded.triggers"
    )


# A trigger that was disabled for a while has another row version than before.
_TRIGGERS: Final[LiteralString] = """
    SELECT coalesce(string_agg(concat_ws(' ', g.oid, g.xmin, g.tgenabled), ',' ORDER BY g.oid), '')
    FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
    WHERE p.pronamespace = to_regnamespace({schema}) AND g.tgrelid = ANY ({origins}::oid[])
"""


def _texts(values: Sequence[str] | None) -> str:
    return "NULL" if values is None else f"ARRAY[{', '.join(map(literal, values))}]::text[]"


def _reader_steps(connection: Connection, schema: str, reader: str | None, wanted: Iterable[_Wanted]) -> list[Step]:
    """What lets another role ship: to read the schema's tables, to tick, and to read the tables for an image.

    What was granted outside of the schema is noted, to be taken back.

    :raises ConfigurationError: there is no such role.
    """
    if reader is None:
        return []
    if not _one(connection, _HAS_ROLE, reader).yes:
        raise ConfigurationError(f"there is no role {reader!r}", remedy=f"CREATE ROLE {identifier(reader)} LOGIN")
    roots = [table.origins[0] for table in wanted]
    ids = [root.id for root in roots]
    held = {row.id: row for row in fetch(connection, _HELD, {"reader": reader, "ids": ids})}
    missing = {f"SELECT ON {qualified(root.schema, root.name)}" for root in roots if not held[root.id].readable}
    missing |= {f"USAGE ON SCHEMA {identifier(root.schema)}" for root in roots if not held[root.id].usable}
    to = identifier(reader)
    text = [sql.grant_reading(schema, reader)]
    for what in sorted(missing):
        revoke = literal(f"REVOKE {what} FROM {to}")
        text.append(f"GRANT {what} TO {to}; INSERT INTO {identifier(schema)}.granted VALUES ({revoke})")
    return [Step(f"role {reader} may ship", "; ".join(text), done=False)]


_HELD: Final[LiteralString] = """
    SELECT c.oid::int8 AS id, has_table_privilege(%(reader)s, c.oid, 'SELECT') AS readable,
           has_schema_privilege(%(reader)s, c.relnamespace, 'USAGE') AS usable
    FROM pg_class c WHERE c.oid = ANY (%(ids)s::oid[])
"""


# What is captured, as of now -----------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """A captured table whose writes may have been missed, and why."""

    relation: int
    message: str


def fetch_captured(connection: Connection, schema: str) -> list[Any]:
    """What setup noted; ``name`` is None where the table is gone.

    :raises ConfigurationError: there is no such schema.
    """
    if not is_there(connection, schema):
        raise ConfigurationError(
            f"there is no schema {schema!r}: nothing is captured by triggers",
            remedy="run `cdc setup --format trigger` on the leader first",
        )
    query = f"""
        SELECT t.*, c.relname AS name, s.nspname AS schema FROM {identifier(schema)}.captured t
        LEFT JOIN pg_class c ON c.oid = t.relation::oid LEFT JOIN pg_namespace s ON s.oid = c.relnamespace
        ORDER BY s.nspname, c.relname
    """
    return fetch(connection, query)


def faults(connection: Connection, schema: str) -> list[Fault]:
    """Where triggers were dropped, disabled, or are missing; nothing where all is as it was set up."""
    found = []
    query = f"""
        SELECT t.relation, coalesce(s.nspname || '.' || c.relname, t.relation::text) AS label, c.oid IS NULL AS gone,
               t.triggers IS DISTINCT FROM ({_TRIGGERS.format(schema=literal(identifier(schema)), origins="t.origins")})
                   AS altered,
               (SELECT min(o) FROM unnest(t.origins) o WHERE o <> t.relation
                AND o NOT IN (SELECT p.relid::oid::int8 FROM pg_partition_tree(c.oid) p)) AS left_out,
               ARRAY(SELECT p.relid::regclass::text FROM pg_partition_tree(c.oid) p JOIN pg_class k ON k.oid = p.relid
                     WHERE k.relkind IN ('r', 'p') AND p.relid::oid::int8 <> ALL (t.origins)) AS uncovered,
               (SELECT max(g.tgname::text) FROM pg_trigger g JOIN pg_proc f ON f.oid = g.tgfoid
                WHERE t.plain AND g.tgrelid = ANY (t.origins::oid[]) AND NOT g.tgisinternal
                  AND f.pronamespace <> to_regnamespace({literal(identifier(schema))})) AS nests
        FROM {identifier(schema)}.captured t
        LEFT JOIN pg_class c ON c.oid = t.relation::oid LEFT JOIN pg_namespace s ON s.oid = c.relnamespace
    """
    for row in fetch(connection, query):
        if row.gone:
            found.append(Fault(row.relation, f"captured table {row.label} was dropped"))
        elif row.left_out is not None:
            message = f"a partition of {row.label} was dropped or detached, and its rows are still on followers"
            found.append(Fault(row.relation, message))
        elif row.altered:
            found.append(Fault(row.relation, f"triggers on {row.label} were dropped, disabled or altered"))
        elif row.uncovered:
            found.append(Fault(row.relation, f"partition {row.uncovered[0]} of {row.label} has no triggers of ours"))
        elif row.nests is not None:
            found.append(Fault(row.relation, f"{row.label} got trigger {row.nests!r}, which ours do not reckon with"))
    return found


def fingerprint(connection: Connection, origins: Sequence[int]) -> str:
    """Something that differs whenever the catalog tells of these tables, or of their triggers, anything else."""
    return str(fetch(connection, f"SELECT {FINGERPRINT} AS text", {"origins": list(origins)})[0].text)


# Of every row the transaction that wrote it: whatever is altered has another one.
FINGERPRINT: Final[LiteralString] = """(
    SELECT string_agg(f.rows || ' ' || coalesce(f.sum, 0), ',' ORDER BY f.number) FROM (
        SELECT 1, count(*), sum(xmin::text::int8) FROM pg_attribute WHERE attrelid = ANY (%(origins)s::oid[])
        UNION ALL SELECT 2, count(*), sum(xmin::text::int8) FROM pg_class WHERE oid = ANY (%(origins)s::oid[])
        UNION ALL SELECT 3, count(*), sum(xmin::text::int8) FROM pg_index WHERE indrelid = ANY (%(origins)s::oid[])
        UNION ALL SELECT 4, count(*), sum(xmin::text::int8) FROM pg_trigger WHERE tgrelid = ANY (%(origins)s::oid[])
        UNION ALL SELECT 5, count(*), sum(xmin::text::int8) FROM pg_inherits WHERE inhparent = ANY (%(origins)s::oid[])
        UNION ALL SELECT 6, count(*), sum(xmin::text::int8) FROM pg_enum
    ) f(number, rows, sum))"""


def describe_captured(connection: Connection, schema: str) -> list[Captured]:
    """Every table and partition that is captured, as of the session's snapshot.

    :raises ConfigurationError: there is no such schema.
    """
    noted = [row for row in fetch_captured(connection, schema) if row.name is not None]
    relations = {relation.id: relation for relation in describe_tables(connection, [row.relation for row in noted])}
    keys = {row.id: row for row in fetch(connection, _ROOTS, {"ids": [*relations], "schema": identifier(schema)})}
    origins = [origin for row in noted for origin in row.origins]
    attributes: dict[int, list[Any]] = {origin: [] for origin in origins}
    for attribute in fetch(connection, _ATTRIBUTES, [origins]):
        attributes[attribute.origin].append(attribute)
    return [
        _described(schema, row, _keyed(relations[row.relation], keys[row.relation].key), origin, attributes[origin])
        for row in noted
        if row.relation in relations
        for origin in row.origins
    ]


_ATTRIBUTES: Final[LiteralString] = """
    SELECT a.attrelid::int8 AS origin, a.attname::text AS name, a.atttypid::int8 AS type_oid,
           c.relnatts::int4 AS highest
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    WHERE a.attrelid = ANY (%s::oid[]) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attrelid, a.attnum
"""


def _keyed(relation: Relation, key: Sequence[str]) -> Relation:
    """By what triggers find its rows, whatever its replica identity is; a key that is checked late is none."""
    identity = "f" if not key else "d" if tuple(key) == relation.primary_key else "i"
    columns = tuple(replace(column, key=not key or column.name in key) for column in relation.columns)
    primary_key = relation.primary_key if identity == "d" else ()
    return replace(relation, identity=identity, columns=columns, primary_key=primary_key)


def _described(schema: str, noted: Any, relation: Relation, origin: int, attributes: Sequence[Any]) -> Captured:
    columns = list(relation.columns)
    masks: dict[str, str] = {}
    if noted.columns is not None:
        masks = dict(zip(noted.columns, noted.masks, strict=True))
        columns = [_masked(column, masks[column.name]) for column in columns if column.name in masks]
        layout = Layout(tuple(column.type_oid for column in columns), tuple(range(len(columns))))
    else:
        places = {attribute.name: place for place, attribute in enumerate(attributes)}
        layout = Layout(
            tuple(attribute.type_oid for attribute in attributes),
            tuple(places[column.name] for column in columns if column.name in places),
        )
    return Captured(
        origin,
        replace(relation, columns=tuple(columns)),
        layout,
        max((attribute.highest for attribute in attributes), default=0),
        noted.plain,
        tuple(sql.masked(schema, column.name, masks.get(column.name, "")) for column in columns),
        noted.condition,
    )


def _masked(column: Column, mask: str) -> Column:
    if mask == "hash":
        return replace(column, type_oid=TEXT, modifier=-1, missing=None)
    return replace(column, not_null=False, missing=None) if mask == "null" else column


# How far it is -------------------------------------------------------------------------------------------------------

ORDINAL_BITS: Final = 28
"""A position's number is a tick and, in so many low bits, how many transactions of the next one are done."""


def changed_between(connection: Connection, schema: str, applied: Position, seen: str) -> bool:
    """Does a snapshot see anything captured that whoever applied that has not got? Where that cannot be told: yes."""
    number, part = applied.lsn >> ORDINAL_BITS, applied.lsn & ((1 << ORDINAL_BITS) - 1)
    s = identifier(schema)
    ticks = fetch(connection, f"SELECT snapshot::text AS text FROM {s}.tick WHERE id = %s", [number])
    if part or not ticks:
        return True
    some = " OR ".join(
        f"EXISTS (SELECT FROM {s}.{sql.change_table(slot)} WHERE txid_visible_in_snapshot(xid, %(seen)s::txid_snapshot)"
        " AND NOT txid_visible_in_snapshot(xid, %(had)s::txid_snapshot))"
        for slot in sql.SLOTS
    )
    return bool(fetch(connection, f"SELECT {some} AS yes", {"seen": seen, "had": ticks[0].text})[0].yes)


class CaptureStatus(NamedTuple):
    """How a trigger log stands.

    ``tick`` is the newest one's number, ``tick_age_s`` how long ago it was made. ``changes`` counts what was captured
    and committed since. ``size_bytes``: of the change tables. ``open_transactions``: how many that may have written are
    not committed yet, the oldest for ``oldest_transaction_s``; what they captured waits for them, what others commit
    meanwhile does not.
    """

    tick: int | None
    tick_age_s: float | None
    changes: int
    size_bytes: int
    tables: int
    open_transactions: int
    oldest_transaction_s: float | None


def capture_status(connection: Connection, schema: str) -> CaptureStatus:
    """:raises ConfigurationError: there is no such schema."""
    tables = len(fetch_captured(connection, schema))
    s = identifier(schema)
    both = " UNION ALL ".join(
        f"SELECT xid FROM {s}.{sql.change_table(slot)} WHERE op NOT IN ('B', 'M')" for slot in sql.SLOTS
    )
    sizes = " + ".join(f"pg_total_relation_size({literal(f'{s}.{sql.change_table(slot)}')})" for slot in sql.SLOTS)
    query = f"""
        WITH t AS (SELECT id, snapshot::text::txid_snapshot AS seen, made FROM {s}.tick ORDER BY id DESC LIMIT 1),
             o AS (SELECT xact_start AS since FROM pg_stat_activity
                   WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() AND datname = current_database()
                   UNION ALL SELECT prepared FROM pg_prepared_xacts WHERE database = current_database())
        SELECT (SELECT id FROM t) AS tick,
               (SELECT extract(epoch FROM clock_timestamp() - made)::float8 FROM t) AS tick_age_s,
               (SELECT count(*) FROM ({both}) c
                WHERE NOT EXISTS (SELECT FROM t WHERE txid_visible_in_snapshot(c.xid, t.seen)))::int8 AS changes,
               ({sizes})::int8 AS size_bytes,
               (SELECT count(*) FROM o)::int8 AS open_transactions,
               (SELECT extract(epoch FROM clock_timestamp() - min(since))::float8 FROM o) AS oldest_transaction_s
    """
    [row] = fetch(connection, query)
    return CaptureStatus(
        row.tick,
        row.tick_age_s,
        row.changes,
        row.size_bytes,
        tables,
        row.open_transactions,
        row.oldest_transaction_s,
    )
