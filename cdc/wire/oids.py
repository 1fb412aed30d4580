"""PostgreSQL's built-in types: their OIDs never change between versions, so a decoder may know them by heart.

https://www.postgresql.org/docs/current/catalog-pg-type.html and ``src/include/catalog/pg_type.dat``.
"""

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from cdc.errors import SchemaError
from cdc.record import TypeDescription

BOOL: Final = 16
BYTEA: Final = 17
CHAR: Final = 18
NAME: Final = 19
INT8: Final = 20
INT2: Final = 21
INT2VECTOR: Final = 22
INT4: Final = 23
REGPROC: Final = 24
TEXT: Final = 25
OID: Final = 26
TID: Final = 27
XID: Final = 28
CID: Final = 29
OIDVECTOR: Final = 30
JSON: Final = 114
XML: Final = 142
POINT: Final = 600
LSEG: Final = 601
PATH: Final = 602
BOX: Final = 603
POLYGON: Final = 604
LINE: Final = 628
CIDR: Final = 650
FLOAT4: Final = 700
FLOAT8: Final = 701
CIRCLE: Final = 718
MACADDR8: Final = 774
MONEY: Final = 790
MACADDR: Final = 829
INET: Final = 869
ACLITEM: Final = 1033
BPCHAR: Final = 1042
VARCHAR: Final = 1043
DATE: Final = 1082
TIME: Final = 1083
TIMESTAMP: Final = 1114
TIMESTAMPTZ: Final = 1184
INTERVAL: Final = 1186
TIMETZ: Final = 1266
BIT: Final = 1560
VARBIT: Final = 1562
NUMERIC: Final = 1700
REFCURSOR: Final = 1790
UUID: Final = 2950
TXID_SNAPSHOT: Final = 2970
PG_LSN: Final = 3220
TSVECTOR: Final = 3614
TSQUERY: Final = 3615
JSONB: Final = 3802
JSONPATH: Final = 4072
PG_SNAPSHOT: Final = 5038
XID8: Final = 5069

INT4RANGE: Final = 3904
NUMRANGE: Final = 3906
TSRANGE: Final = 3908
TSTZRANGE: Final = 3910
DATERANGE: Final = 3912
INT8RANGE: Final = 3926


class Builtin(NamedTuple):
    """A built-in type.

    ``name`` is ``pg_type.typname`` ("int4"), ``sql`` what format_type() prints without a modifier ("integer"), ``kind``
    "base", "array", "range" or "multirange". ``base`` is the element of an array, the subtype of a range, the range of
    a multirange, 0 otherwise.
    """

    name: str
    sql: str
    kind: str
    base: int = 0


# oid, oid of its array, name, SQL name where it differs
_BASES: Final[tuple[tuple[int, int, str, str], ...]] = (
    (BOOL, 1000, "bool", "boolean"),
    (BYTEA, 1001, "bytea", ""),
    (CHAR, 1002, "char", '"char"'),
    (NAME, 1003, "name", ""),
    (INT8, 1016, "int8", "bigint"),
    (INT2, 1005, "int2", "smallint"),
    (INT2VECTOR, 1006, "int2vector", ""),
    (INT4, 1007, "int4", "integer"),
    (REGPROC, 1008, "regproc", ""),
    (TEXT, 1009, "text", ""),
    (OID, 1028, "oid", ""),
    (TID, 1010, "tid", ""),
    (XID, 1011, "xid", ""),
    (CID, 1012, "cid", ""),
    (OIDVECTOR, 1013, "oidvector", ""),
    (JSON, 199, "json", ""),
    (XML, 143, "xml", ""),
    (POINT, 1017, "point", ""),
    (LSEG, 1018, "lseg", ""),
    (PATH, 1019, "path", ""),
    (BOX, 1020, "box", ""),
    (POLYGON, 1027, "polygon", ""),
    (LINE, 629, "line", ""),
    (CIDR, 651, "cidr", ""),
    (FLOAT4, 1021, "float4", "real"),
    (FLOAT8, 1022, "float8", "double precision"),
    (CIRCLE, 719, "circle", ""),
    (MACADDR8, 775, "macaddr8", ""),
    (MONEY, 791, "money", ""),
    (MACADDR, 1040, "macaddr", ""),
    (INET, 1041, "inet", ""),
    (ACLITEM, 1034, "aclitem", ""),
    (BPCHAR, 1014, "bpchar", "character"),
    (VARCHAR, 1015, "varchar", "character varying"),
    (DATE, 1182, "date", ""),
    (TIME, 1183, "time", "time without time zone"),
    (TIMESTAMP, 1115, "timestamp", "timestamp without time zone"),
    (TIMESTAMPTZ, 1185, "timestamptz", "timestamp with time zone"),
    (INTERVAL, 1187, "interval", ""),
    (TIMETZ, 1270, "timetz", "time with time zone"),
    (BIT, 1561, "bit", ""),
    (VARBIT, 1563, "varbit", "bit varying"),
    (NUMERIC, 1231, "numeric", ""),
    (REFCURSOR, 2201, "refcursor", ""),
    (2202, 2207, "regprocedure", ""),
    (2203, 2208, "regoper", ""),
    (2204, 2209, "regoperator", ""),
    (2205, 2210, "regclass", ""),
    (2206, 2211, "regtype", ""),
    (UUID, 2951, "uuid", ""),
    (TXID_SNAPSHOT, 2949, "txid_snapshot", ""),
    (PG_LSN, 3221, "pg_lsn", ""),
    (TSVECTOR, 3643, "tsvector", ""),
    (3642, 3644, "gtsvector", ""),
    (TSQUERY, 3645, "tsquery", ""),
    (3734, 3735, "regconfig", ""),
    (3769, 3770, "regdictionary", ""),
    (JSONB, 3807, "jsonb", ""),
    (JSONPATH, 4073, "jsonpath", ""),
    (4089, 4090, "regnamespace", ""),
    (4096, 4097, "regrole", ""),
    (4191, 4192, "regcollation", ""),
    (PG_SNAPSHOT, 5039, "pg_snapshot", ""),
    (XID8, 271, "xid8", ""),
)

# oid, oid of its array, name, subtype
_RANGES: Final = (
    (INT4RANGE, 3905, "int4range", INT4),
    (NUMRANGE, 3907, "numrange", NUMERIC),
    (TSRANGE, 3909, "tsrange", TIMESTAMP),
    (TSTZRANGE, 3911, "tstzrange", TIMESTAMPTZ),
    (DATERANGE, 3913, "daterange", DATE),
    (INT8RANGE, 3927, "int8range", INT8),
)

# oid, oid of its array, name, range
_MULTIRANGES: Final = (
    (4451, 6150, "int4multirange", INT4RANGE),
    (4532, 6151, "nummultirange", NUMRANGE),
    (4533, 6152, "tsmultirange", TSRANGE),
    (4534, 6153, "tstzmultirange", TSTZRANGE),
    (4535, 6155, "datemultirange", DATERANGE),
    (4536, 6157, "int8multirange", INT8RANGE),
)


def _builtin() -> Mapping[int, Builtin]:
    plain: dict[int, tuple[int, Builtin]] = {}
    for oid, array, name, sql in _BASES:
        plain[oid] = array, Builtin(name, sql or name, "base")
    for kind, table in (("range", _RANGES), ("multirange", _MULTIRANGES)):
        for oid, array, name, base in table:
            plain[oid] = array, Builtin(name, name, kind, base)
    known = {oid: builtin for oid, (_, builtin) in plain.items()}
    for oid, (array, builtin) in plain.items():
        known[array] = Builtin(f"_{builtin.name}", f"{builtin.sql}[]", "array", oid)
    return known


BUILTIN: Final[Mapping[int, Builtin]] = _builtin()

_DEPTH_MAX: Final = 32  # arrays of domains over arrays …: nobody nests deeper, a cycle would


def type_sql(type_oid: int, modifier: int, types: Mapping[int, TypeDescription]) -> str:
    """The SQL name of a column's type, as ``format_type(type_oid, modifier)`` prints it under an empty search path.

    ``modifier`` is ``pg_attribute.atttypmod``. Types that are not built in come schema-qualified and always quoted;
    a modifier of an extension's type is left out, because only the extension can print it.
    https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-CATALOG

    :raises SchemaError: the type is neither built in nor described in ``types``.
    """
    return _type_sql(type_oid, modifier, types, _DEPTH_MAX)


def _type_sql(type_oid: int, modifier: int, types: Mapping[int, TypeDescription], depth: int) -> str:
    known = BUILTIN.get(type_oid) or types.get(type_oid)
    if known is None or not depth:
        raise SchemaError(
            f"type with oid {type_oid} is not described",
            remedy="restart the shipper, so that it describes the leader's types anew",
        )
    if known.kind == "array":
        return _type_sql(known.base, modifier, types, depth - 1) + "[]"
    if isinstance(known, TypeDescription):
        return f"{_quoted(known.schema)}.{_quoted(known.name)}"
    return _with_modifier(type_oid, known.sql, modifier)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _with_modifier(type_oid: int, sql: str, modifier: int) -> str:
    if modifier < 0:
        # In SQL plain `character` and `bit` mean a length of 1; these two names mean any length.
        return {BPCHAR: "bpchar", BIT: '"bit"'}.get(type_oid, sql)
    if type_oid in (BPCHAR, VARCHAR):  # the modifier counts a four-byte header
        return f"{sql}({modifier - 4})" if modifier > 4 else sql
    if type_oid in (TIME, TIMETZ, TIMESTAMP, TIMESTAMPTZ):
        first, rest = sql.split(" ", 1)
        return f"{first}({modifier}) {rest}"
    return sql + _MODIFIERS.get(type_oid, _no_modifier)(modifier)


def _no_modifier(_: int) -> str:
    return ""


def _bit_modifier(modifier: int) -> str:
    return f"({modifier})"


def _numeric_modifier(modifier: int) -> str:
    packed = modifier - 4
    if packed < 0:
        return ""
    scale = ((packed & 0x7FF) ^ 0x400) - 0x400  # eleven bits, signed
    return f"({packed >> 16 & 0xFFFF},{scale})"


_INTERVAL_FIELDS: Final = ((2, "year"), (1, "month"), (3, "day"), (10, "hour"), (11, "minute"), (12, "second"))
_INTERVAL_ALL: Final = 0x7FFF


def _interval_modifier(modifier: int) -> str:
    mask, precision = modifier >> 16 & 0x7FFF, modifier & 0xFFFF
    fields = [name for bit, name in _INTERVAL_FIELDS if mask >> bit & 1] if mask != _INTERVAL_ALL else []
    span = " " + " to ".join(dict.fromkeys((fields[0], fields[-1]))) if fields else ""
    return span + (f"({precision})" if precision != 0xFFFF else "")


_MODIFIERS: Final[Mapping[int, Callable[[int], str]]] = {
    BIT: _bit_modifier,
    VARBIT: _bit_modifier,
    NUMERIC: _numeric_modifier,
    INTERVAL: _interval_modifier,
}
