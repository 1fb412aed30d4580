"""The decoder on streams of servers that run now."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from struct import pack

import psycopg
import pytest

from cdc.position import parse_lsn
from cdc.stores.embedded import EmbeddedPostgres
from cdc.wire.pgoutput import (
    Change,
    Commit,
    Insert,
    StreamAbort,
    StreamStart,
    decode,
    decode_change,
    decode_xlogdata,
    encode_status,
)
from tests.fix_postgresql import DatabaseFactory, postgres_major
from tests.wire.record_golden import SETTINGS, capture, frames, start, stream
from tests.wire.replica import PUBLISHED, assert_same_tables, messages
from tests.wire.test_pgoutput import encode, golden, told

Url = str
BINARY = {"proto_version": "1", "binary": "true", "publication_names": "live"}
PARALLEL = {"proto_version": "4", "streaming": "parallel", "publication_names": "live"}


@pytest.fixture
def url(postgres: EmbeddedPostgres, database: DatabaseFactory) -> Url:
    return database(postgres)


@pytest.fixture
def prepared(url: Url) -> Callable[[str], Url]:
    """Run some SQL, publish all tables as ``live``, make a slot of that name."""

    def prepare(schema: str) -> Url:
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute(schema.encode())
            conn.execute("create publication live for all tables")
            conn.execute("select pg_create_logical_replication_slot('live', 'pgoutput')")
        return url

    return prepare


def payloads(url: Url, options: dict[str, str]) -> list[bytes]:
    with psycopg.connect(url, autocommit=True) as conn:
        row = conn.execute("select pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    told = stream(url, "live", options, until=parse_lsn(row[0]))
    return [decode_xlogdata(frame)[3] for frame in told if frame[:1] == b"w"]


def changes(url: Url) -> list[Change]:
    return [decode_change(payload) for payload in payloads(url, BINARY) if payload[:1] in b"IUD"]


@postgres_major(16, 18)
def test_this_server_still_says_what_was_recorded(postgres: EmbeddedPostgres, url: Url) -> None:
    facts, *lines = capture(url)
    major = facts["server"] // 10000
    recorded = golden(major)[1]
    assert {line["config"] for line in lines} == set(recorded)
    for line in lines:
        config = line["config"]
        said = messages(map(bytes.fromhex, line["frames"]), int(line["options"]["proto_version"]))
        assert [encode(message) for _, _, message in said] == [raw for raw, _, _ in said]
        expected = {"generated"} if config == "v4-generated" else PUBLISHED
        assert_same_tables(facts["tables"], [message for _, _, message in said], expected)
        if "streaming" not in line["options"]:  # where blocks are cut is the server's own affair
            kinds, kinds_recorded = ([type(message) for _, _, message in what] for what in (said, told(major, config)))
            assert Counter(kinds) == Counter(kinds_recorded), config


@postgres_major(16, 18)
def test_values_go_into_binary_copy_as_they_are(prepared: Callable[[str], Url]) -> None:
    columns = "id int primary key, a text, b numeric, c timestamptz, d jsonb, e int[], f uuid, g interval, h bytea"
    url = prepared(f"create table one ({columns}); create schema other; create table other.two ({columns})")
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            """insert into one select g, repeat('ü', g), g / 7.0, timestamptz '2000-01-01' + g * interval '1 day 1 us',
            jsonb_build_object('g', g), array[g, null, -g], gen_random_uuid(), g * interval '1 month -1 hour',
            case when g % 2 = 0 then decode(repeat('00ff', g), 'hex') end from generate_series(1, 50) g"""
        )
        conn.execute("insert into one values (100, null, 'NaN', 'infinity', 'null', '{}', null, '0', '')")
        conn.execute("insert into one (id) values (-1)")
        rows = [[value for value in change.after or () if isinstance(value, bytes)] for change in changes(url)]
        body = b"".join(pack(">H", len(row)) + b"".join(row) for row in rows)
        with conn.cursor().copy("copy other.two from stdin (format binary)") as copy:
            copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8) + body + b"\xff\xff")
        left = conn.execute(
            "(table one except table other.two) union all (table other.two except table one)"
        ).fetchall()
        count = conn.execute("select count(*) from other.two").fetchone()
    assert (left, count) == ([], (52,))


@postgres_major(16, 18)
def test_a_table_as_wide_as_they_come(prepared: Callable[[str], Url]) -> None:
    width = 1600
    url = prepared("create table wide (" + ", ".join(f"c{n} int2" for n in range(width)) + ")")
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("insert into wide values (" + ", ".join(str(n) for n in range(width)) + ")")
    [change] = changes(url)
    assert change.after == [pack(">Ih", 2, n) for n in range(width)]
    assert change.forms == b"b" * width


@postgres_major(16, 18)
def test_a_transaction_streamed_while_open_and_then_rolled_back(prepared: Callable[[str], Url]) -> None:
    url = prepared("create table t (id int primary key, pad text)")
    with psycopg.connect(url, options=SETTINGS) as writer, closing(start(url, "live", PARALLEL)) as reader:
        writer.execute("insert into t select g, repeat('x', 1900) from generate_series(1, 200) g")
        came = (decode_xlogdata(frame)[3] for frame in frames(reader) if frame[:1] == b"w")
        started = decode(next(came))
        writer.rollback()
        aborted = decode(next(payload for payload in came if payload[:1] == b"A"))
    assert isinstance(started, StreamStart)
    assert isinstance(aborted, StreamAbort)
    assert aborted.abort_lsn is not None
    assert aborted.aborted_us is not None
    assert (started.first, aborted.xid, aborted.subxid) == (True, started.xid, started.xid)
    assert abs(time.time_ns() // 1000 - aborted.aborted_us) < 60_000_000


@postgres_major(16, 18)
def test_what_status_says_is_what_the_slot_keeps(prepared: Callable[[str], Url]) -> None:
    url = prepared("create table t (id int primary key)")
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("insert into t values (1)")
        said = [decode(payload) for payload in payloads(url, BINARY)]
        [end] = [message.end_lsn for message in said if isinstance(message, Commit)]
        assert len([message for message in said if isinstance(message, Insert)]) == 1
        conn.execute("select pg_terminate_backend(active_pid, 10000) from pg_replication_slots where active_pid > 0")
        with closing(start(url, "live", BINARY)) as reader:
            reader.pgconn.put_copy_data(encode_status(end, end, end, reply=True, now_us=time.time_ns() // 1000))
            reader.pgconn.flush()
            query = "select confirmed_flush_lsn = %s::pg_lsn from pg_replication_slots where slot_name = 'live'"
            # A keepalive may have been under way before the server saw what we said.
            kept = None
            for _ in range(100):
                kept = conn.execute(query, [f"{end >> 32:X}/{end & 0xFFFFFFFF:X}"]).fetchone()
                if kept == (True,):
                    break
                time.sleep(0.1)
    assert kept == (True,)
