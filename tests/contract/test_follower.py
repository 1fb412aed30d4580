"""What every follower and every pair of eyes promises. To add one, add a line to ``ENGINES``."""

import itertools
import random
import signal
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg
import pytest

from cdc.errors import (
    CdcError,
    ConfigurationError,
    ConflictError,
    FencedError,
    LocalIOError,
    SchemaError,
    TransientError,
    UnavailableError,
    UsageError,
)
from cdc.ports import (
    AddColumn,
    ChangeType,
    DropColumn,
    Follower,
    RenameColumn,
    RenameTable,
    SchemaChange,
    Store,
)
from cdc.position import Position
from cdc.record import NULL, Checkpoint, Column, ImageProgress, Relation, RowSet, TypeDescription
from cdc.sql.mapping import declarations
from cdc.stores import duckdb, sqlite
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql import eyes
from cdc.stores.postgresql import follower as postgresql
from tests.fix_postgresql import DatabaseFactory

INT4, INT8, TEXT, VARCHAR, NUMERIC, FLOAT4, FLOAT8, BOOL = 23, 20, 25, 1043, 1700, 700, 701, 16

ROOT = Path(__file__).parents[2]


@dataclass
class Engine:
    """One follower database, which may be opened again and again."""

    name: str
    follower: Callable[[], Follower]
    store: Callable[[], Store]
    savepoints: bool = True


def _sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    url = f"sqlite:///{tmp_path}/f.db"
    return Engine("sqlite", lambda: sqlite.connect_follower(url), lambda: sqlite.connect_store(url))


def _duckdb(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    url = f"duckdb:///{tmp_path}/f.duckdb"
    return Engine("duckdb", lambda: duckdb.connect_follower(url), lambda: duckdb.connect_store(url), savepoints=False)


def _postgresql(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    url = request.getfixturevalue("database")(request.getfixturevalue("postgres18"))
    return Engine("postgresql", lambda: postgresql.connect_follower(url), lambda: eyes.connect_store(url))


ENGINES: dict[str, Callable[[pytest.FixtureRequest, Path], Engine]] = {
    "postgresql": _postgresql,
    "sqlite": _sqlite,
    "duckdb": _duckdb,
}


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    return ENGINES[request.param](request, tmp_path)


@contextmanager
def working(engine: Engine) -> Iterator[Follower]:
    """An open transaction, committed at the end; closed either way."""
    follower = engine.follower()
    try:
        follower.begin()
        yield follower
        follower.commit()
    except BaseException:
        follower.rollback()
        raise
    finally:
        follower.close()


def seen(engine: Engine, relation: Relation) -> list[bytes]:
    """The table's lines, sorted."""
    return sorted(line for _, line in looked(engine, relation))


def looked(engine: Engine, relation: Relation) -> list[tuple[bytes, bytes]]:
    store = engine.store()
    try:
        return list(store.lines(relation))
    finally:
        store.close()


def value(payload: bytes) -> bytes:
    return struct.pack("!i", len(payload)) + payload


def i4(number: int) -> bytes:
    return value(struct.pack("!i", number))


def text(string: str) -> bytes:
    return value(string.encode())


def table(*columns: Column, name: str = "t", schema: str = "public", identity: str = "d") -> Relation:
    key = tuple(column.name for column in columns if column.key) if identity == "d" else ()
    return Relation(1, schema, name, identity, columns, key)


ITEMS = table(Column("id", INT4, key=True), Column("v", TEXT), Column("n", INT4))
KEYLESS = table(Column("a", INT4, key=True), Column("b", TEXT, key=True), identity="f")
BINARY = b"bbb"


def items(*rows: tuple[int, str | None, int | None], relation: Relation = ITEMS) -> RowSet:
    values: list[tuple[bytes, ...]] = [
        (i4(k), NULL if v is None else text(v), NULL if n is None else i4(n)) for k, v, n in rows
    ]
    return RowSet(relation, BINARY, (0, 1, 2), values)


def change(columns: tuple[int, ...], *changes: tuple[int, tuple[bytes, ...]]) -> RowSet:
    return RowSet(ITEMS, BINARY, columns, [new for _, new in changes], (0,), [(i4(key),) for key, _ in changes])


def gone(*keys: int) -> RowSet:
    return RowSet(ITEMS, BINARY, match=(0,), matches=[(i4(key),) for key in keys])


# Rows.


def test_inserted_rows_are_seen_as_copy_text(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        assert follower.insert(items((1, "a\tb\\", 7), (2, None, None), (-3, "", 0))) == 3
    assert looked(engine, ITEMS) and sorted(looked(engine, ITEMS)) == [
        (b"-3", b"-3\t\t0"),
        (b"1", b"1\ta\\tb\\\\\t7"),
        (b"2", b"2\t\\N\t\\N"),
    ]


def test_a_set_of_none_changes_nothing(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        assert follower.insert(items()) == 0
        assert follower.insert(items(), replace=True) == 0
        assert follower.update(change((1,))) == 0
        assert follower.delete(gone()) == 0


def test_text_and_binary_values_in_one_row(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(RowSet(ITEMS, b"ttb", (0, 1, 2), [(text("12"), text("x"), i4(4))]))
    assert seen(engine, ITEMS) == [b"12\tx\t4"]


def test_columns_in_another_order_and_some_left_out(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(RowSet(ITEMS, BINARY, (2, 0), [(i4(5), i4(1))]))
    assert seen(engine, ITEMS) == [b"1\t\\N\t5"]


def test_update_sets_only_its_columns(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(items((1, "a", 1), (2, "b", 2), (3, "c", 3)))
        assert follower.update(change((1,), (1, (text("x"),)), (3, (NULL,)), (9, (text("nobody"),)))) == 2
    assert seen(engine, ITEMS) == [b"1\tx\t1", b"2\tb\t2", b"3\t\\N\t3"]


def test_update_of_all_columns_with_the_key_unchanged(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(items((1, "a", 1), (2, "b", 2)))
        rows = items((2, "B", 20), (1, "A", 10))
        assert follower.update(replace(rows, match=(0,), matches=[(i4(2),), (i4(1),)])) == 2
    assert seen(engine, ITEMS) == [b"1\tA\t10", b"2\tB\t20"]


def test_updates_take_effect_in_order(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(items((1, "a", 1)))
        assert follower.update(change((1,), (1, (text("x"),)), (1, (text("y"),)))) == 2
        assert follower.update(change((0,), (1, (i4(2),)), (2, (i4(3),)))) == 2
    assert seen(engine, ITEMS) == [b"3\ty\t1"]


def test_update_of_nothing_still_finds_its_row(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(items((1, "a", 1)))
        assert follower.update(change((), (1, ()), (5, ()))) == 1
    assert seen(engine, ITEMS) == [b"1\ta\t1"]


def test_a_key_is_free_again_within_the_transaction(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(items((1, "a", 1), (2, "b", 2)))
    with working(engine) as follower:
        assert follower.delete(gone(1, 2, 3)) == 2
        follower.insert(items((1, "again", 1)))
        follower.update(change((0,), (1, (i4(2),))))
        follower.insert(items((1, "and again", 1)))
    assert seen(engine, ITEMS) == [b"1\tand again\t1", b"2\tagain\t1"]


def test_duplicate_key_is_a_conflict_that_names_table_and_value(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(items((1, "a", 1)))
    with pytest.raises(ConflictError, match=r"public\.t.*77") as caught, working(engine) as follower:
        follower.insert(items((76, "fits", 0), (77, "b", 2), (77, "c", 3), (78, "d", 4)))
    assert type(caught.value) is ConflictError
    assert seen(engine, ITEMS) == [b"1\ta\t1"]


def test_update_onto_a_taken_key_is_a_conflict(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(items((1, "a", 1), (2, "b", 2)))
    with pytest.raises(ConflictError, match=r"public\.t"), working(engine) as follower:
        follower.update(change((0,), (1, (i4(2),))))
    assert seen(engine, ITEMS) == [b"1\ta\t1", b"2\tb\t2"]


def test_replace_overwrites_the_row_with_the_same_key(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(items((1, "a", 1), (2, "b", 2)))
        assert follower.insert(items((2, "B", 20), (3, "c", 3), (2, "BB", 200)), replace=True) == 3
    assert seen(engine, ITEMS) == [b"1\ta\t1", b"2\tBB\t200", b"3\tc\t3"]


def test_replace_where_all_columns_are_key(engine: Engine) -> None:
    pair = table(Column("a", INT4, key=True), Column("b", TEXT, key=True))
    rows = RowSet(pair, b"bb", (0, 1), [(i4(1), text("x"))])
    with working(engine) as follower:
        follower.create(pair)
        assert follower.insert(rows, replace=True) == follower.insert(rows, replace=True) == 1
    assert seen(engine, pair) == [b"1\tx"]


def test_one_of_several_equal_rows(engine: Engine) -> None:
    row, other = (i4(1), NULL), (i4(1), text("x"))
    with working(engine) as follower:
        follower.create(KEYLESS)
        follower.insert(RowSet(KEYLESS, b"bb", (0, 1), [row, row, row, row, other]))
        assert follower.delete(RowSet(KEYLESS, b"bb", match=(0, 1), matches=[row, other, row], unique=False)) == 3
        new = RowSet(KEYLESS, b"bb", (1,), [(text("new"),)], (0, 1), [row], unique=False)
        assert follower.update(new) == 1
        assert follower.delete(RowSet(KEYLESS, b"bb", match=(0, 1), matches=[other], unique=False)) == 0
    assert seen(engine, KEYLESS) == [b"1\t\\N", b"1\tnew"]


def test_keyless_update_finds_what_an_earlier_one_made(engine: Engine) -> None:
    a, b, c = ((i4(1), text(letter)) for letter in "abc")
    with working(engine) as follower:
        follower.create(KEYLESS)
        follower.insert(RowSet(KEYLESS, b"bb", (0, 1), [a]))
        assert follower.update(RowSet(KEYLESS, b"bb", (0, 1), [b, c], (0, 1), [a, b], unique=False)) == 2
    assert seen(engine, KEYLESS) == [b"1\tc"]


def test_keyless_lines_are_their_own_key(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(KEYLESS)
        follower.insert(RowSet(KEYLESS, b"bb", (0, 1), [(i4(1), text("x"))]))
    assert looked(engine, KEYLESS) == [(b"1\tx", b"1\tx")]


@pytest.mark.parametrize("seed", range(4))
def test_many_random_sets_leave_what_a_dictionary_would(engine: Engine, seed: int) -> None:
    chance, model = random.Random(seed), dict[int, str]()
    with working(engine) as follower:
        follower.create(ITEMS)
    follower = engine.follower()
    for _ in range(8):
        follower.begin()
        after = dict(model)
        for _ in range(5):
            _random_set(chance, follower, after)
        if chance.random() < 0.3:
            follower.rollback()
        else:
            follower.commit()
            model = after
    follower.close()
    assert seen(engine, ITEMS) == sorted(f"{key}\t{v}\t0".encode() for key, v in model.items())


def _random_set(chance: random.Random, follower: Follower, model: dict[int, str]) -> None:
    keys = chance.sample(range(200), 40)
    word = str(chance.random())
    present, free = [key for key in keys if key in model], [key for key in keys if key not in model]
    match chance.choice("irudm"):
        case "i":
            assert follower.insert(items(*((key, word, 0) for key in free))) == len(free)
            model.update(dict.fromkeys(free, word))
        case "r":
            assert follower.insert(items(*((key, word, 0) for key in keys)), replace=True) == len(keys)
            model.update(dict.fromkeys(keys, word))
        case "u":
            assert follower.update(change((1,), *((key, (text(word),)) for key in keys))) == len(present)
            model.update(dict.fromkeys(present, word))
        case "d":
            assert follower.delete(gone(*keys)) == len(present)
            for key in present:
                del model[key]
        case "m":
            moves = list(zip(present, free, strict=False))
            assert follower.update(change((0,), *((old, (i4(new),)) for old, new in moves))) == len(moves)
            model.update({new: model.pop(old) for old, new in moves})


# Values, PostgreSQL being the oracle.

SAMPLES: dict[str, Sequence[str]] = {
    "boolean": ["t", "f"],
    "smallint": ["-32768", "32767"],
    "integer": ["-2147483648", "2147483647"],
    "bigint": ["-9223372036854775808", "9223372036854775807"],
    "oid": ["0", "4294967295"],
    "real": ["0.1", "-0", "NaN", "Infinity", "-Infinity", "1e-40", "16777216", "1234567", "1e6"],
    "double precision": ["0.1", "-0", "NaN", "Infinity", "-Infinity", "5e-324", "1e15", "123456789012345680", "1e-5"],
    "numeric": ["1.00", "0", "-0.000001", "NaN", "Infinity", "-Infinity", "1" + "0" * 60 + ".5000"],
    "numeric(10,2)": ["1.00", "0.00", "-0.05", "99999999.99"],
    "numeric(38,0)": ["9" * 38, "-1"],
    "numeric(3,-2)": ["12300"],
    "numeric(3,5)": ["0.00999"],
    "text": ["", "\\N", "tab\tnewline\nreturn\r back\\slash 'quote' \"double\" %s", "日本語 🐘", "1.00", "NULL"],
    "varchar(20)": ["trailing  "],
    "character(5)": ["ab"],
    "bytea": ["", "\\x00ff5c0a", "plain"],
    "date": ["infinity", "-infinity", "2024-02-29", "4713-01-01 BC", "5874897-12-31", "0001-01-01"],
    "time": ["00:00:00", "24:00:00", "12:34:56.789", "23:59:59.999999"],
    "time with time zone": ["12:34:56.7+05:30"],
    "timestamp": [
        "infinity",
        "-infinity",
        "2024-02-29 01:02:03.5",
        "4713-01-01 00:00:00 BC",
        "0044-03-15 01:02:03.4 BC",
    ],
    "timestamp with time zone": ["infinity", "2024-02-29 01:02:03.000001+02", "0044-03-15 01:02:03 BC", "20000-01-01"],
    "interval": ["1 year 2 mons -3 days 04:05:06.789", "-00:00:00.000001"],
    "uuid": ["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"],
    "json": ['{"a" :  1, "a": null}'],
    "jsonb": ['{"b": [1, 2.50], "a": "\\u00e9"}'],
    "integer[]": ["{}", "{1,NULL,3}", "[2:3]={4,5}", "{{1,2},{3,4}}"],
    "text[]": ['{"a b","c,d",NULL,"NULL","\\"\\\\"}'],
    "int4range": ["empty", "[1,5)", "(,)"],
    "tstzrange": ['["2024-01-01 00:00:00+00",)'],
    "bit(3)": ["101"],
    "bit varying": ["", "1"],
    "inet": ["10.0.0.1", "::1/64"],
    "macaddr": ["08:00:2b:01:02:03"],
    "point": ["(1,-2.5)"],
    "mood": ["sad", "it's ok"],
    "positive": ["5"],
    "mood[]": ["{sad,NULL}"],
}


@pytest.mark.parametrize("form", ["binary", "text"])
def test_every_type_comes_back_as_postgresql_prints_it(
    engine: Engine, form: str, postgres18: EmbeddedPostgres, database: DatabaseFactory
) -> None:
    with psycopg.connect(database(postgres18), autocommit=True) as leader:
        leader.execute("SET TimeZone = 'UTC'")
        leader.execute(
            "CREATE TYPE mood AS ENUM ('sad', 'it''s ok'); CREATE DOMAIN positive AS integer CHECK (VALUE > 0)"
        )
        relation = _every_type(leader)
        body = _copied(leader, f"COPY public.every TO STDOUT (FORMAT {form})")
        expected = sorted(_copied(leader, "COPY public.every TO STDOUT").splitlines())
    with working(engine) as follower:
        follower.create(relation)
        assert follower.load(relation, body, form) == len(expected)
        assert not follower.is_empty(relation)
    assert seen(engine, relation) == expected
    with working(engine) as follower:
        assert follower.load(relation, body, form, replace=True) == len(expected)
    assert seen(engine, relation) == expected


def _every_type(leader: psycopg.Connection) -> Relation:
    columns = ", ".join(f'"c {kind}" {kind}' for kind in SAMPLES)
    leader.execute(f"CREATE TABLE every (id integer PRIMARY KEY, {columns})".encode())
    for number, values in enumerate(itertools.zip_longest(*SAMPLES.values())):
        places = ", ".join(f"%s::text::{kind}" for kind in SAMPLES)
        leader.execute(f"INSERT INTO every VALUES ({number}, {places})".encode(), values)
    found = leader.execute(
        "SELECT attname, atttypid, atttypmod FROM pg_attribute WHERE attrelid = 'every'::regclass AND attnum > 0"
        " ORDER BY attnum"
    ).fetchall()
    described = leader.execute(
        "SELECT oid, typname, CASE WHEN typelem <> 0 THEN 'array' WHEN typtype = 'e' THEN 'enum' ELSE 'domain' END,"
        " greatest(typelem, typbasetype)::oid, ARRAY(SELECT enumlabel::text FROM pg_enum WHERE enumtypid = t.oid"
        " ORDER BY enumsortorder) FROM pg_type t WHERE typname IN ('mood', '_mood', 'positive')"
    ).fetchall()
    return Relation(
        9,
        "public",
        "every",
        "d",
        tuple(Column(name, oid, modifier, key=name == "id") for name, oid, modifier in found),
        ("id",),
        tuple(
            TypeDescription(oid, "public", name, kind, base, tuple(labels))
            for oid, name, kind, base, labels in described
        ),
    )


def _copied(leader: psycopg.Connection, sql: str) -> bytes:
    with leader.cursor().copy(sql.encode()) as out:
        return b"".join(bytes(block) for block in out)


# State.

AT = Checkpoint(Position("7/db", 2, 0xFFFF_FFFF_0000_0001), 12, 1, ImageProgress("i", -1, {5: (1, 1 << 63)}))


def test_checkpoint_and_owner(engine: Engine) -> None:
    with working(engine) as follower:
        assert follower.read_checkpoint("s") is None
        assert follower.claim("s") == 1
        assert follower.read_checkpoint("s") is None
        follower.write_checkpoint("s", AT)
        assert follower.read_checkpoint("s") == AT
        assert follower.claim("other") == 1
    with working(engine) as follower:
        assert follower.claim("s") == 2
        later = replace(AT, epoch=2, offset=13, image=None)
        follower.write_checkpoint("s", later)
    store = engine.store()
    assert store.checkpoints() == {"s": later}
    store.close()


def test_a_former_owner_is_fenced(engine: Engine) -> None:
    with working(engine) as follower:
        follower.claim("s")
        follower.write_checkpoint("s", AT)
        follower.claim("s")
    with pytest.raises(FencedError, match="'s'"), working(engine) as follower:
        follower.write_checkpoint("s", replace(AT, offset=99))
    with working(engine) as follower:
        assert follower.read_checkpoint("s") == replace(AT, epoch=2)


def test_an_unclaimed_stream_has_no_checkpoint(engine: Engine) -> None:
    with pytest.raises(FencedError), working(engine) as follower:
        follower.write_checkpoint("s", AT)


def test_rows_and_checkpoint_are_one(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.claim("s")
    follower = engine.follower()
    follower.begin()
    follower.insert(items((1, "a", 1)))
    follower.write_checkpoint("s", AT)
    follower.rollback()
    follower.rollback()
    follower.begin()
    assert follower.read_checkpoint("s") is None
    assert follower.is_empty(ITEMS)
    follower.rollback()
    follower.close()


def test_rollback_takes_our_own_tables_along(engine: Engine) -> None:
    follower = engine.follower()
    for _ in range(2):
        follower.begin()
        assert follower.claim("s") == 1
        follower.rollback()
    follower.close()


def test_what_was_not_committed_is_gone_after_close(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
    follower = engine.follower()
    follower.begin()
    follower.insert(items((1, "a", 1)))
    follower.close()
    assert seen(engine, ITEMS) == []


def test_a_database_that_is_no_follower_has_no_checkpoints(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
    store = engine.store()
    assert store.checkpoints() == {}
    store.close()


def test_relations_are_kept_per_stream(engine: Engine) -> None:
    enum = replace(KEYLESS, id=2, types=(TypeDescription(16400, "s", "m", "enum", 0, ("é", '"')),))
    with working(engine) as follower:
        assert follower.read_relations("s") == {}
        follower.write_relation("s", ITEMS)
        follower.write_relation("s", replace(ITEMS, name="renamed"))
        follower.write_relation("s", enum)
        follower.write_relation("other", ITEMS)
    with working(engine) as follower:
        assert follower.read_relations("s") == {1: replace(ITEMS, name="renamed"), 2: enum}


def test_savepoints(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(ITEMS)
        if not engine.savepoints:
            with pytest.raises(NotImplementedError):
                follower.savepoint()
            with pytest.raises(NotImplementedError):
                follower.rollback_to_savepoint()
            return
        follower.insert(items((1, "a", 1)))
        follower.savepoint()
        follower.insert(items((2, "b", 2)))
        follower.savepoint()
        for _ in range(2):
            follower.insert(items((3, "c", 3)))
            follower.claim("s")
            follower.rollback_to_savepoint()
        assert follower.claim("s") == 1
    assert seen(engine, ITEMS) == [b"1\ta\t1", b"2\tb\t2"]
    follower = engine.follower()
    follower.begin()
    follower.savepoint()
    follower.rollback()
    follower.begin()
    follower.savepoint()
    follower.commit()
    follower.close()


# Tables.


def test_columns_and_emptiness(engine: Engine) -> None:
    with working(engine) as follower:
        assert follower.columns(ITEMS) is None
        follower.create(ITEMS)
        assert list(follower.columns(ITEMS) or {}) == ["id", "v", "n"]
        assert follower.is_empty(ITEMS)
        follower.insert(items((1, "a", 1)))
        assert not follower.is_empty(ITEMS)
        follower.truncate([ITEMS], cascade=True, restart_identity=True)
        assert follower.is_empty(ITEMS)
        follower.insert(items((1, "b", 1)))
    assert seen(engine, ITEMS) == [b"1\tb\t1"]


HOSTILE = [
    "q\"uo'te; DROP TABLE t; --",
    "new\nline\ttab",
    "%s $1 ? :a {}",
    "é" * 31,
    "dot.ted",
    "select",
    " ",
    "\\",
    "🐘",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(engine: Engine, name: str) -> None:
    columns = (Column(name, INT4, key=True), Column(f"{name[:20]}2", TEXT))
    plain, inside = table(*columns, name=name), table(*columns, name=name, schema=name[::-1])
    with working(engine) as follower:
        for count, relation in enumerate((plain, inside), 1):
            follower.create(relation)
            rows = RowSet(relation, b"bb", (0, 1), [(i4(k), text(name)) for k in range(3)])
            follower.insert(rows)
            follower.insert(replace(rows, rows=rows.rows[:count]), replace=True)
            follower.update(RowSet(relation, b"bb", (1,), [(text("x"),)], (0,), [(i4(0),)]))
            follower.delete(RowSet(relation, b"bb", match=(0,), matches=[(i4(count),)]))
            assert list(follower.columns(relation) or {}) == [name, f"{name[:20]}2"]
        follower.claim(name)
        follower.write_checkpoint(name, AT)
    assert len(seen(engine, plain)) == len(seen(engine, inside)) == 2
    assert seen(engine, plain) != seen(engine, inside)


def test_tables_of_two_schemas_do_not_meet(engine: Engine) -> None:
    names = [("public", "a.b"), ("a", "b"), ("a.b", "c"), ("a", "b.c"), ("public", "b")]
    relations = [table(Column("id", INT4, key=True), schema=schema, name=name) for schema, name in names]
    with working(engine) as follower:
        for number, relation in enumerate(relations):
            assert follower.columns(relation) is None
            follower.create(relation)
            follower.insert(RowSet(relation, b"b", (0,), [(i4(number),)]))
    assert [seen(engine, relation) for relation in relations] == [[str(n).encode()] for n in range(5)]


@pytest.mark.parametrize(
    "wrong",
    [table(Column("id", INT4, key=True), name="nowhere"), table(Column("id", INT4, key=True), Column("w", TEXT))],
    ids=["table", "column"],
)
def test_a_missing_table_or_column_is_a_schema_error(engine: Engine, wrong: Relation) -> None:
    last = (len(wrong.columns) - 1,)
    new = i4(1) if last == (0,) else text("x")
    attempts: list[Callable[[Follower], object]] = [
        lambda f: f.insert(RowSet(wrong, b"bb", last, [(new,)])),
        lambda f: f.update(RowSet(wrong, b"bb", last, [(new,)], last, [(new,)])),
        lambda f: f.delete(RowSet(wrong, b"bb", match=last, matches=[(new,)])),
        lambda f: f.delete(RowSet(wrong, b"bb", match=last, matches=[(new,)], unique=False)),
    ]
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(items((1, "a", 1)))
    for attempt in attempts:
        with pytest.raises(SchemaError, match=r"public\.(nowhere|t)"), working(engine) as follower:
            attempt(follower)
    with pytest.raises(SchemaError):
        looked(engine, wrong)


def test_creating_a_table_that_is_there_is_a_schema_error(engine: Engine) -> None:
    with pytest.raises(SchemaError, match=r"public\.t"), working(engine) as follower:
        follower.create(ITEMS)
        follower.create(ITEMS)


# Schema changes.


def evolved(
    engine: Engine, before: Relation, after: Relation, change: SchemaChange, *rows: tuple[bytes, ...]
) -> list[bytes]:
    """The lines after ``change`` met a table holding ``rows``."""
    forms = b"b" * len(before.columns)
    with working(engine) as follower:
        follower.create(before)
        follower.insert(RowSet(before, forms, tuple(range(len(forms))), list(rows)))
    with working(engine) as follower:
        follower.evolve(after, change)
        assert list(follower.columns(after) or {}) == [column.name for column in after.columns]
    return seen(engine, after)


ROWS = [(i4(1), text("a"), i4(1)), (i4(2), NULL, NULL)]
MORE = Column("more", NUMERIC, 10 << 16 | 2 + 4, missing="1.50")


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (MORE, b"1.50"),
        (Column("more", TEXT), b"\\N"),
        (Column("more", TEXT, missing="it's"), b"it's"),
        (Column("more", BOOL, missing="t", not_null=True), b"t"),
        (Column("more", FLOAT8, missing="-Infinity"), b"-Infinity"),
        (Column("more", FLOAT8, missing="NaN"), b"NaN"),
        (Column("more", FLOAT8, missing="-0"), b"-0"),
        (Column("more", 17, missing="\\x00ff"), b"\\\\x00ff"),
        (Column("more", 1184, missing="2024-01-01 00:00:00+00"), b"2024-01-01 00:00:00+00"),
    ],
)
def test_add_column(engine: Engine, column: Column, shown: bytes) -> None:
    after = replace(ITEMS, columns=(*ITEMS.columns, column))
    lines = evolved(engine, ITEMS, after, AddColumn(column), *ROWS)
    assert lines == [b"1\ta\t1\t" + shown, b"2\t\\N\t\\N\t" + shown]


def test_rows_of_the_same_transaction_meet_the_new_column(engine: Engine) -> None:
    column = Column("more", TEXT, missing="old")
    after = replace(ITEMS, columns=(*ITEMS.columns, column))
    with working(engine) as follower:
        follower.create(ITEMS)
        follower.insert(items((1, "a", 1), (2, "b", 2)))
    with working(engine) as follower:
        follower.insert(items((3, "c", 3)))
        follower.update(change((1,), (2, (text("B"),))))
        follower.evolve(after, AddColumn(column))
        follower.insert(RowSet(after, b"bbbb", (0, 3), [(i4(4), text("new")), (i4(5), NULL)]))
        follower.update(RowSet(after, b"bbbb", (3,), [(text("changed"),)], (0,), [(i4(1),)]))
        follower.delete(RowSet(after, b"bbbb", match=(0,), matches=[(i4(3),)]))
    assert seen(engine, after) == [
        b"1\ta\t1\tchanged",
        b"2\tB\t2\told",
        b"4\t\\N\t\\N\tnew",
        b"5\t\\N\t\\N\t\\N",
    ]


def test_a_column_whose_old_values_the_log_lacks(engine: Engine) -> None:
    column = Column("more", INT4, not_null=True)
    after = replace(ITEMS, columns=(*ITEMS.columns, column))
    with pytest.raises(SchemaError, match="more") as caught:
        evolved(engine, ITEMS, after, AddColumn(column), *ROWS)
    assert "ALTER TABLE" in caught.value.remedy
    assert len(seen(engine, ITEMS)) == 2
    with working(engine) as follower:
        follower.truncate([ITEMS], cascade=False, restart_identity=False)
        follower.evolve(after, AddColumn(column))
    assert seen(engine, after) == []


def test_drop_column(engine: Engine) -> None:
    after = replace(ITEMS, columns=(ITEMS.columns[0], ITEMS.columns[2]))
    assert evolved(engine, ITEMS, after, DropColumn("v"), *ROWS) == [b"1\t1", b"2\t\\N"]


def test_drop_column_before_the_key(engine: Engine) -> None:
    before = replace(ITEMS, columns=(ITEMS.columns[1], ITEMS.columns[0]))
    after = replace(ITEMS, columns=(ITEMS.columns[0],))
    assert evolved(engine, before, after, DropColumn("v"), (text("a"), i4(1)), (NULL, i4(2))) == [b"1", b"2"]
    with pytest.raises(ConflictError), working(engine) as follower:
        follower.insert(RowSet(after, b"b", (0,), [(i4(2),)]))


def test_drop_the_key(engine: Engine) -> None:
    after = Relation(1, "public", "t", "d", ITEMS.columns[1:])
    assert evolved(engine, ITEMS, after, DropColumn("id"), *ROWS) == [b"\\N\t\\N", b"a\t1"]


def test_rename_column(engine: Engine) -> None:
    after = replace(ITEMS, columns=(Column("key", INT4, key=True), *ITEMS.columns[1:]), primary_key=("key",))
    assert evolved(engine, ITEMS, after, RenameColumn("id", "key"), *ROWS) == [b"1\ta\t1", b"2\t\\N\t\\N"]
    with working(engine) as follower:
        assert follower.insert(items((2, "b", 2), relation=after), replace=True) == 1
    assert seen(engine, after) == [b"1\ta\t1", b"2\tb\t2"]


@pytest.mark.parametrize(("schema", "name"), [("public", "u"), ("other", "t"), ("other", "u.v")])
def test_rename_table_and_move_it_back(engine: Engine, schema: str, name: str) -> None:
    after = replace(ITEMS, schema=schema, name=name)
    assert evolved(engine, ITEMS, after, RenameTable(ITEMS), *ROWS) == [b"1\ta\t1", b"2\t\\N\t\\N"]
    with working(engine) as follower:
        assert follower.columns(ITEMS) is None
        follower.evolve(ITEMS, RenameTable(after))
        follower.insert(items((3, "c", 3)))
    assert len(seen(engine, ITEMS)) == 3


def numeric(precision: int, scale: int) -> Column:
    return Column("n", NUMERIC, (precision << 16 | scale) + 4)


@pytest.mark.parametrize(
    ("old", "new", "given", "shown"),
    [
        (Column("n", INT4), Column("n", INT8), i4(7), b"7"),
        (Column("n", INT4), Column("n", TEXT), i4(7), b"7"),
        (Column("n", INT4), Column("n", NUMERIC), i4(7), b"7"),
        (Column("n", INT4), numeric(5, 2), i4(-7), b"-7.00"),
        (Column("n", INT4), Column("n", FLOAT8), i4(7), b"7"),
        (Column("n", VARCHAR, 7), Column("n", VARCHAR, 9), text("abc"), b"abc"),
        (Column("n", VARCHAR, 7), Column("n", TEXT), text("abc"), b"abc"),
    ],
)
def test_change_type(engine: Engine, old: Column, new: Column, given: bytes, shown: bytes) -> None:
    before = table(Column("id", INT4, key=True), old)
    after = table(Column("id", INT4, key=True), new)
    assert evolved(engine, before, after, ChangeType(old, new), (i4(1), given), (i4(2), NULL)) == [
        b"1\t" + shown,
        b"2\t\\N",
    ]


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        (numeric(5, 2), numeric(9, 2), b"1.50"),
        (numeric(5, 2), numeric(9, 4), b"1.5000"),
        (numeric(5, 2), Column("n", NUMERIC), b"1.50"),
        (numeric(5, 2), Column("n", TEXT), b"1.50"),
    ],
)
def test_change_numeric(engine: Engine, old: Column, new: Column, shown: bytes) -> None:
    before, after = table(Column("id", INT4, key=True), old), table(Column("id", INT4, key=True), new)
    with working(engine) as follower:
        follower.create(before)
        follower.insert(RowSet(before, b"tt", (0, 1), [(text("1"), text("1.50"))]))
        follower.evolve(after, ChangeType(old, new))
    assert seen(engine, after) == [b"1\t" + shown]


def test_change_the_type_of_the_key(engine: Engine) -> None:
    new = Column("id", INT8, key=True)
    after = replace(ITEMS, columns=(new, *ITEMS.columns[1:]))
    evolved(engine, ITEMS, after, ChangeType(ITEMS.columns[0], new), *ROWS)
    with working(engine) as follower:
        big = value(struct.pack("!q", 1 << 40))
        assert follower.insert(RowSet(after, b"bbb", (0,), [(big,)])) == 1
    assert seen(engine, after) == [b"1\ta\t1", f"{1 << 40}\t\\N\t\\N".encode(), b"2\t\\N\t\\N"]


def test_a_type_change_that_cannot_be_followed(engine: Engine) -> None:
    old, new = Column("v", TEXT), Column("v", INT4)
    after = replace(ITEMS, columns=(ITEMS.columns[0], new, ITEMS.columns[2]))
    with pytest.raises(SchemaError, match=r"public\.t\.v") as caught:
        evolved(engine, ITEMS, after, ChangeType(old, new), *ROWS)
    assert "ALTER TABLE" in caught.value.remedy
    assert seen(engine, ITEMS) == [b"1\ta\t1", b"2\t\\N\t\\N"]
    with working(engine) as follower:
        follower.truncate([ITEMS], cascade=False, restart_identity=False)
        follower.evolve(after, ChangeType(old, new))
        follower.insert(RowSet(after, b"bbb", (0, 1), [(i4(1), i4(2))]))
    assert seen(engine, after) == [b"1\t2\t\\N"]


# What only some engines must refuse.

FOREIGN = [name for name in ENGINES if name != "postgresql"]
foreign = pytest.mark.parametrize("engine", FOREIGN, indirect=True)
MODULES = {"sqlite": sqlite, "duckdb": duckdb}
FILES = {"sqlite": "f.db", "duckdb": "f.duckdb"}


@foreign
def test_names_that_are_ours_are_refused(engine: Engine) -> None:
    ours = {"sqlite": ("public", "cdc_Checkpoint"), "duckdb": ("cdc", "Relation")}[engine.name]
    with pytest.raises(SchemaError, match=r"(?i)cdc"), working(engine) as follower:
        follower.create(table(Column("id", INT4), schema=ours[0], name=ours[1]))


def test_duckdb_has_one_schema_main(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="main"), working(_duckdb_at(tmp_path)) as follower:
        follower.create(replace(ITEMS, schema="main"))


@foreign
def test_a_table_without_columns_is_refused(engine: Engine) -> None:
    with pytest.raises(SchemaError, match="no columns"), working(engine) as follower:
        follower.create(table())


@foreign
def test_names_that_differ_in_case_only_are_refused(engine: Engine) -> None:
    with pytest.raises(SchemaError), working(engine) as follower:
        follower.create(table(Column("a", INT4), Column("A", INT4)))
    with pytest.raises(SchemaError), working(engine) as follower:
        follower.create(ITEMS)
        assert follower.columns(replace(ITEMS, name="T")) is None
        follower.create(replace(ITEMS, name="T"))


@foreign
@pytest.mark.parametrize(
    "rest", ["", "/", "//", "//host/f", "///", "///:memory:", "///f?mode=ro", "////tmp/", ":///f\0"]
)
def test_wrong_urls(engine: Engine, rest: str) -> None:
    module = MODULES[engine.name]
    for connect in (module.connect_follower, module.connect_store):
        with pytest.raises(UsageError):
            connect(f"{engine.name}:{rest}")
    with pytest.raises(UsageError):
        module.connect_follower("postgresql:///f")


@foreign
def test_relative_and_absolute_paths(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    MODULES[engine.name].connect_follower(f"{engine.name}:///sub/rel.db").close()
    MODULES[engine.name].connect_follower(f"{engine.name}:///{tmp_path}/abs.db").close()
    assert (tmp_path / "sub/rel.db").exists()
    assert (tmp_path / "abs.db").exists()


@foreign
def test_eyes_create_nothing(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no file"):
        MODULES[engine.name].connect_store(f"{engine.name}:///{tmp_path}/nothing")
    assert not (tmp_path / "nothing").exists()


@foreign
def test_something_else_is_not_taken_for_a_follower(engine: Engine, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"something else entirely, longer than any header" * 1000)
    for connect in (MODULES[engine.name].connect_follower, MODULES[engine.name].connect_store):
        with pytest.raises(CdcError) as caught:
            connect(f"{engine.name}:///{other}")
        assert caught.value.exit_code in (74, 78)
    with pytest.raises(LocalIOError):
        MODULES[engine.name].connect_follower(f"{engine.name}:///{tmp_path}/no/such/directory/f")


@foreign
def test_declared_types_are_printed_as_they_are_declared(engine: Engine) -> None:
    columns = [
        Column(f"c{oid}", oid) for oid in (16, 17, 20, 21, 23, 25, 26, 114, 700, 701, 1082, 1083, 1114, 1184, 2950)
    ]
    relation = table(*columns, numeric(10, 2))
    with working(engine) as follower:
        follower.create(relation)
        assert follower.columns(relation) == declarations(relation, engine.name)


KILLED = """
import os, signal, sys
from tests.contract.test_follower import AT, ITEMS, MODULES, items
follower = MODULES[sys.argv[1]].connect_follower(sys.argv[2])
follower.begin()
follower.create(ITEMS)
follower.claim("s")
follower.insert(items((1, "a", 1)))
follower.write_checkpoint("s", AT)
follower.commit()
follower.begin()
follower.insert(items(*((k, "lost", 1) for k in range(2, 20_000))))
os.kill(os.getpid(), signal.SIGKILL)
"""


@foreign
def test_a_killed_process_leaves_what_it_committed(engine: Engine, tmp_path: Path) -> None:
    url = f"{engine.name}:///{tmp_path}/{FILES[engine.name]}"
    ended = subprocess.run([sys.executable, "-c", KILLED, engine.name, url], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    with working(engine) as follower:
        assert follower.read_checkpoint("s") == AT
    assert seen(engine, ITEMS) == [b"1\ta\t1"]


@foreign
def test_the_row_number_may_be_hidden(engine: Engine) -> None:
    hidden = table(*(Column(name, INT4, key=True) for name in ("rowid", "oid", "_rowid_")), identity="f")
    row = (i4(1), i4(2), i4(3))
    with pytest.raises(SchemaError, match="row number"), working(engine) as follower:
        follower.create(hidden)
        follower.insert(RowSet(hidden, b"bbb", (0, 1, 2), [row]))
        follower.delete(RowSet(hidden, b"bbb", match=(0, 1, 2), matches=[row], unique=False))


def _duckdb_at(path: Path) -> Engine:
    url = f"duckdb:///{path}/f.duckdb"
    return Engine("duckdb", lambda: duckdb.connect_follower(url), lambda: duckdb.connect_store(url))


@pytest.mark.parametrize(
    ("column", "given"),
    [
        (numeric(5, 2), "NaN"),
        (Column("n", 1114), "294276-12-31 23:59:59"),
        (Column("n", 1184), "294276-12-31 23:59:59+00"),
    ],
)
def test_duckdb_stops_before_a_value_it_cannot_hold(tmp_path: Path, column: Column, given: str) -> None:
    engine, relation = _duckdb_at(tmp_path), table(Column("id", INT4, key=True), column)
    with working(engine) as follower:
        follower.create(relation)
    with pytest.raises(SchemaError, match=rf"public\.t.*{given[:6]}"), working(engine) as follower:
        follower.insert(RowSet(relation, b"tt", (0, 1), [(text("1"), text(given))]))
    assert seen(engine, relation) == []


def test_duckdb_gets_more_memory_where_wide_rows_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duckdb.DuckdbFollower, "memory_mib", 16)
    wide, engine = table(Column("id", INT4, key=True), Column("v", TEXT)), _duckdb_at(tmp_path)
    with working(engine) as follower:
        follower.create(wide)
    with pytest.raises(TransientError, match="emory") as caught, working(engine) as follower:
        follower.insert(RowSet(wide, b"bb", (0, 1), [(i4(1), text("x" * (16 << 20)))]))
    assert "four times" in caught.value.remedy
    for _ in range(4):
        with suppress(TransientError), working(engine) as follower:
            assert follower.insert(RowSet(wide, b"bb", (0, 1), [(i4(1), text("x" * (16 << 20)))])) == 1
            break
    [(key, line)] = looked(engine, wide)
    assert (key, len(line)) == (b"1", 2 + (16 << 20))


def test_duckdb_forgets_a_commit_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duckdb.DuckdbFollower, "memory_mib", 40)
    wide, engine = table(Column("id", INT4, key=True), Column("v", TEXT)), _duckdb_at(tmp_path)
    rows: list[tuple[bytes, ...]] = [(i4(number), text("x" * (1 << 20))) for number in range(100)]
    follower = engine.follower()
    follower.begin()
    follower.create(wide)
    follower.commit()
    follower.begin()
    follower.insert(RowSet(wide, b"bb", (0, 1), rows))
    with pytest.raises(TransientError, match="commit"):
        follower.commit()
    follower.rollback()
    follower.begin()
    assert follower.is_empty(wide)
    assert follower.insert(RowSet(wide, b"bb", (0, 1), rows)) == 100
    follower.commit()
    follower.close()
    assert len(seen(engine, wide)) == 100


def test_duckdb_belongs_to_one_process(tmp_path: Path) -> None:
    holder = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(tmp_path / "f.duckdb")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdin
        assert other.stdout.readline() == b"open\n"
        for connect in (_duckdb_at(tmp_path).follower, _duckdb_at(tmp_path).store):
            with pytest.raises(UnavailableError, match="lock") as caught:
                connect()
            assert "one process" in caught.value.remedy
        other.stdin.close()
    _duckdb_at(tmp_path).follower().close()


def test_sqlite_waits_for_the_lock_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_BUSY_WAIT_S", 0.05)
    url = f"sqlite:///{tmp_path}/f.db"
    first, second = sqlite.connect_follower(url), sqlite.connect_follower(url)
    first.begin()
    with pytest.raises(TransientError, match="locked"):
        second.begin()
    first.commit()
    second.begin()
    second.rollback()
    first.close()
    second.close()


def test_sqlite_readers_see_the_last_commit_meanwhile(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/f.db"
    follower = sqlite.connect_follower(url)
    follower.begin()
    follower.create(ITEMS)
    follower.commit()
    follower.begin()
    follower.insert(items((1, "a", 1)))
    store = sqlite.connect_store(url)
    assert list(store.lines(ITEMS)) == []
    follower.commit()
    assert list(store.lines(ITEMS)) == [(b"1", b"1\ta\t1")]
    store.close()
    follower.close()


def test_a_full_disk_leaves_sqlite_as_it_was(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/f.db"
    follower = sqlite.connect_follower(url)
    follower.begin()
    follower.create(ITEMS)
    follower.insert(items((1, "a", 1)))
    follower.commit()
    follower.run("PRAGMA max_page_count = 10")
    follower.begin()
    with pytest.raises(LocalIOError, match="full"):
        follower.insert(items(*((k, "x" * 100, k) for k in range(2, 2000))))
    follower.rollback()
    follower.close()
    store = sqlite.connect_store(url)
    assert list(store.lines(ITEMS)) == [(b"1", b"1\ta\t1")]
    store.close()


def test_sqlite_is_durable_by_default(tmp_path: Path) -> None:
    follower = sqlite.connect_follower(f"sqlite:///{tmp_path}/f.db")
    assert follower.run("PRAGMA synchronous") == [(2,)]
    assert follower.run("PRAGMA journal_mode") == [("wal",)]
    follower.close()


def test_sqlite_keeps_floats_as_numbers(tmp_path: Path) -> None:
    relation = table(Column("id", INT4, key=True), Column("f", FLOAT4), Column("n", NUMERIC))
    follower = sqlite.connect_follower(f"sqlite:///{tmp_path}/f.db")
    follower.begin()
    follower.create(relation)
    follower.insert(RowSet(relation, b"bbt", (0, 1, 2), [(i4(1), value(struct.pack("!f", 0.1)), text("1.00"))]))
    follower.commit()
    follower.close()
    with sqlite3.connect(tmp_path / "f.db") as connection:
        assert connection.execute("SELECT f, typeof(f), n, typeof(n) FROM t").fetchall() == [
            (0.1, "real", "1.00", "text")
        ]
    connection.close()
