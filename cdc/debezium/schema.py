"""Kafka Connect schemas of Debezium's PostgreSQL events, as JSON objects in the order Connect's JsonConverter writes.

https://debezium.io/documentation/reference/stable/connectors/postgresql.html#postgresql-data-types and
``#postgresql-events``. A schema is the hinge of both directions: :mod:`cdc.debezium.values` finds the way from a
PostgreSQL value to JSON, and back, by the schema alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from cdc.errors import SchemaError
from cdc.record import Column, Relation, TypeDescription
from cdc.wire import oids
from cdc.wire.oids import BUILTIN

Schema = dict[str, Any]
Types = Mapping[int, TypeDescription]

TimeMode = Literal["adaptive", "adaptive_time_microseconds", "connect", "isostring", "microseconds", "nanoseconds"]

PLACEHOLDER: Final = "__debezium_unavailable_value"
_DEPTH_MAX: Final = 32
_BITS_MAX: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Modes:
    """Debezium's properties of the same names: how values that JSON has no word for are told.

    ``time`` is ``time.precision.mode``, ``decimal`` ``decimal.handling.mode``, ``binary`` ``binary.handling.mode``,
    ``interval`` ``interval.handling.mode``, ``placeholder`` ``unavailable.value.placeholder``.
    """

    time: TimeMode = "adaptive"
    decimal: Literal["precise", "string", "double"] = "precise"
    binary: Literal["bytes", "base64", "base64-url-safe", "hex"] = "bytes"
    interval: Literal["numeric", "string"] = "numeric"
    placeholder: str = PLACEHOLDER


def schema(
    kind: str,
    name: str | None = None,
    *,
    optional: bool = False,
    version: int | None = 1,
    doc: str | None = None,
    parameters: Mapping[str, str] | None = None,
    **inner: Any,
) -> Schema:
    """One schema. ``inner``: ``fields`` or ``items``. Without a name it has no version."""
    written: Schema = {"type": kind, **inner, "optional": optional}
    if name is not None:
        written["name"] = name
        if version is not None:
            written["version"] = version
    if doc is not None:
        written["doc"] = doc
    if parameters is not None:
        written["parameters"] = dict(parameters)
    return written


def field(name: str, of: Schema, *, optional: bool | None = None, **more: Any) -> Schema:
    """``of`` as a field of a struct."""
    written = {**of, **more}
    if optional is not None:
        written["optional"] = optional
    written["field"] = name
    return written


# Columns --------------------------------------------------------------------------------------------------------------

_DATA: Final = "io.debezium.data."
_TIME: Final = "io.debezium.time."
_CONNECT: Final = "org.apache.kafka.connect.data."

_INT32, _INT64, _STRING = schema("int32"), schema("int64"), schema("string")

_PLAIN: Final[Mapping[int, str]] = {
    oids.BOOL: "boolean",
    oids.INT2: "int16",
    oids.INT4: "int32",
    oids.INT8: "int64",
    oids.OID: "int64",
    oids.FLOAT4: "float",
    oids.FLOAT8: "double",
}
_NAMED: Final[Mapping[int, str]] = {
    oids.JSON: "Json",
    oids.JSONB: "Json",
    oids.XML: "Xml",
    oids.UUID: "Uuid",
    oids.TSVECTOR: "Tsvector",
}
_EXTENSIONS: Final[Mapping[str, str]] = {"hstore": "Json", "ltree": "Ltree"}
"""Types of extensions that Debezium knows by name."""

_TIMES: Final[Mapping[TimeMode, tuple[tuple[str, str], tuple[str, str], tuple[str, str]]]] = {
    # date, time, timestamp; the two adaptive modes choose by precision, and what they share stands under microseconds
    "connect": (("int32", _CONNECT + "Date"), ("int32", _CONNECT + "Time"), ("int64", _CONNECT + "Timestamp")),
    "isostring": (("string", _TIME + "IsoDate"), ("string", _TIME + "IsoTime"), ("string", _TIME + "IsoTimestamp")),
    "microseconds": (("int32", _TIME + "Date"), ("int64", _TIME + "MicroTime"), ("int64", _TIME + "MicroTimestamp")),
    "nanoseconds": (("int32", _TIME + "Date"), ("int64", _TIME + "NanoTime"), ("int64", _TIME + "NanoTimestamp")),
}
_MILLISECONDS_MAX: Final = 3  # digits of a fraction that fit milliseconds


def column_schema(type_oid: int, modifier: int, types: Types, modes: Modes) -> Schema:
    """The schema of a column's values, not optional. Types Debezium has no word for are strings of PostgreSQL's text.

    :raises SchemaError: the type is neither built in nor described.
    """
    return _column_schema(type_oid, modifier, types, modes, _DEPTH_MAX)


def _column_schema(oid: int, modifier: int, types: Types, modes: Modes, depth: int) -> Schema:
    known = BUILTIN.get(oid) or types.get(oid)
    if known is None or not depth:
        raise SchemaError(
            f"type with oid {oid} is not described",
            remedy="restart the shipper, so that it describes the leader's types anew",
        )
    if known.kind == "array":
        items = _column_schema(known.base, modifier, types, modes, depth - 1)
        return schema("array", items={**items, "optional": True})
    if isinstance(known, TypeDescription):
        if known.kind == "domain":
            return _column_schema(known.base, modifier, types, modes, depth - 1)
        if known.kind == "enum":
            return enum_schema(known.labels)
        if known.kind == "base" and known.name in _EXTENSIONS:
            return schema("string", _DATA + _EXTENSIONS[known.name])
        return schema("string")
    return _builtin_schema(oid, modifier, modes)


def _builtin_schema(oid: int, modifier: int, modes: Modes) -> Schema:  # noqa: PLR0911 - one line for each kind of type
    if oid in _PLAIN:
        return schema(_PLAIN[oid])
    if oid in _NAMED:
        return schema("string", _DATA + _NAMED[oid])
    if oid in (oids.DATE, oids.TIME, oids.TIMESTAMP):
        return _time_schema(oid, modifier, modes.time)
    if oid in (oids.NUMERIC, oids.MONEY):
        return _decimal_schema(oid, modifier, modes)
    if oid in (oids.BIT, oids.VARBIT):
        return _bits_schema(oid, modifier)
    if oid == oids.BYTEA:
        return schema("bytes" if modes.binary == "bytes" else "string")
    if oid == oids.TIMESTAMPTZ:
        return schema("string", _TIME + "ZonedTimestamp")
    if oid == oids.TIMETZ:
        return schema("string", _TIME + "ZonedTime")
    if oid == oids.INTERVAL:
        return (
            schema("int64", _TIME + "MicroDuration")
            if modes.interval == "numeric"
            else schema("string", _TIME + "Interval")
        )
    return _POINT.copy() if oid == oids.POINT else schema("string")


def enum_schema(labels: Iterable[str]) -> Schema:
    """Labels that hold a comma or a backslash have it escaped."""
    allowed = ",".join(label.replace("\\", "\\\\").replace(",", "\\,") for label in labels)
    return schema("string", _DATA + "Enum", parameters={"allowed": allowed})


def _time_schema(oid: int, modifier: int, mode: TimeMode) -> Schema:
    coarse = 0 <= modifier <= _MILLISECONDS_MAX
    if coarse and oid == oids.TIME and mode == "adaptive":
        return schema("int32", _TIME + "Time")
    if coarse and oid == oids.TIMESTAMP and mode.startswith("adaptive"):
        return schema("int64", _TIME + "Timestamp")
    date, time, timestamp = _TIMES["microseconds" if mode.startswith("adaptive") else mode]
    return schema(*{oids.DATE: date, oids.TIME: time, oids.TIMESTAMP: timestamp}[oid])


def _decimal_schema(oid: int, modifier: int, modes: Modes) -> Schema:
    if modes.decimal != "precise":
        return schema(modes.decimal)
    if oid == oids.MONEY:
        return schema("bytes", _CONNECT + "Decimal", parameters={"scale": "2"})
    if modifier < 4:
        return _VARIABLE_SCALE.copy()
    packed = modifier - 4
    scale = ((packed & 0x7FF) ^ 0x400) - 0x400  # eleven bits, signed
    parameters = {"scale": str(scale), "connect.decimal.precision": str(packed >> 16 & 0xFFFF)}
    return schema("bytes", _CONNECT + "Decimal", parameters=parameters)


def _bits_schema(oid: int, modifier: int) -> Schema:
    if oid == oids.BIT and modifier == 1:
        return schema("boolean")
    length = modifier if modifier > 0 else _BITS_MAX
    return schema("bytes", _DATA + "Bits", parameters={"length": str(length)})


_VARIABLE_SCALE: Final = schema(
    "struct",
    _DATA + "VariableScaleDecimal",
    doc="Variable scaled decimal",
    fields=[field("scale", _INT32), field("value", schema("bytes"))],
)
_POINT: Final = schema(
    "struct",
    _DATA + "geometry.Point",
    doc="Geometry (POINT)",
    fields=[
        field("x", schema("double")),
        field("y", schema("double")),
        field("wkb", schema("bytes"), optional=True),
        field("srid", _INT32, optional=True),
    ],
)


# Keys, rows, envelopes ------------------------------------------------------------------------------------------------


def column_field(column: Column, types: Types, modes: Modes) -> Schema:
    """The schema of a column as a field of its row."""
    of = column_schema(column.type_oid, column.modifier, types, modes)
    return field(column.name, of, optional=not column.not_null)


def key_columns(relation: Relation) -> tuple[int, ...]:
    """The columns that make a record's key, in the order of the key; empty where the table has none.

    The primary key, or where the log does not always carry that, the index that is the replica identity.
    """
    names = [column.name for column in relation.columns]
    flagged = tuple(index for index, column in enumerate(relation.columns) if column.key)
    primary = tuple(names.index(name) for name in relation.primary_key if name in names)
    whole = len(primary) == len(relation.primary_key) > 0
    if whole and (relation.identity in "fn" or not flagged or set(primary) <= set(flagged)):
        return primary
    return () if relation.identity == "f" else flagged


def key_schema(topic: str, fields: list[Schema]) -> Schema:
    """The key's schema: key columns are never null."""
    return schema("struct", f"{topic}.Key", version=None, fields=[{**f, "optional": False} for f in fields])


def envelope_schema(topic: str, fields: list[Schema]) -> Schema:
    """The value's schema: before, after, and all that is around them."""
    row = schema("struct", f"{topic}.Value", version=None, optional=True, fields=fields)
    return schema(
        "struct",
        f"{topic}.Envelope",
        version=2,
        fields=[
            field("before", row),
            field("after", row),
            field("source", SOURCE),
            field("transaction", BLOCK),
            field("op", _STRING),
            *_STAMPS,
        ],
    )


def _optional(kind: str, *names: str) -> list[Schema]:
    return [field(name, schema(kind, optional=True)) for name in names]


def _required(kind: str, *names: str) -> list[Schema]:
    return [field(name, schema(kind)) for name in names]


_STAMPS: Final = _optional("int64", "ts_ms", "ts_us", "ts_ns")
_SNAPSHOT: Final = {
    **enum_schema(
        ("true", "first", "first_in_data_collection", "last_in_data_collection", "last", "false", "incremental")
    ),
    "optional": True,
}
SOURCE: Final = schema(
    "struct",
    "io.debezium.connector.postgresql.Source",
    fields=[
        *_required("string", "version", "connector", "name"),
        *_required("int64", "ts_ms"),
        field("snapshot", _SNAPSHOT, default="false"),
        *_required("string", "db"),
        *_optional("string", "sequence"),
        *_optional("int64", "ts_us", "ts_ns"),
        *_required("string", "schema", "table"),
        *_optional("int64", "txId", "lsn", "xmin"),
        *_optional("string", "origin"),
        *_optional("int64", "origin_lsn"),
    ],
)
"""The source block."""

BLOCK: Final = schema(
    "struct",
    "event.block",
    optional=True,
    fields=[*_required("string", "id"), *_required("int64", "total_order", "data_collection_order")],
)
"""The transaction block."""

_COMMON: Final = "io.debezium.connector.common."
_POSTGRESQL: Final = "io.debezium.connector.postgresql."

TRANSACTION_KEY: Final = schema("struct", _COMMON + "TransactionMetadataKey", fields=_required("string", "id"))
TRANSACTION_VALUE: Final = schema(
    "struct",
    _COMMON + "TransactionMetadataValue",
    fields=[
        *_required("string", "status", "id"),
        *_optional("int64", "event_count"),
        field(
            "data_collections",
            schema(
                "array",
                optional=True,
                items=schema(
                    "struct",
                    "event.collection",
                    optional=True,
                    fields=[*_required("string", "data_collection"), *_required("int64", "event_count")],
                ),
            ),
        ),
        *_required("int64", "ts_ms"),
    ],
)
HEARTBEAT_KEY: Final = schema("struct", _COMMON + "ServerNameKey", fields=_required("string", "serverName"))
HEARTBEAT_VALUE: Final = schema("struct", _COMMON + "Heartbeat", fields=_required("int64", "ts_ms"))

MESSAGE_KEY: Final = schema("struct", _POSTGRESQL + "MessageKey", fields=_optional("string", "prefix"))


def message_schema(modes: Modes) -> Schema:
    """The value's schema of what ``pg_logical_emit_message`` wrote."""
    content = "bytes" if modes.binary == "bytes" else "string"
    message = schema(
        "struct", _POSTGRESQL + "Message", fields=[*_optional("string", "prefix"), *_optional(content, "content")]
    )
    return schema(
        "struct",
        _POSTGRESQL + "MessageValue",
        fields=[
            *_required("string", "op"),
            *_optional("int64", "ts_ms"),
            field("source", SOURCE),
            field("transaction", BLOCK),
            field("message", message),
        ],
    )
