"""Records as `record_send` writes them: against the real server, and on bytes that nobody should send."""

import struct
import tracemalloc
from random import Random

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdc.errors import DecodeError
from cdc.stores.embedded import EmbeddedPostgres
from cdc.wire import record
from cdc.wire.record import Layout

TYPES = {"int4": 23, "text": 25, "bytea": 17, "float8": 701, "int4[]": 1007}


def made(*columns: tuple[int, bytes | None]) -> bytes:
    """A record as PostgreSQL would write it."""
    return struct.pack("!i", len(columns)) + b"".join(
        struct.pack("!Ii", oid, -1 if value is None else len(value)) + (value or b"") for oid, value in columns
    )


def pieces(*values: bytes | None) -> list[bytes]:
    return [b"n" if value is None else b"b" + struct.pack("!i", len(value)) + value for value in values]


columns = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.none() | st.binary(max_size=40)), max_size=6)


@given(columns, st.integers(0, 5), st.randoms())
def test_what_goes_in_comes_out(row: list[tuple[int, bytes | None]], count: int, dice: Random) -> None:
    oids = tuple(oid for oid, _ in row)
    values = [value for _, value in row]
    places = list(range(len(row)))
    dice.shuffle(places)
    places = places[: dice.randint(0, len(places))]
    data = made(*row) * count
    assert list(record.rows(data, Layout(oids, tuple(range(len(row)))))) == [pieces(*values)] * count
    picked = [values[place] for place in places]
    assert list(record.rows(data, Layout(oids, tuple(places)))) == [pieces(*picked)] * count
    if count:
        assert record.type_oids(data) == oids


@given(st.binary(max_size=200), columns)
def test_any_bytes_end_in_rows_or_an_error(data: bytes, row: list[tuple[int, bytes | None]]) -> None:
    layout = Layout(tuple(oid for oid, _ in row), tuple(range(len(row))))
    for hostile in (data, made(*row) + data):
        try:
            list(record.rows(hostile, layout))
        except DecodeError as error:
            assert "byte" in str(error)
        try:
            record.type_oids(hostile)
        except DecodeError as error:
            assert "byte" in str(error)


@given(columns, st.data())
def test_a_record_that_is_cut_short_is_told(row: list[tuple[int, bytes | None]], data: st.DataObject) -> None:
    whole = made(*row)
    cut = data.draw(st.integers(1, len(whole) - 1))
    layout = Layout(tuple(oid for oid, _ in row), tuple(range(len(row))))
    with pytest.raises(DecodeError):
        list(record.rows(whole[:cut], layout))


@pytest.mark.parametrize(
    "hostile",
    [
        struct.pack("!i", 2**31 - 1),
        struct.pack("!i", -1),
        struct.pack("!i", 1665),
        struct.pack("!iIi", 1, 25, 2**31 - 1),
        struct.pack("!iIi", 1, 25, -2),
        struct.pack("!iIi", 1, 26, -1),
        struct.pack("!iIiIi", 2, 25, -1, 25, -1),
    ],
)
def test_hostile_lengths_take_no_memory(hostile: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(DecodeError):
        list(record.rows(hostile, Layout((25,), (0,))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_messages() -> None:
    assert record.message(b"I", 258, b"N", pieces(b"x", None)) == b"I\0\0\1\2N\0\2b\0\0\0\1xn"
    assert record.truncate([1, 2]) == b"T\0\0\0\2\0\0\0\0\1\0\0\0\2"
    assert record.key_only(pieces(b"x", b"y"), [False, True]) == pieces(None, b"y")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.none() | st.integers(-(2**31), 2**31 - 1),
            st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30),
            st.none() | st.binary(max_size=30),
            st.none() | st.floats(),
            st.none() | st.lists(st.none() | st.integers(0, 99), max_size=4),
        ),
        max_size=4,
    )
)
def test_the_server_writes_it_so(
    postgres18: EmbeddedPostgres,
    rows: list[tuple[int | None, str | None, bytes | None, float | None, list[int] | None]],
) -> None:
    """And each value by itself, as its type sends it."""
    with psycopg.connect(postgres18.url(), autocommit=True) as connection:
        names = [f"%s::{name}" for name in TYPES]
        sent = [f"{send}(v{n})" for n, send in enumerate(("int4send", "textsend", "byteasend", "float8send"))]
        query = (
            f"SELECT record_send(ROW(v0, v1, v2, v3, v4)), {', '.join(sent)}, array_send(v4)"
            f" FROM (SELECT {', '.join(f'{name} AS v{n}' for n, name in enumerate(names))}) s"
        )
        data, expected = b"", []
        for row in rows:
            found = connection.execute(query.encode(), row).fetchone()
            assert found is not None
            data += found[0]
            expected.append(pieces(*found[1:]))
    assert list(record.rows(data, Layout(tuple(TYPES.values()), (0, 1, 2, 3, 4)))) == expected
