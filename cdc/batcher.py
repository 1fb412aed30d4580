"""Transactions into batches: many small ones share a batch, one too large becomes fragments. Pure.

A batch holds one description per relation, so a schema change also ends a batch.
"""

from collections.abc import Iterator
from typing import Final

from cdc.position import Position
from cdc.record import Batch, Bundle, Format, Fragment, Kind, Relation, Run, Transaction, TransactionHead

BATCH_BYTES: Final = 900 << 10
_HEAD_BYTES: Final = 24  # in the codec's table of transactions
_LENGTH_BYTES: Final = 4  # in its table of lengths


class Batcher:
    """Collects what was shipped after ``position``; each batch names the one before it."""

    def __init__(self, stream: str, log_format: Format, position: Position) -> None:
        self._stream = stream
        self._format = log_format
        self.position = position
        """The end of the last batch made."""
        self._heads: list[TransactionHead] = []
        self._last: Position | None = None
        self._part = _Part()

    def __bool__(self) -> bool:
        return bool(self._heads)

    def add(self, transaction: Transaction) -> Iterator[Batch]:
        """Take a transaction, and yield the batches that are full by it."""
        runs = list(transaction.runs) if transaction.size_bytes <= BATCH_BYTES else None
        if runs is None or not _agree(runs) or sum(map(_cost, runs)) > BATCH_BYTES:
            yield from self.flush()
            yield from self._fragments(transaction, iter(runs) if runs is not None else iter(transaction.runs))
            return
        if self._heads and not self._part.fits(*runs):
            yield from self.flush()
        before = self._part.messages
        for run in runs:
            self._part.add(run)
        self._part.size_bytes += _HEAD_BYTES
        self._last = transaction.position
        self._heads.append(_head(transaction, self._part.messages - before))
        if self._part.size_bytes >= BATCH_BYTES:
            yield from self.flush()

    def add_bundle(self, bundle: Bundle) -> Iterator[Batch]:
        """Take transactions that are put together already, no larger than a batch."""
        if self._heads and not self._part.fits(bundle.run):
            yield from self.flush()
        self._part.add(bundle.run)
        self._part.size_bytes += _HEAD_BYTES * len(bundle.heads)
        self._last = bundle.position
        self._heads.extend(bundle.heads)
        if self._part.size_bytes >= BATCH_BYTES:
            yield from self.flush()

    def flush(self) -> Iterator[Batch]:
        """The batch of what is waiting, if anything is."""
        if self._last is not None:
            yield self._batch(self._last, tuple(self._heads), None)
            self.position = self._last
            self._heads.clear()
            self._last = None

    def heartbeat(self, position: Position) -> Batch:
        """A batch without transactions, which moves the position on. Nothing may be waiting."""
        previous, self.position = self.position, position
        return Batch(self._stream, self._format, Kind.HEARTBEAT, previous, position)

    def _fragments(self, transaction: Transaction, runs: Iterator[Run]) -> Iterator[Batch]:
        index = 0
        for run in runs:
            if self._part.messages and not self._part.fits(run):
                yield self._fragment(transaction, index, last=False)
                index += 1
            self._part.add(run)
        yield self._fragment(transaction, index, last=True)
        self.position = transaction.position

    def _fragment(self, transaction: Transaction, index: int, *, last: bool) -> Batch:
        heads = (_head(transaction, self._part.messages),)
        return self._batch(transaction.position, heads, Fragment(index, last))

    def _batch(self, position: Position, heads: tuple[TransactionHead, ...], fragment: Fragment | None) -> Batch:
        part, self._part = self._part, _Part()
        return Batch(
            self._stream,
            self._format,
            Kind.LOG,
            self.position,
            position,
            tuple(part.relations.values()),
            heads,
            part.lengths,
            b"".join(part.bodies),
            fragment,
        )


class _Part:
    """Runs that will share a batch."""

    def __init__(self) -> None:
        self.relations: dict[int, Relation] = {}
        self.lengths: list[int] = []
        self.bodies: list[bytes] = []
        self.size_bytes = 0

    @property
    def messages(self) -> int:
        return len(self.lengths)

    def fits(self, *runs: Run) -> bool:
        known = self.relations
        return self.size_bytes + sum(map(_cost, runs)) <= BATCH_BYTES and all(
            known.get(id_, relation) is relation for run in runs for id_, relation in run.relations.items()
        )

    def add(self, run: Run) -> None:
        self.relations.update(run.relations)
        self.lengths.extend(run.lengths)
        self.bodies.append(run.body)
        self.size_bytes += _cost(run)


def _cost(run: Run) -> int:
    """How many bytes of a batch a run takes; of tiny messages, most are not the messages'."""
    return len(run.body) + _LENGTH_BYTES * len(run.lengths)


def _agree(runs: list[Run]) -> bool:
    """Does every relation have one description throughout?"""
    seen: dict[int, Relation] = {}
    return all(seen.setdefault(id_, relation) is relation for run in runs for id_, relation in run.relations.items())


def _head(transaction: Transaction, messages: int) -> TransactionHead:
    return TransactionHead(transaction.position.lsn, transaction.xid, transaction.committed_us, messages)
