"""Today's catalog as relations and types. A thousand tables cost three queries.

Today's catalog is not yesterday's: what stands here describes an image, or enriches a description that came with the
log; it never replaces one (law 6).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Final, LiteralString

from cdc.errors import ConfigurationError
from cdc.record import Column, Relation, TypeDescription
from cdc.stores.postgresql.connect import Connection, fetch

# Below this OID stand the types whose OID is the same on every server.
FIRST_UNSTABLE_OID: Final = 10_000
_TRIGGER_LOG: Final = {"change_0", "change_1", "tick", "shape", "captured", "granted", "secret", "source", "turn"}


def is_ours(relation: Relation) -> bool:
    """Is it our own: where a follower keeps its checkpoint, or a leader its trigger log? It is published to no use."""
    if relation.schema.startswith("cdc_"):
        return relation.name in _TRIGGER_LOG
    return relation.schema == "cdc" and relation.name in {"checkpoint", "relation"}


def describe(connection: Connection, *, publication: str) -> list[Relation]:
    """Every table of a publication as pgoutput tells of it, by schema and name; :func:`is_ours` are left out.

    Column lists count; generated columns are there where the publication says ``publish_generated_columns = stored``
    (18 and later); partitions stand for themselves, or their root for them (``publish_via_partition_root``). A row
    filter does not show in a description: see :func:`filters`.
    (https://www.postgresql.org/docs/current/sql-createpublication.html)

    :raises ConfigurationError: there is no such publication.
    """
    _must_exist(connection, publication)
    published = _relations(connection, _PUBLISHED, {"publication": publication})
    return [relation for relation in published if not is_ours(relation)]


def describe_tables(connection: Connection, oids: Iterable[int]) -> list[Relation]:
    """The tables of these OIDs with every column that is not generated, by schema and name.

    An OID that is no table's is left out.
    """
    return _relations(connection, _NAMED, {"oids": list(oids)})


def filters(connection: Connection, *, publication: str) -> dict[int, str]:
    """The row filters of a publication as SQL conditions, by table OID; tables without one are left out."""
    query: LiteralString = """
        SELECT p.relid::oid::int8 AS id, pg_get_expr(p.qual, p.relid) AS condition
        FROM pg_get_publication_tables(%s) p WHERE p.qual IS NOT NULL
    """
    return {row.id: row.condition for row in fetch(connection, query, [publication])}


def describe_types(connection: Connection, oids: Iterable[int]) -> tuple[TypeDescription, ...]:
    """These types and all they are made of, in OID order; types built into every server are left out.

    Made of: an array's element, a domain's base, a range's subtype, a multirange's range, a composite's attributes
    (https://www.postgresql.org/docs/current/catalog-pg-type.html).
    """
    reached = _types(connection, oids)
    return tuple(description for _, (description, _) in sorted(reached.items()))


def enrich(connection: Connection, relation: Relation) -> Relation:
    """A relation that came with the log, with what today's catalog adds where the two still agree.

    They agree where the captured columns have the same names, types and modifiers in the same order. Attribute
    numbers, NOT NULL, missing values and the primary key are then added; otherwise only the types that still exist, and
    what older rows hold in the columns that are still there.
    """
    captured = {column.name for column in relation.columns}
    types = describe_types(connection, (column.type_oid for column in relation.columns))
    for now in _relations(connection, _ALL_COLUMNS, {"oids": [relation.id]}):
        today = [column for column in now.columns if column.name in captured]
        if list(map(_shape, today)) == list(map(_shape, relation.columns)):
            columns = (replace(new, key=old.key) for old, new in zip(relation.columns, today, strict=True))
            primary_key = now.primary_key if captured.issuperset(now.primary_key) else ()
            return replace(relation, columns=tuple(columns), primary_key=primary_key, types=types)
        there = {_shape(column): column for column in today}
        columns = (
            replace(each, missing=there[_shape(each)].missing, untold=there[_shape(each)].untold)
            if _shape(each) in there
            else each
            for each in relation.columns
        )
        return replace(relation, columns=tuple(columns), types=types)
    return replace(relation, types=types)


def _shape(column: Column) -> tuple[str, int, int]:
    return column.name, column.type_oid, column.modifier


def _must_exist(connection: Connection, publication: str) -> None:
    if not fetch(connection, "SELECT oid FROM pg_publication WHERE pubname = %s", [publication]):
        raise ConfigurationError(
            f"there is no publication {publication!r} in database {connection.info.dbname!r}",
            remedy="run `cdc setup`, or name another one with --publication",
        )


_PUBLISHED: Final[LiteralString] = """
    SELECT p.relid::oid AS id, p.attrs::int2[] AS numbers, false AS generated
    FROM pg_get_publication_tables(%(publication)s) p
"""
_NAMED: Final[LiteralString] = """
    SELECT n.oid AS id, NULL::int2[] AS numbers, false AS generated FROM unnest(%(oids)s::oid[]) n
"""
_ALL_COLUMNS: Final[LiteralString] = """
    SELECT n.oid AS id, NULL::int2[] AS numbers, true AS generated FROM unnest(%(oids)s::oid[]) n
"""

# array_to_string takes the one element out of attmissingval as the element type prints it. A partitioned table keeps
# no rows: the value stands with its leaves.
_COLUMNS: Final[LiteralString] = """
    SELECT c.oid::int8 AS id, s.nspname AS schema, c.relname AS name, c.relreplident AS identity,
           a.attname AS column, a.atttypid::int8 AS type_oid, a.atttypmod AS modifier, a.attnum::int4 AS number,
           a.attnotnull AS not_null, c.relreplident = 'f' OR a.attnum = ANY (i.numbers) AS key,
           array_position(k.numbers, a.attnum) AS key_place, cardinality(k.numbers) AS key_columns,
           CASE WHEN a.atthasmissing THEN array_to_string(a.attmissingval, '', NULL)
                WHEN c.relkind = 'p' THEN
                    (SELECT array_to_string(l.attmissingval, '', NULL)
                     FROM pg_partition_tree(c.oid) t JOIN pg_attribute l ON l.attrelid = t.relid
                     WHERE t.isleaf AND l.attname = a.attname AND l.atthasmissing LIMIT 1)
           END AS missing,
           a.atthasdef OR a.attidentity <> '' AS has_default
    FROM tables t
    JOIN pg_class c ON c.oid = t.id
    JOIN pg_namespace s ON s.oid = c.relnamespace
    LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        AND CASE WHEN t.numbers IS NOT NULL THEN a.attnum = ANY (t.numbers)
                 ELSE a.attgenerated = '' OR (t.generated AND a.attgenerated = 's') END
    LEFT JOIN LATERAL (
        SELECT (x.indkey::int2[])[0:x.indnkeyatts - 1] AS numbers FROM pg_index x
        WHERE x.indrelid = c.oid AND x.indisvalid AND x.indimmediate
          AND CASE c.relreplident WHEN 'd' THEN x.indisprimary WHEN 'i' THEN x.indisreplident ELSE false END
    ) i ON true
    LEFT JOIN LATERAL (
        SELECT (x.indkey::int2[])[0:x.indnkeyatts - 1] AS numbers FROM pg_index x
        WHERE x.indrelid = c.oid AND x.indisprimary
    ) k ON true
    ORDER BY s.nspname, c.relname, c.oid, a.attnum
"""


def _relations(connection: Connection, tables: LiteralString, values: dict[str, Any]) -> list[Relation]:
    rows = fetch(connection, f"WITH tables AS ({tables}) {_COLUMNS}", values)
    reached = _types(connection, {row.type_oid for row in rows if row.column is not None})
    return [_relation(list(group), reached) for _, group in groupby(rows, key=lambda row: row.id)]


def _relation(rows: Sequence[Any], reached: "_Types") -> Relation:
    table = rows[0]
    rows = [row for row in rows if row.column is not None]
    in_key = sorted((row.key_place, row.column) for row in rows if row.key_place is not None)
    return Relation(
        id=table.id,
        schema=table.schema,
        name=table.name,
        identity=table.identity,
        columns=tuple(
            Column(
                row.column,
                row.type_oid,
                row.modifier,
                bool(row.key),
                row.not_null,
                row.number,
                row.missing,
                untold=row.has_default and row.missing is None,
            )
            for row in rows
        ),
        primary_key=tuple(name for _, name in in_key) if len(in_key) == (table.key_columns or 0) else (),
        types=_closure(reached, {row.type_oid for row in rows}),
    )


# A description, and the OIDs of what the type is made of.
_Types = dict[int, tuple[TypeDescription, tuple[int, ...]]]

_TYPES: Final[LiteralString] = """
    WITH RECURSIVE reached AS (
        SELECT o.oid FROM unnest(%(oids)s::oid[]) o
        UNION
        SELECT part.oid FROM reached r JOIN pg_type t ON t.oid = r.oid
        CROSS JOIN LATERAL (
            SELECT t.typelem WHERE t.typelem <> 0
            UNION ALL SELECT t.typbasetype WHERE t.typbasetype <> 0
            UNION ALL SELECT g.rngsubtype FROM pg_range g WHERE t.typtype = 'r' AND g.rngtypid = t.oid
            UNION ALL SELECT g.rngtypid FROM pg_range g WHERE t.typtype = 'm' AND g.rngmultitypid = t.oid
            UNION ALL SELECT a.atttypid FROM pg_attribute a
                      WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
        ) part(oid)
        WHERE part.oid >= %(first)s
    )
    SELECT t.oid::int8, s.nspname AS schema, t.typname AS name,
           CASE WHEN t.typsubscript = 'array_subscript_handler'::regproc AND t.typelem <> 0 THEN 'array'
                ELSE CASE t.typtype WHEN 'e' THEN 'enum' WHEN 'd' THEN 'domain' WHEN 'r' THEN 'range'
                                    WHEN 'm' THEN 'multirange' WHEN 'c' THEN 'composite' ELSE 'base' END
           END AS kind,
           CASE WHEN t.typsubscript = 'array_subscript_handler'::regproc THEN t.typelem
                WHEN t.typtype = 'd' THEN t.typbasetype
                WHEN t.typtype = 'r' THEN (SELECT g.rngsubtype FROM pg_range g WHERE g.rngtypid = t.oid)
                WHEN t.typtype = 'm' THEN (SELECT g.rngtypid FROM pg_range g WHERE g.rngmultitypid = t.oid)
                ELSE 0 END::int8 AS base,
           ARRAY(SELECT e.enumlabel::text FROM pg_enum e WHERE e.enumtypid = t.oid ORDER BY e.enumsortorder) AS labels,
           ARRAY(SELECT a.atttypid::int8 FROM pg_attribute a
                 WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped) AS parts
    FROM reached r JOIN pg_type t ON t.oid = r.oid JOIN pg_namespace s ON s.oid = t.typnamespace
"""


def _types(connection: Connection, oids: Iterable[int]) -> _Types:
    asked = sorted({oid for oid in oids if oid >= FIRST_UNSTABLE_OID})
    if not asked:
        return {}
    values = {"oids": asked, "first": FIRST_UNSTABLE_OID}
    rows = fetch(connection, _TYPES, values)
    return {
        row.oid: (
            TypeDescription(row.oid, row.schema, row.name, row.kind, row.base, tuple(row.labels)),
            (row.base, *row.parts),
        )
        for row in rows
    }


def _closure(reached: _Types, oids: Iterable[int]) -> tuple[TypeDescription, ...]:
    found: set[int] = set()
    waiting = [oid for oid in oids if oid in reached]
    while waiting:
        oid = waiting.pop()
        if oid not in found:
            found.add(oid)
            waiting.extend(part for part in reached[oid][1] if part in reached)
    return tuple(reached[oid][0] for oid in sorted(found))
