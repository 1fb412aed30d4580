"""Whole record batches out of kafka-python's consumer, which otherwise makes an object of every record.

What the consumer does about leaders, offsets, checksums and aborted transactions remains its affair; only the innermost
loop, from a batch to its records, is ours.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from cdc.brokers.kafka.client import library
from cdc.brokers.kafka.framing import Parsed, parse
from cdc.brokers.kafka.inflate import InflatedError


class Fetched(NamedTuple):
    """A batch that was read. ``offset`` is that of its last record, ``first`` the one that was asked for."""

    offset: int
    base: int
    first: int
    records: list[Parsed]


def by_batches(consumer: Any) -> Any:
    """``consumer``, made to return a :class:`Fetched` for each batch instead of its records."""
    fetcher = consumer._fetcher
    fetcher.PartitionRecords = _by_batches(fetcher.PartitionRecords)
    return consumer


def _by_batches(original: Any) -> Any:
    class Batches(original):  # type: ignore[misc]
        def _unpack_records(self, tp: Any, records: Any, *_: object) -> Iterator[Fetched]:
            first: int = self.fetch_offset
            while (batch := records.next_batch()) is not None:
                if batch.magic != 2:
                    raise library("errors").UnsupportedVersionError(
                        f"{tp.topic} holds batches of format {batch.magic}, older than kafka 0.11"
                    )
                if not batch.validate_crc():
                    raise library("errors").CorruptRecordError(
                        f"a batch of {tp.topic}[{tp.partition}] at offset {batch.base_offset} fails its checksum"
                    )
                self.leader_epoch = batch.leader_epoch
                read = None if self._is_left_out(batch) else _read(tp, batch, first)
                self.next_fetch_offset = batch.next_offset
                if read is not None:
                    yield read
            self.drain()

        def _is_left_out(self, batch: Any) -> bool:
            """Of a transaction that was aborted, or a marker of one."""
            if batch.has_producer_id():
                self._consume_aborted_transactions_up_to(batch.last_offset)
                if self._contains_abort_marker(batch):
                    self.aborted_producer_ids.discard(batch.producer_id)
                elif self._is_batch_aborted(batch):
                    return True
            return bool(batch.is_control_batch)

    return Batches


def _inflate(tp: Any, batch: Any) -> None:
    errors = library("errors")
    try:
        batch._maybe_uncompress()
    except (InflatedError, errors.KafkaError):
        raise
    except Exception as error:  # each codec's library has errors of its own
        raise errors.CorruptRecordError(
            f"a batch of {tp.topic}[{tp.partition}] at offset {batch.base_offset} cannot be inflated: {error}"
        ) from error


def _read(tp: Any, batch: Any, first: int) -> Fetched:
    _inflate(tp, batch)
    try:
        records = parse(bytes(memoryview(batch._buffer)[batch._pos :]), 0, batch.records_count)
    except ValueError as error:
        raise library("errors").CorruptRecordError(
            f"a batch of {tp.topic}[{tp.partition}] at offset {batch.base_offset}: {error}"
        ) from error
    return Fetched(batch.last_offset, batch.base_offset, first, records)
