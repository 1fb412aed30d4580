"""PostgreSQL values: from their binary send format to PostgreSQL's own text, or to Python values.

The text is what the server prints under ``DateStyle = ISO``, ``IntervalStyle = postgres``, ``TimeZone = UTC``,
``extra_float_digits = 1`` and ``bytea_output = hex``, in UTF-8. Money alone differs: see
:func:`cdc.wire.values.numbers.money`.
"""

import struct
from binascii import unhexlify
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from cdc.errors import DecodeError, SchemaError
from cdc.record import TypeDescription
from cdc.wire import oids
from cdc.wire.oids import BUILTIN
from cdc.wire.values import nested, numbers, others, times

PythonValue = bool | int | float | str | bytes
Reader = Callable[[bytes], str]
_T = TypeVar("_T")

_DEPTH_MAX: Final = 32  # of types in types, and of composites in composites
_SHOWN_BYTES: Final = 32
_TEXT_REMEDY: Final = "ship with `--values text`"


def text_reader(type_oid: int, types: Mapping[int, TypeDescription]) -> Reader:
    """A function from a value's bytes in binary send format, without the length, to its canonical text.

    The function raises DecodeError for malformed bytes, and SchemaError for a composite's field of unknown type: only
    the bytes tell a composite's field types.

    :raises SchemaError: the binary form of the type is not known here, or the type is not described.
    """
    return _guarded(_Readers(types).reader(type_oid), _label(type_oid, types))


def python_reader(type_oid: int, form: str, types: Mapping[int, TypeDescription]) -> Callable[[bytes], PythonValue]:
    """A function from a value's bytes, without the length, to bool, int, float, bytes or else its canonical text.

    ``form`` is "b" (binary send format) or "t" (PostgreSQL's text). Domains are read as their base. The function
    raises as that of :func:`text_reader`.

    :raises SchemaError: as :func:`text_reader`, for binary values.
    """
    base = _domain_base(type_oid, types)
    label = _label(type_oid, types)
    if form == "t":
        return _guarded(_PYTHON_OF_TEXT.get(base, others.text), label)
    if form != "b":
        raise DecodeError(f"value form {form!r} of type {label} is neither 'b' nor 't'")
    layout = _PYTHON_LAYOUTS.get(base)
    if layout:
        return _unpacking(layout, label)
    special = _PYTHON_OF_BINARY.get(base)
    return _guarded(special, label) if special else text_reader(base, types)


# Errors


def _guarded(read: Callable[[bytes], _T], label: str) -> Callable[[bytes], _T]:
    """The one place where what goes wrong inside becomes a DecodeError."""

    def guarded(data: bytes) -> _T:
        try:
            return read(data)
        except (ValueError, struct.error, IndexError) as error:
            raise _malformed(label, data, error) from error

    return guarded


def _malformed(label: str, data: bytes, error: Exception) -> DecodeError:
    more = "…" if len(data) > _SHOWN_BYTES else ""
    return DecodeError(f"malformed {label} value {data[:_SHOWN_BYTES].hex()}{more} of {len(data)} bytes: {error}")


def _label(type_oid: int, types: Mapping[int, TypeDescription]) -> str:
    if builtin := BUILTIN.get(type_oid):
        return builtin.sql
    described = types.get(type_oid)
    return f"{described.schema}.{described.name}" if described else f"oid {type_oid}"


def _unreadable(type_oid: int, types: Mapping[int, TypeDescription]) -> SchemaError:
    return SchemaError(
        f"the binary form of type {_label(type_oid, types)} (oid {type_oid}) is not known", remedy=_TEXT_REMEDY
    )


# Readers by type


class _Readers:
    """Builds the readers of one set of types, each once."""

    def __init__(self, types: Mapping[int, TypeDescription]) -> None:
        self._types = types
        self._known: dict[int, Reader] = {}
        self._depth = 0

    def reader(self, oid: int, depth: int = _DEPTH_MAX) -> Reader:
        if not depth:  # a cycle
            raise _unreadable(oid, self._types)
        found = self._known.get(oid) or _SCALARS.get(oid)
        if not found:
            found = self._known[oid] = self._nested(oid, depth - 1)
        return found

    def _nested(self, oid: int, depth: int) -> Reader:
        known = BUILTIN.get(oid) or self._types.get(oid)
        match known.kind if known else "":
            case "array" if known:
                return self._array(known.base, depth)
            case "range" if known:
                return nested.range_reader(self.reader(known.base, depth))
            case "multirange" if known:
                return nested.multirange_reader(self._range(known.base, depth))
            case "domain" if known:
                return self.reader(known.base, depth)
            case "enum":
                return others.text
            case "composite":
                return self._composite()
        raise _unreadable(oid, self._types)

    def _array(self, element: int, depth: int) -> Reader:
        # The delimiter is pg_type.typdelim of the element: of all types only box has another.
        delimiter = ";" if _domain_base(element, self._types) == oids.BOX else ","
        return nested.array_reader(element, self.reader(element, depth), delimiter)

    def _range(self, base: int, depth: int) -> Reader:
        """The reader of a multirange's ranges, whether its base is the range or the range's subtype."""
        known = BUILTIN.get(base) or self._types.get(base)
        one = self.reader(base, depth)
        return one if known and known.kind == "range" else nested.range_reader(one)

    def _composite(self) -> Reader:
        read = nested.composite_reader(self.reader)

        def bounded(data: bytes) -> str:
            if self._depth == _DEPTH_MAX:
                raise ValueError(f"composites nested deeper than {_DEPTH_MAX}")
            self._depth += 1
            try:
                return read(data)
            finally:
                self._depth -= 1

        return bounded


def _domain_base(type_oid: int, types: Mapping[int, TypeDescription]) -> int:
    for _ in range(_DEPTH_MAX):
        described = types.get(type_oid)
        if type_oid in BUILTIN or not described or described.kind != "domain":
            break
        type_oid = described.base
    return type_oid


def _integer_text(layout: struct.Struct) -> Reader:
    unpack = layout.unpack

    def read(data: bytes) -> str:
        return str(unpack(data)[0])

    return read


_SCALARS: Final[Mapping[int, Reader]] = {
    oids.BOOL: numbers.boolean_text,
    oids.INT2: _integer_text(numbers.INT2),
    oids.INT4: _integer_text(numbers.INT4),
    oids.INT8: _integer_text(numbers.INT8),
    oids.OID: _integer_text(numbers.UINT4),
    oids.XID: _integer_text(numbers.UINT4),
    oids.CID: _integer_text(numbers.UINT4),
    oids.XID8: _integer_text(numbers.UINT8),
    oids.FLOAT4: numbers.float4,
    oids.FLOAT8: numbers.float8,
    oids.NUMERIC: numbers.numeric,
    oids.MONEY: numbers.money,
    oids.BIT: numbers.bits,
    oids.VARBIT: numbers.bits,
    oids.TEXT: others.text,
    oids.VARCHAR: others.text,
    oids.BPCHAR: others.text,
    oids.NAME: others.text,
    oids.JSON: others.text,
    oids.XML: others.text,
    oids.REFCURSOR: others.text,
    oids.CHAR: others.char,
    oids.JSONB: others.versioned,
    oids.JSONPATH: others.versioned,
    oids.BYTEA: others.bytea,
    oids.UUID: others.uuid,
    oids.DATE: times.date,
    oids.TIME: times.time,
    oids.TIMETZ: times.timetz,
    oids.TIMESTAMP: times.timestamp,
    oids.TIMESTAMPTZ: times.timestamptz,
    oids.INTERVAL: times.interval,
    oids.INET: others.inet,
    oids.CIDR: others.cidr,
    oids.MACADDR: others.macaddr,
    oids.MACADDR8: others.macaddr8,
    oids.POINT: others.point,
    oids.LINE: others.line,
    oids.LSEG: others.lseg,
    oids.BOX: others.box,
    oids.PATH: others.path,
    oids.POLYGON: others.polygon,
    oids.CIRCLE: others.circle,
    oids.PG_LSN: others.pg_lsn,
    oids.TID: others.tid,
    oids.PG_SNAPSHOT: others.snapshot,
    oids.TXID_SNAPSHOT: others.snapshot,
    oids.TSVECTOR: others.tsvector,
    oids.TSQUERY: others.tsquery,
    oids.INT2VECTOR: nested.vector_reader(oids.INT2, _integer_text(numbers.INT2)),
    oids.OIDVECTOR: nested.vector_reader(oids.OID, _integer_text(numbers.UINT4)),
}


# Python values


def _unpacking(layout: struct.Struct, label: str) -> Callable[[bytes], int | float]:
    unpack = layout.unpack

    def read(data: bytes) -> int | float:
        try:
            value: int | float = unpack(data)[0]
        except struct.error as error:
            raise _malformed(label, data, error) from error
        return value

    return read


def _float4(data: bytes) -> float:
    return float(numbers.float4(data))


def _boolean_of_text(data: bytes) -> bool:
    if data in (b"t", b"f"):
        return data == b"t"
    raise ValueError("a boolean is t or f")


def _integer_of_text(low: int, high: int) -> Callable[[bytes], int]:
    def read(data: bytes) -> int:
        # int() alone would take spaces and underscores.
        if not data.removeprefix(b"-").isdigit():
            raise ValueError("not a decimal number")
        value = int(data)
        if not low <= value <= high:
            raise ValueError(f"not between {low} and {high}")
        return value

    return read


def _float_of_text(data: bytes) -> float:
    if b"_" in data or data != data.strip():
        raise ValueError("not a number")
    return float(data)


def _bytes_of_text(data: bytes) -> bytes:
    if not data.startswith(b"\\x"):
        raise ValueError("not in hex: the server's bytea_output must be hex")
    return unhexlify(data[2:])


_PYTHON_LAYOUTS: Final[Mapping[int, struct.Struct]] = {
    oids.INT2: numbers.INT2,
    oids.INT4: numbers.INT4,
    oids.INT8: numbers.INT8,
    oids.OID: numbers.UINT4,
    oids.FLOAT8: numbers.FLOAT8,
}

_PYTHON_OF_BINARY: Final[Mapping[int, Callable[[bytes], PythonValue]]] = {
    oids.BOOL: numbers.boolean,
    oids.FLOAT4: _float4,
    oids.BYTEA: bytes,
}

_PYTHON_OF_TEXT: Final[Mapping[int, Callable[[bytes], PythonValue]]] = {
    oids.BOOL: _boolean_of_text,
    oids.INT2: _integer_of_text(-(2**15), 2**15 - 1),
    oids.INT4: _integer_of_text(-(2**31), 2**31 - 1),
    oids.INT8: _integer_of_text(-(2**63), 2**63 - 1),
    oids.OID: _integer_of_text(0, 2**32 - 1),
    oids.FLOAT4: _float_of_text,
    oids.FLOAT8: _float_of_text,
    oids.BYTEA: _bytes_of_text,
    oids.MONEY: numbers.money_of_text,
}
