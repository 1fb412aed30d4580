"""The images by themselves: what they refuse, who they run as, what they keep."""

import subprocess

import psycopg
import pytest
from testcontainers.core.container import DockerContainer

from tests.fix_containers import KafkaServer, PostgresServer, running, the_image


def test_the_command_runs_as_nobody_special() -> None:
    assert _run(the_image("cdc"), "--version").stdout.startswith("cdc ")
    found = _run("--entrypoint", "id", the_image("cdc"), "-u")
    assert found.stdout.strip() != "0"


@pytest.mark.parametrize("major", [15, 17])
def test_postgresql_does_not_stand_open_by_omission(major: int) -> None:
    refused = _run(the_image(f"cdc-postgresql:{major}"), expect=78)
    assert "POSTGRES_PASSWORD" in refused.stderr


def test_postgresql_makes_a_database_of_any_name_and_starts_with_settings() -> None:
    image, name = the_image("cdc-postgresql:17"), 'Shop "1"; x'
    container = DockerContainer(image).with_env("POSTGRES_PASSWORD", "it's").with_env("POSTGRES_DB", name)
    with running(container.with_command(["-c", "max_wal_senders=7"]), {}) as started:
        server = PostgresServer(started, 0, 17)
        server.await_health()
        asked = "SELECT current_database(), current_setting('wal_level'), current_setting('max_wal_senders')"
        status, output = started.exec_run(["psql", "-U", "postgres", "-d", name, "-Atc", asked])
        assert status == 0, output
        assert output.decode().strip() == f"{name}|logical|7"


@pytest.mark.parametrize("server", ["postgres15_container", "postgres17_container"])
def test_postgresql_asks_for_the_password(server: str, request: pytest.FixtureRequest) -> None:
    found: PostgresServer = request.getfixturevalue(server)
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(found.url(), password="wrong", connect_timeout=10)
    with found.connect() as connection:
        assert connection.info.server_version // 10_000 == found.major


def test_kafka_has_its_own_tools_and_makes_no_topic_by_mistake(kafka_container: KafkaServer) -> None:
    def kafka(tool: str, arguments: str) -> str:
        # The listener that names itself: the one for clients names a port that is open outside only.
        server = "--bootstrap-server 127.0.0.1:9094"
        command = f"echo x | timeout 8 kafka org.apache.kafka.tools.{tool} {server} {arguments}"
        _, output = kafka_container.container.exec_run(["sh", "-c", command])
        return str(output.decode())

    sent = kafka("ConsoleProducer", "--topic nowhere")
    assert "UNKNOWN_TOPIC_OR_PARTITION" in sent, sent
    assert "Created topic here" in kafka("TopicCommand", "--create --topic here")
    topics = kafka("TopicCommand", "--list").split()
    assert "here" in topics
    assert "nowhere" not in topics


def _run(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = ["docker", "run", "--rm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done
