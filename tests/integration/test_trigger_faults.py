"""What breaks a trigger log, who may do what, and what it leaves behind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.cli import main
from cdc.errors import AccessError, CdcError, ConfigurationError, FencedError, GapError
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql import capture, setup
from cdc.stores.postgresql.connect import connect
from tests.fix_postgresql import DatabaseFactory, postgres_major
from tests.fix_stream import FollowerFactory, Stream, TriggerStream, eventually, query, run
from tests.integration.test_trigger import asleep, changes_waiting

TABLE = ("CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t VALUES (1, 'one'), (2, 'two'), (3, 'three')")


@pytest.fixture
def started(triggers: TriggerStream) -> TriggerStream:
    """A stream whose topic holds the image of a few rows."""
    triggers.run(*TABLE)
    triggers.setup()
    triggers.ship()
    return triggers


def trigger(stream: TriggerStream, kind: str) -> str:
    return f'"{stream.schema} {kind}"'


# What was missed, or may have been.


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("DROP TRIGGER {insert} ON t", "dropped, disabled or altered"),
        ("ALTER TABLE t DISABLE TRIGGER {delete}", "dropped, disabled or altered"),
        ("ALTER TABLE t DISABLE TRIGGER USER; INSERT INTO t VALUES (9); ALTER TABLE t ENABLE TRIGGER USER", "altered"),
        ("ALTER TABLE t ENABLE REPLICA TRIGGER {update}", "dropped, disabled or altered"),
        ("DROP TABLE t", "was dropped"),
        ("DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v text)", "was dropped"),
        (
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
            " CREATE TRIGGER mine BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()",
            "got trigger 'mine'",
        ),
        ("DROP FUNCTION {schema}.capture() CASCADE", "dropped, disabled or altered"),
    ],
)
def test_a_fault_stops_the_shipper_and_setup_heals(
    started: TriggerStream, new_follower: FollowerFactory, damage: str, message: str
) -> None:
    follower = new_follower("postgresql")
    started.apply(follower)
    kinds = {kind: trigger(started, kind) for kind in ("insert", "update", "delete")}
    with started.shipping() as shipper:
        asleep(started)
        started.run(damage.format(schema=started.schema, **kinds))
        assert isinstance(shipper.wait(), ConfigurationError), "seen while nobody writes, too"
    with pytest.raises(ConfigurationError, match=message) as caught:
        started.ship()
    assert caught.value.exit_code == 78
    assert "setup --format trigger" in caught.value.remedy
    if "capture()" in damage:
        return
    if "CREATE TABLE" in damage:
        run(follower, "DROP TABLE t")  # what was there is of another table
    started.heal(follower)
    if "DROP TABLE t" not in damage or "CREATE TABLE" in damage:
        started.run("INSERT INTO t VALUES (50, 'after')", "UPDATE t SET v = 'x' WHERE id = 50")
        started.carry(follower)
        started.assert_equal(follower)


def test_a_function_of_ours_that_was_dropped_comes_back_with_setup(started: TriggerStream) -> None:
    started.run(f"DROP FUNCTION {started.schema}.capture() CASCADE")
    with pytest.raises(CdcError) as caught:
        started.setup()
    assert caught.value.remedy
    started.teardown()
    started.setup()
    started.ship(image="new")


def test_triggers_torn_down_and_set_up_anew(started: TriggerStream, followers: list[str]) -> None:
    for follower in followers:
        started.apply(follower)
    started.teardown()
    started.run("DELETE FROM t WHERE id = 1")
    started.setup()
    with pytest.raises(GapError, match="no longer knows the tick") as caught:
        started.ship()
    assert "--image new" in caught.value.remedy
    started.ship(image="new")
    for follower in followers:
        started.apply(follower, reload=True)
    started.run("INSERT INTO t VALUES (5, 'five')")
    started.carry(*followers)
    started.assert_equal(*followers)


def test_a_second_shipper_is_refused_and_the_first_unharmed(started: TriggerStream) -> None:
    with started.shipping() as shipper:
        eventually(lambda: query(started.leader, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")[0][0] > 0)
        with pytest.raises(FencedError) as caught:
            started.ship()
        assert caught.value.exit_code == 82
        before = started.bounds()[1]
        started.run("INSERT INTO t VALUES (4, 'four')")
        eventually(lambda: started.bounds()[1] > before)
        assert shipper.end() is None


def test_another_leader_or_another_database(
    started: TriggerStream, postgres16: EmbeddedPostgres, postgres18: EmbeddedPostgres, database: DatabaseFactory
) -> None:
    before = started.bounds()
    for server in (postgres16, postgres18):
        other = TriggerStream(database(server), started.broker, started.slot)
        other.run(*TABLE)
        other.setup()
        with pytest.raises(ConfigurationError, match="the topic is of leader"):
            other.ship()
    assert started.bounds() == before


def test_a_topic_of_the_other_format(
    stream: Stream, triggers: TriggerStream, started: TriggerStream, new_follower: FollowerFactory
) -> None:
    """The two logs' positions mean different things: neither goes on where the other ended."""
    logical = Stream(started.leader, started.broker, started.slot)
    logical.setup()
    before = started.bounds()
    with pytest.raises(ConfigurationError):
        logical.ship()
    assert started.bounds() == before
    other = Stream(started.leader, started.broker + "2", started.slot)
    other.ship()
    with pytest.raises(ConfigurationError):
        TriggerStream(started.leader, other.broker, started.slot).ship()


def test_a_key_of_another_type(started: TriggerStream, new_follower: FollowerFactory) -> None:
    """PostgreSQL lets nobody change a column's type that a trigger looks at: the triggers go, and come again."""
    follower = new_follower("postgresql")
    started.apply(follower)
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="trigger definition"):
        started.run("ALTER TABLE t ALTER id TYPE bigint")
    started.teardown()
    started.run("ALTER TABLE t ALTER id TYPE bigint")
    started.heal(follower)
    started.run("INSERT INTO t VALUES (5000000000, 'large')")
    started.carry(follower)
    started.assert_equal(follower)


def test_nothing_is_captured_yet(triggers: TriggerStream) -> None:
    triggers.run(*TABLE)
    with pytest.raises(ConfigurationError, match="nothing is captured") as caught:
        triggers.ship()
    assert "cdc setup --format trigger" in caught.value.remedy


# Who may do what.


@pytest.fixture
def roles(postgres: EmbeddedPostgres, triggers: TriggerStream) -> Iterator[dict[str, str]]:
    """URLs of roles that may do little; they go after the test."""
    names = {kind: f"{kind}_{triggers.slot}" for kind in ("reader", "writer", "owner", "maker")}
    for kind, name in names.items():
        triggers.run(f"CREATE ROLE {name} LOGIN {'CREATEROLE' if kind == 'maker' else ''}")
    yield {kind: postgres.url(triggers.slot, name) for kind, name in names.items()}
    for name in names.values():
        triggers.run(f"DROP OWNED BY {name} CASCADE", f"DROP ROLE {name}")


def refused(url: str, statement: str) -> bool:
    try:
        run(url, statement)
    except psycopg.errors.InsufficientPrivilege:
        return True
    return False


@postgres_major(16, 18)
def test_a_reader_ships_and_can_do_nothing_else(
    triggers: TriggerStream, roles: dict[str, str], new_follower: FollowerFactory
) -> None:
    follower = new_follower("sqlite")
    triggers.run(*TABLE, "CREATE TABLE other (id int)", "CREATE SCHEMA s", "CREATE TABLE s.u (id int PRIMARY KEY)")
    reader = f"reader_{triggers.slot}"
    triggers.setup(reader=reader, tables=["t", "s.u"])
    triggers.ship(leader=roles["reader"])
    triggers.run("INSERT INTO t VALUES (4, 'four')", "INSERT INTO s.u VALUES (1)", "UPDATE t SET id = 40 WHERE id = 4")
    triggers.ship(leader=roles["reader"])
    triggers.apply(follower)
    triggers.assert_equal(follower)
    s = triggers.schema
    for statement in (
        f"INSERT INTO {s}.change_0 (xid) VALUES (1)",
        f"DELETE FROM {s}.change_1",
        f"TRUNCATE {s}.change_0",
        f"UPDATE {s}.captured SET condition = 'true'",
        f"INSERT INTO {s}.tick SELECT * FROM {s}.tick",
        f"SELECT * FROM {s}.secret",
        f"SELECT * FROM {s}.granted",
        f"DROP SCHEMA {s} CASCADE",
        f"CREATE TABLE {s}.mine (id int)",
        "SELECT * FROM other",
        "INSERT INTO t VALUES (9)",
        "DELETE FROM s.u",
    ):
        assert refused(roles["reader"], statement), statement
    triggers.teardown()
    assert refused(roles["reader"], "SELECT * FROM t")
    assert refused(roles["reader"], "SELECT * FROM s.u")


@postgres_major(16, 18)
def test_a_writer_has_no_way_in(triggers: TriggerStream, roles: dict[str, str], new_follower: FollowerFactory) -> None:
    """Only INSERT on the table: whatever it has in its path, none of it runs as somebody else."""
    follower = new_follower("sqlite")
    writer = f"writer_{triggers.slot}"
    triggers.run(*TABLE, "CREATE TABLE caught (who text)", f"GRANT INSERT ON t TO {writer}")
    triggers.setup()
    triggers.carry(follower)
    s = triggers.schema
    for statement in (
        f"SELECT * FROM {s}.change_0",
        f"INSERT INTO {s}.change_0 (xid) VALUES (1)",
        f"SELECT {s}.hashed('x')",
        f"SELECT {s}.forget(1)",
        f"SELECT {s}.tick('1:1:', 1, '[]')",
        f"SELECT * FROM {s}.secret",
    ):
        assert refused(roles["writer"], statement), statement
    triggers.run(f"GRANT CREATE, TEMP ON DATABASE {triggers.slot} TO {writer}")
    traps = [
        "CREATE SCHEMA trap",
        "CREATE FUNCTION trap.txid_current() RETURNS int8 LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''trapped''; END'",
        "CREATE FUNCTION trap.record_send(record) RETURNS bytea LANGUAGE plpgsql AS"
        " 'BEGIN RAISE EXCEPTION ''trapped''; END'",
        "CREATE FUNCTION trap.pg_try_advisory_lock_shared(int, int) RETURNS bool LANGUAGE plpgsql AS"
        " 'BEGIN RAISE EXCEPTION ''trapped''; END'",
        "CREATE FUNCTION trap.nope(text, text) RETURNS bool LANGUAGE plpgsql AS"
        " 'BEGIN RAISE EXCEPTION ''trapped''; END'",
        "CREATE OPERATOR trap.= (LEFTARG = text, RIGHTARG = text, FUNCTION = trap.nope)",
        "CREATE TEMP TABLE change_0 (xid int8); CREATE TEMP TABLE new (id int); CREATE TEMP TABLE pg_class (oid oid);"
        " SET search_path = trap, pg_temp, pg_catalog; INSERT INTO public.t VALUES (4, 'four')",
    ]
    run(roles["writer"], *traps)
    triggers.carry(follower)
    triggers.assert_equal(follower)
    functions = query(
        triggers.leader,
        "SELECT p.proname, p.prosecdef, p.proconfig[1], has_function_privilege('public', p.oid, 'EXECUTE'),"
        " r.rolcanlogin OR r.rolsuper FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner"
        " WHERE p.pronamespace = to_regnamespace(%s)",
        s,
    )
    assert functions
    for name, definer, path, public, strong in functions:
        assert (definer, path, public, strong) == (True, "search_path=pg_catalog, pg_temp", False, False), name


def test_a_writer_cannot_change_the_order_of_its_changes(started: TriggerStream, new_follower: FollowerFactory) -> None:
    """Settings are anybody's, so nothing about the order leans on one, where no triggers stand inside each other."""
    follower = new_follower("sqlite")
    started.carry(follower)
    settings = "".join(
        f"SELECT set_config('cdc.{name}', '{value}', true);"
        for name in ("deleting1", "began1", "writing1", "moving1", "leaving")
        for value in ("0/1", "1", "on", "")
    )
    for between in (settings, "SELECT set_config('cdc.leaving', 'on', true), set_config('cdc.moving1', 'on', true);"):
        started.run(
            f"BEGIN; DELETE FROM t WHERE id = 1; {between} INSERT INTO t VALUES (1, 'new'); {between}"
            f" UPDATE t SET v = 'newer' WHERE id = 1; {between} DELETE FROM t WHERE false; {between} COMMIT"
        )
    started.carry(follower)
    started.assert_equal(follower)


def test_a_writers_sequences_are_its_own(started: TriggerStream) -> None:
    started.run("CREATE SEQUENCE q", "ALTER TABLE t ALTER id SET DEFAULT nextval('q') + 100")
    with psycopg.connect(started.leader) as connection:
        connection.execute("INSERT INTO t (v) VALUES ('a')")
        row = connection.execute("SELECT lastval(), currval('q')").fetchone()
    assert row == (1, 1)


@postgres_major(16, 18)
@pytest.mark.parametrize("kind", ["owner", "maker"])
def test_installed_by_an_ordinary_owner(
    triggers: TriggerStream, roles: dict[str, str], new_follower: FollowerFactory, kind: str
) -> None:
    """With CREATEROLE the functions are nobody's who can log in; without they are the owner's."""
    follower, role, mine = new_follower("sqlite"), f"{kind}_{triggers.slot}", roles[kind]
    triggers.run(*TABLE, f"ALTER TABLE t OWNER TO {role}", "CREATE TABLE other (id int PRIMARY KEY)")
    with pytest.raises(AccessError, match="may not make schema") as caught:
        triggers.setup(as_role=mine, tables=["t"])
    triggers.run(caught.value.remedy)
    with pytest.raises(AccessError, match="no privilege to make triggers"):
        triggers.setup(as_role=mine)
    triggers.setup(as_role=mine, tables=["t"])
    triggers.ship(leader=mine)
    triggers.run("INSERT INTO t VALUES (4, 'four')")
    triggers.ship(leader=mine)
    triggers.apply(follower)
    triggers.assert_equal(follower)
    [(login,)] = query(
        triggers.leader,
        "SELECT rolcanlogin FROM pg_roles WHERE oid = (SELECT nspowner FROM pg_namespace WHERE nspname = %s)",
        triggers.schema,
    )
    assert login is (kind == "owner")
    with connect(mine) as connection:
        setup.run(connection, capture.plan_teardown(connection, triggers.names))
    assert query(triggers.leader, "SELECT count(*) FROM pg_roles WHERE rolname LIKE %s", f"{triggers.schema}%") == [
        (0,)
    ]


# Set up and torn down.

TRACES = """
    SELECT 'proc', p.oid::regprocedure::text FROM pg_proc p WHERE oid >= 16384
    UNION ALL SELECT 'trigger', tgrelid::regclass || tgname FROM pg_trigger
    UNION ALL SELECT 'class', oid::regclass || coalesce(relacl, acldefault('r', relowner))::text
        FROM pg_class WHERE oid >= 16384
    UNION ALL SELECT 'namespace', nspname || coalesce(nspacl, acldefault('n', nspowner))::text
        FROM pg_namespace WHERE nspname !~ '^pg_t'
    UNION ALL SELECT 'role', rolname FROM pg_roles
    UNION ALL SELECT 'database', datname || coalesce(datacl::text, '')
        FROM pg_database WHERE datname = current_database()
    UNION ALL SELECT 'default', defaclacl::text FROM pg_default_acl ORDER BY 1, 2
"""


def traces(stream: TriggerStream) -> list[tuple[Any, ...]]:
    with psycopg.connect(stream.leader) as connection:
        return [row for row in connection.execute(TRACES).fetchall() if stream.slot in str(row) or row[0] != "role"]


@postgres_major(16, 18)
def test_teardown_leaves_no_trace(triggers: TriggerStream, roles: dict[str, str]) -> None:
    triggers.run(
        *TABLE,
        "CREATE SCHEMA s",
        "CREATE TABLE s.p (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE s.p1 PARTITION OF s.p DEFAULT",
    )
    run(roles["owner"], "SELECT 1")
    before = traces(triggers)
    triggers.setup(reader=f"reader_{triggers.slot}", shaping=capture.Shaping(masks={("public.t", "v"): "hash"}))
    triggers.ship()
    assert traces(triggers) != before
    triggers.teardown()
    assert traces(triggers) == before
    triggers.teardown()


def test_setup_is_idempotent_and_adds_what_is_new(started: TriggerStream, new_follower: FollowerFactory) -> None:
    with connect(started.leader) as connection:
        steps = capture.plan_setup(connection, started.names)
        assert [step.description for step in steps if not step.done] == []
    before = traces(started)
    started.setup()
    assert traces(started) == before
    started.ship()
    started.run("CREATE TABLE late (id int PRIMARY KEY)")
    started.setup()
    started.run("INSERT INTO late VALUES (1)")
    with pytest.raises(GapError):
        started.ship()
    follower = new_follower("sqlite")
    started.ship(image="new")
    started.carry(follower)
    started.assert_equal(follower)


# The commands.


def cdc(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def test_the_commands(
    triggers: TriggerStream, followers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triggers.run(*TABLE, "CREATE TABLE u (id int PRIMARY KEY, mail text, n int)", "INSERT INTO u VALUES (1, 'm', 1)")
    leader, log, form = triggers.leader, triggers.broker, ("--format", "trigger")
    assert cdc(capsys, "check", leader, *form)[0] == 78
    asked = ("--mask", "u.mail=hash", "--where", "u: n > 0")
    status, out, _ = cdc(capsys, "setup", leader, *form, *asked, "--dry-run")
    assert status == 0
    run(leader, out)  # what is printed can be run
    status, out, _ = cdc(capsys, "setup", leader, *form, *asked)
    assert out.count("already so") == 3, out
    status, out, _ = cdc(capsys, "setup", leader, *form, *asked, "--json")
    assert {step["state"] for step in json.loads(out)} == {"already"}
    status, out, _ = cdc(capsys, "check", leader, *form)
    assert status == 0, out
    assert "mail (hash)" in out
    for follower in followers:
        assert cdc(capsys, "ship", leader, log, *form, "--until", "now")[0] == 0
        assert cdc(capsys, "apply", log, follower, "--until", "end")[0] == 0
        status, out, _ = cdc(capsys, "verify", leader, follower)
        assert status == 0, out
        assert "masked, not compared: mail" in out
        triggers.run("INSERT INTO u VALUES (2, 'secret', 2), (3, 'secret', -3)")
        status, out, _ = cdc(capsys, "verify", leader, follower, "--json")
        assert (status, json.loads(out)["verdict"]) == (75, "behind"), out
        assert cdc(capsys, "ship", leader, log, *form, "--until", "now")[0] == 0
        assert cdc(capsys, "apply", log, follower, "--until", "end")[0] == 0
        status, out, _ = cdc(capsys, "verify", leader, follower)
        assert status == 0, out
        triggers.run("DELETE FROM u WHERE id > 1")
    run(followers[0], "DELETE FROM t WHERE id = 1")
    assert cdc(capsys, "ship", leader, log, *form, "--until", "now")[0] == 0
    assert cdc(capsys, "apply", log, followers[0], "--until", "end")[0] == 0
    status, out, _ = cdc(capsys, "verify", leader, followers[0], "--json")
    assert (status, json.loads(out)["verdict"]) == (81, "differs"), out


def test_status_tells_of_what_waits(triggers: TriggerStream, capsys: pytest.CaptureFixture[str]) -> None:
    triggers.run(*TABLE)
    triggers.setup()
    triggers.ship()
    arguments = ("status", triggers.leader, triggers.broker, "--slot", triggers.slot, "--stream", "s")
    with psycopg.connect(triggers.leader) as late:
        late.execute("INSERT INTO t VALUES (9)")
        report = json.loads(cdc(capsys, *arguments, "--json")[1])["leader"]
        assert report["format"] == "trigger"
        assert report["open_transactions"] >= 1
        assert report["oldest_transaction_s"] >= 0
        assert report["waiting_changes"] == 0
        assert "what they wrote waits for their commit" in cdc(capsys, *arguments)[1]
        late.commit()
    report = json.loads(cdc(capsys, *arguments, "--json")[1])["leader"]
    assert report["waiting_changes"] == 1
    assert changes_waiting(triggers) == 1


def test_a_table_that_is_locked_while_it_is_set_up(triggers: TriggerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setup waits for writers, and writers for it, not for ever."""
    monkeypatch.setattr(setup, "LOCK_TIMEOUT_S", 1)
    triggers.run(*TABLE)
    with psycopg.connect(triggers.leader) as writer:
        writer.execute("INSERT INTO t VALUES (9)")
        with pytest.raises(CdcError) as caught:
            triggers.setup()
        assert caught.value.retriable
    triggers.setup()
    triggers.ship()
