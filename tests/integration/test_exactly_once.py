"""Killed again and again, both sides, under load: every row once. And large transactions in small memory."""

import random
import subprocess
import time
from functools import partial

import pytest

from tests.fix_stream import FOLLOWERS, FollowerFactory, Stream, background, checkpoint, ended, eventually, query
from tests.integration.test_stream import TABLES, Writer

# The goal is 150 MB for a whole process; a `cdc` process has 30 before it opens anything, one of the tests' more.
GROWN_MB_MAX = 150 - 30


def _owned(follower: str, times: int) -> bool:
    """Has the follower had so many appliers?"""
    found = checkpoint(follower)
    return found is not None and found.epoch >= times


def _longer(stream: Stream, end: int) -> bool:
    return stream.bounds()[1] > end


def test_killed_at_random_under_load(stream: Stream, new_follower: FollowerFactory) -> None:
    dice = random.Random(1)
    stream.run(TABLES)
    stream.setup()
    follower = new_follower("postgresql")
    orders = (("ship", {"until": None}), ("apply", {"until": None, "follower": follower}))
    deadline = time.monotonic() + 15
    processes: dict[str, subprocess.Popen[str]] = {}
    kills = 0
    with background(lambda stop: Writer(stream.leader, 42).write(100_000, stop)):
        while time.monotonic() < deadline:
            for what, arguments in orders:
                if what not in processes:
                    processes[what] = stream.process(what, **arguments)  # type: ignore[arg-type]
            time.sleep(dice.uniform(0.7, 1.6))
            victim = processes.pop(dice.choice(list(processes)))
            assert victim.poll() is None, victim.communicate()[1]
            victim.kill()
            victim.communicate()
            kills += 1
    for process in processes.values():
        process.kill()
        process.communicate()
    assert kills >= 8
    stream.carry(follower)
    stream.assert_equal(follower)


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_an_applier_killed_within_a_large_transaction(stream: Stream, new_follower: FollowerFactory, kind: str) -> None:
    """What is half done is not there: neither rows nor checkpoint."""
    stream.run("CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t VALUES (0, 'image')")
    stream.setup()
    follower = new_follower(kind)
    stream.carry(follower)
    stream.run("INSERT INTO t SELECT g, repeat('x', 200) FROM generate_series(1, 60000) g")
    stream.ship()
    before = checkpoint(follower)
    slow = (
        "from cdc import pipeline; import time; take = pipeline._Follow._take\n"
        "def _take(*a):\n    take(*a)\n    time.sleep(0.2)\npipeline._Follow._take = _take"
    )
    applier = stream.process("apply", follower=follower, code=slow)
    time.sleep(1.8)
    assert applier.poll() is None, applier.communicate()[1]
    applier.kill()
    applier.communicate()
    after = checkpoint(follower)
    assert before is not None
    assert after is not None
    assert after.position == before.position
    stream.apply(follower)
    stream.assert_equal(follower)


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_a_large_transaction_in_small_memory(stream: Stream, new_follower: FollowerFactory, kind: str) -> None:
    stream.run("CREATE TABLE t (id int PRIMARY KEY, a text, b numeric, c timestamptz)")
    stream.setup()
    follower = new_follower(kind)
    stream.carry(follower)
    stream.run("INSERT INTO t SELECT g, repeat('x', 60), g, now() FROM generate_series(1, 300000) g")
    shipped, applied = ended(stream.process("ship")), ended(stream.process("apply", follower=follower))
    assert shipped["grown_mb"] < GROWN_MB_MAX
    assert applied["grown_mb"] < GROWN_MB_MAX
    if kind == "postgresql":
        assert query(follower, "SELECT count(*) FROM t") == [(300_000,)]
    stream.assert_equal(follower)


def test_stopped_and_started_gently(stream: Stream, new_follower: FollowerFactory) -> None:
    """SIGTERM ends both with success, wherever they are."""
    stream.run(TABLES)
    stream.setup()
    follower = new_follower("sqlite")
    with background(lambda stop: Writer(stream.leader, 5).write(100_000, stop)):
        for turn in range(2):
            shipper = stream.process("ship", until=None)
            applier = stream.process("apply", until=None, follower=follower)
            before = stream.bounds()[1]
            eventually(partial(_longer, stream, before + 2))
            eventually(partial(_owned, follower, turn + 1))
            for process in (shipper, applier):
                process.terminate()
                ended(process)
    stream.carry(follower)
    stream.assert_equal(follower)
