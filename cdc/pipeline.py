"""The two loops: from a leader's log into a topic, and from a topic into a follower. They share nothing but the broker.

Retry lives here and nowhere else. An attempt opens its parts, works until it is done or an error ends it, and closes
them; a retriable error begins another attempt, which learns from the topic or the follower where things stand.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

from cdc.batcher import Batcher
from cdc.decide import Applied, Verdict, advance, decide
from cdc.errors import CdcError, ConfigurationError
from cdc.imaging import ImageCopy, Place
from cdc.ports import Applier, Broker, Codec, Preparing, Progress, Report, Shipper
from cdc.position import Position
from cdc.record import (
    Batch,
    Bundle,
    Checkpoint,
    Heartbeat,
    Kind,
    Transaction,
)
from cdc.topic import Tail, batches, decode, located, tail

HEARTBEAT_S: Final = 10.0
HEARTBEAT_BYTES: Final = 16 << 20  # one WAL segment
GROUP_BYTES: Final = 4 << 20  # of batches per follower commit
_BACKOFF_S_MAX: Final = 5.0


@dataclass(frozen=True, slots=True)
class ShipOptions:
    """``until_lsn``: stop once the topic holds everything up to there; "now" is where the leader's log ends at start.

    ``image``: "auto" takes one where the topic holds none, "new" always, "never" never.
    """

    stream: str
    until_lsn: int | Literal["now"] | None = None
    image: Literal["auto", "new", "never"] = "auto"
    linger_s: float = 0.005
    workers: int = 4
    heartbeat_s: float = HEARTBEAT_S
    retry_s: float = 60.0


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """``until``: "end" is what the topic holds at start, an int an LSN.

    ``reload``: begin at the topic's newest image where it is younger than what is applied, whatever lies between.
    """

    stream: str
    until: int | Literal["end"] | None = None
    reload: bool = False
    retry_s: float = 60.0


class _Hooks(NamedTuple):
    """What an attempt hears (``stop``) and tells."""

    stop: threading.Event
    report: Report
    progressed: Callable[[], None]
    began_image: Callable[[], None] = lambda: None


def ship(
    open_shipper: Callable[[], Shipper],
    open_broker: Callable[[], Broker],
    codec: Codec,
    options: ShipOptions,
    *,
    stop: threading.Event,
    report: Report,
) -> None:
    """Ship until told to stop, or until ``options.until_lsn``.

    :raises CdcError: as the shipper and the broker do, once ``options.retry_s`` seconds of retries brought no progress.
    """
    target: list[Position] = []
    image: list[Literal["auto", "new", "never"]] = [options.image]

    def began_image() -> None:
        image[0] = "auto"  # from here on the new image is the one to finish

    def attempt(progressed: Callable[[], None]) -> None:
        with closing(open_shipper()) as shipper, closing(open_broker()) as broker:
            if not target and options.until_lsn == "now":
                target.append(shipper.end())
            elif not target and isinstance(options.until_lsn, int):
                target.append(shipper.end().at(options.until_lsn))
            hooks = _Hooks(stop, report, progressed, began_image)
            _Ship(shipper, broker, codec, replace(options, image=image[0]), hooks).run(target[0] if target else None)

    retrying(attempt, options.retry_s, stop)


def follow(
    open_broker: Callable[[], Broker],
    open_applier: Callable[[], Applier],
    codec: Codec,
    options: ApplyOptions,
    *,
    stop: threading.Event,
    report: Report,
) -> None:
    """Apply until told to stop, or until ``options.until``.

    :raises CdcError: as the broker, the codec and the applier do; the follower is then at its last checkpoint.
    """
    end: list[int] = []

    def attempt(progressed: Callable[[], None]) -> None:
        with closing(open_broker()) as broker, closing(open_applier()) as applier:
            if options.until == "end" and not end:
                end.append(broker.bounds(options.stream)[1])
            _Follow(broker, applier, codec, options, _Hooks(stop, report, progressed)).run(end[0] if end else None)

    retrying(attempt, options.retry_s, stop)


def retrying(attempt: Callable[[Callable[[], None]], None], budget_s: float, stop: threading.Event) -> None:
    """Attempt until one ends well. Progress refills the budget of time in which none is made."""
    deadline = time.monotonic() + budget_s
    tries = 0

    def progressed() -> None:
        nonlocal deadline, tries
        deadline = time.monotonic() + budget_s
        tries = 0

    while True:
        try:
            attempt(progressed)
        except CdcError as error:
            if error.retriable and stop.is_set():
                return  # we were leaving anyway, and nothing is half done
            if not error.retriable or time.monotonic() >= deadline:
                raise
        else:
            return
        tries += 1
        stop.wait(min(_BACKOFF_S_MAX, 0.1 * 2 ** min(tries, 10)) * (0.5 + random.random() / 2))  # noqa: S311


class _Ship:
    """One attempt at shipping."""

    def __init__(self, shipper: Shipper, broker: Broker, codec: Codec, options: ShipOptions, hooks: _Hooks) -> None:
        self._shipper = shipper
        self._broker = broker
        self._codec = codec
        self._options = options
        self._stop, self._report, self._progressed, self._began_image = hooks

    def run(self, target: Position | None) -> None:
        position = self._begin()
        if position is not None and not self._stop.is_set():
            self._stream(position, target)

    def _begin(self) -> Position | None:
        """The position to stream from, after an image where one is wanted; None where we were told to stop."""
        options = self._options
        end = tail(self._broker, self._codec, options.stream)
        if end.format not in {None, self._shipper.format}:
            raise ConfigurationError(
                f"topic {options.stream!r} holds a {end.format} log, and this is a {self._shipper.format} one",
                remedy="ship it under another --stream",
            )
        if options.image != "new" and end.position is not None:
            return end.position
        if options.image == "never":
            raise ConfigurationError(
                f"topic {options.stream!r} has no complete image to continue from",
                remedy="ship without `--image never`",
            )
        if options.image == "new":
            end = Tail(None)
        place = Place(options.stream, self._shipper.format, self._write_image)
        with self._shipper.snapshot() as snapshot:
            image = ImageCopy(snapshot, place, workers=options.workers, stop=self._stop, report=self._report)
            return image.copy(end)

    def _stream(self, position: Position, target: Position | None) -> None:
        batcher = Batcher(self._options.stream, self._shipper.format, position)
        with _Writer(self._prepare, self._append) as writer:
            self._pump(batcher, writer, target)
            self._confirm(writer.wait())

    def _pump(self, batcher: Batcher, writer: "_Writer", target: Position | None) -> None:
        """Fill batches; hand one over when it is full, or when it has lingered and the writer has nothing to do."""
        options = self._options
        beat = time.monotonic()
        oldest: float | None = None
        for item in self._shipper.stream(batcher.position, wait_s=options.linger_s):
            self._confirm(writer.done())
            now = time.monotonic()
            if not isinstance(item, Heartbeat) and (target is None or item.position <= target):
                self._hand(writer, batcher.add(item) if isinstance(item, Transaction) else batcher.add_bundle(item))
                oldest = (oldest or now) if batcher else None
                waits = oldest is None or now - oldest < options.linger_s or writer.busy
                if waits and not self._stop.is_set():
                    continue
            if isinstance(item, Bundle) and target is not None and item.position > target:
                part = item.upto(target.lsn)
                self._hand(writer, batcher.add_bundle(part) if part is not None else ())
            self._hand(writer, batcher.flush())
            oldest = None
            reached = target is not None and item.position >= target
            settled = target if target is not None and reached else item.position
            ahead = settled.lsn - batcher.position.lsn
            if ahead > 0 and (reached or now - beat >= options.heartbeat_s or ahead >= HEARTBEAT_BYTES):
                self._hand(writer, [batcher.heartbeat(settled)])
                beat = now
            if reached or self._stop.is_set():
                return
            if isinstance(item, Heartbeat):
                self._confirm(writer.wait())  # nothing else to do: the leader hears of it without delay

    def _hand(self, writer: "_Writer", batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._confirm(writer.write(batch))

    def _prepare(self, batch: Batch) -> None:
        if isinstance(self._broker, Preparing):
            self._broker.prepare(batch)

    def _append(self, batch: Batch) -> None:
        self._broker.append(self._options.stream, [self._codec.encode(batch)])

    def _confirm(self, batch: Batch | None) -> None:
        """The broker has made ``batch`` durable: let the leader forget what it holds."""
        if batch is None:
            return
        if batch.fragment is None or batch.fragment.last:
            self._shipper.confirm(batch.position)
        self._progressed()
        self._report(
            Progress("stream", str(batch.position), len(batch.transactions), 0, len(batch.lengths), len(batch.body))
        )

    def _write_image(self, batches: list[Batch]) -> None:
        if batches:
            self._broker.append(self._options.stream, [self._codec.encode(batch) for batch in batches])
            self._began_image()
            self._progressed()


class _Writer:
    """Appends one batch at a time beside the reading, so that what arrives meanwhile fills the next one."""

    def __init__(self, prepare: Callable[[Batch], None], append: Callable[[Batch], None]) -> None:
        self._prepare = prepare
        self._append = append
        self._pool = ThreadPoolExecutor(1, "cdc-append")
        self._batch: Batch | None = None
        self._future: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    @property
    def busy(self) -> bool:
        return self._future is not None and not self._future.done()

    def done(self) -> Batch | None:
        """The batch that became durable since the last call, if one did."""
        return None if self.busy else self.wait()

    def wait(self) -> Batch | None:
        """As :meth:`done`, once nothing is being written."""
        if self._future is None:
            return None
        self._future.result()
        batch, self._batch, self._future = self._batch, None, None
        return batch

    def write(self, batch: Batch) -> Batch | None:
        """Begin to write a batch, after the one before it, which is returned."""
        self._prepare(batch)  # while the one before it may still be on its way
        before = self.wait()
        self._batch = batch
        self._future = self._pool.submit(self._append, batch)
        return before


class _Follow:
    """One attempt at following. One read of the broker is one commit of the follower, unless a fragment is open."""

    def __init__(self, broker: Broker, applier: Applier, codec: Codec, options: ApplyOptions, hooks: _Hooks) -> None:
        self._broker = broker
        self._applier = applier
        self._codec = codec
        self._options = options
        self._stop, self._report, self._progressed, _ = hooks
        self._applied = Applied()
        self._committed = Applied()
        self._epoch = 0
        self._uncommitted = False

    def run(self, end: int | None) -> None:
        offset = self._claim()
        while not self._reached(offset, end):
            messages = self._broker.read(
                self._options.stream, offset, limit_bytes=GROUP_BYTES, wait_s=0 if self._stop.is_set() else 0.5
            )
            for message in messages:
                batch = decode(self._codec, self._options.stream, message.offset, message.body)
                if batch.fragment == (0, False):
                    # What may have to be rolled back alone must stand alone.
                    self._commit(message.offset)
                self._take(batch, message.offset)
                offset = message.offset + 1
                if batch.kind in {Kind.IMAGE_BEGIN, Kind.IMAGE_END} or self._at_target():
                    break
            self._commit(offset)
            if self._stop.is_set():
                break
        self._applier.rollback()

    def _claim(self) -> int:
        """Own the stream on this follower, and return the offset to read from."""
        self._epoch, checkpoint = self._applier.claim(self._options.stream)
        if checkpoint is None:
            return self._broker.bounds(self._options.stream)[0]
        self._applied = self._committed = Applied(checkpoint.position, checkpoint.image)
        return self._newest_image(checkpoint) if self._options.reload else checkpoint.offset

    def _newest_image(self, checkpoint: Checkpoint) -> int:
        """The offset of the youngest image that is beyond the checkpoint, else the checkpoint's own."""
        found = checkpoint.offset
        for offset, batch in batches(self._broker, self._codec, self._options.stream):
            if batch.kind is Kind.IMAGE_BEGIN and batch.position > checkpoint.position:
                found = offset
        return found

    def _reached(self, offset: int, end: int | None) -> bool:
        return (end is not None and offset >= end) or (self._applied.fragment == 0 and self._at_target())

    def _at_target(self) -> bool:
        until, at = self._until, self._applied.position
        return until is not None and at is not None and not self._applied.loading and at >= until

    @property
    def _until(self) -> Position | None:
        until, at = self._options.until, self._applied.position
        return at.at(until) if isinstance(until, int) and at is not None else None

    def _take(self, batch: Batch, offset: int) -> None:
        try:
            verdict = decide(batch, self._applied)
            if verdict is Verdict.SKIP:
                return
            if verdict is Verdict.RESTART:
                self._restart()
            until = self._until
            self._applier.apply(batch, after=self._applied.position, until=until, offset=offset)
        except CdcError as error:
            raise located(error, self._options.stream, offset, batch.position) from error
        self._applied = advance(batch, self._applied, until)
        self._uncommitted = True
        self._report(
            Progress(
                "apply",
                str(batch.position),
                len(batch.transactions),
                0,
                len(batch.lengths) or (batch.image.rows if batch.image is not None else 0),
                len(batch.body),
            )
        )

    def _restart(self) -> None:
        """The shipper began the open transaction anew: so do we."""
        self._applier.rollback()
        self._applied = self._committed

    def _commit(self, offset: int) -> None:
        """Commit what was applied, unless a fragment is open: then nothing of it may be seen yet."""
        position = self._applied.position
        if not self._uncommitted or self._applied.fragment or position is None:
            return
        # A batch that `until` cut in two is read again next time.
        whole = self._until is None or position != self._until
        self._applier.commit(Checkpoint(position, offset if whole else offset - 1, self._epoch, self._applied.image))
        self._committed = self._applied
        self._uncommitted = False
        self._progressed()
