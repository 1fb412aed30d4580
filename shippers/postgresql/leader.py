"""What every reader of a logical slot asks its leader: is it ours, whole, and of the history the topic knows."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from cdc.errors import ConfigurationError, DivergedError, FencedError, GapError
from cdc.position import Position, format_lsn, parse_lsn
from cdc.record import Column, Relation
from cdc.stores.postgresql.connect import Connection, connect, source_of, translated
from cdc.stores.postgresql.describe import enrich, is_ours
from cdc.wire import pgoutput

HANDOVER_S: Final = 5.0  # how long a predecessor's half-dead session may hold the slot
IDLE_S: Final = 0.25  # how soon a stop is noticed while nothing comes
_ANEW: Final = "run `cdc teardown` and `cdc setup`, then `cdc ship --image new`: followers load that image"
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Slot:
    """``restart_lsn`` is where decoding has to begin, for what follows ``confirmed_lsn`` to be told."""

    confirmed_lsn: int
    restart_lsn: int
    two_phase: bool


class Leader:
    """A session on the leader that makes us the only shipper of a slot, for as long as it lives."""

    def __init__(self, catalog: Connection, publication: str, slot: str) -> None:
        self.catalog = catalog
        self.source, self.timeline = source_of(catalog)
        self._publication = publication
        self._slot = slot
        self._publication_oid: int | None = None

    @classmethod
    def own(cls, url: str, publication: str, slot: str) -> "Leader":
        """Connect, and take the session lock of the slot, which holds through the image too.

        :raises FencedError: another shipper has it.
        """
        catalog = connect(url, application_name=f"cdc ship {slot}"[:63])
        try:
            taking_over(lambda: _lock(catalog, slot))
            return cls(catalog, publication, slot)
        except BaseException:
            catalog.close()
            raise

    def end(self) -> Position:
        """Where the leader's durable log ends now."""
        with translated():
            row = self.catalog.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
        assert row is not None  # noqa: S101
        return Position(self.source, self.timeline, parse_lsn(row[0]))

    def slot(self, after: Position | None = None) -> Slot:
        """The slot, which must hold everything beyond ``after``.

        :raises GapError: it is gone, invalidated, or was moved beyond what the topic holds.
        :raises ConfigurationError: it never was, or is not one we can read.
        """
        name = self._slot
        with translated():
            row = self.catalog.execute(
                "SELECT plugin, database = current_database(), wal_status, confirmed_flush_lsn::text,"
                " restart_lsn::text, two_phase FROM pg_replication_slots WHERE slot_name = %s",
                (name,),
            ).fetchone()
        if row is None:
            if after is not None:
                raise GapError(f"slot {name!r} is gone: the leader no longer holds what follows {after}", remedy=_ANEW)
            raise ConfigurationError(f"slot {name!r} does not exist", remedy="run `cdc setup` on the leader first")
        plugin, here, wal_status, confirmed, restart, two_phase = row
        if plugin != "pgoutput" or not here:
            raise ConfigurationError(
                f"slot {name!r} is of plugin {plugin!r}" + ("" if here else " and of another database"),
                remedy="name another slot with --slot, or drop that one and run `cdc setup`",
            )
        if wal_status == "lost":
            raise GapError(f"slot {name!r} is invalidated: what follows {after or confirmed} is gone", remedy=_ANEW)
        if confirmed is None or restart is None:
            raise ConfigurationError(f"slot {name!r} is not ready yet", remedy="wait until its creation has ended")
        lsn = parse_lsn(confirmed)
        if after is not None and lsn > after.lsn:
            raise GapError(
                f"slot {name!r} stands at {confirmed}, beyond {after} where the topic ends: "
                "it was recreated, or somebody else read it"
            )
        return Slot(lsn, parse_lsn(restart), bool(two_phase))

    def check_publication(self) -> None:
        """From 18 on the server leaves out what a missing publication would publish, without an error.

        :raises ConfigurationError: it is gone, or another one than before.
        """
        name = self._publication
        with translated():
            row = self.catalog.execute("SELECT oid FROM pg_publication WHERE pubname = %s", (name,)).fetchone()
        if row is None or self._publication_oid not in {None, row[0]}:
            raise ConfigurationError(
                f"publication {name!r} " + ("does not exist" if row is None else "was made anew while shipping"),
                remedy="run `cdc setup`, then take a new image with `cdc ship --image new`: "
                "changes made without the publication are not in the log",
            )
        self._publication_oid = row[0]

    def check_history(self, after: Position, branch: Callable[[int], int]) -> None:
        """Is ``after`` a place in this leader's past? ``branch`` tells the LSN at which it left a timeline."""
        if after.source != self.source:
            raise ConfigurationError(
                f"the topic is of leader {after.source}, this one is {self.source}",
                remedy="check the leader's url, or use another --stream for another leader",
            )
        if after.epoch > self.timeline:
            raise DivergedError(f"the topic is of timeline {after.epoch}, this leader of the older {self.timeline}")
        if after.epoch < self.timeline:
            left = branch(after.epoch)
            if left < after.lsn:
                raise DivergedError(
                    f"timeline {self.timeline} branched off at {format_lsn(left)}, "
                    f"below {after} which the topic already holds"
                )

    def describe(self, message: pgoutput.RelationMessage) -> Relation | None:
        """The relation that came with the log, with what the catalog adds; None where it is to be left out."""
        columns = tuple(Column(c.name, c.type_oid, c.modifier, c.key) for c in message.columns)
        relation = Relation(message.id, message.schema, message.name, message.identity, columns)
        return None if is_ours(relation) else enrich(self.catalog, relation)

    def close(self) -> None:
        self.catalog.close()


def taking_over(attempt: Callable[[], _Result]) -> _Result:
    """Try again for as long as a predecessor's half-dead session may hold what is wanted.

    :raises FencedError: somebody held it for longer than :data:`HANDOVER_S`.
    """
    deadline = time.monotonic() + HANDOVER_S
    while True:
        try:
            return attempt()
        except FencedError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _lock(catalog: Connection, slot: str) -> None:
    with translated():
        row = catalog.execute("SELECT pg_try_advisory_lock(hashtext('cdc ship'), hashtext(%s))", (slot,)).fetchone()
    if row is None or not row[0]:
        raise FencedError(f"slot {slot!r} has another shipper")
