"""What a command needs to know of a URL before it opens it."""

import re
from collections.abc import Sequence
from typing import Final

from cdc import registry
from cdc.errors import UsageError
from cdc.ports import Broker

# The topic of an event stream's position, as it is or as the first partition of plain topics.
_EVENT_POSITIONS: Final = re.compile(r"(.+)\.cdc(?:\.0)?")
_USERINFO: Final = re.compile(r"(://[^:@/\s]*):[^@\s]*@")


def shown(url: str) -> str:
    """The URL for people, without a password."""
    if registry.scheme_of(url) != "postgresql":
        return without_password(url)
    from cdc.stores.postgresql.connect import safe_url

    return safe_url(url)


def without_password(text: str) -> str:
    """Strike out what stands between a user's name and the host of any URL."""
    return _USERINFO.sub(r"\1:***@", text)


def must_be_postgresql(url: str) -> None:
    """:raises UsageError: another kind of database."""
    scheme = registry.scheme_of(url)
    if scheme != "postgresql":
        raise UsageError(
            f"not a leader: {scheme}://", remedy="a leader is written postgresql://user@host:port/database"
        )


def only_topic(broker: Broker, url: str, wanted: str | None) -> str:
    """The topic named, or the only one there is.

    :raises UsageError: there are none, or several.
    """
    if wanted is not None:
        return wanted
    topics, prefixes = native_topics(broker.topics())
    if len(topics) == 1:
        return topics[0]
    if topics:
        raise UsageError(
            f"{shown(url)} holds {len(topics)} streams: {', '.join(topics)}", remedy="choose one with --stream NAME"
        )
    if prefixes:
        raise UsageError(
            f"{shown(url)} holds portable events under {', '.join(prefixes)}, and no native stream",
            remedy="apply them with --codec debezium-json",
        )
    raise UsageError(
        f"{shown(url)} holds no stream yet", remedy="start `cdc ship` first, or name the stream with --stream NAME"
    )


def native_topics(topics: Sequence[str]) -> tuple[list[str], list[str]]:
    """The topics that hold native streams, and the prefixes of those that hold portable events."""
    prefixes = sorted({found[1] for topic in topics if (found := _EVENT_POSITIONS.fullmatch(topic))})
    ours = tuple(start for prefix in prefixes for start in (f"{prefix}.", f"__debezium-heartbeat.{prefix}"))
    return [topic for topic in topics if not topic.startswith(ours)], prefixes
