"""Debezium's records to changes, ours or its own, with schemas in them or without.

https://debezium.io/documentation/reference/stable/connectors/postgresql.html#postgresql-events

A record is told apart by its form, not by its topic. Values become PostgreSQL's text only where they are wanted, by
:class:`Table`: with the schema that came along, or with the one that the follower's own columns would have.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final
from zlib import crc32

from cdc.debezium.schema import Modes, Schema, column_schema
from cdc.debezium.texts import Read, reader
from cdc.debezium.values import unavailable
from cdc.errors import DecodeError, SchemaError
from cdc.events import StoredEvent
from cdc.position import Position
from cdc.record import NULL, UNCHANGED, Column, Relation, Value
from cdc.wire import oids
from cdc.wire.oids import BUILTIN

Fields = tuple[Schema, ...]
Payload = Mapping[str, Any]
_SCHEMAS_HELD: Final = 64  # distinct schemas of a topic remembered by their bytes


@dataclass(frozen=True, slots=True)
class Event:
    """One change. ``fields`` describes ``before`` and ``after``, None where no schema came along.

    ``xid`` and ``order`` are its transaction and its place there; None and 0 where the record does not tell.
    """

    op: str
    schema: str
    table: str
    position: Position
    key: Payload | None
    before: Payload | None
    after: Payload | None
    fields: Fields | None = None
    xid: str | None = None
    order: int = 0

    @property
    def label(self) -> str:
        """As a transaction's end names it."""
        return f"{self.schema}.{self.table}"

    def alone(self) -> "Event":
        """The same change, of no transaction."""
        return replace(self, xid=None, order=0)


@dataclass(frozen=True, slots=True)
class Boundary:
    """A transaction begins, or ended with ``counts`` events in each table. ``lsn`` is that of its id, 0 without one."""

    xid: str
    lsn: int
    ended: bool
    counts: Mapping[str, int]


class Other:
    """A record without an effect on rows: a tombstone, a heartbeat, a message."""


OTHER: Final = Other()
Item = Event | Boundary | Other


class Decoder:
    """Decodes records. Remembers the schemas it has seen, since all records of a table begin with the same bytes."""

    def __init__(self) -> None:
        self._schemas: dict[str, dict[bytes, Any]] = {}

    def decode(self, record: StoredEvent) -> Item:
        """
        :raises DecodeError: the record is not one of Debezium's.
        """
        try:
            return self._decode(record)
        except DecodeError as error:
            where = f"topic {record.place.topic!r}, partition {record.place.partition}, offset {record.offset}"
            raise DecodeError(f"{error} ({where})", remedy=error.remedy) from error

    def _decode(self, record: StoredEvent) -> Item:
        if record.value is None:
            return OTHER
        schema, payload = self._opened(record.place.topic, record.value)
        if not isinstance(payload, dict):
            raise DecodeError(f"a value of {type(payload).__name__} where an object was expected")
        if "op" in payload and "source" in payload:
            if payload["op"] == "m":
                return OTHER
            _, key = self._opened(record.place.topic + " key", record.key) if record.key is not None else (None, None)
            return _event(schema, payload, _object(key, "key", optional=True))
        if "status" in payload and "id" in payload:
            return _boundary(payload)
        if set(payload) == {"ts_ms"}:
            return OTHER
        raise DecodeError(
            f"an object with {', '.join(list(map(repr, payload))[:8])} is no event of Debezium's",
            remedy="produce whole events: without ExtractNewRecordState, CloudEvents or another format",
        )

    def _opened(self, topic: str, data: bytes) -> tuple[Any, Any]:
        """(schema, payload); the schema is None where there is none."""
        known = self._schemas.setdefault(topic, {})
        for head, schema in known.items():
            if data.startswith(head):
                return schema, _json(data[len(head) : -1])
        whole = _json(data)
        if not isinstance(whole, dict) or set(whole) != {"schema", "payload"}:
            return None, whole
        head, found, _ = data.partition(b',"payload":')
        if found and _is_head(head + b"}", whole["schema"]):
            if len(known) >= _SCHEMAS_HELD:
                known.clear()
            known[head + found] = whole["schema"]
        return whole["schema"], whole["payload"]


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"not JSON: {error}", remedy="produce events with Connect's JsonConverter") from error


def _is_head(head: bytes, schema: Any) -> bool:
    try:
        return bool(_json(head) == {"schema": schema})
    except DecodeError:
        return False


def _object(value: Any, what: str, *, optional: bool = False) -> Any:
    if isinstance(value, dict) or (optional and value is None):
        return value
    raise DecodeError(f"{what} is {type(value).__name__} where an object was expected")


def _typed(of: Payload, name: str, kind: type, default: Any = None) -> Any:
    value = of.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not kind:
        raise DecodeError(f"{name!r} is {value!r} where {kind.__name__} was expected")
    return value


def _event(schema: Any, payload: Payload, key: Payload | None) -> Event:
    op = payload["op"]
    if op not in ("c", "u", "d", "r", "t"):
        raise DecodeError(f"unknown operation {op!r}")
    source = _object(payload["source"], "source")
    block = _object(payload.get("transaction"), "transaction", optional=True)
    before = _object(payload.get("before"), "before", optional=True)
    after = _object(payload.get("after"), "after", optional=True)
    if (after is None) != (op in "dt"):
        raise DecodeError(f"operation {op!r} {'without' if after is None else 'with'} a row after it")
    history = f"{_typed(source, 'name', str)}/{_typed(source, 'db', str)}"
    return Event(
        op,
        _typed(source, "schema", str),
        _typed(source, "table", str),
        Position(history, 1, _typed(source, "lsn", int, 0)),
        key,
        before,
        after,
        _row_fields(schema) if schema is not None else None,
        _typed(block, "id", str).partition(":")[0] if block is not None else None,
        _typed(block, "total_order", int) if block is not None else 0,
    )


def _row_fields(schema: Any) -> Fields:
    try:
        row = next(of for of in schema["fields"] if of["field"] == "after")
        return tuple(row["fields"])
    except (KeyError, TypeError, StopIteration):
        raise DecodeError("the schema describes no field 'after'") from None


def _boundary(payload: Payload) -> Boundary:
    xid, _, lsn = _typed(payload, "id", str).partition(":")
    counts = {
        _typed(_object(each, "data_collections"), "data_collection", str): _typed(each, "event_count", int)
        for each in _typed(payload, "data_collections", list, [])
    }
    status = payload["status"]
    if status not in ("BEGIN", "END") or not (lsn or "0").isdigit() or len(lsn) > 20:
        raise DecodeError(f"a transaction {payload['id']!r} with status {status!r}")
    return Boundary(xid, int(lsn or 0), status == "END", counts)


# Rows -----------------------------------------------------------------------------------------------------------------


class Table:
    """Turns rows of one shape into values: text behind its length, NULL or UNCHANGED (:mod:`cdc.record`).

    ``declared`` are the follower's columns, name to type; None where it has no such table.
    """

    def __init__(self, event: Event, declared: Mapping[str, str] | None, modes: Modes) -> None:
        self.fields = event.fields if event.fields is not None else _declared_fields(event, declared, modes)
        self.relation = _relation(event, self.fields)
        known = declared or {}
        self._names = [of["field"] for of in self.fields]
        self._read: list[Read] = [reader(of, modes, known.get(of["field"], "")) for of in self.fields]
        self._placeholders = [
            _placeholder(column, of, modes) for column, of in zip(self.relation.columns, self.fields, strict=True)
        ]

    def row(self, payload: Payload) -> tuple[Value, ...]:
        """
        :raises DecodeError: the row is not of this shape.
        """
        if len(payload) != len(self._names):
            odd = sorted(set(payload) ^ set(self._names))
            raise DecodeError(f"a row of {self.relation.label} with or without {', '.join(map(repr, odd))}")
        return tuple(
            [
                self._value(payload, name, read, gone)
                for name, read, gone in zip(self._names, self._read, self._placeholders, strict=True)
            ]
        )

    def key(self, payload: Payload) -> tuple[bytes, ...]:
        """The values of the key's columns, in the order of the relation's primary key."""
        values = []
        for name in self.relation.primary_key:
            value = self._value(payload, name, self._read[self._names.index(name)], None)
            if value is UNCHANGED or value == NULL:
                raise DecodeError(f"a key of {self.relation.label} whose {name!r} is null")
            values.append(value)
        return tuple(values)

    def _value(self, payload: Payload, name: str, read: Read, gone: Any) -> Value:
        try:
            value = payload[name]
        except KeyError:
            raise DecodeError(f"a row or key of {self.relation.label} without {name!r}") from None
        if value is None:
            return NULL
        if gone is not None and value == gone:
            return UNCHANGED
        text = read(value).encode()
        return len(text).to_bytes(4) + text


def _relation(event: Event, fields: Fields) -> Relation:
    keyed = tuple(event.key or ())
    names = [of["field"] for of in fields]
    if missing := [name for name in keyed if name not in names]:
        raise DecodeError(f"the key of {event.label} names {missing[0]!r}, which its rows do not have")
    columns = tuple(_column(of, key=of["field"] in keyed) for of in fields)
    # Some number that stays the same: the format has none.
    number = crc32(event.label.encode()) & 0x7FFFFFFF
    return Relation(number, event.schema, event.table, "d" if keyed else "f", columns, keyed)


_TYPES: Final[Mapping[str, int]] = {
    "boolean": oids.BOOL,
    "int8": oids.INT2,
    "int16": oids.INT2,
    "int32": oids.INT4,
    "int64": oids.INT8,
    "float": oids.FLOAT4,
    "double": oids.FLOAT8,
    "string": oids.TEXT,
    "bytes": oids.BYTEA,
}
_LOGICAL: Final[Mapping[str, int]] = {
    "Json": oids.JSONB,
    "Xml": oids.XML,
    "Uuid": oids.UUID,
    "Tsvector": oids.TSVECTOR,
    "Date": oids.DATE,
    "IsoDate": oids.DATE,
    "Time": oids.TIME,
    "MicroTime": oids.TIME,
    "NanoTime": oids.TIME,
    "IsoTime": oids.TIME,
    "Timestamp": oids.TIMESTAMP,
    "MicroTimestamp": oids.TIMESTAMP,
    "NanoTimestamp": oids.TIMESTAMP,
    "IsoTimestamp": oids.TIMESTAMP,
    "ZonedTimestamp": oids.TIMESTAMPTZ,
    "ZonedTime": oids.TIMETZ,
    "MicroDuration": oids.INTERVAL,
    "Interval": oids.INTERVAL,
    "VariableScaleDecimal": oids.NUMERIC,
    "Point": oids.POINT,
    "Bits": oids.VARBIT,
}
_ARRAYS: Final = {builtin.base: oid for oid, builtin in BUILTIN.items() if builtin.kind == "array"}


def _column(of: Schema, *, key: bool) -> Column:
    try:
        type_oid, modifier = _column_type(of)
        return Column(of["field"], type_oid, modifier, key=key, not_null=not of["optional"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DecodeError(f"a field's schema is malformed: {str(of)[:80]}") from error


def _column_type(of: Schema) -> tuple[int, int]:
    """The PostgreSQL type that takes every value of the schema."""
    if of["type"] == "array":
        return _ARRAYS[_column_type(of["items"])[0]], -1
    logical = (of.get("name") or "").rpartition(".")[2]
    if logical == "Decimal":
        scale, precision = int(of["parameters"]["scale"]), int(of["parameters"].get("connect.decimal.precision", 0))
        return oids.NUMERIC, (precision << 16 | scale & 0x7FF) + 4 if 0 < precision <= 1000 else -1
    return _LOGICAL.get(logical) or _TYPES.get(of["type"]) or oids.TEXT, -1


def _placeholder(column: Column, of: Schema, modes: Modes) -> Any:
    shown = unavailable(column.type_oid, of, {}, modes)
    return None if shown is None else json.loads(shown)


# Without schemas ------------------------------------------------------------------------------------------------------

_DECLARED: Final = re.compile(r"([^()]+?)(?:\((\d+)(?:,(-?\d+))?\))?( with(?:out)? time zone)?((?:\[\])*)")


def _declared_fields(event: Event, declared: Mapping[str, str] | None, modes: Modes) -> Fields:
    """The schemas that the follower's own columns would have."""
    names = list(event.after or event.before or ())
    if declared is None:
        raise SchemaError(
            f"the follower has no table {event.label}, and its events come without schemas to make it from",
            remedy="create the table, or produce events with schemas.enable=true",
        )
    missing = [name for name in names if name not in declared]
    if missing:
        raise SchemaError(
            f"the follower's table {event.label} has no column {', '.join(map(repr, missing))}",
            remedy="add it there, with the leader's type",
        )
    return tuple(
        {**column_schema(*_declared_type(declared[name]), {}, modes), "optional": True, "field": name} for name in names
    )


@lru_cache(1024)
def _declared_type(declared: str) -> tuple[int, int]:
    """OID and modifier of a type as format_type() prints it; text for one that is not built in."""
    found = _DECLARED.fullmatch(declared)
    if found is None:
        return oids.TEXT, -1
    name, first, second, zone, array = found.groups()
    oid = _BY_SQL.get(name + (zone or "") + ("[]" if array else ""))
    if oid is None:
        return _ARRAYS[oids.TEXT] if array else oids.TEXT, -1
    if first is None:
        return oid, 1 if name == "bit" else -1
    if name == "numeric":
        return oid, (int(first) << 16 | int(second or 0) & 0x7FF) + 4
    return oid, int(first)


_BY_SQL: Final = {builtin.sql: oid for oid, builtin in BUILTIN.items()}
