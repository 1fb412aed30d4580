"""How a running stream shows: bars and a live line on a terminal, a line now and then elsewhere, metrics if asked."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from cdc.cli.console import Console, printable, seconds_text, size_text
from cdc.codec import EnvelopeCodec
from cdc.errors import ConfigurationError
from cdc.ports import Progress
from cdc.record import Batch, Kind

LINE_EVERY_S: Final = 10.0
_DRAW_EVERY_S: Final = 0.1


@dataclass(slots=True)
class Totals:
    """Since the start of this process. ``lag_s``: how long after its commit the last transaction was done with."""

    transactions: int = 0
    rows: int = 0
    image_rows: int = 0
    size_bytes: int = 0
    position: str | None = None
    lsn: int = 0
    lag_s: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def json(self) -> dict[str, Any]:
        """The stable form."""
        return {
            "position": self.position,
            "transactions": self.transactions,
            "rows": self.rows,
            "image_rows": self.image_rows,
            "bytes": self.size_bytes,
            "seconds": round(self.seconds, 3),
        }


class WatchedCodec(EnvelopeCodec):
    """The codec, remembering the batch that passed last: it tells more than a progress report does."""

    def __init__(self) -> None:
        super().__init__()
        self.batch: Batch | None = None
        self.chunks_of = 0
        self.chunks_done = 0
        self.on_image: Callable[[Batch], None] = lambda _: None

    def encode(self, batch: Batch) -> bytes:
        self.batch = batch
        return super().encode(batch)

    def decode(self, body: bytes) -> Batch:
        batch = super().decode(body)
        self.batch = batch
        if batch.kind is Kind.IMAGE_BEGIN:
            self.on_image(batch)
            self.chunks_of, self.chunks_done = sum(len(plan.bounds) + 1 for plan in batch.plan), 0
        elif batch.kind is Kind.IMAGE_CHUNK and (batch.fragment is None or batch.fragment.last):
            self.chunks_done += 1
        return batch


class Meter:
    """Takes the pipeline's reports, which come up to thousands of times a second, and shows some of them."""

    def __init__(self, console: Console, codec: WatchedCodec) -> None:
        self.totals = Totals()
        self._console = console
        self._codec = codec
        self._drawing: _Drawing | None = None
        self._shown_at = time.monotonic()
        self._rate = _Rate()
        self._imaging = False

    @contextmanager
    def showing(self) -> Iterator[None]:
        if not self._console.live:
            yield
            return
        with _Drawing() as drawing:
            self._drawing = drawing
            try:
                yield
            finally:
                self._drawing = None

    def say(self, text: str) -> None:
        """A line that stays, above what is live."""
        self._console.note(text) if self._drawing is None else self._drawing.say(text)

    def __call__(self, progress: Progress) -> None:
        batch = self._codec.batch
        if progress.what == "image" or (progress.what == "apply" and batch is not None and batch.image is not None):
            self._image(progress, batch)
        else:
            self._end_image()
            self._count(progress, batch)
        now = time.monotonic()
        if now - self._shown_at >= (LINE_EVERY_S if self._drawing is None else _DRAW_EVERY_S):
            self._show(now)

    def _image(self, progress: Progress, batch: Batch | None) -> None:
        self._imaging = True
        self.totals.image_rows += progress.rows
        self.totals.size_bytes += progress.size_bytes
        if progress.what == "apply":
            if batch is not None and batch.kind is Kind.IMAGE_END:
                self._count(progress._replace(rows=0, size_bytes=0), batch)
                self._end_image()
                return
            label = batch.relations[0].label if batch is not None and batch.relations else ""
            progress = progress._replace(subject=label, done=self._codec.chunks_done, of=self._codec.chunks_of)
        if self._drawing is not None:
            self._drawing.image(progress, self.totals.image_rows)
        if progress.what == "image" and progress.of and progress.done == progress.of:
            self._end_image()

    def _end_image(self) -> None:
        if self._imaging:
            self._imaging = False
            if self._drawing is not None:
                self._drawing.end_image()
            self.say(f"image complete: {self.totals.image_rows:,} rows in {seconds_text(self.totals.seconds)}")

    def _count(self, progress: Progress, batch: Batch | None) -> None:
        totals = self.totals
        totals.transactions += progress.done if batch is None or batch.fragment is None or batch.fragment.last else 0
        totals.rows += progress.rows
        totals.size_bytes += progress.size_bytes
        totals.position = progress.subject or totals.position
        if batch is not None:
            totals.lsn = batch.position.lsn
            if batch.transactions:
                totals.lag_s = max(0.0, time.time() - batch.transactions[-1].committed_us / 1e6)

    def _show(self, now: float) -> None:
        self._shown_at = now
        rate = self._rate.at(now, self.totals.rows + self.totals.image_rows)
        if self._imaging and self._drawing is None:
            self._console.note(f"image: {self.totals.image_rows:,} rows, {rate:,.0f} rows/s")
        elif not self._imaging and self.totals.position is not None:
            self._show_position(rate)

    def _show_position(self, rate: float) -> None:
        totals = self.totals
        done = f"{totals.transactions:,} transactions, {totals.rows:,} rows"
        line = f"at {totals.position}: {done}, {rate:,.0f} rows/s"
        self._console.note(line) if self._drawing is None else self._drawing.line(line)

    def summary(self, verb: str) -> str:
        """What was done in all."""
        totals = self.totals
        image = f"an image of {totals.image_rows:,} rows and " if totals.image_rows else ""
        at = f", now at {totals.position}" if totals.position else ""
        return (
            f"{verb} {image}{totals.transactions:,} transactions with {totals.rows:,} rows "
            f"({size_text(totals.size_bytes)}) in {seconds_text(totals.seconds)}{at}"
        )


class _Rate:
    """Rows per second, over the last second or more."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._rows = 0
        self._rate = 0.0

    def at(self, now: float, rows: int) -> float:
        if now - self._since >= 1.0 or not self._rate:
            self._rate = (rows - self._rows) / max(now - self._since, 1e-3)
            self._since, self._rows = now, rows
        return self._rate


class _Drawing:
    """Bars and a live line on stderr."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as RichProgress

        text = TextColumn("{task.description}", markup=False)
        self._console = RichConsole(stderr=True)
        self._bars = RichProgress(SpinnerColumn(), text, BarColumn(24))
        self._lines = RichProgress(SpinnerColumn(), text)
        self._display = Live(Group(self._bars, self._lines), console=self._console, transient=True)
        self._bar: Any = None
        self._line: Any = None

    def __enter__(self) -> "_Drawing":
        self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()

    def say(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(printable(text)), soft_wrap=True)

    def image(self, progress: Progress, rows: int) -> None:
        text = printable(f"image {progress.subject}: chunk {progress.done} of {progress.of or '?'}, {rows:,} rows")
        if self._bar is None:
            self._bar = self._bars.add_task(text, total=progress.of or None)
        self._bars.update(self._bar, description=text, completed=progress.done, total=progress.of or None)

    def end_image(self) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None

    def line(self, text: str) -> None:
        if self._line is None:
            self._line = self._lines.add_task(text, total=None)
        self._lines.update(self._line, description=text)


@contextmanager
def metrics(port: int | None, stream: str, command: str, totals: Totals) -> Iterator[None]:
    """Serve the totals to Prometheus on the loopback address while the context lives.

    https://prometheus.io/docs/instrumenting/exposition_formats/

    :raises ConfigurationError: the port is taken, or the client is not installed.
    """
    if port is None:
        yield
        return
    from cdc.registry import optional

    client, core = optional("prometheus_client"), optional("prometheus_client.core")
    registry = client.CollectorRegistry()
    registry.register(_Collector(core, stream, command, totals))
    try:
        server, thread = client.start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise ConfigurationError(
            f"cannot serve metrics on 127.0.0.1:{port}: {error.strerror}", remedy="name another port with --metrics"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    def __init__(self, core: Any, stream: str, command: str, totals: Totals) -> None:
        self._core = core
        self._labels = (stream, command)
        self._totals = totals

    def collect(self) -> Iterator[Any]:
        totals = self._totals
        counters: dict[str, tuple[str, float]] = {
            "cdc_transactions": ("Transactions done", totals.transactions),
            "cdc_rows": ("Row messages done", totals.rows),
            "cdc_image_rows": ("Image rows done", totals.image_rows),
            "cdc_bytes": ("Bytes of messages and images done", totals.size_bytes),
        }
        gauges: dict[str, tuple[str, float]] = {
            "cdc_position": ("Log sequence number, in bytes", totals.lsn),
            "cdc_lag_seconds": ("From the commit of the last transaction until it was done with", totals.lag_s or 0.0),
        }
        for name, (text, value) in counters.items():
            yield self._metric(self._core.CounterMetricFamily, name, text, value)
        for name, (text, value) in gauges.items():
            yield self._metric(self._core.GaugeMetricFamily, name, text, value)

    def _metric(self, kind: Any, name: str, text: str, value: float) -> Any:
        family = kind(name, text, labels=("stream", "command"))
        family.add_metric(self._labels, value)
        return family
