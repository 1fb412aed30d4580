"""PostgreSQL's values to JSON as Connect's JsonConverter writes them, and back to PostgreSQL's text.

https://debezium.io/documentation/reference/stable/connectors/postgresql.html#postgresql-data-types

What the format cannot carry is refused by name (SchemaError): infinite dates and intervals, NaN in a ``precise``
decimal, arrays of several dimensions or with other bounds. What it carries with a loss that is Debezium's own: an
``interval`` as a number (a month is 30.4375 days), the zone of a ``timetz``, the leading zeros of a ``varbit``, and
digits below the millisecond in the time mode ``connect``.
"""

import json
import re
import struct
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import md5
from math import isinf
from typing import Any, Final
from uuid import UUID

from cdc.debezium import times
from cdc.debezium.schema import Modes, Schema, Types, column_schema
from cdc.errors import DecodeError, SchemaError
from cdc.record import NULL, Column
from cdc.wire import oids
from cdc.wire.oids import BUILTIN
from cdc.wire.pgoutput import PG_EPOCH_US
from cdc.wire.values import numbers, text_reader

Write = Callable[[bytes], str]
"""A value's bytes, without the length, to JSON."""
WriteText = Callable[[str], str]
"""A value's canonical PostgreSQL text to JSON."""
WriteAll = Callable[[Sequence[bytes]], list[bytes]]
"""Values of one column behind their lengths, NULL among them, to JSON."""

_INT64_MAX: Final = 2**63 - 1
_INFINITE_TIMESTAMP: Final = {"infinity": 9223372036825200000, "-infinity": -9223372036832400000}
_FINITE_TIMESTAMP: Final = {number: text for text, number in _INFINITE_TIMESTAMP.items()}

quoted: Final[Callable[[str], str]] = json.encoder.encode_basestring
compact: Final[Callable[[Any], str]] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def writer(column: Column, form: str, types: Types, modes: Modes) -> Write:
    """How to write the values of a column whose wire form is ``b`` (binary) or ``t`` (text).

    The function raises DecodeError for malformed bytes and SchemaError for what the format cannot carry.

    :raises SchemaError: the type is not described, or its binary form is not known.
    """
    of = column_schema(column.type_oid, column.modifier, types, modes)
    base = _base(column.type_oid, types)
    if form == "b" and (fast := _fast(base, of, modes, column.modifier)) is not None:
        return _guarded(fast, column)
    write = _text_writer(column.type_oid, of, types, modes, column.modifier)
    if form == "b":
        text = text_reader(column.type_oid, types)
        return _guarded(lambda data: write(text(data)), column)
    if base == oids.MONEY:
        return _guarded(lambda data: write(numbers.money_of_text(data)), column)
    return _guarded(lambda data: write(data.decode()), column)


def _base(type_oid: int, types: Types) -> int:
    for _ in range(32):
        known = types.get(type_oid)
        if type_oid in BUILTIN or known is None or known.kind != "domain":
            break
        type_oid = known.base
    return type_oid


def _guarded(write: Write, column: Column) -> Write:
    def guarded(data: bytes) -> str:
        try:
            return write(data)
        except (ValueError, KeyError, struct.error, IndexError) as error:
            shown = data[:32].hex() + ("…" if len(data) > 32 else "")
            raise DecodeError(f"malformed value {shown} of column {column.name!r}: {error}") from error
        except _UnspeakableError as error:
            raise SchemaError(
                f"column {column.name!r} holds {error}, which the event format cannot carry", remedy=error.remedy
            ) from error

    return guarded


class _UnspeakableError(Exception):
    def __init__(self, what: str, remedy: str = "ship this table natively, without `--codec debezium-json`") -> None:
        super().__init__(what)
        self.remedy = remedy


# A column of many rows at once ----------------------------------------------------------------------------------------

_WIDE: Final[Mapping[int, tuple[int, struct.Struct]]] = {
    oids.INT2: (2, struct.Struct(">ih")),
    oids.INT4: (4, struct.Struct(">ii")),
    oids.INT8: (8, struct.Struct(">iq")),
    oids.OID: (4, struct.Struct(">iI")),
}
"""Integers: their size, and how one stands behind it."""


def column_writer(column: Column, form: str, types: Types, write: Write) -> WriteAll:
    """How to write many values of a column at once; ``write`` is how to write one (:func:`writer`)."""

    def write_all(values: Sequence[bytes]) -> list[bytes]:
        # Columns repeat themselves, and what does not costs little more than without the table.
        shown = {value: b"null" if value == NULL else write(value[4:]).encode() for value in set(values)}
        return list(map(shown.__getitem__, values))

    wide = _WIDE.get(_base(column.type_oid, types)) if form == "b" else None
    if wide is None:
        return write_all
    size, layout = wide

    def write_integers(values: Sequence[bytes]) -> list[bytes]:
        joined = b"".join(values)
        if len(joined) == layout.size * len(values):
            pairs = list(layout.iter_unpack(joined))
            if {told for told, _ in pairs} == {size}:
                return [b"%d" % number for _, number in pairs]
        return write_all(values)

    return write_integers


# Straight from the binary form ----------------------------------------------------------------------------------------


def _unpacked(layout: struct.Struct) -> Write:
    unpack = layout.unpack
    return lambda data: str(unpack(data)[0])


def _text(data: bytes) -> str:
    return quoted(data.decode())


def _boolean(data: bytes) -> str:
    return "true" if numbers.boolean(data) else "false"


_FAST: Final[Mapping[int, Write]] = {
    oids.BOOL: _boolean,
    oids.INT2: _unpacked(numbers.INT2),
    oids.INT4: _unpacked(numbers.INT4),
    oids.INT8: _unpacked(numbers.INT8),
    oids.OID: _unpacked(numbers.UINT4),
    oids.TEXT: _text,
    oids.VARCHAR: _text,
    oids.BPCHAR: _text,
    oids.JSON: _text,
}


def _fast(base: int, of: Schema, modes: Modes, modifier: int) -> Write | None:
    if base == oids.BYTEA:
        return bytes_writer(modes)
    if base == oids.TIMESTAMP and of["type"] == "int64":
        return _fast_timestamp(of)
    if base == oids.TIMESTAMPTZ:
        return _fast_timestamptz(_digits(modifier))
    return _FAST.get(base)


def _fast_timestamp(of: Schema) -> Write:
    slow = _BY_NAME[of["name"]]
    if not of["name"].endswith("MicroTimestamp"):
        return lambda data: slow(_TIMESTAMP_TEXT(data))

    def write(data: bytes) -> str:
        us = _unix_us(data)
        return slow(_TIMESTAMP_TEXT(data)) if us is None else str(us)

    return write


def _fast_timestamptz(digits: int) -> Write:
    slow = _zoned_timestamp(digits)

    def write(data: bytes) -> str:
        us = _unix_us(data)
        return slow(_TIMESTAMPTZ_TEXT(data)) if us is None else f'"{times.iso_timestamp(us, digits)}"'

    return write


def _digits(modifier: int) -> int:
    """Of a second, in a timestamp of that modifier."""
    return modifier if 0 <= modifier <= _DIGITS_MAX else _DIGITS_MAX


_DIGITS_MAX: Final = 6


def _unix_us(data: bytes) -> int | None:
    """Microseconds since 1970 of a timestamp in binary form; None near the ends of the calendar, and for infinity."""
    us: int = numbers.INT8.unpack(data)[0]
    return us + PG_EPOCH_US if abs(us) < _ORDINARY_US else None


_ORDINARY_US: Final = 200_000_000_000_000_000  # some 6,300 years around 2000
_TIMESTAMP_TEXT: Final = text_reader(oids.TIMESTAMP, {})
_TIMESTAMPTZ_TEXT: Final = text_reader(oids.TIMESTAMPTZ, {})


def bytes_writer(modes: Modes) -> Write:
    """How ``binary.handling.mode`` writes bytes."""
    if modes.binary == "hex":
        return lambda data: f'"{data.hex()}"'
    encode = urlsafe_b64encode if modes.binary == "base64-url-safe" else b64encode
    return lambda data: f'"{encode(data).decode()}"'


# From text ------------------------------------------------------------------------------------------------------------


def _text_writer(  # noqa: PLR0911 - one for each kind of schema
    type_oid: int, of: Schema, types: Types, modes: Modes, modifier: int
) -> WriteText:
    base = _base(type_oid, types)
    known = BUILTIN.get(base) or types.get(base)
    if of["type"] == "array" and known is not None:
        delimiter = ";" if _base(known.base, types) == oids.BOX else ","
        return _array_writer(_text_writer(known.base, of["items"], types, modes, modifier), delimiter)
    if base == oids.BYTEA:
        write = bytes_writer(modes)
        return lambda text: write(_bytes_of_text(text))
    if known is not None and known.name == "hstore":
        return _hstore_json
    name = of.get("name", "")
    if name.endswith(".ZonedTimestamp"):
        return _zoned_timestamp(_digits(modifier))
    if name.endswith(".Decimal"):
        scale = int(of["parameters"]["scale"])
        return lambda text: f'"{_base64_integer(_unscaled(text, scale))}"'
    if name.endswith(".Bits"):
        length = int(of["parameters"]["length"])
        return lambda text: _bits(text, length)
    return _BY_NAME.get(name) or _BY_TYPE[of["type"]]


def _bytes_of_text(text: str) -> bytes:
    if not text.startswith("\\x"):
        raise ValueError("not in hex: the server's bytea_output must be hex")
    return bytes.fromhex(text[2:])


def _number(text: str) -> str:
    if text in ("NaN", "Infinity", "-Infinity"):
        return f'"{text}"'
    number = float(text)
    if isinf(number):
        raise _UnspeakableError(f"{text} as a double", "use `--decimal-handling string`")
    return repr(number)


def _integer(text: str) -> str:
    return str(int(text))


_TRUTH: Final = {"t": "true", "1": "true", "f": "false", "0": "false"}

_BY_TYPE: Final[Mapping[str, WriteText]] = {
    "boolean": _TRUTH.__getitem__,
    "int16": _integer,
    "int32": _integer,
    "int64": _integer,
    "float": _number,
    "double": _number,
    "string": quoted,
}


def _unscaled(text: str, scale: int) -> int:
    if text in ("NaN", "Infinity", "-Infinity"):
        raise _UnspeakableError(f"the number {text}", "use `--decimal-handling string`")
    whole, _, part = text.partition(".")
    if scale >= 0:
        kept, rest = part[:scale].ljust(scale, "0"), part[scale:]
        if rest.strip("0"):
            raise ValueError(f"{text} has more than {scale} digits")
        return int(whole + kept)
    units, rest_ = divmod(int(whole), int(10**-scale))
    if rest_ or part.strip("0"):
        raise ValueError(f"{text} is no multiple of 10^{-scale}")
    return units


def _base64_integer(number: int) -> str:
    """Two's complement, big-endian, as few bytes as it takes."""
    size = (number if number >= 0 else ~number).bit_length() // 8 + 1
    return b64encode(number.to_bytes(size, "big", signed=True)).decode()


def _variable_scale(text: str) -> str:
    scale = len(text.partition(".")[2])
    return f'{{"scale":{scale},"value":"{_base64_integer(_unscaled(text, scale))}"}}'


def _bits(text: str, length: int) -> str:
    """Little-endian; as many bytes as ``length`` bits fill, or where that is open, as the value does."""
    size = (min(length, len(text)) + 7) // 8
    return f'"{b64encode(int(text or "0", 2).to_bytes(size, "little")).decode()}"'


def _finite_days(text: str) -> int:
    if text in times.INFINITIES:
        raise _UnspeakableError(f"the date {text}")
    return times.days(text)


def _timestamp_number(multiply: int, divide: int) -> WriteText:
    def write(text: str) -> str:
        if text in times.INFINITIES:
            return str(_INFINITE_TIMESTAMP[text])
        number = times.timestamp_us(text) * multiply // divide
        if abs(number) > _INT64_MAX:
            raise _UnspeakableError(f"{text}, too far from 1970 for 64 bits", "use `--time-precision isostring`")
        return str(number)

    return write


def _time_number(multiply: int, divide: int) -> WriteText:
    return lambda text: str(times.clock_us(text) * multiply // divide)


def _iso_timestamp(text: str, digits: int | None = None) -> str:
    return f'"{text}"' if text in times.INFINITIES else f'"{times.iso_timestamp(times.timestamp_us(text), digits)}"'


def _zoned_timestamp(digits: int) -> WriteText:
    # The server's time zone is UTC: the offset is +00, before the era where there is one.
    return lambda text: _iso_timestamp(text.replace("+00", ""), digits)


def _finite(text: str) -> str:
    if text in times.INFINITIES:
        raise _UnspeakableError(f"the interval {text}")
    return text


def _point(text: str) -> str:
    x, y = text.strip("()").split(",")
    wkb = b64encode(struct.pack("<BIdd", 1, 1, float(x), float(y))).decode()
    return f'{{"x":{_number(x)},"y":{_number(y)},"wkb":"{wkb}","srid":null}}'


def _iso_time(text: str) -> str:
    return f'"{times.clock_text(times.clock_us(text))}Z"'


_IO: Final = "io.debezium.time."
_CONNECT: Final = "org.apache.kafka.connect.data."

_BY_NAME: Final[Mapping[str, WriteText]] = {
    _IO + "Date": lambda text: str(_finite_days(text)),
    _CONNECT + "Date": lambda text: str(_finite_days(text)),
    _IO + "IsoDate": lambda text: f'"{times.iso_date(_finite_days(text))}Z"',
    _IO + "Time": _time_number(1, 1000),
    _CONNECT + "Time": _time_number(1, 1000),
    _IO + "MicroTime": _time_number(1, 1),
    _IO + "NanoTime": _time_number(1000, 1),
    _IO + "IsoTime": _iso_time,
    _IO + "Timestamp": _timestamp_number(1, 1000),
    _CONNECT + "Timestamp": _timestamp_number(1, 1000),
    _IO + "MicroTimestamp": _timestamp_number(1, 1),
    _IO + "NanoTimestamp": _timestamp_number(1000, 1),
    _IO + "IsoTimestamp": _iso_timestamp,
    _IO + "ZonedTime": lambda text: f'"{times.iso_time_utc(text)}"',
    _IO + "MicroDuration": lambda text: str(times.interval_us(_finite(text))),
    _IO + "Interval": lambda text: f'"{times.iso_interval(_finite(text))}"',
    "io.debezium.data.VariableScaleDecimal": _variable_scale,
    "io.debezium.data.geometry.Point": _point,
}


# Arrays and hstore ----------------------------------------------------------------------------------------------------


def _array_writer(item: WriteText, delimiter: str) -> WriteText:
    def write(text: str) -> str:
        return f"[{','.join('null' if element is None else item(element) for element in _elements(text, delimiter))}]"

    return write


_ELEMENT: Final = re.compile(r'"((?:[^"\\]|\\.)*)"|((?:[^"\\{},]|\\.)+)', re.DOTALL)
_BOX: Final = re.compile(r"()([^;{}]+)")
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)


def _elements(text: str, delimiter: str) -> Iterator[str | None]:
    """The elements of an array literal of one dimension.

    https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO
    """
    if text == "{}":
        return
    if not text.startswith("{") or text.startswith("{{"):
        raise _UnspeakableError(f"the array {text[:40]}, not of one dimension that begins at 1")
    pattern = _ELEMENT if delimiter == "," else _BOX
    at = 1
    while (found := pattern.match(text, at)) is not None:
        at = found.end() + 1
        if found[2]:
            yield None if found[2].upper() == "NULL" else _ESCAPED.sub(r"\1", found[2])
        else:
            yield _ESCAPED.sub(r"\1", found[1])
        if text[at - 1 :] == "}":
            return
        if text[at - 1 : at] != delimiter:
            break
    raise ValueError(f"not an array at character {at}")


_PAIR: Final = re.compile(r'"((?:[^"\\]|\\.)*)"=>(?:(NULL)|"((?:[^"\\]|\\.)*)")(?:, |$)', re.DOTALL)


def _hstore_json(text: str) -> str:
    """``"a"=>"1", "b"=>NULL`` as a string of JSON.

    https://www.postgresql.org/docs/current/hstore.html
    """
    pairs: dict[str, str | None] = {}
    at = 0
    while at < len(text):
        found = _PAIR.match(text, at)
        if found is None:
            raise ValueError(f"not an hstore at character {at}")
        pairs[_ESCAPED.sub(r"\1", found[1])] = None if found[2] else _ESCAPED.sub(r"\1", found[3])
        at = found.end()
    return quoted(compact(pairs))


# What stands for a value that is not there ----------------------------------------------------------------------------

_ZEROES: Final[Mapping[str, str]] = {
    "boolean": "false",
    "float": "0.0",
    "double": "0.0",
    "string": '""',
    "bytes": '""',
    "array": "[]",
}
_EMPTIES: Final[Mapping[str, str]] = {
    _IO + "ZonedTimestamp": '"1970-01-01T00:00:00Z"',
    _IO + "ZonedTime": '"00:00:00Z"',
    _IO + "IsoDate": '"1970-01-01Z"',
    _IO + "IsoTime": '"00:00:00Z"',
    _IO + "IsoTimestamp": '"1970-01-01T00:00:00Z"',
    _IO + "Interval": '"P0Y0M0DT0H0M0S"',
    _CONNECT + "Decimal": '"AA=="',
    "io.debezium.data.VariableScaleDecimal": '{"scale":0,"value":"AA=="}',
    "io.debezium.data.geometry.Point": '{"x":0.0,"y":0.0,"wkb":"AQEAAAAAAAAAAAAAAAAAAAAAAAAA","srid":null}',
}


def fallback(of: Schema) -> str:
    """The JSON of a value the log did not carry: null, or where the column has none, its type's zero."""
    if of["optional"]:
        return "null"
    return _EMPTIES.get(of.get("name", "")) or _ZEROES.get(of["type"], "0")


def unavailable(type_oid: int, of: Schema, types: Types, modes: Modes) -> str | None:  # noqa: PLR0911 - one per kind
    """The JSON of Debezium's placeholder for a TOAST value that did not change; None where the type has none.

    https://debezium.io/documentation/reference/stable/connectors/postgresql.html#postgresql-toasted-values
    """
    raw = _placeholder_bytes(modes.placeholder)
    text = modes.placeholder
    kind = of["type"]
    known = BUILTIN.get(_base(type_oid, types)) or types.get(_base(type_oid, types))
    if known is not None and known.name == "hstore":
        return quoted(compact({text: text}))
    if _base(type_oid, types) == oids.BYTEA:
        return bytes_writer(modes)(raw)
    if kind == "string" and not of.get("name", "").startswith(_IO):
        return quoted(text)
    if kind != "array" or known is None:
        return None
    items = of["items"]
    if items["type"] in ("int16", "int32", "int64"):
        # The bytes are Java's, which are signed.
        return compact([byte - 256 if byte > 127 else byte for byte in raw])
    if items.get("name", "").endswith(".Uuid"):
        return compact([str(UUID(bytes=md5(raw, usedforsecurity=False).digest(), version=3))])
    element = unavailable(known.base, items, types, modes)
    return None if element is None else f"[{element}]"


def _placeholder_bytes(placeholder: str) -> bytes:
    return bytes.fromhex(placeholder[4:]) if placeholder.startswith("hex:") else placeholder.encode()
