"""``cdc demo``: a leader under load is rebuilt on three other databases while one watches, and then verified.

Everything runs through the commands themselves, each in a process of its own, shown as one would type it.
"""

import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, LiteralString, NamedTuple

import psycopg

from cdc.cli.console import Console
from cdc.cli.options import Settings
from cdc.errors import CdcError, LocalIOError, UnavailableError
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql.connect import connect

ACCOUNTS: Final = 50_000
BULK_ROWS: Final = 30_000
_WORKERS: Final = 2
_TIMEOUT_S: Final = 120.0
_KINDS: Final = ("parcel", "letter", "freight")

_SCHEMA: Final[LiteralString] = f"""
    SET search_path = public;
    CREATE TYPE kind AS ENUM ('parcel', 'letter', 'freight');
    CREATE TABLE branches (bid int PRIMARY KEY, balance bigint NOT NULL DEFAULT 0);
    CREATE TABLE accounts (
        aid int PRIMARY KEY, bid int NOT NULL, balance numeric(14, 2) NOT NULL DEFAULT 0, owner text,
        opened timestamptz NOT NULL DEFAULT '2024-02-29 12:00:00+00', tags text[], details jsonb
    );
    CREATE TABLE history (aid int, bid int, delta numeric(14, 2), at timestamptz DEFAULT clock_timestamp());
    CREATE TABLE orders (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(), kind kind NOT NULL, price numeric, weight float8,
        valid daterange, image bytea
    );
    INSERT INTO branches SELECT g FROM generate_series(1, 10) g;
    INSERT INTO accounts (aid, bid, owner, tags, details)
        SELECT g, g % 10 + 1, 'owner ' || g, ARRAY['a', 'b' || g % 7], jsonb_build_object('n', g)
        FROM generate_series(1, {ACCOUNTS}) g;
"""


class _Done(NamedTuple):
    status: int
    output: str


def run(settings: Settings) -> int:
    console = Console(settings)
    began = time.monotonic()
    with _directory(settings) as directory, ExitStack() as stack:
        story = _Story(console, directory)
        results = _play(story, stack, settings)
        equal = all(status == 0 for status in results.values())
        seconds = time.monotonic() - began
        if console.json:
            console.out_json({"equal": equal, "seconds": round(seconds, 1), "followers": results})
        else:
            told = "all followers equal the leader" if equal else "NOT EQUAL: see above"
            console.out(f"\n{told}, after {seconds:.0f} s")
            if settings.keep:
                console.out(f"everything is kept in {directory}")
        return next((status for status in results.values() if status), 0)


@contextmanager
def _directory(settings: Settings) -> Iterator[Path]:
    if settings.directory is not None:
        directory = Path(settings.directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise LocalIOError(f"{directory} is not empty", remedy="name a new directory with --directory")
        yield directory
    elif settings.keep:
        directory = Path(tempfile.mkdtemp(prefix="cdc-demo-"))
        directory.chmod(0o711)  # the servers run as another user where we are root
        yield directory
    else:
        with tempfile.TemporaryDirectory(prefix="cdc-demo-") as name:
            yield Path(name)


class _Story:
    """Runs commands and tells of them."""

    def __init__(self, console: Console, directory: Path) -> None:
        self._console = console
        self.directory = directory

    def tell(self, text: str) -> None:
        if not self._console.json:
            self._console.out(text)

    def run(self, *arguments: str) -> _Done:
        """Run a command to its end and show what it said."""
        self.tell(f"$ cdc {shlex.join(arguments)}")
        done = subprocess.run(
            [sys.executable, "-m", "cdc", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        output = done.stdout.rstrip()
        self.tell("".join(f"  {line}\n" for line in output.splitlines()).rstrip())
        return _Done(done.returncode, output)

    def must(self, *arguments: str) -> None:
        done = self.run(*arguments)
        if done.status != 0:
            raise CdcError(f"`cdc {shlex.join(arguments)}` ended with status {done.status}: {done.output[-500:]}")

    @contextmanager
    def running(self, name: str, *arguments: str) -> Iterator[None]:
        """Run a command beside us, and stop it in good order."""
        self.tell(f"$ cdc {shlex.join(arguments)} &")
        path = self.directory / f"{name}.log"
        with path.open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", "cdc", *arguments], stdout=log, stderr=log)
        try:
            yield
            process.send_signal(signal.SIGTERM)
            status = process.wait(_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
        text = path.read_text("utf-8", "replace").strip()
        if status != 0:
            raise CdcError(f"`cdc {shlex.join(arguments)}` ended with status {status}: {text[-500:]}")
        self.tell(f"  {name}: {text.splitlines()[-1] if text else 'stopped'}")


def _play(story: _Story, stack: ExitStack, settings: Settings) -> dict[str, int]:
    story.tell("starting a PostgreSQL 18 leader and a PostgreSQL 16 follower")
    kept = settings.keep or settings.directory is not None
    leader = stack.enter_context(_server(18, story.directory / "leader" if kept else None))
    other = stack.enter_context(_server(16, story.directory / "follower" if kept else None))
    for server in (leader, other):
        with connect(server.url()) as connection:
            connection.execute("CREATE DATABASE shop")
    source, log = leader.url("shop"), f"file://{story.directory / 'log'}"
    with connect(source) as connection:
        connection.execute(_SCHEMA)
    story.tell(f"made {ACCOUNTS:,} accounts, and tables with enums, ranges, JSON, arrays and no key at all\n")
    story.must("setup", source, "--format", "logical")
    followers = _followers(story, other)
    _carry_live(story, source, log, followers, settings.seconds)
    story.tell("\nthe rest, up to the end of the log, as after a restart:")
    story.must("ship", source, log, "--format", "logical", "--until", "now")
    for url in followers.values():
        story.must("apply", log, url, "--until", "end")
    story.tell("")
    return {name: story.run("verify", source, url).status for name, url in followers.items()}


def _server(major: int, directory: Path | None) -> EmbeddedPostgres:
    return EmbeddedPostgres(major, directory)


def _followers(story: _Story, other: EmbeddedPostgres) -> dict[str, str]:
    followers = {"postgresql-16": other.url("shop"), "sqlite": f"sqlite:///{story.directory / 'shop.db'}"}
    if find_spec("duckdb") is not None:
        followers["duckdb"] = f"duckdb:///{story.directory / 'shop.duckdb'}"
    else:
        story.tell("duckdb is not installed: two followers (pip install 'cdc[duckdb]' for the third)")
    return followers


def _carry_live(story: _Story, source: str, log: str, followers: dict[str, str], seconds: float) -> None:
    """Ship and apply while the leader works: transfers, one large transaction, and a schema change."""
    with ExitStack() as running:
        load = running.enter_context(_Load(source))
        running.enter_context(story.running("ship", "ship", source, log, "--format", "logical"))
        for name, url in followers.items():
            arguments = ("apply", log, url, "--stream", "cdc_shop")
            running.enter_context(story.running(f"apply to {name}", *arguments))
        load.run_for(seconds / 2)
        story.tell(f"  meanwhile: one transaction of {BULK_ROWS:,} rows, and ALTER TABLE accounts ADD COLUMN note")
        with connect(source) as connection:
            connection.execute(_BULK)
        load.run_for(seconds / 2)
        load.stop()
        story.tell(f"  the leader committed {load.transactions:,} transactions in {load.seconds:.0f} s; stopping")


_BULK: Final[LiteralString] = f"""
    SET search_path = public;
    ALTER TABLE accounts ADD COLUMN note text DEFAULT 'none';
    INSERT INTO orders (kind, price, weight, valid, image)
        SELECT (ARRAY['parcel', 'letter', 'freight']::kind[])[g % 3 + 1], g / 7.0, sqrt(g),
               daterange('2024-01-01', '2024-01-01'::date + g % 400), decode(md5(g::text), 'hex')
        FROM generate_series(1, {BULK_ROWS}) g;
"""


class _Load:
    """Transfers between accounts, in the manner of TPC-B, on a few connections at once."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._work, args=(seed,)) for seed in range(_WORKERS)]
        self._began = time.monotonic()
        self.transactions = 0
        self.seconds = 0.0

    def __enter__(self) -> "_Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def run_for(self, seconds: float) -> None:
        self._stop.wait(seconds)
        if self._errors:
            raise UnavailableError(f"the workload failed: {self._errors[0]}") from self._errors[0]

    def stop(self) -> None:
        self.__exit__()
        self.seconds = time.monotonic() - self._began
        self.run_for(0)

    def _work(self, seed: int) -> None:
        try:
            with psycopg.connect(self._url) as connection:
                self._transfer_until_stopped(connection, random.Random(seed))  # noqa: S311
        except psycopg.Error as error:
            self._errors.append(error)
            self._stop.set()

    def _transfer_until_stopped(self, connection: psycopg.Connection[Any], chance: random.Random) -> None:
        while not self._stop.is_set():
            _transfer(connection.execute, chance)
            connection.commit()
            with self._lock:
                self.transactions += 1


def _transfer(execute: Callable[..., Any], chance: random.Random) -> None:
    account, branch, delta = chance.randint(1, ACCOUNTS), chance.randint(1, 10), chance.randint(-50_000, 50_000) / 100
    execute("UPDATE accounts SET balance = balance + %s::numeric WHERE aid = %s", (delta, account))
    execute("UPDATE branches SET balance = balance + 1 WHERE bid = %s", (branch,))
    execute("INSERT INTO history (aid, bid, delta) VALUES (%s, %s, %s::numeric)", (account, branch, delta))
    if chance.random() < 0.1:
        execute(
            "INSERT INTO orders (kind, price, weight) VALUES (%s::kind, %s, %s)",
            (chance.choice(_KINDS), delta, chance.random()),
        )
    if chance.random() < 0.01:
        execute("DELETE FROM accounts WHERE aid = %s", (account,))
