"""How PostgreSQL's types are declared and kept on other engines, and what that loses."""

import math
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.record import Column, Relation, TypeDescription
from cdc.sql.mapping import (
    Kind,
    conversion,
    declarations,
    key_of,
    losses,
    numeric_scale,
    postgresql_date,
    storage,
    types_of,
    writer,
)

BOOL, BYTEA, INT8, INT4, TEXT, FLOAT4, FLOAT8, VARCHAR, DATE = 16, 17, 20, 23, 25, 700, 701, 1043, 1082
TIMESTAMP, NUMERIC, UUID = 1114, 1700, 2950
INT4_ARRAY = 1007
TYPES = {
    20000: TypeDescription(20000, "public", "whole", "domain", 20001),
    20001: TypeDescription(20001, "public", "big", "domain", INT8),
    20002: TypeDescription(20002, "public", "mood", "enum", 0, ("sad",)),
    20003: TypeDescription(20003, "public", "loop", "domain", 20003),
}


def numeric(precision: int, scale: int) -> int:
    return (precision << 16 | scale & 0x7FF) + 4


@pytest.mark.parametrize(
    ("oid", "modifier", "sqlite", "duckdb"),
    [
        (BOOL, -1, "INTEGER", "BOOLEAN"),
        (INT4, -1, "INTEGER", "INTEGER"),
        (INT8, -1, "INTEGER", "BIGINT"),
        (FLOAT4, -1, "REAL", "FLOAT"),
        (FLOAT8, -1, "REAL", "DOUBLE"),
        (BYTEA, -1, "BLOB", "BLOB"),
        (NUMERIC, -1, "TEXT", "VARCHAR"),
        (NUMERIC, numeric(10, 2), "TEXT", "DECIMAL(10,2)"),
        (NUMERIC, numeric(38, 38), "TEXT", "DECIMAL(38,38)"),
        (NUMERIC, numeric(39, 2), "TEXT", "VARCHAR"),
        (NUMERIC, numeric(3, 5), "TEXT", "VARCHAR"),
        (NUMERIC, numeric(3, -2), "TEXT", "VARCHAR"),
        (VARCHAR, 14, "TEXT", "VARCHAR"),
        (DATE, -1, "TEXT", "DATE"),
        (UUID, -1, "TEXT", "UUID"),
        (INT4_ARRAY, -1, "TEXT", "VARCHAR"),
        (20000, -1, "INTEGER", "BIGINT"),
        (20002, -1, "TEXT", "VARCHAR"),
        (20003, -1, "TEXT", "VARCHAR"),
        (99999, -1, "TEXT", "VARCHAR"),
    ],
)
def test_declared_types(oid: int, modifier: int, sqlite: str, duckdb: str) -> None:
    column = Column("c", oid, modifier)
    assert storage(column, TYPES, "sqlite").declared == sqlite
    assert storage(column, TYPES, "duckdb").declared == duckdb


@given(st.integers(1, 1000), st.integers(-1000, 1000))
def test_numeric_modifiers(precision: int, scale: int) -> None:
    assert numeric_scale(numeric(precision, scale)) == (precision, scale)


def test_numeric_without_modifier() -> None:
    assert numeric_scale(-1) is None


@given(st.text(alphabet="0123456789.-+eE xXinfaNT", max_size=12))
def test_sqlite_does_not_reinterpret_what_is_kept_as_text(text: str) -> None:
    declared = storage(Column("c", NUMERIC), {}, "sqlite").declared
    with sqlite3.connect(":memory:") as connection:
        connection.execute(f"CREATE TABLE t (c {declared})")
        connection.execute("INSERT INTO t VALUES (?)", [text])
        assert connection.execute("SELECT c FROM t").fetchall() == [(text,)]
    connection.close()


@given(st.floats())
def test_sqlite_keeps_every_float(value: float) -> None:
    write = writer(Kind.FLOAT8, "sqlite")
    assert write is not None
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE t (c REAL)")
        connection.execute("INSERT INTO t VALUES (?)", [write(value)])
        [(kept,)] = connection.execute("SELECT c FROM t").fetchall()
    connection.close()
    if math.isnan(value):
        assert kept == "NaN"
    elif value == 0 and math.copysign(1, value) < 0:
        assert kept == b"-0"
    else:
        assert kept == value


@pytest.mark.parametrize(
    ("postgresql", "duckdb"),
    [
        ("0044-03-15 BC", "0044-03-15 (BC)"),
        ("0044-03-15 01:02:03.5 BC", "0044-03-15 (BC) 01:02:03.5"),
        ("0044-03-15 01:02:03+00 BC", "0044-03-15 (BC) 01:02:03+00"),
        ("2024-02-29 01:02:03+00", "2024-02-29 01:02:03+00"),
        ("-infinity", "-infinity"),
    ],
)
def test_dates_before_christ(postgresql: str, duckdb: str) -> None:
    write = writer(Kind.TIMESTAMP, "duckdb")
    assert write is not None
    assert write(postgresql) == duckdb
    assert postgresql_date(duckdb) == postgresql


@pytest.mark.parametrize(
    ("identity", "primary_key", "key"),
    [("d", (), ("a",)), ("i", (), ("a",)), ("f", (), ()), ("n", (), ()), ("f", ("b", "a"), ("b", "a"))],
)
def test_the_key(identity: str, primary_key: tuple[str, ...], key: tuple[str, ...]) -> None:
    columns = (Column("a", INT4, key=True), Column("b", INT4))
    assert key_of(Relation(1, "public", "t", identity, columns, primary_key)) == key


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (Column("c", INT8), Column("c", INT4)),
        (Column("c", TEXT), Column("c", INT4)),
        (Column("c", TEXT), Column("c", VARCHAR, 9)),
        (Column("c", VARCHAR, 9), Column("c", VARCHAR, 8)),
        (Column("c", BOOL), Column("c", TEXT)),
        (Column("c", TIMESTAMP), Column("c", DATE)),
        (Column("c", NUMERIC), Column("c", NUMERIC, numeric(5, 2))),
        (Column("c", NUMERIC, numeric(5, 2)), Column("c", NUMERIC, numeric(5, 1))),
        (Column("c", NUMERIC, numeric(5, 2)), Column("c", NUMERIC, numeric(5, 3))),
        (Column("c", NUMERIC, numeric(5, -2)), Column("c", NUMERIC, numeric(5, -2))),
        (Column("c", TIMESTAMP), Column("c", TIMESTAMP, 0)),
        (Column("c", INT4), Column("c", NUMERIC, numeric(9, -2))),
    ],
)
def test_type_changes_that_cannot_be_known(old: Column, new: Column) -> None:
    assert conversion(old, new, {}, "sqlite") is None
    if (old.modifier, new.modifier) != (numeric(5, -2), numeric(5, -2)):
        assert conversion(old, new, {}, "duckdb") is None


@pytest.mark.parametrize(
    ("kept", "old", "new", "after"),
    [
        ("1.50", numeric(5, 2), numeric(9, 4), "1.5000"),
        ("7", numeric(5, 0), numeric(9, 2), "7.00"),
        ("NaN", numeric(5, 2), numeric(9, 4), "NaN"),
        (None, numeric(5, 2), numeric(9, 4), None),
        ("1.50", numeric(5, 2), -1, "1.50"),
    ],
)
def test_numbers_kept_as_text_get_their_zeros(kept: str | None, old: int, new: int, after: str | None) -> None:
    expression = conversion(Column("c", NUMERIC, old), Column("c", NUMERIC, new), {}, "sqlite")
    assert expression is not None
    with sqlite3.connect(":memory:") as connection:
        assert connection.execute(f"SELECT {expression.replace('{}', '?1')}", [kept]).fetchall() == [(after,)]
    connection.close()


def test_enum_labels_print_alike_as_text() -> None:
    assert conversion(Column("c", 20002), Column("c", TEXT), TYPES, "sqlite") == "CAST({} AS TEXT)"


RELATION = Relation(
    1,
    "public",
    "t",
    "d",
    (
        Column("id", INT4, key=True),
        Column("v", TEXT),
        Column("amount", NUMERIC, numeric(10, 2)),
        Column("at", TIMESTAMP),
        Column("mood", 20002),
        Column("f", FLOAT8),
        Column("list", INT4_ARRAY),
    ),
    ("id",),
    tuple(TYPES.values()),
)


def test_losses_are_named_column_by_column() -> None:
    assert types_of(RELATION) == TYPES
    sqlite, duckdb = losses(RELATION, "sqlite"), losses(RELATION, "duckdb")
    assert [loss.split(":")[0].removeprefix("public.t.") for loss in sqlite] == ["amount", "at", "mood", "f", "list"]
    assert [loss.split(":")[0].removeprefix("public.t.") for loss in duckdb] == ["amount", "at", "mood", "list"]
    assert "numeric is kept as the text" in sqlite[0]
    assert "NaN" in duckdb[0]
    assert "294247" in duckdb[1]
    assert "mood is kept as the text" in duckdb[2]


def test_declarations_follow_the_columns() -> None:
    assert list(declarations(RELATION, "sqlite")) == [column.name for column in RELATION.columns]
