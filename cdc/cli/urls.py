"""What a command needs to know of a URL before it opens it."""

import re
from typing import Final

from cdc import registry
from cdc.errors import UsageError
from cdc.ports import Broker

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
    topics = broker.topics()
    if len(topics) == 1:
        return topics[0]
    if topics:
        raise UsageError(
            f"{shown(url)} holds {len(topics)} streams: {', '.join(topics)}", remedy="choose one with --stream NAME"
        )
    raise UsageError(
        f"{shown(url)} holds no stream yet", remedy="start `cdc ship` first, or name the stream with --stream NAME"
    )
