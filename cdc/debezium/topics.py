"""How ``ship`` writes events: a broker that takes native batches, publishes their events, and remembers the position.

:class:`EventTopics` is a :class:`cdc.ports.Broker`, so that the loop that ships, with all its retrying and confirming,
is the same one. After the events of a batch are durable, and never before, the batch itself goes without its body
into the topic ``<prefix>.cdc`` of one partition; only then may the leader forget. What :func:`cdc.pipeline.tail` finds
at the end of that topic is where shipping goes on. A crash in between repeats the events of one batch: at least once,
with the same keys, the same transaction id and the same place in it, by which a reader tells them.

That topic may be compacted: its keys keep the last position, and every finished chunk of the image that is being taken.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from cdc.debezium.encode import Encoder
from cdc.events import EventBroker, EventRecord, Place
from cdc.ports import Codec
from cdc.record import Batch, Kind, Message


def _now_us() -> int:
    return time.time_ns() // 1000


class EventTopics:
    """A :class:`cdc.ports.Broker` of one stream, whose bodies are batches in ``codec``'s form."""

    def __init__(
        self,
        broker: EventBroker,
        encoder: Encoder,
        codec: Codec,
        *,
        now_us: Callable[[], int] = _now_us,
    ) -> None:
        self._broker = broker
        self._encoder = encoder
        self._codec = codec
        self._place = Place(f"{encoder.prefix}.cdc", 0)
        self._now_us = now_us
        self._end: int | None = None
        self._prepared: deque[tuple[Batch, list[EventRecord]]] = deque()

    def append(self, topic: str, bodies: Sequence[bytes]) -> int:  # noqa: ARG002 - the prefix names the topics
        """
        :raises SchemaError: a value the event format cannot carry; nothing of its batch was published.
        """
        for body in bodies:
            if not self._prepared:
                self.prepare(self._codec.decode(body))
            batch, records = self._prepared.popleft()
            if records:
                self._broker.publish(records)
            told = EventRecord(self._place.topic, _key(batch), self._codec.encode(_without_body(batch)), (), 0)
            self._broker.publish([told])
        # Asking each time would take as long as writing does; we are the only one to write there.
        self._end = self._broker.bounds(self._place)[1] if self._end is None else self._end + len(bodies)
        return self._end - len(bodies)

    def prepare(self, batch: Batch) -> None:
        """See :class:`cdc.ports.Preparing`."""
        self._prepared.append((batch, self._encoder.encode(batch, self._now_us())))

    def read(self, topic: str, offset: int, *, limit_bytes: int, wait_s: float) -> Sequence[Message]:  # noqa: ARG002
        found = self._broker.fetch({self._place: offset}, limit_bytes=limit_bytes, wait_s=wait_s)
        messages = [Message(event.offset, event.value) for event in found if event.value is not None]
        for message in messages:
            self._encoder.note(self._codec.decode(message.body))
        return messages

    def bounds(self, topic: str) -> tuple[int, int]:  # noqa: ARG002
        return self._broker.bounds(self._place)

    def topics(self) -> Sequence[str]:
        return sorted({place.topic for place in self._broker.places()})

    def close(self) -> None:
        self._broker.close()


def _key(batch: Batch) -> bytes:
    if batch.kind is Kind.IMAGE_BEGIN:
        return b"image"
    if batch.kind is Kind.IMAGE_CHUNK and batch.image is not None:
        return (
            f"image {batch.image.id} {batch.image.sequence} {batch.fragment.number if batch.fragment else 0}".encode()
        )
    return b"position"


def _without_body(batch: Batch) -> Batch:
    kept = batch.relations if batch.kind is Kind.IMAGE_BEGIN else ()
    return replace(batch, relations=kept, transactions=(), lengths=(), body=b"")
