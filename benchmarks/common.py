"""What the measurements share: ``cdc`` as a process of its own, its cost, and SQL in one line."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import psycopg

_LOOK_S: Final = 0.005


class Cost(NamedTuple):
    """What a process took, start-up included."""

    wall_s: float
    cpu_s: float
    peak_mb: int


class Child:
    """A ``cdc`` command in the background."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._start = time.perf_counter()
        self._process = subprocess.Popen([sys.executable, "-m", "cdc", *arguments])

    def end(self, *, stop: bool = False) -> Cost:
        """Wait for it, after SIGTERM where asked."""
        if stop:
            self._process.terminate()
        peak_mb, pid = 0, 0
        while not pid:  # not ru_maxrss: it counts what the parent held when it forked
            peak_mb = max(peak_mb, _peak_mb(self._process.pid))
            time.sleep(_LOOK_S)
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            raise SystemExit(f"cdc {self._arguments[0]} ended with status {self._process.returncode}")
        cpu_s = usage.ru_utime + usage.ru_stime
        return Cost(time.perf_counter() - self._start, cpu_s, peak_mb)


def _peak_mb(pid: int) -> int:
    """The most that a process held in memory until now, 0 where it has ended (proc(5), VmHWM)."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) // 1024 if found else 0


def cdc(*arguments: str) -> Cost:
    """Run a ``cdc`` command to its end."""
    quiet = [] if arguments[0] == "setup" else ["--quiet"]
    return Child(*arguments, *quiet).end()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def sql(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


def value(url: str, statement: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(statement).fetchone()
        return row[0] if row else None


def transactions(url: str, statement: str, count: int) -> None:
    """``statement`` with each number from 1 to ``count``, each a transaction, fast: reading them back is measured."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        with connection.pipeline():
            for number in range(1, count + 1):
                connection.execute(statement, {"n": number})
        connection.execute("SELECT pg_switch_wal()")
