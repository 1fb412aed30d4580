"""The eyes on real databases: lines, keys, snapshots, checkpoints."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice

import psycopg
import pytest

from cdc.errors import AccessError, SchemaError
from cdc.position import Position
from cdc.record import Checkpoint, ImageProgress, Relation
from cdc.sql.quote import identifier
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql.connect import Connection, connect, fetch, source_of
from cdc.stores.postgresql.describe import describe
from cdc.stores.postgresql.eyes import PostgresStore, connect_store
from tests.fix_postgresql import DatabaseFactory, postgres_major

every_major = postgres_major(16, 18)
HOSTILE = 't "%s\n\\\'; drop table "x" -- żółw'


@pytest.fixture
def url(postgres: EmbeddedPostgres, database: DatabaseFactory) -> str:
    return database(postgres)


@pytest.fixture
def writer(url: str) -> Iterator[Connection]:
    with connect(url) as connection:
        connection.execute("create publication p for all tables")
        yield connection


@pytest.fixture
def store(url: str) -> Iterator[PostgresStore]:
    with closing(connect_store(url)) as store:
        yield store


def relation(writer: Connection, name: str = "t") -> Relation:
    return next(found for found in describe(writer, publication="p") if found.name == name)


def keyed(relation: Relation, *names: str) -> Relation:
    columns = tuple(replace(column, key=column.name in names) for column in relation.columns)
    return replace(relation, columns=columns)


@every_major
def test_lines_are_copy_text(writer: Connection, store: PostgresStore) -> None:
    writer.execute(
        f"""
        create table public.{identifier(HOSTILE)} (
            id int primary key, {identifier(HOSTILE)} text, b bytea, f float8, z timestamptz, a text[], m money, x bool
        )""".encode()
    )
    writer.execute(
        f"""insert into public.{identifier(HOSTILE)} values
        (1, E'tab\\t line\\n return\\r back\\\\ bell\\b feed\\f', '\\x00ff', 0.1, '2026-01-02 03:04:05.6+02',
         array['a,b', null, 'NULL', E'q"\\\\\\t'], 12.5, true),
        (2, '', '', 'NaN', 'infinity', '{{}}', null, false),
        (3, null, null, '-0', '0044-03-15 BC', null, null, null)
        """.encode()
    )
    assert sorted(store.lines(relation(writer, HOSTILE))) == [
        (
            b"1",
            rb"1	tab\t line\n return\r back\\ bell\b feed\f	\\x00ff	0.1	2026-01-02 01:04:05.6+00"
            rb'	{"a,b",NULL,"NULL","q\\"\\\\\t"}	12.50	t',
        ),
        (b"2", rb"2		\\x	NaN	infinity	{}	\N	f"),
        (b"3", rb"3	\N	\N	-0	0044-03-15 00:00:00+00 BC	\N	\N	\N"),
    ]


@every_major
def test_keys(writer: Connection, store: PostgresStore) -> None:
    writer.execute("create table public.t (a text, b int, c text)")
    writer.execute("insert into public.t values (E'a\\tb', 1, E'\\t'), (E'\\n', null, '')")
    table = relation(writer)
    first, second = b"a\\tb\t1\t\\t", b"\\n\t\\N\t"
    assert list(store.lines(table)) == [(first, first), (second, second)]
    assert list(store.lines(keyed(table, "a", "b", "c"))) == [(first, first), (second, second)]
    assert list(store.lines(keyed(table, "a"))) == [(b"a\\tb", first), (b"\\n", second)]
    assert list(store.lines(keyed(table, "b"))) == [(b"1", first), (b"\\N", second)]
    assert list(store.lines(keyed(table, "a", "c"))) == [(b"a\\tb\t\\t", first), (b"\\n\t", second)]


@every_major
def test_only_the_columns_described_in_their_order(writer: Connection, store: PostgresStore) -> None:
    writer.execute("create table public.t (id int primary key, a int, b int); insert into public.t values (1, 2, 3)")
    table = relation(writer)
    turned = replace(table, columns=(table.columns[2], table.columns[0]))
    assert list(store.lines(turned)) == [(b"1", b"3\t1")]


@every_major
def test_a_table_without_columns_has_rows(writer: Connection, store: PostgresStore) -> None:
    writer.execute("create table public.t (); insert into public.t default values; insert into public.t default values")
    assert list(store.lines(relation(writer))) == [(b"", b""), (b"", b"")]


@every_major
def test_roots_have_their_leaves_rows_and_parents_only_their_own(writer: Connection, store: PostgresStore) -> None:
    writer.execute(
        """
        create table public.root (id int primary key) partition by range (id);
        create table public.leaf partition of public.root for values from (0) to (10);
        insert into public.root values (1);
        create table public.parent (id int primary key); insert into public.parent values (1);
        create table public.child (primary key (id)) inherits (public.parent); insert into public.child values (2);
        """
    )
    leaf = relation(writer, "leaf")
    assert list(store.lines(leaf)) == [(b"1", b"1")]
    assert list(store.lines(replace(leaf, name="root"))) == [(b"1", b"1")]
    assert list(store.lines(relation(writer, "parent"))) == [(b"1", b"1")]
    assert list(store.lines(relation(writer, "child"))) == [(b"2", b"2")]


@every_major
def test_every_call_sees_now_until_frozen(writer: Connection, store: PostgresStore) -> None:
    writer.execute("create table public.t (id int primary key); create table public.u (id int primary key)")
    t, u = relation(writer), relation(writer, "u")
    writer.execute("insert into public.t values (1)")
    assert len(list(store.lines(t))) == 1
    frozen = store.freeze()
    writer.execute("insert into public.t values (2); insert into public.u values (1)")
    assert [len(list(store.lines(table))) for table in (t, u)] == [1, 0]
    assert store.position() == frozen
    store.thaw()
    store.thaw()
    assert [len(list(store.lines(table))) for table in (t, u)] == [2, 1]
    assert store.position() > frozen


@every_major
def test_the_position_is_at_or_above_all_that_is_seen(writer: Connection, store: PostgresStore) -> None:
    writer.execute("create table public.t (id int primary key)")
    committed = fetch(writer, "SELECT (pg_current_wal_insert_lsn() - '0/0')::int8 AS lsn")[0].lsn
    position = store.freeze()
    assert (position.source, position.epoch) == source_of(writer)
    assert position.lsn >= committed


@every_major
@pytest.mark.parametrize("frozen", [True, False])
def test_leaving_early_keeps_the_session_and_its_snapshot(
    writer: Connection, store: PostgresStore, frozen: bool
) -> None:
    writer.execute("create table public.t (id int primary key, v text)")
    writer.execute("insert into public.t select g, repeat('x', 200) from generate_series(1, 50000) g")
    table = relation(writer)
    if frozen:
        store.freeze()
        writer.execute("delete from public.t where id = 1")
    lines = store.lines(table)
    assert [key for key, _ in islice(lines, 2)] == [b"1", b"2"]
    assert isinstance(lines, Iterator)
    getattr(lines, "close")()  # noqa: B009
    assert sum(1 for _ in store.lines(table)) == 50_000


@every_major
def test_a_missing_table_or_column_keeps_the_snapshot(writer: Connection, store: PostgresStore) -> None:
    writer.execute("create table public.t (id int primary key, v text); insert into public.t values (1, 'x')")
    table = relation(writer)
    store.freeze()
    with pytest.raises(SchemaError, match=r"no table public\.nowhere"):
        list(store.lines(replace(table, name="nowhere")))
    with pytest.raises(SchemaError, match='column "w" does not exist'):
        list(store.lines(replace(table, columns=(*table.columns, replace(table.columns[1], name="w")))))
    assert list(store.lines(table)) == [(b"1", b"1\tx")]


@every_major
def test_hidden_rows_are_an_error_and_not_a_silence(writer: Connection, postgres: EmbeddedPostgres, url: str) -> None:
    writer.execute("create table public.t (id int primary key, who text); insert into public.t values (1, 'x')")
    role = f"reader_{writer.info.dbname}"
    writer.execute(
        f"alter table public.t enable row level security; create role {role} login;"
        f"create policy none on public.t using (who = current_user); grant select on public.t to {role}".encode()
    )
    with (
        closing(connect_store(postgres.url(writer.info.dbname, role))) as store,
        pytest.raises(AccessError, match="row-level security"),
    ):
        list(store.lines(relation(writer)))


@every_major
def test_checkpoints(writer: Connection, store: PostgresStore) -> None:
    assert store.checkpoints() == {}
    writer.execute("create schema cdc")
    assert store.checkpoints() == {}
    writer.execute(
        "create table cdc.checkpoint (stream text primary key, owner bigint, source text, epoch bigint, lsn pg_lsn,"
        " next_offset bigint, image jsonb)"
    )
    assert store.checkpoints() == {}
    image = ImageProgress("i", 7, {16384: (1, 2)})
    stored = json.dumps({"id": "i", "sequence": 7, "tables": {"16384": [1, 2]}})
    writer.execute(
        "insert into cdc.checkpoint values (%s, 3, 'src/db', 1, '1/A', 42, %s), ('plain', 1, 's', 2, '0/0', 0, null)",
        [HOSTILE, stored],
    )
    # An owner that has applied nothing yet.
    writer.execute("insert into cdc.checkpoint (stream, owner) values ('claimed', 1)")
    assert store.checkpoints() == {
        HOSTILE: Checkpoint(Position("src/db", 1, 0x10000000A), 42, 3, image),
        "plain": Checkpoint(Position("s", 2, 0), 0, 1, None),
    }


@every_major
def test_a_follower_of_the_other_major_prints_the_same(writer: Connection, store: PostgresStore, url18: str) -> None:
    values = "(1, 1e300, 'infinity', '1 year 2 mons -3 days', '{\"b\":1, \"a\": [1.0]}')"
    create = "create table public.t (id int primary key, f float8, z timestamptz, i interval, j jsonb)"
    writer.execute(f"{create}; insert into public.t values {values}".encode())
    table = relation(writer)
    with psycopg.connect(url18, autocommit=True) as other:
        other.execute(f"{create}; insert into public.t values {values}".encode())
    with closing(connect_store(url18)) as follower:
        assert list(follower.lines(table)) == list(store.lines(table))


@pytest.fixture
def url18(postgres18: EmbeddedPostgres, database: DatabaseFactory) -> str:
    return database(postgres18)
