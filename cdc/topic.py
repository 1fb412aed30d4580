"""Reading a topic other than by following it: where it ends, and one batch of it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from cdc.errors import CdcError, GapError
from cdc.ports import Broker, Codec
from cdc.position import Position
from cdc.record import Batch, Format, Kind

READ_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Tail:
    """Where a topic ends: the position to continue from, or the image left unfinished."""

    position: Position | None
    begin: Batch | None = None
    sequence: int = 0
    done: frozenset[tuple[int, int]] = frozenset()
    format: Format | None = None


def tail(broker: Broker, codec: Codec, topic: str) -> Tail:
    """Read from a topic's end where shipping goes on."""
    first, following = broker.bounds(topic)
    if first == following:
        return Tail(None)
    last = decoded(broker, codec, topic, following - 1)
    if last.kind in {Kind.LOG, Kind.HEARTBEAT, Kind.IMAGE_END}:
        whole = last.fragment is None or last.fragment.last
        return Tail(last.position if whole else last.previous, format=last.format)
    return replace(_unfinished_image(broker, codec, topic), format=last.format)


def _unfinished_image(broker: Broker, codec: Codec, topic: str) -> Tail:
    begin: Batch | None = None
    done: set[tuple[int, int]] = set()
    sequence = 0
    for _, batch in batches(broker, codec, topic):
        head = batch.image
        if batch.kind is Kind.IMAGE_BEGIN:
            begin, done, sequence = batch, set(), 0
        elif batch.kind is Kind.IMAGE_CHUNK and head is not None and (batch.fragment is None or batch.fragment.last):
            done.add((head.relation_id, head.chunk))
            sequence = head.sequence + 1
    return Tail(None, begin, sequence, frozenset(done))


def batches(broker: Broker, codec: Codec, topic: str) -> Iterator[tuple[int, Batch]]:
    """All that the topic holds now, with its offsets."""
    offset, end = broker.bounds(topic)
    while offset < end:
        for message in broker.read(topic, offset, limit_bytes=READ_BYTES, wait_s=0):
            yield message.offset, decode(codec, topic, message.offset, message.body)
            offset = message.offset + 1


def decoded(broker: Broker, codec: Codec, topic: str, offset: int) -> Batch:
    """One batch of a topic.

    :raises GapError: it is not there.
    """
    messages = broker.read(topic, offset, limit_bytes=1, wait_s=0)
    if not messages:
        raise GapError(f"topic {topic!r} has no message at offset {offset}")
    return decode(codec, topic, offset, messages[0].body)


def decode(codec: Codec, topic: str, offset: int, body: bytes) -> Batch:
    """A body as a batch; an error says where it stands."""
    try:
        return codec.decode(body)
    except CdcError as error:
        raise located(error, topic, offset) from error


def located(error: CdcError, topic: str, offset: int, position: Position | None = None) -> CdcError:
    """The error, saying where in the topic."""
    if error.located:
        return error
    where = f"topic {topic!r}, offset {offset}" + (f", position {position}" if position is not None else "")
    found = type(error)(f"{error} ({where})", remedy=error.remedy)
    found.located = True
    return found
