"""A leader under a mixed workload, rebuilt row by row on every follower, whichever way the log is read."""

import random
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.brokers import embedded
from cdc.codec import EnvelopeCodec
from cdc.record import Kind
from cdc.stores.embedded import EmbeddedPostgres
from cdc.topic import decoded
from tests.fix_postgresql import DatabaseFactory
from tests.fix_stream import STREAM, FollowerFactory, Stream, everything, query, run

TABLES = """
    CREATE TABLE keyed (id int PRIMARY KEY, v text, n numeric, big text);
    ALTER TABLE keyed ALTER big SET STORAGE EXTERNAL;
    CREATE TABLE composite (a int, b text, c float8, PRIMARY KEY (b, a));
    CREATE TABLE keyless (x int, y text, big text);
    ALTER TABLE keyless REPLICA IDENTITY FULL;
    ALTER TABLE keyless ALTER big SET STORAGE EXTERNAL;
    CREATE TABLE indexed (v text, code varchar(20) NOT NULL, big text);
    ALTER TABLE indexed ALTER big SET STORAGE EXTERNAL;
    CREATE UNIQUE INDEX by_code ON indexed (code);
    ALTER TABLE indexed REPLICA IDENTITY USING INDEX by_code;
    CREATE TABLE full_key (id bigint PRIMARY KEY, v text, big text);
    ALTER TABLE full_key REPLICA IDENTITY FULL;
    ALTER TABLE full_key ALTER big SET STORAGE EXTERNAL;
    CREATE TABLE parent (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text);
    CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent, v text);
"""


class Writer:
    """Random transactions of a known seed: savepoints, rollbacks, key changes, truncates, wide values."""

    def __init__(self, url: str, seed: int) -> None:
        self._url = url
        self._random = random.Random(seed)

    def write(self, transactions: int, stop: threading.Event | None = None) -> None:
        with psycopg.connect(self._url) as connection:
            for _ in range(transactions):
                if stop is not None and stop.is_set():
                    return
                try:
                    self._transaction(connection)
                except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                    connection.rollback()

    def _transaction(self, connection: "psycopg.Connection[Any]") -> None:
        dice = self._random
        for _ in range(dice.choice([1, 1, 2, 5, 30])):
            if dice.random() < 0.15:
                connection.execute("SAVEPOINT a")
                self._change(connection)
                self._change(connection)
                connection.execute("ROLLBACK TO a" if dice.random() < 0.6 else "RELEASE a")
            self._change(connection)
        if dice.random() < 0.1:
            connection.rollback()
        else:
            connection.commit()

    def _change(self, connection: "psycopg.Connection[Any]") -> None:
        dice = self._random
        key, other = dice.randrange(300), dice.randrange(300)
        wide = dice.choice([None, "", "x" * 20, dice.randbytes(2500).hex()])
        text = dice.choice([None, "", "plain", "tab\tnewline\nquote'back\\slash", "żółw 🐢", "NULL", "\\N"])
        statement, values = dice.choice(self._statements(key, other, wide, text))
        connection.execute(statement, values)

    def _statements(
        self, key: int, other: int, wide: str | None, text: str | None
    ) -> list[tuple[Any, tuple[Any, ...]]]:
        number = self._random.choice([None, 0, -1.5, 10**40, "NaN", "Infinity", "1.500", "-0.000001"])
        statements: list[tuple[Any, tuple[Any, ...]]] = [
            ("INSERT INTO keyed VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING", (key, text, number, wide)),
            (
                "INSERT INTO keyed SELECT g, %s, g, %s FROM generate_series(%s::int, %s::int) g ON CONFLICT DO NOTHING",
                (text, wide, key, key + 20),
            ),
            ("UPDATE keyed SET v = %s WHERE id BETWEEN %s AND %s", (text, key, key + 10)),
            ("UPDATE keyed SET big = %s, n = n + 1 WHERE id = %s", (wide, key)),
            (
                "UPDATE keyed SET id = %s WHERE id = %s AND NOT EXISTS (SELECT FROM keyed WHERE id = %s)",
                (other, key, other),
            ),
            ("DELETE FROM keyed WHERE id BETWEEN %s AND %s", (key, key + 3)),
            ("INSERT INTO composite VALUES (%s, %s, %s) ON CONFLICT DO NOTHING", (key % 20, str(other % 20), -0.0)),
            ("UPDATE composite SET c = c * 1.1 + %s WHERE a = %s", (key, key % 20)),
            ("UPDATE composite SET a = a + 100 WHERE a = %s AND b = %s", (key % 20, str(other % 20))),
            ("DELETE FROM composite WHERE b = %s", (str(key % 20),)),
            ("INSERT INTO keyless VALUES (%s, %s, %s), (%s, %s, %s)", (key % 9, text, wide, key % 9, text, wide)),
            ("UPDATE keyless SET y = %s WHERE x = %s", (text, key % 9)),
            ("DELETE FROM keyless WHERE ctid = (SELECT ctid FROM keyless WHERE x = %s LIMIT 1)", (key % 9,)),
            ("DELETE FROM keyless WHERE x = %s", (key % 9,)),
            ("INSERT INTO indexed VALUES (%s, %s, %s) ON CONFLICT DO NOTHING", (text, f"c{key}", wide)),
            ("UPDATE indexed SET v = %s WHERE code = %s", (text, f"c{key}")),
            ("UPDATE indexed SET code = code || 'x' WHERE code = %s", (f"c{key}",)),
            ("DELETE FROM indexed WHERE code = %s", (f"c{key}",)),
            ("INSERT INTO full_key VALUES (%s, %s, %s) ON CONFLICT DO NOTHING", (key, text, wide)),
            ("UPDATE full_key SET v = %s WHERE id BETWEEN %s AND %s", (text, key, key + 5)),
            ("UPDATE full_key SET id = -id - 1 WHERE id = %s", (key,)),
            ("DELETE FROM full_key WHERE id = %s", (key,)),
            (
                "WITH p AS (INSERT INTO parent (v) VALUES (%s) RETURNING id) "
                "INSERT INTO child SELECT %s, id, %s FROM p ON CONFLICT DO NOTHING",
                (text, key, text),
            ),
            ("UPDATE child SET v = %s WHERE id < %s", (text, key)),
        ]
        if self._random.random() < 0.02:
            statements = [
                ("TRUNCATE parent RESTART IDENTITY CASCADE", ()),
                ("TRUNCATE keyless", ()),
                ("TRUNCATE composite, indexed", ()),
            ]
        return statements


def write_beside(url: str, *, writers: int, transactions: int) -> None:
    """Several writers at once."""
    threads = [threading.Thread(target=Writer(url, seed).write, args=(transactions,)) for seed in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_mixed_workload_arrives_everywhere(stream: Stream, followers: list[str]) -> None:
    stream.run(TABLES)
    stream.setup()
    Writer(stream.leader, 100).write(30)
    stream.carry(*followers)
    stream.assert_equal(*followers)
    with stream.shipping() as shipper:
        write_beside(stream.leader, writers=4, transactions=60)
        assert shipper.end() is None
    stream.carry(*followers)
    stream.assert_equal(*followers)


def test_from_16_to_18(
    postgres16: EmbeddedPostgres, postgres18: EmbeddedPostgres, database: DatabaseFactory, tmp_path: Path
) -> None:
    _between(postgres16, postgres18, database, tmp_path)


def test_from_15_to_18(
    postgres15: EmbeddedPostgres, postgres18: EmbeddedPostgres, database: DatabaseFactory, tmp_path: Path
) -> None:
    _between(postgres15, postgres18, database, tmp_path)


def _between(old: EmbeddedPostgres, new: EmbeddedPostgres, database: DatabaseFactory, directory: Path) -> None:
    stream, follower = Stream.of(database(old), directory), database(new)
    stream.run(TABLES)
    stream.setup()
    stream.carry(follower)
    write_beside(stream.leader, writers=3, transactions=40)
    stream.carry(follower)
    stream.assert_equal(follower)


@pytest.mark.parametrize("values", ["binary", "text"])
@pytest.mark.parametrize(
    ("protocol", "streaming"), [(1, False), (2, True), (2, False), (3, True), (4, False), (4, True)]
)
def test_every_way_to_read_the_log(
    stream: Stream, new_follower: FollowerFactory, protocol: int, streaming: bool, values: str
) -> None:
    stream.options.update(protocol=protocol, streaming=streaming, values=values)
    name = stream.slot
    stream.run(TABLES, f"ALTER DATABASE {name} SET logical_decoding_work_mem = '64kB'")
    stream.setup()
    postgresql, sqlite = new_follower("postgresql"), new_follower("sqlite")
    Writer(stream.leader, protocol).write(5)
    stream.ship()
    write_beside(stream.leader, writers=3, transactions=15)
    _write_large(stream.leader)
    stream.carry(postgresql, sqlite)
    stream.assert_equal(postgresql, sqlite)
    [(streamed,)] = query(stream.leader, "SELECT stream_txns FROM pg_stat_replication_slots WHERE slot_name = %s", name)
    assert (streamed > 0) == streaming


def _write_large(url: str) -> None:
    """Two transactions larger than the decoder's memory, interleaved, with subtransactions that abort."""
    insert = "INSERT INTO keyed SELECT g, 'large', g, repeat('x', 3000) FROM generate_series(%s::int, %s::int) g"
    with psycopg.connect(url) as one, psycopg.connect(url) as other:
        for step in range(10):
            for base, connection in ((1000, one), (100_000, other)):
                start = base + step * 100
                connection.execute("SAVEPOINT a")
                connection.execute(insert, (start, start + 39))
                connection.execute("SAVEPOINT b")
                connection.execute("UPDATE keyed SET v = 'inner' WHERE id = %s", (start,))
                connection.execute("ROLLBACK TO a" if step % 3 == 0 else "RELEASE a")
        other.execute("TRUNCATE keyless")
        other.commit()
        one.execute("DELETE FROM keyed WHERE id BETWEEN 1100 AND 1110")
        one.commit()


@pytest.mark.parametrize("protocol", [3, 4])
def test_transactions_in_two_phases(stream: Stream, followers: list[str], protocol: int) -> None:
    stream.options.update(protocol=protocol)
    stream.run("CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t VALUES (0, 'image')")
    stream.run(f"ALTER DATABASE {stream.slot} SET logical_decoding_work_mem = '64kB'")
    stream.setup(two_phase=True)
    stream.carry(*followers)
    with psycopg.connect(stream.leader) as connection:
        for gid, first, last in (("small", 1, 3), ("large", 1000, 4000), ("refused", 10_000, 10_003)):
            connection.execute(
                "INSERT INTO t SELECT g, repeat('x', 50) FROM generate_series(%s::int, %s::int) g", (first, last)
            )
            connection.execute(f"PREPARE TRANSACTION '{stream.slot}_{gid}'".encode())
            connection.commit()
    stream.run("INSERT INTO t VALUES (5, 'between')")
    # The shipper ends while three transactions are prepared, and another one sees their end.
    stream.carry(*followers)
    assert query(followers[0], "SELECT count(*) FROM t") == [(2,)]
    stream.run(*(f"COMMIT PREPARED '{stream.slot}_{gid}'" for gid in ("large", "small")))
    stream.run(f"ROLLBACK PREPARED '{stream.slot}_refused'")
    stream.carry(*followers)
    stream.assert_equal(*followers)
    assert query(followers[0], "SELECT count(*) FROM t") == [(3006,)]


PARTITIONED = (
    "CREATE TABLE p (id int, region text, v text, PRIMARY KEY (region, id)) PARTITION BY LIST (region)",
    "CREATE TABLE p_north PARTITION OF p FOR VALUES IN ('north')",
    "CREATE TABLE p_south (v text, region text NOT NULL, id int NOT NULL, PRIMARY KEY (region, id))",
    "ALTER TABLE p ATTACH PARTITION p_south FOR VALUES IN ('south')",
)


@pytest.mark.parametrize("via_root", [True, False])
def test_partitioned_tables(stream: Stream, followers: list[str], via_root: bool) -> None:
    stream.run(*PARTITIONED, "INSERT INTO p VALUES (1, 'north', 'a'), (2, 'south', 'b'), (3, 'south', NULL)")
    stream.setup(options=f"publish_via_partition_root = {via_root}")
    stream.carry(*followers)
    stream.assert_equal(*followers)
    stream.run(
        "INSERT INTO p SELECT g, CASE g % 2 WHEN 0 THEN 'north' ELSE 'south' END, g FROM generate_series(10, 60) g",
        "UPDATE p SET region = 'north' WHERE id = 2",
        "UPDATE p SET v = v || 'x' WHERE id % 3 = 0",
        "DELETE FROM p WHERE id = 3",
    )
    stream.carry(*followers)
    stream.assert_equal(*followers)
    assert {relation.name for relation in stream.relations()} == ({"p"} if via_root else {"p_north", "p_south"})
    stream.run("TRUNCATE p_south", "INSERT INTO p VALUES (99, 'south', 'after')")
    stream.run("TRUNCATE p" if via_root else "TRUNCATE p_north", "INSERT INTO p VALUES (100, 'south', 'last')")
    stream.carry(*followers)
    if not via_root:
        stream.assert_equal(*followers)


def test_stored_generated_columns_of_18(stream: Stream, followers: list[str]) -> None:
    stream.run("CREATE TABLE g (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED, v text)")
    stream.run("INSERT INTO g (id, v) VALUES (1, 'image')")
    stream.setup()
    stream.carry(*followers)
    stream.run("INSERT INTO g (id, v) VALUES (2, 'log')", "UPDATE g SET id = 3 WHERE id = 1")
    stream.carry(*followers)
    stream.assert_equal(*followers)
    assert [column.name for column in stream.relations()[0].columns] == ["id", "twice", "v"]


HOSTILE = ('quo"te', "new\nline", "percent %s %(x)s", "back\\slash 'single'", "ż" * 31, "SELECT", "a.b", "$1 ? :x")


@pytest.mark.parametrize("values", ["binary", "text"])
def test_hostile_names(stream: Stream, followers: list[str], values: str) -> None:
    stream.options.update(values=values)
    names = ['"' + name.replace('"', '""') + '"' for name in HOSTILE]
    columns = ", ".join(f"{name} text" for name in names)
    for schema in (names[0], names[2], names[4]):
        stream.run(f"CREATE SCHEMA {schema}")
    stream.run(f"CREATE TYPE {names[0]}.{names[1]} AS ENUM ('it''s', 'quo\"te', '%s', 'new\nline')")
    tables = [
        f"{names[0]}.{names[3]}",
        f"{names[2]}.{names[5]}",
        f"{names[4]}.{names[4]}",
        f"public.{names[1]}",
        f"public.{names[2]}",
        f"public.{names[6]}",
        f"public.{names[7]}",
    ]
    for table in tables:
        stream.run(
            f"CREATE TABLE {table} ({columns}, mood {names[0]}.{names[1]}, PRIMARY KEY ({names[0]}, {names[2]}))"
        )
    row = "'k%s', 'b', 'c', NULL, 'e', 'f', 'g', 'h', 'quo\"te'"
    for table in tables:
        stream.run(f"INSERT INTO {table} VALUES ({row})")
    stream.setup()
    stream.carry(*followers)
    stream.assert_equal(*followers)
    for table in tables:
        stream.run(
            f"INSERT INTO {table} VALUES ({row.replace('k%s', 'l')}), ({row.replace('k%s', 'm')})",
            f"UPDATE {table} SET {names[3]} = 'new', mood = '%s' WHERE {names[0]} = 'l'",
            f"UPDATE {table} SET {names[0]} = 'n' WHERE {names[0]} = 'l'",
            f"DELETE FROM {table} WHERE {names[0]} = 'm'",
        )
    stream.carry(*followers)
    stream.assert_equal(*followers)


def test_messages_of_other_programs_do_no_harm(stream: Stream, followers: list[str]) -> None:
    stream.run("CREATE TABLE t (id int PRIMARY KEY)")
    stream.setup()
    stream.ship()
    stream.run(
        "SELECT pg_logical_emit_message(false, 'other', 'alone')",
        "INSERT INTO t SELECT 1 FROM pg_logical_emit_message(true, 'other', 'within')",
        "SELECT pg_logical_emit_message(true, 'other', repeat('x', 3000000))",
    )
    stream.carry(*followers)
    stream.assert_equal(*followers)


def test_a_column_that_only_some_rows_changed(stream: Stream, followers: list[str]) -> None:
    """One batch with an insert, an update that leaves the wide value out, and one that changes it."""
    stream.run("CREATE TABLE t (id int PRIMARY KEY, v int, big text)", "ALTER TABLE t ALTER big SET STORAGE EXTERNAL")
    stream.run("INSERT INTO t SELECT g, 0, repeat(g::text, 3000) FROM generate_series(1, 9) g")
    stream.setup()
    stream.ship()
    stream.run(
        "INSERT INTO t VALUES (20, 0, repeat('n', 5000))",
        "UPDATE t SET v = v + 1",
        "UPDATE t SET big = 'short' WHERE id = 3",
        "UPDATE t SET v = v + 1, id = id + 100 WHERE id IN (2, 3, 20)",
        "UPDATE t SET v = 7 WHERE id = 5",
        "DELETE FROM t WHERE id = 6",
        "INSERT INTO t VALUES (6, 6, NULL)",
        "UPDATE t SET v = -1 WHERE id = 6",
    )
    stream.carry(*followers)
    stream.assert_equal(*followers)


def test_keys_that_trade_places(stream: Stream, followers: list[str]) -> None:
    """What a deferrable key allows within a statement must come through one by one."""
    stream.run("CREATE TABLE t (id int PRIMARY KEY, u int, v text, CONSTRAINT u UNIQUE (u) DEFERRABLE)")
    stream.run("INSERT INTO t SELECT g, g, g FROM generate_series(1, 5) g")
    stream.setup()
    stream.carry(*followers)
    stream.run(
        "UPDATE t SET u = 6 - u",
        "UPDATE t SET id = -id WHERE id = 1; UPDATE t SET id = 1 WHERE id = 2; UPDATE t SET id = 2 WHERE id = -1",
    )
    stream.carry(*followers)
    stream.assert_equal(*followers)


def test_the_whole_topic_again_changes_nothing(stream: Stream, followers: list[str]) -> None:
    stream.run(TABLES)
    stream.setup()
    Writer(stream.leader, 7).write(20)
    stream.carry(*followers)
    Writer(stream.leader, 8).write(60)
    stream.carry(*followers)
    relations = stream.relations()
    for follower in followers:
        before, where = everything(follower, relations), stream.checkpoint(follower)
        forget_offset(follower)
        stream.apply(follower)
        after = stream.checkpoint(follower)
        assert everything(follower, relations) == before
        assert where is not None
        assert after is not None
        assert after.position == where.position
    stream.assert_equal(*followers)


def forget_offset(follower: str) -> None:
    """Let the follower read the topic from its beginning."""
    if follower.startswith("postgresql:"):
        run(follower, "UPDATE cdc.checkpoint SET next_offset = 0")
        return
    change, path = 'UPDATE {} SET "offset" = 0', follower.partition("://")[2].removeprefix("/")
    connect: Callable[[str], Any]
    if follower.startswith("sqlite:"):
        from sqlite3 import connect

        table = "cdc_checkpoint"
    else:
        from duckdb import connect

        table = "cdc.checkpoint"
    with closing(connect("/" + path.lstrip("/"))) as connection:
        connection.execute(change.format(table))
        connection.commit()


def test_until_a_position_in_the_middle(stream: Stream, followers: list[str]) -> None:
    """Both loops stop at a transaction's end that lies inside a batch, and go on from there."""
    stream.run("CREATE TABLE t (id int PRIMARY KEY)")
    stream.setup()
    stream.ship()
    places = []
    for number in range(6):
        stream.run(f"INSERT INTO t VALUES ({number})")
        places.append(query(stream.leader, "SELECT (pg_current_wal_insert_lsn() - '0/0')::int8")[0][0])
    stream.ship(until=places[4], linger_s=1)
    for follower in followers:
        for number in (1, 3):
            stream.apply(follower, until=places[number])
            assert sum(len(found) for found in everything(follower, stream.relations()).values()) == number + 1
        stream.apply(follower)
        assert sum(len(found) for found in everything(follower, stream.relations()).values()) == 5
    stream.carry(*followers)
    stream.assert_equal(*followers)


def test_many_small_transactions_share_a_batch(stream: Stream, new_follower: FollowerFactory) -> None:
    stream.run("CREATE TABLE t (id int PRIMARY KEY)")
    stream.setup()
    stream.ship()
    with psycopg.connect(stream.leader, autocommit=True) as connection, connection.pipeline():
        for number in range(2000):
            connection.execute("INSERT INTO t VALUES (%s)", (number,))
    stream.ship(linger_s=0.05)
    with closing(embedded.connect(stream.broker)) as topic:
        first, end = topic.bounds(STREAM)
        batches = [decoded(topic, EnvelopeCodec(), STREAM, offset) for offset in range(first, end)]
    log = [batch for batch in batches if batch.kind is Kind.LOG]
    assert sum(len(batch.transactions) for batch in log) >= 2000 or len(log) < 100
    assert len(log) < 500
    follower = new_follower("postgresql")
    stream.apply(follower)
    stream.assert_equal(follower)
