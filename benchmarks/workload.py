"""A leader under load, three followers: ``python -m benchmarks.workload``.

pgbench (TPC-B-like) runs on PostgreSQL 18 while ``cdc ship`` and ``cdc apply`` carry it to PostgreSQL 16, SQLite and
DuckDB; then one transaction inserts a million rows. At the end every follower is verified row by row, and the peak
memory of each process is shown.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg

from cdc.stores.embedded import EmbeddedPostgres


class Child:
    """A ``cdc`` command in the background, its peak memory known at its end."""

    def __init__(self, *arguments: str) -> None:
        self.name = " ".join(arguments[:1])
        self.pid = subprocess.Popen([sys.executable, "-m", "cdc", *arguments]).pid

    def end(self, *, stop: bool) -> int:
        """Wait for it, after SIGTERM where asked; returns its peak resident memory in MB."""
        if stop:
            os.kill(self.pid, signal.SIGTERM)
        _, status, usage = os.wait4(self.pid, 0)
        if status:
            raise SystemExit(f"cdc {self.name} ended with wait status {status}")
        return usage.ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="of pgbench (default 60)")
    parser.add_argument("--clients", type=int, default=8, help="of pgbench (default 8)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="in the one large transaction (default 1000000)")
    arguments = parser.parse_args()
    settings = {"max_wal_size": "4GB"}
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedPostgres(18, settings=settings) as leader,
        EmbeddedPostgres(16, settings=settings) as follower,
    ):
        _run(leader, follower, Path(directory), arguments)


def _run(leader: EmbeddedPostgres, follower: EmbeddedPostgres, directory: Path, arguments: argparse.Namespace) -> None:
    source = leader.url()
    topic = f"file://{directory}/log"
    targets = [follower.url(), f"sqlite:///{directory}/follower.db", f"duckdb:///{directory}/follower.duckdb"]
    _pgbench(leader, ["--initialize", "--quiet", "--scale", "10"])
    with psycopg.connect(source, autocommit=True) as connection:
        connection.execute("CREATE TABLE big (id bigint PRIMARY KEY, a int, b text, c timestamptz, d numeric)")
    subprocess.run([sys.executable, "-m", "cdc", "setup", source], check=True)
    peaks: dict[str, int] = {"ship (image)": Child("ship", source, topic, "--until", "now").end(stop=False)}

    shipper = Child("ship", source, topic, "--quiet")
    appliers = {target.split(":")[0]: Child("apply", topic, target, "--quiet") for target in targets}
    _pgbench(leader, ["--client", str(arguments.clients), "--jobs", "2", "--time", str(arguments.seconds)])
    start = time.perf_counter()
    with psycopg.connect(source) as connection:
        connection.execute(
            "INSERT INTO big SELECT g, g %% 1000, 'row ' || g || repeat('x', 60), now(), g / 7.0"
            " FROM generate_series(1, %s) g",
            [arguments.rows],
        )
    print(f"the leader took {time.perf_counter() - start:.1f} s for {arguments.rows:,} rows in one transaction")
    time.sleep(2)
    peaks["ship"] = shipper.end(stop=True)
    for name, child in appliers.items():
        peaks[f"apply {name}"] = child.end(stop=True)
    peaks["ship (rest)"] = Child("ship", source, topic, "--until", "now").end(stop=False)
    for target in targets:
        peaks[f"apply {target.split(':')[0]} (rest)"] = Child("apply", topic, target, "--until", "end").end(stop=False)
        subprocess.run([sys.executable, "-m", "cdc", "verify", source, target], check=True)
    for name, peak in peaks.items():
        print(f"peak memory of {name:24}{peak:5} MB")


def _pgbench(leader: EmbeddedPostgres, options: Sequence[str]) -> None:
    command = [str(leader.bindir / "pgbench"), "--host", "127.0.0.1", "--port", str(leader.port)]
    subprocess.run([*command, "--username", "postgres", *options, "postgres"], check=True)


if __name__ == "__main__":
    main()
