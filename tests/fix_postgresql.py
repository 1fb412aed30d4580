"""Real PostgreSQL servers, one per major version and test session, and fresh databases in them."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import NoReturn

import psycopg
import pytest
from psycopg import sql

from cdc.errors import ConfigurationError
from cdc.stores.embedded import EmbeddedPostgres

DatabaseFactory = Callable[[EmbeddedPostgres], str]

_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_wal_senders": "60",
    "max_replication_slots": "60",
    "max_prepared_transactions": "20",
    "max_connections": "150",
}
_numbers = itertools.count(1)


def require(what: str) -> NoReturn:
    """Skip the test for want of ``what``; fail where ``CDC_REQUIRE_ALL`` says that everything must be there."""
    if os.environ.get("CDC_REQUIRE_ALL") == "1":
        pytest.fail(f"CDC_REQUIRE_ALL=1, but {what}", pytrace=False)
    pytest.skip(what)


def _serve(major: int, *, optional: bool = False) -> Iterator[EmbeddedPostgres]:
    try:
        server = EmbeddedPostgres(major, settings=_SETTINGS)
    except ConfigurationError as error:
        if optional:
            pytest.skip(str(error))
        require(str(error))
    with server:
        yield server


@pytest.fixture(scope="session")
def postgres18() -> Iterator[EmbeddedPostgres]:
    yield from _serve(18)


@pytest.fixture(scope="session")
def postgres16() -> Iterator[EmbeddedPostgres]:
    yield from _serve(16)


@pytest.fixture(scope="session")
def postgres15() -> Iterator[EmbeddedPostgres]:
    """Where the machine has one: its own package, or ``CDC_PG15_BINDIR``."""
    yield from _serve(15, optional=True)


@pytest.fixture(scope="session")
def postgres17() -> Iterator[EmbeddedPostgres]:
    """Where the machine has one: its own package, or ``CDC_PG17_BINDIR``."""
    yield from _serve(17, optional=True)


def postgres_major(*majors: int) -> pytest.MarkDecorator:
    """Run a test that takes ``postgres`` once per major: ``@postgres_major(16, 18)``."""
    return pytest.mark.parametrize("postgres", majors, indirect=True, ids=[f"pg{major}" for major in majors])


@pytest.fixture
def postgres(request: pytest.FixtureRequest) -> EmbeddedPostgres:
    """The server of the major that ``postgres_major`` gives, 18 without it."""
    server = request.getfixturevalue(f"postgres{getattr(request, 'param', 18)}")
    assert isinstance(server, EmbeddedPostgres)
    return server


@pytest.fixture
def database() -> Iterator[DatabaseFactory]:
    """``database(server)`` makes an empty database and returns its URL; it goes, slots and all, after the test."""
    made: list[tuple[EmbeddedPostgres, str]] = []

    def make(server: EmbeddedPostgres) -> str:
        name = create_database(server)
        made.append((server, name))
        return server.url(name)

    yield make
    for server, name in reversed(made):
        if server.is_running:
            drop_database(server, name)


def create_database(server: EmbeddedPostgres) -> str:
    """Make an empty database of a name not used before."""
    name = f"t{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    return name


def drop_database(server: EmbeddedPostgres, name: str) -> None:
    """Drop a database with all that would hold it: sessions, slots, prepared transactions, subscriptions."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        # A walsender lets its slot go only some time after it was told to end.
        connection.execute("select pg_terminate_backend(pid, 10000) from pg_stat_activity where datname = %s", [name])
        _empty(server, name)
        connection.execute(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = %s", [name]
        )
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _empty(server: EmbeddedPostgres, name: str) -> None:
    with psycopg.connect(server.url(name), autocommit=True) as connection:
        prepared = connection.execute("select gid from pg_prepared_xacts where database = %s", [name]).fetchall()
        for (gid,) in prepared:
            connection.execute(sql.SQL("rollback prepared {}").format(sql.Literal(gid)))
        subscriptions = connection.execute(
            "select subname from pg_subscription s join pg_database d on d.oid = subdbid where datname = %s", [name]
        ).fetchall()
        for (subscription,) in subscriptions:
            identifier = sql.Identifier(subscription)
            connection.execute(sql.SQL("alter subscription {} disable").format(identifier))
            # Its slot goes with the database that it lies in.
            connection.execute(sql.SQL("alter subscription {} set (slot_name = none)").format(identifier))
            connection.execute(sql.SQL("drop subscription {}").format(identifier))
