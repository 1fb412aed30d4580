"""Connect's JSON values back to PostgreSQL's text, by their schema: the inverse of :mod:`cdc.debezium.values`.

What comes in was written by somebody else: every value is checked for its type and form.
"""

import json
import re
from base64 import b64decode, urlsafe_b64decode
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from cdc.debezium import times
from cdc.debezium.schema import Modes, Schema
from cdc.errors import DecodeError
from cdc.record import NULL

Read = Callable[[Any], str]
"""A parsed JSON value that is not null to PostgreSQL's text."""
ReadAll = Callable[[Sequence[Any]], list[bytes]]
"""Parsed JSON values of one field, null among them, to PostgreSQL's text behind its length, or NULL."""

_FINITE_LIMIT_US: Final = 9_223_372_036_800_000_000  # beyond it Debezium's two numbers mean infinity
_SCALE_MAX: Final = 16_383
_DECIMAL_BYTES_MAX: Final = 1 << 16
_NUMBER: Final = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?|NaN|-?Infinity")


def reader(of: Schema, modes: Modes, declared: str = "") -> Read:
    """How to read the values of a field. ``declared`` is the follower's type: it tells bytea from other strings.

    The function raises DecodeError for a value that is not of its schema.

    :raises DecodeError: the schema is of an unknown type.
    """
    read = _reader(of, modes, declared)
    label = of.get("field", of.get("name", of["type"]))

    def guarded(value: Any) -> str:
        try:
            return read(value)
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            shown = repr(value)
            shown = shown if len(shown) <= 64 else shown[:64] + "…"
            raise DecodeError(f"field {label!r}: {shown} is no {of.get('name') or of['type']}: {error}") from error

    return guarded


def column_reader(of: Schema, declared: str, read: Read) -> ReadAll:
    """How to read many values of a field at once; ``read`` is how to read one (:func:`reader`)."""
    plain = not of.get("name") and not declared.startswith(("bit", "bytea", "blob", "BLOB", "hstore"))
    limit = _INTEGERS.get(of["type"]) if plain else None
    is_text = plain and of["type"] == "string"

    def read_all(values: Sequence[Any]) -> list[bytes]:
        kinds = set(map(type, values))
        if kinds == {int} and limit is not None and -limit <= min(values) and max(values) < limit:
            return [_behind(b"%d" % value) for value in values]
        if kinds == {str} and is_text and "\0" not in (joined := "".join(values)) and joined.isascii():
            return [_behind(value.encode()) for value in values]
        if kinds <= {str, _NONE} or kinds <= {int, _NONE}:
            # Columns repeat themselves; values of one such type that are equal are the same.
            read_one = {value: NULL if value is None else _behind(read(value).encode()) for value in set(values)}
            return list(map(read_one.__getitem__, values))
        return [NULL if value is None else _behind(read(value).encode()) for value in values]

    return read_all


_NONE: Final = type(None)
_INTEGERS: Final[Mapping[str, int]] = {f"int{bits}": 1 << bits - 1 for bits in (8, 16, 32, 64)}
_LENGTHS: Final = [size.to_bytes(4) for size in range(256)]


def _behind(text: bytes) -> bytes:
    size = len(text)
    return (_LENGTHS[size] if size < 256 else size.to_bytes(4)) + text


def _reader(of: Schema, modes: Modes, declared: str) -> Read:  # noqa: PLR0911 - one for each kind of schema
    name, kind = of.get("name") or "", of["type"]
    if kind == "array":
        # Of all types only box has another delimiter (pg_type.typdelim).
        delimiter = ";" if declared == "box[]" else ","
        return _array_reader(_reader(of["items"], modes, declared.removesuffix("[]")), delimiter)
    if name.endswith(".Decimal"):
        scale = int(of["parameters"]["scale"])
        return lambda value: _decimal(value, scale)
    if name.endswith(".Bits"):
        return _bits_reader(int(of["parameters"]["length"]), varying="var" in declared)
    if declared in ("bytea", "blob", "BLOB") and kind == "string":
        return _encoded_bytes(modes)
    if declared == "hstore":
        return _hstore
    if declared.startswith("bit") and kind == "boolean":
        return lambda value: "1" if _exactly(bool, value) else "0"
    try:
        return _BY_NAME.get(name) or _BY_TYPE[kind]
    except KeyError:
        raise DecodeError(f"field {of.get('field')!r} is of schema type {kind!r} {name}, which is not known") from None


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a JSON {kind.__name__} was expected")
    return value


def _string(value: Any) -> str:
    if "\0" in _exactly(str, value):
        raise ValueError("PostgreSQL's text holds no zero byte")
    value.encode()  # JSON can spell half a surrogate pair, UTF-8 cannot
    return str(value)


def _integer(bits: int) -> Read:
    limit = 1 << bits - 1

    def read(value: Any) -> str:
        if not -limit <= _exactly(int, value) < limit:
            raise ValueError(f"beyond {bits} bits")
        return str(value)

    return read


def _number(value: Any) -> str:
    if type(value) is str and _NUMBER.fullmatch(value):
        return value
    if type(value) is int:
        return str(value)
    return repr(_exactly(float, value))


def _boolean(value: Any) -> str:
    return "t" if _exactly(bool, value) else "f"


def _raw(value: Any) -> bytes:
    return b64decode(_exactly(str, value), validate=True)


def _bytea(data: bytes) -> str:
    return "\\x" + data.hex()


def _encoded_bytes(modes: Modes) -> Read:
    if modes.binary == "hex":
        return lambda value: _bytea(bytes.fromhex(_exactly(str, value)))
    if modes.binary == "base64-url-safe":
        return lambda value: _bytea(urlsafe_b64decode(_exactly(str, value)))
    return lambda value: _bytea(_raw(value))


def _decimal(value: Any, scale: int) -> str:
    if abs(scale) > _SCALE_MAX:
        raise ValueError(f"a scale of {scale}")
    data = _raw(value)
    if not 0 < len(data) <= _DECIMAL_BYTES_MAX:
        raise ValueError(f"a number of {len(data)} bytes")
    number = int.from_bytes(data, "big", signed=True)
    return f"{Decimal((number < 0, tuple(map(int, _digits(abs(number)))), -scale)):f}"


def _digits(number: int) -> str:
    """Decimal digits, also of numbers longer than Python's own limit for untrusted text."""
    step = 10**4000
    parts: list[str] = []
    while number >= step:
        number, rest = divmod(number, step)
        parts.append(f"{rest:04000}")
    return str(number) + "".join(reversed(parts))


def _variable_scale(value: Any) -> str:
    fields = _exactly(dict, value)
    return _decimal(fields["value"], _exactly(int, fields["scale"]))


def _bits_reader(length: int, *, varying: bool) -> Read:
    def read(value: Any) -> str:
        data = _raw(value)
        number = int.from_bytes(data, "little")
        width = min(length, 8 * len(data))
        if number.bit_length() > width:
            raise ValueError(f"more than {width} bits")
        open_ended = varying or width < length
        return f"{number:b}" if open_ended and data else f"{number:0{width}b}" if width else ""

    return read


def _point(value: Any) -> str:
    fields = _exactly(dict, value)
    return f"({_number(fields['x'])},{_number(fields['y'])})"


def _date(value: Any) -> str:
    return times.date_text(_exactly(int, value))


def _time(multiply: int, divide: int) -> Read:
    def read(value: Any) -> str:
        us = _exactly(int, value) * multiply // divide
        if not 0 <= us <= times.DAY_US:
            raise ValueError("beyond a day")
        return times.clock_text(us)

    return read


_INFINITIES: Final = {9223372036825200000: "infinity", -9223372036832400000: "-infinity"}


def _timestamp(multiply: int, divide: int) -> Read:
    def read(value: Any) -> str:
        if _exactly(int, value) in _INFINITIES:
            return _INFINITIES[value]
        return times.timestamp_text(value * multiply // divide)

    return read


def _iso_timestamp(zone: str) -> Read:
    def read(value: Any) -> str:
        text = _exactly(str, value)
        if text in times.INFINITIES:
            return str(text)
        shown = times.timestamp_text(times.us_of_iso(text))
        return shown.removesuffix(" BC") + zone + (" BC" if shown.endswith(" BC") else "")

    return read


def _iso_time(zone: str) -> Read:
    def read(value: Any) -> str:
        return times.clock_text(times.clock_us(_exactly(str, value).removesuffix("Z"))) + zone

    return read


def _array_reader(item: Read, delimiter: str) -> Read:
    def element(value: Any) -> str:
        if value is None:
            return "NULL"
        return '"' + item(value).replace("\\", "\\\\").replace('"', '\\"') + '"'

    return lambda value: "{" + delimiter.join(element(each) for each in _exactly(list, value)) + "}"


def _hstore(value: Any) -> str:
    pairs = _exactly(dict, value if isinstance(value, dict) else json.loads(_exactly(str, value)))
    return ", ".join(f"{_hstore_quoted(k)}=>{'NULL' if v is None else _hstore_quoted(v)}" for k, v in pairs.items())


def _hstore_quoted(value: Any) -> str:
    return '"' + _string(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


UNKNOWN: Final = "unknown"
"""Names the schema of a field that came without one and whose type on the follower is not built in: an enum, or a
domain of who knows what."""


def _anything(value: Any) -> str:
    if type(value) is bool:
        return _boolean(value)
    return _string(value) if type(value) is str else _number(value)


_IO: Final = "io.debezium.time."
_CONNECT: Final = "org.apache.kafka.connect.data."

_BY_NAME: Final[Mapping[str, Read]] = {
    _IO + "Date": _date,
    _CONNECT + "Date": _date,
    _IO + "IsoDate": lambda value: times.date_text(times.days_of_iso(_exactly(str, value))),
    _IO + "Time": _time(1000, 1),
    _CONNECT + "Time": _time(1000, 1),
    _IO + "MicroTime": _time(1, 1),
    _IO + "NanoTime": _time(1, 1000),
    _IO + "IsoTime": _iso_time(""),
    _IO + "Timestamp": _timestamp(1000, 1),
    _CONNECT + "Timestamp": _timestamp(1000, 1),
    _IO + "MicroTimestamp": _timestamp(1, 1),
    _IO + "NanoTimestamp": _timestamp(1, 1000),
    _IO + "IsoTimestamp": _iso_timestamp(""),
    _IO + "ZonedTimestamp": _iso_timestamp("+00"),
    _IO + "ZonedTime": _iso_time("+00"),
    _IO + "MicroDuration": lambda value: f"{_exactly(int, value)} microseconds",
    _IO + "Interval": lambda value: times.interval_of_iso(_exactly(str, value)),
    UNKNOWN: _anything,
    "io.debezium.data.VariableScaleDecimal": _variable_scale,
    "io.debezium.data.geometry.Point": _point,
}
_BY_TYPE: Final[Mapping[str, Read]] = {
    "boolean": _boolean,
    "int8": _integer(8),
    "int16": _integer(16),
    "int32": _integer(32),
    "int64": _integer(64),
    "float": _number,
    "double": _number,
    "string": _string,
    "bytes": lambda value: _bytea(_raw(value)),
}
