"""How the built-in parts are opened; see :mod:`cdc.registry`. Imports what it opens only then."""

from typing import Final

from cdc.errors import UsageError
from cdc.events import EventBroker
from cdc.ports import Follower, Shipper, Store
from cdc.registry import Capture


def open_postgresql_logical(url: str, capture: Capture) -> Shipper:
    """PostgreSQL's logical log, streamed or polled."""
    if capture.poll_s is not None:
        from shippers.postgresql import polling

        return polling.PollingShipper.open(
            url, polling.Options(capture.publication, capture.slot, capture.values, capture.poll_s)
        )
    from shippers.postgresql.logical import LogicalShipper, Options

    return LogicalShipper.open(url, Options(capture.publication, capture.slot, capture.values))


def open_postgresql_trigger(url: str, capture: Capture) -> Shipper:
    """What PostgreSQL's triggers captured.

    :raises UsageError: values are asked for as text, or polling of a slot.
    """
    from cdc.stores.postgresql.capture import schema_of
    from shippers.postgresql.trigger import TriggerShipper

    if capture.poll_s is not None:
        raise UsageError("--polling is for --format logical", remedy="leave it out: triggers need no REPLICATION")
    if capture.values != "binary":
        raise UsageError("a trigger log holds values in binary form", remedy="leave out --values text")
    return TriggerShipper.open(url, schema_of(capture.slot))


def open_kafka_events(url: str, *, create: bool, partitions: int | None) -> EventBroker:
    """Kafka's own keys, headers and partitions.

    :raises UsageError: the URL tells how many partitions, too.
    """
    from cdc.brokers.kafka.events import connect

    _, asks, query = url.partition("?")
    if partitions is not None:
        if any(part.startswith("partitions=") for part in query.split("&")):
            raise UsageError("partitions stands in the url and in --partitions", remedy="leave one of them out")
        url += f"{'&' if asks else '?'}partitions={partitions}"
    return connect(url, create=create)


class _Postgresql:
    """Both sides of PostgreSQL, each with only the modules it needs."""

    def connect_store(self, url: str) -> Store:
        from cdc.stores.postgresql.eyes import connect_store

        return connect_store(url)

    def connect_follower(self, url: str) -> Follower:
        from cdc.stores.postgresql.follower import connect_follower

        return connect_follower(url)


POSTGRESQL: Final = _Postgresql()
