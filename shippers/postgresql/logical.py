"""PostgreSQL's logical log: a replication slot decoded by pgoutput.

https://www.postgresql.org/docs/current/protocol-logical-replication.html
"""

import re
import select
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal

from psycopg import pq
from psycopg.errors import error_from_result

from cdc.errors import ConfigurationError, DivergedError, TransientError, UnavailableError
from cdc.ports import Snapshot
from cdc.position import Position, format_lsn, parse_lsn
from cdc.record import Bundle, Format, Heartbeat, Transaction
from cdc.sql.quote import identifier, literal
from cdc.stores.postgresql.connect import Connection, connect, translate, translated
from cdc.wire import pgoutput
from shippers.postgresql import image
from shippers.postgresql.assemble import BUNDLE_BYTES, RUN_BYTES, Assembler
from shippers.postgresql.leader import IDLE_S, Leader, taking_over

_UNSTREAMED: Final[set[str]] = set()  # slots that this process found the server cannot stream
STATUS_INTERVAL_S: Final = 10.0  # the server's default wal_sender_timeout is 60 s
_XLOGDATA: Final = ord("w")


@dataclass(frozen=True, slots=True)
class Options:
    """What to read and how. ``protocol`` None takes the newest that the server speaks."""

    publication: str
    slot: str
    values: Literal["binary", "text"] = "binary"
    protocol: int | None = None
    streaming: bool = True
    messages: bool = True


class LogicalShipper:
    """Ships one slot. While open it holds a session lock on the leader, streaming also the slot itself."""

    format: ClassVar[Format] = Format.LOGICAL

    def __init__(self, url: str, options: Options, leader: Leader) -> None:
        self._url = url
        self._options = options
        self._leader = leader
        self._replication: Connection | None = None
        self._assembler: Assembler | None = None
        self._poll = select.poll()
        self._confirmed_lsn = 0
        self._status_due = 0.0

    @classmethod
    def open(cls, url: str, options: Options) -> "LogicalShipper":
        """Connect and become the only shipper of this slot.

        :raises FencedError: another shipper has it.
        """
        return cls(url, options, Leader.own(url, options.publication, options.slot))

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        self._leader.slot()
        options, leader = self._options, self._leader
        return image.snapshot(
            self._url, options.slot, options.publication, leader.source, leader.timeline, text=options.values == "text"
        )

    def end(self) -> Position:
        return self._leader.end()

    def confirm(self, position: Position) -> None:
        floor = self._assembler.floor if self._assembler is not None else None
        lsn = position.lsn if floor is None else min(position.lsn, floor)
        if lsn > self._confirmed_lsn:
            self._confirmed_lsn = lsn
            self._send_status()

    def close(self) -> None:
        if self._assembler is not None:
            self._assembler.close()
        if self._replication is not None:
            self._replication.close()
        self._leader.close()

    def stream(self, after: Position, *, wait_s: float) -> Iterator[Transaction | Bundle | Heartbeat]:
        leader = self._leader
        leader.check_history(after, self._branch)
        leader.check_publication()
        slot = leader.slot(after)
        self._assembler = Assembler(Position(leader.source, leader.timeline, after.lsn), leader.describe)
        self._confirmed_lsn = slot.confirmed_lsn
        # A prepared transaction may have begun below `after`: only the slot knows where its oldest one lies.
        self._start(0 if slot.two_phase else after.lsn, two_phase=slot.two_phase)
        return self._read(self._assembler, wait_s)

    def _read(self, assembler: Assembler, wait_s: float) -> Iterator[Transaction | Bundle | Heartbeat]:  # noqa: C901, PLR0912, PLR0915
        """The hot loop: a message whose prefix is known is put aside without a call."""
        assert self._replication is not None  # noqa: S101
        wire = self._replication.pgconn
        get, quick = wire.get_copy_data, assembler.quick
        known, frames, room = assembler.known, assembler.frames, RUN_BYTES
        prefix = assembler.prefix
        wait = wait_s
        with translated():
            while True:
                size, data = get(1)
                if size > 0:
                    frame = bytes(data)
                    if frame[prefix] in known:
                        frames.append(frame)
                        room -= size
                        if room > 0:
                            continue
                        if bundle := assembler.bundle():
                            yield bundle
                        assembler.cut()
                        self._send_status_when_due()
                    elif frame[0] == _XLOGDATA:
                        if quick(frame):
                            if room > BUNDLE_BYTES and not assembler.full:
                                continue
                            if bundle := assembler.bundle():
                                yield bundle
                                wait = wait_s
                            room = RUN_BYTES
                            continue
                        if bundle := assembler.bundle():
                            yield bundle
                        transaction = assembler.feed(frame)
                        prefix = assembler.prefix
                        if transaction is not None:
                            yield transaction
                            wait = wait_s
                        if frames:
                            continue
                    else:
                        self._keepalive(frame)
                        wait = wait_s
                        continue
                    room = RUN_BYTES
                elif size < 0:
                    self._ended()
                elif self._readable(0 if assembler.waiting else wait):
                    wire.consume_input()
                elif bundle := assembler.bundle():
                    yield bundle
                    wait, room = wait_s, RUN_BYTES
                else:
                    wait = IDLE_S  # all has been told: only news, or the next status, are worth waking for
                    self._send_status_when_due()
                    if assembler.idle:
                        yield Heartbeat(assembler.position)

    def _readable(self, wait_s: float) -> bool:
        return bool(self._poll.poll(wait_s * 1000))

    def _keepalive(self, frame: bytes) -> None:
        assert self._assembler is not None  # noqa: S101
        end_lsn, _, reply_requested = pgoutput.decode_keepalive(frame)
        self._assembler.idle_at(end_lsn)
        if reply_requested:
            self._send_status()
        else:
            self._send_status_when_due()

    def _ended(self) -> None:
        """The server ended the stream: say why."""
        assert self._replication is not None  # noqa: S101
        result = self._replication.pgconn.get_result()
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            error = translate(error_from_result(result))
            if "could not map filenumber" in str(error) and self._options.slot not in _UNSTREAMED:
                # A bug of servers 16 to 18: streaming a transaction whose aborted subtransaction rewrote a table.
                _UNSTREAMED.add(self._options.slot)
                raise TransientError(f"{error}: trying without streaming") from error
            raise error
        raise UnavailableError("the leader ended the replication stream (it is shutting down)")

    def _send_status_when_due(self) -> None:
        if time.monotonic() >= self._status_due:
            self._leader.check_publication()
            self._send_status()

    def _send_status(self) -> None:
        if self._replication is None:
            return
        lsn = self._confirmed_lsn
        status = pgoutput.encode_status(lsn, lsn, lsn, reply=False, now_us=time.time_ns() // 1000)
        with translated():
            self._replication.pgconn.put_copy_data(status)
            self._replication.pgconn.flush()
        self._status_due = time.monotonic() + STATUS_INTERVAL_S

    def _start(self, lsn: int, *, two_phase: bool) -> None:
        options = replace(self._options, streaming=self._options.streaming and self._options.slot not in _UNSTREAMED)
        command = start_command(options, lsn, self._leader.catalog.info.server_version, two_phase=two_phase)
        self._replication = taking_over(lambda: self._started(command))
        self._poll.register(self._replication.pgconn.socket, select.POLLIN)

    def _started(self, command: str) -> Connection:
        replication = connect(self._url, replication=True, application_name=f"cdc ship {self._options.slot}"[:63])
        result = replication.pgconn.exec_(command.encode())
        if result.status != pq.ExecStatus.COPY_BOTH:
            replication.close()
            raise translate(error_from_result(result))
        return replication

    def _branch(self, epoch: int) -> int:
        """The LSN at which this leader's history left timeline ``epoch``."""
        with connect(self._url, replication=True) as connection:
            result = connection.pgconn.exec_(f"TIMELINE_HISTORY {self._leader.timeline}".encode())
        if result.status != pq.ExecStatus.TUPLES_OK:
            raise translate(error_from_result(result))
        return branch_point((result.get_value(0, 1) or b"").decode(), epoch)


def start_command(options: Options, lsn: int, server_version: int, *, two_phase: bool) -> str:
    """START_REPLICATION with what this server's pgoutput understands.

    https://www.postgresql.org/docs/current/protocol-logical-replication.html#PROTOCOL-LOGICAL-REPLICATION-PARAMS
    """
    newest = 4 if server_version >= 160000 else 3
    protocol = options.protocol or newest
    if not 1 <= protocol <= newest:
        raise ConfigurationError(
            f"pgoutput protocol {protocol} is not spoken by server version {server_version // 10000}",
            remedy=f"choose a protocol from 1 to {newest}",
        )
    arguments = {"proto_version": str(protocol), "publication_names": identifier(options.publication)}
    if options.values == "binary":
        arguments["binary"] = "true"
    if options.messages:
        arguments["messages"] = "true"
    if options.streaming and protocol >= 2:
        arguments["streaming"] = "on"
    if two_phase and protocol >= 3:
        arguments["two_phase"] = "on"
    text = ", ".join(f"{name} {literal(value)}" for name, value in arguments.items())
    return f"START_REPLICATION SLOT {identifier(options.slot)} LOGICAL {format_lsn(lsn)} ({text})"


def branch_point(history: str, epoch: int) -> int:
    """Where timeline ``epoch`` was left, from the text of a timeline history file.

    Each line is: timeline, LSN of the switch, reason.
    https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-TIMELINES

    :raises DivergedError: the timeline is no ancestor.
    """
    for line in history.splitlines():
        match = re.match(r"\s*(\d+)\s+([0-9A-Fa-f]+/[0-9A-Fa-f]+)", line)
        if match and int(match[1]) == epoch:
            return parse_lsn(match[2])
    raise DivergedError(f"this leader's history does not contain timeline {epoch}")
