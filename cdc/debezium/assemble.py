"""Transactions out of partitions: which events may be applied next, and together. Pure.

Each partition tells its events in commit order, and the transaction topic tells the ends of all transactions in commit
order, with how many events each has in each table. So the next transaction is that of the next end, and it is complete
once that many of its events were read. A shipper that was killed tells some events twice, the last time in full; an
event is known by its transaction and its place there (``total_order``), and an end at or below the last one applied is
told again.

What belongs to no transaction (an image's rows; everything where no transactions are told) is applied where it stands
in its partition, which is the order of its key.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from cdc.debezium.decode import Boundary, Event, Item
from cdc.errors import ConfigurationError
from cdc.events import Place


class Unit(NamedTuple):
    """Events to apply in one commit, in this order, and where each partition is to be read on from then.

    ``lsn`` is the end of the transaction they are, None where they are none.
    """

    events: list[Event]
    offsets: Mapping[Place, int]
    lsn: int | None = None


class _Waiting(NamedTuple):
    offset: int
    item: Item
    size: int


class Assembler:
    """``applied_lsn`` is the end of the last transaction applied. Holds at most about ``limit_bytes`` of events."""

    def __init__(self, applied_lsn: int = -1, *, limit_bytes: int = 256 << 20) -> None:
        self.applied_lsn = applied_lsn
        self._limit_bytes = limit_bytes
        self._queues: dict[Place, deque[_Waiting]] = {}
        self._ends: deque[tuple[Place, int, Boundary]] = deque()
        self._held_bytes = 0
        self._held: Counter[tuple[str | None, str]] = Counter()

    def add(self, place: Place, offset: int, item: Item, size: int) -> None:
        """Take in the next record of a partition."""
        if isinstance(item, Boundary):
            if item.ended:
                self._ends.append((place, offset, item))
            return
        self._queues.setdefault(place, deque()).append(_Waiting(offset, item, size))
        self._held_bytes += size
        if isinstance(item, Event):
            self._held[item.xid, item.label] += 1

    def units(self) -> Iterator[Unit]:
        """What is complete, in order.

        :raises ConfigurationError: more than the limit is held, and still no transaction is complete.
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
            self._ends.popleft()
            yield unit
        if self._held_bytes > self._limit_bytes:
            raise ConfigurationError(
                f"{self._held_bytes} bytes of events wait for {self.waiting or 'the end of a transaction'}, "
                f"more than {self._limit_bytes}",
                remedy="give the applier more memory for events, or apply without transactions",
            )

    @property
    def holds(self) -> bool:
        """Some events wait."""
        return any(self._queues.values())

    @property
    def waiting(self) -> str | None:
        """What the next transaction lacks, in words; None where no end waits."""
        if not self._ends:
            return None
        end = self._ends[0][2]
        found = Counter(event.label for _, event in self._found(end, everywhere=True).values())
        lacking = {label: count - found[label] for label, count in end.counts.items() if found[label] < count}
        return f"transaction {end.xid}:{end.lsn}, lacking events: {lacking}"

    def _loose(self) -> Unit:
        """What stands at the head of a partition and belongs to no transaction."""
        events: list[Event] = []
        offsets: dict[Place, int] = {}
        for place, queue in self._queues.items():
            while queue and not _transactional(queue[0].item):
                waiting = self._pop(queue)
                offsets[place] = waiting.offset + 1
                if isinstance(waiting.item, Event):
                    events.append(waiting.item)
        return Unit(events, offsets)

    def _next_transaction(self, place: Place, offset: int, end: Boundary) -> Unit | None:
        offsets = {place: offset + 1}
        if end.lsn <= self.applied_lsn:
            self._forget(end.xid, offsets)
            return Unit([], offsets)
        if any(self._held[end.xid, label] < count for label, count in end.counts.items()):
            return None
        found = self._found(end, everywhere=False)
        if not _complete(found, end):
            found = self._found(end, everywhere=True)
        if not _complete(found, end):
            return None
        last: dict[Place, int] = {}
        for (where, index), _ in found.values():
            last[where] = max(last.get(where, -1), index)
        events = []
        for where, index in last.items():
            queue = self._queues[where]
            for _ in range(index + 1):
                waiting = self._pop(queue)
                offsets[where] = waiting.offset + 1
                if isinstance(waiting.item, Event) and not _transactional(waiting.item):
                    events.append(waiting.item)
        events += [event for _, (_, event) in sorted(found.items())]
        self.applied_lsn = end.lsn
        return Unit(events, offsets, end.lsn)

    def _found(self, end: Boundary, *, everywhere: bool) -> dict[int, tuple[tuple[Place, int], Event]]:
        """The transaction's events by their order, the first telling of each; only heads unless ``everywhere``."""
        found: dict[int, tuple[tuple[Place, int], Event]] = {}
        for place, queue in self._queues.items():
            for index, (_, item, _) in enumerate(queue):
                if not isinstance(item, Event):
                    continue
                if item.xid == end.xid and item.order not in found:
                    found[item.order] = (place, index), item
                elif not everywhere:
                    break
        return found

    def _forget(self, xid: str, offsets: dict[Place, int]) -> None:
        """Drop what is told again of a transaction that was applied, as far as it is at hand."""
        for place, queue in self._queues.items():
            while queue and (not isinstance(queue[0].item, Event) or queue[0].item.xid == xid):
                offsets[place] = self._pop(queue).offset + 1

    def _pop(self, queue: deque[_Waiting]) -> _Waiting:
        waiting = queue.popleft()
        self._held_bytes -= waiting.size
        if isinstance(waiting.item, Event):
            held = waiting.item.xid, waiting.item.label
            self._held[held] -= 1
            if not self._held[held]:
                del self._held[held]
        return waiting


def _transactional(item: Item) -> bool:
    return isinstance(item, Event) and item.xid is not None


def _complete(found: Mapping[int, tuple[tuple[Place, int], Event]], end: Boundary) -> bool:
    counts = Counter(event.label for _, event in found.values())
    return all(counts[label] >= count for label, count in end.counts.items())
