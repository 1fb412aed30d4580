"""Rows as ``record_send`` writes them, into pgoutput's row messages. Pure.

A record is the number of its columns, then each column's type OID, length (-1 for NULL) and bytes in the type's own
send format (PostgreSQL's ``rowtypes.c``, record_send); columns that were dropped are left out. Settings of the session
that wrote it do not change how it looks. The change tables of the trigger log keep records end to end.
"""

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from cdc.errors import DecodeError

_COLUMNS: Final = struct.Struct(">i")
_COLUMN: Final = struct.Struct(">Ii")
_COLUMNS_MAX: Final = 1664  # of a record, PostgreSQL's MaxTupleAttributeNumber
_NULL: Final = b"n"
_BINARY: Final = b"b"

Piece = bytes
"""A column of a pgoutput tuple: ``n``, or ``b`` and the value behind its length."""


class MisfitError(DecodeError):
    """A record is not of the types that were expected."""


class Layout(NamedTuple):
    """What a record holds: the type OID of each column, and the places of those that are wanted, in order."""

    type_oids: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def whole(self) -> bool:
        return self.places == tuple(range(len(self.type_oids)))


def type_oids(data: bytes, at: int = 0) -> tuple[int, ...]:
    """The types of the columns of the record at ``at``.

    :raises DecodeError: there is no whole record.
    """
    return tuple([oid for oid, _, _ in _columns(data, at)])


def rows(data: bytes, layout: Layout) -> Iterator[list[Piece]]:
    """Every record of ``data`` as pieces of a pgoutput tuple, in the order of ``layout.places``.

    :raises DecodeError: a record is cut short.
    :raises MisfitError: it is of other types than ``layout`` says.
    """
    count, oids, places = _looked_for(layout)
    size, at = len(data), 0
    from_bytes = int.from_bytes
    while at < size:
        start = at
        if data[at : at + 4] != count:
            raise _misfit(data, start, layout)
        at += 4
        row: list[Piece] = []
        append = row.append
        for oid in oids:
            if data[at : at + 4] != oid:
                raise _misfit(data, start, layout)
            length = from_bytes(data[at + 4 : at + 8], "big", signed=True)
            at += 8
            if length < 0:
                if length != -1:
                    raise DecodeError(f"a value of length {length} at byte {at - 4} of a change")
                append(_NULL)
            else:
                append(_BINARY + data[at - 4 : at + length])
                at += length
        if at > size:
            raise DecodeError(f"a change of {size} bytes ends inside the record at byte {start}")
        yield row if places is None else [row[place] for place in places]


@lru_cache(maxsize=1024)
def _looked_for(layout: Layout) -> tuple[bytes, tuple[bytes, ...], tuple[int, ...] | None]:
    """A record's number of columns and their types as bytes, and the places that are wanted, None for all."""
    oids = tuple(oid.to_bytes(4) for oid in layout.type_oids)
    return _COLUMNS.pack(len(oids)), oids, None if layout.whole else layout.places


def message(opcode: bytes, relation_id: int, kind: bytes, pieces: Sequence[Piece]) -> bytes:
    """A row message of pgoutput: ``opcode`` I, U or D; ``kind`` N (new row), K (key) or O (old row).

    https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html
    """
    return b"".join([opcode, relation_id.to_bytes(4), kind, len(pieces).to_bytes(2), *pieces])


def truncate(relation_ids: Sequence[int]) -> bytes:
    """pgoutput's Truncate, without CASCADE and RESTART IDENTITY: every table that was emptied says so itself."""
    return b"T" + len(relation_ids).to_bytes(4) + b"\0" + b"".join([each.to_bytes(4) for each in relation_ids])


def key_only(pieces: Sequence[Piece], key: Sequence[bool]) -> list[Piece]:
    """The row with everything but its key NULL, as pgoutput tells a key."""
    return [piece if keyed else _NULL for piece, keyed in zip(pieces, key, strict=True)]


def _columns(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """Type OID, length and place of each column of the record at ``at``."""
    try:
        (count,) = _COLUMNS.unpack_from(data, at)
        if not 0 <= count <= _COLUMNS_MAX:
            raise DecodeError(f"a record of {count} columns at byte {at}")
        at += 4
        for _ in range(count):
            oid, length = _COLUMN.unpack_from(data, at)
            at += 8
            if length < -1 or at + length > len(data):
                raise DecodeError(f"a value of length {length} at byte {at - 4} of a change of {len(data)} bytes")
            yield oid, length, at
            at += max(length, 0)
    except struct.error as error:
        raise DecodeError(f"a change of {len(data)} bytes ends inside the record at byte {at}") from error


def _misfit(data: bytes, at: int, layout: Layout) -> MisfitError:
    found = type_oids(data, at)
    return MisfitError(f"the record at byte {at} of a change has types {found}, {layout.type_oids} were expected")
