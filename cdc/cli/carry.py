"""``cdc ship`` and ``cdc apply``: open the parts, run the loop, say how it went."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType

from cdc import registry
from cdc.cli.console import Console
from cdc.cli.options import EVENTS_IN, EVENTS_OUT, NATIVE, NATIVE_IN, Settings
from cdc.cli.progress import Meter, WatchedCodec, metrics
from cdc.cli.urls import only_topic, shown
from cdc.config import Option
from cdc.errors import CdcError, UsageError
from cdc.pipeline import ApplyOptions, ShipOptions, follow, ship
from cdc.ports import Applier, Broker, Shipper
from cdc.record import Batch, Message
from cdc.registry import Capture
from cdc.sql.mapping import DIALECTS as OTHER_DIALECTS
from cdc.sql.mapping import losses


def run(settings: Settings) -> int:
    return {"ship": _ship, "apply": _apply}[settings.command](settings)


def _check_codec(settings: Settings) -> None:
    """
    :raises UsageError: an option that means nothing with the codec that was chosen.
    """
    if settings.codec == NATIVE:
        options = EVENTS_OUT if settings.command == "ship" else EVENTS_IN
        _refuse(settings, options, "is for portable events", "add --codec debezium-json, or leave it out")
    elif settings.command == "apply":
        _refuse(settings, NATIVE_IN, "is for native streams", "leave it out")
        if isinstance(settings.until, int):
            raise UsageError("events are not applied up to an LSN", remedy="use --until end")


def _refuse(settings: Settings, options: Sequence[Option], what: str, remedy: str) -> None:
    for option in options:
        if getattr(settings, option.key) != option.default:
            raise UsageError(f"--{option.name} {what}", remedy=remedy)


def _ship(settings: Settings) -> int:
    from cdc.cli.session import names_of_url

    _check_codec(settings)
    open_log = registry.shipper(settings.leader, settings.format)
    names = names_of_url(settings.leader, settings)
    open_broker, what = registry.broker(settings.broker), f"stream {names.stream}"
    if settings.codec != NATIVE:
        from cdc.cli import events

        open_broker = events.topics(settings, names.stream)
        what += f", as events under {events.prefix_of(settings, names.stream)}"
    poll_s = settings.poll_ms / 1000 if settings.polling else None
    capture = Capture(names.publication, names.slot, settings.values, poll_s)
    options = ShipOptions(
        names.stream,
        settings.until,
        settings.image,
        linger_s=settings.linger_ms / 1000,
        workers=settings.workers,
        retry_s=settings.retry_s,
    )
    open_broker(settings.broker, create=True).close()  # a bad URL is told before anything is connected

    def shipper() -> Shipper:
        return open_log(settings.leader, capture)

    def broker() -> Broker:
        return open_broker(settings.broker, create=True)

    def loop(codec: WatchedCodec, stop: threading.Event, meter: Meter) -> None:
        meter.say(f"shipping {shown(settings.leader)} to {shown(settings.broker)}, {what}")
        ship(shipper, broker, codec, options, stop=stop, report=meter)

    return _carry(settings, names.stream, "shipped", loop)


def _apply(settings: Settings) -> int:
    from appliers.narrow import narrowed
    from appliers.rows import RowsApplier

    _check_codec(settings)
    if settings.codec != NATIVE:
        return _apply_events(settings)
    open_broker = registry.broker(settings.broker)
    store = registry.store(settings.follower)
    with closing(open_broker(settings.broker, create=False)) as first:
        stream = only_topic(first, settings.broker, settings.stream)
    options = ApplyOptions(stream, settings.until, settings.reload, retry_s=settings.retry_s)
    dialect = registry.scheme_of(settings.follower)

    def applier() -> Applier:
        follower = store.connect_follower(settings.follower)
        if settings.lacking == "leave-out":
            follower = narrowed(follower)
        return RowsApplier(follower, schema_changed=settings.schema_changed)

    def loop(codec: WatchedCodec, stop: threading.Event, meter: Meter) -> None:
        codec.on_image = lambda batch: _tell_losses(batch, dialect, meter)
        end = _End(stream, lambda: meter.say("caught up with all that the topic held at the start"))

        def broker() -> Broker:
            return end.watch(open_broker(settings.broker, create=False))

        meter.say(f"applying {shown(settings.broker)} to {shown(settings.follower)}, stream {stream}")
        follow(broker, applier, codec, options, stop=stop, report=meter)
        if settings.until == "end" and not stop.is_set():
            end.reached()

    return _carry(settings, stream, "applied", loop)


def _apply_events(settings: Settings) -> int:
    from cdc.cli import events

    options = events.apply_options(settings)

    def loop(_: WatchedCodec, stop: threading.Event, meter: Meter) -> None:
        what = f"the events under {options.prefix} of {shown(settings.broker)}"
        meter.say(f"applying {what} to {shown(settings.follower)}, stream {options.stream}")
        events.follow(settings, options, stop, meter)

    return _carry(settings, options.stream, "applied", loop)


def _tell_losses(image: Batch, dialect: str, meter: Meter) -> None:
    """What the follower's types cannot hold as the leader's do is said before the first row comes."""
    if dialect in OTHER_DIALECTS:
        for relation in image.relations:
            for loss in losses(relation, dialect):
                meter.say(f"note: {loss}")


def _carry(
    settings: Settings, stream: str, verb: str, loop: Callable[[WatchedCodec, threading.Event, Meter], None]
) -> int:
    console, codec = Console(settings), WatchedCodec()
    meter = Meter(console, codec)
    with stopping() as stop, metrics(settings.metrics, stream, settings.command, meter.totals):
        with meter.showing():
            try:
                loop(codec, stop, meter)
            except CdcError as error:
                if not (error.retriable and stop.is_set()):
                    raise
                meter.say(f"stopped while waiting to try again: {error}")
        console.note(meter.summary(verb))
    if settings.json:
        console.out_json({"command": settings.command, "stream": stream, **meter.totals.json()})
    return 0


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second ends the process where it stands.

    Nothing is lost by that: what was not committed is done again at the next start.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    asked = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True
        # Not here: the interrupted thread may hold the event's lock.
        threading.Thread(target=stop.set, daemon=True).start()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _End:
    """Notices when a reader has got to where the topic ended when it was first read."""

    def __init__(self, stream: str, tell: Callable[[], None]) -> None:
        self._stream = stream
        self._tell = tell
        self._end: int | None = None
        self._told = False

    def watch(self, broker: Broker) -> Broker:
        return _Watched(broker, self)

    def read_at(self, broker: Broker, offset: int) -> None:
        if self._end is None:
            self._end = broker.bounds(self._stream)[1]
        if 0 < self._end <= offset:
            self.reached()

    def reached(self) -> None:
        """What lies below was committed: a follower reads on only after that."""
        if not self._told:
            self._told = True
            self._tell()


class _Watched:
    """A broker whose reader is watched."""

    def __init__(self, broker: Broker, end: _End) -> None:
        self._broker = broker
        self._end = end

    def append(self, topic: str, bodies: Sequence[bytes]) -> int:
        return self._broker.append(topic, bodies)

    def read(self, topic: str, offset: int, *, limit_bytes: int, wait_s: float) -> Sequence[Message]:
        self._end.read_at(self._broker, offset)
        return self._broker.read(topic, offset, limit_bytes=limit_bytes, wait_s=wait_s)

    def bounds(self, topic: str) -> tuple[int, int]:
        return self._broker.bounds(topic)

    def topics(self) -> Sequence[str]:
        return self._broker.topics()

    def close(self) -> None:
        self._broker.close()
