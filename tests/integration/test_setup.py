"""Setup and teardown on real leaders: planned, run, run again, undone."""

import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

from cdc.errors import AccessError, ConfigurationError, FencedError, TransientError
from cdc.sql.quote import identifier, qualified
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql import setup
from cdc.stores.postgresql.connect import Connection, connect, fetch
from cdc.stores.postgresql.describe import describe
from cdc.stores.postgresql.setup import Names, Step, default_names, plan_setup, plan_teardown, run
from cdc.stores.postgresql.status import leader_status
from tests.fix_postgresql import DatabaseFactory, postgres_major

every_major = postgres_major(16, 18)
HOSTILE = 't "%s\n\\\'; drop table "x" -- żółw'


@pytest.fixture
def leader(postgres: EmbeddedPostgres, database: DatabaseFactory) -> Iterator[Connection]:
    with connect(database(postgres)) as connection:
        yield connection


@pytest.fixture
def names(leader: Connection) -> Names:
    return default_names(leader.info.dbname)


def as_role(leader: Connection, postgres: EmbeddedPostgres, attributes: str) -> Connection:
    """A session of a new role on the leader's database."""
    role = f"role_{leader.info.dbname}"
    leader.execute(f"create role {identifier(role)} login {attributes}".encode())
    leader.execute(f"grant create on database {identifier(leader.info.dbname)} to {identifier(role)}".encode())
    leader.execute(f"grant create on schema public to {identifier(role)}".encode())
    return connect(postgres.url(leader.info.dbname, role))


def published(leader: Connection, names: Names) -> list[str]:
    return [relation.label for relation in describe(leader, publication=names.publication)]


def pending(steps: list[Step]) -> list[str]:
    return [step.sql for step in steps if not step.done]


@every_major
def test_setup_twice_and_teardown_twice(leader: Connection, names: Names) -> None:
    leader.execute(f"create table {qualified('public', HOSTILE)} (id int primary key)".encode())
    steps = plan_setup(leader, names)
    assert [step.done for step in steps] == [False, False]
    assert not fetch(leader, "SELECT 1 FROM pg_publication"), "planning changes nothing"
    run(leader, steps)
    assert published(leader, names) == [f"public.{HOSTILE}"]
    status = leader_status(leader, names)
    assert status.wal_status == "reserved"
    assert pending(plan_setup(leader, names)) == []
    run(leader, plan_setup(leader, names))

    assert len(pending(plan_teardown(leader, names))) == 2
    run(leader, plan_teardown(leader, names))
    assert pending(plan_teardown(leader, names)) == []
    assert not fetch(leader, "SELECT 1 FROM pg_publication")
    with pytest.raises(ConfigurationError, match="no replication slot"):
        leader_status(leader, names)


@every_major
def test_setup_cut_short_is_completed(leader: Connection, names: Names) -> None:
    leader.execute("create table public.t (v text)")
    for count in (1, 2, 3):
        steps = [step for step in plan_setup(leader, names) if not step.done]
        run(leader, steps[:1])
        assert len(pending(plan_setup(leader, names))) == 3 - count


@every_major
def test_the_slot_decodes_what_was_published(leader: Connection, names: Names) -> None:
    leader.execute("create table public.t (id int primary key)")
    run(leader, plan_setup(leader, names))
    leader.execute("insert into public.t values (1)")
    messages = leader.execute(
        "SELECT get_byte(data, 0) FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL,"
        " 'proto_version', '1', 'publication_names', %s)",
        [names.slot, identifier(names.publication)],
    ).fetchall()
    assert bytes(code for (code,) in messages) == b"BRIC"


@every_major
def test_the_leader_goes_on_writing(leader: Connection, names: Names) -> None:
    """Every table that could be changed before setup can be changed after it."""
    leader.execute(
        """
        create table public.keyless (v text);
        create table public.indexed (id int not null, v text); create unique index pick on public.indexed (id);
        create table public.nullable (id int unique);
        create table public.partial (id int not null); create unique index on public.partial (id) where id > 0;
        create table public.late (id int primary key deferrable);
        create table public.silent (id int primary key, v text); alter table public.silent replica identity nothing;
        create table public.lost (id int not null); create unique index lost_id on public.lost (id);
        alter table public.lost replica identity using index lost_id; drop index public.lost_id;
        create table public.root (id int) partition by range (id);
        create table public.leaf partition of public.root for values from (0) to (10);
        """
    )
    tables = ["keyless", "indexed", "nullable", "partial", "late", "silent", "lost", "root", "leaf"]
    run(leader, plan_setup(leader, names))
    for table in tables:
        column = "v" if table == "keyless" else "id"
        leader.execute(f"insert into public.{table} ({column}) values (1)".encode())
        leader.execute(f"update public.{table} set {column} = '2'".encode())
        leader.execute(f"delete from public.{table}".encode())
    identities = {row.relname: row.relreplident for row in fetch(leader, "SELECT relname, relreplident FROM pg_class")}
    assert {table: identities[table] for table in tables} == {
        "keyless": "f",
        "indexed": "i",
        "nullable": "f",
        "partial": "f",
        "late": "f",
        "silent": "i",
        "lost": "f",
        "root": "f",
        "leaf": "f",
    }
    assert pending(plan_setup(leader, names)) == []


@every_major
def test_without_leave_to_mend_the_statements_are_told_and_work(leader: Connection, names: Names) -> None:
    leader.execute(f"create table {qualified('public', HOSTILE)} (v text)".encode())
    with pytest.raises(ConfigurationError, match="UPDATE and DELETE would fail") as caught:
        plan_setup(leader, names, mend_identity=False)
    leader.execute(caught.value.remedy.encode())
    assert len(plan_setup(leader, names, mend_identity=False)) == 2


@every_major
def test_only_the_tables_asked_for(leader: Connection, names: Names) -> None:
    leader.execute(
        f"""create schema "Sales"; create table "Sales"."Orders" (id int primary key);
        create table public.t (id int primary key); create table public.other (v text);
        create table {qualified("public", HOSTILE)} (id int primary key)""".encode()
    )
    asked = ["Sales.Orders", "t", f"public.{HOSTILE}"]
    run(leader, plan_setup(leader, names, tables=asked))
    assert published(leader, names) == ["Sales.Orders", "public.t", f"public.{HOSTILE}"]
    assert pending(plan_setup(leader, names, tables=asked)) == []
    assert pending(plan_setup(leader, names)) == [], "what is there is taken as it is"
    unasked = fetch(leader, "SELECT relreplident FROM pg_class WHERE relname = 'other'")[0]
    assert unasked.relreplident == "d"
    with pytest.raises(ConfigurationError, match=r"exists and is not for public\.t") as caught:
        plan_setup(leader, names, tables=["t"])
    leader.execute(caught.value.remedy.encode())
    assert pending(plan_setup(leader, names, tables=["t"])) == []


@every_major
def test_whole_schemas_take_in_tables_to_come(leader: Connection, names: Names) -> None:
    leader.execute('create schema "a%s"; create schema b; create table public.t (id int primary key)')
    run(leader, plan_setup(leader, names, tables=["t"], schemas=["a%s", "b"]))
    leader.execute('create table "a%s".later (id int primary key)')
    assert published(leader, names) == ["a%s.later", "public.t"]
    assert pending(plan_setup(leader, names, tables=["t"], schemas=["a%s", "b"])) == []
    with pytest.raises(ConfigurationError, match="exists and is not for") as caught:
        plan_setup(leader, names, schemas=["b"])
    leader.execute(caught.value.remedy.encode())
    assert pending(plan_setup(leader, names, schemas=["b"])) == []


@every_major
@pytest.mark.parametrize("name", ["nothing", "public.v", "public.u", "public.ghost.t", ""])
def test_a_table_that_cannot_be_published(leader: Connection, names: Names, name: str) -> None:
    leader.execute("create view public.v as select 1; create unlogged table public.u (id int)")
    with pytest.raises(ConfigurationError, match="no permanent table is called"):
        plan_setup(leader, names, tables=[name])


@every_major
def test_a_name_that_means_two_tables(leader: Connection, names: Names) -> None:
    leader.execute('create schema a; create schema "a.b"; create table a."b.c" (); create table "a.b".c ()')
    with pytest.raises(ConfigurationError, match="more than one table"):
        plan_setup(leader, names, tables=["a.b.c"])


@every_major
def test_a_schema_that_is_not_there(leader: Connection, names: Names) -> None:
    with pytest.raises(ConfigurationError, match="no schema 'Public'"):
        plan_setup(leader, names, schemas=["Public"])


@every_major
def test_partitions_are_told_as_their_root(leader: Connection, names: Names) -> None:
    leader.execute(
        "create table public.root (id int primary key) partition by range (id);"
        "create table public.leaf partition of public.root for values from (0) to (10)"
    )
    run(leader, plan_setup(leader, names))
    assert published(leader, names) == ["public.root"]


@postgres_major(18)
def test_generated_columns_are_published_where_they_can_be(leader: Connection, names: Names) -> None:
    leader.execute("create table public.t (id int primary key, g int generated always as (id * 2) stored)")
    run(leader, plan_setup(leader, names))
    [relation] = describe(leader, publication=names.publication)
    assert [column.name for column in relation.columns] == ["id", "g"]
    assert fetch(leader, "SELECT failover FROM pg_replication_slots WHERE slot_name = %s", [names.slot])[0].failover


@every_major
def test_an_owner_needs_no_superuser(leader: Connection, postgres: EmbeddedPostgres, names: Names) -> None:
    with as_role(leader, postgres, "replication") as owner:
        owner.execute("create table public.t (id int primary key); create table public.k (v text)")
        owner.execute("create table public.root (id int primary key) partition by range (id)")
        owner.execute("create table public.leaf partition of public.root for values from (0) to (10)")
        run(owner, plan_setup(owner, names))
        assert published(owner, names) == ["public.k", "public.root", "public.t"]
        assert pending(plan_setup(owner, names)) == []
        owner.execute("create table public.more (id int primary key)")
        assert pending(plan_setup(owner, names)) == []
        run(owner, plan_teardown(owner, names))
        assert pending(plan_teardown(owner, names)) == []


@every_major
def test_an_owner_of_some_is_refused_what_is_not_its_own(
    leader: Connection, postgres: EmbeddedPostgres, names: Names
) -> None:
    leader.execute("create table public.foreign_to_us (id int primary key)")
    with as_role(leader, postgres, "replication") as owner:
        owner.execute("create table public.t (id int primary key)")
        with pytest.raises(AccessError, match=r"public\.foreign_to_us"):
            plan_setup(owner, names)
        run(owner, plan_setup(owner, names, tables=["t"]))
        assert published(owner, names) == ["public.t"]


@every_major
def test_a_role_without_replication_is_told_the_statement(
    leader: Connection, postgres: EmbeddedPostgres, names: Names
) -> None:
    with as_role(leader, postgres, "") as owner:
        owner.execute("create table public.t (id int primary key)")
        with pytest.raises(AccessError, match="may not make a replication slot") as caught:
            plan_setup(owner, names)
        leader.execute(caught.value.remedy.encode())
        run(owner, plan_setup(owner, names))


@every_major
def test_a_slot_older_than_its_publication_is_refused(leader: Connection, names: Names) -> None:
    leader.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [names.slot])
    with pytest.raises(ConfigurationError, match="older than publication"):
        plan_setup(leader, names)
    run(leader, plan_teardown(leader, names))
    run(leader, plan_setup(leader, names))


@every_major
def test_a_slot_of_another_kind_is_left_alone(leader: Connection, names: Names) -> None:
    leader.execute("SELECT pg_create_physical_replication_slot(%s)", [names.slot])
    try:
        with pytest.raises(ConfigurationError, match="is a physical slot"):
            plan_setup(leader, names)
        with pytest.raises(ConfigurationError, match="is a physical slot"):
            plan_teardown(leader, names)
    finally:
        leader.execute("SELECT pg_drop_replication_slot(%s)", [names.slot])


@every_major
def test_a_slot_of_another_database_is_left_alone(
    leader: Connection, postgres: EmbeddedPostgres, database: DatabaseFactory, names: Names
) -> None:
    with connect(database(postgres)) as other:
        run(other, plan_setup(other, names))
    with pytest.raises(ConfigurationError, match=r"logical slot of database"):
        plan_teardown(leader, names)


@every_major
def test_a_publication_that_leaves_changes_out_is_refused(leader: Connection, names: Names) -> None:
    leader.execute(
        f"create publication {identifier(names.publication)} for all tables with (publish = 'insert')".encode()
    )
    with pytest.raises(ConfigurationError, match="does not publish all") as caught:
        plan_setup(leader, names)
    leader.execute(caught.value.remedy.encode())
    plan_setup(leader, names)


@every_major
def test_a_slot_in_use_is_not_dropped(leader: Connection, postgres: EmbeddedPostgres, names: Names) -> None:
    run(leader, plan_setup(leader, names))
    with connect(postgres.url(leader.info.dbname), replication=True) as shipper:
        command = (
            f"START_REPLICATION SLOT {names.slot} LOGICAL 0/0"
            f" (proto_version '1', publication_names '{names.publication}')"
        )
        shipper.pgconn.exec_(command.encode())
        assert leader_status(leader, names).active_pid == shipper.info.backend_pid
        with pytest.raises(FencedError, match="is active for PID"):
            run(leader, plan_teardown(leader, names))
        shipper.pgconn.finish()


@every_major
def test_a_locked_table_is_not_waited_for(
    leader: Connection, postgres: EmbeddedPostgres, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "LOCK_TIMEOUT_S", 1)
    leader.execute("create table public.t (v text)")
    with psycopg.connect(postgres.url(leader.info.dbname)) as user:
        user.execute("insert into public.t values ('x')")
        with pytest.raises(TransientError, match="lock timeout"):
            run(leader, plan_setup(leader, names))
        assert fetch(leader, "SHOW lock_timeout")[0].lock_timeout == "0"
    run(leader, plan_setup(leader, names))


@every_major
def test_status_tells_lag_and_open_transactions(leader: Connection, postgres: EmbeddedPostgres, names: Names) -> None:
    leader.execute("create table public.t (id int primary key, v text)")
    run(leader, plan_setup(leader, names))
    before = leader_status(leader, names)
    leader.execute("insert into public.t select g, repeat('x', 100) from generate_series(1, 10000) g")
    after = leader_status(leader, names)
    assert after.confirmed_flush_lsn == before.confirmed_flush_lsn
    assert after.lag_bytes is not None
    assert after.retained_bytes is not None
    assert after.retained_bytes >= after.lag_bytes > 1_000_000
    assert after.current_lsn - (after.confirmed_flush_lsn or 0) == after.lag_bytes
    assert after.active_pid is None
    assert after.safe_wal_bytes is None
    with psycopg.connect(postgres.url(leader.info.dbname)) as user:
        user.execute("update public.t set v = '' where id = 1")
        time.sleep(0.2)
        age = leader_status(leader, names).oldest_transaction_s
        assert age is not None
        assert 0.2 <= age < 60


@every_major
def test_a_new_slot_waits_for_a_transaction_longer_than_a_lock(
    leader: Connection, postgres: EmbeddedPostgres, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "LOCK_TIMEOUT_S", 1)
    leader.execute("create table public.t (id int primary key); create table public.u (id int primary key)")
    with psycopg.connect(postgres.url(leader.info.dbname)) as user:
        user.execute("create temporary table own (id int)")
        end = threading.Timer(2, user.rollback)
        end.start()
        run(leader, plan_setup(leader, names))
        end.join()
    assert leader_status(leader, names).wal_status == "reserved"
