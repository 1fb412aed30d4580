"""The broker itself; what it promises beyond its protocol stands at the head of the package."""

import contextlib
import importlib.util
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from cdc.brokers.kafka.client import (
    BATCH_BYTES,
    CONSUMER,
    PRODUCER,
    connect_client,
    end_producer,
    library,
    partition_zero,
    translate,
    translated,
    words,
)
from cdc.brokers.kafka.reader import Reader
from cdc.brokers.kafka.target import Target, decode_topic, encode_topic, parse
from cdc.errors import (
    CdcError,
    ConfigurationError,
    GapError,
    OutcomeUnknownError,
    UnavailableError,
    UsageError,
)
from cdc.record import Message

MESSAGE_BYTES_MAX: Final = 16 << 20
"""``max.message.bytes`` of the topics that we create."""

_BATCH_OVERHEAD_BYTES: Final = 128
_RECORD_OVERHEAD_BYTES: Final = 32
_SERVER_MESSAGE_BYTES: Final = 1_048_588  # Kafka's own default, where a topic does not tell

_SLICE_S: Final = 1.0
_TRUST_S: Final = 0.5  # how old what we know of a topic's identity may be
_GRACE_S: Final = 1.0
_PAUSE_S: Final = 0.05

EARLIEST: Final = -2  # https://kafka.apache.org/protocol#The_Messages_ListOffsets
LATEST: Final = -1


def connect(url: str, *, create: bool = True) -> "KafkaBroker":
    """The broker of a ``kafka://`` URL. Nothing is connected yet. With ``create=False`` it only reads.

    :raises UsageError: not such a URL, or an option that is unknown, does not fit or is not safe.
    :raises LocalIOError: the password's file cannot be read.
    :raises ConfigurationError: kafka-python is not installed.
    """
    target = parse(url, os.environ)
    if importlib.util.find_spec("kafka") is None:
        raise ConfigurationError("package 'kafka' is not installed", remedy="pip install 'cdc[kafka]'")
    return KafkaBroker(target, create=create)


class KafkaBroker:
    """:class:`~cdc.ports.Broker` on the Kafka of ``target``, connected on first use.

    The first append creates a topic that is not there; reading and asking never do. Offsets are Kafka's own: dense
    where only we write, with holes behind transactions of others and in compacted topics. May be used by several
    threads, but not across a fork.

    Every method raises UnavailableError where no broker answers, AccessError where the user may not, ConfigurationError
    where the topic is not as we need it.
    """

    def __init__(self, target: Target, *, create: bool = True) -> None:
        self.target = target
        self._create = create
        self._lock = threading.Lock()
        self._write_lock = threading.RLock()
        self._read_lock = threading.RLock()
        self._clients: dict[str, Any] = {}
        self._reader: Reader | None = None
        self._topics: dict[str, _Topic] = {}

    def __enter__(self) -> "KafkaBroker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"KafkaBroker({self.target.label!r})"

    def append(self, topic: str, bodies: Sequence[bytes]) -> int:
        """Add bodies and return the first one's offset once every in-sync replica has them.

        What is larger than 8 MiB in all, or than the topic takes, goes in several batches, each whole or not at all.

        :raises OutcomeUnknownError: they, or the first of them, may or may not be there. A server that was frozen may
            even append them after the topic's end was read: a repeat, which a topic may hold and followers skip.
        :raises GapError: the topic was deleted, or deleted and created again, since this object used it.
        :raises ConfigurationError: a body is larger than the topic takes; nothing was added.
        """
        name = self._name(topic)
        if not self._create:
            raise UsageError(f"{self.target.label} was opened for reading", remedy="open it with create=True to write")
        if not bodies:
            return self.bounds(topic)[1]
        with self._write_lock:
            state = self._writable(topic, name)
            for body in bodies:
                self._check_size(topic, state, len(body))
            first: int | None = None
            for batch in _batches(bodies, min(BATCH_BYTES, state.message_bytes_max)):
                try:
                    offset = self._send(topic, name, batch)
                except CdcError as error:
                    if first is not None and error.definite:
                        raise OutcomeUnknownError(f"a part was appended, then: {error}", remedy=error.remedy) from error
                    raise
                first = offset if first is None else first
            assert first is not None  # noqa: S101
            return first

    def read(self, topic: str, offset: int, *, limit_bytes: int, wait_s: float) -> Sequence[Message]:
        """Messages from ``offset`` on; the first has a higher offset where Kafka has none there (see the class).

        :raises GapError: as :meth:`cdc.ports.Broker.read` says; also where the topic was deleted, or deleted and
            created again, since this object used it, or a replica that lacked messages became its leader.
        :raises DecodeError: a batch fails its checksum, inflates beyond 64 MiB, or a message has no body.
        """
        name = self._name(topic)
        deadline = time.monotonic() + wait_s
        with self._read_lock:
            try:
                with translated(self.target, f"cannot read topic {topic!r}"):
                    if not self._stands_at(name, offset) and not self._start(topic, name, offset, deadline):
                        return []
                    return self._take(topic, limit_bytes, deadline)
            except BaseException:
                self._drop_reader()  # where it stands is not known any more
                raise

    def bounds(self, topic: str) -> tuple[int, int]:
        name = self._name(topic)
        with translated(self.target, f"cannot ask for the bounds of topic {topic!r}"):
            return (0, 0) if self._describe(topic, name) is None else self._bounds(name)

    def topics(self) -> Sequence[str]:
        """The names of the topics there are, sorted: Kafka's own and those without our prefix left out."""
        with translated(self.target, "cannot list the topics"):
            found = self.admin().describe_topics()
        names = (decode_topic(entry["name"], self.target.prefix) for entry in found if not entry["is_internal"])
        return sorted(name for name in names if name is not None)

    def close(self) -> None:
        with self._write_lock:
            self._drop_producer()
        with self._read_lock:
            self._drop_reader()
        with self._lock:
            admin = self._clients.pop("admin", None)
        if admin:
            admin.close()

    # Topics.

    def _name(self, topic: str) -> str:
        return encode_topic(topic, self.target.prefix)

    def _describe(self, topic: str, name: str) -> str | None:
        """The id of a topic as of now; None where there is none."""
        (entry,) = self.admin().describe_topics([name])
        code = entry["error_code"]
        errors = library("errors")
        if code == errors.UnknownTopicOrPartitionError.errno:
            return None
        if code:
            raise errors.for_code(code)(name)
        if len(entry["partitions"]) != 1:
            raise ConfigurationError(
                f"topic {topic!r} has {len(entry['partitions'])} partitions, a stream needs one",
                remedy="use another topic, or delete it and let `cdc ship` create it",
            )
        return str(entry["topic_id"])

    def _verify(self, topic: str, name: str) -> bool:
        """Is there such a topic, and the one that this object used before?

        :raises GapError: it is another one, or gone.
        """
        known = self._topics.get(name)
        identity = self._describe(topic, name)
        until = time.monotonic() + _GRACE_S
        # A broker that has just started, or lags, may not know of a topic yet.
        while known is not None and identity is None and time.monotonic() < until:
            time.sleep(_PAUSE_S)
            identity = self._describe(topic, name)
        if known is not None and identity != known.identity:
            what = "deleted" if identity is None else "deleted and created again"
            raise GapError(f"topic {topic!r} of {self.target.label} was {what} while it was in use")
        if identity is None:
            return False
        self._topics[name] = (known or _Topic(identity)).seen(time.monotonic())
        return True

    def _verify_at_times(self, topic: str, name: str) -> None:
        known = self._topics.get(name)
        if known is None or known.seen_s < time.monotonic() - _TRUST_S:
            self._verify(topic, name)

    def _bounds(self, name: str) -> tuple[int, int]:
        return self._offset(name, EARLIEST), self._offset(name, LATEST)

    def _offset(self, name: str, which: int) -> int:
        partition = partition_zero(name)
        found = self.admin().list_partition_offsets({partition: which}, isolation_level="read_committed")
        return int(found[partition].offset)

    # Writing.

    def _writable(self, topic: str, name: str) -> "_Topic":
        """The topic's state, created where it is not there."""
        with translated(self.target, f"cannot write to topic {topic!r}"):
            self._verify_at_times(topic, name)
            if name not in self._topics:
                self._create_topic(topic, name)
                if not self._verify(topic, name):
                    raise UnavailableError(f"topic {topic!r} was created, but {self.target.label} does not know it yet")
            state = self._topics[name]
            if not state.message_bytes_max:
                state = self._topics[name] = state._replace(message_bytes_max=self.message_bytes_max(name))
            return state

    def _create_topic(self, topic: str, name: str) -> None:
        settings = {
            "cleanup.policy": "delete",
            "retention.ms": str(self.target.retention_ms),
            "retention.bytes": "-1",
            "max.message.bytes": str(MESSAGE_BYTES_MAX),
            "unclean.leader.election.enable": "false",
        }
        if self.target.replicas > 2:
            settings["min.insync.replicas"] = "2"
        wanted = {"num_partitions": 1, "replication_factor": self.target.replicas, "configs": settings}
        errors = library("errors")
        try:
            self.admin().create_topics({name: wanted}, wait_for_metadata=True)
        except errors.TopicAlreadyExistsError:
            return
        except errors.InvalidTopicError as error:
            raise UsageError(
                f"kafka takes no topic {name!r}: {words(error)}",
                remedy="use a name that differs from the others by more than dots and underscores",
            ) from error
        except (errors.InvalidReplicationFactorError, errors.PolicyViolationError) as error:
            raise ConfigurationError(
                f"cannot create topic {topic!r}: {words(error)}", remedy="set ?replicas=, or create the topic yourself"
            ) from error

    def message_bytes_max(self, name: str) -> int:
        """The topic's ``max.message.bytes``, Kafka's default where we may not ask."""
        admin = library("admin")
        try:
            found = self.admin().describe_configs(
                [admin.ConfigResource(admin.ConfigResourceType.TOPIC, name)], config_filter="all"
            )
            return int(found["topic"][name]["max.message.bytes"]["value"])
        except (KeyError, library("errors").AuthorizationError):
            return _SERVER_MESSAGE_BYTES

    def _check_size(self, topic: str, state: "_Topic", size: int) -> None:
        if size + _BATCH_OVERHEAD_BYTES > state.message_bytes_max:
            raise ConfigurationError(
                f"a message of {size} bytes for topic {topic!r}, which takes at most {state.message_bytes_max}",
                remedy=f"set the topic's max.message.bytes to {size + 4096} or more",
            )

    def _send(self, topic: str, name: str, bodies: Sequence[bytes]) -> int:
        """Append one record batch and return its first offset."""
        with translated(self.target, f"cannot append to topic {topic!r}"):
            producer = self._producer()  # nothing is sent yet
        try:
            futures = [producer.send(name, value=body, partition=0) for body in bodies]
            producer.flush(self.target.timeout_s)
            offset = min(int(future.get(0).offset) for future in futures)
        except Exception as error:
            self._drop_producer()
            raise self._failed(topic, name, len(bodies), error) from error
        known = self._topics[name]
        if offset < 0:  # the broker had it already and has forgotten where
            self._drop_producer()
            raise OutcomeUnknownError(f"topic {topic!r} took {len(bodies)} messages at an offset it does not tell")
        if offset < known.end:
            self._drop_producer()
            raise GapError(
                f"topic {topic!r} of {self.target.label} gave offset {offset} after {known.end - 1}: "
                "it was deleted and created again while it was in use"
            )
        self._topics[name] = known._replace(end=offset + len(bodies))
        return offset

    def _failed(self, topic: str, name: str, count: int, error: Exception) -> CdcError:
        """What a failed append means. Only what the broker itself refused is certain not to have happened."""
        errors = library("errors")
        doing = f"cannot append {count} messages to topic {topic!r}"
        if isinstance(error, (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)):
            self._topics[name] = self._topics[name]._replace(message_bytes_max=0)  # it was lowered: ask again
            if count > 1:  # the client cut the batch, so a part may be there
                return OutcomeUnknownError(f"{doing}: {words(error)}")
            return ConfigurationError(
                f"{doing}: more than it takes at once", remedy="raise the topic's max.message.bytes"
            )
        if isinstance(error, errors.AuthorizationError):
            return translate(error, doing, self.target)
        with contextlib.suppress(UnavailableError):
            try:
                with translated(self.target, doing):
                    self._verify(topic, name)
            except GapError as gap:
                return gap
        return OutcomeUnknownError(f"{doing}: {words(error)}")

    # Reading.

    def _stands_at(self, name: str, offset: int) -> bool:
        return self._reader is not None and (self._reader.name, self._reader.offset) == (name, offset)

    def _start(self, topic: str, name: str, offset: int, deadline: float) -> bool:
        """Have the reader stand at ``offset``; False where there is no topic until the deadline."""
        while not self._verify(topic, name):
            left_s = deadline - time.monotonic()
            if offset != 0:
                raise GapError(f"topic {topic!r} of {self.target.label} has no offset {offset}: there is no such topic")
            if left_s <= 0:
                return False
            time.sleep(min(_PAUSE_S, left_s))
        first, end = self._bounds(name)
        if not first <= offset <= end:
            raise GapError(f"topic {topic!r} of {self.target.label} has no offset {offset}: it holds {first} to {end}")
        if self._reader is None:
            self._reader = Reader(lambda: connect_client(self.target, "KafkaConsumer", CONSUMER))
        self._reader.start(name, offset)
        return True

    def _take(self, topic: str, limit_bytes: int, deadline: float) -> list[Message]:
        """What the reader has, or gets until the deadline."""
        reader = self._reader
        assert reader is not None  # noqa: S101
        taken: list[Message] = []
        size = 0
        while True:
            while reader.held and (not taken or size + len(reader.held[0].body) <= limit_bytes):
                taken.append(reader.pop())
                size += len(taken[-1].body)
            if taken and (reader.held or size >= limit_bytes):
                return taken
            if not self._get(topic, reader, deadline, at_once=bool(taken)):
                return taken

    def _get(self, topic: str, reader: "Reader", deadline: float, *, at_once: bool) -> bool:
        """Let the reader get more; False where nothing came until the deadline and nothing is there."""
        wait_s = 0.0 if at_once else deadline - time.monotonic()
        while not reader.poll(min(max(wait_s, 0.0), _SLICE_S)):
            if at_once:
                return False
            left_s = deadline - time.monotonic()
            if left_s > 0:
                self._watch(topic, reader.name)
            elif self._offset(reader.name, LATEST) <= reader.offset:
                self._verify(topic, reader.name)
                return False
            elif left_s < -self.target.timeout_s:
                raise UnavailableError(f"topic {topic!r} goes beyond offset {reader.offset}, but does not send it")
            wait_s = left_s if left_s > 0 else _SLICE_S  # what is there must come
        self._verify_at_times(topic, reader.name)
        return True

    def _watch(self, topic: str, name: str) -> None:
        """Look whether the topic is still there. A broker that is away for a while is waited for."""
        with contextlib.suppress(UnavailableError), translated(self.target, f"cannot read topic {topic!r}"):
            self._verify(topic, name)

    def _drop_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader:
            reader.close()

    # Clients.

    def admin(self) -> Any:
        """The one administrative client, connected on first use."""
        with self._lock:
            if "admin" not in self._clients:
                self._clients["admin"] = connect_client(self.target, "KafkaAdminClient", {})
            return self._clients["admin"]

    def _producer(self) -> Any:
        if "producer" not in self._clients:
            self._clients["producer"] = connect_client(self.target, "KafkaProducer", PRODUCER)
        return self._clients["producer"]

    def _drop_producer(self) -> None:
        producer = self._clients.pop("producer", None)
        if producer is not None:
            end_producer(producer)


class _Topic(NamedTuple):
    """What this object knows of a topic it used: ``end`` is where its own last append ended."""

    identity: str
    seen_s: float = 0.0
    end: int = 0
    message_bytes_max: int = 0

    def seen(self, now_s: float) -> "_Topic":
        return self._replace(seen_s=now_s)


def _batches(bodies: Sequence[bytes], limit_bytes: int) -> Iterator[list[bytes]]:
    """Consecutive bodies that fit into one record batch together, at least one each."""
    batch: list[bytes] = []
    size = _BATCH_OVERHEAD_BYTES
    for body in bodies:
        cost = len(body) + _RECORD_OVERHEAD_BYTES
        if batch and size + cost > limit_bytes:
            yield batch
            batch, size = [], _BATCH_OVERHEAD_BYTES
        batch.append(body)
        size += cost
    if batch:
        yield batch
