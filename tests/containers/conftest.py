import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.line import Line
from tests.fix_containers import KafkaServer, PostgresServer

_numbers = itertools.count(1)


@pytest.fixture(params=["15-17", "17-15"])
def line(
    request: pytest.FixtureRequest,
    postgres15_container: PostgresServer,
    postgres17_container: PostgresServer,
    kafka_container: KafkaServer,
    tmp_path: Path,
) -> Iterator[Line]:
    """Leader and follower by their majors, with tables, rows, publication and slot; nothing ships yet."""
    servers = [postgres15_container, postgres17_container]
    leader, follower = servers if request.param == "15-17" else reversed(servers)
    made = Line(leader, kafka_container, follower, f"t{os.getpid()}_{next(_numbers)}", tmp_path)
    try:
        made.prepare()
        yield made
    finally:
        made.clear()
