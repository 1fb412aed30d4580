"""COPY bodies, with PostgreSQL as the oracle."""

import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdc.errors import DecodeError
from cdc.record import NULL
from cdc.stores.embedded import EmbeddedPostgres
from cdc.wire.copy import SIGNATURE, rows, text_line

Connection = psycopg.Connection[Any]

HEADER = SIGNATURE + bytes(8)
ROW = struct.pack(">hii", 2, -1, 3) + b"abc"
BODY = HEADER + ROW + ROW + b"\xff\xff"

TEXT = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
NASTY = st.none() | st.text(st.sampled_from("\\\t\n\r\b\f\vN.tné "), max_size=6)
TABLE = st.lists(st.tuples(TEXT | NASTY, TEXT | NASTY), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def connection(postgres18: EmbeddedPostgres) -> Iterator[Connection]:
    with psycopg.connect(postgres18.url(), autocommit=True) as connection:
        connection.execute("set client_encoding = 'UTF8'")
        connection.execute("create temp table pairs (n serial, a text, b text)")
        yield connection


def value(text: str | None) -> bytes:
    return NULL if text is None else struct.pack(">i", len(text.encode())) + text.encode()


def copied(connection: Connection, statement: str) -> bytes:
    with connection.cursor() as cursor, cursor.copy(statement.encode()) as out:
        return b"".join(bytes(piece) for piece in out)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TABLE)
def test_both_forms_agree_with_the_server(connection: Connection, table: list[tuple[str | None, str | None]]) -> None:
    connection.execute("truncate pairs")
    with connection.cursor() as cursor:
        cursor.executemany("insert into pairs (a, b) values (%s, %s)", table)
    query = "copy (select a, b from pairs order by n) to stdout"
    expected = [tuple(value(text) for text in row) for row in table]
    assert list(rows(copied(connection, query + " (format binary)"), "binary")) == expected
    text = copied(connection, query)
    assert list(rows(text, "text")) == expected
    assert b"".join(text_line(row) + b"\n" for row in table) == text


def test_binary_rows() -> None:
    assert list(rows(BODY, "binary")) == [(NULL, value("abc"))] * 2
    assert list(rows(HEADER + b"\xff\xff", "binary")) == []
    extended = SIGNATURE + struct.pack(">II", 1, 3) + b"any" + ROW + b"\xff\xff"
    assert list(rows(extended, "binary")) == [(NULL, value("abc"))]


def test_text_rows() -> None:
    assert list(rows(b"", "text")) == []
    assert list(rows(b"\\N\ta\\\\\\t\\v\n", "text")) == [(NULL, value("a\\\t\v"))]


def test_text_line() -> None:
    assert text_line([None, "", "\\\t\n\r\b\f\v", "é"]) == b"\\N\t\t\\\\\\t\\n\\r\\b\\f\\v\t" + "é".encode()


@pytest.mark.parametrize("size", range(len(BODY)))
def test_every_truncation_is_refused(size: int) -> None:
    with pytest.raises(DecodeError, match="copy"):
        list(rows(BODY[:size], "binary"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"X" + BODY[1:], "signature"),
        (SIGNATURE + struct.pack(">II", 1 << 16, 0) + ROW + b"\xff\xff", "flags"),
        (SIGNATURE + struct.pack(">II", 0, 2**32 - 1) + ROW + b"\xff\xff", "extension"),
        (BODY + b"\0", "1 bytes after"),
        (HEADER + struct.pack(">h", -2), "-2 columns"),
        (HEADER + ROW + struct.pack(">hi", 1, -1) + b"\xff\xff", "1 columns at byte 32, after rows of 2"),
        (HEADER + struct.pack(">hi", 1, -2) + b"\xff\xff", "length -2"),
        (HEADER + struct.pack(">hi", 1, 2**31 - 1) + b"\xff\xff", "inside a value"),
    ],
)
def test_bad_binary(body: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        list(rows(body, "binary"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"a\tb", "inside a line"),
        (b"a\tb\na\n", "1 columns at byte 4"),
        (b"\\q\n", "escape"),
        (b"a\\\n", "escape"),
        (b"\\.\n", "escape"),
        (b"a\r\n", "carriage return in copy text at byte 1"),
    ],
)
def test_bad_text(body: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        list(rows(body, "text"))


def test_an_unknown_form() -> None:
    with pytest.raises(DecodeError, match="'csv'"):
        rows(b"", "csv")


@given(st.binary(max_size=60), st.sampled_from(["binary", "text"]))
def test_any_bytes_give_rows_or_a_decode_error(data: bytes, form: str) -> None:
    for body in (data, HEADER + data, BODY[: len(data)] + data):
        with suppress(DecodeError):
            assert all(type(one) is bytes for row in rows(body, form) for one in row)
