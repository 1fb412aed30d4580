"""The logical log without REPLICATION: a slot peeked at through functions that `cdc setup --polling-role` makes.

Positions and topics are those of :mod:`shippers.postgresql.logical`: one may change from one to the other at any time.

Each peek decodes from the slot's restart point anew, whatever was peeked at before, and acknowledging reads the same
WAL once more without building rows. So a peek covers as much WAL as lies between the restart point and what is wanted,
at least :data:`WINDOW_BYTES`: that keeps the work in proportion to the log. The server moves restart points on every 15
seconds or so, unless a long transaction holds them back. A peek's result waits on the server, in a temporary file where
it is large, and is read from there row by row. Nothing is told twice: what follows a peek begins behind it.
"""

import select
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import psycopg
from psycopg import pq
from psycopg.errors import error_from_result
from psycopg.pq.abc import PGconn

from cdc.errors import CdcError, ConfigurationError, FencedError, TransientError
from cdc.ports import Snapshot
from cdc.position import Position, format_lsn, parse_lsn
from cdc.record import Bundle, Format, Heartbeat, Transaction
from cdc.sql.quote import literal
from cdc.stores.postgresql.connect import Connection, connect, translated
from cdc.stores.postgresql.polling import Polled, must_be_callable
from cdc.wire import copy, pgoutput
from shippers.postgresql.assemble import BUNDLE_BYTES, FRAME_BYTES, RUN_BYTES, Assembler
from shippers.postgresql.image import PostgresSnapshot, Published
from shippers.postgresql.leader import HANDOVER_S, IDLE_S, Leader, Slot, taking_over
from shippers.postgresql.visible import Committed, Seen, image_lsn

WINDOW_BYTES: Final = 16 << 20  # of WAL that a peek covers, at least
WINDOW_BYTES_MAX: Final = 256 << 20  # at most, for the sake of the server's temporary files
SNAPSHOT_S: Final = 30.0  # of looking for a snapshot that has a place in the log
_RETRY_S: Final = 0.02
_QUIETER: Final = (
    "let fewer sessions write while the image begins, or run `cdc ship --until now` once without --polling, "
    "as a role with REPLICATION; then poll on"
)
# A row of COPY begins with the number of columns and each value's length: with a filler of this size in front of it, a
# message stands as far behind as in the frames of a replication stream, and is taken as one.
_FILLER: Final = "'\\x" + "00" * (FRAME_BYTES - 2 - 4 - 4) + "'::bytea"


@dataclass(frozen=True, slots=True)
class Options:
    """``poll_s``: how long to wait before the next look, where nothing is left to read."""

    publication: str
    slot: str
    values: Literal["binary", "text"] = "binary"
    poll_s: float = 0.1


class PollingShipper:
    """Ships one slot. While open it holds a session lock on the leader, but the slot itself only now and then.

    What was confirmed while a peek is being read is acknowledged after it: each time costs the server a decoding.
    """

    format: ClassVar[Format] = Format.LOGICAL

    def __init__(self, url: str, options: Options, leader: Leader) -> None:
        self._url = url
        self._options = options
        self._leader = leader
        self._polled = Polled.of(options.slot)
        self._reader: Connection | None = None
        self._reading = False
        self._position = Position(leader.source, leader.timeline, 0)
        self._confirmed_lsn = 0
        self._acknowledged_lsn = 0

    @classmethod
    def open(cls, url: str, options: Options) -> "PollingShipper":
        """Connect and become the only shipper of this slot.

        :raises FencedError: another shipper has it.
        """
        return cls(url, options, Leader.own(url, options.publication, options.slot))

    @contextmanager
    def _snapshot(self) -> Iterator[Snapshot]:
        slot = self._usable_slot()
        options = self._options
        with connect(self._url, application_name="cdc ship image") as keeper:
            name, lsn = self._place(keeper, slot)
            position = self._position.at(lsn)
            image = PostgresSnapshot(
                self._url, name, position, Published(options.publication), text=options.values == "text"
            )
            try:
                yield image
            finally:
                image.close()

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """An ordinary exported snapshot, whose place in the log the slot itself tells: see :mod:`.visible`.

        The slot is peeked at from where it stands: where it is far behind, that takes as long as to ship it.

        :raises TransientError: no snapshot taken within :data:`SNAPSHOT_S` had a place in the log.
        """
        return self._snapshot()

    def end(self) -> Position:
        return self._leader.end()

    def confirm(self, position: Position) -> None:
        self._confirmed_lsn = max(self._confirmed_lsn, position.lsn)
        if not self._reading:
            self._acknowledge()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._leader.close()

    def stream(self, after: Position, *, wait_s: float) -> Iterator[Transaction | Bundle | Heartbeat]:  # noqa: ARG002
        """As the protocol has it, but for ``wait_s``: that nothing more comes is known when a peek ends.

        :raises ConfigurationError: the leader is on a newer timeline, whose history only REPLICATION tells.
        """
        self._leader.check_history(after, self._branch)
        self._leader.check_publication()
        self._usable_slot(after)
        self._reader = connect(self._url, application_name=f"cdc ship {self._options.slot}"[:63])
        # If we are killed the server stops decoding, and lets the slot go. Not every platform's server can notice.
        with suppress(psycopg.Error):
            self._reader.execute("SET client_connection_check_interval = '1s'")
        self._position = self._position.at(after.lsn)
        self.confirm(after)
        return self._follow()

    def _follow(self) -> Iterator[Transaction | Bundle | Heartbeat]:
        while True:
            end = self._leader.end()
            if end > self._position:
                yield from self._peek(end.lsn)
            # At a heartbeat what was told is made durable and confirmed, so that the next peek begins behind it.
            yield Heartbeat(self._position)
            if end <= self._position:
                yield from self._pause()

    def _pause(self) -> Iterator[Heartbeat]:
        due = time.monotonic() + self._options.poll_s
        while (left := due - time.monotonic()) > 0:
            time.sleep(min(left, IDLE_S))
            yield Heartbeat(self._position)

    def _peek(self, end_lsn: int) -> Iterator[Transaction | Bundle | Heartbeat]:
        """Tell a window of the log: transactions that begin in it, and those before that end in it."""
        self._acknowledge()
        after = self._position
        behind = after.lsn - self._usable_slot(after).restart_lsn
        upto = min(end_lsn, after.lsn + min(max(WINDOW_BYTES, behind), WINDOW_BYTES_MAX))
        assembler = Assembler(after, self._leader.describe)
        self._reading = True
        try:
            yield from self._assembled(assembler, upto)
        except GeneratorExit:
            assert self._reader is not None  # noqa: S101
            self._reader.close()
            raise
        finally:
            self._reading = False
        assembler.idle_at(upto)
        self._position = assembler.position

    def _assembled(  # noqa: C901, PLR0912
        self, assembler: Assembler, upto: int
    ) -> Iterator[Transaction | Bundle | Heartbeat]:
        """The hot loop: a message whose prefix is known is put aside without a call."""
        known, frames, prefix, room = assembler.known, assembler.frames, assembler.prefix, RUN_BYTES
        for frame in self._frames(upto):
            if frame[prefix] in known:
                frames.append(frame)
                room -= len(frame)
                if room > 0:
                    continue
                if bundle := assembler.bundle():
                    yield bundle
                assembler.cut()
            elif frame:
                if assembler.quick(frame):
                    if room > BUNDLE_BYTES and not assembler.full:
                        continue
                    if bundle := assembler.bundle():
                        yield bundle
                    room = RUN_BYTES
                    continue
                if bundle := assembler.bundle():
                    yield bundle
                transaction = assembler.feed(frame)
                if transaction is not None:
                    yield transaction
                if frames:
                    continue
            elif assembler.idle:
                yield Heartbeat(self._position)
            room = RUN_BYTES
        if bundle := assembler.bundle():
            yield bundle

    def _frames(self, upto: int) -> Iterator[bytes]:
        """What a peek returns; and an empty frame whenever nothing came for :data:`IDLE_S`."""
        as_binary = str(self._options.values == "binary").lower()
        peek = f"{self._polled.function('peek')}({literal(format_lsn(upto))}, {as_binary})"
        deadline = time.monotonic() + HANDOVER_S
        with self._explained(self._position):
            while True:
                try:
                    yield from self._rows(f"COPY (SELECT {_FILLER}, {peek}) TO STDOUT (FORMAT binary)")
                except FencedError:  # nothing was told yet: who peeks has the slot only while the server decodes
                    if time.monotonic() > deadline:
                        raise
                else:
                    return
                time.sleep(IDLE_S)
                yield b""

    def _rows(self, query: str) -> Iterator[bytes]:
        assert self._reader is not None  # noqa: S101
        wire = self._reader.pgconn
        poll = select.poll()
        poll.register(wire.socket, select.POLLIN)
        with translated():
            wire.send_query(query.encode())
            while wire.is_busy():
                if poll.poll(IDLE_S * 1000):
                    wire.consume_input()
                else:
                    yield b""
            result = wire.get_result()
            if result is not None and result.status == pq.ExecStatus.COPY_OUT:
                yield from self._copied(wire, poll)
                result = wire.get_result()
            while wire.get_result() is not None:
                pass
            if result is not None and result.status != pq.ExecStatus.COMMAND_OK:
                raise error_from_result(result)

    def _copied(self, wire: PGconn, poll: select.poll) -> Iterator[bytes]:
        get, skip = wire.get_copy_data, len(copy.HEADER)
        while True:
            size, data = get(1)
            if size > 0:
                frame = bytes(data[skip:])
                if skip:
                    # All was decoded before the first row came. Had the slot been moved until then, we see it now.
                    self._leader.slot(self._position)
                    skip = 0
                if frame != copy.TRAILER:
                    yield frame
            elif size < 0:
                return
            elif poll.poll(IDLE_S * 1000):
                wire.consume_input()
            else:
                yield b""

    def _acknowledge(self) -> None:
        lsn = self._confirmed_lsn
        if lsn <= self._acknowledged_lsn:
            return
        self._leader.check_publication()

        def call() -> None:
            with translated():
                self._leader.catalog.execute(
                    f"SELECT {self._polled.function('acknowledge')}(%s)".encode(), (format_lsn(lsn),)
                )

        with self._explained(self._position):
            taking_over(call)
        self._acknowledged_lsn = lsn

    @contextmanager
    def _explained(self, after: Position) -> Iterator[None]:
        """Where a function fails, look for the reason: the slot is gone, or the function is, or we may not call it."""
        try:
            yield
        except CdcError as error:
            if not error.retriable and not isinstance(error, FencedError):
                self._usable_slot(after)
            raise

    def _usable_slot(self, after: Position | None = None) -> Slot:
        """The slot, which the functions are for.

        :raises GapError, ConfigurationError, AccessError: it is not, or we may not use them.
        """
        slot = self._leader.slot(after)
        must_be_callable(self._leader.catalog, self._options.slot)
        if slot.two_phase:
            raise ConfigurationError(
                f"slot {self._options.slot!r} tells prepared transactions, which polling does not read",
                remedy="ship without --polling, or drop the slot and run `cdc setup`, whose slots do not",
            )
        return slot

    def _branch(self, epoch: int) -> int:
        raise ConfigurationError(
            f"the topic is of timeline {epoch}, this leader of the newer {self._leader.timeline},"
            " and only a role with REPLICATION may read its history",
            remedy="run `cdc ship --until now` once without --polling, as a role with REPLICATION; then poll on",
        )

    # The image.

    def _place(self, keeper: Connection, slot: Slot) -> tuple[str, int]:
        """Open a transaction in ``keeper`` that exports a snapshot: its name, and the LSN that it stands at."""
        deadline = time.monotonic() + SNAPSHOT_S
        while True:
            flushed = self._leader.end().lsn
            with translated():
                keeper.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                row = keeper.execute("SELECT pg_current_snapshot()::text, pg_export_snapshot()").fetchone()
            assert row is not None  # noqa: S101
            log = self._committed(self._settled())
            lsn = image_lsn(Seen.parse(row[0]), log, confirmed=slot.confirmed_lsn, flushed=flushed)
            if lsn is not None:
                return row[1], lsn
            if time.monotonic() > deadline:
                raise TransientError(
                    f"no snapshot taken within {SNAPSHOT_S:g} s lies between two commits of the log", remedy=_QUIETER
                )
            with translated():
                keeper.execute("ROLLBACK")
            time.sleep(_RETRY_S)

    def _settled(self) -> int:
        """An LSN below which everything that anybody sees now was committed, once all of that is flushed."""
        with translated():
            row = self._leader.catalog.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
            # A commit beyond it, for the server to flush: not every visible one waits for that by itself.
            self._leader.catalog.execute("SELECT pg_current_xact_id()")
        assert row is not None  # noqa: S101
        lsn = parse_lsn(row[0])
        while self._leader.end().lsn < lsn:
            time.sleep(_RETRY_S)
        return lsn

    def _committed(self, upto: int) -> list[Committed]:
        """The transactions that the slot holds up to an LSN, in commit order."""
        begins_and_commits = (
            f"SELECT data FROM {self._polled.function('peek')}(%s, true) data WHERE get_byte(data, 0) IN (66, 67)"
        )

        def call() -> list[tuple[bytes]]:
            with translated():
                return self._leader.catalog.execute(begins_and_commits.encode(), (format_lsn(upto),)).fetchall()

        committed: list[Committed] = []
        xid = 0
        for (data,) in taking_over(call):
            match pgoutput.decode(bytes(data)):
                case pgoutput.Begin() as begin:
                    xid = begin.xid
                case pgoutput.Commit() as commit:
                    committed.append(Committed(xid, commit.end_lsn))
                case _:
                    pass
        return committed
