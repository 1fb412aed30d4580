"""Apache Kafka as the broker: ``kafka://host:port[,host:port…]/[prefix][?option=value&…]``.

What follows the slash stands before the name of each topic as it is: ``kafka://h:9092/shop.`` keeps the stream
``orders`` in the topic ``shop.orders``. Options come from the query, or from the environment as ``CDC_KAFKA_…``
(``password-file`` is ``CDC_KAFKA_PASSWORD_FILE``); the query wins. They are described at :data:`OPTIONS`. A password
comes from ``CDC_KAFKA_PASSWORD``, from the file, or percent-encoded from the URL, and is in no message.

A topic of ours has one partition, is written by an idempotent producer with ``acks=all`` and read by offset, without
a consumer group (https://kafka.apache.org/documentation/#producerconfigs, #consumerconfigs). Three things are done in
another way than a Kafka client's defaults suggest:

- What is appended together travels as one record batch, which Kafka keeps whole or not at all, and the next batch is
  sent only after it: with several on the way a client may lose one and still deliver the one behind it.
- A topic is known by its id, not by its name: one that was deleted and created again is a gap.
- A record batch that others compressed is inflated up to 64 MiB and no further.
"""

import contextlib
import importlib
import importlib.util
import io
import ipaddress
import logging
import os
import re
import socket
import ssl
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote

from cdc.errors import (
    AccessError,
    CdcError,
    ConfigurationError,
    DecodeError,
    GapError,
    LocalIOError,
    OutcomeUnknownError,
    UnavailableError,
    UsageError,
)
from cdc.record import Message

OPTIONS: Final[Mapping[str, str]] = {
    "security": "plaintext, ssl, sasl_ssl or sasl_plaintext; follows from the other options where it is not given",
    "mechanism": "SCRAM-SHA-512 (without a word), SCRAM-SHA-256 or PLAIN",
    "username": "who we are, for sasl",
    "password-file": "a file whose first line is the password",
    "cafile": "PEM file of the authorities to trust, the system's where it is not given",
    "certfile": "PEM file of our certificate, for mutual TLS",
    "keyfile": "PEM file of its key, where certfile does not hold it",
    "insecure": "true: a password may travel without TLS, to this very machine only",
    "retention-ms": "how long topics that we create keep messages, -1 (without a word): for ever",
    "replicas": "replication factor of topics that we create, without a word the broker's default",
    "timeout-s": "how long the brokers may take to make a batch durable: 30 without a word",
}
MESSAGE_BYTES_MAX: Final = 16 << 20
"""``max.message.bytes`` of the topics that we create."""

_DEFAULT_PORT: Final = 9092
_MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_SECURITIES: Final = ("plaintext", "ssl", "sasl_plaintext", "sasl_ssl")
_TOPIC_CHARACTERS_MAX: Final = 249  # https://kafka.apache.org/documentation/#basic_ops_add_topic

# Measured with bodies of 900 KiB, one batch after the other: 1 a batch 106 MB/s, 4 127, 8 140.
_BATCH_BYTES: Final = 8 << 20
_BATCH_OVERHEAD_BYTES: Final = 128
_RECORD_OVERHEAD_BYTES: Final = 32
_SERVER_MESSAGE_BYTES: Final = 1_048_588  # Kafka's own default, where a topic does not tell
_LINGER_MS: Final = 120_000  # batches leave when we flush them, not before
_FETCH_BYTES: Final = 8 << 20
_RECORDS_MAX: Final = 500
_INFLATED_BYTES_MAX: Final = 64 << 20

_CONNECT_S: Final = 5.0
_REQUEST_MS: Final = 15_000
_SLICE_S: Final = 1.0
_TRUST_S: Final = 0.5  # how old what we know of a topic's identity may be
_GRACE_S: Final = 1.0
_PAUSE_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Target:
    """Where the brokers are and how to speak to them: a URL and its environment, understood."""

    servers: tuple[tuple[str, int], ...]
    prefix: str = ""
    security: str = "plaintext"
    mechanism: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    cafile: str = ""
    certfile: str = ""
    keyfile: str = ""
    retention_ms: int = -1
    replicas: int = -1
    timeout_s: float = 30.0

    @property
    def label(self) -> str:
        """``kafka://host:port``, for people."""
        return f"kafka://{','.join(self.addresses)}"

    @property
    def addresses(self) -> list[str]:
        return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.servers]

    @property
    def has_tls(self) -> bool:
        return self.security.endswith("ssl")

    @property
    def has_sasl(self) -> bool:
        return self.security.startswith("sasl")


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


def parse(url: str, environ: Mapping[str, str]) -> Target:
    """Understand a ``kafka://`` URL; see the module's head. Reads the password's file where one is named.

    :raises UsageError, LocalIOError: as :func:`connect`.
    """
    scheme, separator, rest = url.partition("://")
    if scheme != "kafka" or not separator:
        shown = f": {scheme}://" if separator and scheme.isalpha() else ""  # the rest may be a password
        raise UsageError(f"not a kafka url{shown}", remedy="write it as kafka://host:port/")
    rest, hash_sign, _ = rest.partition("#")
    rest, _, query = rest.partition("?")
    authority, _, prefix = rest.partition("/")
    userinfo, _, servers = authority.rpartition("@")
    if hash_sign or "@" in prefix:
        raise UsageError(
            "a kafka url has no # in it, and no @ after the first slash",
            remedy="write # as %23, / as %2F and @ as %40 in a user's name or password",
        )
    given = _options(query, environ)
    name, colon, password = userinfo.partition(":")
    if name:
        given["username"] = unquote(name)
    secret = unquote(password) if colon else _password(given, environ)
    return _checked(
        Target(
            servers=_servers(servers),
            prefix=_checked_prefix(unquote(prefix)),
            security=given.get("security", "").lower(),
            mechanism=given.get("mechanism", "").upper(),
            username=given.get("username", ""),
            password=secret,
            cafile=given.get("cafile", ""),
            certfile=given.get("certfile", ""),
            keyfile=given.get("keyfile", ""),
            retention_ms=_number(given, "retention-ms", -1, least=-1),
            replicas=_number(given, "replicas", -1, least=1),
            timeout_s=_number(given, "timeout-s", 30, least=1),
        ),
        insecure=_truth(given, "insecure"),
    )


def encode_topic(name: str, prefix: str = "") -> str:
    """The name that Kafka knows a topic by: legal names as they are, other characters as ``_-XX`` per UTF-8 byte.

    :raises UsageError: it is empty, no Unicode, or too long for Kafka.
    """
    try:
        data = name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"topic name is not unicode: {name!r}", remedy="use letters and digits") from error
    escaped = _ESCAPED.sub(lambda match: b"_-%02X" % match[0][0], data).decode()
    if name in {".", ".."}:
        escaped = "_-2E" * len(name)
    topic = prefix + escaped
    if not name or len(topic) > _TOPIC_CHARACTERS_MAX:
        raise UsageError(
            f"topic name {name[:40]!r} is {len(topic)} characters long to kafka",
            remedy=f"use a name of 1 to {_TOPIC_CHARACTERS_MAX} letters, digits, dots, dashes and underscores",
        )
    return topic


def decode_topic(topic: str, prefix: str = "") -> str | None:
    """The name that :func:`encode_topic` writes as ``topic``; None where there is none."""
    if not topic.startswith(prefix):
        return None
    data = _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), topic.removeprefix(prefix).encode())
    try:
        name = data.decode()
        return name if encode_topic(name, prefix) == topic else None
    except (UnicodeDecodeError, UsageError):
        return None


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
        self._reader: _Reader | None = None
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
            for batch in _batches(bodies, min(_BATCH_BYTES, state.message_bytes_max)):
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
                with self._translated(f"cannot read topic {topic!r}"):
                    if not self._stands_at(name, offset) and not self._start(topic, name, offset, deadline):
                        return []
                    return self._take(topic, limit_bytes, deadline)
            except BaseException:
                self._drop_reader()  # where it stands is not known any more
                raise

    def bounds(self, topic: str) -> tuple[int, int]:
        name = self._name(topic)
        with self._translated(f"cannot ask for the bounds of topic {topic!r}"):
            return (0, 0) if self._describe(topic, name) is None else self._bounds(name)

    def topics(self) -> Sequence[str]:
        """The names of the topics there are, sorted: Kafka's own and those without our prefix left out."""
        with self._translated("cannot list the topics"):
            found = self._admin().describe_topics()
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
        (entry,) = self._admin().describe_topics([name])
        code = entry["error_code"]
        errors = _library("errors")
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
        return self._offset(name, _EARLIEST), self._offset(name, _LATEST)

    def _offset(self, name: str, which: int) -> int:
        partition = _partition(name)
        found = self._admin().list_partition_offsets({partition: which}, isolation_level="read_committed")
        return int(found[partition].offset)

    # Writing.

    def _writable(self, topic: str, name: str) -> "_Topic":
        """The topic's state, created where it is not there."""
        with self._translated(f"cannot write to topic {topic!r}"):
            self._verify_at_times(topic, name)
            if name not in self._topics:
                self._create_topic(topic, name)
                if not self._verify(topic, name):
                    raise UnavailableError(f"topic {topic!r} was created, but {self.target.label} does not know it yet")
            state = self._topics[name]
            if not state.message_bytes_max:
                state = self._topics[name] = state._replace(message_bytes_max=self._message_bytes_max(name))
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
        errors = _library("errors")
        try:
            self._admin().create_topics({name: wanted}, wait_for_metadata=True)
        except errors.TopicAlreadyExistsError:
            return
        except errors.InvalidTopicError as error:
            raise UsageError(
                f"kafka takes no topic {name!r}: {_words(error)}",
                remedy="use a name that differs from the others by more than dots and underscores",
            ) from error
        except (errors.InvalidReplicationFactorError, errors.PolicyViolationError) as error:
            raise ConfigurationError(
                f"cannot create topic {topic!r}: {_words(error)}", remedy="set ?replicas=, or create the topic yourself"
            ) from error

    def _message_bytes_max(self, name: str) -> int:
        """The topic's ``max.message.bytes``, Kafka's default where we may not ask."""
        admin = _library("admin")
        try:
            found = self._admin().describe_configs(
                [admin.ConfigResource(admin.ConfigResourceType.TOPIC, name)], config_filter="all"
            )
            return int(found["topic"][name]["max.message.bytes"]["value"])
        except (KeyError, _library("errors").AuthorizationError):
            return _SERVER_MESSAGE_BYTES

    def _check_size(self, topic: str, state: "_Topic", size: int) -> None:
        if size + _BATCH_OVERHEAD_BYTES > state.message_bytes_max:
            raise ConfigurationError(
                f"a message of {size} bytes for topic {topic!r}, which takes at most {state.message_bytes_max}",
                remedy=f"set the topic's max.message.bytes to {size + 4096} or more",
            )

    def _send(self, topic: str, name: str, bodies: Sequence[bytes]) -> int:
        """Append one record batch and return its first offset."""
        with self._translated(f"cannot append to topic {topic!r}"):
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
        errors = _library("errors")
        doing = f"cannot append {count} messages to topic {topic!r}"
        if isinstance(error, (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)):
            self._topics[name] = self._topics[name]._replace(message_bytes_max=0)  # it was lowered: ask again
            if count > 1:  # the client cut the batch, so a part may be there
                return OutcomeUnknownError(f"{doing}: {_words(error)}")
            return ConfigurationError(
                f"{doing}: more than it takes at once", remedy="raise the topic's max.message.bytes"
            )
        if isinstance(error, errors.AuthorizationError):
            return _translate(error, doing, self.target)
        with contextlib.suppress(UnavailableError):
            try:
                with self._translated(doing):
                    self._verify(topic, name)
            except GapError as gap:
                return gap
        return OutcomeUnknownError(f"{doing}: {_words(error)}")

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
            self._reader = _Reader(lambda: self._connected("KafkaConsumer", **_CONSUMER))
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

    def _get(self, topic: str, reader: "_Reader", deadline: float, *, at_once: bool) -> bool:
        """Let the reader get more; False where nothing came until the deadline and nothing is there."""
        wait_s = 0.0 if at_once else deadline - time.monotonic()
        while not reader.poll(min(max(wait_s, 0.0), _SLICE_S)):
            if at_once:
                return False
            left_s = deadline - time.monotonic()
            if left_s > 0:
                self._watch(topic, reader.name)
            elif self._offset(reader.name, _LATEST) <= reader.offset:
                self._verify(topic, reader.name)
                return False
            elif left_s < -self.target.timeout_s:
                raise UnavailableError(f"topic {topic!r} goes beyond offset {reader.offset}, but does not send it")
            wait_s = left_s if left_s > 0 else _SLICE_S  # what is there must come
        self._verify_at_times(topic, reader.name)
        return True

    def _watch(self, topic: str, name: str) -> None:
        """Look whether the topic is still there. A broker that is away for a while is waited for."""
        with contextlib.suppress(UnavailableError), self._translated(f"cannot read topic {topic!r}"):
            self._verify(topic, name)

    def _drop_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader:
            reader.close()

    # Clients.

    def _admin(self) -> Any:
        with self._lock:
            if "admin" not in self._clients:
                self._clients["admin"] = self._connected("KafkaAdminClient")
            return self._clients["admin"]

    def _producer(self) -> Any:
        if "producer" not in self._clients:
            self._clients["producer"] = self._connected("KafkaProducer", **_PRODUCER)
        return self._clients["producer"]

    def _drop_producer(self) -> None:
        producer = self._clients.pop("producer", None)
        if producer is None:
            return
        with contextlib.suppress(_library("errors").KafkaError):
            producer.close(timeout=0)
        # A flush that times out keeps close() from getting further, and the thread would go on trying to deliver.
        producer._sender.force_close()
        producer._sender.join(_CONNECT_S)

    def _connected(self, kind: str, **settings: Any) -> Any:
        """A client of kafka-python. One that reaches nobody leaves a thread behind, so that is found out before."""
        _probe(self.target)
        _quieten()
        client, manager = _built(getattr(_library(""), kind), {**_connection(self.target), **settings})
        if self.target.security == "sasl_plaintext":
            _check_advertised(client, manager, self.target)
        return client

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except CdcError:
            raise
        except Exception as error:
            if isinstance(error, (_library("errors").KafkaError, OSError)):
                raise _translate(error, doing, self.target) from error
            raise


class _Topic(NamedTuple):
    """What this object knows of a topic it used: ``end`` is where its own last append ended."""

    identity: str
    seen_s: float = 0.0
    end: int = 0
    message_bytes_max: int = 0

    def seen(self, now_s: float) -> "_Topic":
        return self._replace(seen_s=now_s)


class _Reader:
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
        self._consumer.assign([_partition(name)])
        self._consumer.seek(_partition(name), offset)

    def pop(self) -> Message:
        message = self.held.popleft()
        self.offset = message.offset + 1
        return message

    def poll(self, wait_s: float) -> bool:
        """Get more, waiting up to ``wait_s`` seconds for the first; was there any?"""
        try:
            with _inflating(_INFLATED_BYTES_MAX):
                came = self._consumer.poll(timeout_ms=int(wait_s * 1000), max_records=self._records_max)
        except _InflatedError as error:
            if self._records_max == 1:
                raise DecodeError(
                    f"topic {self.name!r} holds a batch at offset {self._next} or behind it that {error}",
                    remedy="whoever writes the topic must compress less at once",
                ) from error
            self._read_singly()
            return self.poll(wait_s)
        except Exception as error:
            if isinstance(error, (_library("errors").KafkaError, OSError)):
                raise
            raise DecodeError(
                f"topic {self.name!r} holds a batch at offset {self._next} or behind it that cannot be read: "
                f"{type(error).__name__}: {error}"
            ) from error
        for record in came.get(_partition(self.name), ()):
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
        self._consumer.assign([_partition(self.name)])
        self._consumer.seek(_partition(self.name), self._next)

    def close(self) -> None:
        self._consumer.close()


_EARLIEST: Final = -2  # https://kafka.apache.org/protocol#The_Messages_ListOffsets
_LATEST: Final = -1
_ESCAPED: Final = re.compile(rb"[^a-zA-Z0-9._-]|_(?=-[0-9A-F]{2})")
_ESCAPE: Final = re.compile(rb"_-([0-9A-F]{2})")
_PREFIX: Final = re.compile(r"[a-zA-Z0-9._-]{0,200}\Z")

_PRODUCER: Final[Mapping[str, Any]] = {
    "acks": "all",
    "enable_idempotence": True,
    "max_in_flight_requests_per_connection": 5,
    "compression_type": None,
    "linger_ms": _LINGER_MS,
    "batch_size": _BATCH_BYTES + (1 << 20),
    "max_request_size": 1 << 30,  # the topic's own limit is checked before
    "delivery_timeout_ms": _LINGER_MS + 2 * _REQUEST_MS,
    "allow_auto_create_topics": False,
    "max_block_ms": _REQUEST_MS,
    "metrics_enabled": False,
}
_CONSUMER: Final[Mapping[str, Any]] = {
    "group_id": None,
    "auto_offset_reset": "none",
    "enable_auto_commit": False,
    "isolation_level": "read_committed",
    "check_crcs": True,
    "allow_auto_create_topics": False,
    "fetch_max_bytes": _FETCH_BYTES,
    "max_partition_fetch_bytes": _FETCH_BYTES,
    "fetch_max_wait_ms": 100,  # another topic or offset can be asked for only after it
    "retry_backoff_ms": 20,
    "metrics_enabled": False,
}


class _Reasons(logging.Handler):
    """Keeps the exceptions that kafka-python logs while it connects: what it raises at last tells of none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args if isinstance(record.args, tuple) else ()
        self.found += [each for each in arguments if isinstance(each, BaseException)]


def _built(kind: Callable[..., Any], settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """A connected client, and the manager of its connections. One that could not connect leaves no thread behind."""
    made: list[Any] = []

    def net_client(**configs: Any) -> Any:
        made.append(_library("net.compat").KafkaNetClient(**configs))
        return made[-1]

    errors = _library("errors")
    reasons = _Reasons()
    logger = logging.getLogger("kafka.net.manager")
    logger.addHandler(reasons)
    try:
        return kind(**settings, kafka_client=net_client), made[0]._manager
    except errors.KafkaError as error:
        for client in made:
            client.close()
            client._manager._net.stop()
        refusals = (errors.SaslAuthenticationFailedError, errors.UnsupportedSaslMechanismError)
        raise next((each for each in reasons.found if isinstance(each, refusals)), error) from error
    finally:
        logger.removeHandler(reasons)


def _connection(target: Target) -> dict[str, Any]:
    """What every client of kafka-python is told."""
    settings: dict[str, Any] = {
        "bootstrap_servers": target.addresses,
        "client_id": "cdc",
        "security_protocol": target.security.upper(),
        "bootstrap_timeout_ms": int(_CONNECT_S * 1000),
        "request_timeout_ms": _REQUEST_MS,
        "reconnect_backoff_max_ms": 1000,
    }
    if target.has_tls:
        settings["ssl_context"] = _tls(target)
    if target.has_sasl:
        settings["sasl_mechanism"] = target.mechanism
        settings["sasl_plain_username"] = target.username
        settings["sasl_plain_password"] = target.password
    return settings


def _tls(target: Target) -> ssl.SSLContext:
    """:raises ConfigurationError: a file cannot be used."""
    try:
        context = ssl.create_default_context(cafile=target.cafile or None)
        if target.certfile:
            # An empty password: a key that wants one must not ask at the terminal.
            context.load_cert_chain(target.certfile, target.keyfile or None, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        names = [name for name in (target.cafile, target.certfile, target.keyfile) if name]
        raise ConfigurationError(
            f"cannot use the tls files {', '.join(map(repr, names))}: {error}",
            remedy="name readable PEM files with cafile=, certfile= and keyfile=; the key without a password",
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _probe(target: Target) -> None:
    """Is there a server that accepts a connection, with TLS where we want it?

    :raises UnavailableError, AccessError: none does; with the reason of each.
    """
    context = _tls(target) if target.has_tls else None
    reasons: list[str] = []
    refused = False
    for host, port in target.servers:
        try:
            with socket.create_connection((host, port), timeout=_CONNECT_S) as plain:
                if context is not None:
                    _shake_hands(context, plain, host)
                return
        except OSError as error:
            refused = refused or isinstance(error, ssl.SSLCertVerificationError) or "alert" in str(error).lower()
            reasons.append(f"{host}:{port}: {(error.strerror or str(error) or type(error).__name__).lower()}")
    message = f"cannot reach kafka at {'; '.join(reasons)}"
    if refused:
        raise AccessError(
            message, remedy="check cafile=, certfile= and keyfile=, and the host in the server's certificate"
        )
    raise UnavailableError(message)


def _shake_hands(context: ssl.SSLContext, plain: socket.socket, host: str) -> None:
    with context.wrap_socket(plain, server_hostname=host) as secured:
        # With TLS 1.3 a server refuses our certificate only after the handshake.
        secured.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            secured.recv(1)


def _check_advertised(client: Any, manager: Any, target: Target) -> None:
    """A password must not go where a server on this machine sends us.

    :raises UsageError: a broker says that it is elsewhere.
    """
    for broker in manager.cluster.brokers():
        if not _is_loopback(broker.host):
            client.close()
            raise UsageError(
                f"{target.label} sends us to {broker.host}:{broker.port}, and the password would travel without tls",
                remedy="use security=sasl_ssl",
            )


def _quieten() -> None:
    """Errors come out as exceptions; and at DEBUG kafka-python logs its configuration, passwords too."""
    logger = logging.getLogger("kafka")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)


def _library(module: str) -> Any:
    """A module of kafka-python. Importing it takes half a second, so nobody does who does not need it."""
    return importlib.import_module(f"kafka.{module}" if module else "kafka")


def _partition(name: str) -> Any:
    return _library("structs").TopicPartition(name, 0)


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


# Errors.


def _translate(error: Exception, doing: str, target: Target) -> CdcError:
    """What an error of kafka-python means for us (https://kafka.apache.org/protocol#protocol_error_codes)."""
    errors = _library("errors")
    message = f"{doing}: {_words(error)}"
    if isinstance(error, (errors.OffsetOutOfRangeError, errors.LogTruncationError)):
        return GapError(f"{message}: the messages from there on were removed")
    if isinstance(error, (errors.AuthorizationError, errors.SaslAuthenticationFailedError)):
        return AccessError(
            f"{message} (as {target.username or 'nobody'!r})",
            remedy="grant the user Describe, Read and, to write, Write, Create and IdempotentWrite; check its password",
        )
    if isinstance(error, errors.CorruptRecordError):
        return DecodeError(message)
    for kinds, remedy in (
        ((errors.UnsupportedCodecError,), "install the package of that codec: lz4, zstandard or python-snappy"),
        ((errors.UnsupportedSaslMechanismError,), "choose a mechanism= that the brokers know"),
        ((errors.UnsupportedVersionError,), "use kafka 2.8 or newer"),
    ):
        if isinstance(error, kinds):
            return ConfigurationError(message, remedy=remedy)
    return UnavailableError(f"{message} ({target.label})")


def _words(error: Exception) -> str:
    """An error's name and text, without the name twice and without what Kafka answered in full."""
    text = str(error).partition("failed with response")[0].strip() or "no reason told"
    name = type(error).__name__
    return text[:300] if text.startswith("[Error") or name in text else f"{name}: {text[:300]}"


# Decompression.


class _InflatedError(Exception):
    """A batch became larger than allowed."""


class _Allowance(threading.local):
    """How many bytes this thread may still inflate; None: it does not read for us."""

    left: int | None = None


_allowance: Final = _Allowance()


@contextlib.contextmanager
def _inflating(limit_bytes: int) -> Iterator[None]:
    """Bound what kafka-python inflates in this thread meanwhile, ``limit_bytes`` in all.

    It has no such limit of its own, nor a place to set one: its two modules that read batches have their
    decompressing functions replaced, which do as before wherever nobody set a limit.
    """
    _replace_decoders()
    _allowance.left = limit_bytes
    try:
        yield
    finally:
        _allowance.left = None


def _replace_decoders() -> None:
    for name in ("record.default_records", "record.legacy_records"):
        module = _library(name)
        for function, bounded in _DECODERS.items():
            original = getattr(module, function, None)
            if original is not None and not hasattr(original, "bounded"):
                setattr(module, function, _limited(original, bounded))


def _limited(original: Callable[[Any], bytes], bounded: Callable[[bytes, int], bytes]) -> Callable[[Any], bytes]:
    def decode(payload: Any) -> bytes:
        if _allowance.left is None:
            return original(payload)
        inflated = bounded(bytes(payload), _allowance.left)
        _allowance.left -= len(inflated)
        if _allowance.left < 0:
            raise _InflatedError(f"inflates to more than {_INFLATED_BYTES_MAX} bytes")
        return inflated

    decode.bounded = True  # type: ignore[attr-defined]
    return decode


def _gunzip(payload: bytes, limit_bytes: int) -> bytes:
    """One byte more than allowed at the most, as the others below."""
    inflated = b""
    while payload and len(inflated) <= limit_bytes:
        member = zlib.decompressobj(wbits=31)
        inflated += member.decompress(payload, limit_bytes + 1 - len(inflated))
        payload = member.unused_data
    return inflated


def _unlz4(payload: bytes, limit_bytes: int) -> bytes:
    inflated: bytes = importlib.import_module("lz4.frame").LZ4FrameDecompressor().decompress(payload, limit_bytes + 1)
    return inflated


def _unzstd(payload: bytes, limit_bytes: int) -> bytes:
    library = importlib.import_module("zstandard")
    reader = library.ZstdDecompressor(max_window_size=limit_bytes).stream_reader(
        io.BytesIO(payload), read_across_frames=True
    )
    inflated: bytes = reader.read(limit_bytes + 1)
    return inflated


def _unsnappy(payload: bytes, limit_bytes: int) -> bytes:
    """Each block begins with its length when inflated, which the library holds it to."""
    library = importlib.import_module("snappy")
    blocks = _xerial_blocks(payload) if payload.startswith(_XERIAL) else [payload]
    inflated = b""
    for block in blocks:
        if len(inflated) + _varint(block) > limit_bytes:
            raise _InflatedError(f"inflates to more than {limit_bytes} bytes")
        inflated += library.decompress(block)
    return inflated


_XERIAL: Final = b"\x82SNAPPY\0"
_DECODERS: Final[Mapping[str, Callable[[bytes, int], bytes]]] = {
    "gzip_decode": _gunzip,
    "lz4_decode": _unlz4,
    "lz4_decode_old_kafka": _unlz4,
    "zstd_decode": _unzstd,
    "snappy_decode": _unsnappy,
}


def _xerial_blocks(payload: bytes) -> Iterator[bytes]:
    """The blocks that Java's snappy writes: a head of 16 bytes, then each behind its length of four."""
    at = 16
    while at < len(payload):
        size = int.from_bytes(payload[at : at + 4])
        yield payload[at + 4 : at + 4 + size]
        at += 4 + size


def _varint(data: bytes) -> int:
    """https://github.com/google/snappy/blob/main/format_description.txt, section 1."""
    value = 0
    for index, byte in enumerate(data[:5]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            break
    return value


# The URL.


def _options(query: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Every option that was given, by its name."""
    given = {
        name: environ[variable]
        for name in OPTIONS
        if environ.get(variable := f"CDC_KAFKA_{name.replace('-', '_').upper()}")
    }
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name == "password":
            raise UsageError(
                "a password has no place in a url's query",
                remedy="put it into CDC_KAFKA_PASSWORD, or into a file that password-file= names",
            )
        if name not in OPTIONS:
            raise UsageError(f"unknown option {name!r} in the kafka url", remedy=f"options are {', '.join(OPTIONS)}")
        given[name] = value
    return given


def _password(given: Mapping[str, str], environ: Mapping[str, str]) -> str:
    path = given.get("password-file", "")
    if not path:
        return environ.get("CDC_KAFKA_PASSWORD", "")
    try:
        return Path(path).read_text("utf-8").partition("\n")[0].removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise LocalIOError(
            f"cannot read the password's file {path!r}: {getattr(error, 'strerror', None) or 'not utf-8'}",
            remedy="name a readable file with password-file=",
        ) from error


def _servers(text: str) -> tuple[tuple[str, int], ...]:
    servers = tuple(_server(part) for part in text.split(","))
    if len(set(servers)) != len(servers):
        raise UsageError(f"a server stands twice in {text!r}", remedy="name each once")
    return servers


def _server(text: str) -> tuple[str, int]:
    match = _SERVER.match(text)
    port = int(match["port"] or _DEFAULT_PORT) if match else 0
    if match is None or not 0 < port < 65536:
        raise UsageError(f"not a server's address: {text!r}", remedy="write kafka://host:port[,host:port]/")
    return match["v6"] or match["host"], port


_SERVER: Final = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[a-zA-Z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?\Z")


def _checked_prefix(prefix: str) -> str:
    if not _PREFIX.match(prefix):
        raise UsageError(
            f"not a prefix for topic names: {prefix[:80]!r}", remedy="use letters, digits, dots, dashes and underscores"
        )
    return prefix


def _number(given: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    text = given.get(name, str(default))
    if not re.fullmatch(r"-?[0-9]{1,15}", text) or (int(text) < least and int(text) != default):
        raise UsageError(f"{name} is {text!r}", remedy=f"write a whole number of at least {least}")
    return int(text)


def _truth(given: Mapping[str, str], name: str) -> bool:
    text = given.get(name, "false").lower()
    if text not in {"true", "false"}:
        raise UsageError(f"{name} is {text!r}", remedy="write true or false")
    return text == "true"


def _checked(target: Target, *, insecure: bool) -> Target:
    """Complete what follows from other options, and refuse what does not fit together or is not safe."""
    security = target.security or _implied_security(target)
    mechanism = target.mechanism or ("SCRAM-SHA-512" if security.startswith("sasl") else "")
    done = _replaced(target, security, mechanism)
    if security not in _SECURITIES:
        raise UsageError(f"security is {security!r}", remedy=f"use one of {', '.join(_SECURITIES)}")
    if done.has_sasl:
        _check_sasl(done)
    elif target.username or target.mechanism:
        raise UsageError(
            f"security={security} has no use for a username or a mechanism",
            remedy="use security=sasl_ssl, or leave both out",
        )
    if not done.has_tls and (target.cafile or target.certfile or target.keyfile):
        raise UsageError(f"security={security} has no use for tls files", remedy="use security=ssl or sasl_ssl")
    if target.keyfile and not target.certfile:
        raise UsageError("a keyfile without its certfile", remedy="name the certificate with certfile=")
    if security == "sasl_plaintext" and not (insecure and all(_is_loopback(host) for host, _ in target.servers)):
        raise UsageError(
            f"security=sasl_plaintext would send a password to {target.label} without tls",
            remedy="use security=sasl_ssl; on this very machine alone insecure=true allows it",
        )
    return done


def _implied_security(target: Target) -> str:
    if target.username or target.mechanism:
        return "sasl_ssl"
    return "ssl" if target.cafile or target.certfile or target.keyfile else "plaintext"


def _replaced(target: Target, security: str, mechanism: str) -> Target:
    return replace(target, security=security, mechanism=mechanism)


def _check_sasl(target: Target) -> None:
    if target.mechanism not in _MECHANISMS:
        raise UsageError(
            f"mechanism {target.mechanism!r} is not supported", remedy=f"use one of {', '.join(_MECHANISMS)}"
        )
    if not target.username or not target.password:
        raise UsageError(
            f"security={target.security} needs a username and a password",
            remedy="set CDC_KAFKA_USERNAME, and CDC_KAFKA_PASSWORD or CDC_KAFKA_PASSWORD_FILE",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
