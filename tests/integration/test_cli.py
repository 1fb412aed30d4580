"""The commands on real servers: the main job, what they print, and what bad input gets."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from cdc.brokers.embedded import EmbeddedBroker
from cdc.cli import main
from cdc.stores.embedded import EmbeddedPostgres
from tests.fix_postgresql import DatabaseFactory

WAIT_S = 60.0

SCHEMA = """
    CREATE TYPE mood AS ENUM ('calm', 'wild');
    CREATE TABLE items (id int PRIMARY KEY, name text, price numeric(10, 2), mood mood, seen timestamptz, tags text[]);
    CREATE TABLE events (what text, weight float8);
    INSERT INTO items SELECT g, 'item ' || g, g / 3.0, 'calm', '2024-02-29 12:00+00', ARRAY['a', NULL]
        FROM generate_series(1, 500) g;
    INSERT INTO events SELECT 'event ' || g % 7, g / 3.0 FROM generate_series(1, 300) g;
"""
CHANGES = """
    UPDATE items SET price = price + 1, mood = 'wild' WHERE id % 5 = 0;
    DELETE FROM items WHERE id % 50 = 1;
    INSERT INTO items VALUES (1001, E'tab\\there', 7.5, NULL, 'infinity', '{}');
    INSERT INTO events VALUES ('again', 'Infinity'), ('again', 'Infinity');
    DELETE FROM events WHERE what = 'event 3';
"""


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cdc = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Cdc:
    def cdc(*arguments: str) -> Result:
        capsys.readouterr()
        status = main(arguments)
        return Result(status, *capsys.readouterr())

    return cdc


@pytest.fixture
def log(tmp_path: Path) -> str:
    return f"file://{tmp_path}/log"


@pytest.fixture
def leader(postgres18: EmbeddedPostgres, database: DatabaseFactory) -> str:
    url = database(postgres18)
    execute(url, SCHEMA)
    return url


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/follower.db"


@pytest.fixture(params=["postgresql", "sqlite", "duckdb"])
def follower(request: pytest.FixtureRequest, tmp_path: Path, database: DatabaseFactory) -> str:
    if request.param == "postgresql":
        return database(request.getfixturevalue("postgres16"))
    if request.param == "duckdb":
        pytest.importorskip("duckdb")
    return f"{request.param}:///{tmp_path}/follower.{request.param}"


def execute(url: str, sql: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.encode())


def fetch(url: str, sql: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(sql.encode()).fetchall()


def edit(sqlite_url: str, sql: str) -> None:
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection, connection:
        connection.executescript(sql)


def checkpoint_of(sqlite_url: str) -> list[tuple[Any, ...]]:
    """All that says how far the follower is; the owner's epoch counts claims and may grow."""
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection:
        names = [row[1] for row in connection.execute("PRAGMA table_info(cdc_checkpoint)")]
        kept = ", ".join(f'"{name}"' for name in names if name != "owner")
        return connection.execute(f"SELECT {kept} FROM cdc_checkpoint").fetchall()


def carry(run: Cdc, leader: str, log: str, follower: str, *names: str) -> None:
    assert run("ship", leader, log, "--format", "logical", "--until", "now", *names).status == 0
    assert run("apply", log, follower, "--until", "end").status == 0


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-m", "cdc", *arguments], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    pytest.fail(f"{text!r} was never said; exit status {process.wait(WAIT_S)}")


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_main_job(run: Cdc, leader: str, log: str, follower: str) -> None:
    assert run("setup", leader, "--format", "logical").status == 0
    carry(run, leader, log, follower)
    done = run("verify", leader, follower)
    assert done.status == 0, done.out
    assert "equal: 2 tables, 800 rows" in done.out
    execute(leader, CHANGES)
    carry(run, leader, log, follower)
    done = run("verify", leader, follower, "--json")
    assert done.status == 0
    assert done.json["verdict"] == "equal"
    assert {table["table"]: table["leader_rows"] for table in done.json["tables"]} == {
        "public.events": 300 - 43 + 2,
        "public.items": 500 - 10 + 1,
    }
    assert all(table["leader_digest"] == table["follower_digest"] for table in done.json["tables"])
    assert "caught up" in run("apply", log, follower, "--until", "end").err


def test_setup_is_idempotent_and_dry_run_changes_nothing(run: Cdc, leader: str) -> None:
    done = run("setup", leader, "--dry-run")
    assert done.status == 0
    assert "CREATE PUBLICATION" in done.out
    assert "pg_create_logical_replication_slot" in done.out
    assert fetch(leader, "SELECT FROM pg_publication") == []
    assert {step["state"] for step in run("setup", leader, "--dry-run", "--json").json} == {"planned"}
    assert {step["state"] for step in run("setup", leader, "--json").json} == {"done"}
    assert {step["state"] for step in run("setup", leader, "--json").json} == {"already"}
    assert "already so" in run("setup", leader).out
    assert {step["state"] for step in run("teardown", leader, "--dry-run", "--json").json} == {"planned"}
    assert {step["state"] for step in run("teardown", leader, "--json").json} == {"done"}
    assert {step["state"] for step in run("teardown", leader, "--json").json} == {"already"}
    assert fetch(leader, "SELECT FROM pg_publication") == []


def test_setup_narrows_and_names(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    names = ("--stream", "narrow", "--publication", "Some Pub", "--slot", "some_slot")
    assert run("setup", leader, "--tables", "items", *names).status == 0
    assert fetch(leader, "SELECT pubname FROM pg_publication") == [("Some Pub",)]
    assert run("ship", leader, log, "--until", "now", *names).status == 0
    assert run("apply", log, sqlite, "--until", "end").status == 0
    done = run("verify", leader, sqlite, "--json", *names)
    assert [table["table"] for table in done.json["tables"]] == ["public.items"]
    assert run("teardown", leader, *names).status == 0
    assert fetch(leader, "SELECT pubname FROM pg_publication") == []


def test_check(run: Cdc, leader: str, follower: str) -> None:
    done = run("check", leader)
    assert done.status == 78  # no publication, no slot
    assert any(line.startswith("error ") for line in done.out.splitlines())
    assert "CREATE PUBLICATION" in done.out
    assert run("setup", leader).status == 0
    findings = run("check", leader, "--json").json
    assert "error" not in {finding["level"] for finding in findings}
    assert set(findings[0]) == {"level", "subject", "message", "statements"}
    assert run("check", leader).status == 0
    assert run("check", follower, "--as", "follower").status == 0


def test_ship_and_apply_tell_in_json(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader)
    shipped = run("ship", leader, log, "--until", "now", "--json", "--quiet")
    assert shipped.err == ""
    assert shipped.json["command"] == "ship"
    assert shipped.json["image_rows"] == 800
    execute(leader, CHANGES)
    run("ship", leader, log, "--until", "now")
    applied = run("apply", log, sqlite, "--until", "end", "--json").json
    assert applied["image_rows"] == 800
    assert applied["transactions"] == 1
    assert applied["rows"] == 100 + 10 + 1 + 2 + 43
    assert set(applied) == set(shipped.json)


def test_until_lsn(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader)
    assert run("ship", leader, log, "--until", "now").status == 0
    execute(leader, "INSERT INTO events VALUES ('first', 1)")
    ((lsn,),) = fetch(leader, "SELECT pg_current_wal_insert_lsn()::text")
    execute(leader, "INSERT INTO events VALUES ('second', 2)")
    assert run("ship", leader, log, "--until", "now").status == 0
    assert run("apply", log, sqlite, "--until", lsn).status == 0
    with closing(sqlite3.connect(sqlite.removeprefix("sqlite:///"))) as connection:
        assert connection.execute("SELECT what FROM events WHERE what IN ('first', 'second')").fetchall() == [
            ("first",)
        ]


def test_status(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader)
    carry(run, leader, log, sqlite)
    execute(leader, CHANGES)
    assert run("ship", leader, log, "--until", "now").status == 0
    report = run("status", leader, log, sqlite, "--json").json
    (topic,), (applied,) = report["topics"], report["followers"]
    assert report["leader"]["wal_status"] == "reserved"
    assert report["leader"]["retained_wal_bytes"] >= report["leader"]["lag_bytes"] >= 0
    assert report["leader"]["active"] is False
    assert report["leader"]["stream"] == topic["stream"] == applied["stream"]
    assert topic["first_offset"] == 0
    assert applied["behind_batches"] > 0
    assert applied["lag_bytes"] > 0
    assert 0 <= applied["lag_s"] < WAIT_S
    run("apply", log, sqlite, "--until", "end")
    (applied,) = run("status", log, sqlite, "--json").json["followers"]
    assert (applied["behind_batches"], applied["lag_bytes"], applied["lag_s"]) == (0, 0, 0.0)
    told = run("status", leader, log, sqlite).out
    for word in ("leader ", "retained WAL", "topic ", "follower ", "behind the topic by 0 batches"):
        assert word in told


def test_inspect_shows_every_kind_of_change(run: Cdc, leader: str, log: str) -> None:
    run("setup", leader)
    run("ship", leader, log, "--until", "now")
    execute(leader, "ALTER TABLE items ALTER name SET STORAGE EXTERNAL")
    execute(leader, "INSERT INTO items VALUES (2000, repeat('x', 9000))")
    execute(leader, "UPDATE items SET price = 5 WHERE id = 2000")
    execute(leader, "UPDATE items SET id = 2001 WHERE id = 2000")
    execute(leader, "DELETE FROM items WHERE id = 2001")
    execute(leader, "DELETE FROM events WHERE what = 'event 6' AND weight = 2")
    execute(leader, "TRUNCATE events")
    run("ship", leader, log, "--until", "now")
    told = run("inspect", log, "--rows").out
    assert "image-begin  at 0/" in told
    assert "fragment 0 (last)  chunk 1, 500 rows at 0/" in told
    assert "image public.items (id='1', name='item 1', price='0.33', mood='calm'" in told
    assert "update public.items (id='2000', name=<unchanged>, price='5.00', mood=NULL" in told
    assert "update public.items key (id='2000') → (id='2001', name=" in told
    assert "delete public.items key (id='2001')" in told
    assert "delete public.events before (what='event 6', weight='2')" in told
    assert "truncate public.events" in told
    batches = [json.loads(line) for line in run("inspect", log, "--rows", "--json").out.splitlines()]
    assert [batch["offset"] for batch in batches] == list(range(len(batches)))
    operations = {change["op"] for batch in batches for change in batch["changes"]}
    assert operations == {"image", "insert", "update", "delete", "truncate"}


# Verify.


def test_verify_shows_differing_keys(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader)
    carry(run, leader, log, sqlite)
    edit(
        sqlite,
        "UPDATE items SET name = 'wrong' WHERE id = 7; DELETE FROM items WHERE id IN (8, 9);"
        "INSERT INTO items (id) VALUES (9000); INSERT INTO events VALUES ('event 1', 0.5)",
    )
    done = run("verify", leader, sqlite, "--json")
    assert done.status == 81
    tables = {table["table"]: table for table in done.json["tables"]}
    assert tables["public.items"]["keys"] == {
        "missing": ["id=8", "id=9"],
        "extra": ["id=9000"],
        "different": ["id=7"],
        "complete": True,
    }
    assert tables["public.events"]["keys"]["extra"] == ["what=event 1, weight=0.5"]
    told = run("verify", leader, sqlite, "--keys", "1")
    assert told.status == 81
    assert "public.items: missing on the follower: id=8" in told.out
    assert "id=9\n" not in told.out
    assert "public.items: and more" in told.out
    assert run("verify", leader, sqlite, "--tables", "events", "--keys", "0").out.count("public.events") == 1


def test_verify_tells_behind_from_different(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader)
    carry(run, leader, log, sqlite)
    execute(leader, CHANGES)
    done = run("verify", leader, sqlite)
    assert done.status == 75
    assert "unknown: 2 of 2 tables differ" in done.out
    assert "--wait" in done.out
    run("ship", leader, log, "--until", "now")
    assert run("verify", leader, sqlite).status == 75  # shipped, not applied
    run("apply", log, sqlite, "--until", "end")
    execute(leader, "CHECKPOINT")  # writes log that is nobody's transaction
    assert run("verify", leader, sqlite).status == 0
    edit(sqlite, "DELETE FROM items WHERE id = 2")
    assert run("verify", leader, sqlite).status == 81


@pytest.mark.parametrize("follower", ["postgresql", "sqlite"], indirect=True)
def test_verify_waits_for_a_running_stream(run: Cdc, leader: str, log: str, follower: str) -> None:
    """Not for DuckDB, whose file is open to one process at a time."""
    run("setup", leader)
    carry(run, leader, log, follower)
    with running("ship", leader, log), running("apply", log, follower):
        execute(leader, CHANGES)
        done = run("verify", leader, follower, "--wait", str(WAIT_S))
    assert done.status == 0, done


def test_verify_convicts_under_load(
    run: Cdc, leader: str, log: str, postgres16: EmbeddedPostgres, database: DatabaseFactory
) -> None:
    """A row that the leader leaves alone must not hide behind those it goes on changing."""
    follower = database(postgres16)
    run("setup", leader)
    carry(run, leader, log, follower)
    execute(follower, "UPDATE items SET name = 'wrong' WHERE id = 3")
    with running("ship", leader, log), running("apply", log, follower), writing(leader):
        done = run("verify", leader, follower, "--wait", "30")
    assert done.status == 81, done
    assert "id=3" in done.out


@contextmanager
def writing(leader: str) -> Iterator[None]:
    """Change one row of the leader again and again."""
    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(leader, autocommit=True) as connection:
            while not stop.wait(0.02):
                connection.execute("UPDATE items SET price = price + 1 WHERE id = 499")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_verify_without_a_stream_or_a_table(
    run: Cdc, leader: str, database: DatabaseFactory, postgres16: EmbeddedPostgres
) -> None:
    other = database(postgres16)
    done = run("verify", leader, other)
    assert done.status == 81
    assert "there is no table public.events" in done.out
    execute(other, SCHEMA)
    execute(other, "ALTER TABLE items ADD COLUMN extra int DEFAULT 1")  # the follower may have more columns
    done = run("verify", leader, other)
    assert done.status == 0
    assert "public.items: not compared: extra" in done.out
    done = run("verify", leader, other, "--tables", "absent")
    assert done.status == 78
    assert "no table public.absent" in done.err
    assert run("verify", leader, other, "--schemas", "absent").status == 64
    assert run("verify", leader, other, "--publication", "absent").status == 78


def test_verify_names_a_row_filter(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader, "--tables", "items", "--stream", "filtered")
    execute(leader, "ALTER PUBLICATION filtered SET TABLE items WHERE (id > 10)")
    run("teardown", leader, "--stream", "filtered", "--publication", "absent")  # a slot older than that cannot be used
    run("setup", leader, "--stream", "filtered")
    carry(run, leader, log, sqlite, "--stream", "filtered")
    done = run("verify", leader, sqlite, "--stream", "filtered")
    assert done.status == 0, done
    assert "public.items: only rows where (id > 10)" in done.out
    with sqlite3.connect(sqlite.removeprefix("sqlite:///")) as follower:
        follower.execute("DELETE FROM items WHERE id = 11")
    done = run("verify", leader, sqlite, "--stream", "filtered")
    assert done.status == 81
    assert "missing on the follower: id=11\n" in done.out


# Bad input.


def refused(done: Result, status: int, *words: str) -> None:
    assert done.status == status, done
    *_, first, second = done.err.splitlines()
    assert first.startswith("cdc: error: "), done.err
    assert second.startswith("remedy: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err


def test_no_slot_or_publication(run: Cdc, leader: str, log: str) -> None:
    refused(run("ship", leader, log, "--until", "now"), 78, "does not exist", "cdc setup")
    run("setup", leader)
    ((name,),) = fetch(leader, "SELECT pubname FROM pg_publication")
    execute(leader, f"DROP PUBLICATION {name}")
    refused(run("ship", leader, log, "--until", "now"), 78, f"no publication {name!r}", "cdc setup")
    assert "absent" in run("status", leader, "--slot", "absent").err


def test_dropped_and_recreated_slot(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader)
    carry(run, leader, log, sqlite)
    ((slot,),) = fetch(leader, "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()")
    execute(leader, f"SELECT pg_drop_replication_slot('{slot}')")
    execute(leader, CHANGES)
    refused(run("ship", leader, log, "--until", "now"), 80, "is gone", "--image new")
    run("setup", leader)
    refused(run("ship", leader, log, "--until", "now"), 80, "recreated", "--image new")
    assert run("ship", leader, log, "--until", "now", "--image", "new").status == 0
    assert run("apply", log, sqlite, "--until", "end").status == 0
    assert run("verify", leader, sqlite).status == 0


def test_another_leader(
    run: Cdc, leader: str, log: str, postgres18: EmbeddedPostgres, database: DatabaseFactory
) -> None:
    run("setup", leader, "--stream", "mine")
    run("ship", leader, log, "--until", "now", "--stream", "mine")
    other = database(postgres18)
    run("setup", other, "--stream", "mine", "--slot", "other")
    done = run("ship", other, log, "--until", "now", "--stream", "mine", "--slot", "other")
    refused(done, 78, "the topic is of leader")


def test_missing_database_role_and_privilege(run: Cdc, leader: str, postgres18: EmbeddedPostgres, log: str) -> None:
    refused(run("setup", postgres18.url("absent")), 78, 'database "absent" does not exist')
    refused(run("setup", postgres18.url("postgres", "nobody")), 77, 'role "nobody" does not exist')
    execute(leader, "DROP ROLE IF EXISTS humble; CREATE ROLE humble LOGIN")
    database = leader.rpartition("/")[2]
    refused(run("setup", postgres18.url(database, "humble")), 77)
    run("setup", leader)
    refused(run("ship", postgres18.url(database, "humble"), log, "--until", "now"), 77, "permission denied")
    done = run("check", postgres18.url(database, "humble"))
    assert done.status == 78
    assert "REPLICATION" in done.out


def test_wrong_wal_level(run: Cdc) -> None:
    with EmbeddedPostgres(18, settings={"wal_level": "replica", "fsync": "off"}) as server:
        refused(run("setup", server.url()), 78, "wal_level")
        done = run("check", server.url())
    assert done.status == 78
    assert "ALTER SYSTEM SET wal_level = 'logical'" in done.out


def test_corrupt_batch_leaves_the_follower_alone(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader)
    carry(run, leader, log, sqlite)
    before = checkpoint_of(sqlite)
    execute(leader, CHANGES)
    run("ship", leader, log, "--until", "now")
    path = log.removeprefix("file://")
    with closing(EmbeddedBroker(Path(path))) as broker:
        (topic,) = broker.topics()
        end = broker.bounds(topic)[1]
    with closing(sqlite3.connect(path)) as connection, connection:
        ((offset, body),) = connection.execute(
            'SELECT "offset", body FROM message WHERE "offset" >= ? ORDER BY length(body) DESC LIMIT 1', [end - 2]
        )
        damaged = body[:-3] + bytes([body[-3] ^ 255]) + body[-2:]
        connection.execute('UPDATE message SET body = ? WHERE "offset" = ?', [damaged, offset])
    refused(run("apply", log, sqlite, "--until", "end"), 65, "checksum", f"offset {offset}")
    assert checkpoint_of(sqlite) == before
    assert run("verify", leader, sqlite).status == 75
    done = run("inspect", log)
    refused(done, 65, f"offset {offset}")
    assert len(done.out.splitlines()) == offset


def test_conflicting_row_leaves_the_follower_alone(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader)
    carry(run, leader, log, sqlite)
    before = checkpoint_of(sqlite)
    edit(sqlite, "INSERT INTO items (id, name) VALUES (1001, 'mine')")
    execute(leader, CHANGES)
    run("ship", leader, log, "--until", "now")
    refused(run("apply", log, sqlite, "--until", "end"), 81, "public.items")
    assert checkpoint_of(sqlite) == before
    with closing(sqlite3.connect(sqlite.removeprefix("sqlite:///"))) as connection:
        assert connection.execute("SELECT name FROM items WHERE id = 1001").fetchall() == [("mine",)]
        assert connection.execute("SELECT count(*) FROM items").fetchone() == (501,)
    edit(sqlite, "DELETE FROM items WHERE id = 1001")
    assert run("apply", log, sqlite, "--until", "end").status == 0
    assert run("verify", leader, sqlite).status == 0


def test_missing_table_on_the_follower(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader)
    carry(run, leader, log, sqlite)
    before = checkpoint_of(sqlite)
    edit(sqlite, "DROP TABLE items")
    execute(leader, CHANGES)
    run("ship", leader, log, "--until", "now")
    refused(run("apply", log, sqlite, "--until", "end"), 81, "items")
    assert checkpoint_of(sqlite) == before


# Running processes.


def test_signals_end_in_good_order(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader)
    with running("ship", leader, log) as ship:
        wait_for_line(ship, "image complete")
        with running("apply", log, sqlite) as apply:
            wait_for_line(apply, "caught up")
            execute(leader, CHANGES)
            wait_until(lambda: run("verify", leader, sqlite).status == 0)
            apply.send_signal(signal.SIGINT)
            assert apply.wait(WAIT_S) == 0
        ship.send_signal(signal.SIGTERM)
        assert ship.wait(WAIT_S) == 0


def test_a_stop_while_the_leader_is_away_is_clean(log: str) -> None:
    with running("ship", "postgresql://nobody@127.0.0.1:1/absent", log) as ship:
        wait_for_line(ship, "shipping")
        time.sleep(0.5)
        assert ship.poll() is None  # it goes on trying
        ship.send_signal(signal.SIGTERM)
        assert ship.wait(WAIT_S) == 0


def test_a_second_signal_ends_at_once(run: Cdc, leader: str, log: str) -> None:
    run("setup", leader)
    with running("ship", leader, log, "--linger-ms", "60000") as ship:
        wait_for_line(ship, "image complete")
        wait_until(lambda: fetch(leader, "SELECT bool_or(active) FROM pg_replication_slots") == [(True,)])
        time.sleep(1)
        ship.send_signal(signal.SIGTERM)  # heeded when it next looks up, which is a long time from now
        time.sleep(0.5)
        ship.send_signal(signal.SIGTERM)
        assert ship.wait(WAIT_S) == 143


def test_a_second_shipper_is_fenced(run: Cdc, leader: str, log: str) -> None:
    run("setup", leader)
    with running("ship", leader, log) as ship:
        wait_for_line(ship, "image complete")
        refused(run("ship", leader, log, "--until", "now"), 82, "has another shipper")


def test_bars_on_a_terminal(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    run("setup", leader)
    execute(leader, "INSERT INTO events SELECT 'many', g FROM generate_series(1, 300000) g")
    status, shown = _in_terminal("ship", leader, log, "--until", "now")
    assert status == 0
    assert "image complete: 300,800 rows" in shown
    status, shown = _in_terminal("apply", log, sqlite, "--until", "end")
    assert status == 0
    assert "image public.events: chunk" in shown
    assert shown.count("caught up") == 1
    assert "public.events" in _in_terminal("verify", leader, sqlite)[1]
    assert "\x1b" not in _in_terminal("apply", log, sqlite, "--until", "end", "--quiet")[1]


def _in_terminal(*arguments: str) -> tuple[int, str]:
    """Run a command in a terminal of its own; its exit status, and all that was drawn."""
    ours, theirs = os.openpty()
    drawn = bytearray()
    command = [sys.executable, "-m", "cdc", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # Linux says EIO where the other side is closed
            while part := os.read(ours, 65536):
                drawn += part
        os.close(ours)
    return process.returncode, drawn.decode("utf-8", "replace")


def test_metrics(run: Cdc, leader: str, log: str, sqlite: str) -> None:
    pytest.importorskip("prometheus_client")
    run("setup", leader)
    run("ship", leader, log, "--until", "now")
    port = _free_port()
    with running("apply", log, sqlite, "--metrics", str(port)) as apply:
        wait_for_line(apply, "caught up")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        taken = run("apply", log, sqlite, "--metrics", str(port), "--until", "end")
    (topic,) = _topics(log)
    assert f'cdc_image_rows_total{{command="apply",stream="{topic}"}} 800.0' in text
    assert "cdc_position" in text
    assert "cdc_lag_seconds" in text
    refused(taken, 78, f"127.0.0.1:{port}")


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _topics(log: str) -> Sequence[str]:
    with closing(EmbeddedBroker(Path(log.removeprefix("file://")), create=False)) as broker:
        return broker.topics()


def test_demo(run: Cdc, postgres16: EmbeddedPostgres) -> None:
    pytest.importorskip("duckdb")
    done = run("demo", "--seconds", "2")
    assert done.status == 0, done.out
    assert done.out.count("equal: 4 tables") == 3
    assert "all followers equal the leader" in done.out
