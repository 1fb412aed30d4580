"""A stream from a real leader through a real topic into real followers, here or in processes that can be killed."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, LiteralString, Self, cast

import psycopg
import pytest

from appliers.rows import RowsApplier
from cdc.brokers import embedded
from cdc.codec import EnvelopeCodec
from cdc.errors import CdcError
from cdc.pipeline import ApplyOptions, ShipOptions, follow, ship
from cdc.ports import Broker, Follower, Progress, Shipper, Store
from cdc.record import Checkpoint, Relation
from cdc.stores import sqlite
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql import capture, eyes, setup
from cdc.stores.postgresql.connect import connect
from cdc.stores.postgresql.describe import describe
from cdc.stores.postgresql.follower import connect_follower
from shippers.postgresql import polling
from shippers.postgresql.logical import LogicalShipper, Options
from shippers.postgresql.trigger import TriggerShipper
from tests.fix_postgresql import DatabaseFactory

ROOT = Path(__file__).parents[1]
STREAM = "s"
PUBLICATION = "p"


def open_follower(url: str) -> Follower:
    if url.startswith("postgresql:"):
        return connect_follower(url)
    if url.startswith("sqlite:"):
        return sqlite.connect_follower(url)
    from cdc.stores import duckdb

    return duckdb.connect_follower(url)


def open_store(url: str) -> Store:
    if url.startswith("postgresql:"):
        return eyes.connect_store(url)
    if url.startswith("sqlite:"):
        return sqlite.connect_store(url)
    from cdc.stores import duckdb

    return duckdb.connect_store(url)


def quiet(progress: Progress) -> None:
    pass


@dataclass
class Stream:
    """One leader database and its topic. Slots are the whole server's: ours is named after the database."""

    leader: str
    broker: str
    slot: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, leader: str, directory: Path, **options: Any) -> Self:
        return cls(leader, f"file://{directory}/log", leader.rpartition("/")[2], options)

    # The leader.

    def run(self, *statements: str) -> None:
        """Each statement in a transaction of its own."""
        run(self.leader, *statements)

    def setup(self, *, targets: str | None = None, options: str = "", two_phase: bool = False) -> Self:
        """As `cdc setup` does, unless anything about the publication or slot is asked for."""
        if targets is None and not options and not two_phase:
            with connect(self.leader) as connection:
                names = setup.Names(STREAM, PUBLICATION, self.slot)
                setup.run(connection, setup.plan_setup(connection, names))
            return self
        with_options = f" WITH ({options})" if options else ""
        self.run(f"CREATE PUBLICATION {PUBLICATION} {targets or 'FOR ALL TABLES'}{with_options}")
        self.run(f"SELECT pg_create_logical_replication_slot('{self.slot}', 'pgoutput', false, {two_phase})")
        return self

    def relations(self) -> list[Relation]:
        with connect(self.leader) as connection:
            return describe(connection, publication=PUBLICATION)

    def confirmed_lsn(self) -> int:
        [(lsn,)] = query(
            self.leader,
            "SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = %s",
            self.slot,
        )
        return int(lsn)

    # The two loops.

    def shipper(self, leader: str) -> Shipper:
        return LogicalShipper.open(leader, Options(PUBLICATION, self.slot, **self.options))

    def ship(
        self,
        *,
        until: int | Literal["now"] | None = "now",
        stop: threading.Event | None = None,
        report: Callable[[Progress], None] = quiet,
        leader: str | None = None,
        poll_s: float | None = None,
        **options: Any,
    ) -> None:
        def shipper() -> Shipper:
            if poll_s is None:
                return self.shipper(leader or self.leader)
            polled = polling.Options(PUBLICATION, self.slot, poll_s=poll_s, **self.options)
            return polling.PollingShipper.open(leader or self.leader, polled)

        options = {"retry_s": 5, "linger_s": 0.002} | options
        ship(
            shipper,
            lambda: embedded.connect(self.broker, create=True),
            EnvelopeCodec(),
            ShipOptions(STREAM, until_lsn=until, **options),
            stop=stop or threading.Event(),
            report=report,
        )

    def apply(
        self,
        follower: str,
        *,
        until: int | Literal["end"] | None = "end",
        stop: threading.Event | None = None,
        report: Callable[[Progress], None] = quiet,
        schema_changed: bool = False,
        **options: Any,
    ) -> None:
        follow(
            lambda: embedded.connect(self.broker),
            lambda: RowsApplier(open_follower(follower), schema_changed=schema_changed),
            EnvelopeCodec(),
            ApplyOptions(STREAM, until=until, **({"retry_s": 5} | options)),
            stop=stop or threading.Event(),
            report=report,
        )

    def carry(self, *followers: str) -> None:
        """Ship all there is, and apply it everywhere."""
        self.ship()
        for follower in followers:
            self.apply(follower)

    @contextmanager
    def shipping(self, **options: Any) -> Iterator["Background"]:
        with background(lambda stop: self.ship(until=None, stop=stop, **options)) as running:
            yield running

    @contextmanager
    def applying(self, follower: str, **options: Any) -> Iterator["Background"]:
        with background(lambda stop: self.apply(follower, until=None, stop=stop, **options)) as running:
            yield running

    def process(
        self, what: Literal["ship", "apply"], *, follower: str = "", code: str = "", **options: Any
    ) -> "subprocess.Popen[str]":
        """One of the loops in a process of its own, which runs ``code`` first."""
        order = {
            "kind": type(self).__name__,
            "stream": [self.leader, self.broker, self.slot, self.options],
            "what": what,
            "code": code,
            "arguments": options | ({"follower": follower} if what == "apply" else {}),
        }
        command = [sys.executable, "-m", "tests.fix_stream", json.dumps(order)]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    # What came of it.

    def topic(self) -> Broker:
        return embedded.connect(self.broker)

    def bounds(self) -> tuple[int, int]:
        with closing(self.topic()) as topic:
            return topic.bounds(STREAM)

    def checkpoint(self, follower: str) -> Checkpoint | None:
        return checkpoint(follower)

    def assert_equal(self, *followers: str) -> None:
        relations = self.relations()
        assert relations, "nothing is published"
        for follower in followers:
            found = differences(self.leader, follower, relations)
            assert not found, f"{follower}: {found}"


class TriggerStream(Stream):
    """The same of a trigger log."""

    @property
    def schema(self) -> str:
        return capture.schema_of(self.slot)

    @property
    def names(self) -> setup.Names:
        return setup.Names(STREAM, PUBLICATION, self.slot)

    def setup(self, *, as_role: str | None = None, **asked: Any) -> Self:
        """As `cdc setup --format trigger` does. ``as_role`` is the URL of another role than the leader's."""
        with connect(as_role or self.leader) as connection:
            setup.run(connection, capture.plan_setup(connection, self.names, **asked))
        return self

    def teardown(self) -> None:
        with connect(self.leader) as connection:
            setup.run(connection, capture.plan_teardown(connection, self.names))

    def relations(self) -> list[Relation]:
        with connect(self.leader) as connection:
            found = capture.describe_captured(connection, self.schema)
        return [each.relation for each in found if each.origin == each.relation.id]

    def shipper(self, leader: str) -> Shipper:
        return TriggerShipper.open(leader, self.schema)

    def heal(self, *followers: str) -> None:
        """What the remedies say."""
        self.setup()
        self.ship(image="new")
        for follower in followers:
            self.apply(follower, reload=True)


class Background:
    """Something that runs in a thread, and how it ended."""

    def __init__(self, work: Callable[[threading.Event], None]) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work(self.stop)
        except BaseException as error:  # noqa: BLE001
            self.error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def end(self, timeout_s: float = 30) -> BaseException | None:
        """Tell it to stop, and return the error that it ended with."""
        self.stop.set()
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 30) -> BaseException | None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still running after {timeout_s} s"
        return self.error


@contextmanager
def background(work: Callable[[threading.Event], None]) -> Iterator[Background]:
    """Run something beside the body, and stop it. Its error is the body's to look for, with :meth:`Background.end`."""
    running = Background(work)
    try:
        yield running
    finally:
        running.stop.set()
        running.wait()


def eventually(condition: Callable[[], Any], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def ended(process: "subprocess.Popen[str]", timeout_s: float = 60) -> dict[str, Any]:
    """Wait for a process of :meth:`Stream.process`, and return what it says about itself."""
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, err
    return cast("dict[str, Any]", json.loads(out.splitlines()[-1]))


def killed(process: "subprocess.Popen[str]") -> None:
    """SIGKILL it, which must not come too late."""
    assert process.poll() is None, process.communicate()[1]
    process.kill()
    process.communicate()


def run(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def query(url: str, sql: LiteralString, *values: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(sql, values or None).fetchall()


def checkpoint(follower: str) -> Checkpoint | None:
    scheme, _, path = follower.partition(":///")
    if scheme in {"sqlite", "duckdb"} and not Path(path).exists():
        return None
    with closing(open_store(follower)) as store:
        return store.checkpoints().get(STREAM)


def lines(url: str, relation: Relation) -> "Counter[bytes]":
    with closing(open_store(url)) as store:
        return Counter(line for _, line in store.lines(relation))


def everything(url: str, relations: Sequence[Relation]) -> dict[str, "Counter[bytes]"]:
    return {relation.label: lines(url, relation) for relation in relations}


def differences(leader: str, follower: str, relations: Sequence[Relation]) -> dict[str, Mapping[str, list[bytes]]]:
    """By table, some of the rows that only one of the two has."""
    found: dict[str, Mapping[str, list[bytes]]] = {}
    for relation in relations:
        ours, theirs = lines(leader, relation), lines(follower, relation)
        if ours != theirs:
            missing, extra = (ours - theirs).most_common(3), (theirs - ours).most_common(3)
            found[relation.label] = {
                "missing": [line[:200] for line, _ in missing],
                "extra": [line[:200] for line, _ in extra],
            }
    return found


FOLLOWERS = ("postgresql", "sqlite", "duckdb")
FollowerFactory = Callable[[str], str]
StreamFactory = Callable[..., Stream]


@pytest.fixture
def new_follower(postgres16: EmbeddedPostgres, database: DatabaseFactory, tmp_path: Path) -> FollowerFactory:
    """``new_follower(kind)`` is the URL of an empty one; a PostgreSQL of another major version than most leaders."""

    def make(kind: str) -> str:
        if kind == "postgresql":
            return database(postgres16)
        return f"{kind}:///{tmp_path}/follower.{kind}"

    return make


@pytest.fixture
def followers(new_follower: FollowerFactory) -> list[str]:
    """One of each kind."""
    return [new_follower(kind) for kind in FOLLOWERS]


@pytest.fixture
def stream(postgres18: EmbeddedPostgres, database: DatabaseFactory, tmp_path: Path) -> Stream:
    """An empty leader database; :meth:`Stream.setup` is up to the test."""
    return Stream.of(database(postgres18), tmp_path)


@pytest.fixture
def triggers(postgres: EmbeddedPostgres, database: DatabaseFactory, tmp_path: Path) -> TriggerStream:
    """As ``stream``, of a trigger log, on the server that ``postgres_major`` gives."""
    return TriggerStream.of(database(postgres), tmp_path)


def _main() -> None:
    order = json.loads(sys.argv[1])
    exec(order["code"], {})  # noqa: S102
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    kinds = {kind.__name__: kind for kind in (Stream, TriggerStream)}
    stream = kinds[order["kind"]](*order["stream"])
    before_mb = _peak_mb()
    try:
        (stream.ship if order["what"] == "ship" else stream.apply)(stop=stop, **order["arguments"])
    except CdcError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n{error.remedy}\n")
        raise SystemExit(error.exit_code) from error
    sys.stdout.write(json.dumps({"grown_mb": _peak_mb() - before_mb}) + "\n")


def _peak_mb() -> float:
    """Not getrusage's: that peak is inherited from whoever started us."""
    [peak_kb] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak_kb) / 1024


if __name__ == "__main__":
    _main()
