"""The two loops, killed at every step: the topic is told at least once, the follower changed exactly once."""

# ruff: noqa: ARG002, ARG005 - a protocol has arguments that a model has no use for

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import pytest

from appliers.rows import RowsApplier
from cdc.codec import EnvelopeCodec
from cdc.errors import CdcError, ConfigurationError, DecodeError, GapError, OutcomeUnknownError, UnavailableError
from cdc.pipeline import ApplyOptions, ShipOptions, follow, ship
from cdc.ports import ImageChunk, Progress
from cdc.position import Position
from cdc.record import NULL, UNCHANGED, ChunkPlan, Format, Heartbeat, Kind, Message, Relation, Run, Transaction
from cdc.wire import copy
from tests.unit.test_changes import Step, Table, _stepped, _v
from tests.unit.test_rows_applier import KEYED, Disk, MemoryFollower, message

LARGE = 500 << 10


class KilledError(Exception):
    """Not of ours: nothing catches it, as nothing catches SIGKILL."""


class Faults:
    """Counts the steps of the world and fails at one of them."""

    def __init__(self, at: int = -1, error: Exception | None = None) -> None:
        self.seen: list[str] = []
        self._at = at
        self._error = error or KilledError()
        self._lock = threading.Lock()

    def step(self, name: str) -> None:
        with self._lock:
            self.seen.append(name)
            if len(self.seen) - 1 == self._at:
                raise self._error


def _row(key: int, value: int, size: int = 1) -> tuple[bytes, ...]:
    return _v(key), _v(value), size.to_bytes(4) + b"\1" * size


class Leader:
    """A leader with one table. Position n + 1 is the end of the n-th step; large rows make fragments."""

    def __init__(self) -> None:
        self.start: Table = {(_v(n),): _row(n, 0) for n in range(6)}
        self.steps: list[list[Step]] = []

    def commit(self, *steps: Step) -> None:
        self.steps.append(list(steps))

    def at(self, lsn: int) -> Table:
        return _stepped(self.start, [step for steps in self.steps[: lsn - 1] for step in steps])

    @property
    def end(self) -> Position:
        return Position("leader", 1, len(self.steps) + 1)


def _worked(leader: Leader, round_: int) -> None:
    """Some of everything: an insert, an unchanged value, a delete, a moved row, and a transaction of many fragments."""
    new = 20 + 3 * round_
    leader.commit(("I", None, _row(new, 1), False))
    leader.commit(("U", None, (_v(new), _v(2), UNCHANGED), False), ("I", None, _row(new + 1, 1), False))
    leader.commit(*[("U", None, _row(n, round_ + 3, LARGE), False) for n in (3, 4, 5)])
    leader.commit(("D", (_v(new), NULL, NULL), None, False))
    leader.commit(("U", (_v(new + 1), NULL, NULL), _row(new + 2, round_), False))


class MemorySnapshot:
    def __init__(self, leader: Leader, faults: Faults) -> None:
        self.position = leader.end
        self._table = leader.at(self.position.lsn)
        self._faults = faults

    def relations(self) -> Sequence[Relation]:
        return [KEYED]

    def plan(self, relation: Relation) -> ChunkPlan:
        return ChunkPlan(relation.id, (("2",), ("4",), ("20",)))

    def read(self, relation: Relation, plan: ChunkPlan, chunk: int) -> Iterator[ImageChunk]:
        bounds = [0, *[int(low) for (low,) in plan.bounds], 256]
        self._faults.step("read")
        rows = [row for row in self._table.values() if bounds[chunk] <= row[0][4] < bounds[chunk + 1]]  # type: ignore[index]
        for part in (rows[:1], rows[1:]):
            body = b"".join([len(row).to_bytes(2) + b"".join(map(bytes, row)) for row in part])  # type: ignore[arg-type]
            yield ImageChunk(copy.SIGNATURE + bytes(8) + body + b"\xff\xff", len(part), "binary")


class MemoryShipper:
    format: ClassVar[Format] = Format.LOGICAL

    def __init__(self, leader: Leader, faults: Faults, topic: "MemoryBroker") -> None:
        self._leader = leader
        self._faults = faults
        self._topic = topic
        self.confirmed: list[int] = []

    @contextmanager
    def snapshot(self) -> Iterator[MemorySnapshot]:
        self._faults.step("snapshot")
        yield MemorySnapshot(self._leader, self._faults)

    def stream(self, after: Position, *, wait_s: float) -> Iterator[Transaction | Heartbeat]:
        self._faults.step("stream")
        for lsn in range(after.lsn + 1, self._leader.end.lsn + 1):
            runs = []
            for step in self._leader.steps[lsn - 2]:
                body = message(KEYED, step)
                runs.append(Run({KEYED.id: KEYED}, [len(body)], body))
            yield Transaction(after.at(lsn), lsn, 0, iter(runs), sum(len(run.body) for run in runs))
        while True:
            time.sleep(wait_s)
            yield Heartbeat(self._leader.end)

    def confirm(self, position: Position) -> None:
        assert position.lsn <= self._topic.durable_lsn, "the leader may forget what the topic does not hold"
        assert not self.confirmed or position.lsn >= self.confirmed[-1]
        self.confirmed.append(position.lsn)
        self._faults.step("confirm")

    def end(self) -> Position:
        return self._leader.end

    def close(self) -> None: ...


class MemoryBroker:
    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.faults = Faults()
        self.delay_s = 0.0

    @property
    def durable_lsn(self) -> int:
        last = EnvelopeCodec().decode(self.bodies[-1])
        return last.position.lsn if last.fragment is None or last.fragment.last else last.previous.lsn

    def kinds(self) -> list[Kind]:
        return [EnvelopeCodec().decode(body).kind for body in self.bodies]

    def append(self, topic: str, bodies: Sequence[bytes]) -> int:
        self.faults.step("append")
        time.sleep(self.delay_s)
        self.bodies += bodies
        self.faults.step("appended")
        return len(self.bodies) - len(bodies)

    def read(self, topic: str, offset: int, *, limit_bytes: int, wait_s: float) -> Sequence[Message]:
        found: list[Message] = []
        size = 0
        for at in range(offset, len(self.bodies)):
            if found and size + len(self.bodies[at]) > limit_bytes:
                break
            size += len(self.bodies[at])
            found.append(Message(at, self.bodies[at]))
        return found

    def bounds(self, topic: str) -> tuple[int, int]:
        return 0, len(self.bodies)

    def topics(self) -> Sequence[str]:
        return ["s"]

    def close(self) -> None: ...


def _silent(_: Progress) -> None: ...


def _ship(leader: Leader, broker: MemoryBroker, faults: Faults | None = None, **options: object) -> MemoryShipper:
    faults = broker.faults = faults or Faults()
    shipper = MemoryShipper(leader, faults, broker)
    settings = {"until_lsn": "now", "linger_s": 0.0005, "workers": 2, "retry_s": 20.0} | options
    wanted = ShipOptions("s", **settings)  # type: ignore[arg-type]
    ship(lambda: shipper, lambda: broker, EnvelopeCodec(), wanted, stop=threading.Event(), report=_silent)
    return shipper


def _follow(broker: MemoryBroker, disk: Disk, until: int | None = None) -> None:
    open_applier: Callable[[], RowsApplier] = lambda: RowsApplier(MemoryFollower(disk))  # noqa: E731
    options = ApplyOptions("s", until if until is not None else "end", retry_s=20.0)
    follow(lambda: broker, open_applier, EnvelopeCodec(), options, stop=threading.Event(), report=_silent)


def _assert_equal(disk: Disk, leader: Leader, lsn: int | None = None) -> None:
    wanted = leader.at(lsn or leader.end.lsn)
    assert sorted(disk.kept.tables[KEYED.label]) == sorted(wanted.values())


def _steps_of(run: Callable[[Faults], object]) -> int:
    faults = Faults()
    run(faults)
    return len(faults.seen)


def _first(faults: Faults) -> tuple[Leader, MemoryBroker]:
    leader, broker = Leader(), MemoryBroker()
    _worked(leader, 0)
    _ship(leader, broker, faults)
    return leader, broker


def _world(faults: Faults) -> None:
    leader, broker = _first(faults)
    _worked(leader, 1)
    _ship(leader, broker, faults)


@pytest.mark.parametrize(
    "error",
    [KilledError(), UnavailableError("gone"), OutcomeUnknownError("perhaps")],
    ids=["kill", "reject", "unknown"],
)
def test_a_shipper_that_fails_at_any_step_loses_nothing(error: Exception) -> None:
    """Image included: what an earlier shipper had copied stays, and the leader has moved on when the next one comes."""
    for at in range(_steps_of(_world)):
        leader, broker, faults, early = Leader(), MemoryBroker(), Faults(at, error), Disk()
        _worked(leader, 0)
        for round_ in (1, 2):
            try:
                _ship(leader, broker, faults)
            except KilledError:
                _worked(leader, round_)
                _follow(broker, early)
                _ship(leader, broker)
                break
            _worked(leader, round_)
        _ship(leader, broker)
        late = Disk()
        for disk in (early, late, late):
            _follow(broker, disk)
            _assert_equal(disk, leader)


def test_a_follower_that_fails_at_any_step_changes_everything_once() -> None:
    leader, broker = _first(Faults())
    _worked(leader, 1)
    _ship(leader, broker)
    counting = Disk()
    counted = Faults()
    counting.step = counted.step
    _follow(broker, counting)
    for error in (KilledError(), OutcomeUnknownError("perhaps")):
        for at in range(len(counted.seen)):
            disk = Disk()
            disk.step = Faults(at, error).step
            try:
                _follow(broker, disk)
            except KilledError:
                _follow(broker, disk)
            _assert_equal(disk, leader)


def test_a_follower_killed_amid_fragments_told_twice_keeps_its_place() -> None:
    """The large transaction begins right where the follower's checkpoint is, and was begun twice by the shipper."""
    leader, broker, disk = Leader(), MemoryBroker(), Disk()
    _ship(leader, broker)
    leader.commit(*[("U", None, _row(n, 7, LARGE), False) for n in (3, 4, 5)])
    _follow(broker, disk)
    with pytest.raises(KilledError):
        _ship(leader, broker, Faults(4))
    torn = len(broker.bodies)
    _ship(leader, broker)
    assert torn < len(broker.bodies)
    _follow(broker, disk)
    _assert_equal(disk, leader)


def test_a_chunk_torn_and_told_again_keeps_the_images_progress() -> None:
    leader, broker = Leader(), MemoryBroker()
    _ship(leader, broker, workers=1)
    codec = EnvelopeCodec()
    chunks = [n for n, kind in enumerate(broker.kinds()) if kind is Kind.IMAGE_CHUNK]
    second = [n for n in chunks if (head := codec.decode(broker.bodies[n]).image) is not None and head.sequence == 1]
    whole, torn = broker.bodies, broker.bodies[second[0]]
    disk = Disk()
    broker.bodies = whole[: second[0]]
    _follow(broker, disk)
    broker.bodies = [*whole[: second[0]], torn, *whole[second[0] :]]
    _follow(broker, disk)
    _assert_equal(disk, leader)


def test_an_append_that_was_done_after_all_hides_no_other_chunk() -> None:
    """Chunks are written by several hands: none may take the place of one that may be there."""
    for at in range(16):
        leader, broker, faults = Leader(), MemoryBroker(), Faults(at, OutcomeUnknownError("perhaps"))
        _ship(leader, broker, faults, workers=4)
        sequences = [
            (batch.image.sequence, batch.image.chunk)
            for batch in map(EnvelopeCodec().decode, broker.bodies)
            if batch.kind is Kind.IMAGE_CHUNK and batch.image is not None and batch.fragment == (1, True)
        ]
        assert sorted(sequence for sequence, _ in sequences[-4:]) == [0, 1, 2, 3]
        disk = Disk()
        _follow(broker, disk)
        _assert_equal(disk, leader)


def test_a_new_image_is_taken_once_whatever_fails_after_it() -> None:
    leader, broker = _first(Faults())
    _ship(leader, broker, Faults(17, UnavailableError("gone")), image="new")
    assert broker.kinds().count(Kind.IMAGE_END) == 2


def test_confirmed_is_what_the_broker_holds_and_all_of_it_in_the_end() -> None:
    leader, broker = Leader(), MemoryBroker()
    broker.delay_s = 0.01
    _worked(leader, 0)
    _ship(leader, broker)
    _worked(leader, 1)
    shipper = _ship(leader, broker)  # confirm() itself asserts that nothing is confirmed too early
    assert shipper.confirmed[-1] == leader.end.lsn


def _streaming(leader: Leader, broker: MemoryBroker, seconds: float, **options: object) -> MemoryShipper:
    """Ship until told to stop."""
    stop, shipper = threading.Event(), MemoryShipper(leader, broker.faults, broker)
    timer = threading.Timer(seconds, stop.set)
    timer.start()
    wanted = ShipOptions("s", **({"linger_s": 0.002} | options))  # type: ignore[arg-type]
    ship(lambda: shipper, lambda: broker, EnvelopeCodec(), wanted, stop=stop, report=_silent)
    timer.join()
    return shipper


def test_an_idle_leader_is_told_that_it_may_forget() -> None:
    leader, broker = Leader(), MemoryBroker()
    _ship(leader, broker)
    leader.commit()  # of a table that nobody captures: no transaction comes, but the log moves on
    quiet = MemoryShipper(leader, broker.faults, broker)
    quiet.stream = lambda after, *, wait_s: iter([Heartbeat(after.at(2))] * 3)  # type: ignore[method-assign]
    options = ShipOptions("s", heartbeat_s=0.0)
    ship(lambda: quiet, lambda: broker, EnvelopeCodec(), options, stop=threading.Event(), report=_silent)
    assert broker.kinds().count(Kind.HEARTBEAT) == 1
    assert quiet.confirmed == [2]


def test_small_transactions_that_come_together_share_a_batch() -> None:
    leader, broker = Leader(), MemoryBroker()
    _ship(leader, broker)
    for n in range(50):
        leader.commit(("U", None, _row(1, n), False))
    _streaming(leader, broker, 0.3, linger_s=0.1)
    assert broker.kinds().count(Kind.LOG) <= 2


def test_stopping_does_not_wait_for_a_pause() -> None:
    """A leader that never rests, whose every transaction fills batches."""
    leader, broker = Leader(), MemoryBroker()
    _ship(leader, broker)
    restless, end = MemoryShipper(leader, broker.faults, broker), time.monotonic() + 5

    def stream(after: Position, *, wait_s: float) -> Iterator[Transaction | Heartbeat]:
        body = message(KEYED, ("U", None, _row(1, 1, 2 * LARGE), False))
        while time.monotonic() < end:
            after = after.at(after.lsn + 1)
            yield Transaction(after, 1, 0, iter([Run({KEYED.id: KEYED}, [len(body)], body)]), len(body))
        pytest.fail("told to stop, and went on")

    restless.stream = stream  # type: ignore[method-assign]
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    ship(lambda: restless, lambda: broker, EnvelopeCodec(), ShipOptions("s"), stop=stop, report=_silent)


def test_until_a_position_on_either_side() -> None:
    leader, broker = Leader(), MemoryBroker()
    _ship(leader, broker)
    _worked(leader, 0)
    _ship(leader, broker, until_lsn=3)
    assert broker.durable_lsn == 3
    _ship(leader, broker)
    disk = Disk()
    for lsn in (2, 3, 5):
        _follow(broker, disk, lsn)
        _assert_equal(disk, leader, lsn)
    _follow(broker, disk)
    _assert_equal(disk, leader)


def test_never_an_image_where_one_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="no complete image"):
        _ship(Leader(), MemoryBroker(), image="never")


def test_a_broken_body_stops_the_follower_where_it_was() -> None:
    leader, broker = _first(Faults())
    disk = Disk()
    _follow(broker, disk)
    before = disk.kept.tables
    _worked(leader, 1)
    _ship(leader, broker)
    whole = broker.bodies[-1]
    broker.bodies[-1] = whole[:-1]
    with pytest.raises(DecodeError, match=f"offset {len(broker.bodies) - 1}"):
        _follow(broker, disk)
    broker.bodies[-1] = whole
    _follow(broker, disk)
    _assert_equal(disk, leader)
    assert before != disk.kept.tables


def test_a_hole_in_the_topic_stops_the_follower() -> None:
    leader, broker = _first(Faults())
    for _ in range(3):
        leader.commit(("U", None, _row(1, 9), False))
        _ship(leader, broker)
    del broker.bodies[-2]
    disk = Disk()
    with pytest.raises(GapError, match="hole"):
        _follow(broker, disk)
    _assert_equal(disk, leader, disk.kept.checkpoints["s"].position.lsn)


def test_a_budget_without_progress_runs_out() -> None:
    def refuse() -> MemoryBroker:
        raise UnavailableError("nobody there")

    began = time.monotonic()
    with pytest.raises(CdcError, match="nobody there"):
        shipper = MemoryShipper(Leader(), Faults(), MemoryBroker())
        options = ShipOptions("s", retry_s=0.3)
        ship(lambda: shipper, refuse, EnvelopeCodec(), options, stop=threading.Event(), report=_silent)
    assert 0.2 < time.monotonic() - began < 5
