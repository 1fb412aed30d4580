"""Transactions out of partitions: which events may be applied next, and together. Pure.

Each partition tells its events in commit order, and the transaction topic tells the ends of all transactions in commit
order, with how many events each has in each table. So the next transaction is that of the next end, and it is complete
once that many of its events were read. A shipper that was killed tells some events twice, the last time in full; an
event is known by its transaction and its place there (``total_order``), and an end at or below the last one applied is
told again.

What belongs to no transaction (an image's rows; everything where no transactions are told) is applied where it stands
in its partition, which is the order of its key.

A transaction too large to be held is told in parts: from the moment that it is known to be the next one, its events are
handed out in order as they come, to be written but not committed before its end is there.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Final, NamedTuple

from cdc.debezium.decode import Boundary, Event, Item
from cdc.errors import ConfigurationError, GapError
from cdc.events import Place

_HELD_BYTES: Final = 4 << 20


class Unit(NamedTuple):
    """Events to apply in this order, and where each partition is to be read on from then.

    ``lsn`` is the end of the transaction they are, None where they are none. ``open``: what comes next is of the same
    transaction, and nothing may be committed before that.
    """

    events: list[Event]
    offsets: Mapping[Place, int]
    lsn: int | None = None
    open: bool = False


@dataclass(slots=True)
class _Stretch:
    """Consecutive events of one table and one transaction, or of none, in one partition.

    ``ends`` says for each event where to read on after it, and after what has no effect behind it.
    """

    xid: str | None
    label: str
    events: list[Event] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    size: int = 0


@dataclass(slots=True)
class _Written:
    """How much of a transaction was handed out already: all up to and with ``order``."""

    xid: str
    order: int = 0
    counts: Counter[str] = field(default_factory=Counter)


class Assembler:
    """``applied_lsn`` is the end of the last transaction applied. A transaction of more than ``held_bytes`` of events
    is handed out in parts; what cannot be is held up to about ``limit_bytes``."""

    def __init__(self, applied_lsn: int = -1, *, limit_bytes: int = 256 << 20, held_bytes: int = _HELD_BYTES) -> None:
        self.applied_lsn = applied_lsn
        self._limit_bytes = limit_bytes
        self._held_max = held_bytes
        self._queues: dict[Place, deque[_Stretch]] = {}
        self._begun: deque[Boundary] = deque()
        self._ends: deque[tuple[Place, int, Boundary]] = deque()
        self._written: _Written | None = None
        self._held_bytes = 0
        self._held: Counter[tuple[str | None, str]] = Counter()

    @property
    def is_open(self) -> bool:
        """A part of a transaction was handed out, and not yet its end."""
        return self._written is not None

    def add(self, place: Place, offset: int, item: Item, size: int) -> None:
        """Take in the next record of a partition."""
        if isinstance(item, Boundary):
            self._add_boundary(place, offset, item)
            return
        queue = self._queues.get(place)
        if queue is None:
            queue = self._queues[place] = deque()
        last = queue[-1] if queue else None
        if not isinstance(item, Event):
            if last is None:
                queue.append(last := _Stretch(None, "", ends=[0]))
            last.ends[-1] = offset + 1
            return
        label = item.label
        if last is None or last.xid != item.xid or last.label != label:
            queue.append(last := _Stretch(item.xid, label))
        last.events.append(item)
        last.ends.append(offset + 1)
        last.size += size
        self._held_bytes += size
        self._held[item.xid, label] += 1

    def _add_boundary(self, place: Place, offset: int, boundary: Boundary) -> None:
        if boundary.ended:
            self._ends.append((place, offset, boundary))
        elif all(boundary.xid != known.xid for known in self._begun):
            self._begun.append(boundary)

    def units(self) -> Iterator[Unit]:
        """What is complete, in order; and of what is too large to be held, what comes next.

        :raises ConfigurationError: more than the limit is held, and still no transaction is complete.
        :raises GapError: a transaction that was told in part is not told to its end.
        """
        while True:
            loose = self._loose()
            if loose.offsets:
                yield loose
            if not self._ends:
                break
            unit = self._next_transaction(*self._ends[0])
            if unit is None:
                break
            self._forget_begun(self._ends.popleft()[2].xid)
            yield unit
        if self._held_bytes > self._held_max and (part := self._part()):
            yield part
        if self._held_bytes > self._limit_bytes:
            raise ConfigurationError(
                f"{self._held_bytes} bytes of events wait for {self.waiting or 'the end of a transaction'}, "
                f"more than {self._limit_bytes}",
                remedy="give the applier more memory for events, or apply without transactions",
            )

    def _forget_begun(self, xid: str) -> None:
        self._begun = deque(each for each in self._begun if each.xid != xid)

    @property
    def holds(self) -> bool:
        """Some events wait."""
        return self.is_open or any(self._queues.values())

    @property
    def waiting(self) -> str | None:
        """What the next transaction lacks, in words; None where no end waits."""
        if not self._ends:
            return None
        end = self._ends[0][2]
        there = self._found(end.xid, everywhere=True).counts
        lacking = {label: count - there[label] for label, count in end.counts.items() if there[label] < count}
        return f"transaction {end.xid}:{end.lsn}, lacking events: {lacking}"

    def _loose(self) -> Unit:
        """What stands at the head of a partition and belongs to no transaction."""
        events: list[Event] = []
        offsets: dict[Place, int] = {}
        for place, queue in self._queues.items():
            while queue and queue[0].xid is None:
                stretch = self._pop(queue)
                offsets[place] = stretch.ends[-1]
                events += stretch.events
        return Unit(events, offsets)

    def _next_transaction(self, place: Place, offset: int, end: Boundary) -> Unit | None:
        offsets = {place: offset + 1}
        if end.lsn <= self.applied_lsn:  # told again
            self._forget(end.xid, offsets)
            return Unit([], offsets)
        written = self._written.counts if self._written is not None else {}
        if self._written is not None and self._written.xid != end.xid:
            raise GapError(
                f"of transaction {self._written.xid} only a part was told before transaction {end.xid} ended",
                remedy="apply without transactions, or begin anew with an image that was taken since",
            )
        if any(self._held[end.xid, label] + written.get(label, 0) < count for label, count in end.counts.items()):
            return None
        found = self._found(end.xid, everywhere=False)
        if not found.completes(end):
            found = self._found(end.xid, everywhere=True)
        if not found.completes(end):
            return None
        events = []
        for where, depth in found.depths.items():
            queue = self._queues[where]
            for _ in range(depth):
                stretch = self._pop(queue)
                offsets[where] = stretch.ends[-1]
                if stretch.xid is None:
                    events += stretch.events
        events += found.in_order()
        self.applied_lsn = end.lsn
        self._written = None
        return Unit(events, offsets, end.lsn)

    def _part(self) -> Unit | None:
        """What comes next of the transaction that is next to end, where we know which that is."""
        begun = self._ends[0][2] if self._ends else self._begun[0] if self._begun else None
        if begun is None or begun.lsn <= self.applied_lsn:
            return None  # told again: what is at hand of it will be dropped when its end is
        written = self._written or _Written(begun.xid)
        found = self._found(begun.xid, everywhere=False)
        stop = next(order for order in count(written.order + 1) if order not in found.events)
        if stop == written.order + 1:
            return None
        offsets: dict[Place, int] = {}
        for place in found.depths:
            queue = self._queues[place]
            while queue and queue[0].xid == begun.xid and queue[0].events[0].order < stop:
                stretch = self._pop_before(queue, stop)
                offsets[place] = stretch.ends[-1]
        events = [found.events[order] for order in range(written.order + 1, stop)]
        written.order = stop - 1
        for event in events:
            written.counts[event.label] += 1
        self._written = written
        return Unit(events, offsets, open=True)

    def _found(self, xid: str, *, everywhere: bool) -> "_Found":
        """The transaction's events, the first telling of each; only heads unless ``everywhere``."""
        written = self._written if self._written is not None and self._written.xid == xid else _Written(xid)
        found = _Found({}, Counter(written.counts), {})
        for place, queue in self._queues.items():
            for index, stretch in enumerate(queue):
                if stretch.xid == xid:
                    before = len(found.events)
                    for event in stretch.events:
                        if event.order > written.order:
                            found.events.setdefault(event.order, event)
                    found.counts[stretch.label] += len(found.events) - before
                    if len(found.events) > before:
                        found.depths[place] = index + 1
                elif not everywhere:
                    break
        return found

    def _forget(self, xid: str, offsets: dict[Place, int]) -> None:
        """Drop what is told again of a transaction that was applied, as far as it is at hand."""
        for place, queue in self._queues.items():
            while queue and (queue[0].xid == xid or not queue[0].events):
                offsets[place] = self._pop(queue).ends[-1]

    def _pop(self, queue: deque[_Stretch]) -> _Stretch:
        stretch = queue.popleft()
        self._release(stretch, len(stretch.events), stretch.size)
        return stretch

    def _pop_before(self, queue: deque[_Stretch], stop: int) -> _Stretch:
        """The events at the head that come before order ``stop``."""
        stretch = queue[0]
        number = next((n for n, event in enumerate(stretch.events) if event.order >= stop), len(stretch.events))
        if number == len(stretch.events):
            return self._pop(queue)
        size = stretch.size * number // len(stretch.events)
        head = _Stretch(stretch.xid, stretch.label, stretch.events[:number], stretch.ends[:number], size)
        del stretch.events[:number], stretch.ends[:number]
        stretch.size -= size
        self._release(head, number, size)
        return head

    def _release(self, stretch: _Stretch, events: int, size: int) -> None:
        self._held_bytes -= size
        held = stretch.xid, stretch.label
        self._held[held] -= events
        if self._held[held] <= 0:
            del self._held[held]


class _Found(NamedTuple):
    """Events of a transaction by their order; how many of each table, with those that were handed out before; and how
    many stretches of each partition hold them."""

    events: dict[int, Event]
    counts: Counter[str]
    depths: dict[Place, int]

    def completes(self, end: Boundary) -> bool:
        return all(self.counts[label] >= count for label, count in end.counts.items())

    def in_order(self) -> list[Event]:
        return [event for _, event in sorted(self.events.items())]
