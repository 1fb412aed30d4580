"""The same events through a real Kafka, whose partitions, keys and headers are its own."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliers.events import EventApplyOptions, apply_events
from cdc.brokers.kafka.events import KafkaEvents, connect
from cdc.codec import EnvelopeCodec
from cdc.debezium.encode import Encoder
from cdc.debezium.topics import EventTopics
from cdc.errors import GapError, UsageError
from cdc.events import EventRecord, Place, StoredEvent, partition_of
from cdc.pipeline import ShipOptions, ship
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql.follower import connect_follower
from shippers.postgresql.logical import LogicalShipper, Options
from tests.fix_kafka import KafkaServer, fresh_url
from tests.fix_postgresql import DatabaseFactory
from tests.integration.test_debezium_live import CHANGES, ROWS, TABLES, Leader, assert_equal, run


def with_partitions(url: str, count: int) -> str:
    return f"{url}{'&' if '?' in url else '?'}partitions={count}"


@pytest.fixture
def url(kafka: KafkaServer) -> str:
    return with_partitions(fresh_url(kafka), 3)


@pytest.fixture
def events(url: str) -> Iterator[KafkaEvents]:
    events = connect(url)
    yield events
    events.close()


def test_records_come_back_by_partition(events: KafkaEvents) -> None:
    records = [EventRecord("p.t", b"%d" % n, None if n % 5 == 0 else b"v%d" % n, (("h", b"1"),)) for n in range(50)]
    events.publish(records)
    events.publish([EventRecord("p.transaction", b"k", b"v")])
    assert events.places() == [Place("p.t", 0), Place("p.t", 1), Place("p.t", 2), Place("p.transaction", 0)]
    offsets = {place: 0 for place in events.places() if place.topic == "p.t"}
    got: list[StoredEvent] = []
    while len(got) < 50:
        fetched = events.fetch(offsets, limit_bytes=1 << 20, wait_s=1)
        assert fetched
        for event in fetched:
            offsets[event.place] = event.offset + 1
        got += fetched
    assert {(e.key, e.value) for e in got} == {(r.key, r.value) for r in records}
    assert all(e.place.partition == partition_of(e.key, 3) and e.headers == (("h", b"1"),) for e in got)
    for place in offsets:
        in_order = [int(e.key or b"") for e in got if e.place == place]
        assert in_order == sorted(in_order)
        assert events.bounds(place) == (0, len(in_order))
    assert events.bounds(Place("p.none", 0)) == (0, 0)
    with pytest.raises(GapError):
        events.fetch({Place("p.transaction", 0): 5}, limit_bytes=1, wait_s=2)


def test_options_of_the_url() -> None:
    with pytest.raises(UsageError, match="partitions is '0'"):
        connect("kafka://localhost:1/?partitions=0")
    with pytest.raises(UsageError, match="opened for reading"):
        connect("kafka://localhost:1/?partitions=2", create=False).publish([EventRecord("t", None, b"")])


def test_a_leader_through_kafka(
    url: str, postgres18: EmbeddedPostgres, database: DatabaseFactory, tmp_path: Path
) -> None:
    leader, follower = Leader(database(postgres18), tmp_path), database(postgres18)
    run(leader.url, *TABLES, *ROWS)
    run(follower, *TABLES)
    leader.setup()

    def carry() -> None:
        codec = EnvelopeCodec()
        ship(
            lambda: LogicalShipper.open(leader.url, Options("pub", leader.slot)),
            lambda: EventTopics(connect(url), Encoder(leader.options), codec),
            codec,
            ShipOptions("s", until_lsn="now", retry_s=5, linger_s=0.002),
            stop=threading.Event(),
            report=lambda _: None,
        )
        broker = connect(url, create=False)
        options = EventApplyOptions("s", "p", until_end=True)
        apply_events(broker, connect_follower(follower), options, stop=threading.Event())
        broker.close()

    carry()
    assert_equal(leader, follower)
    run(leader.url, *CHANGES)
    carry()
    assert_equal(leader, follower)
