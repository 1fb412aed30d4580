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
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

from cdc.brokers.kafka.broker import EARLIEST, LATEST, MESSAGE_BYTES_MAX, KafkaBroker
from cdc.brokers.kafka.client import CONSUMER, PRODUCER, connect_client, end_producer, library, translated, words
from cdc.brokers.kafka.inflate import INFLATED_BYTES_MAX, inflating
from cdc.brokers.kafka.target import parse
from cdc.errors import CdcError, ConfigurationError, OutcomeUnknownError, UnavailableError, UsageError
from cdc.events import EventRecord, Place, StoredEvent, partition_of, partitions_of

_BATCH_BYTES: Final = 900_000  # below what any topic takes unless it was made to take less
_FLUSH_RECORDS: Final = 20_000  # sent before we wait for them
_FETCH_RECORDS: Final = 5_000
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
        self._counts: dict[str, int] = {}
        self._producer: Any = None
        self._consumer: Any = None
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
            counts = {topic: self._count(topic) for topic in {record.topic for record in records}}
            if self._producer is None:
                settings = {**PRODUCER, "batch_size": _BATCH_BYTES}
                self._producer = connect_client(self._kafka.target, "KafkaProducer", settings)
        try:
            for at in range(0, len(records), _FLUSH_RECORDS):
                self._send(records[at : at + _FLUSH_RECORDS], counts)
        except Exception as error:
            self._drop_producer()
            if isinstance(error, CdcError):
                raise
            if isinstance(error, library("errors").MessageSizeTooLargeError):
                raise ConfigurationError(
                    f"{doing}: one is larger than its topic takes", remedy="raise the topic's max.message.bytes"
                ) from error
            raise OutcomeUnknownError(f"{doing}: {words(error)}") from error

    def _send(self, records: Sequence[EventRecord], counts: Mapping[str, int]) -> None:
        prefix = self._kafka.target.prefix
        futures = []
        for topic, key, value, headers, partition in records:
            chosen = partition_of(key, counts[topic]) if partition is None else partition
            futures.append(
                self._producer.send(prefix + topic, value=value, key=key, headers=list(headers), partition=chosen)
            )
        self._producer.flush(self._kafka.target.timeout_s)
        for future in futures:
            future.get(0)

    def _count(self, topic: str) -> int:
        """How many partitions a topic has, which is created where it is not there."""
        known = self._counts.get(topic)
        if known is None:
            known = self._described(topic) or self._made(topic)
            self._counts[topic] = known
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

    def fetch(self, offsets: Mapping[Place, int], *, limit_bytes: int, wait_s: float) -> Sequence[StoredEvent]:  # noqa: ARG002
        """At most 8 MiB at once, as Kafka sends it, whatever ``limit_bytes`` says."""
        if not offsets:
            return []
        with translated(self._kafka.target, "cannot read events"), inflating(INFLATED_BYTES_MAX):
            if self._consumer is None:
                self._consumer = connect_client(self._kafka.target, "KafkaConsumer", CONSUMER)
            self._stand(offsets)
            deadline = time.monotonic() + _ARRIVAL_S
            while not (came := self._consumer.poll(timeout_ms=int(wait_s * 1000), max_records=_FETCH_RECORDS)):
                if not self._is_behind(offsets):
                    return []
                if time.monotonic() > deadline:
                    raise UnavailableError(f"{self._kafka.target.label} has events, but sends none")
                wait_s = _SLICE_S
        return [self._stored(record) for records in came.values() for record in records]

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

    def _stored(self, record: Any) -> StoredEvent:
        place = Place(record.topic.removeprefix(self._kafka.target.prefix), record.partition)
        self._stands[place] = record.offset + 1
        headers = tuple((name, bytes(value or b"")) for name, value in record.headers)
        return StoredEvent(place, record.offset, record.key, record.value, headers)

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
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None
        with closing(self._kafka):
            pass

    def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            end_producer(producer)
