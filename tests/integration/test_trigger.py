"""The trigger log: every kind of write, under load, killed, late, large, and read again."""

import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.codec import EnvelopeCodec
from cdc.record import Kind
from cdc.stores.embedded import EmbeddedPostgres
from cdc.topic import decoded
from shippers.postgresql import trigger
from tests.fix_postgresql import DatabaseFactory, postgres_major
from tests.fix_stream import (
    FOLLOWERS,
    STREAM,
    FollowerFactory,
    TriggerStream,
    background,
    checkpoint,
    ended,
    eventually,
    everything,
    killed,
    query,
    run,
)
from tests.integration.test_exactly_once import GROWN_MB_MAX
from tests.integration.test_image import SMALL_CHUNKS
from tests.integration.test_stream import TABLES, Writer, forget_offset, write_beside


def _longer(stream: TriggerStream, end: int) -> bool:
    return stream.bounds()[1] > end


def changes_waiting(stream: TriggerStream) -> int:
    """Rows of the change tables."""
    s = stream.schema
    with psycopg.connect(stream.leader) as connection:
        query = f"SELECT (SELECT count(*) FROM {s}.change_0) + (SELECT count(*) FROM {s}.change_1)"
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])


@postgres_major(16, 18)
def test_a_mixed_workload_arrives_everywhere(triggers: TriggerStream, followers: list[str]) -> None:
    triggers.run(TABLES, f"ALTER DATABASE {triggers.slot} SET deadlock_timeout = '30ms'")
    triggers.setup()
    Writer(triggers.leader, 100).write(30)
    with background(lambda stop: Writer(triggers.leader, 77).write(150, stop)):
        triggers.ship()  # the image, while rows change
    triggers.carry(*followers)
    triggers.assert_equal(*followers)
    with triggers.shipping() as shipper:
        write_beside(triggers.leader, writers=4, transactions=60)
        assert shipper.end() is None
    triggers.carry(*followers)
    triggers.assert_equal(*followers)


def test_one_tick_of_several_writers(triggers: TriggerStream, followers: list[str]) -> None:
    """Nobody ships while they write: everything stands between two snapshots, in an order that fits."""
    triggers.run(TABLES, f"ALTER DATABASE {triggers.slot} SET deadlock_timeout = '30ms'")
    triggers.setup()
    triggers.carry(*followers)
    write_beside(triggers.leader, writers=6, transactions=60)
    triggers.carry(*followers)
    triggers.assert_equal(*followers)


def test_killed_at_random_under_load(triggers: TriggerStream, new_follower: FollowerFactory) -> None:
    dice = random.Random(1)
    triggers.run(TABLES, f"ALTER DATABASE {triggers.slot} SET deadlock_timeout = '30ms'")
    triggers.setup()
    follower = new_follower("postgresql")
    deadline = time.monotonic() + 12
    processes: dict[str, Any] = {}
    kills = 0
    with background(lambda stop: Writer(triggers.leader, 42).write(100_000, stop)):
        while time.monotonic() < deadline:
            if "ship" not in processes:
                processes["ship"] = triggers.process("ship", until=None)
            if "apply" not in processes:
                processes["apply"] = triggers.process("apply", until=None, follower=follower)
            time.sleep(dice.uniform(0.7, 1.6))
            killed(processes.pop(dice.choice(list(processes))))
            kills += 1
    for process in processes.values():
        killed(process)
    assert kills >= 5
    triggers.carry(follower)
    triggers.assert_equal(follower)


def test_a_shipper_killed_in_the_middle_of_its_image(triggers: TriggerStream, new_follower: FollowerFactory) -> None:
    triggers.run(
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(1, 20000) g",
        "ANALYZE",
    )
    triggers.setup()
    slow = (
        SMALL_CHUNKS + "; import time; out = image._copy_out\n"
        "def _copy_out(*a):\n    time.sleep(0.05)\n    yield from out(*a)\nimage._copy_out = _copy_out"
    )
    follower = new_follower("sqlite")
    for least in (10, 30):
        shipper = triggers.process("ship", code=slow)
        eventually(partial(_longer, triggers, least), 30)
        killed(shipper)
        triggers.run(f"DELETE FROM t WHERE id % 1000 = {least}", "UPDATE t SET v = 'u' WHERE id % 1001 = 0")
    before = triggers.bounds()[1]
    ended(triggers.process("ship", code=SMALL_CHUNKS))
    with closing(triggers.topic()) as topic:
        first, end = topic.bounds(STREAM)
        kinds = [decoded(topic, EnvelopeCodec(), STREAM, offset).kind for offset in range(first, end)]
    assert kinds.count(Kind.IMAGE_BEGIN) == 1, "it began anew instead of going on"
    assert end > before
    triggers.carry(follower)
    triggers.assert_equal(follower)


def test_killed_in_the_middle_of_a_tick(triggers: TriggerStream, followers: list[str]) -> None:
    """Some transactions of a tick are in the topic: the next shipper goes on with the others."""
    triggers.run("CREATE TABLE t (id int PRIMARY KEY, v int)", "INSERT INTO t SELECT g, 0 FROM generate_series(1, 9) g")
    triggers.setup()
    triggers.carry(*followers)
    with psycopg.connect(triggers.leader, autocommit=True) as connection:
        for number in range(300):
            connection.execute("UPDATE t SET v = v + 1 WHERE id = %s", (number % 9 + 1,))
    end = triggers.bounds()[1]
    slow = (
        "from shippers.postgresql import trigger; import time; reader = trigger._Reader.skip_rest\n"
        "trigger.BUNDLE_BYTES = 1\n"
        "def skip_rest(self):\n    time.sleep(0.02)\n    reader(self)\ntrigger._Reader.skip_rest = skip_rest"
    )
    stops = []
    for _ in range(3):
        shipper = triggers.process("ship", code=slow)
        eventually(partial(_longer, triggers, end + 5))
        killed(shipper)
        with closing(triggers.topic()) as topic:
            end = topic.bounds(STREAM)[1]
            stops.append(decoded(topic, EnvelopeCodec(), STREAM, end - 1).position.lsn & ((1 << 28) - 1))
    assert all(0 < stop < 300 for stop in stops), stops
    assert stops == sorted(stops)
    triggers.apply(followers[0])  # a follower may stand in the middle, too
    triggers.carry(*followers)
    triggers.assert_equal(*followers)
    assert query(followers[0], "SELECT sum(v) FROM t") == [(300,)]


def test_the_whole_topic_again_changes_nothing(triggers: TriggerStream, followers: list[str]) -> None:
    triggers.run(TABLES, f"ALTER DATABASE {triggers.slot} SET deadlock_timeout = '30ms'")
    triggers.setup()
    triggers.carry(*followers)
    Writer(triggers.leader, 8).write(60)
    triggers.carry(*followers)
    relations = triggers.relations()
    for follower in followers:
        before, where = everything(follower, relations), checkpoint(follower)
        forget_offset(follower)
        triggers.apply(follower)
        after = checkpoint(follower)
        assert everything(follower, relations) == before
        assert where is not None
        assert after is not None
        assert after.position == where.position


# Snapshots.


@postgres_major(16, 18)
def test_a_transaction_that_commits_late(triggers: TriggerStream, followers: list[str]) -> None:
    """It wrote first and is shipped last: whole, and nobody waits for it."""
    triggers.run("CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    triggers.setup()
    triggers.carry(*followers)
    with psycopg.connect(triggers.leader) as late, psycopg.connect(triggers.leader) as later:
        late.execute("UPDATE t SET v = 'late' WHERE id = 1")
        late.execute("INSERT INTO t SELECT g, 'late' FROM generate_series(100, 199) g")
        for number in range(10, 15):
            triggers.run(f"INSERT INTO t VALUES ({number}, 'other')")
            triggers.carry(*followers)
            assert query(followers[0], "SELECT max(id) FROM t") == [(number,)]
        later.execute("DELETE FROM t WHERE id BETWEEN 10 AND 14")
        late.commit()
        triggers.carry(*followers)
        assert query(followers[0], "SELECT count(*) FROM t WHERE v = 'late'") == [(101,)]
        assert query(followers[0], "SELECT count(*) FROM t WHERE id BETWEEN 10 AND 14") == [(5,)]
        later.commit()
    triggers.carry(*followers)
    triggers.assert_equal(*followers)


def test_rows_handed_from_one_transaction_to_the_next_within_a_tick(
    triggers: TriggerStream, followers: list[str]
) -> None:
    """The one that began first, wrote first and got the row last, is the last."""
    triggers.run("CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t SELECT g FROM generate_series(1, 5) g")
    triggers.setup()
    triggers.carry(*followers)
    with psycopg.connect(triggers.leader) as first, psycopg.connect(triggers.leader) as second:
        first.execute("UPDATE t SET v = 'first' WHERE id = 1")
        second.execute("UPDATE t SET v = 'second' WHERE id = 2")
        second.execute("DELETE FROM t WHERE id = 3")
        waiting = threading.Thread(
            target=first.execute, args=("UPDATE t SET v = coalesce(v, '') || 'first' WHERE id IN (2, 4)",)
        )
        waiting.start()
        eventually(
            lambda: query(triggers.leader, "SELECT count(*) FROM pg_locks WHERE NOT granted") == [(1,)],
        )
        second.execute("UPDATE t SET v = 'second' WHERE id = 5")
        second.commit()
        waiting.join()
        first.execute("INSERT INTO t VALUES (3, 'first')")
        first.commit()
    triggers.carry(*followers)
    triggers.assert_equal(*followers)
    assert query(followers[0], "SELECT v FROM t WHERE id = 2") == [("secondfirst",)]


@postgres_major(16, 18)
def test_counters_and_balances_hold_at_every_commit(triggers: TriggerStream, new_follower: FollowerFactory) -> None:
    follower = new_follower("postgresql")
    triggers.run(
        "CREATE TABLE account (id int PRIMARY KEY, balance int)",
        "INSERT INTO account SELECT g, 100 FROM generate_series(1, 10) g",
        "CREATE TABLE counter (id int PRIMARY KEY, n int)",
        "INSERT INTO counter SELECT g, 0 FROM generate_series(1, 3) g",
    )
    triggers.setup()
    triggers.carry(follower)
    each = 100

    def transfer(seed: int) -> None:
        dice = random.Random(seed)
        with psycopg.connect(triggers.leader, autocommit=True) as connection:
            for _ in range(each):
                one, other = sorted(dice.sample(range(1, 11), 2))
                with connection.transaction():
                    connection.execute("UPDATE account SET balance = balance - 7 WHERE id = %s", (one,))
                    connection.execute("UPDATE account SET balance = balance + 7 WHERE id = %s", (other,))
                    connection.execute("UPDATE counter SET n = n + 1 WHERE id = %s", (dice.randrange(3) + 1,))

    threads = [threading.Thread(target=transfer, args=(seed,)) for seed in range(8)]
    seen: list[tuple[Any, ...]] = []

    def watch(stop: threading.Event) -> None:
        with psycopg.connect(follower, autocommit=True) as connection:
            while not stop.is_set():
                seen.extend(
                    connection.execute(
                        "SELECT (SELECT sum(balance) FROM account), (SELECT sum(n) FROM counter)"
                    ).fetchall()
                )

    with triggers.shipping() as shipper, triggers.applying(follower) as applier, background(watch) as watcher:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda: query(follower, "SELECT sum(n) FROM counter") == [(8 * each,)])
        assert watcher.end() is None
        assert applier.end() is None
        assert shipper.end() is None
    assert {total for total, _ in seen} == {1000}
    counts = [count for _, count in seen]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3, "one step would prove nothing"
    triggers.assert_equal(follower)


def test_changes_of_prepared_transactions(triggers: TriggerStream, followers: list[str]) -> None:
    triggers.run("CREATE TABLE t (id int PRIMARY KEY)")
    triggers.setup()
    triggers.carry(*followers)
    with triggers.shipping() as shipper:
        before = triggers.bounds()[1]
        triggers.run("INSERT INTO t VALUES (0)")
        eventually(partial(_longer, triggers, before))
        asleep(triggers)
        for gid in ("kept", "refused"):
            with psycopg.connect(triggers.leader) as connection:
                connection.execute("INSERT INTO t VALUES (%s)", (len(gid),))
                connection.execute(f"PREPARE TRANSACTION '{triggers.slot}_{gid}'".encode())
        assert shipper.end() is None
    triggers.carry(*followers)
    assert query(followers[0], "SELECT id FROM t") == [(0,)]
    triggers.run(f"COMMIT PREPARED '{triggers.slot}_kept'", f"ROLLBACK PREPARED '{triggers.slot}_refused'")
    triggers.carry(*followers)
    triggers.assert_equal(*followers)


def asleep(stream: TriggerStream) -> None:
    """Wait until the shipper is, and writers wake it."""
    eventually(
        lambda: (
            query(
                stream.leader,
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'",
            )[0][0]
            >= 2
        )
    )


@pytest.fixture(scope="module")
def plain() -> Iterator[EmbeddedPostgres]:
    """A server as it comes: without what logical decoding needs, and without prepared transactions."""
    with EmbeddedPostgres(18, settings={"wal_level": "replica", "fsync": "off"}) as server:
        yield server


def test_a_writer_wakes_the_shipper(
    plain: EmbeddedPostgres, database: DatabaseFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trigger, "IDLE_S", 30)
    stream = TriggerStream.of(database(plain), tmp_path)
    stream.run("CREATE TABLE t (id int PRIMARY KEY)")
    stream.setup()
    stream.ship()
    with stream.shipping():
        for number in range(3):
            asleep(stream)
            before = stream.bounds()[1]
            stream.run(f"INSERT INTO t VALUES ({number})")
            eventually(partial(_longer, stream, before), 5)
        monkeypatch.undo()
        stream.run("INSERT INTO t VALUES (9)")


def test_as_an_ordinary_role_on_a_server_as_it_comes(
    plain: EmbeddedPostgres, database: DatabaseFactory, tmp_path: Path, followers: list[str]
) -> None:
    """Neither REPLICATION nor wal_level, and no superuser."""
    stream = TriggerStream.of(database(plain), tmp_path)
    role = f"owner_{stream.slot}"
    stream.run(f"CREATE ROLE {role} LOGIN", f"ALTER DATABASE {stream.slot} OWNER TO {role}")
    mine = plain.url(stream.slot, role)
    stream.leader = mine
    stream.run(
        "CREATE SCHEMA mine", "CREATE TABLE mine.t (id int PRIMARY KEY, v text)", "INSERT INTO mine.t VALUES (1)"
    )
    stream.setup()
    stream.carry(*followers)
    stream.run("INSERT INTO mine.t VALUES (2)", "UPDATE mine.t SET v = 'x'", "UPDATE mine.t SET id = 3 WHERE id = 1")
    stream.carry(*followers)
    stream.assert_equal(*followers)
    stream.teardown()
    run(plain.url(stream.slot), f"REASSIGN OWNED BY {role} TO postgres")


# What is kept, and how much is held.


def test_change_tables_are_emptied_when_nothing_of_them_is_needed(
    triggers: TriggerStream, new_follower: FollowerFactory
) -> None:
    """A long-open transaction delays it; nothing is lost."""
    follower = new_follower("postgresql")
    triggers.run("CREATE TABLE t (id int PRIMARY KEY)")
    triggers.setup()
    triggers.carry(follower)
    with psycopg.connect(triggers.leader) as late:
        late.execute("INSERT INTO t VALUES (1)")
        triggers.run("INSERT INTO t SELECT g FROM generate_series(10, 2000) g")
        triggers.carry(follower)
        turn(triggers)
        forget(triggers)
        assert changes_waiting(triggers) > 1, "it is still written to"
        late.commit()
    forget(triggers)
    assert changes_waiting(triggers) > 1, "what was committed late is not shipped yet"
    triggers.carry(follower)
    forget(triggers)
    assert changes_waiting(triggers) == 0
    triggers.run("INSERT INTO t VALUES (2)")
    triggers.carry(follower)
    triggers.assert_equal(follower)


def turn(stream: TriggerStream) -> None:
    """Have the other change table written to, as if it had been this one's turn for long."""
    stream.run(f"SELECT {stream.schema}.turn_to(1 - slot) FROM {stream.schema}.turn")


def forget(stream: TriggerStream) -> None:
    """As the shipper asks for it, of the newest tick that is shipped."""
    with closing(stream.topic()) as topic:
        last = decoded(topic, EnvelopeCodec(), STREAM, topic.bounds(STREAM)[1] - 1)
    stream.run(f"SELECT {stream.schema}.forget({last.position.lsn >> 28})")


def test_what_was_shipped_is_not_read_again(triggers: TriggerStream) -> None:
    """An index leads to what is new."""
    triggers.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
    triggers.setup()
    triggers.ship()
    with psycopg.connect(triggers.leader, autocommit=True) as connection, connection.pipeline():
        for number in range(3000):
            connection.execute("INSERT INTO t VALUES (%s, repeat('x', 900))", (number,))
    triggers.ship()
    forget(triggers)  # summarizes
    triggers.run("INSERT INTO t VALUES (-1, 'new')")
    [(snapshot,)] = psycopg.connect(triggers.leader).execute(
        f"SELECT snapshot::text FROM {triggers.schema}.tick".encode()
    )
    plans = []
    with closing(trigger.TriggerShipper.open(triggers.leader, triggers.schema)) as shipper:
        ticks = shipper._catalog.execute(f"SELECT snapshot::text FROM {triggers.schema}.tick".encode()).fetchall()
        [(snapshot,)] = ticks
        for slot in (0, 1):
            table = f"{triggers.schema}.change_{slot}"
            explain = f"EXPLAIN (ANALYZE, BUFFERS) SELECT * FROM {table} WHERE {trigger._beyond(snapshot)}"
            plans.append("\n".join(line for (line,) in shipper._catalog.execute(explain.encode()).fetchall()))
    assert all("Bitmap Index Scan" in plan and "Seq Scan" not in plan for plan in plans)
    read = sum(int(blocks) for plan in plans for blocks in re.findall(r"Heap Blocks: lossy=(\d+)", plan))
    assert 0 < read < 100, plans


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_a_large_transaction_in_small_memory(triggers: TriggerStream, new_follower: FollowerFactory, kind: str) -> None:
    rows = 1_000_000 if kind == "postgresql" else 100_000
    triggers.run("CREATE TABLE t (id int PRIMARY KEY, a text)")
    triggers.setup()
    follower = new_follower(kind)
    triggers.carry(follower)
    triggers.run(f"INSERT INTO t SELECT g, repeat('x', 40) FROM generate_series(1, {rows}) g")
    shipped, applied = ended(triggers.process("ship")), ended(triggers.process("apply", follower=follower))
    assert shipped["grown_mb"] < GROWN_MB_MAX
    assert applied["grown_mb"] < GROWN_MB_MAX
    if kind == "postgresql":
        assert query(follower, "SELECT count(*), sum(id::int8) FROM t") == [(rows, rows * (rows + 1) // 2)]
    else:
        triggers.assert_equal(follower)


def test_values_of_several_megabytes_and_a_thousand_columns(triggers: TriggerStream, followers: list[str]) -> None:
    columns = ", ".join(f"c{number} int" for number in range(1100))
    triggers.run(
        "CREATE TABLE large (id int PRIMARY KEY, v text, b bytea)",
        f"CREATE TABLE broad (id int PRIMARY KEY, {columns})",
        "CREATE UNLOGGED TABLE light (id int PRIMARY KEY, v text)",
        "INSERT INTO light VALUES (1, 'image')",
    )
    triggers.setup()
    triggers.carry(*followers)
    triggers.run(
        "INSERT INTO large SELECT g, repeat('x', 5000000), decode(repeat('00ff', 1500000), 'hex')"
        " FROM generate_series(1, 3) g",
        "INSERT INTO large SELECT g, 'small' FROM generate_series(4, 200) g",
        "UPDATE large SET v = v || 'y'",
        "DELETE FROM large WHERE id = 2",
        "INSERT INTO broad (id, c0, c1099) SELECT g, g, g FROM generate_series(1, 60) g",
        "UPDATE broad SET c500 = 1 WHERE id < 9",
        "UPDATE broad SET id = id + 1000",
        "INSERT INTO light VALUES (2, 'log')",
        "UPDATE light SET v = 'changed' WHERE id = 1",
    )
    triggers.carry(*followers)
    triggers.assert_equal(*followers)
