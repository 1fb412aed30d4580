"""The Kafka broker on a real Kafka that is killed, frozen, emptied, replaced, and written to by others."""

import contextlib
import resource
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
from kafka import KafkaProducer, TopicPartition  # type: ignore[import-untyped]
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient  # type: ignore[import-untyped]

from cdc.brokers.kafka import KafkaBroker, connect, parse
from cdc.errors import (
    AccessError,
    CdcError,
    ConfigurationError,
    DecodeError,
    GapError,
    OutcomeUnknownError,
    UnavailableError,
    UsageError,
)
from cdc.record import Message
from tests.fix_kafka import KafkaServer, LocalKafka, SecureKafka, fresh_url

T = TypeVar("T")

PLENTY = 1 << 30
MIB = 1 << 20


@pytest.fixture
def broker(kafka_url: str) -> Iterator[KafkaBroker]:
    with connect(kafka_url) as opened:
        yield opened


@pytest.fixture
def other(kafka_url: str) -> Iterator[KafkaBroker]:
    """A second connection to the same topics."""
    with connect(kafka_url) as opened:
        yield opened


@pytest.fixture
def admin(kafka_url: str) -> Iterator[Any]:
    client = KafkaAdminClient(bootstrap_servers=parse(kafka_url, {}).addresses)
    with contextlib.closing(client):
        yield client


def name_of(url: str, topic: str = "t") -> str:
    return parse(url, {}).prefix + topic


def partition_of(url: str, topic: str = "t") -> Any:
    return TopicPartition(name_of(url, topic), 0)


def foreign_producer(url: str, **settings: Any) -> Any:
    return KafkaProducer(bootstrap_servers=parse(url, {}).addresses, max_request_size=PLENTY, **settings)


def read_all(broker: KafkaBroker, topic: str = "t") -> list[bytes]:
    offset, end = broker.bounds(topic)
    bodies: list[bytes] = []
    while offset < end and (messages := broker.read(topic, offset, limit_bytes=MIB, wait_s=0)):
        bodies += [message.body for message in messages]
        offset = messages[-1].offset + 1
    return bodies


def delete_topic(admin: Any, name: str) -> None:
    admin.delete_topics([name])
    deadline = time.monotonic() + 20
    while name in admin.list_topics():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def numbered(first: int, count: int) -> list[bytes]:
    return [b"%d " % number + b"x" * (number * 7919 % 20_000) for number in range(first, first + count)]


def number_of(body: bytes) -> int:
    return int(body.partition(b" ")[0])


def next_number(broker: KafkaBroker) -> int:
    """What the topic's end says is to be written next."""
    _, end = broker.bounds("t")
    return number_of(broker.read("t", end - 1, limit_bytes=1, wait_s=0)[0].body) + 1 if end else 0


def retrying(act: Callable[[], T], *, for_s: float = 90) -> T:
    deadline = time.monotonic() + for_s
    while True:
        try:
            return act()
        except UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


class Load(threading.Thread):
    """Appends numbers, and after a failure goes on from what the topic holds."""

    def __init__(self, broker: KafkaBroker) -> None:
        super().__init__()
        self.broker = broker
        self.failures: list[UnavailableError] = []
        self.acknowledged = 0
        self.stopping = threading.Event()

    def run(self) -> None:
        following = 0
        while not self.stopping.is_set():
            try:
                count = 1 + following % 5
                self.broker.append("t", numbered(following, count))
                following += count
                self.acknowledged = following
            except UnavailableError as error:
                self.failures.append(error)
                following = retrying(lambda: next_number(self.broker))

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 90
        while self.acknowledged < count:
            assert time.monotonic() < deadline
            assert self.is_alive()
            time.sleep(0.02)


@pytest.mark.parametrize("timeout_s", [1, 30], ids=["gives up", "waits"])
def test_a_kafka_killed_under_load_loses_and_doubles_nothing(
    kafka: KafkaServer, kafka_url: str, timeout_s: int
) -> None:
    with connect(f"{kafka_url}?timeout-s={timeout_s}") as broker:
        load = Load(broker)
        load.start()
        try:
            for _ in range(2):
                load.wait_for(load.acknowledged + 200)
                kafka.stop()
                time.sleep(2)
                kafka.start()
            load.wait_for(load.acknowledged + 200)
        finally:
            load.stopping.set()
            load.join()
        written = [number_of(body) for body in read_all(broker)]
        assert written == [*range(len(written))]
        assert len(written) >= load.acknowledged >= 600
        assert load.failures or timeout_s == 30  # the pauses are longer than one second


def test_a_frozen_kafka_leaves_an_outcome_unknown_that_the_end_tells(kafka: KafkaServer, kafka_url: str) -> None:
    if not isinstance(kafka, LocalKafka):
        pytest.skip("only a Kafka run from its jars can be frozen")
    with connect(f"{kafka_url}?timeout-s=2") as broker:
        broker.append("t", numbered(0, 1))
        kafka.freeze()
        try:
            began = time.monotonic()
            with pytest.raises(OutcomeUnknownError, match="'t'") as caught:
                broker.append("t", numbered(1, 1))
            assert time.monotonic() - began < 30
            assert not caught.value.definite
            assert caught.value.retriable
        finally:
            kafka.thaw()
        following = retrying(lambda: next_number(broker))
        assert following in {1, 2}
        time.sleep(0.5)  # what sat in the frozen server's queue
        following = next_number(broker)
        broker.append("t", numbered(following, 3))
        assert [number_of(body) for body in read_all(broker)] == [*range(following + 3)]


def test_a_reader_waits_while_kafka_restarts(kafka: KafkaServer, broker: KafkaBroker, other: KafkaBroker) -> None:
    broker.append("t", [b"before"])
    got: list[bytes] = []
    reader = threading.Thread(
        target=lambda: got.extend(m.body for m in other.read("t", 1, limit_bytes=PLENTY, wait_s=90))
    )
    reader.start()
    time.sleep(0.5)
    kafka.restart()
    retrying(lambda: broker.append("t", [b"after"]))
    reader.join(30)
    assert got[0] == b"after"


def test_a_kafka_that_is_down_is_unavailable_and_comes_back(kafka: KafkaServer, broker: KafkaBroker) -> None:
    broker.append("t", [b"a"])
    kafka.stop()
    try:
        for act in (
            lambda: broker.append("t", [b"b"]),
            lambda: broker.read("t", 1, limit_bytes=1, wait_s=0),
            lambda: broker.bounds("t"),
            broker.topics,
        ):
            with pytest.raises(UnavailableError) as caught:
                connect_anew(broker, act)
            assert caught.value.retriable
    finally:
        kafka.start()
    assert retrying(lambda: broker.bounds("t"))[1] in {1, 2}


def connect_anew(broker: KafkaBroker, act: Callable[[], object]) -> None:
    time.sleep(0.6)  # what it knew of the topic is too old by now
    act()


def test_threads_do_not_pile_up_while_kafka_is_down(kafka_url: str) -> None:
    nowhere = connect("kafka://127.0.0.1:1/")
    before = threading.active_count()
    for _ in range(20):
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1.*refused"):
            nowhere.topics()
    assert threading.active_count() == before


def test_messages_deleted_below_the_reader_are_a_gap(broker: KafkaBroker, kafka_url: str, admin: Any) -> None:
    broker.append("t", numbered(0, 2))
    assert len(broker.read("t", 0, limit_bytes=PLENTY, wait_s=0)) == 2
    assert list(broker.read("t", 2, limit_bytes=PLENTY, wait_s=0)) == []  # it waits at the end
    time.sleep(0.3)
    broker.append("t", numbered(2, 3))
    admin.delete_records({partition_of(kafka_url): 4})
    assert broker.bounds("t") == (4, 5)
    with pytest.raises(GapError, match=r"'t'"):
        broker.read("t", 2, limit_bytes=PLENTY, wait_s=10)
    with pytest.raises(GapError, match="offset 0: it holds 4 to 5"):
        broker.read("t", 0, limit_bytes=PLENTY, wait_s=10)
    assert [m.offset for m in broker.read("t", 4, limit_bytes=PLENTY, wait_s=10)] == [4]


def test_a_topic_created_again_is_a_gap_though_it_is_long_enough(
    broker: KafkaBroker, other: KafkaBroker, kafka_url: str, admin: Any
) -> None:
    broker.append("t", numbered(0, 3))
    assert len(broker.read("t", 0, limit_bytes=PLENTY, wait_s=0)) == 3
    delete_topic(admin, name_of(kafka_url))
    other.append("t", numbered(100, 9))
    time.sleep(0.6)
    with pytest.raises(GapError, match="deleted and created again"):
        broker.read("t", 3, limit_bytes=PLENTY, wait_s=10)
    with pytest.raises(GapError, match="deleted and created again"):
        broker.append("t", numbered(3, 1))
    assert len(read_all(other)) == 9


def test_a_topic_deleted_under_a_waiting_reader_is_a_gap(broker: KafkaBroker, kafka_url: str, admin: Any) -> None:
    broker.append("t", [b"a"])
    timer = threading.Timer(0.5, delete_topic, (admin, name_of(kafka_url)))
    timer.start()
    began = time.monotonic()
    with pytest.raises(GapError, match=r"deleted|removed"):  # as the server was with it when it was asked
        broker.read("t", 1, limit_bytes=PLENTY, wait_s=60)
    assert time.monotonic() - began < 30
    timer.join()


def test_asking_creates_no_topic(broker: KafkaBroker, kafka_url: str, admin: Any) -> None:
    with connect(kafka_url, create=False) as reader:
        assert reader.bounds("t") == (0, 0)
        assert list(reader.read("t", 0, limit_bytes=1, wait_s=0.3)) == []
        with pytest.raises(UsageError, match="opened for reading"):
            reader.append("t", [b"a"])
        assert reader.topics() == []
    assert name_of(kafka_url) not in admin.list_topics()


def test_a_topic_is_created_to_keep_everything(broker: KafkaBroker, kafka_url: str, admin: Any) -> None:
    broker.append("t", [b"a"])
    name = name_of(kafka_url)
    found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)], config_filter="all")["topic"][name]
    wanted = {
        "retention.ms": "-1",
        "retention.bytes": "-1",
        "cleanup.policy": "delete",
        "max.message.bytes": str(16 * MIB),
    }
    assert {key: found[key]["value"] for key in wanted} == wanted


def test_a_topic_of_several_partitions_is_refused(broker: KafkaBroker, kafka_url: str, admin: Any) -> None:
    admin.create_topics({name_of(kafka_url): {"num_partitions": 3}}, wait_for_metadata=True)
    with pytest.raises(ConfigurationError, match="3 partitions"):
        broker.append("t", [b"a"])
    with pytest.raises(ConfigurationError, match="3 partitions"):
        broker.read("t", 0, limit_bytes=1, wait_s=0)


def test_a_message_too_large_is_refused_by_size_and_limit(broker: KafkaBroker) -> None:
    broker.append("t", [b"a"])
    with pytest.raises(ConfigurationError, match=rf"{17 * MIB} bytes .* {16 * MIB}") as caught:
        broker.append("t", [b"b", b"x" * (17 * MIB)])
    assert caught.value.definite
    assert "max.message.bytes" in caught.value.remedy
    largest = b"y" * (16 * MIB - 4096)
    broker.append("t", [largest, b"c", largest])
    assert read_all(broker) == [b"a", largest, b"c", largest]


def test_a_limit_that_was_lowered_meanwhile(broker: KafkaBroker, kafka_url: str, admin: Any) -> None:
    broker.append("t", [b"a"])
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name_of(kafka_url), {"max.message.bytes": "10000"})])
    with pytest.raises(ConfigurationError, match="'t'") as caught:
        broker.append("t", [b"x" * 20_000])
    assert caught.value.definite
    assert broker.bounds("t") == (0, 1)
    bodies = [bytes([number]) * 6000 for number in range(5)]
    assert broker.append("t", bodies) == 1
    assert read_all(broker) == [b"a", *bodies]


def test_what_is_appended_together_is_one_batch(broker: KafkaBroker, kafka_url: str) -> None:
    """A reader that begins in the middle of it gets the rest; a slow writer does not tear it."""
    bodies = [b"%d" % number for number in range(2000)]
    assert broker.append("t", bodies) == 0
    assert [m.body for m in broker.read("t", 1999, limit_bytes=PLENTY, wait_s=0)] == bodies[1999:]
    assert read_all(broker) == bodies


@pytest.mark.parametrize("codec", ["gzip", "lz4", "zstd", "snappy"])
def test_what_others_compressed_is_read(broker: KafkaBroker, kafka_url: str, codec: str) -> None:
    broker.append("t", [b"first"])
    bodies = [bytes([number]) * 100_000 for number in range(20)]
    try:
        producer = foreign_producer(kafka_url, compression_type=codec, linger_ms=50)
    except RuntimeError as error:  # the package of that codec is not installed
        pytest.skip(str(error))
    with contextlib.closing(producer):
        for body in bodies:
            producer.send(name_of(kafka_url), value=body, partition=0)
        producer.flush()
    assert read_all(broker) == [b"first", *bodies]


@pytest.mark.parametrize("codec", ["gzip", "lz4", "zstd", "snappy"])
def test_a_batch_that_inflates_without_measure_is_refused(broker: KafkaBroker, kafka_url: str, codec: str) -> None:
    broker.append("t", [b"first"])
    try:
        producer = foreign_producer(kafka_url, compression_type=codec)
    except RuntimeError as error:  # the package of that codec is not installed
        pytest.skip(str(error))
    with contextlib.closing(producer):
        producer.send(name_of(kafka_url), value=bytes(80 * MIB), partition=0).get(30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError, match=r"at offset 1 .* inflates to more than"):
        broker.read("t", 1, limit_bytes=PLENTY, wait_s=10)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 * 1024


def test_batches_too_large_together_are_read_one_by_one(broker: KafkaBroker, kafka_url: str) -> None:
    broker.append("t", [b"first"])
    bodies = [bytes([number]) * (40 * MIB) for number in range(3)]
    with contextlib.closing(foreign_producer(kafka_url, compression_type="gzip")) as producer:
        for body in bodies:
            producer.send(name_of(kafka_url), value=body, partition=0).get(30)
    assert read_all(broker) == [b"first", *bodies]


def test_transactions_of_others_leave_holes_and_what_they_took_back_is_not_read(
    broker: KafkaBroker, kafka_url: str
) -> None:
    broker.append("t", [b"first"])
    with contextlib.closing(foreign_producer(kafka_url, transactional_id=name_of(kafka_url))) as producer:
        producer.init_transactions()
        for body, ending in ((b"kept", "commit"), (b"taken back", "abort"), (b"kept too", "commit")):
            producer.begin_transaction()
            producer.send(name_of(kafka_url), value=body, partition=0)
            getattr(producer, f"{ending}_transaction")()
    broker.append("t", [b"last"])
    _, end = broker.bounds("t")
    messages: list[Message] = []
    while len(messages) < 4:
        offset = messages[-1].offset + 1 if messages else 0
        messages += broker.read("t", offset, limit_bytes=PLENTY, wait_s=10)
    assert [m.body for m in messages] == [b"first", b"kept", b"kept too", b"last"]
    assert messages[-1].offset == end - 1 > 3
    assert broker.read("t", 2, limit_bytes=1, wait_s=10)[0].body == b"kept too"


def test_a_tombstone_is_refused(broker: KafkaBroker, kafka_url: str) -> None:
    broker.append("t", [b"first"])
    with contextlib.closing(foreign_producer(kafka_url)) as producer:
        producer.send(name_of(kafka_url), key=b"k", value=None, partition=0).get(30)
    with pytest.raises(DecodeError, match="offset 1"):
        broker.read("t", 1, limit_bytes=1, wait_s=10)


def test_threads_do_not_pile_up_while_kafka_does_not_answer(secure_kafka: SecureKafka) -> None:
    with connect(f"kafka://127.0.0.1:{secure_kafka.port}/") as broker:
        before = threading.active_count()
        for _ in range(2):
            with pytest.raises(UnavailableError):
                broker.topics()
        assert threading.active_count() == before


def test_over_tls_with_scram(secure_kafka: SecureKafka) -> None:
    with connect(fresh_url(secure_kafka)) as broker:
        assert broker.append("t", [b"a", b"b"]) == 0
        assert read_all(broker) == [b"a", b"b"]


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "PLAIN"])
def test_a_mechanism_the_broker_does_not_know(secure_kafka: SecureKafka, mechanism: str) -> None:
    with (
        connect(f"{secure_kafka.url}&mechanism={mechanism}") as broker,
        pytest.raises(CdcError, match="Sasl") as caught,
    ):
        broker.topics()
    assert not caught.value.retriable


def test_a_wrong_password_is_an_access_error_that_does_not_tell_it(secure_kafka: SecureKafka) -> None:
    with (
        connect(secure_kafka.url.replace(secure_kafka.password, "wr0ng-word")) as broker,
        pytest.raises(AccessError, match=r"alice") as caught,
    ):
        broker.topics()
    assert "wr0ng-word" not in f"{caught.value} {caught.value.remedy} {broker!r} {broker.target!r}"


def test_a_server_of_another_authority_is_refused(secure_kafka: SecureKafka) -> None:
    url = secure_kafka.url.replace(f"cafile={secure_kafka.cafile}&", "")
    with connect(url) as broker, pytest.raises(AccessError, match="certificate verify failed"):
        broker.topics()


def test_a_server_of_another_name_is_refused(secure_kafka: SecureKafka) -> None:
    with (
        connect(secure_kafka.url.replace("127.0.0.1", "localhost")) as broker,
        pytest.raises(AccessError, match="certificate verify failed"),
    ):
        broker.topics()


def test_without_the_client_certificate_that_the_server_wants(secure_kafka: SecureKafka) -> None:
    with (
        connect(secure_kafka.url.partition("&certfile=")[0]) as broker,
        pytest.raises(AccessError, match="certificate"),
    ):
        broker.topics()
