"""Portable events beside the native stream, in one run: ``python -m benchmarks.events --kafka kafka://host:port/``.

Rows per second into and out of Kafka's topics, start-up included, for each part of the workload; what a row weighs
there, and the most memory that the process held. Schemas and transactions are on, as by default. The topics are
left behind, to be removed after an hour. The machine may be noisy: only what stands side by side is comparable.
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Final

from benchmarks.common import Cost, cdc, sql, transactions
from benchmarks.kafka import PARTS, TABLE, figures, kept_for_an_hour
from cdc import registry
from cdc.stores.embedded import EmbeddedPostgres

_EVENTS: Final = ("--codec", "debezium-json")
_SAMPLE_BYTES: Final = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kafka", default=os.environ.get("CDC_KAFKA_URL"), help="by default that of CDC_KAFKA_URL")
    parser.add_argument("--rounds", type=int, default=2, help="how often (default 2)")
    parser.add_argument("--parts", type=int, default=len(PARTS), help="only so many of the parts")
    arguments = parser.parse_args()
    if not arguments.kafka:
        print("no kafka to measure: name one with --kafka or CDC_KAFKA_URL")
        return
    settings = {"max_wal_size": "4GB", "max_wal_senders": "20", "max_replication_slots": "20", "autovacuum": "off"}
    with EmbeddedPostgres(18, settings=settings) as leader, EmbeddedPostgres(18, settings=settings) as follower:
        for number in range(arguments.rounds):
            name = f"bench{os.getpid()}_{number}"
            for server in (leader, follower):
                sql(server.url(), f"CREATE DATABASE {name}")
            for result in _round(leader.url(name), follower, name, kept_for_an_hour(arguments.kafka), arguments.parts):
                print(json.dumps(result), flush=True)


def _round(source: str, follower: EmbeddedPostgres, name: str, broker: str, parts: int) -> Iterator[dict[str, object]]:
    lines = {
        "native": _Line(source, follower, broker, f"{name}_native", ()),
        "events": _Line(source, follower, broker, f"{name}_events", _EVENTS),
    }
    sql(source, TABLE)
    for line in lines.values():
        line.begin()
    for turn, part in enumerate(PARTS[:parts]):
        transactions(source, part.statement, part.times)
        for kind in list(lines)[:: 1 if turn % 2 else -1]:
            yield {"part": part.name, "form": kind, **lines[kind].carry(part.rows)}


class _Line:
    """One leader, one stream or prefix, one follower."""

    def __init__(
        self, source: str, follower: EmbeddedPostgres, broker: str, stream: str, options: tuple[str, ...]
    ) -> None:
        self._source, self._broker, self._stream, self._options = source, broker, stream, options
        self._target = follower.url(stream)
        sql(follower.url(), f"CREATE DATABASE {stream}")
        sql(self._target, TABLE)

    def begin(self) -> None:
        cdc("setup", self._source, "--stream", self._stream)
        self._ship()
        self._apply()

    def carry(self, rows: int) -> Mapping[str, object]:
        before = self._ends()
        shipped, ends = self._ship(), self._ends()
        size_bytes = self._sampled(before, ends)
        return {
            **figures("ship", rows, shipped),
            **figures("apply", rows, self._apply()),
            "topic_bytes_per_row": size_bytes and round(size_bytes, 1),
        }

    def _ship(self) -> Cost:
        return cdc("ship", self._source, self._broker, "--stream", self._stream, "--until", "now", *self._options)

    def _apply(self) -> Cost:
        where = ("--stream", self._stream)
        return cdc("apply", self._broker, self._target, *where, "--until", "end", *self._options)

    def _ends(self) -> int:
        with closing(registry.event_broker(self._broker)(self._broker, create=False, partitions=None)) as events:
            return sum(
                events.bounds(place)[1] for place in events.places() if place.topic == f"{self._stream}.public.t"
            )

    def _sampled(self, first: int, end: int) -> float | None:
        """Bytes of keys and values of one event, by a sample; None for the native stream, which has no such topic."""
        if first == end:
            return None
        with closing(registry.event_broker(self._broker)(self._broker, create=False, partitions=None)) as events:
            place = next(place for place in events.places() if place.topic == f"{self._stream}.public.t")
            found = events.fetch({place: first}, limit_bytes=_SAMPLE_BYTES, wait_s=5)
        return sum(len(event.key or b"") + len(event.value or b"") for event in found) / len(found)


if __name__ == "__main__":
    main()
