"""Debezium's records to changes, ours or its own, with schemas in them or without.

https://debezium.io/documentation/reference/stable/connectors/postgresql.html#postgresql-events

A record is told apart by its form, not by its topic. Values become PostgreSQL's text only where they are wanted, by
:class:`Table`: with the schema that came along, or with the one that the follower's own columns would have.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, NamedTuple
from zlib import crc32

from orjson import loads

from cdc.debezium.schema import Modes, Schema, column_schema, schema
from cdc.debezium.texts import UNKNOWN, Read, column_reader, reader
from cdc.debezium.values import unavailable
from cdc.errors import DecodeError, SchemaError
from cdc.events import StoredEvent
from cdc.position import Position
from cdc.record import NULL, UNCHANGED, Column, Relation, Value
from cdc.wire import oids
from cdc.wire.oids import BUILTIN

Fields = tuple[Schema, ...]
Payload = Mapping[str, Any]
_WITH_ROW: Final = frozenset("cur")
_SCHEMAS_HELD: Final = 64  # distinct schemas of a topic remembered by their bytes


class Event(NamedTuple):
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
        return self._replace(xid=None, order=0)


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
        self._schemas: dict[str, dict[bytes, _Known]] = {}
        self._source: _Source | None = None
        self._block: tuple[str, str] = ("", "")
        self._last: dict[str, _Last] = {}

    def decode(self, record: StoredEvent) -> Item:
        """
        :raises DecodeError: the record is not one of Debezium's.
        """
        try:
            return self._decode(record)
        except DecodeError as error:
            where = f"topic {record.place.topic!r}, partition {record.place.partition}, offset {record.offset}"
            raise DecodeError(f"{error} ({where})", remedy=error.remedy) from error

    def decode_all(self, records: Iterable[StoredEvent]) -> list[Item]:
        """As :meth:`decode`, of many records in order; faster where they are like the one before."""
        return [self._alike(record) or self.decode(record) for record in records]

    def _alike(self, record: StoredEvent) -> Event | None:  # noqa: PLR0911 - the hot path
        """A new row of the same table and transaction as the last one, in the same form; None for anything else."""
        place, _, key_bytes, value, _ = record
        last = self._last.get(place.topic)
        if last is None or value is None or key_bytes is None:
            return None
        head, key_head, known = last
        if not value.startswith(head) or not key_bytes.startswith(key_head):
            return None
        try:
            payload = loads(value[len(head) : -1] if head else value)
            key = loads(key_bytes[len(key_head) : -1] if key_head else key_bytes)
            op, after, before, block = payload["op"], payload["after"], payload["before"], payload["transaction"]
            source = self._source
            if type(after) is not dict or type(key) is not dict or source is None or source.told != payload["source"]:
                return None
            xid, order = None, 0
            if block is not None:
                id_, order = block["id"], block["total_order"]
                if id_ != self._block[0] or type(order) is not int:
                    return None
                xid = self._block[1]
        except (ValueError, KeyError, TypeError):
            return None  # which says what is wrong
        if op not in _WITH_ROW or (before is not None and type(before) is not dict):
            return None
        fields = known.row_fields() if known is not None else None
        return Event(op, source.schema, source.table, source.position, key, before, after, fields, xid, order)

    def _decode(self, record: StoredEvent) -> Item:
        if record.value is None:
            return OTHER
        known, payload = self._opened(record.place.topic, record.value)
        if not isinstance(payload, dict):
            raise DecodeError(f"a value of {type(payload).__name__} where an object was expected")
        if "op" in payload and "source" in payload:
            if payload["op"] == "m":
                return OTHER
            key = None
            if record.key is not None:
                known_key, key = self._opened(record.place.topic + " key", record.key)
                self._remember(record, known, known_key)
            return self._event(known, payload, _object(key, "key", optional=True))
        if "status" in payload and "id" in payload:
            return _boundary(payload)
        if set(payload) == {"ts_ms"}:
            return OTHER
        raise DecodeError(
            f"an object with {', '.join(list(map(repr, payload))[:8])} is no event of Debezium's",
            remedy="produce whole events: without ExtractNewRecordState, CloudEvents or another format",
        )

    def _remember(self, record: StoredEvent, known: "_Known | None", known_key: "_Known | None") -> None:
        """What the next record of the topic probably begins with."""
        topic = record.place.topic
        heads = [head for head, each in self._schemas[topic].items() if each is known]
        key_heads = [head for head, each in self._schemas[topic + " key"].items() if each is known_key]
        if bool(heads) == (known is not None) and bool(key_heads) == (known_key is not None):
            self._last[topic] = _Last(heads[0] if heads else b"", key_heads[0] if key_heads else b"", known)

    def _event(self, known: "_Known | None", payload: Payload, key: Payload | None) -> Event:
        op = payload["op"]
        if op not in ("c", "u", "d", "r", "t"):
            raise DecodeError(f"unknown operation {op!r}")
        told = payload["source"]
        source = self._source
        # The events of a transaction repeat it word for word.
        if source is None or source.told != told:
            source = self._source = _source(told)
        before, after, block = payload.get("before"), payload.get("after"), payload.get("transaction")
        if type(before) is not dict:
            _object(before, "before", optional=True)
        if type(after) is not dict:
            _object(after, "after", optional=True)
        if (after is None) != (op in "dt"):
            raise DecodeError(f"operation {op!r} {'without' if after is None else 'with'} a row after it")
        xid, order = None, 0
        if block is not None:
            id_, order = _typed(_object(block, "transaction"), "id", str), _typed(block, "total_order", int)
            if self._block[0] != id_:
                self._block = id_, id_.partition(":")[0]
            xid = self._block[1]
        fields = known.row_fields() if known is not None else None
        return Event(op, source.schema, source.table, source.position, key, before, after, fields, xid, order)

    def _opened(self, topic: str, data: bytes) -> "tuple[_Known | None, Any]":
        """(schema, payload); the schema is None where there is none."""
        known = self._schemas.get(topic)
        if known is None:
            known = self._schemas[topic] = {}
        for head, seen in known.items():
            if data.startswith(head):
                return seen, _json(data[len(head) : -1])
        whole = _json(data)
        if not isinstance(whole, dict) or set(whole) != {"schema", "payload"}:
            return None, whole
        new = _Known(whole["schema"])
        head, found, _ = data.partition(b',"payload":')
        if found and _is_head(head + b"}", whole["schema"]):
            if len(known) >= _SCHEMAS_HELD:
                known.clear()
            known[head + found] = new
        return new, whole["payload"]


class _Last(NamedTuple):
    """Value and key of a topic's last event began with these; empty where they came without a schema."""

    head: bytes
    key_head: bytes
    known: "_Known | None"


class _Source(NamedTuple):
    """A source block and what of it is wanted."""

    told: Payload
    schema: str
    table: str
    position: Position


def _source(told: Any) -> _Source:
    source = _object(told, "source")
    history = f"{_typed(source, 'name', str)}/{_typed(source, 'db', str)}"
    position = Position(history, 1, _typed(source, "lsn", int, 0))
    return _Source(source, _typed(source, "schema", str), _typed(source, "table", str), position)


class _Known:
    """A schema that came along. Its rows' fields are the same object each time, by which they are told apart fast."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._fields: Fields | None = None

    def row_fields(self) -> Fields | None:
        if self._fields is None and self._schema is not None:
            self._fields = _row_fields(self._schema)
        return self._fields


def _json(data: bytes) -> Any:
    try:
        return loads(data)
    except ValueError as error:
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


def _row_fields(schema: Any) -> Fields:
    try:
        row = next(of for of in schema["fields"] if of["field"] == "after")
        return tuple(row["fields"])
    except (KeyError, TypeError, StopIteration):
        raise DecodeError("the schema describes no field 'after'") from None


def _is_table(told: Any) -> bool:
    """Messages are counted too: we name them by nothing, Debezium 3.5 by a Java object."""
    name = told.get("data_collection") if isinstance(told, dict) else None
    return name != "" and not str(name).startswith("io.debezium.connector.")


def _boundary(payload: Payload) -> Boundary:
    xid, _, lsn = _typed(payload, "id", str).partition(":")
    counts = {
        _typed(_object(each, "data_collections"), "data_collection", str): _typed(each, "event_count", int)
        for each in _typed(payload, "data_collections", list, [])
        if _is_table(each)
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
        self._read_all = [
            column_reader(of, known.get(of["field"], ""), read)
            for of, read in zip(self.fields, self._read, strict=True)
        ]
        self._keyed = tuple(self._names.index(name) for name in self.relation.primary_key)
        self._pick = itemgetter(*self._names) if len(self._names) > 1 else None
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

    def rows(self, payloads: Sequence[Payload]) -> tuple[list[tuple[bytes, ...]], list[tuple[bytes, ...]]] | None:
        """Keys and rows, column by column; None where a value did not change, or a row has to be looked at by itself.

        :raises DecodeError: as :meth:`row`.
        """
        width = len(self._names)
        if self._pick is None or {len(payload) for payload in payloads} != {width}:
            return None
        try:
            columns = list(zip(*map(self._pick, payloads), strict=True))
        except KeyError:
            return None
        if any(gone is not None and gone in column for gone, column in zip(self._placeholders, columns, strict=True)):
            return None
        shown = [read(column) for read, column in zip(self._read_all, columns, strict=True)]
        if any(NULL in shown[index] for index in self._keyed):
            return None
        keys = list(zip(*[shown[index] for index in self._keyed], strict=True))
        return keys, list(zip(*shown, strict=True))

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
    return tuple({**_declared_schema(declared[name], modes), "optional": True, "field": name} for name in names)


def _declared_schema(declared: str, modes: Modes) -> Schema:
    known = _declared_type(declared)
    return schema("string", UNKNOWN) if known is None else column_schema(*known, {}, modes)


@lru_cache(1024)
def _declared_type(declared: str) -> tuple[int, int] | None:
    """OID and modifier of a type as format_type() prints it; None for one that is not built in, its array text's."""
    found = _DECLARED.fullmatch(declared)
    if found is None:
        return None
    name, first, second, zone, array = found.groups()
    oid = _BY_SQL.get(name + (zone or "") + ("[]" if array else ""))
    if oid is None:
        return (_ARRAYS[oids.TEXT], -1) if array else None
    if first is None:
        return oid, 1 if name == "bit" else -1
    if name == "numeric":
        return oid, (int(first) << 16 | int(second or 0) & 0x7FF) + 4
    return oid, int(first)


_BY_SQL: Final = {builtin.sql: oid for oid, builtin in BUILTIN.items()}
