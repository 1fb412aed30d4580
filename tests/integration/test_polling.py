"""Shipping without REPLICATION: what the role may and may not, and that nothing else differs."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from cdc.cli import main
from cdc.errors import AccessError, CdcError, ConfigurationError, FencedError, GapError
from cdc.position import Position
from cdc.sql.quote import identifier, qualified
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql.connect import connect
from cdc.stores.postgresql.polling import Polled, plan_polling, plan_polling_teardown
from cdc.stores.postgresql.preflight import Finding, check_leader
from cdc.stores.postgresql.setup import Names, Step, plan_setup, plan_teardown, run
from shippers.postgresql import polling
from shippers.postgresql.leader import Leader
from shippers.postgresql.spool import MEMORY_BYTES
from tests.fix_postgresql import DatabaseFactory, postgres_major
from tests.fix_stream import PUBLICATION, STREAM, FollowerFactory, Stream, eventually, killed, query
from tests.fix_stream import run as run_sql

every_major = postgres_major(16, 18)
HOSTILE = 'x "%s\n\\\'; drop table "t" -- żółw'
POLL_S = 0.02


class Polling(NamedTuple):
    """A stream on a leader, and the URL of a role that may do nothing but poll it."""

    stream: Stream
    role: str
    url: str

    @property
    def names(self) -> Names:
        return Names(STREAM, PUBLICATION, self.stream.slot)

    def plan(self) -> list[Step]:
        with connect(self.stream.leader) as leader:
            return plan_polling(leader, self.names, self.role)

    def setup(self) -> None:
        with connect(self.stream.leader) as leader:
            run(leader, plan_setup(leader, self.names))
            run(leader, plan_polling(leader, self.names, self.role))

    def teardown(self) -> None:
        with connect(self.stream.leader) as leader:
            run(leader, [*plan_polling_teardown(leader, self.names), *plan_teardown(leader, self.names)])

    def ship(self, **options: Any) -> None:
        self.stream.ship(leader=self.url, poll_s=POLL_S, **options)

    def refused(self, statement: str) -> str:
        """The SQLSTATE with which the role is refused a statement."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            with pytest.raises(psycopg.Error) as caught:
                connection.execute(statement.encode())
            return caught.value.sqlstate or ""


@pytest.fixture
def polled(postgres: EmbeddedPostgres, database: DatabaseFactory, tmp_path: Path) -> Iterator[Polling]:
    stream = Stream.of(database(postgres), tmp_path)
    role = f"poll_{stream.slot}"
    run_sql(stream.leader, f"CREATE ROLE {role} LOGIN", "CREATE TABLE t (id int PRIMARY KEY, v text)")
    yield Polling(stream, role, postgres.url(stream.slot, role))
    with connect(stream.leader) as leader:
        run(leader, plan_polling_teardown(leader, Names(STREAM, PUBLICATION, stream.slot)))
        leader.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def catalogs(url: str) -> list[list[tuple[Any, ...]]]:
    return [
        query(url, "SELECT * FROM pg_authid ORDER BY oid"),
        query(url, "SELECT roleid, member FROM pg_auth_members ORDER BY 1, 2"),
        query(url, "SELECT oid, nspname, nspowner, coalesce(nspacl, '{}')::text FROM pg_namespace ORDER BY oid"),
        query(url, "SELECT oid, proname, proacl::text FROM pg_proc ORDER BY oid"),
        query(url, "SELECT oid, relname, relacl::text FROM pg_class WHERE oid >= 16384 ORDER BY oid"),
        query(url, "SELECT dbid, classid, objid, refobjid, deptype FROM pg_shdepend ORDER BY 1, 2, 3, 4, 5"),
        query(url, "SELECT oid FROM pg_publication"),
        query(url, "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()"),
    ]


# The role.


@every_major
def test_what_the_role_may_not(polled: Polling, postgres: EmbeddedPostgres) -> None:
    stream = polled.stream
    stream.run("INSERT INTO t VALUES (1, 'one')")
    polled.setup()
    other = f"{stream.slot}_other"
    stream.run("CREATE TABLE secret (v text)", f"SELECT pg_create_logical_replication_slot('{other}', 'pgoutput')")
    place = Polled.of(stream.slot)
    arguments = f"NULL, NULL, 'proto_version', '1', 'publication_names', '{PUBLICATION}'"
    for statement in (
        "SELECT * FROM secret",
        "INSERT INTO t VALUES (2, 'two')",
        f"SELECT pg_logical_slot_peek_binary_changes('{stream.slot}', {arguments})",
        f"SELECT pg_logical_slot_get_binary_changes('{stream.slot}', {arguments})",
        f"SELECT pg_logical_slot_peek_changes('{other}', {arguments})",
        f"SELECT pg_replication_slot_advance('{other}', pg_current_wal_lsn())",
        f"SELECT pg_drop_replication_slot('{stream.slot}')",
        "SELECT pg_create_logical_replication_slot('another', 'pgoutput')",
        f"CREATE TABLE {place.schema}.mine (v int)",
        f"CREATE OR REPLACE FUNCTION {place.schema}.acknowledge(upto pg_lsn) RETURNS void LANGUAGE sql AS 'SELECT'",
        f"DROP FUNCTION {place.schema}.peek",
        f"SET ROLE {place.owner}",
        f"ALTER ROLE {polled.role} REPLICATION",
    ):
        assert polled.refused(statement) == "42501", statement
    for replication in ("database", "true"):
        with pytest.raises(psycopg.OperationalError, match=r"REPLICATION|replication"):
            psycopg.connect(polled.url, replication=replication)
    with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
        psycopg.connect(postgres.url(stream.slot, place.owner))
    assert query(polled.url, "SELECT * FROM t") == [(1, "one")]


@every_major
def test_a_search_path_of_the_callers_changes_nothing(polled: Polling) -> None:
    """Operators and functions of the caller's own are not those that the owner runs."""
    polled.setup()
    place = Polled.of(polled.stream.slot)
    with psycopg.connect(polled.url, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION pg_temp.lt(pg_lsn, pg_lsn) RETURNS boolean LANGUAGE sql AS 'SELECT 1/0 = 1'"
        )
        connection.execute("CREATE OPERATOR pg_temp.< (FUNCTION = pg_temp.lt, LEFTARG = pg_lsn, RIGHTARG = pg_lsn)")
        connection.execute("SET search_path = pg_temp, pg_catalog")
        connection.execute(f"SELECT {place.schema}.acknowledge('0/1')".encode())


@every_major
def test_acknowledging_never_moves_back(polled: Polling) -> None:
    polled.setup()
    before = polled.stream.confirmed_lsn()
    run_sql(polled.url, f"SELECT {Polled.of(polled.stream.slot).schema}.acknowledge('0/1')")
    assert polled.stream.confirmed_lsn() == before


# Setup and teardown.


@every_major
def test_setup_twice_and_teardown_without_a_trace(polled: Polling) -> None:
    leader = polled.stream.leader
    polled.stream.run(
        f"CREATE SCHEMA {identifier(HOSTILE)}", f"CREATE TABLE {qualified(HOSTILE, HOSTILE)} (id int PRIMARY KEY)"
    )
    before = catalogs(leader)
    assert not [step for step in polled.plan() if step.done]
    assert catalogs(leader) == before, "planning changes nothing"
    polled.setup()
    assert not [step for step in polled.plan() if not step.done]
    polled.setup()
    polled.teardown()
    assert [list(map(_without_empty_acl, rows)) for rows in catalogs(leader)] == [
        list(map(_without_empty_acl, rows)) for rows in before
    ]
    polled.teardown()


def _without_empty_acl(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Once granted and revoked, privileges stand written out: the owner's own."""
    return tuple(
        None if isinstance(value, str) and value.startswith("{") and value.count("=") <= 1 else value for value in row
    )


@every_major
def test_setup_mends_what_was_changed(polled: Polling) -> None:
    polled.setup()
    place = Polled.of(polled.stream.slot)
    for damage in (
        f"ALTER ROLE {place.owner} NOREPLICATION",
        f"ALTER ROLE {place.owner} LOGIN",
        f"GRANT EXECUTE ON FUNCTION {place.schema}.peek TO PUBLIC",
        f"ALTER FUNCTION {place.schema}.peek RESET search_path",
        f"ALTER FUNCTION {place.schema}.acknowledge SECURITY INVOKER",
        f"DROP FUNCTION {place.schema}.peek",
        f"REVOKE SELECT ON t FROM {place.readers}",
        f"REVOKE {place.readers} FROM {polled.role}",
        "CREATE TABLE later (id int PRIMARY KEY)",
    ):
        polled.stream.run(damage)
        assert len([step for step in polled.plan() if not step.done]) == 1, damage
        polled.setup()
        assert not [step for step in polled.plan() if not step.done], damage


@every_major
def test_a_role_that_is_not_there(polled: Polling) -> None:
    with connect(polled.stream.leader) as leader, pytest.raises(ConfigurationError, match="no role 'ghost'") as caught:
        plan_polling(leader, polled.names, "ghost")
    assert "CREATE ROLE" in caught.value.remedy


def errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.subject == "polling" and finding.level != "ok"]


@every_major
def test_check_knows_row_level_security(polled: Polling) -> None:
    polled.setup()
    polled.stream.run("ALTER TABLE t ENABLE ROW LEVEL SECURITY")
    with pytest.raises(AccessError, match="row-level security"):
        polled.ship()
    with connect(polled.url) as connection:
        found = check_leader(connection, polled.names, polling=True)
    assert [finding.subject for finding in found if "row level security" in finding.message] == ["privileges"]


@every_major
def test_check_says_what_is_missing(polled: Polling) -> None:
    place = Polled.of(polled.stream.slot)
    leader, role = polled.stream.leader, polled.role

    def check(url: str) -> list[Finding]:
        with connect(url) as connection:
            return errors(check_leader(connection, polled.names, polling=True))

    assert all("cdc setup --polling-role" in finding.remedy for url in (leader, polled.url) for finding in check(url))
    assert len(check(polled.url)) == 1
    polled.setup()
    assert check(leader) == []
    assert check(polled.url) == []
    polled.stream.run("CREATE SCHEMA s; CREATE TABLE s.later (id int PRIMARY KEY)")
    for url in (leader, polled.url):
        assert len(check(url)) == 2
    run_sql(leader, *(statement for finding in check(polled.url) for statement in finding.statements))
    assert check(polled.url) == []
    polled.stream.run(f"REVOKE {place.readers} FROM {role}", f"ALTER ROLE {role} REPLICATION")
    [missing] = check(polled.url)
    run_sql(leader, *missing.statements)
    [warning] = check(polled.url)
    assert warning.level == "warning"
    run_sql(leader, *warning.statements)
    assert check(polled.url) == []


# The stream.


class Load:
    """Several sessions that write until told to stop."""

    def __init__(self, url: str, sessions: int = 4) -> None:
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(url, number)) for number in range(sessions)]
        for thread in self._threads:
            thread.start()

    def _write(self, url: str, number: int) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("SET synchronous_commit = " + ("on" if number % 2 else "off"))
            id_ = number * 1_000_000
            while not self._stop.is_set():
                id_ += 1
                connection.execute("INSERT INTO t VALUES (%s, 'new')", (id_,))
                connection.execute("UPDATE t SET v = v || '.' WHERE id = %s", (id_ - 3,))
                connection.execute("DELETE FROM t WHERE id = %s", (id_ - 7,))

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        # A commit that waits for the log: what was written without waiting is then flushed as well.
        run_sql(self._url, "INSERT INTO t VALUES (-1, 'end')")


@every_major
def test_image_and_stream_under_load(polled: Polling, new_follower: FollowerFactory) -> None:
    """Again and again, so that images begin at every moment: a place one off would lose or repeat a row."""
    polled.setup()
    follower = new_follower("postgresql")
    load = Load(polled.stream.leader)
    try:
        for _ in range(8):
            polled.ship(image="new")
            polled.stream.apply(follower, reload=True)
    finally:
        load.end()
    polled.ship()
    polled.stream.apply(follower)
    polled.stream.assert_equal(follower)
    assert query(polled.stream.leader, "SELECT count(*) > 10 FROM t") == [(True,)]


@every_major
def test_killed_in_the_middle_and_started_again(polled: Polling, new_follower: FollowerFactory) -> None:
    polled.setup()
    stream, follower = polled.stream, new_follower("sqlite")
    load = Load(stream.leader, 2)
    try:
        for _ in range(3):
            shipper = stream.process("ship", leader=polled.url, poll_s=POLL_S, until=None)
            before = stream.bounds()[1]
            eventually(lambda before=before: stream.bounds()[1] > before + 3)  # type: ignore[misc]
            killed(shipper)
    finally:
        load.end()
    polled.ship()
    stream.apply(follower)
    stream.assert_equal(follower)


@every_major
def test_from_polling_to_streaming_and_back(polled: Polling, followers: list[str]) -> None:
    polled.setup()
    stream = polled.stream
    ways: list[Callable[[], None]] = [polled.ship, stream.ship]
    for number in range(6):
        stream.run(f"INSERT INTO t SELECT g, 'way' FROM generate_series({number * 100}, {number * 100 + 50}) g")
        stream.run(f"SELECT pg_logical_emit_message(false, 'p', '{number}')")
        ways[number % 2]()
        stream.run(f"UPDATE t SET v = v || '!' WHERE id % 6 = {number}")
        ways[number // 2 % 2]()
    for follower in followers:
        stream.apply(follower)
    stream.assert_equal(*followers)


@every_major
def test_a_large_transaction_and_many_windows(
    polled: Polling, new_follower: FollowerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "IDLE_S", 0.001)  # many a heartbeat while the server decodes
    monkeypatch.setattr(polling, "WINDOW_BYTES", 1 << 16)
    monkeypatch.setattr(polling, "WINDOW_BYTES_MAX", 1 << 17)
    polled.setup()
    stream, follower = polled.stream, new_follower("sqlite")
    polled.ship()
    stream.run(f"INSERT INTO t SELECT g, repeat('x', 200) FROM generate_series(1, {3 * MEMORY_BYTES // 200}) g")
    stream.run(*(f"UPDATE t SET v = repeat('y', 5000) WHERE id = {id_}" for id_ in range(1, 300)))
    polled.ship()
    stream.apply(follower)
    stream.assert_equal(follower)


@every_major
def test_stopped_while_the_leader_decodes(
    polled: Polling, new_follower: FollowerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that our own half-done peek still holds neither loses anything nor keeps the next shipper away."""
    monkeypatch.setattr(polling, "IDLE_S", 0.001)
    polled.setup()
    stream, follower = polled.stream, new_follower("sqlite")
    polled.ship()
    with stream.shipping(leader=polled.url, poll_s=POLL_S) as shipper:
        time.sleep(0.2)
        stream.run("INSERT INTO t SELECT g, repeat('x', 200) FROM generate_series(1, 200000) g")
        time.sleep(0.03)
        assert shipper.end(5) is None
    polled.ship()
    stream.apply(follower)
    stream.assert_equal(follower)


@every_major
def test_values_as_text(polled: Polling, new_follower: FollowerFactory) -> None:
    polled.setup()
    stream, follower = polled.stream, new_follower("sqlite")
    stream.options = {"values": "text"}
    stream.run("INSERT INTO t VALUES (1, 'one')")
    polled.ship()
    stream.run("INSERT INTO t VALUES (2, 'two')")
    polled.ship()
    stream.apply(follower)
    stream.assert_equal(follower)


@every_major
def test_the_slot_moves_on_when_idle(polled: Polling) -> None:
    polled.setup()
    stream = polled.stream
    polled.ship()
    stream.run("CREATE UNLOGGED TABLE u (v text)", "SELECT pg_switch_wal()", "SELECT pg_switch_wal()")
    before = stream.bounds()[1]
    with stream.shipping(leader=polled.url, poll_s=POLL_S, heartbeat_s=0.1) as shipper:
        [(end,)] = query(stream.leader, "SELECT (pg_current_wal_flush_lsn() - '0/0')::int8")
        eventually(lambda: stream.confirmed_lsn() >= end)
        assert shipper.end() is None
    assert stream.bounds()[1] <= before + 20


# What goes wrong.


@every_major
@pytest.mark.parametrize(
    ("damage", "error", "status"),
    [
        ("SELECT pg_drop_replication_slot('{slot}')", GapError, 80),
        ("SELECT pg_replication_slot_advance('{slot}', pg_current_wal_lsn())", GapError, 80),
        ("DROP FUNCTION {schema}.peek", ConfigurationError, 78),
        ("DROP SCHEMA {schema} CASCADE", ConfigurationError, 78),
        ("REVOKE EXECUTE ON FUNCTION {schema}.peek FROM {schema}", AccessError, 77),
        ("REVOKE EXECUTE ON FUNCTION {schema}.acknowledge FROM {schema}", AccessError, 77),
        ("REVOKE USAGE ON SCHEMA {schema} FROM {schema}", AccessError, 77),
        ("REVOKE {schema} FROM {role}", AccessError, 77),
        ("DROP PUBLICATION p", ConfigurationError, 78),
    ],
)
def test_what_ends_a_poller(
    polled: Polling, monkeypatch: pytest.MonkeyPatch, damage: str, error: type[CdcError], status: int
) -> None:
    polled.setup()
    stream = polled.stream
    polled.ship()
    place = Polled.of(stream.slot)
    open_gate = threading.Event()
    open_gate.set()
    end = Leader.end

    def gated(leader: Leader) -> Position:
        open_gate.wait(30)
        return end(leader)

    monkeypatch.setattr(Leader, "end", gated)
    with stream.shipping(leader=polled.url, poll_s=POLL_S) as shipper:
        time.sleep(0.2)
        open_gate.clear()
        time.sleep(0.2)
        stream.run("INSERT INTO t VALUES (1, 'one')")
        stream.run(damage.format(slot=stream.slot, schema=place.schema, role=polled.role))
        stream.run("INSERT INTO t VALUES (2, 'two')")
        open_gate.set()
        ended_by = shipper.wait()
    assert isinstance(ended_by, error), ended_by
    assert ended_by.exit_code == status
    with pytest.raises(error):
        polled.ship()


@every_major
def test_one_shipper_whichever_way(polled: Polling) -> None:
    polled.setup()
    polled.ship()
    stream = polled.stream
    with stream.shipping(leader=polled.url, poll_s=POLL_S) as shipper:
        time.sleep(0.3)
        for ship in (polled.ship, stream.ship):
            with pytest.raises(FencedError, match="another shipper"):
                ship()
        assert shipper.end() is None
    with stream.shipping() as shipper:
        time.sleep(0.3)
        with pytest.raises(FencedError, match="another shipper"):
            polled.ship()
        assert shipper.end() is None


@every_major
def test_two_phase_slots_are_refused(polled: Polling) -> None:
    polled.setup()
    stream = polled.stream
    stream.run(f"SELECT pg_drop_replication_slot('{stream.slot}')")
    stream.run(f"SELECT pg_create_logical_replication_slot('{stream.slot}', 'pgoutput', false, true)")
    with pytest.raises(ConfigurationError, match="prepared transactions"):
        polled.ship()


# The commands.


@every_major
def test_the_commands(
    polled: Polling, postgres: EmbeddedPostgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a role, schema and table that are called as nobody should."""
    stream = polled.stream
    role = f"{HOSTILE[:20]}{stream.slot}"
    url = postgres.url(stream.slot, role)
    follower, broker = f"sqlite:///{tmp_path}/f.db", f"file://{tmp_path}/log"
    name = ("--stream", f"{HOSTILE}{stream.slot}"[:60])
    stream.run(
        f"CREATE ROLE {identifier(role)} LOGIN",
        f"CREATE SCHEMA {identifier(HOSTILE)}",
        f"CREATE TABLE {qualified(HOSTILE, HOSTILE)} (id int PRIMARY KEY)",
        f"INSERT INTO {qualified(HOSTILE, HOSTILE)} VALUES (1)",
    )
    before = [len(rows) for rows in catalogs(stream.leader)]
    try:
        assert main(["setup", stream.leader, *name, "--polling-role", role, "--dry-run"]) == 0
        printed = capsys.readouterr().out
        assert "SECURITY DEFINER" in printed
        assert [len(rows) for rows in catalogs(stream.leader)] == before
        # In psql this would come from a file; statement by statement, as the slot must not follow a write.
        assert main(["setup", stream.leader, *name, "--polling-role", role]) == 0
        capsys.readouterr()
        assert main(["setup", stream.leader, *name, "--polling-role", role]) == 0
        assert "done" not in capsys.readouterr().out.replace("already so", "")
        assert main(["check", url, *name, "--polling"]) in {0, 78}
        assert "error  polling" not in capsys.readouterr().out
        ship = ("ship", url, broker, *name, "--polling", "--poll-ms", "20", "--until", "now")
        assert main(ship) == 0
        stream.run(f"INSERT INTO {qualified(HOSTILE, HOSTILE)} VALUES (2)")
        assert main(ship) == 0
        assert main(["apply", broker, follower, "--until", "end"]) == 0
        assert main(["verify", stream.leader, follower, *name]) == 0
        assert main(["teardown", stream.leader, *name]) == 0
        assert [len(rows) for rows in catalogs(stream.leader)] == before
    finally:
        main(["teardown", stream.leader, *name])
        run_sql(stream.leader, f"DROP ROLE {identifier(role)}")
