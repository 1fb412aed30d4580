"""Debezium's own topics, recorded from a real run, make a follower what its leader was."""

import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest

from appliers.events import EventApplyOptions, apply_events
from cdc.brokers.embedded import EmbeddedBroker
from cdc.brokers.kafka.events import connect
from cdc.events import EventBroker, EventRecord, PackedEvents
from cdc.sql.quote import identifier
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql.follower import connect_follower
from tests.fix_kafka import KafkaServer, fresh_url
from tests.fix_postgresql import DatabaseFactory
from tests.unit.test_debezium_recorded import FORMS, recorded

LOST = {
    "kinds.iv": "extract(epoch FROM iv)",  # months and years become days
    "required.iv": "extract(epoch FROM iv)",
    "kinds.ttz": "ttz AT TIME ZONE 'UTC'",
    "kinds.free": "trim_scale(free)",  # Debezium drops the zeros
    "required.free": "trim_scale(free)",
    "defaults.n": "coalesce(n, 1.5)",  # Connect tells a NULL as the column's default where schemas are built from it
}
"""What Debezium's events do not carry, and what is left to be compared."""


def publish(broker: EventBroker, form: str, without: tuple[str, ...]) -> None:
    records = [
        EventRecord(
            each["topic"],
            None if each["key"] is None else each["key"].encode(),
            None if each["value"] is None else each["value"].encode(),
            tuple((name, content.encode()) for name, content in each["headers"].items()),
        )
        for each in recorded(form)["records"]
        if each["topic"] not in without
    ]
    broker.publish(records)


def make_tables(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in recorded("bare")["ddl"]:
            if "PUBLICATION" not in statement:
                connection.execute(statement.encode())


def assert_like_the_leader(url: str, form: str, without: tuple[str, ...] = ()) -> None:
    with psycopg.connect(url, options="-c timezone=UTC") as connection:
        for table, rows in recorded(form)["tables"].items():
            if table in without:
                continue
            connection.execute(
                f"CREATE TEMP TABLE leader AS SELECT (r::{table}).* FROM unnest(%s::text[]) r".encode(), [rows]
            )
            columns: list[Any] = connection.execute(
                "SELECT attname FROM pg_attribute WHERE attrelid = 'leader'::regclass AND attnum > 0"
            ).fetchall()
            shown = ", ".join(f"({LOST.get(f'{table}.{name}', identifier(name))})::text" for (name,) in columns)
            wanted, got = (
                sorted(connection.execute(f"SELECT {shown} FROM {place}".encode()).fetchall(), key=repr)
                for place in ("leader", table)
            )
            assert got == wanted, table
            connection.execute("DROP TABLE leader")


def follow(broker: EventBroker, url: str, *, transactions: bool) -> None:
    options = EventApplyOptions("s", "p", until_end=True, transactions=transactions)
    apply_events(broker, connect_follower(url), options, stop=threading.Event())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transactions", [True, False])
def test_a_follower_of_debezium(
    form: str, transactions: bool, postgres18: EmbeddedPostgres, database: DatabaseFactory, tmp_path: Path
) -> None:
    follower = database(postgres18)
    make_tables(follower)
    broker = PackedEvents(EmbeddedBroker(tmp_path / "log"), partitions=3)
    # Changes of a table without a key need their transactions.
    without = () if transactions else ("keyless",)
    publish(broker, form, tuple(f"p.public.{table}" for table in without))
    follow(broker, follower, transactions=transactions)
    assert_like_the_leader(follower, form, without)
    follow(broker, follower, transactions=transactions)  # there is nothing more
    assert_like_the_leader(follower, form, without)
    broker.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_follower_of_debezium_through_kafka(
    form: str, kafka: KafkaServer, postgres18: EmbeddedPostgres, database: DatabaseFactory
) -> None:
    follower = database(postgres18)
    make_tables(follower)
    url = fresh_url(kafka)
    broker = connect(f"{url}{'&' if '?' in url else '?'}partitions=3")
    publish(broker, form, ())
    follow(broker, follower, transactions=True)
    assert_like_the_leader(follower, form)
    broker.close()
