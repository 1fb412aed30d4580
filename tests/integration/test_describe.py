"""Real catalogs described, hostile names included."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psycopg
import pytest

from cdc.errors import AccessError, ConfigurationError, SchemaError
from cdc.record import Column, Relation, TypeDescription
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql.connect import SETTINGS, Connection, connect, fetch, source_of, translated
from cdc.stores.postgresql.describe import describe, describe_tables, describe_types, enrich, filters
from tests.fix_postgresql import DatabaseFactory, postgres_major

every_major = postgres_major(16, 18)

# A quote, a percent sign, a line break, a backslash, another alphabet.
HOSTILE = 't "%s\n\\\'; drop table "x" -- żółw'
QUOTED = '"' + HOSTILE.replace('"', '""') + '"'


@pytest.fixture
def leader(postgres: EmbeddedPostgres, database: DatabaseFactory) -> Iterator[Connection]:
    with connect(database(postgres)) as connection:
        yield connection


def described(connection: Connection, publication: str = "p") -> dict[str, Relation]:
    return {relation.name: relation for relation in describe(connection, publication=publication)}


def names(relation: Relation) -> list[str]:
    return [column.name for column in relation.columns]


def keys(relation: Relation) -> list[str]:
    return [column.name for column in relation.columns if column.key]


@every_major
def test_settings_are_pinned_whatever_role_and_database_say(
    postgres: EmbeddedPostgres, database: DatabaseFactory
) -> None:
    url = database(postgres)
    with psycopg.connect(url, autocommit=True) as admin:
        name = admin.info.dbname
        for setting, value in {
            "DateStyle": "German",
            "TimeZone": "Asia/Tokyo",
            "search_path": "public",
            "statement_timeout": "10min",
            "bytea_output": "escape",
            "default_transaction_read_only": "on",
            "row_security": "on",
            "extra_float_digits": "-5",
        }.items():
            admin.execute(f"alter database {name} set {setting} = '{value}'".encode())
    for replication in (False, True):
        with connect(url, replication=replication) as connection:
            row = connection.execute(
                "SELECT '2026-01-02 03:04:05+00'::timestamptz::text || 0.1::float8::text"
            ).fetchone()
            assert row == ("2026-01-02 03:04:05+000.1",)
            shown: dict[str, str] = dict(connection.execute("SELECT name, setting FROM pg_settings").fetchall())
            for setting, value in SETTINGS.items():
                assert shown[setting].replace(" ", "") == value.replace("\\ ", "").replace(" ", ""), setting
            assert shown["client_encoding"] == "UTF8"
            assert shown["application_name"] == "cdc"
            assert shown.get("transaction_timeout", "0") == "0"


@every_major
def test_the_source_is_the_same_on_both_kinds_of_session(postgres: EmbeddedPostgres, database: DatabaseFactory) -> None:
    url = database(postgres)
    with connect(url) as plain, connect(url, replication=True) as walsender:
        identified = walsender.execute("IDENTIFY_SYSTEM").fetchone()
        assert identified is not None
        expected = (f"{identified[0]}/{plain.info.dbname}", identified[1])
        assert source_of(plain) == source_of(walsender) == expected


@every_major
def test_refusals_at_the_door_tell_what_to_do(postgres: EmbeddedPostgres) -> None:
    with pytest.raises(ConfigurationError, match='database "nowhere" does not exist'):
        connect(postgres.url("nowhere"))
    with pytest.raises(AccessError, match='role "nobody_we_know" does not exist'):
        connect(postgres.url("postgres", "nobody_we_know"))


@pytest.mark.parametrize("major", [16, 18])
def test_a_wrong_password_is_refused_and_not_told(major: int, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(f"postgres{major}")  # skips, or fails, where there is no such server
    with EmbeddedPostgres(major, settings={"fsync": "off"}) as server:
        rules = server.data / "pg_hba.conf"
        rules.write_text(f"host all guarded 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
        with connect(server.url()) as admin:
            admin.execute("create role guarded login password 'right@pass'; select pg_reload_conf()")
        place = f"127.0.0.1:{server.port}/postgres"
        with connect(f"postgresql://guarded:right%40pass@{place}") as connection:
            assert "right" not in repr(connection)
            with pytest.raises(SchemaError) as failed, translated():
                connection.execute("select nothing from public.nowhere")
            assert "right" not in str(failed.value)
        for url in (f"postgresql://guarded:wrongpass@{place}", f"postgresql://guarded@{place}"):
            with pytest.raises(AccessError, match="password") as caught:
                connect(url)
            assert "wrongpass" not in f"{caught.value} {caught.value.remedy} {caught.value.__cause__}"
            assert "PGPASSWORD" in caught.value.remedy


@every_major
def test_a_table_with_a_hostile_name_and_every_kind_of_type(leader: Connection) -> None:
    leader.execute(
        f"""
        set search_path = public;
        create schema {QUOTED};
        create type {QUOTED}.mood as enum ('sad', 'it''s "ok"', 'a,b');
        alter type {QUOTED}.mood add value 'first' before 'sad';
        create domain public.moods as {QUOTED}.mood[];
        create type public.pair as (x {QUOTED}.mood, y int);
        create type public.span as range (subtype = float8);
        create table {QUOTED}.{QUOTED} (
            b int, a int, {QUOTED} numeric(6,2), d moods, p pair[], s span, m span_multirange, primary key (a, b)
        );
        create publication p for table {QUOTED}.{QUOTED};
        """.encode()
    )
    [relation] = describe(leader, publication="p")
    assert (relation.schema, relation.name, relation.identity) == (HOSTILE, HOSTILE, "d")
    assert names(relation) == ["b", "a", HOSTILE, "d", "p", "s", "m"]
    assert relation.primary_key == ("a", "b")
    assert keys(relation) == ["b", "a"]
    assert [column.number for column in relation.columns] == [1, 2, 3, 4, 5, 6, 7]
    assert [column.not_null for column in relation.columns] == [True, True, False, False, False, False, False]
    assert relation.columns[2].modifier == ((6 << 16) | 2) + 4

    types = {description.name: description for description in relation.types}
    assert set(types) == {"mood", "_mood", "moods", "pair", "_pair", "span", "span_multirange"}
    assert types["mood"].labels == ("first", "sad", 'it\'s "ok"', "a,b")
    assert types["mood"].schema == HOSTILE
    assert {name: (kind.kind, kind.base) for name, kind in types.items()} == {
        "mood": ("enum", 0),
        "_mood": ("array", types["mood"].oid),
        "moods": ("domain", types["_mood"].oid),
        "pair": ("composite", 0),
        "_pair": ("array", types["pair"].oid),
        "span": ("range", 701),
        "span_multirange": ("multirange", types["span"].oid),
    }
    assert relation.types == describe_types(leader, (column.type_oid for column in relation.columns))
    assert describe_types(leader, [23, 25, 1007]) == ()


@every_major
def test_a_type_only_reached_by_another_table_is_not_attached(leader: Connection) -> None:
    leader.execute(
        "create type public.e as enum ('x'); create table public.a (id int primary key, e public.e);"
        "create table public.b (id int primary key); create publication p for table public.a, public.b"
    )
    relations = described(leader)
    assert [kind.name for kind in relations["a"].types] == ["e"]
    assert relations["b"].types == ()


@every_major
def test_replica_identities(leader: Connection) -> None:
    leader.execute(
        """
        create table public.by_default (id int primary key, v text);
        create table public.by_index (id int primary key, a int not null, b int not null);
        create unique index pick on public.by_index (b, a) include (id);
        alter table public.by_index replica identity using index pick;
        create table public.by_row (id int primary key, v text); alter table public.by_row replica identity full;
        create table public.by_nothing (id int primary key, v text);
        alter table public.by_nothing replica identity nothing;
        create table public.keyless (v text);
        create table public.late (id int primary key deferrable);
        create table public.nothing_at_all ();
        create publication p for all tables
        """
    )
    relations = described(leader)
    assert {
        name: (relation.identity, keys(relation), relation.primary_key) for name, relation in relations.items()
    } == {
        "by_default": ("d", ["id"], ("id",)),
        "by_index": ("i", ["a", "b"], ("id",)),
        "by_row": ("f", ["id", "v"], ("id",)),
        "by_nothing": ("n", [], ("id",)),
        "keyless": ("d", [], ()),
        "late": ("d", [], ("id",)),
        "nothing_at_all": ("d", [], ()),
    }
    assert relations["nothing_at_all"].columns == ()


@every_major
def test_column_lists_and_row_filters(leader: Connection) -> None:
    leader.execute(
        "create table public.t (k int, a int, id int primary key, b int);"
        "create publication p for table public.t (id, b) where (id > 3);"
        "create publication without_key for table public.t (a) with (publish = 'insert')"
    )
    [relation] = describe(leader, publication="p")
    assert [(column.name, column.number) for column in relation.columns] == [("id", 3), ("b", 4)]
    assert relation.primary_key == ("id",)
    assert filters(leader, publication="p") == {relation.id: "(id > 3)"}
    assert filters(leader, publication="without_key") == {}
    [relation] = describe(leader, publication="without_key")
    assert (names(relation), relation.primary_key) == (["a"], ())


@every_major
def test_dropped_columns_are_gone(leader: Connection) -> None:
    leader.execute(
        "create table public.t (x int, id int primary key, y int); alter table public.t drop x;"
        "alter table public.t drop y; alter table public.t add y text; create publication p for table public.t"
    )
    [relation] = describe(leader, publication="p")
    assert [(column.name, column.number) for column in relation.columns] == [("id", 2), ("y", 4)]


@every_major
def test_partitions_stand_for_themselves_or_their_root_for_them(leader: Connection) -> None:
    leader.execute(
        """
        create table public.root (id int primary key, v text) partition by range (id);
        create table public.one partition of public.root for values from (0) to (10);
        create table public.two (v text, gone int, id int not null); alter table public.two drop gone;
        alter table public.root attach partition public.two for values from (10) to (20);
        insert into public.root values (1, 'x');
        alter table public.root add w text default 'w,"{}';
        create publication leaves for table public.root;
        create publication roots for table public.root with (publish_via_partition_root = true)
        """
    )
    leaves = described(leader, "leaves")
    assert {name: names(relation) for name, relation in leaves.items()} == {
        "one": ["id", "v", "w"],
        "two": ["v", "id", "w"],
    }
    assert leaves["one"].columns[2].missing == 'w,"{}'
    roots = described(leader, "roots")
    assert {name: names(relation) for name, relation in roots.items()} == {"root": ["id", "v", "w"]}
    assert roots["root"].columns[2].missing == 'w,"{}'
    assert roots["root"].primary_key == ("id",)


@every_major
def test_generated_columns_as_the_publication_says(leader: Connection) -> None:
    leader.execute(
        "create table public.t (id int primary key, g int generated always as (id * 2) stored, z int);"
        "create publication p for table public.t"
    )
    assert names(described(leader)["t"]) == ["id", "z"]
    if leader.info.server_version >= 180000:
        leader.execute(
            "alter table public.t add v int generated always as (id * 3) virtual;"
            "alter publication p set (publish_generated_columns = stored)"
        )
        assert names(described(leader)["t"]) == ["id", "g", "z"]
    assert names(describe_tables(leader, [described(leader)["t"].id])[0]) == ["id", "z"]


@every_major
def test_missing_values_are_what_old_rows_show(leader: Connection) -> None:
    defaults = {
        "i": ("int", "7"),
        "t": ("text", "a\"b,{c}\\'\n%s"),
        "n": ("text", "NULL"),
        "e": ("text", ""),
        "b": ("bytea", "\\x00ff"),
        "x": ("box", "(3,4),(1,2)"),
        "a": ("text[]", '{a,NULL,"b c"}'),
        "m": ("int[]", "{{1,2},{3,4}}"),
        "z": ("timestamptz", "2026-01-02 03:04:05+00"),
        "f": ("float8", "0.1"),
    }
    leader.execute("create table public.t (id int primary key); insert into public.t values (1)")
    for name, (kind, text) in defaults.items():
        literal = psycopg.sql.Literal(text).as_string(leader)
        leader.execute(f"alter table public.t add {name} {kind} default {literal}".encode())
    leader.execute("alter table public.t add absent text; create publication p for table public.t")
    [relation] = describe(leader, publication="p")
    missing = {column.name: column.missing for column in relation.columns if column.missing is not None}
    assert missing == {name: text for name, (_, text) in defaults.items()}
    shown = leader.execute(
        f"select {', '.join(f'{name}::text' for name in defaults)} from public.t".encode()
    ).fetchone()
    assert shown == tuple(missing.values())


@every_major
def test_missing_publication(leader: Connection) -> None:
    with pytest.raises(ConfigurationError, match='no publication "it\'s"') as caught:
        describe(leader, publication="it's")
    assert "cdc setup" in caught.value.remedy


def as_the_log_tells_it(relation: Relation) -> Relation:
    columns = tuple(Column(c.name, c.type_oid, c.modifier, c.key) for c in relation.columns)
    return replace(relation, columns=columns, primary_key=(), types=())


CHANGES: dict[str, str] = {
    "another name": "alter table public.t rename v to w",
    "another type": "alter table public.t alter v type varchar(5)",
    "another modifier": "alter table public.t alter n type numeric(8,2)",
    "another order": "alter table public.t drop v; alter table public.t add v text",
    "one less": "alter table public.t drop v",
    "gone": "drop table public.t",
}


@pytest.fixture
def table(leader: Connection) -> Relation:
    leader.execute(
        "create type public.e as enum ('x');"
        "create table public.t (id int primary key, v text not null, n numeric(6,2), e public.e);"
        "create publication p for table public.t"
    )
    return describe(leader, publication="p")[0]


@every_major
def test_enrich_adds_everything_where_the_catalog_agrees(leader: Connection, table: Relation) -> None:
    assert enrich(leader, as_the_log_tells_it(table)) == table
    # More columns than the log knew, or a column list: what was captured still agrees.
    leader.execute("alter table public.t add later int")
    assert enrich(leader, as_the_log_tells_it(table)) == table


@every_major
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_enrich_adds_only_types_where_it_does_not(leader: Connection, table: Relation, change: str) -> None:
    leader.execute(change.encode())
    logged = as_the_log_tells_it(table)
    assert enrich(leader, logged) == replace(logged, types=table.types)


@every_major
def test_enrich_does_not_invent_a_type_that_is_gone(leader: Connection, table: Relation) -> None:
    leader.execute("drop table public.t; drop type public.e")
    assert enrich(leader, as_the_log_tells_it(table)).types == ()


@every_major
def test_a_thousand_tables_cost_three_queries(leader: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    leader.execute("create type public.e as enum ('x'); create publication p for all tables")
    for start in range(0, 1000, 100):
        tables = ";".join(
            f"create table public.t{n} (id int primary key, e public.e)" for n in range(start, start + 100)
        )
        leader.execute(tables.encode())
    queries = count_queries(monkeypatch)
    began = time.monotonic()
    relations = describe(leader, publication="p")
    assert time.monotonic() - began < 5
    assert len(relations) == 1000
    assert {relation.types for relation in relations} == {relations[0].types}
    # The publication's own existence, the relations, the types.
    assert len(queries) == 3


def count_queries(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    ran: list[object] = []
    execute: Callable[..., psycopg.Cursor[object]] = psycopg.Cursor.execute

    def counting(cursor: psycopg.Cursor[object], query: object, *rest: object) -> psycopg.Cursor[object]:
        ran.append(query)
        return execute(cursor, query, *rest)

    monkeypatch.setattr(psycopg.Cursor, "execute", counting)
    return ran


@every_major
def test_unknown_tables_are_left_out(leader: Connection) -> None:
    leader.execute("create table public.t (id int)")
    oid = fetch(leader, "SELECT 'public.t'::regclass::oid::int8 AS oid")[0].oid
    assert [relation.name for relation in describe_tables(leader, [oid, 999_999_999])] == ["t"]
    assert describe_tables(leader, []) == []


@every_major
def test_types_of_information_schema_have_no_stable_oid_either(leader: Connection) -> None:
    oid = fetch(leader, "SELECT 'information_schema.sql_identifier'::regtype::oid::int8 AS oid")[0].oid
    assert describe_types(leader, [oid]) == (
        TypeDescription(oid, "information_schema", "sql_identifier", "domain", 19),
    )
