"""A real server's log as events in real topics, and back into a real server; with events told twice now and then."""

import json
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.rows import tuple_row

from appliers.events import EventApplyOptions, apply_events
from cdc.brokers.embedded import EmbeddedBroker
from cdc.codec import EnvelopeCodec
from cdc.debezium.encode import Encoder, EventOptions
from cdc.debezium.schema import Modes, column_schema
from cdc.debezium.texts import reader
from cdc.debezium.topics import EventTopics
from cdc.debezium.values import writer
from cdc.errors import FencedError, GapError, OutcomeUnknownError, SchemaError
from cdc.events import EventRecord, PackedEvents, Place
from cdc.pipeline import ShipOptions, ship
from cdc.record import Column
from cdc.stores import sqlite
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql.follower import connect_follower
from shippers.postgresql.logical import LogicalShipper, Options
from tests.fix_postgresql import DatabaseFactory
from tests.wire.test_values import LITERALS, SETTINGS

TABLES: tuple[LiteralString, ...] = (
    "CREATE TYPE mood AS ENUM ('sad', 'so, so')",
    "CREATE TABLE t (a int, b text, long text, n numeric(8, 2), free numeric, m mood, at timestamptz,"
    " PRIMARY KEY (b, a))",
    "ALTER TABLE t ALTER long SET STORAGE EXTERNAL",
    "CREATE TABLE full_ (id bigint PRIMARY KEY, data bytea NOT NULL, tags text[], doc jsonb, u uuid)",
    "ALTER TABLE full_ REPLICA IDENTITY FULL",
    'CREATE TABLE "odd ""na%me" (id int PRIMARY KEY, "sp ace" text UNIQUE)',
)
FOLLOWER_TABLES = (*TABLES,)
ROWS: tuple[LiteralString, ...] = (
    "INSERT INTO t SELECT g, 'k' || g, repeat(md5(g::text), 100), g / 7.0, g / 3.0, 'sad', to_timestamp(g)"
    " FROM generate_series(1, 300) g",
    "INSERT INTO full_ VALUES (1, '\\x00ff', '{a,NULL,\"b,c\"}', '{\"a\": 1.50}', gen_random_uuid())",
    "INSERT INTO \"odd \"\"na%me\" VALUES (1, 'x'), (2, 'y')",
)
CHANGES: tuple[LiteralString, ...] = (
    "BEGIN; UPDATE t SET n = n + 1 WHERE a % 3 = 0; DELETE FROM t WHERE a % 5 = 0; "
    "INSERT INTO full_ SELECT g, '\\x01', '{}', NULL, NULL FROM generate_series(2, 50) g; COMMIT",
    "UPDATE t SET a = -a, long = long WHERE a = 7 AND false",
    "UPDATE full_ SET id = id + 1000, data = '\\x02' WHERE id < 20",
    'UPDATE "odd ""na%me" SET "sp ace" = CASE id WHEN 1 THEN \'z\' ELSE "sp ace" END',
    "INSERT INTO t VALUES (1001, 'x', NULL, NULL, 1.5, 'so, so', 'infinity')",
    "DELETE FROM t WHERE a = 1001",
    "INSERT INTO t VALUES (1001, 'x', NULL, NULL, 2.5, NULL, '-infinity')",
)


def run(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def rows(url: str, table: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, row_factory=tuple_row) as connection:
        return connection.execute(f"SELECT t::text FROM {table} t ORDER BY 1".encode()).fetchall()


class Leader:
    """A leader whose tables are captured, and the topics of its events."""

    def __init__(self, url: str, path: Path, **options: Any) -> None:
        self.url = url
        self.path = path
        self.slot = url.rpartition("/")[2]
        self.options = EventOptions("p", transactions=True, **options)
        self.published: list[int] = []

    def setup(self) -> None:
        run(self.url, "CREATE PUBLICATION pub FOR ALL TABLES")
        run(self.url, f"SELECT pg_create_logical_replication_slot('{self.slot}', 'pgoutput')")

    def broker(self) -> PackedEvents:
        return PackedEvents(EmbeddedBroker(self.path / "log"), partitions=3)

    def ship(self, faulty: Callable[[PackedEvents], PackedEvents] = lambda broker: broker) -> None:
        codec = EnvelopeCodec()
        ship(
            lambda: LogicalShipper.open(self.url, Options("pub", self.slot)),
            lambda: EventTopics(faulty(self.broker()), Encoder(self.options), codec),
            codec,
            ShipOptions("s", until_lsn="now", retry_s=5, linger_s=0.002),
            stop=threading.Event(),
            report=lambda _: None,
        )

    def apply(self, follower: str, *, stream: str = "s", **options: Any) -> list[int]:
        commits: list[int] = []
        broker = self.broker()
        try:
            apply_events(
                broker,
                connect_follower(follower),
                EventApplyOptions(stream, "p", self.options.modes, until_end=True, **options),
                stop=threading.Event(),
                progressed=commits.append,
            )
        finally:
            broker.close()
        return commits

    def records(self) -> list[tuple[str, Any]]:
        """Every event but heartbeats, by partition."""
        broker = self.broker()
        found = []
        for place in broker.places():
            if not place.topic.endswith(".cdc") and "heartbeat" not in place.topic:
                got = broker.fetch({place: 0}, limit_bytes=1 << 30, wait_s=0)
                found += [(place.topic, event.value and json.loads(event.value)["payload"]) for event in got]
        broker.close()
        return found


class Twice(PackedEvents):
    """Publishes, and then forgets that it did, once in a while."""

    failures = 0

    def publish(self, records: Sequence[EventRecord]) -> None:
        super().publish(records)
        if records[0].topic != "p.cdc" and Twice.failures < 4:
            Twice.failures += 1
            raise OutcomeUnknownError("the broker went away")


class Half(PackedEvents):
    """Publishes the first half of what it is given, and fails."""

    failures = 0

    def publish(self, records: Sequence[EventRecord]) -> None:
        if len(records) > 1 and Half.failures < 4:
            Half.failures += 1
            super().publish(records[: len(records) // 2])
            raise OutcomeUnknownError("the broker went away")
        super().publish(records)


@pytest.fixture
def leader(postgres18: EmbeddedPostgres, database: DatabaseFactory, tmp_path: Path) -> Leader:
    leader = Leader(database(postgres18), tmp_path)
    run(leader.url, *TABLES, *ROWS)
    leader.setup()
    return leader


@pytest.fixture
def follower(postgres18: EmbeddedPostgres, database: DatabaseFactory) -> str:
    url = database(postgres18)
    run(url, *FOLLOWER_TABLES)
    return url


def assert_equal(leader: Leader, follower: str) -> None:
    for table in ("t", "full_", '"odd ""na%me"'):
        assert rows(follower, table) == rows(leader.url, table), table


@pytest.mark.parametrize("schemas", [True, False])
def test_image_and_changes_arrive(leader: Leader, follower: str, schemas: bool) -> None:
    leader.options = replace(leader.options, schemas=schemas)
    leader.ship()
    leader.apply(follower)
    assert_equal(leader, follower)
    run(leader.url, *CHANGES)
    leader.ship()
    leader.apply(follower)
    assert_equal(leader, follower)
    assert leader.apply(follower) == []


@pytest.mark.parametrize("kind", [Twice, Half])
@pytest.mark.parametrize("transactions", [True, False])
def test_events_told_again(leader: Leader, follower: str, kind: type[PackedEvents], transactions: bool) -> None:
    def faulty(broker: PackedEvents) -> PackedEvents:
        return kind(broker._broker, partitions=3)

    kind.failures = 0  # type: ignore[attr-defined]
    leader.ship(faulty)
    kind.failures = 0  # type: ignore[attr-defined]
    run(leader.url, *CHANGES)
    leader.ship(faulty)
    assert kind.failures > 0  # type: ignore[attr-defined]
    leader.apply(follower, transactions=transactions)
    assert_equal(leader, follower)
    run(leader.url, *CHANGES[-2:], "DELETE FROM t WHERE a % 2 = 0")
    leader.ship()
    leader.apply(follower, transactions=transactions)
    assert_equal(leader, follower)


def test_a_transaction_is_one_commit(leader: Leader, follower: str) -> None:
    leader.ship()
    leader.apply(follower)
    large = "INSERT INTO full_ SELECT g, '', '{}' FROM generate_series(100, 12000) g"
    run(leader.url, f"BEGIN; {large}; UPDATE t SET n = 0; COMMIT")
    leader.ship()
    (events,) = leader.apply(follower)
    assert events == 11901 + 300
    assert_equal(leader, follower)


def test_a_transaction_that_lacks_events_stops_the_applier(leader: Leader, follower: str) -> None:
    leader.ship()
    leader.apply(follower)
    broker = leader.broker()
    end = {"status": "END", "id": "99:999999999999", "event_count": 1, "ts_ms": 1,
           "data_collections": [{"data_collection": "public.t", "event_count": 1}]}  # fmt: skip
    broker.publish([EventRecord("p.transaction", None, json.dumps(end).encode())])
    broker.close()
    with pytest.raises(GapError, match=r"transaction 99:999999999999, lacking events: \{'public.t': 1\}"):
        leader.apply(follower)


@pytest.mark.parametrize("schemas", [True, False])
def test_truncates_and_a_table_without_a_key(leader: Leader, follower: str, schemas: bool) -> None:
    leader.options = replace(leader.options, schemas=schemas, skipped="")
    for url in (leader.url, follower):
        run(url, "CREATE TABLE log (at int, what text)", "ALTER TABLE log REPLICA IDENTITY FULL")
    leader.ship()
    run(
        leader.url,
        "BEGIN; INSERT INTO log VALUES (1, 'a'), (1, 'a'), (2, NULL); TRUNCATE t; COMMIT",
        "INSERT INTO t (a, b) VALUES (1, 'only')",
        "UPDATE log SET what = 'b' WHERE at = 2",
        "DELETE FROM log WHERE ctid = (SELECT min(ctid) FROM log WHERE at = 1)",
    )
    leader.ship()
    leader.apply(follower)
    assert_equal(leader, follower)
    assert rows(follower, "log") == rows(leader.url, "log") == [("(1,a)",), ("(2,b)",)]
    with pytest.raises(SchemaError, match=r"public\.log has no key"):
        leader.apply(follower, stream="other", transactions=False)


def test_a_second_applier_fences_the_first(leader: Leader, follower: str) -> None:
    leader.ship()
    leader.apply(follower)
    run(leader.url, "DELETE FROM t WHERE a < 10")
    leader.ship()
    broker = leader.broker()
    first = connect_follower(follower)
    read = broker.fetch

    def fetch(*arguments: Any, **options: Any) -> Any:
        with closing(connect_follower(follower)) as second:
            second.begin()
            second.claim("s p.public.t[0]")
            second.claim("s p.public.t[1]")
            second.claim("s p.public.t[2]")
            second.commit()
        return read(*arguments, **options)

    broker.fetch = fetch  # type: ignore[method-assign]
    with pytest.raises(FencedError):
        apply_events(broker, first, EventApplyOptions("s", "p", until_end=True), stop=threading.Event())
    broker.close()
    leader.apply(follower)
    assert_equal(leader, follower)


def test_into_sqlite(leader: Leader, tmp_path: Path) -> None:
    leader.ship()
    run(leader.url, *CHANGES)
    leader.ship()
    broker = leader.broker()
    follower = sqlite.connect_follower(f"sqlite:///{tmp_path}/f.db")
    apply_events(broker, follower, EventApplyOptions("s", "p", until_end=True), stop=threading.Event())
    broker.close()
    with closing(sqlite3.connect(tmp_path / "f.db")) as connection:
        got = connection.execute("SELECT a, b, n, m FROM t ORDER BY a").fetchall()
    with psycopg.connect(leader.url) as leading:
        wanted = leading.execute("SELECT a, b, n::text, m::text FROM t ORDER BY a").fetchall()
    assert len(got) > 200
    assert [(a, b, str(n) if n is not None else None, m) for a, b, n, m in got] == wanted


def test_tables_are_made_from_schemas(leader: Leader, postgres18: EmbeddedPostgres, database: DatabaseFactory) -> None:
    follower = database(postgres18)
    leader.ship()
    leader.apply(follower)
    query = "(SELECT a, b, n, at FROM {t})"
    assert rows(follower, query.format(t="t")) == rows(leader.url, query.format(t="t"))


def test_without_schemas_there_must_be_tables(
    leader: Leader, postgres18: EmbeddedPostgres, database: DatabaseFactory
) -> None:
    leader.options = replace(leader.options, schemas=False)
    leader.ship()
    with pytest.raises(SchemaError, match="has no table public") as caught:
        leader.apply(database(postgres18))
    assert "schemas.enable=true" in caught.value.remedy


def test_the_position_is_kept_beside_the_events(leader: Leader) -> None:
    leader.ship()
    before = len(leader.records())
    leader.ship()
    assert len(leader.records()) == before
    broker = leader.broker()
    assert broker.bounds(Place("p.cdc", 0))[1] > 0
    broker.close()
    markers = [value["source"]["snapshot"] for _, value in leader.records() if value and value.get("op") == "r"]
    assert len(markers) == 303
    assert markers.count("last") == 1


def test_a_key_lives_in_one_partition(leader: Leader) -> None:
    run(leader.url, *CHANGES)
    leader.ship()
    broker = leader.broker()
    places = [place for place in broker.places() if place.topic == "p.public.t"]
    assert len(places) == 3
    seen: dict[bytes | None, Place] = {}
    for place in places:
        for event in broker.fetch({place: 0}, limit_bytes=1 << 30, wait_s=0):
            assert seen.setdefault(event.key, place) == place
    broker.close()


# Debezium's own losses, and what is refused by name.
LOSSY = {"timetz", "varbit", "bit(11)", "bit(8)"}
REFUSED = {"date", "interval", "numeric", "int4[]", "timestamp"}
MODES = [
    Modes(interval="string"),
    Modes("isostring", "string", "hex", "string"),
    Modes("microseconds", "string", "base64", "string"),
]


def sent(connection: psycopg.Connection[Any], declared: str, literal: str, form: int) -> tuple[int, bytes]:
    """A value as the server sends it, 0 text or 1 binary, and its type."""
    result = connection.pgconn.exec_params(f"select $1::{declared}".encode(), [literal.encode()], result_format=form)
    value = result.get_value(0, 0)
    assert value is not None, result.error_message
    return result.ftype(0), value


@pytest.mark.parametrize("modes", MODES, ids=lambda modes: modes.time)
def test_every_value_comes_back(postgres18: EmbeddedPostgres, modes: Modes) -> None:
    checked, refused = 0, []
    with psycopg.connect(postgres18.url(), autocommit=True) as connection:
        connection.execute(SETTINGS)
        for declared, literal in [(name, each) for name, those in LITERALS.items() for each in those]:
            if declared in LOSSY or declared.startswith("odd."):
                continue
            oid, text = sent(connection, declared, literal, 0)
            column = Column("c", oid)
            try:
                shown = json.loads(writer(column, "b", {}, modes)(sent(connection, declared, literal, 1)[1]))
                assert shown == json.loads(writer(column, "t", {}, modes)(text))
            except SchemaError:
                refused.append((declared, literal))
                continue
            back = reader({**column_schema(oid, -1, {}, modes), "field": "c"}, modes, declared)(shown)
            assert sent(connection, declared, back, 0)[1] == text, (declared, literal, shown)
            checked += 1
    assert checked > 230
    assert {declared for declared, _ in refused} <= REFUSED
    assert {"date", "interval", "int4[]"} <= {declared for declared, _ in refused}
