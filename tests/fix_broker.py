"""Brokers: everything that runs against the contract of :class:`cdc.ports.Broker`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from cdc.brokers.embedded import EmbeddedBroker
from cdc.ports import Broker

BrokerFactory = Callable[[], Broker]


def _embedded(directory: Path) -> BrokerFactory:
    return lambda: EmbeddedBroker(directory / "log")


_FACTORIES: dict[str, Callable[[Path], BrokerFactory]] = {"embedded": _embedded}


@pytest.fixture(params=sorted(_FACTORIES))
def open_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerFactory]:
    """``open_broker()`` opens one more connection to the same, at first empty, broker."""
    connect = _FACTORIES[request.param](tmp_path)
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(connect()))


@pytest.fixture
def broker(open_broker: BrokerFactory) -> Broker:
    return open_broker()
