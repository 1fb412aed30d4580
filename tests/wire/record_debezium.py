"""Record what Debezium itself says: ``python -m tests.wire.record_debezium LIBS``.

LIBS is a directory with the jars of ``io.debezium:debezium-embedded`` and ``io.debezium:debezium-connector-postgres``
(recorded with 3.5.0.Final; leave out ``io.confluent`` and ``io.apicurio``, which are not on Maven Central). Java 17 or
later must be there. The same changes are made once with schemas and once without, each in an embedded PostgreSQL 18 of
its own, and read by Debezium's embedded engine with Connect's JsonConverter (``DebeziumRecorder.java``,
:data:`SETTINGS`) and by us. The result is ``golden_debezium/recorded_<schemas|bare>.json.gz``:

- ``ddl``, ``rows``, ``changes``: the statements; ``tables``: the rows at the end, as text;
- ``records``: topic, key, value and headers of each record, in the order told;
- ``batches``: our native batches of the same leader, in base64: an image after ``rows``, then ``changes``.
"""

import base64
import gzip
import json
import queue
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import psycopg

from cdc.brokers.embedded import EmbeddedBroker
from cdc.codec import EnvelopeCodec
from cdc.pipeline import ShipOptions, ship
from cdc.stores.embedded import EmbeddedPostgres
from shippers.postgresql.logical import LogicalShipper, Options

GOLDEN: Final = Path(__file__).parent / "golden_debezium"
_QUIET_S: Final = 6.0

SETTINGS: Final = {
    "name": "recorder",
    "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
    "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
    "plugin.name": "pgoutput",
    "topic.prefix": "p",
    "slot.name": "debezium",
    "publication.name": "pub",
    "publication.autocreate.mode": "disabled",
    "snapshot.mode": "initial",
    "provide.transaction.metadata": "true",
    "skipped.operations": "none",
    "tombstones.on.delete": "true",
    "heartbeat.interval.ms": "2000",
    "offset.flush.interval.ms": "1000",
}
"""Debezium's properties; everything else is its default."""

DDL: Final = (
    "CREATE TYPE mood AS ENUM ('sad', 'so, so', 'happy')",
    "CREATE DOMAIN positive AS int CHECK (value > 0)",
    """CREATE TABLE kinds (
        id int PRIMARY KEY, b bool NOT NULL DEFAULT false, i2 smallint, i8 bigint, o oid, f4 real, f8 double precision,
        n numeric(10, 2) NOT NULL, free numeric, m money, t text, v varchar(10), c char(4), bin bytea, d date,
        t0 time(0), t6 time, ts0 timestamp(0), ts3 timestamp(3), ts6 timestamp, tz timestamptz, ttz timetz,
        iv interval, u uuid, j json, jb jsonb, x xml, bit1 bit, bit5 bit(5), vb varbit(12), vbopen varbit,
        net inet, cid cidr, mac macaddr,
        ir int4range, tr tstzrange, p point, mo mood, po positive, tv tsvector,
        ai int[], at text[], an numeric(6, 1)[], ad date[], au uuid[], atz timestamptz[])""",
    "CREATE TABLE required (id bigint PRIMARY KEY, b bool NOT NULL, i int NOT NULL, n numeric(8, 3) NOT NULL,"
    " free numeric NOT NULL, t text NOT NULL, bin bytea NOT NULL, d date NOT NULL, tz timestamptz NOT NULL,"
    " ts timestamp NOT NULL, u uuid NOT NULL, j jsonb NOT NULL, a int[] NOT NULL, m mood NOT NULL, p point NOT NULL,"
    " iv interval NOT NULL)",
    "CREATE TABLE defaults (id serial PRIMARY KEY, i int NOT NULL DEFAULT 7, t text DEFAULT 'x', b bool DEFAULT true,"
    " n numeric(6, 2) DEFAULT 1.5, at timestamptz DEFAULT '2020-01-01 00:00:00+00', f float8 DEFAULT 2.5)",
    "CREATE TABLE pairs (a int, b text, note text, long text, PRIMARY KEY (b, a))",
    "ALTER TABLE pairs ALTER long SET STORAGE EXTERNAL",
    "CREATE TABLE whole (id int PRIMARY KEY, note text, long text)",
    "ALTER TABLE whole ALTER long SET STORAGE EXTERNAL, REPLICA IDENTITY FULL",
    "CREATE TABLE keyless (a int, note text)",
    "ALTER TABLE keyless REPLICA IDENTITY FULL",
    "CREATE TABLE toasted (id int PRIMARY KEY, note int, long text, bin bytea, doc json, words text[])",
    "ALTER TABLE toasted ALTER long SET STORAGE EXTERNAL, ALTER bin SET STORAGE EXTERNAL,"
    " ALTER doc SET STORAGE EXTERNAL, ALTER words SET STORAGE EXTERNAL",
    "CREATE TABLE emptied (id int PRIMARY KEY)",
    'CREATE TABLE "odd na%me" (id int PRIMARY KEY, "sp ace" text)',
    "CREATE PUBLICATION pub FOR ALL TABLES",
)
TABLES: Final = ("kinds", "required", "defaults", "pairs", "whole", "keyless", "toasted", "emptied", '"odd na%me"')

_KINDS: Final = (
    "INSERT INTO kinds VALUES (%d, true, -3, 9007199254740993, 4294967295, 1.5, -0.1, 12.34, 1.50, '12.34',"
    " 'naïve \"x\"', 'v', 'c', '\\x00ff', '2024-02-29', '12:34:56', '12:34:56.789012', '2024-02-29 12:34:56',"
    " '2024-02-29 12:34:56.789', '1969-12-31 23:59:59.999999', '2024-02-29 12:34:56.123456+02', '12:34:56.5+02',"
    " '1 year 2 months 3 days 04:05:06.7', '00000000-0000-0000-0000-00000000000f', '{\"a\": 1.50}',"
    " '{\"a\": [1, null]}', NULL, B'1', B'10110', B'101',"
    " B'1111000011110000', '10.0.0.1/8', '10.0.0.0/8', '08:00:2b:01:02:03', '[1,5)', '[2024-01-01,2024-02-01)',"
    " '(1,2.5)', 'so, so', 5, 'a fat cat', '{1,NULL,-3}', '{a,\"b,c\",NULL,\"\"}', '{1.5,NULL}', '{2024-01-01}',"
    " '{00000000-0000-0000-0000-00000000000f}', '{2024-01-01 00:00:00+00}')"
)
_REQUIRED: Final = (
    "INSERT INTO required VALUES (%d, true, 1, 1.5, 2.25, 't', '\\x01', '2024-01-01', '2024-01-01 00:00:00+00',"
    " '2024-01-01', gen_random_uuid(), '{}', '{1}', 'sad', '(0,0)', '1 day')"
)
ROWS: Final = (
    _KINDS % 1,
    "INSERT INTO kinds (id, n) VALUES (2, -0.01)",
    _REQUIRED % 1,
    "INSERT INTO defaults DEFAULT VALUES",
    "INSERT INTO pairs SELECT g, 'k' || g, 'n', repeat(md5(g::text), 100) FROM generate_series(1, 4) g",
    "INSERT INTO whole SELECT g, 'n', repeat(md5(g::text), 100) FROM generate_series(1, 3) g",
    "INSERT INTO keyless VALUES (1, 'a'), (2, NULL)",
    "INSERT INTO emptied VALUES (1)",
    "INSERT INTO \"odd na%me\" VALUES (1, 'x')",
)
CHANGES: Final = (
    _KINDS % 3,
    "INSERT INTO kinds (id, n, tz, ts6) VALUES (4, 99999999.99, 'infinity', '-infinity')",
    "INSERT INTO kinds (id, n, tz, f8, f4) VALUES (5, 0, '0044-03-15 12:00:00+00 BC', 'NaN', 'Infinity')",
    "UPDATE kinds SET b = NOT b, free = free * 1000000000000, i2 = NULL WHERE id IN (1, 3)",
    "UPDATE kinds SET id = 30 WHERE id = 3",
    "DELETE FROM kinds WHERE id = 2",
    _REQUIRED % 2,
    "DELETE FROM required WHERE id = 1",
    "INSERT INTO defaults (t, n) VALUES ('y', NULL)",
    "BEGIN; INSERT INTO pairs VALUES (9, 'new', NULL, NULL); UPDATE pairs SET note = 'changed' WHERE a = 1;"
    " DELETE FROM pairs WHERE a = 2; UPDATE whole SET note = 'changed' WHERE id = 1; DELETE FROM whole WHERE id = 2;"
    " COMMIT",
    "UPDATE pairs SET a = -a, long = 'short' WHERE a = 3",
    "UPDATE whole SET id = 33 WHERE id = 3",
    "UPDATE keyless SET note = 'b' WHERE a = 1",
    "DELETE FROM keyless WHERE a = 2",
    "INSERT INTO keyless VALUES (3, 'c')",
    "INSERT INTO toasted SELECT 1, 1, repeat(md5('1'), 100), decode(repeat('00ff', 2000), 'hex'),"
    " ('\"' || repeat('y', 3000) || '\"')::json, array_fill(repeat('z', 100), ARRAY[50])",
    "UPDATE toasted SET note = 2",
    "TRUNCATE emptied",
    "INSERT INTO emptied VALUES (2)",
    'UPDATE "odd na%me" SET "sp ace" = \'y\'',
    "SELECT pg_logical_emit_message(true, 'said', 'hello')",
    "SELECT pg_logical_emit_message(false, 'said', 'aside')",
)


class _Debezium:
    """The engine in a process of its own."""

    def __init__(self, libs: Path, directory: Path, settings: dict[str, str]) -> None:
        source = Path(__file__).with_name("DebeziumRecorder.java")
        subprocess.run(["javac", "-cp", f"{libs}/*", "-d", directory, source], check=True)  # noqa: S607
        properties = directory / "engine.properties"
        properties.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        command = ["java", "-cp", f"{libs}/*:{directory}", "DebeziumRecorder", str(properties)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def told(self, first_s: float) -> list[dict[str, Any]]:
        """What it says until it has been quiet for a while, but for heartbeats."""
        found: list[dict[str, Any]] = []
        heartbeats = 0
        wait_s = first_s
        while True:
            try:
                record = _record(self._lines.get(timeout=wait_s))
            except queue.Empty:
                return found
            heartbeat = record["topic"].startswith("__")
            heartbeats = heartbeats + 1 if heartbeat else 0
            if heartbeats > 3:
                return found
            if not heartbeat or not any(each["topic"] == record["topic"] for each in found):
                found.append(record)
                wait_s = _QUIET_S

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def _record(line: str) -> dict[str, Any]:
    topic, key, value, *headers = line.split()
    named = [header.partition("=") for header in headers]
    return {
        "topic": topic,
        "key": _text(key),
        "value": _text(value),
        "headers": {name: _text(content) for name, _, content in named},
    }


def _text(told: str) -> str | None:
    return None if told == "-" else base64.b64decode(told).decode()


def _run(url: str, statements: tuple[str, ...]) -> None:
    with psycopg.connect(url, autocommit=True, options="-c timezone=UTC") as connection:
        for statement in statements:
            connection.execute(statement.encode())


def _tables(url: str) -> dict[str, list[str]]:
    with psycopg.connect(url, options="-c timezone=UTC") as connection:
        return {
            table: [
                row
                for (row,) in connection.execute(f"SELECT whole_row::text FROM {table} whole_row ORDER BY 1".encode())
            ]
            for table in TABLES
        }


def _ship(url: str, broker: Path) -> None:
    ship(
        lambda: LogicalShipper.open(url, Options("pub", "ours")),
        lambda: EmbeddedBroker(broker),
        EnvelopeCodec(),
        ShipOptions("s", until_lsn="now"),
        stop=threading.Event(),
        report=lambda _: None,
    )


def _batches(broker: Path) -> list[str]:
    with closing(EmbeddedBroker(broker)) as opened:
        end = opened.bounds("s")[1]
        found = opened.read("s", 0, limit_bytes=1 << 30, wait_s=0)
        assert found[-1].offset + 1 == end
        return [base64.b64encode(message.body).decode() for message in found]


def record(libs: Path, *, schemas: bool) -> dict[str, Any]:
    with EmbeddedPostgres(18) as server, tempfile.TemporaryDirectory() as directory:
        url = server.url()
        broker = Path(directory) / "log"
        _run(url, DDL)
        _run(url, ROWS)
        _run(url, ("SELECT pg_create_logical_replication_slot('ours', 'pgoutput')",))
        _ship(url, broker)
        parts = psycopg.conninfo.conninfo_to_dict(url)
        settings = {
            **SETTINGS,
            "database.hostname": str(parts["host"]),
            "database.port": str(parts["port"]),
            "database.user": str(parts["user"]),
            "database.password": str(parts.get("password", "")),
            "database.dbname": str(parts["dbname"]),
            "key.converter.schemas.enable": str(schemas).lower(),
            "value.converter.schemas.enable": str(schemas).lower(),
            "header.converter.schemas.enable": str(schemas).lower(),
        }
        with closing(_Debezium(libs, Path(directory), settings)) as debezium:
            records = debezium.told(60)
            _run(url, CHANGES)
            records += debezium.told(30)
        _ship(url, broker)
        return {
            "ddl": DDL,
            "rows": ROWS,
            "changes": CHANGES,
            "tables": _tables(url),
            "records": records,
            "batches": _batches(broker),
        }


def main() -> None:
    libs = Path(sys.argv[1])
    for name, schemas in (("schemas", True), ("bare", False)):
        content = json.dumps(record(libs, schemas=schemas), ensure_ascii=False).encode()
        (GOLDEN / f"recorded_{name}.json.gz").write_bytes(gzip.compress(content, mtime=0))


if __name__ == "__main__":
    main()
