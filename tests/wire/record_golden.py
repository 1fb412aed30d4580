"""Record what real servers say: ``python -m tests.wire.record_golden URL...``, one URL per server to record.

Each is a superuser's ``postgresql://`` URL of a scratch server with ``wal_level = logical``,
``max_prepared_transactions`` of 1 or more and at least 12 replication slots and senders. The same scenario is run once
in a database ``cdc_golden``, made anew; then every configuration that the server's version knows reads it from a slot
of its own. The result is ``golden/pg<major>.jsonl.gz``, hexadecimal in JSON lines:

- first ``{"server": 180000, "relations": {"<oid>": name}, "types": {"<oid>": name}, "tables": {name: {"columns": [..],
  "text": rows, "binary": rows}}}``, the tables as they stood at the end: the server itself is the oracle for what a
  reader of the log should end with;
- then for each configuration ``{"config": name, "options": {..}, "frames": [..]}``, the CopyData as they came.
"""

import gzip
import json
import re
import select
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.position import parse_lsn
from cdc.wire.pgoutput import decode_keepalive, encode_status

GOLDEN = Path(__file__).parent / "golden"
DATABASE = "cdc_golden"
# What the text forms of values depend on, and memory for so little that transactions of 64 kB are streamed.
SETTINGS = "-c timezone=UTC -c datestyle=ISO -c extra_float_digits=3 -c logical_decoding_work_mem=64kB"

TABLES = (
    "plain",
    "custom",
    "nothing",
    "whole",
    "indexed",
    "toasted",
    'odd "schema.Größe',
    "parent",
    "child",
    "columnless",
    "generated",
    "streamed",
    "prepared",
    "unpublished",
)

SCHEMA = """
create type mood as enum ('sad', 'ok', 'happy');
create domain positive as int check (value > 0);
create type pair as (a int, b text);
create table plain (id int primary key, name text, amount numeric(10,2), at timestamptz, ok bool, data bytea);
create table custom (id int primary key, m mood, p positive, ms mood[], c pair, v varchar(7));
create table nothing (id int, v text);
alter table nothing replica identity nothing;
create table whole (id int, v text, large text);
alter table whole replica identity full;
alter table whole alter column large set storage external;
create table indexed (id int, code text not null, v text);
create unique index indexed_code on indexed (code);
alter table indexed replica identity using index indexed_code;
create table toasted (id int primary key, small int, large text);
alter table toasted alter column large set storage external;
create schema "odd ""schema";
create table "odd ""schema"."Größe" (id int primary key, "zwölf\\" text);
create table parent (id int primary key);
create table child (id serial primary key, parent int references parent);
create table columnless ();
create table generated (id int primary key, doubled int generated always as (id * 2) stored, v text);
create table streamed (id int primary key, pad text);
create table prepared (id int primary key, pad text);
create table unpublished (id int);
create publication golden for table plain, custom, nothing, whole, indexed, toasted, "odd ""schema"."Größe", parent,
    child, columnless, generated, streamed, prepared;
"""

# One line per transaction or statement, run one by one.
SCENARIO = """
insert into plain values (1, 'one', 1.5, '2024-02-29 12:00:00.000001+00', true, '\\xdead'), (2, null, 'NaN', 'infinity', false, '')
update plain set name = 'uno' where id = 1
update plain set id = 3 where id = 2
delete from plain where id = 1
insert into custom values (1, 'happy', 7, '{sad,NULL,ok}', (1, 'x'), 'seven')
insert into nothing values (1, 'forever'), (2, null)
insert into whole values (1, 'a', repeat('w', 3000)), (2, null, 'short'), (2, null, 'short')
update whole set v = 'b' where id = 1
delete from whole where ctid = (select min(ctid) from whole where id = 2)
insert into indexed values (1, 'A', 'x'), (null, 'B', 'y')
update indexed set v = 'z' where code = 'A'
update indexed set code = 'C' where code = 'B'
delete from indexed where code = 'A'
insert into toasted values (1, 1, repeat('t', 3000)), (2, 2, 'inline')
update toasted set small = 10 where id = 1
update toasted set id = 5 where id = 1
insert into "odd ""schema"."Größe" values (1, 'Füße ☃')
insert into parent values (1), (2)
insert into child (parent) values (1), (2)
truncate parent restart identity cascade
insert into child (parent) values (null)
insert into nothing values (3, 'gone')
truncate nothing
insert into nothing values (4, 'kept')
insert into unpublished values (1)
begin; insert into unpublished values (2); truncate unpublished; commit
insert into columnless default values
insert into generated (id, v) values (1, 'g'), (2, 'h')
update generated set v = 'gg' where id = 1
select pg_logical_emit_message(false, 'loose', 'not of any transaction')
begin; select pg_logical_emit_message(true, 'bound', '\\x00ff'::bytea); insert into plain (id, name) values (4, 'with message'); commit
begin; select pg_logical_emit_message(true, 'alone', ''); commit
begin; insert into plain (id, name) values (10, 'outer'); savepoint a; insert into plain (id) values (11); rollback to a; savepoint b; insert into plain (id) values (12); release b; commit
begin; insert into plain (id) values (90); rollback
select pg_replication_origin_session_setup('upstream')
begin; select pg_replication_origin_xact_setup('1/ABCDEF', '2020-01-01'); insert into plain (id, name) values (20, 'from elsewhere'); commit
select pg_replication_origin_session_reset()
begin; insert into streamed select g, repeat('p', 1900) from generate_series(1, 60) g; savepoint a; insert into streamed select g, repeat('q', 1900) from generate_series(101, 160) g; rollback to a; insert into streamed select g, repeat('r', 1900) from generate_series(201, 260) g; delete from streamed where id = 1; update streamed set pad = 'new' where id = 2; insert into custom values (2, 'sad', 1, null, null, null); select pg_logical_emit_message(true, 'streamed', 'in a stream'); truncate child; insert into streamed select g, repeat('s', 1900) from generate_series(301, 360) g; commit
begin; insert into streamed select g, repeat('x', 1900) from generate_series(401, 480) g; rollback
begin; insert into prepared values (1, 'one'); prepare transaction 'gold one'
insert into prepared values (2, 'between')
commit prepared 'gold one'
begin; insert into prepared values (3, 'never'); prepare transaction 'gold none'
rollback prepared 'gold none'
begin; insert into prepared select g, repeat('b', 1900) from generate_series(11, 70) g; prepare transaction 'gold big'
commit prepared 'gold big'
alter table plain add column extra int not null default 7
update plain set name = 'has extra' where id = 3
alter table plain rename column name to title
insert into plain (id, title) values (30, 'renamed')
alter table plain drop column data
insert into plain (id, title) values (31, 'dropped')
"""  # noqa: E501

CONFIGS: dict[str, tuple[int, dict[str, str]]] = {  # name: (first server that knows it, options)
    "v1-text": (15, {"proto_version": "1"}),
    "v1-binary": (15, {"proto_version": "1", "binary": "true"}),
    "v1-messages": (15, {"proto_version": "1", "messages": "true"}),
    "v2-streaming-text": (15, {"proto_version": "2", "streaming": "on"}),
    "v2-streaming-binary": (15, {"proto_version": "2", "streaming": "on", "binary": "true", "messages": "true"}),
    "v3-two-phase": (15, {"proto_version": "3", "two_phase": "on", "messages": "true"}),
    "v3-two-phase-streaming": (15, {"proto_version": "3", "two_phase": "on", "streaming": "on", "messages": "true"}),
    "v4-parallel": (16, {"proto_version": "4", "streaming": "parallel", "binary": "true", "messages": "true"}),
    "v4-parallel-two-phase": (
        16,
        {"proto_version": "4", "streaming": "parallel", "two_phase": "on", "binary": "true", "messages": "true"},
    ),
    "v4-streaming-on": (16, {"proto_version": "4", "streaming": "on"}),
    "v4-origin-none": (16, {"proto_version": "4", "origin": "none"}),
    "v4-generated": (18, {"proto_version": "4", "binary": "true", "publication_names": "golden_generated"}),
}


def record(url: str) -> Path:
    """Record one server; returns the file written."""
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(f"drop database if exists {DATABASE} with (force)")
        admin.execute(f"create database {DATABASE} template template0 encoding 'UTF8'")
        lines = list(capture(make_conninfo(url, dbname=DATABASE)))
        admin.execute(f"drop database {DATABASE} with (force)")
        path = GOLDEN / f"pg{admin.info.server_version // 10000}.jsonl.gz"
    body = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(body.encode(), mtime=0))
    return path


def capture(url: str) -> Iterator[dict[str, Any]]:
    """Run the scenario in the empty database of ``url``; yields the lines of a recording."""
    with psycopg.connect(url, autocommit=True, options=SETTINGS) as conn:
        major = conn.info.server_version // 10000
        configs = {name: options for name, (since, options) in CONFIGS.items() if major >= since}
        _prepare(conn, configs)
        for statement in SCENARIO.strip().splitlines():
            conn.execute(statement.encode())
        end = parse_lsn(_one(conn, "select pg_current_wal_insert_lsn()::text"))
        conn.execute("select pg_logical_emit_message(true, 'flush', '')")
        yield _facts(conn)
        for name, options in configs.items():
            frames = stream(url, _slot(name), {"publication_names": "golden", **options}, until=end)
            yield {"config": name, "options": options, "frames": [frame.hex() for frame in frames]}
        mine = "from pg_replication_slots where database = current_database()"
        conn.execute(f"select pg_terminate_backend(active_pid, 10000) {mine} and active".encode())
        conn.execute(f"select pg_drop_replication_slot(slot_name) {mine}".encode())
        conn.execute("select pg_replication_origin_drop('upstream')")


def _slot(config: str) -> str:
    return "golden_" + config.replace("-", "_")


def _prepare(conn: psycopg.Connection[Any], configs: dict[str, dict[str, str]]) -> None:
    conn.execute(SCHEMA.encode())
    if conn.info.server_version >= 180000:
        with_generated = "with (publish_generated_columns = stored)"
        conn.execute(f"create publication golden_generated for table generated {with_generated}".encode())
    conn.execute("select pg_replication_origin_drop(roname) from pg_replication_origin where roname = 'upstream'")
    conn.execute("select pg_replication_origin_create('upstream')")
    for name, options in configs.items():
        conn.execute(
            "select pg_create_logical_replication_slot(%s, 'pgoutput', false, %s)",
            [_slot(name), "two_phase" in options],
        )


def _facts(conn: psycopg.Connection[Any]) -> dict[str, Any]:
    relations = conn.execute("select oid::text, relname from pg_class where oid >= 16384 and relkind = 'r'").fetchall()
    types = conn.execute("select oid::text, typname from pg_type where oid >= 16384").fetchall()
    names = {name: 'odd "schema.Größe' if name == "Größe" else name for _, name in relations}
    return {
        "server": conn.info.server_version,
        "relations": {oid: names[name] for oid, name in relations},
        "types": dict(types),
        "tables": {table: _table(conn, table) for table in TABLES},
    }


def _table(conn: psycopg.Connection[Any], name: str) -> dict[str, Any]:
    *schema, table = name.rsplit(".", 1)
    query = sql.SQL("select * from {}").format(sql.Identifier(*schema, table)).as_bytes(conn)
    text, binary = (conn.pgconn.exec_params(query, None, result_format=form) for form in (0, 1))
    if text.status != psycopg.pq.ExecStatus.TUPLES_OK or binary.status != psycopg.pq.ExecStatus.TUPLES_OK:
        raise psycopg.OperationalError(text.get_error_message())
    columns = range(text.nfields)
    return {
        "columns": [(text.fname(i) or b"").decode() for i in columns],
        "text": [[_hex(text.get_value(row, i)) for i in columns] for row in range(text.ntuples)],
        "binary": [[_hex(binary.get_value(row, i)) for i in columns] for row in range(binary.ntuples)],
    }


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


def _one(conn: psycopg.Connection[Any], query: str) -> str:
    row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return str(row[0])


def stream(url: str, slot: str, options: dict[str, str], *, until: int) -> Iterator[bytes]:
    """The CopyData of a slot from where it stands, until the server says that it has sent all below ``until``."""
    with closing(start(url, slot, options)) as conn:
        for frame in frames(conn):
            yield frame
            if frame[:1] == b"k" and decode_keepalive(frame)[0] >= until:
                return


def start(url: str, slot: str, options: dict[str, str]) -> psycopg.Connection[Any]:
    """A connection on which the server streams the slot."""
    conn = psycopg.Connection.connect(
        url, replication="database", autocommit=True, options=SETTINGS, client_encoding="UTF8"
    )
    shown = ", ".join(f"{key} '{value}'" for key, value in options.items())
    started = conn.pgconn.exec_(f"START_REPLICATION SLOT {slot} LOGICAL 0/0 ({shown})".encode())
    if started.status != psycopg.pq.ExecStatus.COPY_BOTH:
        conn.close()
        raise psycopg.OperationalError(started.get_error_message())
    return conn


def frames(conn: psycopg.Connection[Any], *, timeout_s: float = 60) -> Iterator[bytes]:
    """CopyData as they come; in a pause the server is asked where it is, so that a keepalive comes.

    :raises TimeoutError: the caller still wanted more after ``timeout_s`` seconds.
    """
    server, deadline = conn.pgconn, time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        size, frame = server.get_copy_data(1)
        if size > 0:
            yield bytes(frame)
        elif size < 0:
            raise psycopg.OperationalError("the server ended the stream")
        elif select.select([server.socket], [], [], 0.2)[0]:
            server.consume_input()
        else:
            server.put_copy_data(encode_status(0, 0, 0, reply=True, now_us=time.time_ns() // 1000))
            server.flush()
    raise TimeoutError(f"what was waited for did not come in {timeout_s} s")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        written = record(argument)
        sys.stdout.write(f"{re.sub(r':[^:@/]*@', ':…@', argument)} -> {written} ({written.stat().st_size} bytes)\n")
