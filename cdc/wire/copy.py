"""COPY bodies: rows of values out of them, and text lines into them.

https://www.postgresql.org/docs/current/sql-copy.html, "Text Format" and "Binary Format".
"""

import re
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from cdc.errors import DecodeError
from cdc.record import NULL

SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0"
HEADER: Final = SIGNATURE + bytes(8)  # no flags, no extension
TRAILER: Final = b"\xff\xff"
_HEAD: Final = struct.Struct(">11sII")
_CRITICAL_FLAGS: Final = 0xFFFF0000  # bit 16 says that OIDs are included, the others are unknown
_COUNT: Final = struct.Struct(">h")
_LENGTH: Final = struct.Struct(">i")

_ESCAPED: Final = {"\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v"}
_ESCAPES: Final = str.maketrans(_ESCAPED)
_UNESCAPED: Final = {shown.encode(): raw.encode() for raw, shown in _ESCAPED.items()}
_ESCAPE: Final = re.compile(rb"\\.?", re.DOTALL)


def rows(body: bytes, form: str) -> Iterator[tuple[bytes, ...]]:
    """The rows of a complete COPY body, ``form`` "binary" or "text".

    A row is a tuple of values behind their four-byte big-endian length (:data:`cdc.record.NULL` for NULL): in binary
    send format, or in PostgreSQL's text with COPY's escapes undone.

    :raises DecodeError: on reaching what is not COPY data of that form, or not complete. Carries the byte.
    """
    if form == "binary":
        return _binary_rows(body)
    if form == "text":
        return _text_rows(body)
    raise DecodeError(f"copy form {form!r} is neither 'binary' nor 'text'")


def _binary_rows(body: bytes) -> Iterator[tuple[bytes, ...]]:
    at, size = _binary_start(body), len(body)
    columns = -1
    count_at, length_at = _COUNT.unpack_from, _LENGTH.unpack_from
    try:
        while (count := count_at(body, at)[0]) != -1:
            if count != columns:
                if count < 0 or columns >= 0:
                    raise DecodeError(f"copy row of {count} columns at byte {at}, after rows of {columns}")
                columns = count
            at += 2
            row = []
            for _ in range(count):
                length = length_at(body, at)[0]
                if length < 0:
                    if length != -1:
                        raise DecodeError(f"copy value of length {length} at byte {at}")
                    row.append(NULL)
                    at += 4
                else:
                    end = at + 4 + length
                    row.append(body[at:end])
                    at = end
            if at > size:
                raise DecodeError(f"copy data ends at byte {size}, inside a value that ends at byte {at}")
            yield tuple(row)
    except struct.error as error:
        raise DecodeError(f"copy data ends at byte {size}, without its trailer") from error
    if at + 2 != size:
        raise DecodeError(f"{size - at - 2} bytes after the copy trailer at byte {at}")


def _binary_start(body: bytes) -> int:
    """Where the first row starts."""
    if len(body) < _HEAD.size:
        raise DecodeError(f"copy data of {len(body)} bytes ends inside its header")
    signature, flags, extension = _HEAD.unpack_from(body)
    if signature != SIGNATURE:
        raise DecodeError(f"copy signature {signature.hex()} is not {SIGNATURE.hex()}")
    if flags & _CRITICAL_FLAGS:
        raise DecodeError(f"unknown copy flags {flags:#010x}")
    if extension > len(body) - _HEAD.size:
        raise DecodeError(f"copy header extension of {extension} bytes in {len(body)} bytes")
    return _HEAD.size + int(extension)


def _text_rows(body: bytes) -> Iterator[tuple[bytes, ...]]:
    if (stray := body.find(b"\r")) >= 0:
        raise DecodeError(f"unescaped carriage return in copy text at byte {stray}")
    columns = 0
    at = 0
    while at < len(body):
        end = body.find(b"\n", at)
        if end < 0:
            raise DecodeError(f"copy text ends at byte {len(body)}, inside a line")
        fields = body[at:end].split(b"\t")
        columns = columns or len(fields)
        if len(fields) != columns:
            raise DecodeError(f"copy line of {len(fields)} columns at byte {at}, after lines of {columns}")
        yield tuple([_text_value(field, at) for field in fields])
        at = end + 1


def _text_value(field: bytes, at: int) -> bytes:
    if b"\\" in field:
        if field == b"\\N":
            return NULL
        field = _ESCAPE.sub(lambda found: _unescaped(found[0], at), field)
    return _LENGTH.pack(len(field)) + field


def _unescaped(escape: bytes, at: int) -> bytes:
    try:
        return _UNESCAPED[escape]
    except KeyError:
        raise DecodeError(f"unknown escape {escape!r} in the copy line at byte {at}") from None


def text_line(values: Sequence[str | None]) -> bytes:
    """One line of COPY text as COPY TO writes it, without the newline; None is NULL."""
    return "\t".join(["\\N" if value is None else value.translate(_ESCAPES) for value in values]).encode()
