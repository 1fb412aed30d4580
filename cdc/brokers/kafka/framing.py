"""Kafka's record batches (magic 2), written and read many records at a time. Pure: no client, no socket.

https://kafka.apache.org/documentation/#recordbatch and ``#record``. Every number in a record is a zigzag varint. The
checksum is the caller's, who has a fast one.
"""

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final, NamedTuple

Headers = Sequence[tuple[str, bytes | None]]

HEADER: Final = Struct(">qiibIhiqqqhii")
"""Base offset, length behind it, leader epoch, magic, checksum, attributes, last offset delta, first and last
timestamp (ms), producer id, epoch and sequence, number of records."""
CHECKED_FROM: Final = 21
"""The checksum covers everything from here on: the attributes, at the latest byte before the records."""
_LENGTH_FROM: Final = 12
_MAGIC: Final = 2
_CHECKSUM: Final = Struct(">I")
_CHECKSUM_AT: Final = 17


def varint(number: int) -> bytes:
    """A signed number in 7 bits a byte, least significant first, its sign in the lowest bit."""
    number = number << 1 if number >= 0 else (-number << 1) - 1
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


_SHORT: Final = [varint(number) for number in range(1 << 13)]  # those of one byte and of two
_SHORT_MAX: Final = len(_SHORT) - 1
_ABSENT: Final = varint(-1)


class Bare(NamedTuple):
    """The records of a batch, framed, without the header before them."""

    records: int
    body: bytes


def frame(records: Sequence[tuple[bytes | None, bytes | None, Headers]], limit_bytes: int) -> Iterator[Bare]:
    """Key, value and headers of consecutive records of one partition, in batches of at most ``limit_bytes`` each, or of
    one record where that alone is larger. All have the batch's timestamp."""
    short, short_max, absent = _SHORT, _SHORT_MAX, _ABSENT
    room = limit_bytes - HEADER.size
    parts: list[bytes] = []
    size = count = 0
    for key, value, headers in records:
        delta = short[count] if count <= short_max else varint(count)
        if key is None:
            key, key_size = b"", absent
        else:
            key_size = short[len(key)] if len(key) <= short_max else varint(len(key))
        if value is None:
            value, value_size = b"", absent
        else:
            value_size = short[len(value)] if len(value) <= short_max else varint(len(value))
        told = b"\0" if not headers else _headers(headers)
        length = 2 + len(delta) + len(key_size) + len(key) + len(value_size) + len(value) + len(told)
        length_told = short[length] if length <= short_max else varint(length)
        whole = length + len(length_told)
        if count and size + whole > room:
            yield Bare(count, b"".join(parts))
            parts = []
            size = count = 0
            # The offset's delta is shorter now, and with it the record.
            length += 1 - len(delta)
            delta = b"\0"
            length_told = short[length] if length <= short_max else varint(length)
            whole = length + len(length_told)
        parts += (length_told, b"\0\0", delta, key_size, key, value_size, value, told)
        size += whole
        count += 1
    if count:
        yield Bare(count, b"".join(parts))


def _headers(headers: Headers) -> bytes:
    parts = [varint(len(headers))]
    for name, content in headers:
        encoded = name.encode()
        parts += (varint(len(encoded)), encoded)
        parts += (_ABSENT,) if content is None else (varint(len(content)), content)
    return b"".join(parts)


class Producer(NamedTuple):
    """Who wrote a batch, and the place of its first record among all that it wrote to the partition; -1 for nobody."""

    id: int = -1
    epoch: int = -1
    sequence: int = -1


def with_header(bare: Bare, timestamp_ms: int, producer: Producer) -> bytearray:
    """A whole batch but for its checksum, which :func:`seal` puts in."""
    whole = bytearray(HEADER.size + len(bare.body))
    HEADER.pack_into(
        whole,
        0,
        0,  # the broker chooses the offset, and the epoch behind the length
        len(whole) - _LENGTH_FROM,
        0,
        _MAGIC,
        0,
        0,
        bare.records - 1,
        timestamp_ms,
        timestamp_ms,
        *producer,
        bare.records,
    )
    whole[HEADER.size :] = bare.body
    return whole


def seal(batch: bytearray, checksum: int) -> None:
    """Put in the CRC-32C of everything from :data:`CHECKED_FROM` on."""
    _CHECKSUM.pack_into(batch, _CHECKSUM_AT, checksum)


# Reading --------------------------------------------------------------------------------------------------------------


class Parsed(NamedTuple):
    """One record of a batch; ``delta`` is its place behind the batch's base offset."""

    delta: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


def parse(body: bytes, at: int, count: int) -> list[Parsed]:  # noqa: C901, PLR0912 - calls cost more than the rest
    """The ``count`` records that begin at ``at`` and end with ``body``, which is inflated and whose checksum was right.

    :raises ValueError: there are fewer, or more, or they are malformed.
    """
    records = []
    end = len(body)
    key: bytes | None
    value: bytes | None
    try:
        for _ in range(count):
            # Nearly all numbers are of one byte or two.
            length = body[at]
            at += 1
            if length > 0x7F:
                length, at = _more(body, at, length)
            stop = at + (length >> 1)
            if length & 1 or stop > end:
                raise ValueError(f"a record of length {length} at byte {at} of {end}")
            at += 1  # attributes, of which there are none
            number = body[at]
            at += 1
            if number > 0x7F:  # the timestamp
                number, at = _more(body, at, number)
            delta = body[at]
            at += 1
            if delta > 0x7F:
                delta, at = _more(body, at, delta)
            size = body[at]
            if size & 1 or size > 0x7F:
                key, at = _bytes(body, at, stop)
            else:
                at += 1
                key = body[at : (at := at + (size >> 1))]
            size = body[at]
            if size > 0x7F and (high := body[at + 1]) <= 0x7F and not size & 1:
                at += 2
                value = body[at : (at := at + (size >> 1 & 0x3F | high << 6))]
            else:
                value, at = _bytes(body, at, stop)
            headers: tuple[tuple[str, bytes], ...] = ()
            if body[at] or at + 1 != stop:
                headers, at = _read_headers(body, at, stop)
            else:
                at += 1
            if at != stop:  # also where a key or a value reached past the end
                raise ValueError(f"a record ends at byte {at}, not at {stop}")
            records.append(Parsed(delta >> 1, key, value, headers))
    except IndexError:
        raise ValueError(f"{count} records end behind byte {end}") from None
    if at != end:
        raise ValueError(f"{end - at} bytes behind the last of {count} records")
    return records


def _bytes(body: bytes, at: int, stop: int) -> tuple[bytes | None, int]:
    size = body[at]
    at += 1
    if size > 0x7F:
        size, at = _more(body, at, size)
    if size & 1:
        if size != 1:
            raise ValueError(f"a size of {-(size + 1 >> 1)} at byte {at}")
        return None, at
    end = at + (size >> 1)
    if end > stop:
        raise ValueError(f"{size >> 1} bytes at byte {at} of a record that ends at {stop}")
    return body[at:end], end


def _read_headers(body: bytes, at: int, stop: int) -> tuple[tuple[tuple[str, bytes], ...], int]:
    count = body[at]
    at += 1
    if count > 0x7F:
        count, at = _more(body, at, count)
    if count & 1 or count >> 1 > stop - at:
        raise ValueError(f"a number of headers that cannot be, at byte {at}")
    headers = []
    for _ in range(count >> 1):
        name, at = _bytes(body, at, stop)
        content, at = _bytes(body, at, stop)
        if name is None:
            raise ValueError(f"a header without a name before byte {at}")
        headers.append((name.decode(), content or b""))
    return tuple(headers), at


_BITS_MAX: Final = 63


def _more(body: bytes, at: int, first: int) -> tuple[int, int]:
    """The rest of an unsigned varint whose first byte says that there is more, and the byte behind it."""
    number, shift = first & 0x7F, 7
    while (byte := body[at]) > 0x7F:
        number |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if shift > _BITS_MAX:
            raise ValueError(f"a number of more than 64 bits at byte {at}")
    return number | byte << shift, at + 1
