"""``--codec debezium-json``: a leader's changes as portable events, out and in, by the commands."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cdc.brokers.embedded import EmbeddedBroker
from cdc.events import PackedEvents, Place, StoredEvent
from cdc.stores.embedded import EmbeddedPostgres
from tests.fix_postgresql import DatabaseFactory
from tests.integration.test_cli import Cdc, execute, fetch, run, running, wait_for_line, wait_until

__all__ = ["run"]

EVENTS = ("--codec", "debezium-json")
SCHEMA = """
    CREATE TABLE items (id int PRIMARY KEY, name text, price numeric(10, 2), seen timestamptz, payload bytea);
    INSERT INTO items SELECT g, 'item ' || g, g / 3.0, '2024-02-29 12:00+00', '\\x00ff' FROM generate_series(1, 500) g;
"""
# Two transactions: what one message holds outside of BEGIN and COMMIT is one.
CHANGES = """
    BEGIN; UPDATE items SET price = price + 1 WHERE id % 5 = 0; DELETE FROM items WHERE id % 50 = 1; COMMIT;
    INSERT INTO items VALUES (1001, E'tab\\there', 7.5, NULL, NULL);
    UPDATE items SET id = 2002 WHERE id = 2;
"""
ROWS = "SELECT id, name, price::text, payload FROM items ORDER BY id"


@pytest.fixture
def leader(run: Cdc, postgres18: EmbeddedPostgres, database: DatabaseFactory) -> str:
    url = database(postgres18)
    execute(url, SCHEMA)
    assert run("setup", url, "--stream", "shop").status == 0
    return url


@pytest.fixture
def log(tmp_path: Path) -> str:
    return f"file://{tmp_path}/log"


@pytest.fixture(params=["postgresql", "sqlite"])
def follower(request: pytest.FixtureRequest, tmp_path: Path, database: DatabaseFactory) -> str:
    if request.param == "postgresql":
        return database(request.getfixturevalue("postgres16"))
    return f"sqlite:///{tmp_path}/follower.db"


def ship(run: Cdc, leader: str, log: str, *options: str) -> None:
    done = run("ship", leader, log, *EVENTS, "--stream", "shop", "--until", "now", *options)
    assert done.status == 0, done.err


def apply(run: Cdc, log: str, follower: str, *options: str) -> dict[str, Any]:
    done = run("apply", log, follower, *EVENTS, "--until", "end", "--json", *options)
    assert done.status == 0, done.err
    assert "caught up" in done.err
    said: dict[str, Any] = done.json
    return said


def assert_equal(leader: str, follower: str) -> None:
    wanted = fetch(leader, ROWS)
    assert len(wanted) > 400
    if follower.startswith("postgresql"):
        assert fetch(follower, ROWS) == wanted
        return
    with closing(sqlite3.connect(follower.removeprefix("sqlite:///"))) as connection:
        rows = connection.execute("SELECT id, name, price, payload FROM items ORDER BY id").fetchall()
    assert [(id_, name, str(price), payload) for id_, name, price, payload in rows] == wanted


def records(log: str) -> Iterator[StoredEvent]:
    broker = PackedEvents(EmbeddedBroker(Path(log.removeprefix("file://")), create=False))
    with closing(broker):
        for place in broker.places():
            if not place.topic.endswith(".cdc"):
                yield from broker.fetch({place: 0}, limit_bytes=1 << 30, wait_s=0)


def payloads(log: str, topic: str) -> list[Any]:
    found = [event.value for event in records(log) if event.place.topic == topic]
    return [json.loads(value) if value is not None else None for value in found]


def test_image_changes_and_restart(run: Cdc, leader: str, log: str, follower: str) -> None:
    ship(run, leader, log)
    assert apply(run, log, follower)["rows"] == 500
    assert_equal(leader, follower)
    execute(leader, CHANGES)
    ship(run, leader, log)
    done = apply(run, log, follower)
    assert_equal(leader, follower)
    # The changed key is two events.
    assert (done["command"], done["stream"], done["transactions"], done["rows"]) == ("apply", "shop", 2, 110 + 1 + 2)
    assert done["position"] is not None
    assert done["bytes"] > 0
    again = apply(run, log, follower)
    assert (again["transactions"], again["rows"]) == (0, 0)
    assert run("verify", leader, follower, "--stream", "shop").status == 0
    execute(leader, "DELETE FROM items WHERE id = 3")
    assert run("verify", leader, follower, "--stream", "shop").status == 81


def test_a_follower_that_is_not_there(run: Cdc, leader: str, log: str) -> None:
    ship(run, leader, log)
    done = run("apply", log, "postgresql://u@127.0.0.1:1/db", *EVENTS, "--retry-s", "0.5")
    assert done.status == 69
    assert "caught up" not in done.err


def test_key_by_key(run: Cdc, leader: str, log: str, follower: str) -> None:
    ship(run, leader, log, "--partitions", "3")
    execute(leader, CHANGES)
    ship(run, leader, log, "--partitions", "3")
    assert apply(run, log, follower, "--key-by-key")["rows"] == 500 + 113
    assert_equal(leader, follower)


def test_records_have_debeziums_form(run: Cdc, leader: str, log: str) -> None:
    ship(run, leader, log)
    execute(leader, CHANGES)
    ship(run, leader, log)
    told = payloads(log, "shop.public.items")
    assert [each["payload"]["op"] for each in told[:500]] == ["r"] * 500
    first = told[0]
    assert first["schema"]["name"] == "shop.public.items.Envelope"
    assert first["payload"]["source"]["snapshot"] == "first"
    assert [field["field"] for field in first["schema"]["fields"]][:3] == ["before", "after", "source"]
    assert None in told  # a tombstone
    inserted = next(each["payload"] for each in told if each and (each["payload"]["after"] or {}).get("id") == 1001)
    assert inserted["op"] == "c"
    assert inserted["after"]["name"] == "tab\there"
    assert inserted["transaction"]["total_order"] == 1
    boundaries = [each["payload"]["status"] for each in payloads(log, "shop.transaction")]
    assert boundaries == ["BEGIN", "END"] * 2


def test_options_change_the_records(run: Cdc, leader: str, log: str) -> None:
    options = ("--prefix", "p.q", "--schemas-enable", "off", "--tombstones", "off", "--transactions", "off",
               "--decimal-handling", "string", "--binary-handling", "hex", "--truncates", "off")  # fmt: skip
    ship(run, leader, log, *options)
    execute(leader, CHANGES)
    execute(leader, "TRUNCATE items")
    ship(run, leader, log, *options)
    told = payloads(log, "p.q.public.items")
    assert {event.place.topic for event in records(log)} <= {"p.q.public.items", "__debezium-heartbeat.p.q"}
    assert None not in told
    assert "schema" not in told[0]
    assert (told[0]["after"]["price"], told[0]["after"]["payload"]) == ("0.33", "00ff")
    assert {each["op"] for each in told} == {"r", "c", "u", "d"}
    assert all(each["transaction"] is None for each in told)


def test_modes_are_known_on_both_sides(run: Cdc, leader: str, log: str, follower: str) -> None:
    modes = ("--time-precision", "isostring", "--binary-handling", "base64", "--decimal-handling", "string")
    ship(run, leader, log, *modes)
    execute(leader, CHANGES)
    ship(run, leader, log, *modes)
    if follower.startswith("postgresql"):
        execute(follower, SCHEMA)
        execute(follower, "TRUNCATE items")
        apply(run, log, follower, *modes)
        assert_equal(leader, follower)
    else:
        apply(run, log, follower, *modes)


def test_truncates_are_told_unless_told_otherwise(run: Cdc, leader: str, log: str, tmp_path: Path) -> None:
    follower = f"sqlite:///{tmp_path}/follower.db"
    ship(run, leader, log)
    execute(leader, "TRUNCATE items")
    ship(run, leader, log)
    apply(run, log, follower)
    with closing(sqlite3.connect(tmp_path / "follower.db")) as connection:
        assert connection.execute("SELECT count(*) FROM items").fetchone() == (0,)


def test_running_until_stopped_and_restarted(run: Cdc, leader: str, log: str, database: DatabaseFactory,
                                             postgres16: EmbeddedPostgres) -> None:  # fmt: skip
    follower = database(postgres16)
    for statement in ("INSERT INTO items VALUES (9001, 'one')", "DELETE FROM items WHERE id = 9001"):
        with (
            running("ship", leader, log, *EVENTS, "--stream", "shop") as shipper,
            running("apply", log, follower, *EVENTS, "--stream", "shop", "--retry-s", "30") as applier,
        ):
            wait_for_line(shipper, "as events under shop")
            execute(leader, statement)
            wait_until(lambda: _rows(follower) == fetch(leader, ROWS))
            applier.terminate()
            wait_for_line(applier, "applied ")
            shipper.terminate()
            wait_for_line(shipper, "shipped ")
            assert (shipper.wait(60), applier.wait(60)) == (0, 0)
    assert_equal(leader, follower)


def _rows(follower: str) -> list[tuple[Any, ...]]:
    return fetch(follower, ROWS) if fetch(follower, "SELECT to_regclass('items')") != [(None,)] else []


def test_what_a_broker_holds(run: Cdc, leader: str, log: str, tmp_path: Path) -> None:
    ship(run, leader, log, "--partitions", "2")
    done = run("inspect", log)
    assert done.status == 0, done.err
    assert "shop.public.items[1]: events 0 to " in done.out
    assert "portable events (debezium-json) under shop" in done.err
    listed = [json.loads(line) for line in run("inspect", log, "--json").out.splitlines()]
    assert [listed[0][name] for name in ("prefix", "topic", "partition")] == ["shop", "shop.cdc", 0]
    assert sum(each["next_offset"] for each in listed if each["topic"] == "shop.public.items") == 500
    for stream in ("shop", "shop.public.items.0"):
        done = run("inspect", log, "--stream", stream)
        assert done.status == 64
        assert "holds portable events" in done.err
    done = run("apply", log, f"sqlite:///{tmp_path}/f.db")
    assert done.status == 64
    assert "--codec debezium-json" in done.err
    assert run("status", leader, log, "--stream", "shop").status == 0
    assert run("status", log).status == 0


def test_a_native_stream_lives_beside_events(run: Cdc, leader: str, log: str, tmp_path: Path) -> None:
    ship(run, leader, log)
    assert run("setup", leader, "--stream", "native").status == 0
    assert run("ship", leader, log, "--stream", "native", "--until", "now").status == 0
    assert run("apply", log, f"sqlite:///{tmp_path}/native.db", "--until", "end").status == 0
    assert_equal(leader, f"sqlite:///{tmp_path}/native.db")
    apply(run, log, f"sqlite:///{tmp_path}/events.db")
    assert_equal(leader, f"sqlite:///{tmp_path}/events.db")
    done = run("inspect", log)
    assert "native: offsets 0 to " in done.out
    assert "shop.cdc[0]: events 0 to " in done.out


@pytest.mark.parametrize("partitions", ["1", "5"])
def test_the_number_of_partitions_stays(run: Cdc, leader: str, log: str, partitions: str) -> None:
    ship(run, leader, log, "--partitions", "3")
    before = sum(1 for _ in records(log))
    done = run("ship", leader, log, *EVENTS, "--stream", "shop", "--until", "now", "--partitions", partitions)
    assert done.status == 64
    assert f"was not written with {partitions} partitions" in done.err
    assert sum(1 for _ in records(log)) == before


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("ship", ("--codec", "avro"), "--codec is 'avro': not one of native, debezium-json"),
        ("ship", (*EVENTS, "--decimal-handling", "exact"), "--decimal-handling is 'exact': not one of precise"),
        ("ship", (*EVENTS, "--partitions", "0"), "--partitions is '0': not between 1 and 9999"),
        ("ship", (*EVENTS, "--tombstones", "maybe"), "--tombstones is 'maybe': not one of on, off"),
        ("ship", (*EVENTS, "--prefix", "no spaces"), "--prefix is 'no spaces': not 1 to 100 of"),
        ("ship", (*EVENTS, "--stream", "no spaces", "--slot", "s"), "a topic's name cannot begin with 'no spaces'"),
        ("ship", ("--partitions", "2"), "--partitions is for portable events"),
        ("ship", ("--tombstones", "off"), "--tombstones is for portable events"),
        ("apply", ("--key-by-key",), "--key-by-key is for portable events"),
        ("apply", (*EVENTS, "--reload"), "--reload is for native streams"),
        ("apply", (*EVENTS, "--until", "0/100"), "not applied up to an LSN"),
        ("apply", EVENTS, "holds no events that cdc wrote"),
    ],
)
def test_bad_options(run: Cdc, tmp_path: Path, command: str, options: tuple[str, ...], said: str) -> None:
    log, follower = f"file://{tmp_path}/log", f"sqlite:///{tmp_path}/f.db"
    places = {"ship": ("postgresql://u@127.0.0.1:1/db", log), "apply": (log, follower)}
    done = run(command, *places[command], *options)
    assert done.status == 64
    assert said in done.err
    assert "remedy: " in done.err
    assert list(tmp_path.iterdir()) == []


def test_several_prefixes_are_named(run: Cdc, leader: str, log: str, tmp_path: Path) -> None:
    ship(run, leader, log)
    assert run("setup", leader, "--stream", "other").status == 0
    done = run("ship", leader, log, *EVENTS, "--stream", "other", "--until", "now")
    assert done.status == 0, done.err
    follower = f"sqlite:///{tmp_path}/f.db"
    done = run("apply", log, follower, *EVENTS)
    assert done.status == 64
    assert "2 prefixes: other, shop" in done.err
    apply(run, log, follower, "--prefix", "other")
    assert_equal(leader, follower)


def test_without_schemas_the_tables_must_be_there(run: Cdc, leader: str, log: str, tmp_path: Path) -> None:
    ship(run, leader, log, "--schemas-enable", "off")
    done = run("apply", log, f"sqlite:///{tmp_path}/f.db", *EVENTS, "--until", "end")
    assert done.status == 81
    assert "schemas.enable=true" in done.err


def test_what_cannot_be_told_is_refused(run: Cdc, leader: str, log: str) -> None:
    ship(run, leader, log)
    before = sum(1 for _ in records(log))
    execute(leader, "ALTER TABLE items ADD price2 numeric; INSERT INTO items (id, price2) VALUES (5000, 'NaN')")
    done = run("ship", leader, log, *EVENTS, "--stream", "shop", "--until", "now")
    assert done.status == 81
    assert "price2" in done.err
    assert sum(1 for _ in records(log)) == before
    ship(run, leader, log, "--decimal-handling", "string")
    assert payloads(log, "shop.public.items")[-1]["payload"]["after"]["price2"] == "NaN"


def test_through_kafka(run: Cdc, leader: str, kafka_url: str, follower: str) -> None:
    ship(run, leader, kafka_url, "--partitions", "3")
    apply(run, kafka_url, follower)
    assert_equal(leader, follower)
    execute(leader, CHANGES)
    ship(run, leader, kafka_url, "--partitions", "3")
    done = apply(run, kafka_url, follower)
    assert (done["transactions"], done["rows"]) == (2, 113)
    assert_equal(leader, follower)
    listed = run("inspect", kafka_url)
    assert listed.status == 0
    assert str(Place("shop.public.items", 2)) in listed.out
