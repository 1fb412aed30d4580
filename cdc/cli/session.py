"""Sessions on a leader, and what its stream's things are called there."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import unquote, urlsplit

from cdc.cli.options import Settings
from cdc.cli.urls import must_be_postgresql
from cdc.stores.postgresql.connect import Connection, connect, safe_url
from cdc.stores.postgresql.setup import Names, default_names


@contextmanager
def leader_session(url: str, settings: Settings) -> Iterator[tuple[Connection, Names]]:
    """A session on a leader, and what its stream's things are called there."""
    must_be_postgresql(url)
    with closing(connect(url)) as connection:
        yield connection, names_for(connection.info.dbname, settings)


def names_for(database: str, settings: Settings) -> Names:
    return default_names(database, stream=settings.stream, publication=settings.publication, slot=settings.slot)


def names_of_url(url: str, settings: Settings) -> Names:
    """Names without a connection, where the URL names the database.

    :raises UsageError: not a PostgreSQL URL.
    """
    must_be_postgresql(url)
    database = unquote(urlsplit(safe_url(url)).path.removeprefix("/"))
    if database:
        return names_for(database, settings)
    with leader_session(url, settings) as (_, names):
        return names
