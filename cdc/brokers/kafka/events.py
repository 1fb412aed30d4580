"""Kafka as an :class:`cdc.events.EventBroker`: keys, headers, and several partitions a topic.

The URL is that of :mod:`cdc.brokers.kafka`, which see, with one option more: ``partitions``, how many a topic that we
create gets (1 without a word). Topic names are Kafka's own, since other programs read them: they come legal from the
encoder, and only the URL's prefix is put before them.

Records are sent with ``acks=all`` by an idempotent producer, a partition's in order. After an error of unknown outcome
any of them may be there: whoever publishes does so again, and readers tell events that are told twice.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlencode

from cdc.brokers.kafka.broker import EARLIEST, LATEST, MESSAGE_BYTES_MAX, KafkaBroker
from cdc.brokers.kafka.client import CONSUMER, PRODUCER, connect_client, end_producer, library, translated, words
from cdc.brokers.kafka.fetching import by_batches
from cdc.brokers.kafka.framing import Bare, frame
from cdc.brokers.kafka.inflate import INFLATED_BYTES_MAX, InflatedError, inflating
from cdc.brokers.kafka.sending import Sending, whole_batches
from cdc.brokers.kafka.target import parse
from cdc.errors import ConfigurationError, DecodeError, OutcomeUnknownError, UnavailableError, UsageError
from cdc.events import EventRecord, Headers, Place, StoredEvent, partition_of, partitions_of

_BATCH_BYTES: Final = 4 << 20
_RECORD_OVERHEAD_BYTES: Final = 128  # of a batch and its only record, without headers
_FETCH_BATCHES: Final = 64
_ARRIVAL_S: Final = 15.0
_SLICE_S: Final = 0.1


def connect(url: str, *, create: bool = True) -> "KafkaEvents":
    """The event broker of a ``kafka://`` URL. Nothing is connected yet. With ``create=False`` it only reads.

    :raises UsageError: not such a URL, or an option that is unknown, does not fit or is not safe.
    """
    base, _, query = url.partition("?")
    given = parse_qsl(query, keep_blank_values=True)
    partitions = dict(given).get("partitions", "1")
    if not re.fullmatch(r"[1-9][0-9]{0,3}", partitions):
        raise UsageError(f"partitions is {partitions!r}", remedy="write a whole number from 1 to 9999")
    rest = urlencode([(name, value) for name, value in given if name != "partitions"])
    target = parse(base + (f"?{rest}" if rest else ""), os.environ)
    return KafkaEvents(KafkaBroker(target, create=create), partitions=int(partitions), create=create)


class KafkaEvents:
    """An :class:`cdc.events.EventBroker` on the connection of a :class:`~cdc.brokers.kafka.KafkaBroker`."""

    def __init__(self, broker: KafkaBroker, *, partitions: int = 1, create: bool = True) -> None:
        self._kafka = broker
        self._partitions = partitions
        self._create = create
        self._topics: dict[str, _Topic] = {}
        self._producer: Any = None
        self._consumer: Any = None
        self._batches_max = _FETCH_BATCHES
        self._stands: dict[Place, int] = {}

    def publish(self, records: Sequence[EventRecord]) -> None:
        """
        :raises OutcomeUnknownError: any of them may or may not be there.
        :raises ConfigurationError: a record is larger than its topic takes.
        """
        if not self._create:
            raise UsageError(f"{self._kafka.target.label} was opened for reading", remedy="open it with create=True")
        doing = f"cannot publish {len(records)} events"
        with translated(self._kafka.target, doing):
            batches = self._framed(records)
            if self._producer is None:
                self._producer = whole_batches(connect_client(self._kafka.target, "KafkaProducer", PRODUCER))
        sending = Sending(self._producer, self._kafka.target.timeout_s)
        try:
            for place, bare in batches:
                sending.send(self._kafka.target.prefix + place.topic, place.partition, bare)
            sending.wait()
        except Exception as error:
            self._drop_producer()
            if isinstance(error, library("errors").MessageSizeTooLargeError):
                self._topics.clear()  # the limit was lowered: ask again
                raise _too_large(doing) from error
            raise OutcomeUnknownError(f"{doing}: {words(error)}") from error

    def _framed(self, records: Sequence[EventRecord]) -> Iterator[tuple[Place, Bare]]:
        """The records in batches, each partition's in order, put together as they are asked for.

        :raises ConfigurationError: a record is larger than its topic takes; nothing was published.
        """
        by_place = _by_place(records, {topic: self._topic(topic).partitions for topic in {each[0] for each in records}})
        for place, content in by_place.items():
            limit = self._topic(place.topic).message_bytes_max
            suspects = [each for each in content if each[2] or len(each[0] or b"") + len(each[1] or b"") > limit // 2]
            if any(_size(*each) > limit for each in suspects):
                raise _too_large(f"cannot publish an event to {place}")
        return (
            (place, bare)
            for place, content in by_place.items()
            for bare in frame(content, min(_BATCH_BYTES, self._topic(place.topic).message_bytes_max))
        )

    def _topic(self, topic: str) -> "_Topic":
        """What we must know of a topic, which is created where it is not there."""
        known = self._topics.get(topic)
        if known is None:
            partitions = self._described(topic) or self._made(topic)
            limit = self._kafka.message_bytes_max(self._kafka.target.prefix + topic)
            known = self._topics[topic] = _Topic(partitions, limit)
        return known

    def _described(self, topic: str) -> int:
        (entry,) = self._kafka.admin().describe_topics([self._kafka.target.prefix + topic])
        code, errors = entry["error_code"], library("errors")
        if code == errors.UnknownTopicOrPartitionError.errno:
            return 0
        if code:
            raise errors.for_code(code)(topic)
        return len(entry["partitions"])

    def _made(self, topic: str) -> int:
        target = self._kafka.target
        settings = {
            "cleanup.policy": "compact" if topic.endswith(".cdc") else "delete",
            "retention.ms": str(target.retention_ms),
            "retention.bytes": "-1",
            "max.message.bytes": str(MESSAGE_BYTES_MAX),
            "unclean.leader.election.enable": "false",
        }
        wanted = partitions_of(topic, self._partitions)
        request = {"num_partitions": wanted, "replication_factor": target.replicas, "configs": settings}
        try:
            self._kafka.admin().create_topics({target.prefix + topic: request}, wait_for_metadata=True)
        except library("errors").TopicAlreadyExistsError:
            return self._described(topic)
        return wanted

    def fetch(self, offsets: Mapping[Place, int], *, limit_bytes: int, wait_s: float) -> Sequence[StoredEvent]:
        """
        :raises DecodeError: a batch fails its checksum, is malformed, or inflates beyond 64 MiB.
        """
        if not offsets:
            return []
        with translated(self._kafka.target, "cannot read events"):
            try:
                return self._fetched(offsets, limit_bytes, wait_s)
            except InflatedError as error:
                self._drop_consumer()  # one that failed is of no more use
                if self._batches_max == 1:
                    places = ", ".join(f"{place} at or behind offset {at}" for place, at in offsets.items())
                    raise DecodeError(
                        f"a batch of {places} {error}",
                        remedy="whoever writes the topic must compress less at once",
                    ) from error
                self._batches_max = 1  # several were too large together
        return self.fetch(offsets, limit_bytes=limit_bytes, wait_s=wait_s)

    def _fetched(self, offsets: Mapping[Place, int], limit_bytes: int, wait_s: float) -> list[StoredEvent]:
        if self._consumer is None:
            self._consumer = by_batches(connect_client(self._kafka.target, "KafkaConsumer", CONSUMER))
        self._stand(offsets)
        deadline = time.monotonic() + _ARRIVAL_S
        while not (events := self._polled(wait_s)):
            if not self._is_behind(offsets):
                return []
            if time.monotonic() > deadline:
                raise UnavailableError(f"{self._kafka.target.label} has events, but sends none")
            wait_s = _SLICE_S
        size = _weight(events)
        while size < limit_bytes and (more := self._polled(0)):
            events += more
            size += _weight(more)
        return events

    def _polled(self, wait_s: float) -> list[StoredEvent]:
        with inflating(INFLATED_BYTES_MAX):
            came = self._consumer.poll(timeout_ms=int(wait_s * 1000), max_records=self._batches_max)
        events: list[StoredEvent] = []
        for partition, batches in came.items():
            place = Place(partition.topic.removeprefix(self._kafka.target.prefix), partition.partition)
            for last, base, first, records in batches:
                self._stands[place] = last + 1
                new = [StoredEvent(place, base + delta, *content) for delta, *content in records]
                events += new if first <= base else [event for event in new if event.offset >= first]
        return events

    def _is_behind(self, offsets: Mapping[Place, int]) -> bool:
        """Is there anything to read that did not come yet? What was compacted away is not."""
        partitions = [self._partition(place) for place in offsets]
        ends = self._consumer.end_offsets(partitions)
        return any(self._consumer.position(partition) < ends[partition] for partition in partitions)

    def _stand(self, offsets: Mapping[Place, int]) -> None:
        """Read on from there, without throwing away what is on its way where we stand there already."""
        if self._stands.keys() != offsets.keys():
            self._consumer.assign([self._partition(place) for place in offsets])
            self._stands = {}
        for place, offset in offsets.items():
            if self._stands.get(place) != offset:
                self._consumer.seek(self._partition(place), offset)
                self._stands[place] = offset

    def _partition(self, place: Place) -> Any:
        return library("structs").TopicPartition(self._kafka.target.prefix + place.topic, place.partition)

    def bounds(self, place: Place) -> tuple[int, int]:
        with translated(self._kafka.target, f"cannot ask for the bounds of {place}"):
            if self._described(place.topic) <= place.partition:
                return (0, 0)
            partition = self._partition(place)
            asked = self._kafka.admin().list_partition_offsets
            first, end = (
                asked({partition: which}, isolation_level="read_committed")[partition].offset
                for which in (EARLIEST, LATEST)
            )
            return int(first), int(end)

    def places(self) -> Sequence[Place]:
        prefix = self._kafka.target.prefix
        with translated(self._kafka.target, "cannot list the topics"):
            found = self._kafka.admin().describe_topics()
        return sorted(
            Place(entry["name"].removeprefix(prefix), partition)
            for entry in found
            if not entry["is_internal"] and entry["name"].startswith(prefix)
            for partition in range(len(entry["partitions"]))
        )

    def close(self) -> None:
        self._drop_producer()
        self._drop_consumer()
        with closing(self._kafka):
            pass

    def _drop_consumer(self) -> None:
        consumer, self._consumer = self._consumer, None
        self._stands = {}
        if consumer is not None:
            consumer.close()

    def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            end_producer(producer)


class _Topic(NamedTuple):
    partitions: int
    message_bytes_max: int


def _by_place(
    records: Sequence[EventRecord], counts: Mapping[str, int]
) -> dict[Place, list[tuple[bytes | None, bytes | None, Headers]]]:
    """Keys, values and headers by partition, each partition's in order."""
    found: dict[tuple[str, int], list[tuple[bytes | None, bytes | None, Headers]]] = {}
    for topic, key, value, headers, partition in records:
        chosen = partition_of(key, counts[topic]) if partition is None else partition
        try:
            found[topic, chosen].append((key, value, headers))
        except KeyError:
            found[topic, chosen] = [(key, value, headers)]
    return {Place(topic, partition): content for (topic, partition), content in found.items()}


def _size(key: bytes | None, value: bytes | None, headers: Headers) -> int:
    size = len(key or b"") + len(value or b"") + _RECORD_OVERHEAD_BYTES
    return size + sum(2 * len(name) + len(content) + 10 for name, content in headers) if headers else size


def _too_large(doing: str) -> ConfigurationError:
    return ConfigurationError(
        f"{doing}: one is larger than its topic takes", remedy="raise the topic's max.message.bytes"
    )


def _weight(events: Sequence[StoredEvent]) -> int:
    return sum(len(event.value or b"") + len(event.key or b"") for event in events)
