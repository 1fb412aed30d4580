"""Kafka beside the embedded broker, in one run: ``python -m benchmarks.kafka --kafka kafka://host:port/``.

Rows per second into and out of the topic, start-up included, for each part of the workload; where the time goes; and
how long after its COMMIT a transaction can be read from the topic. The topics are left behind, to be removed after an
hour. The machine may be noisy: only what stands side by side is comparable.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from typing import Final, NamedTuple

import psycopg

from benchmarks.common import Child, Cost, cdc, sql, timed, transactions
from cdc import registry
from cdc.codec import EnvelopeCodec
from cdc.ports import Broker
from cdc.position import Position
from cdc.record import Format, Transaction
from cdc.stores.embedded import EmbeddedPostgres

TABLE: Final = "CREATE TABLE t (id int PRIMARY KEY, a int, b text, c timestamptz DEFAULT now())"
_WRITERS: Final = 4
_READ_BYTES: Final = 4 << 20


class Part(NamedTuple):
    """One part of the workload: ``statement`` so many ``times``, which changes ``rows`` rows in all."""

    name: str
    statement: str
    times: int
    rows: int


PARTS: Final = (
    Part(
        "one insert of 500,000 rows",
        "INSERT INTO t SELECT g, g %% 100, 'row number ' || g FROM generate_series(1, 500000) g",
        1,
        500_000,
    ),
    Part("100,000 updates of one row", "UPDATE t SET a = a + 1 WHERE id = %(n)s", 100_000, 100_000),
    Part(
        "40,000 inserts of ten rows",
        "INSERT INTO t SELECT 1000000 + 10 * %(n)s + g, g, 'row number ' || g FROM generate_series(0, 9) g",
        40_000,
        400_000,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kafka", default=os.environ.get("CDC_KAFKA_URL"), help="by default that of CDC_KAFKA_URL")
    parser.add_argument("--rounds", type=int, default=2, help="how often (default 2)")
    parser.add_argument("--seconds", type=int, default=10, help="of transactions whose lag is measured (default 10)")
    parser.add_argument("--rate", type=int, default=1000, help="of those transactions a second (default 1000)")
    arguments = parser.parse_args()
    if not arguments.kafka:
        print("no kafka to measure: name one with --kafka or CDC_KAFKA_URL")
        return
    settings = {"max_wal_size": "4GB", "max_wal_senders": "20", "max_replication_slots": "20", "autovacuum": "off"}
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedPostgres(18, settings=settings) as leader,
        EmbeddedPostgres(18, settings=settings) as follower,
    ):
        for number in range(arguments.rounds):
            name = f"bench{os.getpid()}_{number}"
            brokers = {"file": f"file://{directory}/{name}", "kafka": kept_for_an_hour(arguments.kafka)}
            for server in (leader, follower):
                sql(server.url(), f"CREATE DATABASE {name}")
            for result in _throughput(leader.url(name), follower, name, brokers):
                print(json.dumps(result), flush=True)
            for kind, linger_ms in (("file", 5), ("kafka", 5), ("kafka", 0)):
                lag = _Lag(leader.url(name), brokers[kind], f"{name}_{kind}", linger_ms)
                figures = lag.measure(arguments.rate, arguments.seconds)
                print(json.dumps({"lag": kind, "linger_ms": linger_ms, **figures}), flush=True)


def kept_for_an_hour(url: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}retention-ms=3600000"


# Throughput.


def _throughput(
    source: str, follower: EmbeddedPostgres, name: str, brokers: Mapping[str, str]
) -> Iterator[dict[str, object]]:
    lines = {kind: _Line(source, follower, url, f"{name}_{kind}") for kind, url in brokers.items()}
    sql(source, TABLE)
    for line in lines.values():
        line.begin()
    slot = f"{name}_read"
    cdc("setup", source, "--stream", slot)
    with closing(registry.shipper(source, Format.LOGICAL)(source, registry.Capture(slot, slot, "binary"))) as shipper:
        after = shipper.end()
    for turn, part in enumerate(PARTS):
        transactions(source, part.statement, part.times)
        kinds = list(lines)[:: 1 if turn % 2 else -1]
        for kind in kinds:
            yield {"part": part.name, "broker": kind, **lines[kind].carry(part.rows)}
        start = time.perf_counter()
        after = _read_slot(source, slot, after)
        steps = {"read the slot": time.perf_counter() - start, **_steps(lines)}
        yield {"part": part.name, "seconds": {step: round(seconds, 3) for step, seconds in steps.items()}}
    for line in lines.values():
        cdc("verify", source, line.target, "--stream", line.stream)


class _Line:
    """One leader, one broker, one follower."""

    def __init__(self, source: str, follower: EmbeddedPostgres, broker: str, stream: str) -> None:
        self.source, self.broker, self.stream = source, broker, stream
        self.target = follower.url(stream)
        self.bodies: list[bytes] = []  # of the last part
        sql(follower.url(), f"CREATE DATABASE {stream}")

    def begin(self) -> None:
        cdc("setup", self.source, "--stream", self.stream)
        self._ship()
        self._apply()

    def carry(self, rows: int) -> dict[str, object]:
        with closing(_opened(self.broker)) as broker:
            before = broker.bounds(self.stream)[1]
            shipped = self._ship()
            self.bodies = _bodies(broker, self.stream, before)
        applied = self._apply()
        return {
            **figures("ship", rows, shipped),
            **figures("apply", rows, applied),
            "topic_bytes_per_row": round(sum(map(len, self.bodies)) / rows, 1),
            "messages": len(self.bodies),
        }

    def _ship(self) -> Cost:
        return cdc("ship", self.source, self.broker, "--stream", self.stream, "--until", "now")

    def _apply(self) -> Cost:
        return cdc("apply", self.broker, self.target, "--stream", self.stream, "--until", "end")


def figures(verb: str, rows: int, cost: Cost) -> dict[str, object]:
    return {
        f"{verb}_rows_per_s": round(rows / cost.wall_s),
        f"{verb}_s": round(cost.wall_s, 2),
        f"{verb}_cpu_s": round(cost.cpu_s, 2),
        f"{verb}_peak_mb": cost.peak_mb,
    }


def _steps(lines: Mapping[str, _Line]) -> dict[str, float]:
    """Each step alone, in this process: what remains of a ship or an apply is start-up, and writing to the follower."""
    spent = {"start": timed(lambda: Child("--version").end())}
    for kind, line in lines.items():
        with closing(_opened(line.broker)) as broker:
            topic = f"{line.stream}_again"
            start = broker.append(topic, [b"warm"]) + 1
            spent[f"append to {kind}"] = timed(lambda: _append(broker, topic, line.bodies))  # noqa: B023
            spent[f"read from {kind}"] = timed(lambda: _bodies(broker, topic, start))  # noqa: B023
    codec = EnvelopeCodec()
    spent["check and open the envelopes"] = timed(lambda: [codec.decode(body) for body in lines["kafka"].bodies])
    return spent


def _read_slot(source: str, slot: str, after: Position) -> Position:
    """Read everything committed behind ``after``, as a shipper whose broker keeps nothing; returns how far."""
    capture = registry.Capture(slot, slot, "binary")
    with closing(registry.shipper(source, Format.LOGICAL)(source, capture)) as shipper:
        end = shipper.end()
        for item in shipper.stream(after, wait_s=0.005):
            if isinstance(item, Transaction):
                deque(item.runs, maxlen=0)  # a bundle is read already
            if item.position >= end:
                break
        shipper.confirm(end)
    return end


def _append(broker: Broker, topic: str, bodies: list[bytes]) -> None:
    for body in bodies:
        broker.append(topic, [body])


def _bodies(broker: Broker, topic: str, offset: int) -> list[bytes]:
    """Everything from ``offset`` to the topic's present end."""
    end = broker.bounds(topic)[1]
    bodies: list[bytes] = []
    while offset < end:
        for message in broker.read(topic, offset, limit_bytes=_READ_BYTES, wait_s=1):
            bodies.append(message.body)
            offset = message.offset + 1
    return bodies


def _opened(url: str) -> Broker:
    return registry.broker(url)(url, create=True)


# Lag.


class _Lag:
    """From COMMIT's return at the client until a reader of the topic has the transaction."""

    def __init__(self, source: str, broker: str, stream: str, linger_ms: int) -> None:
        self._source, self._broker, self._stream, self._linger_ms = source, broker, stream, linger_ms
        self._seen: dict[int, float] = {}
        self._messages = 0
        self._done = threading.Event()

    def measure(self, rate: int, seconds: int) -> dict[str, object]:
        cdc("ship", self._source, self._broker, "--stream", self._stream, "--until", "now")
        options = ("--stream", self._stream, "--linger-ms", str(self._linger_ms), "--quiet")
        with closing(_opened(self._broker)) as broker, ThreadPoolExecutor(1) as threads:
            reader = threads.submit(self._read, broker, broker.bounds(self._stream)[1])
            shipper = Child("ship", self._source, self._broker, *options)
            try:
                time.sleep(3)
                with ProcessPoolExecutor(1, get_context("spawn")) as processes:
                    committed = processes.submit(commit, self._source, rate, seconds).result()
                time.sleep(2)
            finally:
                self._done.set()
                cost = shipper.end(stop=True)
            reader.result()
        lags_ms = sorted(1000 * (self._seen[xid] - at) for xid, at in committed.items())
        return {
            "transactions_per_s": round(len(lags_ms) / (max(committed.values()) - min(committed.values()))),
            **{f"p{part}_ms": round(lags_ms[len(lags_ms) * part // 100], 1) for part in (50, 90, 99)},
            "max_ms": round(lags_ms[-1], 1),
            "messages": self._messages,
            "ship_cpu_s": round(cost.cpu_s, 2),
            "ship_peak_mb": cost.peak_mb,
        }

    def _read(self, broker: Broker, offset: int) -> None:
        codec = EnvelopeCodec()
        while not self._done.is_set():
            for message in broker.read(self._stream, offset, limit_bytes=_READ_BYTES, wait_s=0.5):
                now = time.time()
                self._messages += 1
                self._seen |= {head.xid: now for head in codec.decode(message.body).transactions}
                offset = message.offset + 1


def commit(source: str, rate: int, seconds: int) -> dict[int, float]:
    """Commit that many one-row transactions a second, in a process of its own: when each COMMIT returned, by xid."""
    with ThreadPoolExecutor(_WRITERS) as threads:
        parts = [
            threads.submit(_commit, source, rate / _WRITERS, seconds, 10_000 * number) for number in range(_WRITERS)
        ]
        return {xid: at for part in parts for xid, at in part.result().items()}


def _commit(source: str, rate: float, seconds: int, first: int) -> dict[int, float]:
    committed: dict[int, float] = {}
    with psycopg.connect(source, autocommit=True) as connection:
        start = time.monotonic()
        for number in range(int(rate * seconds)):
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
            row = connection.execute(
                "UPDATE t SET a = a + 1 WHERE id = %s RETURNING pg_current_xact_id()::text", [first + number + 1]
            ).fetchone()
            assert row is not None
            committed[int(row[0])] = time.time()
    return committed


if __name__ == "__main__":
    main()
