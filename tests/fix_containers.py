"""Real servers in containers, one of each and test session, built by ``docker/build``.

Their ports on this machine are chosen before they start and stay: a server that is stopped and started again is found
where it was, with its data.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import psycopg
import pytest
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from tests.fix_proxy import Proxy

PASSWORD = "secret"
_READY_S = 90.0
_STOP_S = 30


@dataclass
class Server:
    """A container that serves on one port of 127.0.0.1, and can be stopped, killed and started again.

    ``container`` is one of Docker's own package.
    """

    container: Any
    port: int

    def stop(self) -> None:
        """As an operator does: the server ends in good order."""
        self.container.stop(timeout=_STOP_S)

    def kill(self) -> None:
        """As a lost machine does."""
        self.container.kill()
        self.container.wait()

    def start(self) -> None:
        """Returns when the image's own health check is content."""
        self.container.start()
        self.await_health()

    def await_health(self) -> None:
        """:raises TimeoutError: it does not become healthy; the message has the end of its log."""
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            self.container.reload()
            if self.container.attrs["State"].get("Health", {}).get("Status") == "healthy":
                return
            if self.container.status == "exited":
                break
            time.sleep(0.2)
        log = self.container.logs(tail=20).decode(errors="replace")
        raise TimeoutError(f"{self.container.name} is {self.container.status} and not healthy:\n{log}")


@dataclass
class PostgresServer(Server):
    major: int = 0

    def url(self, database: str = "postgres") -> str:
        """Without the password: who connects has it from ``PGPASSWORD``, or says it."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def connect(self, database: str = "postgres") -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.url(database), password=PASSWORD, autocommit=True, connect_timeout=10)


@dataclass
class KafkaServer(Server):
    """``proxy`` stands before a listener of its own that names the proxy's port to clients, so that they stay on it."""

    PORT: ClassVar[int] = 9092
    PROXIED_PORT: ClassVar[int] = 9192
    proxy: Proxy | None = None

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.port}/"

    @property
    def proxied_url(self) -> str:
        assert self.proxy is not None
        return f"kafka://127.0.0.1:{self.proxy.port}/"


@pytest.fixture(scope="session")
def postgres15_container() -> Iterator[PostgresServer]:
    yield from _postgres(15)


@pytest.fixture(scope="session")
def postgres17_container() -> Iterator[PostgresServer]:
    yield from _postgres(17)


@pytest.fixture(scope="session")
def kafka_container() -> Iterator[KafkaServer]:
    image, port, proxied_port = the_image("cdc-kafka"), _free_port(), _free_port()
    with Proxy("127.0.0.1", proxied_port) as proxy:
        settings = {
            "listeners": (
                "CLIENT://0.0.0.0:9092,PROXIED://0.0.0.0:9192,BROKER://127.0.0.1:9094,CONTROLLER://127.0.0.1:9093"
            ),
            "advertised.listeners": (
                f"CLIENT://127.0.0.1:{port},PROXIED://127.0.0.1:{proxy.port},BROKER://127.0.0.1:9094"
            ),
            "listener.security.protocol.map": (
                "CLIENT:PLAINTEXT,PROXIED:PLAINTEXT,BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT"
            ),
        }
        container = DockerContainer(image).with_command(
            [part for name, value in settings.items() for part in ("--override", f"{name}={value}")]
        )
        with running(container, {KafkaServer.PORT: port, KafkaServer.PROXIED_PORT: proxied_port}) as started:
            server = KafkaServer(started, port, proxy)
            server.await_health()
            yield server


def _postgres(major: int) -> Iterator[PostgresServer]:
    image, port = the_image(f"cdc-postgresql:{major}"), _free_port()
    container = DockerContainer(image).with_env("POSTGRES_PASSWORD", PASSWORD)
    with running(container, {5432: port}) as started:
        server = PostgresServer(started, port, major)
        server.await_health()
        yield server


@contextmanager
def running(container: DockerContainer, ports: dict[int, int]) -> Iterator[Any]:
    """Gone at the end with its volumes, also when it never became ready."""
    for inside, outside in ports.items():
        # Not `with_bind_ports`, which would open the port to the network.
        container.ports[str(inside)] = ("127.0.0.1", outside)  # type: ignore[assignment]
    try:
        yield container.start().get_wrapped_container()
    finally:
        container.stop()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def the_image(name: str) -> str:
    """Its name, where an engine has it; else the test is skipped, or fails where ``CDC_REQUIRE_CONTAINERS`` says so."""
    if missing := _missing(name):
        if os.environ.get("CDC_REQUIRE_CONTAINERS") == "1":
            pytest.fail(f"CDC_REQUIRE_CONTAINERS=1, but {missing}", pytrace=False)
        pytest.skip(missing)
    # The container that clears up after a session that was killed runs only where its image could be had.
    if _missing(testcontainers_config.ryuk_image):
        testcontainers_config.ryuk_disabled = True
    return name


def _missing(image: str) -> str:
    """What is missing for ``image``, and what to do; nothing, where it is there."""
    command = shutil.which("docker")
    if command is None:
        return "no docker command is there: install Docker, or run docker/engine and docker/build as root"
    # A directory of ours has the name of Docker's Python package, which therefore is not imported here.
    found = subprocess.run([command, "image", "inspect", image], capture_output=True, text=True, check=False)
    if found.returncode == 0:
        return ""
    if "no such image" in found.stderr.lower():
        return f"image {image} is not there: run docker/build"
    return f"no Docker engine answers ({found.stderr.strip()[:200]}): start one, or run docker/engine"


# What was not tested is said where it is read: below everything but the count.


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    yield
    skipped = [
        report
        for report in terminalreporter.getreports("skipped")
        if isinstance(report, pytest.TestReport) and report.nodeid.startswith("tests/containers/")
    ]
    if skipped:
        reasons = sorted({_reason(report) for report in skipped})
        terminalreporter.write_line(f"{len(skipped)} container tests were skipped: {'; '.join(reasons)}", yellow=True)


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(text).removeprefix("Skipped: ")
