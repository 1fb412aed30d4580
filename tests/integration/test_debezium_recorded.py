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

SECONDS = " + ".join(
    f"extract({part} FROM iv) * {seconds}"
    for part, seconds in {
        "year": 31_557_600,
        "month": 2_629_800,
        "day": 86_400,
        "hour": 3_600,
        "minute": 60,
        "second": 1,
    }.items()
)
LOST = {
    "kinds.iv": f"trim_scale({SECONDS})",  # years, months and days become hours
    "required.iv": f"trim_scale({SECONDS})",
    "kinds.ttz": "ttz AT TIME ZONE 'UTC'",
    "kinds.free": "trim_scale(free)",  # Debezium drops the zeros
    "required.free": "trim_scale(free)",
    "defaults.n": "coalesce(n, 1.50)",  # Connect tells a NULL as the column's default where schemas are built from it
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
        if each["topic"] not in without and not _is_image_of_keyless(each)
    ]
    broker.publish(records)


def _is_image_of_keyless(record: dict[str, Any]) -> bool:
    """Rows that cannot be told apart are not taken from an image; :func:`make_tables` puts them there."""
    return record["topic"] == "p.public.keyless" and '"op":"r"' in (record["value"] or "")


def make_tables(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in recorded("bare")["ddl"]:
            if "PUBLICATION" not in statement:
                connection.execute(statement.encode())
        connection.execute("INSERT INTO keyless VALUES (1, 'a'), (2, NULL)")


def assert_like_the_leader(url: str, form: str, without: tuple[str, ...] = ()) -> None:
    with psycopg.connect(url, options="-c timezone=UTC") as connection:
        for table, rows in recorded(form)["tables"].items():
            if table in without:
                continue
            row = table.replace("%", "%%")
            connection.execute(
                f"CREATE TEMP TABLE leader AS SELECT (r::{row}).* FROM unnest(%s::text[]) r".encode(),
                [rows],
            )
            columns: list[Any] = connection.execute(
                "SELECT attname FROM pg_attribute WHERE attrelid = 'leader'::regclass AND attnum > 0"
            ).fetchall()
            shown = ", ".join(f"({LOST.get(f'{table}.{name}', identifier(name))})::text" for (name,) in columns)
            wanted, got = (
                sorted(connection.execute(f"SELECT {shown} FROM {place}".encode()).fetchall(), key=repr)
                for place in ("leader", table)
            )
            assert len(got) == len(wanted), table
            differing = [
                (table, name, mine, its)
                for row, expected in zip(got, wanted, strict=True)
                for (name,), mine, its in zip(columns, row, expected, strict=True)
                if mine != its
            ]
            assert not differing
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
    # Key by key there is no order between a truncate, which has no key, and rows in other partitions.
    broker = PackedEvents(EmbeddedBroker(tmp_path / "log"), partitions=3 if transactions else 1)
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
