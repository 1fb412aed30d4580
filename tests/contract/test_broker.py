"""What :class:`cdc.ports.Broker` promises, for every implementation."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from cdc.brokers import embedded, kafka
from cdc.errors import GapError, UsageError
from cdc.ports import Broker
from tests.fix_broker import BrokerFactory

PLENTY = 1 << 30
HOSTILE_NAMES = [
    "..",
    "../../etc/passwd",
    "/",
    "a b",
    "a'; drop table message; --",
    'a"b',
    "%s",
    "{}",
    "nul\0nul",
    "nul",
    "line\nfeed",
    "é",
    "e\u0301",
    "\N{PILE OF POO}",
    "A",
    "a",
    "x" * 249,
    "-wal",
]


@pytest.fixture(params=["embedded", "kafka"])
def open_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerFactory]:
    """``open_broker()`` opens one more connection to the same, at first empty, broker."""
    with ExitStack() as stack:
        if request.param == "kafka":
            url: str = request.getfixturevalue("kafka_url")
            yield lambda: stack.enter_context(closing(kafka.connect(url)))
        else:
            yield lambda: stack.enter_context(closing(embedded.connect((tmp_path / "log").as_uri())))


def read_all(broker: Broker, topic: str, offset: int = 0) -> list[tuple[int, bytes]]:
    return [(m.offset, m.body) for m in broker.read(topic, offset, limit_bytes=PLENTY, wait_s=0)]


def test_offsets_are_dense_and_keep_the_order(broker: Broker) -> None:
    assert broker.append("t", [b"a", b"b"]) == 0
    assert broker.append("t", [b"c"]) == 2
    assert broker.append("t", [b"d", b"e"]) == 3
    assert read_all(broker, "t") == [(0, b"a"), (1, b"b"), (2, b"c"), (3, b"d"), (4, b"e")]
    assert read_all(broker, "t", 3) == [(3, b"d"), (4, b"e")]


def test_bounds_are_first_kept_and_next(broker: Broker) -> None:
    assert broker.bounds("t") == (0, 0)
    broker.append("t", [b"a", b"b"])
    assert broker.bounds("t") == (0, 2)


def test_bodies_come_back_as_they_were(broker: Broker) -> None:
    bodies = [b"", b"\0", bytes(range(256)) * 17, b"x" * 1_000_000]
    broker.append("t", bodies)
    assert [body for _, body in read_all(broker, "t")] == bodies


def test_what_was_appended_is_there_for_the_next_opening(open_broker: BrokerFactory) -> None:
    writer = open_broker()
    writer.append("t", [b"a", b"b"])
    writer.close()
    reopened = open_broker()
    assert reopened.bounds("t") == (0, 2)
    assert reopened.append("t", [b"c"]) == 2
    assert read_all(open_broker(), "t") == [(0, b"a"), (1, b"b"), (2, b"c")]


def test_a_topic_that_is_not_there_is_empty(broker: Broker) -> None:
    assert read_all(broker, "t") == []
    assert broker.topics() == []
    with pytest.raises(GapError, match="1"):
        broker.read("t", 1, limit_bytes=PLENTY, wait_s=0)


def test_reading_at_the_end_is_empty_and_beyond_it_a_gap(broker: Broker) -> None:
    broker.append("t", [b"a", b"b"])
    assert read_all(broker, "t", 2) == []
    with pytest.raises(GapError, match="3"):
        broker.read("t", 3, limit_bytes=PLENTY, wait_s=0)
    with pytest.raises(GapError, match="-1"):
        broker.read("t", -1, limit_bytes=PLENTY, wait_s=0)


def test_a_gap_is_told_at_once_not_after_the_wait(broker: Broker) -> None:
    broker.append("t", [b"a"])
    began = time.monotonic()
    with pytest.raises(GapError):
        broker.read("t", 7, limit_bytes=PLENTY, wait_s=30)
    assert time.monotonic() - began < 10


def test_a_reader_waits_no_longer_than_told(broker: Broker) -> None:
    broker.append("t", [b"a"])
    began = time.monotonic()
    assert list(broker.read("t", 1, limit_bytes=PLENTY, wait_s=0.3)) == []
    assert 0.25 < time.monotonic() - began < 10


@pytest.mark.parametrize("exists", [True, False], ids=["existing topic", "missing topic"])
def test_a_waiting_reader_wakes(open_broker: BrokerFactory, exists: bool) -> None:
    writer, reader = open_broker(), open_broker()
    start = writer.append("t", [b"before"]) + 1 if exists else 0
    timer = threading.Timer(0.2, writer.append, ("t", [b"news"]))
    timer.start()
    began = time.monotonic()
    messages = reader.read("t", start, limit_bytes=PLENTY, wait_s=60)
    assert [message.body for message in messages] == [b"news"]
    assert time.monotonic() - began < 30
    timer.join()


def test_two_readers_see_the_same(open_broker: BrokerFactory) -> None:
    writer, one, two = open_broker(), open_broker(), open_broker()
    for number in range(50):
        writer.append("t", [b"%d" % number])
        assert read_all(one, "t", number) == [(number, b"%d" % number)]
    assert read_all(two, "t") == read_all(one, "t") == [(number, b"%d" % number) for number in range(50)]


def test_a_reader_follows_a_writer_at_full_speed(open_broker: BrokerFactory) -> None:
    writer, reader = open_broker(), open_broker()
    sent = [b"%d" % number for number in range(600)]

    def write() -> None:
        for start in range(0, len(sent), 3):
            writer.append("t", sent[start : start + 3])

    thread = threading.Thread(target=write)
    thread.start()
    received: list[bytes] = []
    while len(received) < len(sent):
        messages = reader.read("t", len(received), limit_bytes=64, wait_s=30)
        assert messages
        assert [m.offset for m in messages] == [*range(len(received), len(received) + len(messages))]
        received += [m.body for m in messages]
    thread.join()
    assert received == sent


def test_limit_bytes_bounds_a_read_but_never_starves_it(broker: Broker) -> None:
    broker.append("t", [b"x" * 100] * 10)
    counts = {limit: len(broker.read("t", 0, limit_bytes=limit, wait_s=0)) for limit in (1, 100, 350, 1000, 5000)}
    assert counts[1] == 1
    assert 1 <= counts[350] <= 4
    assert counts[5000] == 10
    broker.append("t", [b"y" * 100_000])
    assert len(broker.read("t", 10, limit_bytes=1, wait_s=0)[0].body) == 100_000


def test_reading_in_small_steps_gives_everything(broker: Broker) -> None:
    sent = [b"x" * (number * 37 % 500) for number in range(200)]
    broker.append("t", sent)
    received: list[bytes] = []
    while messages := broker.read("t", len(received), limit_bytes=700, wait_s=0):
        received += [m.body for m in messages]
    assert received == sent


def test_appending_nothing_changes_nothing(broker: Broker) -> None:
    assert broker.append("t", []) == 0
    broker.append("t", [b"a"])
    assert broker.append("t", []) == 1
    assert broker.bounds("t") == (0, 1)


def test_hostile_names_are_refused_or_kept_apart(broker: Broker) -> None:
    accepted = {}
    for name in HOSTILE_NAMES:
        body = f"body of {name}".encode()
        try:
            accepted[name] = body
            broker.append(name, [body])
        except UsageError:
            del accepted[name]
            assert broker.topics() == sorted(accepted)
    assert broker.topics() == sorted(accepted)
    assert {name: read_all(broker, name) for name in accepted} == {name: [(0, body)] for name, body in accepted.items()}


@pytest.mark.parametrize("name", ["", "x" * 5000, "\udcff"], ids=["empty", "long", "surrogate"])
def test_impossible_names_are_refused(broker: Broker, name: str) -> None:
    with pytest.raises(UsageError):
        broker.append(name, [b"a"])
    with pytest.raises(UsageError):
        broker.read(name, 0, limit_bytes=PLENTY, wait_s=0)
    assert broker.topics() == []


def test_many_topics_have_offsets_of_their_own(broker: Broker) -> None:
    names = [f"topic-{number:03}" for number in range(100)]
    for turn in range(3):
        for name in names:
            assert broker.append(name, [f"{name}/{turn}".encode()]) == turn
    assert broker.topics() == names
    for name in names:
        assert read_all(broker, name) == [(turn, f"{name}/{turn}".encode()) for turn in range(3)]
