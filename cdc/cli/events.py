"""``--codec debezium-json``: portable events in place of a native stream, for ``ship`` and for ``apply``."""

import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Final, cast

from appliers.events import EventApplyOptions, apply_events
from cdc import registry
from cdc.cli.options import Settings
from cdc.cli.progress import Meter
from cdc.cli.urls import native_topics, shown
from cdc.codec import EnvelopeCodec
from cdc.debezium.decode import Boundary, Decoder
from cdc.debezium.encode import Encoder, EventOptions
from cdc.debezium.schema import Modes
from cdc.debezium.topics import EventTopics
from cdc.errors import UsageError
from cdc.events import EventBroker, PackedEvents, Place, StoredEvent, partition_of, partitions_of
from cdc.pipeline import retrying
from cdc.ports import Broker, Follower, Progress
from cdc.position import format_lsn
from cdc.record import Checkpoint

_PREFIX: Final = re.compile(r"[A-Za-z0-9._-]+")
_SAMPLE_BYTES: Final = 64 << 10


def prefix_of(settings: Settings, stream: str) -> str:
    """
    :raises UsageError: the stream's name, which is the default, cannot begin a topic's.
    """
    prefix: str = settings.prefix or stream
    if not _PREFIX.fullmatch(prefix):
        raise UsageError(
            f"a topic's name cannot begin with {prefix!r}", remedy="name another prefix with --prefix NAME"
        )
    return prefix


def modes(settings: Settings) -> Modes:
    """How values are told, as the options say."""
    told = {
        "decimal": settings.decimal_handling,
        "time": settings.time_precision,
        "binary": settings.binary_handling,
        "interval": settings.interval_handling,
    }
    return Modes(**{name: mode for name, mode in told.items() if mode is not None})


# Out ------------------------------------------------------------------------------------------------------------------


def topics(settings: Settings, stream: str) -> registry.BrokerPlug:
    """How the broker is opened that takes a stream's batches and publishes their events."""
    options = _event_options(settings, prefix_of(settings, stream))
    open_events = registry.event_broker(settings.broker)

    def connect(url: str, *, create: bool) -> Broker:
        broker = open_events(url, create=create, partitions=settings.partitions)
        if isinstance(broker, PackedEvents):
            _check_partitions(broker, options.prefix, settings.partitions or 1)
        return EventTopics(broker, Encoder(options), EnvelopeCodec())

    return connect


def _event_options(settings: Settings, prefix: str) -> EventOptions:
    return EventOptions(
        prefix,
        modes(settings),
        schemas=settings.schemas_enable is not False,
        tombstones=settings.tombstones is not False,
        transactions=settings.transactions is not False,
        skipped="t" if settings.truncates is False else "",
    )


def _check_partitions(broker: PackedEvents, prefix: str, partitions: int) -> None:
    """Plain topics do not know how many belong together, but the keys that they hold tell.

    :raises UsageError: a key would change its partition, and with that lose its order.
    """
    for place in broker.places():
        if not place.topic.startswith(f"{prefix}."):
            continue
        count = partitions_of(place.topic, partitions)
        for event in broker.fetch({place: broker.bounds(place)[0]}, limit_bytes=_SAMPLE_BYTES, wait_s=0):
            if event.key is not None and partition_of(event.key, count) != place.partition:
                raise UsageError(
                    f"{place} was not written with {partitions} partitions", remedy="give --partitions as at first"
                )


# In -------------------------------------------------------------------------------------------------------------------


def apply_options(settings: Settings) -> EventApplyOptions:
    """What to apply. Without a name it is what the broker holds, if that is all under one prefix.

    :raises UsageError: it holds nothing of ours, or several prefixes.
    """
    given = settings.prefix or settings.stream
    prefix = prefix_of(settings, given if given is not None else _only_prefix(settings.broker))
    return EventApplyOptions(
        settings.stream or prefix,
        prefix,
        modes(settings),
        until_end=settings.until == "end",
        transactions=not settings.key_by_key,
    )


def _only_prefix(url: str) -> str:
    with closing(_connect(url)) as broker:
        names = sorted({place.topic for place in broker.places()})
    prefixes = native_topics(names)[1]
    if len(prefixes) == 1:
        return prefixes[0]
    if prefixes:
        raise UsageError(
            f"{shown(url)} holds events under {len(prefixes)} prefixes: {', '.join(prefixes)}",
            remedy="choose one with --prefix NAME",
        )
    raise UsageError(
        f"{shown(url)} holds no events that cdc wrote",
        remedy="start `cdc ship --codec debezium-json` first, or name the prefix with --prefix NAME",
    )


def _connect(url: str) -> EventBroker:
    return registry.event_broker(url)(url, create=False, partitions=None)


def follow(settings: Settings, options: EventApplyOptions, stop: threading.Event, meter: Meter) -> None:
    """Apply until told to stop, or until the end.

    :raises CdcError: as the applier does, once the retries of the settings brought no progress.
    """
    store = registry.store(settings.follower)
    caught_up = _Once(lambda: meter.say("caught up with all that the topics held at the start"))

    def attempt(progressed: Callable[[], None]) -> None:
        with closing(_connect(settings.broker)) as broker:
            # Up to an end we know it only when that was reached.
            watch = _Watch(options, meter, (lambda: None) if options.until_end else caught_up)

            def committed(events: int) -> None:
                progressed()
                watch.committed(events)

            follower = cast(Follower, _WatchedFollower(store.connect_follower(settings.follower), watch))
            apply_events(broker, follower, options, stop=stop, progressed=committed, fetched=watch.fetched)

    retrying(attempt, settings.retry_s, stop)
    if options.until_end and not stop.is_set():
        caught_up()


class _Once:
    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._told = False

    def __call__(self) -> None:
        if not self._told:
            self._told = True
            self._tell()


class _Watch:
    """Puts together what a commit brought: from the applier its rows, from the topics its transactions and bytes, from
    the checkpoint how far it came."""

    def __init__(self, options: EventApplyOptions, meter: Meter, caught_up: Callable[[], None]) -> None:
        self._topic = f"{options.prefix}.transaction"
        self._checkpoint = f"{options.stream} {Place(self._topic, 0)}"
        self._meter = meter
        self._caught_up = caught_up
        self._decoder = Decoder()
        self._ends: deque[int] = deque()
        self._size_bytes = 0
        self._applied_lsn = 0
        self._counted_lsn = 0

    def fetched(self, records: Sequence[StoredEvent]) -> None:
        if not records and not self._ends:
            self._caught_up()  # what came before was applied
        for record in records:
            self._size_bytes += len(record.key or b"") + len(record.value or b"")
            if record.place.topic == self._topic:
                item = self._decoder.decode(record)
                if isinstance(item, Boundary) and item.ended:
                    self._ends.append(item.lsn)

    def resumed(self, stream: str, checkpoint: Checkpoint | None) -> None:
        if stream == self._checkpoint and checkpoint is not None:
            self._applied_lsn = self._counted_lsn = checkpoint.position.lsn

    def checkpointed(self, stream: str, checkpoint: Checkpoint) -> None:
        if stream == self._checkpoint:
            self._applied_lsn = checkpoint.position.lsn

    def committed(self, events: int) -> None:
        size_bytes, self._size_bytes = self._size_bytes, 0
        lsn = self._applied_lsn
        self._meter.totals.lsn = lsn
        self._meter(Progress("apply", format_lsn(lsn) if lsn else "", self._transactions(), 0, events, size_bytes))

    def _transactions(self) -> int:
        """How many were applied since the last time. Ends that are told again do not count."""
        count = 0
        while self._ends and self._ends[0] <= self._applied_lsn:
            lsn = self._ends.popleft()
            count += lsn > self._counted_lsn
            self._counted_lsn = max(lsn, self._counted_lsn)
        return count


class _WatchedFollower:
    """A follower whose checkpoints are watched; all else is its own."""

    def __init__(self, follower: Follower, watch: _Watch) -> None:
        self._follower = follower
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._follower, name)

    def read_checkpoint(self, stream: str) -> Checkpoint | None:
        checkpoint = self._follower.read_checkpoint(stream)
        self._watch.resumed(stream, checkpoint)
        return checkpoint

    def write_checkpoint(self, stream: str, checkpoint: Checkpoint) -> None:
        self._follower.write_checkpoint(stream, checkpoint)
        self._watch.checkpointed(stream, checkpoint)
