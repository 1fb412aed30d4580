"""Records with a key, headers and a partition: what portable events need of a broker beyond bodies in order.

:class:`EventBroker` is the contract. :class:`PackedEvents` keeps it over any plain :class:`cdc.ports.Broker`, a topic
for each partition; ``cdc.brokers.kafka.events`` keeps it over Kafka, whose records have all of that themselves.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from cdc.errors import DecodeError
from cdc.ports import Broker

Headers = tuple[tuple[str, bytes], ...]


class EventRecord(NamedTuple):
    """A record to write. ``partition`` None: by the key, as Kafka's own producers choose it; without a key 0.

    A ``value`` of None is a tombstone: nothing but the key is kept of it where the topic is compacted.
    """

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None


class Place(NamedTuple):
    """A partition of a topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"


class StoredEvent(NamedTuple):
    """A record as the broker keeps it."""

    place: Place
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class EventBroker(Protocol):
    """Keeps records in order within each partition. Knows nothing of them, nor of anyone's progress."""

    def publish(self, records: Sequence[EventRecord]) -> None:
        """Add records, each partition's in the order given, and return once all are durable.

        Topics are created on first use, those whose name ends in ``.transaction`` or ``.cdc`` with one partition.

        :raises OutcomeUnknownError: any of them may or may not be there. Publishing them again doubles those that are.
        """
        ...

    def fetch(self, offsets: Mapping[Place, int], *, limit_bytes: int, wait_s: float) -> Sequence[StoredEvent]:
        """Records from the given offsets on, at least one where there is one, about ``limit_bytes`` in all.

        Each partition's are in order, and none is left out between the offset asked for and those that came.

        Waits up to ``wait_s`` seconds for the first. Empty where none came.

        :raises GapError: an offset is below what is kept, or beyond the end.
        """
        ...

    def bounds(self, place: Place) -> tuple[int, int]:
        """The first offset kept and the next to be written; (0, 0) where there is no such partition."""
        ...

    def places(self) -> Sequence[Place]:
        """Every partition there is, sorted."""
        ...

    def close(self) -> None: ...


_ALONE: Final = (".transaction", ".cdc")


def partitions_of(topic: str, wanted: int) -> int:
    """How many partitions a topic of ours gets: one where its order across keys is the point."""
    return 1 if topic.endswith(_ALONE) else wanted


def partition_of(key: bytes | None, partitions: int) -> int:
    """Kafka's default choice: murmur2 of the key, its sign cut off, modulo the number of partitions."""
    return 0 if key is None or partitions == 1 else (murmur2(key) & 0x7FFFFFFF) % partitions


def murmur2(data: bytes) -> int:
    """MurmurHash2 of 32 bits with Kafka's seed, so that every client puts a key into the same partition."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for (k,) in struct.iter_unpack("<I", data[:whole]):
        k = k * m & mask
        k = (k ^ k >> 24) * m & mask
        h = (h * m & mask) ^ k
    if rest := data[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


# Over a plain broker --------------------------------------------------------------------------------------------------

_SIZE: Final = struct.Struct("<i")
_NONE: Final = -1


class PackedEvents:
    """An :class:`EventBroker` over a plain broker: partition ``n`` of a topic is the plain topic ``topic.n``."""

    def __init__(self, broker: Broker, *, partitions: int = 1) -> None:
        self._broker = broker
        self._partitions = partitions

    def publish(self, records: Sequence[EventRecord]) -> None:
        by_topic: dict[str, list[bytes]] = {}
        for record in records:
            partition = record.partition
            if partition is None:
                partition = partition_of(record.key, partitions_of(record.topic, self._partitions))
            by_topic.setdefault(f"{record.topic}.{partition}", []).append(
                pack(record.key, record.value, record.headers)
            )
        for topic, bodies in by_topic.items():
            self._broker.append(topic, bodies)

    def fetch(self, offsets: Mapping[Place, int], *, limit_bytes: int, wait_s: float) -> Sequence[StoredEvent]:
        found: list[StoredEvent] = []
        share = max(1, limit_bytes // max(1, len(offsets)))
        for wait in (0.0, wait_s / max(1, len(offsets))):
            for place, offset in offsets.items():
                name = f"{place.topic}.{place.partition}"
                messages = self._broker.read(name, offset, limit_bytes=share, wait_s=wait)
                found += [StoredEvent(place, message.offset, *unpack(message.body)) for message in messages]
            if found or not wait_s:
                break
        return found

    def bounds(self, place: Place) -> tuple[int, int]:
        return self._broker.bounds(f"{place.topic}.{place.partition}")

    def places(self) -> Sequence[Place]:
        split = [topic.rpartition(".") for topic in self._broker.topics()]
        return sorted(Place(topic, int(number)) for topic, _, number in split if number.isdigit())

    def close(self) -> None:
        self._broker.close()


def pack(key: bytes | None, value: bytes | None, headers: Headers) -> bytes:
    """A record as one body: each part behind its length, -1 for None."""
    parts: list[bytes | None] = [key, value]
    for name, content in headers:
        parts += [name.encode(), content]
    return b"".join(_SIZE.pack(_NONE) if part is None else _SIZE.pack(len(part)) + part for part in parts)


def unpack(body: bytes) -> tuple[bytes | None, bytes | None, Headers]:
    """The inverse of :func:`pack`.

    :raises DecodeError: the body is none.
    """
    parts: list[bytes | None] = []
    at = 0
    while at < len(body):
        size = _SIZE.unpack_from(body, at)[0] if at + _SIZE.size <= len(body) else len(body)
        at += _SIZE.size
        if not _NONE <= size <= len(body) - at:
            raise DecodeError(f"a part of {size} bytes at byte {at - _SIZE.size} of an event of {len(body)} bytes")
        parts.append(None if size == _NONE else body[at : at + size])
        at += max(size, 0)
    if len(parts) < 2 or len(parts) % 2:
        raise DecodeError(f"an event of {len(body)} bytes has {len(parts)} parts")
    headers = tuple(
        ((name or b"").decode(errors="replace"), content or b"")
        for name, content in zip(parts[2::2], parts[3::2], strict=True)
    )
    return parts[0], parts[1], headers
