"""Images: in parallel chunks, under write load, killed in the middle, resumed, loaded by a killed follower."""

import threading
import time
from collections import Counter
from contextlib import closing
from functools import partial

import psycopg
import pytest

from cdc.codec import EnvelopeCodec
from cdc.errors import GapError
from cdc.ports import Progress
from cdc.record import Batch, Kind
from cdc.topic import decoded
from shippers.postgresql import image
from tests.fix_stream import STREAM, FollowerFactory, Stream, ended, eventually, killed, query

SMALL_CHUNKS = "from shippers.postgresql import image; image.CHUNK_BYTES = 1 << 16; image.PART_BYTES = 1 << 13"
ROWS = 20_000


@pytest.fixture
def large(stream: Stream) -> Stream:
    stream.run(
        "CREATE TABLE t (a int, b text, v text, PRIMARY KEY (b, a))",
        "INSERT INTO t SELECT g, (g % 7)::text || 'it''s', repeat('x', 100) FROM generate_series(1, 20000) g",
        "CREATE TABLE keyless (x int, y text); ALTER TABLE keyless REPLICA IDENTITY FULL",
        "INSERT INTO keyless SELECT g % 50, repeat('y', 100) FROM generate_series(1, 3000) g",
        "CREATE TABLE empty (id int PRIMARY KEY)",
        "ANALYZE",
    )
    return stream.setup()


def _longer(stream: Stream, end: int) -> bool:
    return stream.bounds()[1] > end


def batches(stream: Stream) -> list[Batch]:
    with closing(stream.topic()) as topic:
        first, end = topic.bounds(STREAM)
        return [decoded(topic, EnvelopeCodec(), STREAM, offset) for offset in range(first, end)]


class Load:
    """Changes all over the table while its image is taken."""

    def __init__(self, url: str) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, args=(url,))
        self._thread.start()

    def _write(self, url: str) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            number = 0
            while not self._stop.is_set():
                number = (number * 31 + 7) % ROWS
                connection.execute("UPDATE t SET v = v || 'u' WHERE a = %s", (number,))
                connection.execute("DELETE FROM t WHERE a = %s", (number + 5,))
                connection.execute("INSERT INTO t VALUES (%s, 'new', 'i') ON CONFLICT DO NOTHING", (number,))
                connection.execute("UPDATE t SET a = a + 100000 WHERE a = %s", (number + 9,))
                connection.execute("INSERT INTO keyless VALUES (%s, 'n')", (number % 50,))
                connection.execute("DELETE FROM keyless WHERE ctid = (SELECT min(ctid) FROM keyless)")

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


def test_parallel_chunks_of_a_large_table(large: Stream, followers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(image, "PART_BYTES", 1 << 13)
    seen: list[Progress] = []
    load = Load(large.leader)
    large.ship(report=seen.append)
    load.end()
    chunks = [batch for batch in batches(large) if batch.kind is Kind.IMAGE_CHUNK]
    of_t = Counter(batch.image.chunk for batch in chunks if batch.image and batch.relations[0].name == "t")
    assert len(of_t) > 20, "one chunk would prove nothing"
    assert max(of_t.values()) > 1, "chunks of one part would prove nothing"
    assert [batch.image.sequence for batch in chunks if batch.image] == sorted(
        batch.image.sequence for batch in chunks if batch.image
    )
    assert {each.of for each in seen if each.what == "image"} == {len(of_t) + 2}
    large.carry(*followers)
    large.assert_equal(*followers)


@pytest.mark.parametrize("live", [True, False], ids=["with rows changing", "at rest"])
def test_a_shipper_killed_in_the_middle_goes_on(large: Stream, followers: list[str], live: bool) -> None:
    load = Load(large.leader) if live else None
    slow = (
        SMALL_CHUNKS + "; import time; out = image._copy_out\n"
        "def _copy_out(*a):\n    time.sleep(0.05)\n    yield from out(*a)\nimage._copy_out = _copy_out"
    )
    for least in (15, 60):
        shipper = large.process("ship", code=slow)
        eventually(partial(_longer, large, least), 30)
        killed(shipper)
    before = batches(large)
    ended(large.process("ship", code=SMALL_CHUNKS))
    if load is not None:
        load.end()
    after = batches(large)
    assert after[: len(before)] == before
    assert Counter(batch.kind for batch in after)[Kind.IMAGE_BEGIN] == 1, "it began anew instead of going on"
    assert len({batch.image.lsn for batch in after if batch.image}) > 1 or not live
    large.carry(*followers)
    large.assert_equal(*followers)


@pytest.mark.parametrize("kind", ["postgresql", "sqlite", "duckdb"])
def test_an_applier_killed_while_it_loads(
    large: Stream, new_follower: FollowerFactory, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(image, "PART_BYTES", 1 << 13)
    large.ship()
    large.run("UPDATE t SET v = 'later' WHERE a % 10 = 0")
    large.ship()
    follower = new_follower(kind)
    slow = (
        "from cdc import pipeline; import time; pipeline.GROUP_BYTES = 1 << 16; commit = pipeline._Follow._commit\n"
        "def _commit(*a):\n    commit(*a)\n    time.sleep(0.03)\npipeline._Follow._commit = _commit"
    )
    for delay_s in (0.6, 1.0):
        applier = large.process("apply", follower=follower, code=slow)
        time.sleep(delay_s)
        if applier.poll() is None:
            killed(applier)
    large.apply(follower)
    large.assert_equal(follower)


def test_a_new_image_for_followers_old_and_new(large: Stream, new_follower: FollowerFactory) -> None:
    old, late = new_follower("postgresql"), new_follower("sqlite")
    large.carry(old)
    large.run("DELETE FROM t WHERE a % 2 = 0", "INSERT INTO empty VALUES (1)")
    large.ship(image="new")
    large.run("INSERT INTO empty VALUES (2)")
    large.carry(old, late)
    large.assert_equal(old, late)
    assert query(old, "SELECT count(*) FROM empty") == [(2,)]


def test_a_follower_behind_a_hole_loads_a_younger_image(large: Stream, followers: list[str]) -> None:
    """What it had read was trimmed away, and the slot was lost meanwhile: nothing but a new image helps."""
    large.carry(*followers)
    large.run("INSERT INTO t VALUES (-1, 'b', 'v')")
    large.ship()
    with closing(large.topic()) as topic:
        topic.trim(STREAM, topic.bounds(STREAM)[1])  # type: ignore[attr-defined]
    for follower in followers:
        with pytest.raises(GapError, match="offset"):
            large.apply(follower)
    large.run("UPDATE t SET v = 'newer' WHERE a = 3", "DELETE FROM t WHERE a = 4")
    large.ship(image="new")
    large.run("INSERT INTO t VALUES (-2, 'b', 'v')")
    large.ship()
    for follower in followers:
        large.apply(follower, reload=True)
    large.assert_equal(*followers)
