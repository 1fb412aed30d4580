"""Whole record batches through kafka-python's producer, which otherwise takes records one by one.

The batch that its accumulator would have filled is put there ready made: leaders, retries, and the idempotent
producer's sequence numbers remain the sender's affair, so that a partition keeps its order and a retry doubles nothing.
"""

import time
from collections import deque
from typing import Any, Final

from cdc.brokers.kafka.client import library
from cdc.brokers.kafka.framing import CHECKED_FROM, Bare, Producer, seal, with_header

_ON_THE_WAY_BYTES: Final = 32 << 20


class Sending:
    """What was handed to a producer and is not durable yet, about 32 MiB at most."""

    def __init__(self, producer: Any, timeout_s: float) -> None:
        self._producer = producer
        self._timeout_s = timeout_s
        self._waiting: deque[tuple[Any, int]] = deque()
        self._size = 0

    def send(self, topic: str, partition: int, bare: Bare) -> None:
        """Hand over a batch; may wait for earlier ones.

        :raises KafkaError: an earlier batch failed.
        """
        if self._producer._closed:
            raise library("errors").IllegalStateError("the producer is closed")
        place = library("structs").TopicPartition(topic, partition)
        if partition not in self._producer.partitions_for(topic):  # which learns of the topic, where it is new
            raise library("errors").UnknownTopicOrPartitionError(f"{topic} has no partition {partition}")
        batch = library("producer.producer_batch").ProducerBatch(place, PreparedRecords(bare))
        accumulator = self._producer._accumulator
        with accumulator._tp_lock(place):
            accumulator._batches[place].append(batch)
            accumulator._incomplete.add(batch)
        self._producer._sender.wakeup()
        self._waiting.append((batch.produce_future, len(bare.body)))
        self._size += len(bare.body)
        while self._size > _ON_THE_WAY_BYTES:
            self._await_first()

    def wait(self) -> None:
        """Until all are durable.

        :raises KafkaError: one failed, or did not become durable in time.
        """
        while self._waiting:
            self._await_first()

    def _await_first(self) -> None:
        future, size = self._waiting[0]
        if not future.wait(self._timeout_s):
            raise library("errors").KafkaTimeoutError(f"nothing heard of a batch for {self._timeout_s:g} seconds")
        if future.failed():
            raise future.exception
        _, _, failure_of = future.value
        if failure_of is not None:
            raise failure_of(0)
        self._waiting.popleft()
        self._size -= size


def whole_batches(producer: Any) -> Any:
    """``producer``, made to refuse a batch that is too large: it cannot cut what was not put together by itself."""
    producer._sender._can_split = lambda _batch, _error: False
    return producer


class PreparedRecords:
    """What a ProducerBatch of kafka-python wants of its records (``MemoryRecordsBuilder``), already framed."""

    def __init__(self, bare: Bare) -> None:
        self._bare = bare
        self._producer = Producer()
        self._buffer: bytearray | None = None
        self._timestamp_ms = int(time.time() * 1000)

    @property
    def producer_id(self) -> int:
        return self._producer.id

    @property
    def producer_epoch(self) -> int:
        return self._producer.epoch

    @property
    def base_sequence(self) -> int:
        return self._producer.sequence

    def set_producer_state(
        self, producer_id: int, producer_epoch: int, base_sequence: int, is_transactional: bool
    ) -> None:
        if self._buffer is not None or is_transactional:
            raise library("errors").IllegalStateError("a batch keeps the producer and the sequence it was sent with")
        self._producer = Producer(producer_id, producer_epoch, base_sequence)

    def close(self) -> None:
        """Put header and checksum before the records, once: a retry sends the very same bytes."""
        if self._buffer is None:
            whole = with_header(self._bare, self._timestamp_ms, self._producer)
            seal(whole, library("record.util").calc_crc32c(memoryview(whole)[CHECKED_FROM:]))
            self._buffer = whole
            self._bare = self._bare._replace(body=b"")

    def buffer(self) -> bytearray:
        if self._buffer is None:
            raise library("errors").IllegalStateError("the batch is not closed yet")
        return self._buffer

    def size_in_bytes(self) -> int:
        return len(self._bare.body) + CHECKED_FROM if self._buffer is None else len(self._buffer)

    def is_full(self) -> bool:
        return True

    def next_offset(self) -> int:
        return self._bare.records

    def compression_rate(self) -> float:
        return 1.0
