"""Every finding of the preflight is provoked on a real server, and its statements are run: the finding then is gone."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import psycopg
import pytest

from cdc.record import Relation
from cdc.sql.quote import identifier, qualified
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql import preflight
from cdc.stores.postgresql.connect import Connection, connect, fetch
from cdc.stores.postgresql.describe import describe, describe_tables
from cdc.stores.postgresql.preflight import Finding, check_follower, check_leader
from cdc.stores.postgresql.setup import Names, default_names, plan_setup, run
from tests.fix_postgresql import DatabaseFactory, postgres_major

every_major = postgres_major(16, 18)
HOSTILE = 't "%s\n\\\'; drop table "x" -- żółw'
TABLE = qualified(HOSTILE, HOSTILE)


@pytest.fixture
def admin(postgres: EmbeddedPostgres, database: DatabaseFactory) -> Iterator[Connection]:
    with connect(database(postgres)) as connection:
        connection.execute(f"create schema {identifier(HOSTILE)}".encode())
        yield connection


@pytest.fixture
def names(admin: Connection) -> Names:
    return default_names(admin.info.dbname)


@pytest.fixture
def plain(admin: Connection, postgres: EmbeddedPostgres) -> Iterator[Connection]:
    """A session of a role that may log in and nothing else."""
    role = f"plain {admin.info.dbname}"
    admin.execute(f"create role {identifier(role)} login".encode())
    with connect(postgres.url(admin.info.dbname, role)) as connection:
        yield connection


def troubles(findings: Sequence[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject and finding.level != "ok"]


def mend(admin: Connection, finding: Finding) -> None:
    statements = [text for text in finding.statements if not text.startswith("--")]
    assert statements, finding
    for statement in statements:
        admin.execute(statement.encode())


def mended(
    admin: Connection, check: Callable[[], list[Finding]], subject: str, level: str, text: str, *, count: int = 1
) -> None:
    """The check has findings of this kind; after their own statements have run it has none."""
    found = troubles(check(), subject)
    assert len(found) == count, found
    assert all(finding.level == level for finding in found)
    assert any(text in finding.message for finding in found)
    for finding in found:
        mend(admin, finding)
    assert troubles(check(), subject) == []


@every_major
def test_a_leader_that_was_set_up_is_fine(admin: Connection, names: Names) -> None:
    admin.execute(f"create table {TABLE} (id int primary key)".encode())
    run(admin, plan_setup(admin, names))
    findings = check_leader(admin, names)
    assert [finding.subject for finding in findings if finding.level == "error"] == []
    assert {finding.subject for finding in findings if finding.level == "warning"} == {"max_slot_wal_keep_size"}
    assert {"version", "wal_level", "slot", "publication", "replica identity", "encoding"} <= {
        finding.subject for finding in findings if finding.level == "ok"
    }


@every_major
def test_nothing_is_set_up_yet(admin: Connection, names: Names) -> None:
    admin.execute(f"create table {TABLE} (id int primary key)".encode())
    for _ in range(5):  # the server itself writes now and then
        before = fetch(admin, "SELECT pg_current_wal_insert_lsn()::text AS lsn")
        found = troubles(check_leader(admin, names), "publication")
        unchanged = fetch(admin, "SELECT pg_current_wal_insert_lsn()::text AS lsn") == before
        if unchanged:
            break
    assert unchanged, "a check changes nothing"
    assert [finding.level for finding in found] == ["error"]
    mend(admin, found[0])
    mended(admin, partial(check_leader, admin, names), "slot", "error", "no replication slot")
    assert troubles(check_leader(admin, names), "publication") == []


@every_major
def test_a_slot_before_its_publication(admin: Connection, names: Names) -> None:
    admin.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [names.slot])
    [finding] = troubles(check_leader(admin, names), "slot")
    assert (finding.level, "older than the publication" in finding.message) == ("error", True)
    admin.execute("create table public.t (id int primary key)")
    mend(admin, troubles(check_leader(admin, names), "publication")[0])
    mended(admin, partial(check_leader, admin, names), "slot", "warning", "made or altered after")


@every_major
def test_a_slot_of_another_plugin_or_kind(admin: Connection, names: Names) -> None:
    admin.execute("SELECT pg_create_physical_replication_slot(%s)", [names.slot])
    [finding] = troubles(check_leader(admin, names), "slot")
    admin.execute("SELECT pg_drop_replication_slot(%s)", [names.slot])
    assert finding.level == "error"
    assert "another's (physical" in finding.message


@every_major
def test_a_publication_that_leaves_something_out(admin: Connection, names: Names) -> None:
    admin.execute(
        f"create table {TABLE} (id int primary key); create table public.t (id int primary key, v text);"
        f"create publication {identifier(names.publication)} for table public.t (id) where (id > 7)"
        " with (publish = 'insert')".encode()
    )
    findings = check_leader(admin, names)
    messages = [finding.message for finding in troubles(findings, "publication")]
    assert any("every kind of change" in message for message in messages)
    assert any(f"leaves out {HOSTILE}.{HOSTILE}" in message for message in messages)
    [narrow] = troubles(findings, "filters")
    assert "rows where (id > 7) and some columns of public.t" in narrow.message
    for finding in (narrow, *troubles(findings, "publication")):
        mend(admin, finding)
    after = check_leader(admin, names)
    assert troubles(after, "publication") == troubles(after, "filters") == []
    assert {relation.name for relation in describe(admin, publication=names.publication)} == {HOSTILE, "t"}


@every_major
def test_a_followers_own_state_is_not_for_shipping(admin: Connection, names: Names) -> None:
    admin.execute(
        "create schema cdc; create table cdc.checkpoint (stream text primary key);"
        "create table public.t (id int primary key);"
        f"create publication {identifier(names.publication)} for table public.t, cdc.checkpoint".encode()
    )
    mended(admin, partial(check_leader, admin, names), "publication", "warning", "own state: cdc.checkpoint")


@every_major
def test_tables_without_a_replica_identity(admin: Connection, names: Names) -> None:
    admin.execute(
        f"create table {TABLE} (v text); create table public.indexed (id int not null unique);"
        "create table public.root (v int) partition by range (v);"
        "create table public.leaf partition of public.root for values from (0) to (10)".encode()
    )
    [finding] = troubles(check_leader(admin, names), "replica identity")
    assert finding.level == "warning", "nothing is published yet"
    admin.execute(
        f"create publication {identifier(names.publication)} for all tables"
        " with (publish_via_partition_root = true)".encode()
    )
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        admin.execute(f"update {TABLE} set v = 'x'".encode())
    [finding] = troubles(check_leader(admin, names), "replica identity")
    assert finding.level == "error"
    mend(admin, finding)
    [finding] = troubles(check_leader(admin, names), "replica identity")
    assert finding.message.endswith(f": public.leaf, public.root, {HOSTILE}.{HOSTILE}")
    assert finding.statements == ("-- give the tables a primary key",)
    admin.execute(f"insert into {TABLE} values ('x'); update {TABLE} set v = 'y'".encode())
    admin.execute("update public.indexed set id = 1; insert into public.root values (1); delete from public.root")


@every_major
def test_a_whole_row_identity_where_an_index_would_do(admin: Connection, names: Names) -> None:
    admin.execute(f"create table {TABLE} (id int primary key); alter table {TABLE} replica identity full".encode())
    mended(admin, partial(check_leader, admin, names), "replica identity", "warning", "all their columns")


@every_major
def test_generated_columns(admin: Connection, names: Names) -> None:
    admin.execute(
        f"create table {TABLE} (id int primary key, g int generated always as (id + 1) stored);"
        f"create publication {identifier(names.publication)} for all tables".encode()
    )
    if admin.info.server_version >= 180000:
        mended(admin, partial(check_leader, admin, names), "generated columns", "warning", f"{HOSTILE}.g")
        admin.execute(f"alter table {TABLE} add v int generated always as (id + 2) virtual".encode())
    [finding] = troubles(check_leader(admin, names), "generated columns")
    assert finding.statements[0].startswith("-- ")


@every_major
def test_partitions_told_one_by_one(admin: Connection, names: Names) -> None:
    admin.execute(
        f"create table {TABLE} (id int primary key) partition by range (id);"
        f"create table public.leaf partition of {TABLE} for values from (0) to (10);"
        f"create publication {identifier(names.publication)} for all tables".encode()
    )
    mended(admin, partial(check_leader, admin, names), "partitions", "warning", "public.leaf")


@every_major
def test_what_a_log_never_carries(admin: Connection, names: Names) -> None:
    admin.execute(
        f"""
        create unlogged table {TABLE} (id int primary key);
        create materialized view {identifier(HOSTILE)}.m as select 1 as one;
        create sequence {identifier(HOSTILE)}.{identifier(HOSTILE + "_s")}; create sequence public.untouched;
        create foreign data wrapper w; create server s foreign data wrapper w;
        create foreign table {identifier(HOSTILE)}.f () server s;
        create temporary table session_only ();
        select lo_create(0);
        select nextval('public.untouched') from generate_series(1, 5)
        """.encode()
    )
    findings = check_leader(admin, names)
    subjects = ["materialized views", "sequences", "foreign tables", "large objects", "temporary tables"]
    for subject in subjects:
        [finding] = troubles(findings, subject)
        assert finding.level == "warning"
        for statement in finding.statements:
            if not statement.startswith("--"):
                admin.execute(statement.encode())
            assert "\n" not in statement or not statement.startswith("--")
    assert 'SELECT setval(\'"public"."untouched"\', 5, true)' in troubles(findings, "sequences")[0].statements
    assert fetch(admin, "SELECT nextval('public.untouched') AS next")[0].next == 6
    mended(admin, partial(check_leader, admin, names), "unlogged tables", "warning", HOSTILE)


@every_major
def test_types_nobody_else_can_read(admin: Connection, names: Names) -> None:
    admin.execute(
        f"""
        create type public.blob;
        create function public.blob_in(cstring) returns public.blob language internal strict as 'textin';
        create function public.blob_out(public.blob) returns cstring language internal strict as 'textout';
        create type public.blob (input = public.blob_in, output = public.blob_out, like = text);
        create domain public.blobs as public.blob[];
        create type public.e as enum ('x');
        create table {TABLE} (id int primary key, e public.e, b public.blobs)
        """.encode()
    )
    [finding] = troubles(check_leader(admin, names), "types")
    assert "(public.blob)" in finding.message
    assert finding.message.endswith(f"{HOSTILE}.{HOSTILE}.b")
    assert "--values text" in finding.remedy


@every_major
def test_transactions_that_stay_open(
    admin: Connection, names: Names, postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "OLD_TRANSACTION_S", 0)
    admin.execute("create table public.t (id int primary key)")
    gid = HOSTILE
    with connect(postgres.url(admin.info.dbname)) as session:
        session.execute("BEGIN; INSERT INTO public.t VALUES (1)")
        with connect(postgres.url(admin.info.dbname)) as preparing:
            preparing.execute("BEGIN; INSERT INTO public.t VALUES (2)")
            preparing.execute(f"PREPARE TRANSACTION {psycopg.sql.quote(gid)}".encode())
        found = [
            finding
            for finding in troubles(check_leader(admin, names), "open transactions")
            if str(session.info.backend_pid) in finding.message or repr(gid) in finding.message
        ]
        assert len(found) == 2
        for finding in found:
            mend(admin, finding)
        with pytest.raises(psycopg.OperationalError):
            session.execute("COMMIT")
    assert fetch(admin, "SELECT count(*) AS left FROM public.t")[0].left == 0


@every_major
def test_privileges_of_a_shipper(admin: Connection, plain: Connection, names: Names) -> None:
    admin.execute(
        f"create table {TABLE} (id int primary key, who text); create table public.t (id int primary key);"
        f"alter table {TABLE} enable row level security".encode()
    )
    run(admin, plan_setup(admin, names))
    mended(admin, partial(check_leader, plain, names), "privileges", "error", "may not stream", count=4)
    plain.execute(f"select * from {TABLE}".encode())
    plain.execute("select * from public.t")
    mended(admin, partial(check_leader, plain, names), "open transactions", "warning", "may not see")


@every_major
def test_a_sequence_that_may_not_be_read_is_not_guessed(admin: Connection, plain: Connection, names: Names) -> None:
    admin.execute("create sequence public.s; select nextval('public.s')")
    [finding] = troubles(check_leader(plain, names), "sequences")
    admin.execute(finding.statements[0].encode())
    [finding] = troubles(check_leader(plain, names), "sequences")
    assert finding.statements == ('SELECT setval(\'"public"."s"\', 1, true)',)


@every_major
def test_encodings(admin: Connection, postgres: EmbeddedPostgres) -> None:
    names = default_names(admin.info.dbname)
    other = f"{admin.info.dbname}_latin"
    for encoding, as_leader in (("LATIN1", []), ("SQL_ASCII", ["error"])):
        admin.execute(f"create database {other} template template0 encoding '{encoding}' locale 'C'".encode())
        with connect(postgres.url(other)) as connection:
            assert [finding.level for finding in troubles(check_leader(connection, names), "encoding")] == as_leader
            [finding] = troubles(check_follower(connection, None), "encoding")
            assert finding.level == "error"
            mend(admin, finding)
            with connect(postgres.url(f"{other}_utf8")) as better:
                assert troubles(check_follower(better, None), "encoding") == []
        admin.execute(f"drop database {other}".encode())
        admin.execute(f"drop database {other}_utf8".encode())


@pytest.mark.parametrize("major", [16, 18])
def test_a_server_that_is_not_configured(major: int, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(f"postgres{major}")  # skips, or fails, where there is no such server
    settings = {
        "fsync": "off",
        "wal_level": "replica",
        "max_wal_senders": "0",
        "max_replication_slots": "0",
        "wal_sender_timeout": "0",
        "logical_decoding_work_mem": "64kB",
        **({"idle_replication_slot_timeout": "1d"} if major >= 18 else {}),
    }
    expected = {
        "wal_level": "error",
        "max_wal_senders": "error",
        "max_replication_slots": "error",
        "max_slot_wal_keep_size": "warning",
        "wal_sender_timeout": "warning",
        "logical_decoding_work_mem": "warning",
        **({"idle_replication_slot_timeout": "warning"} if major >= 18 else {}),
    }
    names = default_names("postgres")
    with EmbeddedPostgres(major, settings=settings) as server:
        with connect(server.url()) as admin:
            found = {subject: troubles(check_leader(admin, names), subject) for subject in expected}
            assert {subject: finding.level for subject, [finding] in found.items()} == expected
            for [finding] in found.values():
                mend(admin, finding)
        server.restart()
        with connect(server.url()) as admin:
            findings = check_leader(admin, names)
            assert [finding for subject in expected for finding in troubles(findings, subject)] == []
            run(admin, plan_setup(admin, names))


@pytest.mark.parametrize("major", [16, 18])
def test_a_slot_that_runs_out_of_wal_and_is_lost(major: int, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(f"postgres{major}")
    names = default_names("postgres")
    settings = {"fsync": "off", "max_slot_wal_keep_size": "32MB", "min_wal_size": "32MB", "max_wal_size": "48MB"}
    with EmbeddedPostgres(major, settings=settings) as server, connect(server.url()) as admin:
        admin.execute("create table public.t (id int primary key)")
        run(admin, plan_setup(admin, names))
        assert troubles(check_leader(admin, names), "safe_wal_size") == []
        levels = []
        while not (lost := troubles(check_leader(admin, names), "slot")):
            levels += [finding.level for finding in troubles(check_leader(admin, names), "safe_wal_size")]
            admin.execute("select pg_logical_emit_message(false, 'x', repeat('x', 4000000))")
            if "error" in levels:
                admin.execute("select pg_switch_wal(); checkpoint")
            assert len(levels) < 60
        assert levels == sorted(levels, reverse=True)
        assert set(levels) == {"warning", "error"}
        [finding] = lost
        assert (finding.level, "invalidated" in finding.message) == ("error", True)
        mend(admin, finding)
        assert troubles(check_leader(admin, names), "slot") == []


# Followers.


@pytest.fixture
def relations(admin: Connection) -> list[Relation]:
    """A leader's tables as they were described; the tables themselves are gone, as on an empty follower."""
    admin.execute(
        f"create table {TABLE} (id int primary key, {identifier(HOSTILE)} numeric(6,2), v text);"
        "create table public.t (id int primary key)".encode()
    )
    oids = [
        row.oid for row in fetch(admin, "SELECT oid::int8 AS oid FROM pg_class WHERE relname IN (%s, 't')", [HOSTILE])
    ]
    described = describe_tables(admin, oids)
    admin.execute(f"drop table {TABLE}; drop table public.t".encode())
    assert len(described) == 2
    return described


@every_major
def test_a_superuser_follower_is_fine(admin: Connection, relations: list[Relation]) -> None:
    for given in (None, relations):
        assert [finding for finding in check_follower(admin, given) if finding.level != "ok"] == []


@every_major
def test_what_a_plain_role_needs(admin: Connection, plain: Connection, relations: list[Relation]) -> None:
    check = partial(check_follower, plain, relations)
    mended(admin, check, "session_replication_role", "error", "may not set it")
    plain.execute("SET session_replication_role = replica")
    mended(admin, check, "schemas", "error", "cdc")
    plain.execute("CREATE SCHEMA cdc")
    mended(admin, check, "tables", "error", "may not make it", count=2)
    plain.execute(f"CREATE TABLE {TABLE} ()".encode())
    assert [finding.level for finding in check_follower(plain, None)] == ["ok"] * len(check_follower(plain, None))


@every_major
def test_privileges_on_tables_that_are_there(admin: Connection, plain: Connection, relations: list[Relation]) -> None:
    admin.execute(
        f"create table {TABLE} (id int primary key, {identifier(HOSTILE)} numeric(6,2), v text);"
        f"create table public.t (id int primary key); alter table {TABLE} enable row level security".encode()
    )
    mended(admin, partial(check_follower, plain, relations), "privileges", "error", "closed to us", count=4)
    plain.execute(f"insert into {TABLE} values (1); update {TABLE} set v = ''; delete from {TABLE}".encode())
    plain.execute("truncate public.t")


@every_major
def test_columns_that_do_not_fit(admin: Connection, relations: list[Relation]) -> None:
    admin.execute(
        f"create table {TABLE} (id bigint primary key, v text generated always as ('x') stored, extra int not null,"
        " filled int not null default 1, numbered int generated always as identity)".encode()
    )
    found = troubles(check_follower(admin, relations), "columns")
    assert sorted(finding.level for finding in found) == ["error", "error", "error", "warning"]
    assert any("bigint here and integer on the leader" in finding.message for finding in found)
    for finding in found:
        mend(admin, finding)
    assert troubles(check_follower(admin, relations), "columns") == []
    admin.execute(f"insert into {TABLE} (id, {identifier(HOSTILE)}, v) values (1, 1.25, 'v')".encode())


@every_major
def test_triggers_and_rules_that_fire_even_for_an_applier(
    admin: Connection, plain: Connection, relations: list[Relation]
) -> None:
    admin.execute(
        f"""
        create table {TABLE} (id int primary key, {identifier(HOSTILE)} numeric(6,2), v text);
        create table public.elsewhere (id int primary key);
        create function public.f() returns trigger language plpgsql as 'begin return new; end';
        create trigger {identifier(HOSTILE)} before insert on {TABLE} for each row execute function public.f();
        create trigger quiet before insert on {TABLE} for each row execute function public.f();
        create trigger other before insert on public.elsewhere for each row execute function public.f();
        create rule r as on insert to {TABLE} do also select 1;
        alter table {TABLE} enable always trigger {identifier(HOSTILE)};
        alter table {TABLE} enable replica rule r;
        alter table public.elsewhere enable always trigger other
        """.encode()
    )
    assert {finding.level for finding in troubles(check_follower(plain, relations), "triggers")} == {"warning"}
    assert len(troubles(check_follower(admin, None), "triggers")) == 3
    mended(admin, partial(check_follower, admin, relations), "triggers", "error", "superuser", count=2)
    assert len(troubles(check_follower(admin, None), "triggers")) == 1
