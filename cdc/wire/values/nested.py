"""Arrays, ranges, multiranges and composites: binary send format to text, given readers of what is inside.

https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO, rangetypes.html#RANGETYPES-IO,
rowtypes.html#ROWTYPES-IO-SYNTAX
"""

import re
import struct
from collections.abc import Callable, Iterator
from math import prod
from typing import Final

from cdc.errors import DecodeError
from cdc.wire.values.numbers import INT4

Reader = Callable[[bytes], str]

_ARRAY_HEAD: Final = struct.Struct(">iiI")
_BOUNDS: Final = struct.Struct(">ii")
_FIELD: Final = struct.Struct(">Ii")
_DIMENSIONS_MAX: Final = 6
_INT4_MAX: Final = 2**31 - 1

# Every level of nesting doubles the quotes of the level below, so a few bytes could ask for any amount of memory.
TEXT_CHARACTERS_MAX: Final = 1 << 28

_SPACE: Final = r" \t\n\r\v\f"
_RANGE_SPECIAL: Final = re.compile(rf'["\\()\[\],{_SPACE}]')
_RECORD_SPECIAL: Final = re.compile(rf'["\\(),{_SPACE}]')

_EMPTY, _LOWER_INCLUSIVE, _UPPER_INCLUSIVE, _LOWER_INFINITE, _UPPER_INFINITE = 1, 2, 4, 8, 16


def _bounded(text: str) -> str:
    if len(text) > TEXT_CHARACTERS_MAX:
        raise DecodeError(f"a nested value of {len(text)} characters is beyond the limit of {TEXT_CHARACTERS_MAX}")
    return text


def _item(data: bytes, at: int) -> tuple[bytes | None, int]:
    """A value behind its length (None for NULL), and where the next one starts."""
    length: int = INT4.unpack_from(data, at)[0]
    at += 4
    if length == -1:
        return None, at
    if not 0 <= length <= len(data) - at:
        raise ValueError(f"a length of {length} with {len(data) - at} bytes left")
    return data[at : at + length], at + length


def _items(data: bytes, at: int, count: int) -> Iterator[bytes | None]:
    """Exactly ``count`` values up to the end of ``data``."""
    if not 0 <= count <= (len(data) - at) // 4:
        raise ValueError(f"a count of {count} with {len(data) - at} bytes left")
    for _ in range(count):
        value, at = _item(data, at)
        yield value
    if at != len(data):
        raise ValueError("bytes after the last value")


# Arrays


def array_reader(element_oid: int, element: Reader, delimiter: str) -> Reader:
    special = re.compile(rf'["\\{{}}{delimiter}{_SPACE}]')

    def shown(value: bytes | None) -> str:
        if value is None:
            return "NULL"
        text = element(value)
        if text and not special.search(text) and text.upper() != "NULL":
            return text
        return _bounded('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')

    def read(data: bytes) -> str:
        dimensions, at = _array_head(data, element_oid)
        count = prod(size for size, _ in dimensions) if dimensions else 0
        items = [shown(value) for value in _items(data, at, count)]
        if not items:
            return "{}"
        for size, _ in reversed(dimensions):
            items = [f"{{{delimiter.join(items[at : at + size])}}}" for at in range(0, len(items), size)]
        return _decoration(dimensions) + items[0]

    return read


def _array_head(data: bytes, element_oid: int) -> tuple[list[tuple[int, int]], int]:
    """(size, lower bound) of each dimension, and where the elements start."""
    count, flags, oid = _ARRAY_HEAD.unpack_from(data)
    if not 0 <= count <= _DIMENSIONS_MAX or flags not in (0, 1):
        raise ValueError(f"an array of {count} dimensions with flags {flags}")
    if oid != element_oid:
        raise ValueError(f"elements of type {oid} where {element_oid} is declared")
    end = _ARRAY_HEAD.size + 8 * count
    dimensions = [_BOUNDS.unpack_from(data, at) for at in range(_ARRAY_HEAD.size, end, 8)]
    if any(size < 0 or lower + size - 1 > _INT4_MAX for size, lower in dimensions):
        raise ValueError("bad array bounds")
    return [(size, lower) for size, lower in dimensions], end


def _decoration(dimensions: list[tuple[int, int]]) -> str:
    if all(lower == 1 for _, lower in dimensions):
        return ""
    return "".join(f"[{lower}:{lower + size - 1}]" for size, lower in dimensions) + "="


def vector_reader(element_oid: int, element: Reader) -> Reader:
    """int2vector and oidvector: an array of one dimension, shown with spaces between."""

    def read(data: bytes) -> str:
        dimensions, at = _array_head(data, element_oid)
        if len(dimensions) > 1:
            raise ValueError("a vector has one dimension")
        values = _items(data, at, dimensions[0][0] if dimensions else 0)
        return " ".join(element(_present(value)) for value in values)

    return read


# Ranges


def range_reader(subtype: Reader) -> Reader:
    def read(data: bytes) -> str:
        flags = data[0]
        if flags & ~0x1F or (flags & _EMPTY and len(data) > 1):
            raise ValueError(f"unknown range flags {flags}")
        if flags & _EMPTY:
            return "empty"
        infinite = [flags & _LOWER_INFINITE, flags & _UPPER_INFINITE]
        bounds = _items(data, 1, infinite.count(0))
        low, high = ["" if unbounded else bound(_present(next(bounds))) for unbounded in infinite]
        if next(bounds, None) is not None:
            raise ValueError("bytes after the last bound")
        return f"{'[' if flags & _LOWER_INCLUSIVE else '('}{low},{high}{']' if flags & _UPPER_INCLUSIVE else ')'}"

    def bound(value: bytes) -> str:
        return _doubled(subtype(value), _RANGE_SPECIAL)

    return read


def _present(value: bytes | None) -> bytes:
    if value is None:
        raise ValueError("NULL where a value must be")
    return value


def _doubled(text: str, special: re.Pattern[str]) -> str:
    if text and not special.search(text):
        return text
    return _bounded('"' + text.replace("\\", "\\\\").replace('"', '""') + '"')


def multirange_reader(one: Reader) -> Reader:
    def read(data: bytes) -> str:
        count: int = INT4.unpack_from(data)[0]
        return f"{{{','.join(one(_present(value)) for value in _items(data, 4, count))}}}"

    return read


# Composites


def composite_reader(field_reader: Callable[[int], Reader]) -> Reader:
    """The bytes name each field's type, so its reader is looked up as they are read."""

    def fields(data: bytes) -> Iterator[str]:
        count: int = INT4.unpack_from(data)[0]
        if not 0 <= count <= (len(data) - 4) // _FIELD.size:
            raise ValueError(f"a composite of {count} fields in {len(data)} bytes")
        at = 4
        for _ in range(count):
            oid, _ = _FIELD.unpack_from(data, at)
            value, at = _item(data, at + 4)
            yield "" if value is None else _doubled(field_reader(oid)(value), _RECORD_SPECIAL)
        if at != len(data):
            raise ValueError("bytes after the last field")

    def read(data: bytes) -> str:
        return f"({','.join(fields(data))})"

    return read
