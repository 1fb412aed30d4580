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

from cdc.errors import ConfigurationError, DivergedError, FencedError, GapError, TransientError, UnavailableError
from cdc.ports import Snapshot
from cdc.position import Position, format_lsn, parse_lsn
from cdc.record import Column, Format, Heartbeat, Relation, Transaction
from cdc.sql.quote import identifier, literal
from cdc.stores.postgresql.connect import Connection, connect, source_of, translate, translated
from cdc.stores.postgresql.describe import enrich, is_ours
from cdc.wire import pgoutput
from shippers.postgresql import image
from shippers.postgresql.assemble import RUN_BYTES, Assembler

_ANEW: Final = "run `cdc teardown` and `cdc setup`, then `cdc ship --image new`: followers load that image"
_UNSTREAMED: Final[set[str]] = set()  # slots that this process found the server cannot stream
STATUS_INTERVAL_S: Final = 10.0  # the server's default wal_sender_timeout is 60 s
_XLOGDATA: Final = ord("w")
IDLE_S: Final = 0.25  # how soon a stop is noticed while nothing comes
HANDOVER_S: Final = 5.0  # how long a predecessor's half-dead session may hold the slot


@dataclass(frozen=True, slots=True)
class Options:
    """What to read and how. ``protocol`` None takes the newest that the server speaks."""

    publication: str
    slot: str
    values: Literal["binary", "text"] = "binary"
    protocol: int | None = None
    streaming: bool = True
    messages: bool = True


@dataclass(frozen=True, slots=True)
class _Slot:
    confirmed_lsn: int
    two_phase: bool


class LogicalShipper:
    """Ships one slot. While open it holds a session lock on the leader, streaming also the slot itself."""

    format: ClassVar[Format] = Format.LOGICAL

    def __init__(self, url: str, options: Options, catalog: Connection) -> None:
        self._url = url
        self._options = options
        self._catalog = catalog
        self.source, self.timeline = source_of(catalog)
        self._replication: Connection | None = None
        self._assembler: Assembler | None = None
        self._poll = select.poll()
        self._confirmed_lsn = 0
        self._status_due = 0.0
        self._publication: int | None = None

    @classmethod
    def open(cls, url: str, options: Options) -> "LogicalShipper":
        """Connect and become the only shipper of this slot.

        :raises FencedError: another shipper has it.
        """
        catalog = connect(url, application_name=f"cdc ship {options.slot}"[:63])
        try:
            _own(catalog, options.slot)
            return cls(url, options, catalog)
        except BaseException:
            catalog.close()
            raise

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        self._slot()
        options = self._options
        return image.snapshot(
            self._url, options.slot, options.publication, self.source, self.timeline, text=options.values == "text"
        )

    def end(self) -> Position:
        with translated():
            row = self._catalog.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
        assert row is not None  # noqa: S101
        return Position(self.source, self.timeline, parse_lsn(row[0]))

    def confirm(self, position: Position) -> None:
        floor = self._assembler.floor if self._assembler is not None else None
        lsn = position.lsn if floor is None else min(position.lsn, floor)
        if lsn > self._confirmed_lsn:
            self._confirmed_lsn = lsn
            self._send_status()

    def close(self) -> None:
        if self._assembler is not None:
            self._assembler.close()
        for connection in (self._replication, self._catalog):
            if connection is not None:
                connection.close()

    def stream(self, after: Position, *, wait_s: float) -> Iterator[Transaction | Heartbeat]:
        self._check_history(after)
        self._check_publication()
        slot = self._slot(after)
        self._assembler = Assembler(Position(self.source, self.timeline, after.lsn), self._describe)
        self._confirmed_lsn = slot.confirmed_lsn
        # A prepared transaction may have begun below `after`: only the slot knows where its oldest one lies.
        self._start(0 if slot.two_phase else after.lsn, two_phase=slot.two_phase)
        return self._read(self._assembler, wait_s)

    def _read(self, assembler: Assembler, wait_s: float) -> Iterator[Transaction | Heartbeat]:  # noqa: C901
        """The hot loop: a message whose prefix is known is put aside without a call."""
        assert self._replication is not None  # noqa: S101
        wire = self._replication.pgconn
        get = wire.get_copy_data
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
                        assembler.cut()
                        self._send_status_when_due()
                    elif frame[0] == _XLOGDATA:
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
                elif self._readable(wait):
                    wire.consume_input()
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
            self._check_publication()
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

    def _describe(self, message: pgoutput.RelationMessage) -> Relation | None:
        relation = _relation(message)
        return None if is_ours(relation) else enrich(self._catalog, relation)

    def _start(self, lsn: int, *, two_phase: bool) -> None:
        options = replace(self._options, streaming=self._options.streaming and self._options.slot not in _UNSTREAMED)
        command = start_command(options, lsn, self._catalog.info.server_version, two_phase=two_phase)
        deadline = time.monotonic() + HANDOVER_S
        while True:
            self._replication = connect(
                self._url, replication=True, application_name=f"cdc ship {self._options.slot}"[:63]
            )
            result = self._replication.pgconn.exec_(command.encode())
            if result.status == pq.ExecStatus.COPY_BOTH:
                self._poll.register(self._replication.pgconn.socket, select.POLLIN)
                return
            error = translate(error_from_result(result))
            self._replication.close()
            self._replication = None
            if not isinstance(error, FencedError) or time.monotonic() > deadline:
                raise error
            time.sleep(0.2)

    def _slot(self, after: Position | None = None) -> _Slot:
        """The slot, which must hold everything beyond ``after``.

        :raises GapError: it is gone, invalidated, or was moved beyond what the topic holds.
        :raises ConfigurationError: it never was, or is not one we can read.
        """
        name = self._options.slot
        with translated():
            row = self._catalog.execute(
                "SELECT plugin, database = current_database(), wal_status, confirmed_flush_lsn::text, two_phase"
                " FROM pg_replication_slots WHERE slot_name = %s",
                (name,),
            ).fetchone()
        if row is None:
            if after is not None:
                raise GapError(f"slot {name!r} is gone: the leader no longer holds what follows {after}", remedy=_ANEW)
            raise ConfigurationError(f"slot {name!r} does not exist", remedy="run `cdc setup` on the leader first")
        plugin, here, wal_status, confirmed, two_phase = row
        if plugin != "pgoutput" or not here:
            raise ConfigurationError(
                f"slot {name!r} is of plugin {plugin!r}" + ("" if here else " and of another database"),
                remedy="name another slot with --slot, or drop that one and run `cdc setup`",
            )
        if wal_status == "lost":
            raise GapError(f"slot {name!r} is invalidated: what follows {after or confirmed} is gone", remedy=_ANEW)
        if confirmed is None:
            raise ConfigurationError(f"slot {name!r} is not ready yet", remedy="wait until its creation has ended")
        lsn = parse_lsn(confirmed)
        if after is not None and lsn > after.lsn:
            raise GapError(
                f"slot {name!r} stands at {confirmed}, beyond {after} where the topic ends: "
                "it was recreated, or somebody else read it"
            )
        return _Slot(lsn, bool(two_phase))

    def _check_publication(self) -> None:
        """From 18 on the server leaves out what a missing publication would publish, without an error.

        :raises ConfigurationError: it is gone, or another one than before.
        """
        name = self._options.publication
        with translated():
            row = self._catalog.execute("SELECT oid FROM pg_publication WHERE pubname = %s", (name,)).fetchone()
        if row is None or self._publication not in {None, row[0]}:
            raise ConfigurationError(
                f"publication {name!r} " + ("does not exist" if row is None else "was made anew while shipping"),
                remedy="run `cdc setup`, then take a new image with `cdc ship --image new`: "
                "changes made without the publication are not in the log",
            )
        self._publication = row[0]

    def _check_history(self, after: Position) -> None:
        """Is ``after`` a place in this leader's past?"""
        if after.source != self.source:
            raise ConfigurationError(
                f"the topic is of leader {after.source}, this one is {self.source}",
                remedy="check the leader's url, or use another --stream for another leader",
            )
        if after.epoch > self.timeline:
            raise DivergedError(f"the topic is of timeline {after.epoch}, this leader of the older {self.timeline}")
        if after.epoch < self.timeline:
            branch = self._branch(after.epoch)
            if branch < after.lsn:
                raise DivergedError(
                    f"timeline {self.timeline} branched off at {format_lsn(branch)}, "
                    f"below {after} which the topic already holds"
                )

    def _branch(self, epoch: int) -> int:
        """The LSN at which this leader's history left timeline ``epoch``."""
        with connect(self._url, replication=True) as connection:
            result = connection.pgconn.exec_(f"TIMELINE_HISTORY {self.timeline}".encode())
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


def _relation(message: pgoutput.RelationMessage) -> Relation:
    columns = tuple(Column(c.name, c.type_oid, c.modifier, c.key) for c in message.columns)
    return Relation(message.id, message.schema, message.name, message.identity, columns)


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


def _own(catalog: Connection, slot: str) -> None:
    """Take the session lock that makes us the slot's only shipper, image phase included."""
    deadline = time.monotonic() + HANDOVER_S
    while True:
        with translated():
            row = catalog.execute("SELECT pg_try_advisory_lock(hashtext('cdc ship'), hashtext(%s))", (slot,)).fetchone()
        if row is not None and row[0]:
            return
        if time.monotonic() > deadline:
            raise FencedError(f"slot {slot!r} has another shipper")
        time.sleep(0.2)
