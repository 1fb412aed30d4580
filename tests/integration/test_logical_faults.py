"""Whatever breaks: one clear error, nothing half done, and the same place to go on from."""

import sqlite3
import threading
import time
from functools import partial
from pathlib import Path

import psycopg
import pytest

from cdc.errors import (
    CdcError,
    ConfigurationError,
    ConflictError,
    DecodeError,
    FencedError,
    GapError,
    UnavailableError,
)
from cdc.stores.embedded import EmbeddedPostgres, StopMode
from shippers.postgresql import logical
from tests.fix_postgresql import DatabaseFactory
from tests.fix_proxy import ProxyFactory
from tests.fix_stream import FOLLOWERS, FollowerFactory, Stream, eventually, everything, query, run

TABLE = "CREATE TABLE t (id int PRIMARY KEY, v text)"


@pytest.fixture
def started(stream: Stream) -> Stream:
    """A stream whose topic holds the image of a few rows."""
    stream.run(TABLE, "INSERT INTO t VALUES (1, 'one'), (2, 'two'), (3, 'three')")
    stream.setup()
    stream.ship()
    return stream


def spoil(follower: str, statement: str) -> None:
    """Write to a follower behind the applier's back."""
    if follower.startswith("postgresql:"):
        run(follower, statement)
    elif follower.startswith("sqlite:"):
        with sqlite3.connect(follower.removeprefix("sqlite:///")) as connection:
            connection.execute(statement)
        connection.close()
    else:
        import duckdb

        with duckdb.connect(follower.removeprefix("duckdb:///")) as other:
            other.execute(statement)


# Conflicts.


@pytest.mark.parametrize("kind", FOLLOWERS)
@pytest.mark.parametrize(
    ("damage", "change", "key"),
    [
        ("INSERT INTO t VALUES (10, 'mine')", "INSERT INTO t VALUES (9, 'nine'), (10, 'ten'), (11, 'eleven')", "10"),
        ("DELETE FROM t WHERE id = 2", "UPDATE t SET v = v || '!'", "2"),
        ("DELETE FROM t WHERE id = 2", "DELETE FROM t WHERE id >= 2", "2"),
        ("INSERT INTO t VALUES (20, 'mine')", "UPDATE t SET id = 20 WHERE id = 3", "3|20"),
    ],
    ids=["a row that is there", "no row to update", "no row to delete", "a key that is taken"],
)
def test_a_row_that_does_not_fit(  # noqa: PLR0917
    started: Stream, new_follower: FollowerFactory, kind: str, damage: str, change: str, key: str
) -> None:
    follower = new_follower(kind)
    started.apply(follower)
    spoil(follower, damage)
    relations = started.relations()
    before, where = everything(follower, relations), started.checkpoint(follower)
    started.run(change)
    started.ship()
    with pytest.raises(ConflictError) as caught:
        started.apply(follower)
    message = str(caught.value)
    assert "public.t" in message
    assert any(f"({each})" in message for each in key.split("|")) or kind != "postgresql", message
    assert "/" in message  # an LSN
    assert caught.value.exit_code == 81
    assert everything(follower, relations) == before
    after = started.checkpoint(follower)
    assert where is not None
    assert after is not None
    assert after.position == where.position


def test_what_came_before_the_conflict_is_kept_out_of_it(started: Stream, new_follower: FollowerFactory) -> None:
    """Mended, the same command goes on."""
    follower = new_follower("postgresql")
    started.apply(follower)
    run(follower, "INSERT INTO t VALUES (11, 'mine')")
    started.run("INSERT INTO t VALUES (10, 'ten')", "INSERT INTO t VALUES (11, 'eleven')")
    started.ship()
    with pytest.raises(ConflictError):
        started.apply(follower)
    run(follower, "DELETE FROM t WHERE id = 11")
    started.apply(follower)
    started.assert_equal(follower)


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_a_follower_with_rows_of_its_own(started: Stream, new_follower: FollowerFactory, kind: str) -> None:
    follower = new_follower(kind)
    spoil(follower, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    spoil(follower, "INSERT INTO t VALUES (77, 'mine')")
    before = everything(follower, started.relations())
    with pytest.raises(ConflictError, match=r"public\.t has rows"):
        started.apply(follower)
    assert everything(follower, started.relations()) == before
    assert started.checkpoint(follower) is None


# The leader forgot, or is another one.


@pytest.mark.parametrize("then", ["dropped", "dropped and made again", "advanced by somebody else"])
def test_the_slot_no_longer_holds_what_follows(started: Stream, then: str) -> None:
    name = started.slot
    started.run("INSERT INTO t VALUES (4, 'four')")
    if then == "advanced by somebody else":
        started.run(f"SELECT pg_replication_slot_advance('{name}', pg_current_wal_lsn())")
    else:
        started.run(f"SELECT pg_drop_replication_slot('{name}')")
    if then == "dropped and made again":
        started.run(f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")
    before = started.bounds()
    with pytest.raises(GapError, match=name) as caught:
        started.ship()
    assert "image new" in caught.value.remedy
    assert started.bounds() == before


def test_a_slot_that_never_was(stream: Stream) -> None:
    stream.run(TABLE, "CREATE PUBLICATION p FOR ALL TABLES")
    with pytest.raises(ConfigurationError, match="does not exist"):
        stream.ship()


def test_a_new_image_closes_the_gap(started: Stream, followers: list[str]) -> None:
    for follower in followers:
        started.apply(follower)
    started.run("INSERT INTO t VALUES (4, 'lost')", f"SELECT pg_drop_replication_slot('{started.slot}')")
    started.run(f"SELECT pg_create_logical_replication_slot('{started.slot}', 'pgoutput')")
    started.run("DELETE FROM t WHERE id = 1")
    with pytest.raises(GapError):
        started.ship()
    started.ship(image="new")
    started.run("INSERT INTO t VALUES (5, 'five')")
    started.carry(*followers)
    started.assert_equal(*followers)


def test_another_leader(started: Stream, postgres16: EmbeddedPostgres, database: DatabaseFactory) -> None:
    other = Stream(database(postgres16), started.broker, "")
    other.slot = other.leader.rpartition("/")[2]
    other.run(TABLE)
    other.setup()
    before = started.bounds()
    with pytest.raises(ConfigurationError, match="the topic is of leader"):
        other.ship()
    assert started.bounds() == before


def test_another_database_of_the_same_leader(
    started: Stream, postgres18: EmbeddedPostgres, database: DatabaseFactory
) -> None:
    other = Stream(database(postgres18), started.broker, "")
    other.slot = other.leader.rpartition("/")[2]
    other.setup()
    with pytest.raises(ConfigurationError, match="the topic is of leader"):
        other.ship()


def test_a_publication_that_is_gone(started: Stream) -> None:
    started.run("DROP PUBLICATION p", "INSERT INTO t VALUES (4, 'four')")
    with pytest.raises(ConfigurationError, match="publication"):
        started.ship()


def test_a_publication_that_goes_while_shipping(started: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logical, "STATUS_INTERVAL_S", 0.2)
    with started.shipping() as shipper:
        started.run("INSERT INTO t VALUES (4, 'four')")
        eventually(lambda: started.bounds()[1] > 3)
        started.run("DROP PUBLICATION p", "INSERT INTO t VALUES (5, 'five')")
        assert isinstance(shipper.wait(), ConfigurationError)


def test_an_unknown_publication_before_the_image(stream: Stream) -> None:
    stream.run(TABLE, f"SELECT pg_create_logical_replication_slot('{stream.slot}', 'pgoutput')")
    with pytest.raises(ConfigurationError, match="publication 'p'"):
        stream.ship()
    assert stream.bounds() == (0, 0)


# Two of a kind.


def test_a_second_shipper_is_refused_and_the_first_unharmed(started: Stream) -> None:
    with started.shipping() as shipper:
        eventually(
            lambda: (
                query(started.leader, "SELECT active FROM pg_replication_slots WHERE slot_name = %s", started.slot)
                == [(True,)]
            )
        )
        with pytest.raises(FencedError, match=started.slot):
            started.ship()
        before = started.bounds()[1]
        started.run("INSERT INTO t VALUES (4, 'four')")
        eventually(lambda: started.bounds()[1] > before)
        assert shipper.end() is None


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_a_second_applier_takes_over_and_the_first_is_fenced(
    started: Stream, new_follower: FollowerFactory, kind: str
) -> None:
    follower = new_follower(kind)
    with started.applying(follower) as first:
        eventually(lambda: started.checkpoint(follower))
        with started.applying(follower) as second:
            eventually(lambda: epoch(started, follower) == 2)
            started.run("INSERT INTO t VALUES (4, 'four')")
            started.ship()
            assert isinstance(first.wait(), FencedError)
            eventually(lambda: not started_differs(started, follower))
            assert second.end() is None
    started.assert_equal(follower)


def epoch(stream: Stream, follower: str) -> int:
    if follower.startswith("sqlite:"):
        with sqlite3.connect(follower.removeprefix("sqlite:///")) as connection:
            [(owner,)] = connection.execute("SELECT owner FROM cdc_checkpoint")
        return int(owner)
    return int(query(follower, "SELECT owner FROM cdc.checkpoint")[0][0])


def started_differs(stream: Stream, follower: str) -> bool:
    relations = stream.relations()
    return everything(follower, relations) != everything(stream.leader, relations)


# Restarts and networks.


class Load:
    """Rows that go in one by one, whatever happens to the server."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        number = 1000
        while not self._stop.is_set():
            try:
                with psycopg.connect(self._url, autocommit=True) as connection:
                    while not self._stop.is_set():
                        number += 1
                        connection.execute("INSERT INTO t VALUES (%s, 'load')", (number,))
                        connection.execute("UPDATE t SET v = v || 'x' WHERE id = %s", (number - 3,))
            except psycopg.Error:
                time.sleep(0.05)

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_the_leader_restarts_under_load(
    mode: StopMode, database: DatabaseFactory, postgres16: EmbeddedPostgres, tmp_path: Path
) -> None:
    follower = database(postgres16)
    with EmbeddedPostgres(18) as server:
        stream = Stream.of(server.url("postgres"), tmp_path)
        stream.run(TABLE)
        stream.setup()
        with stream.shipping(retry_s=30) as shipper, stream.applying(follower) as applier:
            load = Load(stream.leader)
            for _ in range(2):
                time.sleep(0.7)
                server.restart(mode)
            time.sleep(0.7)
            load.end()
            assert shipper.end() is None
            assert applier.end() is None
        stream.carry(follower)
        stream.assert_equal(follower)
        assert query(stream.leader, "SELECT count(*) > 50 FROM t") == [(True,)]


def test_the_follower_restarts_under_load(started: Stream, tmp_path: Path) -> None:
    with EmbeddedPostgres(16) as server:
        follower = server.url("postgres")
        with started.shipping() as shipper, started.applying(follower, retry_s=30) as applier:
            load = Load(started.leader)
            for mode in ("fast", "immediate"):
                time.sleep(0.7)
                server.restart(mode)
            time.sleep(0.5)
            load.end()
            assert shipper.end() is None
            eventually(lambda: started.checkpoint(follower))
            assert applier.end() is None
        started.carry(follower)
        started.assert_equal(follower)


def test_a_network_that_is_cut(started: Stream, new_follower: FollowerFactory, proxy: ProxyFactory) -> None:
    follower = new_follower("postgresql")
    left, right = proxy(started.leader), proxy(follower)
    right.delay_s = 0.002
    with (
        started.shipping(leader=left.url(started.leader), retry_s=30) as shipper,
        started.applying(right.url(follower), retry_s=30) as applier,
    ):
        load = Load(started.leader)
        for _ in range(4):
            time.sleep(0.3)
            left.cut()
            time.sleep(0.3)
            right.cut()
        load.end()
        assert shipper.end() is None
        assert applier.end() is None
    assert left.connections > 4
    started.carry(follower)
    started.assert_equal(follower)


def test_a_leader_out_of_reach(started: Stream, proxy: ProxyFactory) -> None:
    gate = proxy(started.leader)
    gate.refuse()
    begun = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        started.ship(leader=gate.url(started.leader), retry_s=1)
    assert 0.8 < time.monotonic() - begun < 10
    assert caught.value.exit_code == 69


def test_a_frozen_network_loses_nothing(started: Stream, new_follower: FollowerFactory, proxy: ProxyFactory) -> None:
    gate = proxy(started.leader)
    with started.shipping(leader=gate.url(started.leader), retry_s=30) as shipper:
        load = Load(started.leader)
        time.sleep(0.5)
        gate.freeze()
        time.sleep(1)
        gate.thaw()
        time.sleep(0.3)
        load.end()
        assert shipper.end() is None
    follower = new_follower("postgresql")
    started.carry(follower)
    started.assert_equal(follower)


# A topic that lies.


@pytest.mark.parametrize("place", ["image", "log"])
def test_a_corrupt_batch(started: Stream, new_follower: FollowerFactory, place: str) -> None:
    follower = new_follower("sqlite")
    if place == "log":
        started.apply(follower)
    started.run("INSERT INTO t VALUES (4, 'four')")
    started.ship()
    relations = started.relations()
    before = everything(follower, relations) if place == "log" else None
    offset = 1 if place == "image" else started.bounds()[1] - 1
    flip(started, offset)
    with pytest.raises(DecodeError, match=f"topic 's', offset {offset}") as caught:
        started.apply(follower)
    assert caught.value.exit_code == 65
    if before is not None:
        assert everything(follower, relations) == before
    else:
        assert started.checkpoint(follower) is None or "image" in repr(started.checkpoint(follower))


def test_a_shipper_does_not_go_on_behind_a_corrupt_end(started: Stream) -> None:
    end = started.bounds()[1]
    flip(started, end - 1)
    with pytest.raises(DecodeError, match=f"offset {end - 1}"):
        started.ship()
    assert started.bounds()[1] == end


def flip(stream: Stream, offset: int) -> None:
    """Change one byte of a message."""
    with sqlite3.connect(stream.broker.removeprefix("file://")) as connection:
        [(body,)] = connection.execute('SELECT body FROM message WHERE "offset" = ?', (offset,))
        damaged = bytearray(body)
        damaged[len(body) * 2 // 3] ^= 0x10
        connection.execute('UPDATE message SET body = ? WHERE "offset" = ?', (bytes(damaged), offset))
    connection.close()


def test_a_hole_in_the_topic(started: Stream, new_follower: FollowerFactory) -> None:
    follower = new_follower("sqlite")
    started.apply(follower)
    for number in (4, 5, 6):
        started.run(f"INSERT INTO t VALUES ({number}, 'x')")
        started.ship()
    first = started.bounds()[1]
    with sqlite3.connect(started.broker.removeprefix("file://")) as connection:
        connection.execute(
            'UPDATE message SET body = (SELECT body FROM message WHERE "offset" = ?) WHERE "offset" = ?',
            (first - 1, first - 2),
        )
    connection.close()
    with pytest.raises(GapError, match="hole"):
        started.apply(follower)


# Idle leaders.


def _confirmed(stream: Stream, lsn: int) -> bool:
    return stream.confirmed_lsn() >= lsn


def test_an_idle_leader_forgets(stream: Stream) -> None:
    """Work that is not published still moves the slot, so that WAL does not pile up."""
    started = stream
    started.run(TABLE, "CREATE TABLE aside (v text)")
    started.setup(targets="FOR TABLE t")
    started.options["messages"] = False
    started.ship()
    before = started.confirmed_lsn()
    with started.shipping(heartbeat_s=0.1) as shipper:
        for _ in range(4):
            started.run(
                "SELECT pg_logical_emit_message(false, 'x', repeat('x', 100000))",
                "INSERT INTO aside SELECT repeat('x', 200) FROM generate_series(1, 5000) g",
                "SELECT pg_switch_wal()",
            )
            [(target,)] = query(started.leader, "SELECT (pg_current_wal_lsn() - '0/0')::int8")
            eventually(partial(_confirmed, started, int(target)))
        eventually(
            lambda: (
                query(
                    started.leader,
                    "SELECT pg_current_wal_lsn() - restart_lsn < 40 << 20 FROM pg_replication_slots"
                    " WHERE slot_name = %s",
                    started.slot,
                )
                == [(True,)]
            )
        )
        assert shipper.end() is None
    assert started.confirmed_lsn() > before + (3 << 24)


def test_other_databases_of_the_leader_move_the_slot(
    started: Stream, postgres18: EmbeddedPostgres, database: DatabaseFactory
) -> None:
    other = database(postgres18)
    with started.shipping(heartbeat_s=0.1):
        run(other, "CREATE TABLE busy AS SELECT g, repeat('x', 500) FROM generate_series(1, 20000) g")
        [(target,)] = query(other, "SELECT (pg_current_wal_lsn() - '0/0')::int8")
        eventually(lambda: started.confirmed_lsn() >= int(target))


def test_every_error_says_what_to_do(started: Stream) -> None:
    started.run(f"SELECT pg_drop_replication_slot('{started.slot}')")
    with pytest.raises(CdcError) as caught:
        started.ship()
    assert caught.value.remedy
    assert str(caught.value)[0].islower()
