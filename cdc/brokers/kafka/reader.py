"""A consumer that reads one topic at a time, by offset."""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from cdc.brokers.kafka.client import library, partition_zero
from cdc.brokers.kafka.inflate import INFLATED_BYTES_MAX, InflatedError, inflating
from cdc.errors import (
    DecodeError,
)
from cdc.record import Message

_RECORDS_MAX: Final = 500


class Reader:
    """A consumer of one topic at a time, and what it got but nobody took yet."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._consumer = connect()
        self._records_max = _RECORDS_MAX
        self._next = 0
        self.name = ""
        self.offset = 0  # of the next message to be taken
        self.held: deque[Message] = deque()

    def start(self, name: str, offset: int) -> None:
        self.name, self.offset, self._next = name, offset, offset
        self.held.clear()
        self._consumer.assign([partition_zero(name)])
        self._consumer.seek(partition_zero(name), offset)

    def pop(self) -> Message:
        message = self.held.popleft()
        self.offset = message.offset + 1
        return message

    def poll(self, wait_s: float) -> bool:
        """Get more, waiting up to ``wait_s`` seconds for the first; was there any?"""
        try:
            with inflating(INFLATED_BYTES_MAX):
                came = self._consumer.poll(timeout_ms=int(wait_s * 1000), max_records=self._records_max)
        except InflatedError as error:
            if self._records_max == 1:
                raise DecodeError(
                    f"topic {self.name!r} holds a batch at offset {self._next} or behind it that {error}",
                    remedy="whoever writes the topic must compress less at once",
                ) from error
            self._read_singly()
            return self.poll(wait_s)
        except Exception as error:
            if isinstance(error, (library("errors").KafkaError, OSError)):
                raise
            raise DecodeError(
                f"topic {self.name!r} holds a batch at offset {self._next} or behind it that cannot be read: "
                f"{type(error).__name__}: {error}"
            ) from error
        for record in came.get(partition_zero(self.name), ()):
            if record.value is None:
                raise DecodeError(f"topic {self.name!r} holds no body at offset {record.offset}: a tombstone")
            self.held.append(Message(record.offset, record.value))
            self._next = record.offset + 1
        return bool(came)

    def _read_singly(self) -> None:
        """Several batches were too large together; a consumer that failed is of no more use."""
        self._consumer.close()
        self._consumer = self._connect()
        self._records_max = 1
        self._consumer.assign([partition_zero(self.name)])
        self._consumer.seek(partition_zero(self.name), self._next)

    def close(self) -> None:
        self._consumer.close()
