"""PostgreSQL's types on engines that have others: how a column is declared and a value is stored. Pure.

A value is stored natively where the engine's type holds every value PostgreSQL's can hold, or refuses what it cannot
hold; everything else is kept as the text PostgreSQL itself prints, in a column that does not reinterpret it.

Sources: https://www.postgresql.org/docs/current/datatype.html, https://sqlite.org/datatype3.html ("Determination Of
Column Affinity": only TEXT keeps ``1.00`` as it is), https://duckdb.org/docs/stable/sql/data_types/overview.
"""

from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto
from math import isnan
from typing import Any, Final, NamedTuple

from cdc.record import Column, Relation, TypeDescription

# Object identifiers fixed in PostgreSQL's pg_type.dat; only those that are not kept as text.
_BOOL, _BYTEA, _INT8, _INT2, _INT4, _TEXT, _OID = 16, 17, 20, 21, 23, 25, 26
_FLOAT4, _FLOAT8, _VARCHAR, _DATE, _TIME = 700, 701, 1043, 1082, 1083
_TIMESTAMP, _TIMESTAMPTZ, _NUMERIC, _UUID, _JSON = 1114, 1184, 1700, 2950, 114
_INTEGERS: Final = {_INT2: 1, _INT4: 2, _OID: 3, _INT8: 4}  # each holds those before it
_DECIMAL_DIGITS_MAX: Final = 38


class Kind(Enum):
    """How a value is stored."""

    BOOL = auto()
    INT = auto()
    FLOAT4 = auto()
    FLOAT8 = auto()
    BYTES = auto()
    DECIMAL = auto()
    DATE = auto()
    TIME = auto()
    TIMESTAMP = auto()
    TIMESTAMPTZ = auto()
    UUID = auto()
    TEXT = auto()


class Storage(NamedTuple):
    """``declared``: the type in the follower's CREATE TABLE."""

    kind: Kind
    declared: str


_SQLITE: Final = {
    _BOOL: Storage(Kind.BOOL, "INTEGER"),
    _INT2: Storage(Kind.INT, "INTEGER"),
    _INT4: Storage(Kind.INT, "INTEGER"),
    _INT8: Storage(Kind.INT, "INTEGER"),
    _OID: Storage(Kind.INT, "INTEGER"),
    _FLOAT4: Storage(Kind.FLOAT4, "REAL"),
    _FLOAT8: Storage(Kind.FLOAT8, "REAL"),
    _BYTEA: Storage(Kind.BYTES, "BLOB"),
}
_DUCKDB: Final = {
    _BOOL: Storage(Kind.BOOL, "BOOLEAN"),
    _INT2: Storage(Kind.INT, "SMALLINT"),
    _INT4: Storage(Kind.INT, "INTEGER"),
    _INT8: Storage(Kind.INT, "BIGINT"),
    _OID: Storage(Kind.INT, "BIGINT"),
    _FLOAT4: Storage(Kind.FLOAT4, "FLOAT"),
    _FLOAT8: Storage(Kind.FLOAT8, "DOUBLE"),
    _BYTEA: Storage(Kind.BYTES, "BLOB"),
    _DATE: Storage(Kind.DATE, "DATE"),
    _TIME: Storage(Kind.TIME, "TIME"),
    _TIMESTAMP: Storage(Kind.TIMESTAMP, "TIMESTAMP"),
    _TIMESTAMPTZ: Storage(Kind.TIMESTAMPTZ, "TIMESTAMP WITH TIME ZONE"),
    _UUID: Storage(Kind.UUID, "UUID"),
}
_NATIVE: Final = {"sqlite": _SQLITE, "duckdb": _DUCKDB}
DIALECTS: Final = frozenset(_NATIVE)
_AS_TEXT: Final = {"sqlite": Storage(Kind.TEXT, "TEXT"), "duckdb": Storage(Kind.TEXT, "VARCHAR")}


def types_of(relation: Relation) -> dict[int, TypeDescription]:
    """The relation's own types by OID."""
    return {described.oid: described for described in relation.types}


def storage(column: Column, types: Mapping[int, TypeDescription], dialect: str) -> Storage:
    """How ``column`` is kept on ``dialect`` ("sqlite" or "duckdb"). A domain is kept as its base type."""
    oid = _base(column.type_oid, types)
    if dialect == "duckdb" and oid == _NUMERIC:
        return _decimal(numeric_scale(column.modifier))
    return _NATIVE[dialect].get(oid, _AS_TEXT[dialect])


def numeric_scale(modifier: int) -> tuple[int, int] | None:
    """Precision and scale of ``numeric(p, s)`` from its modifier, None where it has none; the scale may be negative."""
    if modifier < 4:
        return None
    scale = (modifier - 4) & 0x7FF
    return (modifier - 4) >> 16 & 0xFFFF, (scale ^ 0x400) - 0x400


def _decimal(size: tuple[int, int] | None) -> Storage:
    if size is None or size[0] > _DECIMAL_DIGITS_MAX or not 0 <= size[1] <= size[0]:
        return _AS_TEXT["duckdb"]
    return Storage(Kind.DECIMAL, f"DECIMAL({size[0]},{size[1]})")


def _base(oid: int, types: Mapping[int, TypeDescription]) -> int:
    for _ in range(len(types)):
        described = types.get(oid)
        if described is None or described.kind != "domain":
            break
        oid = described.base
    return oid


def key_of(relation: Relation) -> tuple[str, ...]:
    """The columns that make a row unique: the primary key, else the replica identity where that is a key."""
    if relation.primary_key or relation.identity not in "di":
        return relation.primary_key
    return tuple(column.name for column in relation.columns if column.key)


# Stored values. A writer turns what the reader of the leader's bytes returns into what the driver binds.


def writer(kind: Kind, dialect: str) -> Callable[[Any], Any] | None:
    """How a decoded value becomes a stored one; None where it is stored as it is."""
    if dialect == "sqlite":
        return _sqlite_float if kind in (Kind.FLOAT4, Kind.FLOAT8) else None
    return _duckdb_date if kind in (Kind.DATE, Kind.TIMESTAMP, Kind.TIMESTAMPTZ) else None


NEGATIVE_ZERO: Final = b"-0"


def _sqlite_float(value: float) -> float | str | bytes:
    """SQLite turns NaN into NULL and forgets the sign of zero in a REAL column: those two are kept as text and blob."""
    if isnan(value):
        return "NaN"
    if value == 0 and str(value) == "-0.0":
        return NEGATIVE_ZERO
    return value


def _duckdb_date(text: str) -> str:
    """``0044-03-15 01:02:03 BC`` (PostgreSQL) as ``0044-03-15 (BC) 01:02:03`` (DuckDB)."""
    if not text.endswith(" BC"):
        return text
    date, blank, time = text[:-3].partition(" ")
    return f"{date} (BC){blank}{time}"


def postgresql_date(text: str) -> str:
    """The inverse: DuckDB's date or timestamp text as PostgreSQL prints it."""
    date, era, time = text.partition(" (BC)")
    return f"{date}{time} BC" if era else text


# Type changes.


def conversion(old: Column, new: Column, types: Mapping[int, TypeDescription], dialect: str) -> str | None:
    """The SQL expression, ``{}`` standing for the old value, that does to stored values what the leader's change did.

    None where the result cannot be known from the type alone: the leader may have used any ``USING`` expression, and
    casts that round, pad or trim are not imitated.
    """
    before, after = _base(old.type_oid, types), _base(new.type_oid, types)
    cast = f"CAST({{}} AS {storage(new, types, dialect).declared})"
    if before in _INTEGERS and after in _INTEGERS:
        return cast if _INTEGERS[before] <= _INTEGERS[after] else None
    if before in _INTEGERS and after in (_TEXT, _NUMERIC):
        return _scaled(cast, (0, 0), numeric_scale(new.modifier) if after == _NUMERIC else None, dialect)
    if before in (_INT2, _INT4) and after == _FLOAT8:
        return cast
    if before == after == _NUMERIC:
        return _numeric_conversion(old, new, cast, dialect)
    if (before, after) == (_FLOAT4, _FLOAT8):
        return cast if dialect == "duckdb" else None
    return cast if _same_text(before, after, old, new, types) else None


def _numeric_conversion(old: Column, new: Column, cast: str, dialect: str) -> str | None:
    size, target = numeric_scale(old.modifier), numeric_scale(new.modifier)
    if target is None:
        return cast
    if size is None or size[1] < 0 or target[1] < size[1] or target[0] - target[1] < size[0] - size[1]:
        return None
    return _scaled(cast, size, target, dialect)


def _scaled(cast: str, size: tuple[int, int], target: tuple[int, int] | None, dialect: str) -> str | None:
    """Text of a number with more digits after its point; DECIMAL does that by itself."""
    if target is None or target[1] == size[1] or (dialect == "duckdb" and _decimal(target).kind is Kind.DECIMAL):
        return cast
    if target[1] < 0:
        return None
    zeros = ("." if size[1] == 0 else "") + "0" * (target[1] - size[1])
    return f"CASE WHEN {cast} = 'NaN' THEN 'NaN' ELSE {cast} || '{zeros}' END"


def _same_text(before: int, after: int, old: Column, new: Column, types: Mapping[int, TypeDescription]) -> bool:
    """Does every value print alike before and after?"""
    if after == _VARCHAR and new.modifier != -1:
        return before == _VARCHAR and -1 < old.modifier <= new.modifier
    if after in (_TEXT, _VARCHAR):
        described = types.get(before)
        is_enum = described is not None and described.kind == "enum"
        return is_enum or before in (_TEXT, _VARCHAR, _UUID, _JSON, _NUMERIC)
    return before == after and old.modifier == new.modifier


# What does not come along.


def losses(relation: Relation, dialect: str) -> list[str]:
    """What a follower on ``dialect`` loses of the relation's types, one sentence each. No value is ever altered.

    Where a value cannot be held the follower stops before it; where it is held as text the engine's own arithmetic and
    ordering are lost.
    """
    types = types_of(relation)
    found = ((column.name, _loss(column, types, dialect)) for column in relation.columns)
    return [f"{relation.label}.{name}: {loss}" for name, loss in found if loss]


def _loss(column: Column, types: Mapping[int, TypeDescription], dialect: str) -> str | None:
    kind = storage(column, types, dialect).kind
    oid = _base(column.type_oid, types)
    if kind is Kind.DECIMAL:
        return "numeric NaN cannot be held and stops the follower"
    if kind in (Kind.TIMESTAMP, Kind.TIMESTAMPTZ):
        return "timestamps after 294247-01-10 04:00:54.775806 cannot be held and stop the follower"
    if kind in (Kind.FLOAT4, Kind.FLOAT8) and dialect == "sqlite":
        return "NaN is kept as text and negative zero as a blob, which sums and comparisons do not see as numbers"
    if kind is Kind.TEXT and oid not in (_TEXT, _VARCHAR):
        return f"{_type_name(oid, types)} is kept as the text PostgreSQL prints: it sorts and compares as text"
    return None


_NAMES: Final = {_NUMERIC: "numeric", _DATE: "date", _TIME: "time", _UUID: "uuid", _JSON: "json"} | {
    _TIMESTAMP: "timestamp",
    _TIMESTAMPTZ: "timestamp with time zone",
}


def _type_name(oid: int, types: Mapping[int, TypeDescription]) -> str:
    described = types.get(oid)
    return described.name if described else _NAMES.get(oid, f"the type with OID {oid}")


def declarations(relation: Relation, dialect: str, columns: Iterable[Column] | None = None) -> dict[str, str]:
    """Column name to declared type, of all the relation's columns or of ``columns``."""
    types = types_of(relation)
    return {
        column.name: storage(column, types, dialect).declared
        for column in (relation.columns if columns is None else columns)
    }
