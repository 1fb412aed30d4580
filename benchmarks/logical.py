"""Ours beside PostgreSQL's own, in one run: ``python -m benchmarks.logical``.

Shipping: ``cdc ship --until now`` beside ``pg_recvlogical --endpos`` on two slots with the same content. Applying:
``cdc apply --until end`` beside a native subscription on the same content. Wall time, start-up included. The machine
may be noisy: only the ratios of one run mean something.
"""

import argparse
import json
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psycopg

from benchmarks.common import cdc, sql, timed, transactions, value
from cdc.stores.embedded import EmbeddedPostgres

TABLE = "CREATE TABLE t (id int PRIMARY KEY, a int, b text, c timestamptz DEFAULT now())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000, help="rows of the one large insert (default 500000)")
    parser.add_argument("--updates", type=int, default=40_000, help="one-row updates after it (default 40000)")
    parser.add_argument("--rounds", type=int, default=3, help="how often; each with both tools (default 3)")
    arguments = parser.parse_args()
    settings = {"max_wal_size": "4GB", "max_wal_senders": "20", "max_replication_slots": "20", "autovacuum": "off"}
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedPostgres(18, settings=settings) as leader,
        EmbeddedPostgres(18, settings=settings) as follower,
    ):
        for number in range(arguments.rounds):
            result = _round((leader, follower), Path(directory), number, arguments.rows, arguments.updates)
            print(json.dumps(result), flush=True)


def _round(
    servers: tuple[EmbeddedPostgres, EmbeddedPostgres], directory: Path, number: int, rows: int, updates: int
) -> dict[str, float]:
    leader, follower = servers
    name = f"bench{number}"
    for server in servers:
        sql(server.url(), f"CREATE DATABASE {name}")
    source, target = leader.url(name), follower.url(name)
    topic = f"file://{directory / name}"
    sql(source, TABLE)
    cdc("setup", source)
    cdc("ship", source, topic, "--until", "now")
    cdc("apply", topic, target, "--until", "end")
    for slot in ("received", "subscribed"):
        sql(source, f"SELECT pg_create_logical_replication_slot('{slot}{number}', 'pgoutput')")
    sql(source, f"INSERT INTO t SELECT g, g % 100, 'row number ' || g FROM generate_series(1, {rows}) g")
    transactions(source, "UPDATE t SET a = a + 1 WHERE id = %(n)s", updates)
    messages = rows + 2 + 3 * updates

    ours, theirs = _in_turn(
        number,
        lambda: cdc("ship", source, topic, "--until", "now"),
        lambda: _received(leader, name, f"received{number}", directory / "received"),
    )
    applied, subscribed = _in_turn(
        number,
        lambda: cdc("apply", topic, target, "--until", "end"),
        lambda: _subscribed(source, follower, name, number, updates),
    )
    cdc("verify", source, target)
    return {
        "messages": messages,
        "ship_messages_per_s": round(messages / ours),
        "pg_recvlogical_messages_per_s": round(messages / theirs),
        "ship_ratio": round(theirs / ours, 2),
        "changes": rows + updates,
        "apply_rows_per_s": round((rows + updates) / applied),
        "subscription_rows_per_s": round((rows + updates) / subscribed),
        "apply_ratio": round(subscribed / applied, 2),
    }


def _in_turn(number: int, ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Time both; who goes first changes from round to round."""
    if number % 2:
        second = timed(theirs)
        return timed(ours), second
    return timed(ours), timed(theirs)


def _received(leader: EmbeddedPostgres, database: str, slot: str, out: Path) -> None:
    end = value(leader.url(database), "SELECT pg_current_wal_flush_lsn()")
    subprocess.run(
        [
            str(leader.bindir / "pg_recvlogical"),
            "--dbname",
            leader.url(database),
            "--slot",
            slot,
            "--start",
            "--file",
            str(out),
            "--endpos",
            str(end),
            "--option",
            "proto_version=1",
            "--option",
            f"publication_names=cdc_{database}",
        ],
        check=True,
    )


def _subscribed(source: str, follower: EmbeddedPostgres, database: str, number: int, updates: int) -> None:
    """Until the last update is there, in a database of its own on the same server."""
    own = f"subscribed{number}"
    sql(follower.url(), f"CREATE DATABASE {own}")
    sql(follower.url(own), TABLE)
    with psycopg.connect(follower.url(own), autocommit=True) as connection:
        connection.execute(
            f"CREATE SUBSCRIPTION {own} CONNECTION '{source}' PUBLICATION cdc_{database}"
            f" WITH (copy_data = false, create_slot = false, slot_name = 'subscribed{number}', binary = true)"
        )
        while connection.execute("SELECT a FROM t WHERE id = %s", [updates]).fetchone() != (updates % 100 + 1,):
            time.sleep(0.002)
        connection.execute(f"ALTER SUBSCRIPTION {own} DISABLE")
        connection.execute(f"ALTER SUBSCRIPTION {own} SET (slot_name = NONE)")
        connection.execute(f"DROP SUBSCRIPTION {own}")


if __name__ == "__main__":
    main()
    print(f"peak memory of the largest child: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024} MB")
