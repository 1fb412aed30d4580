"""A real Kafka: the one that ``CDC_KAFKA_URL`` names, one in a container, or one run from its jars."""

import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import pytest

from cdc.brokers.kafka import connect
from cdc.errors import CdcError
from tests.fix_containers import KafkaServer as Container
from tests.fix_postgresql import require

_READY_S = 60
_numbers = itertools.count(1)


class KafkaServer(Protocol):
    """What tests do with a Kafka."""

    @property
    def url(self) -> str: ...

    def stop(self) -> None:
        """End it at once, as SIGKILL does."""
        ...

    def start(self) -> None:
        """Start it again, with what it had kept, and wait until it answers."""
        ...

    def restart(self) -> None: ...


class GivenKafka:
    """A Kafka that somebody else runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def stop(self) -> None:
        pytest.skip("the Kafka of CDC_KAFKA_URL is not ours to stop")

    def start(self) -> None:
        self.stop()

    def restart(self) -> None:
        self.stop()


class ContainedKafka:
    """One in a container."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self.url = container.url

    def stop(self) -> None:
        self._container.kill()

    def start(self) -> None:
        self._container.start()

    def restart(self) -> None:
        self.stop()
        self.start()


class LocalKafka:
    """A single Kafka (KRaft) run by ``java`` from the jars in ``libs``; on close it goes with all it kept.

    As root it runs as the user ``nobody``.
    """

    scheme = "PLAINTEXT"
    format_options: tuple[str, ...] = ()

    def __init__(self, libs: Path) -> None:
        self._libs = libs
        self._directory = Path(tempfile.mkdtemp(prefix="cdc-kafka-"))
        self._directory.chmod(0o755)
        self.port, controller_port = _free_ports(2)
        self.url = f"kafka://127.0.0.1:{self.port}/"
        self._properties = self._directory / "server.properties"
        log = self._directory / "log"
        self._properties.write_text(_properties(log, self.port, controller_port, self.scheme) + self.settings())
        log.mkdir()
        if os.geteuid() == 0:
            shutil.chown(log, "nobody")
        self._process: subprocess.Popen[bytes] | None = None
        self._format()

    def settings(self) -> str:
        """Further lines of its server.properties."""
        return ""

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def stop(self) -> None:
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def start(self) -> None:
        self.launch()
        self.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def freeze(self) -> None:
        """It answers nobody, and its connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def launch(self) -> None:
        with (self._directory / "output").open("ab") as output:
            self._process = subprocess.Popen(
                self._java("kafka.Kafka", str(self._properties)), stdout=output, stderr=output, user=_unprivileged()
            )

    def wait(self) -> None:
        deadline = time.monotonic() + _READY_S
        while not _answers(self.url):
            if time.monotonic() > deadline or (self._process and self._process.poll() is not None):
                output = (self._directory / "output").read_text(errors="replace")[-2000:]
                pytest.fail(f"kafka does not start: {output}")
            time.sleep(0.1)

    def _format(self) -> None:
        command = self._java("kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(self._properties))
        command += self.format_options
        done = subprocess.run(command, capture_output=True, text=True, check=False, user=_unprivileged())
        if done.returncode != 0:
            pytest.fail(f"kafka's storage cannot be formatted: {done.stdout}{done.stderr}")

    def _java(self, *arguments: str) -> list[str]:
        java = shutil.which("java")
        assert java is not None
        return [java, "-Xms128m", "-Xmx768m", "-XX:+UseSerialGC", "-cp", f"{self._libs}/*", *arguments]


class SecureKafka(LocalKafka):
    """One that wants TLS, a client's certificate, and the user ``alice`` by SCRAM-SHA-512."""

    scheme = "SASL_SSL"
    password = "s3cret:@/"
    format_options = ("--add-scram", f"SCRAM-SHA-512=[name=alice,password={password}]")

    def settings(self) -> str:
        self.cafile = self._directory / "certificate.pem"
        key = self._directory / "key.pem"
        _make_certificate(self.cafile, key)
        both = self._directory / "both.pem"
        both.write_text(key.read_text() + self.cafile.read_text())
        both.chmod(0o644)
        self.password = quote(self.password, safe="")
        self.url = (
            f"kafka://alice:{self.password}@127.0.0.1:{self.port}/?security=sasl_ssl&cafile={self.cafile}"
            f"&certfile={self.cafile}&keyfile={key}"
        )
        return f"""
sasl.enabled.mechanisms=SCRAM-SHA-512
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
ssl.keystore.type=PEM
ssl.keystore.location={both}
ssl.truststore.type=PEM
ssl.truststore.location={self.cafile}
listener.name.sasl_ssl.ssl.client.auth=required
"""


def _make_certificate(certificate: Path, key: Path) -> None:
    """One for the address 127.0.0.1, signed by itself."""
    openssl = shutil.which("openssl") or require("there is no openssl to make a certificate with")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)


_CLUSTER_ID = "MkU3OEVBNTcwNTJENDM2Qk"


def _properties(log: Path, port: int, controller_port: int, scheme: str) -> str:
    return f"""
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners={scheme}://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners={scheme}://127.0.0.1:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name={scheme}
listener.security.protocol.map={scheme}:{scheme},CONTROLLER:PLAINTEXT
log.dirs={log}
log.segment.delete.delay.ms=100
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=true
"""


def _unprivileged() -> int | None:
    """The user to run as: a server does not run as root."""
    return pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _answers(url: str) -> bool:
    try:
        with connect(url, create=False) as broker:
            broker.topics()
    except CdcError:
        return False
    return True


def kafka_libs() -> Path:
    """The directory of Kafka's jars; skips the test where none is named."""
    libs = os.environ.get("CDC_KAFKA_LIBS")
    if not libs:
        pytest.skip("CDC_KAFKA_LIBS does not name a directory with Kafka's jars")
    if not any(Path(libs).glob("kafka_*.jar")) or shutil.which("java") is None:
        require(f"there is no java, or no Kafka in CDC_KAFKA_LIBS={libs}")
    return Path(libs)


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> Iterator[KafkaServer]:
    """One Kafka for the whole session; tests keep to topics of their own (:func:`fresh_url`)."""
    if url := os.environ.get("CDC_KAFKA_URL"):
        yield GivenKafka(url)
        return
    if not os.environ.get("CDC_KAFKA_LIBS"):
        yield ContainedKafka(request.getfixturevalue("kafka_container"))
        return
    server = LocalKafka(kafka_libs())
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def secure_kafka() -> Iterator[SecureKafka]:
    server = SecureKafka(kafka_libs())
    try:
        server.start()
        yield server
    finally:
        server.close()


def fresh_url(server: KafkaServer) -> str:
    """A URL under which no topic was ever used."""
    head, mark, options = server.url.partition("?")
    return f"{head.rstrip('/')}/t{os.getpid()}-{next(_numbers)}-{time.time_ns() % 10**9}.{mark}{options}"


@pytest.fixture
def kafka_url(kafka: KafkaServer) -> str:
    return fresh_url(kafka)
