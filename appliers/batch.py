"""What a batch holds for a follower, and the sets it is written in: shared by both ways of taking it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from cdc.errors import CdcError, ConflictError, DecodeError
from cdc.ports import Follower
from cdc.position import Position
from cdc.record import Batch, Relation, RowSet, TransactionHead
from cdc.topic import located
from cdc.wire import pgoutput


class Write(NamedTuple):
    """A set to write. ``tolerant``: some of it may have been done already."""

    operation: str
    rows: RowSet
    tolerant: bool


class Load(NamedTuple):
    """A run of inserts as COPY data."""

    relation: Relation
    body: bytes
    rows: int


class Truncate(NamedTuple):
    relations: list[Relation]
    cascade: bool
    restart_identity: bool


def write(follower: Follower, plan: Iterable[Write | Load | Truncate]) -> None:
    """Write a plan out.

    :raises ConflictError: a row is there that should not be, or the other way round.
    """
    for step in plan:
        if isinstance(step, Truncate):
            if step.relations:  # none where a resumed image already has it
                follower.truncate(step.relations, cascade=step.cascade, restart_identity=step.restart_identity)
            continue
        if isinstance(step, Load):
            follower.load(step.relation, step.body, "binary")
            continue
        wanted = len(step.rows.rows if step.operation == "I" else step.rows.matches)
        changed = write_rows(follower, step.operation, step.rows, replace=step.tolerant)
        if changed != wanted and not step.tolerant:
            raise ConflictError(
                f"{wanted} changes ({step.operation}) of {step.rows.relation.label} found {changed} rows",
                remedy="the follower was written by somebody else: compare with `cdc verify`",
            )


def write_rows(follower: Follower, operation: str, rows: RowSet, *, replace: bool) -> int:
    if operation == "I":
        return follower.insert(rows, replace=replace)
    return follower.update(rows) if operation == "U" else follower.delete(rows)


class Log:
    """The transactions of a batch that are to take effect, as (head, messages)."""

    def __init__(self, batch: Batch, after: Position | None, until: Position | None, offset: int) -> None:
        self.batch = batch
        self.offset = offset
        self._after_lsn = after.lsn if after is not None else -1
        self._until_lsn = until.lsn if until is not None else 1 << 64
        self.relations = {relation.id: relation for relation in batch.relations}

    def transactions(self) -> Iterator[tuple[TransactionHead, int, Sequence[int]]]:
        """Each with the offset of its first message and the lengths of all of them."""
        batch = self.batch
        first = at = 0
        for head in batch.transactions:
            lengths = batch.lengths[first : first + head.messages]
            first += head.messages
            if self._after_lsn < head.lsn <= self._until_lsn:
                yield head, at, lengths
            at += sum(lengths)

    def messages(self) -> Iterator[tuple[TransactionHead, bytes]]:
        for head, at, lengths in self.transactions():
            for length in lengths:
                yield head, self.batch.body[at : (at := at + length)]

    def agrees(self, described: Mapping[int, Relation]) -> bool:
        """Is no relation described otherwise here?"""
        return all(
            (known := described.get(id_)) is None or known is relation or known == relation
            for id_, relation in self.relations.items()
        )

    @contextmanager
    def located(self) -> Iterator[None]:
        """Errors say where in the topic they come from."""
        try:
            yield
        except CdcError as error:
            raise located(error, self.batch.stream, self.offset, self.batch.position) from error

    def relation(self, relation_id: int) -> Relation:
        try:
            return self.relations[relation_id]
        except KeyError:
            raise DecodeError(f"a change names relation {relation_id}, which its batch does not describe") from None


class Tables:
    """What both ways of taking a batch share: which change is for which table, and what a resumed image already has."""

    def __init__(
        self,
        follower: Follower,
        prepare: Callable[[Relation], None],
        windows: Mapping[int, tuple[int, int]],
    ) -> None:
        self._follower = follower
        self._prepare = prepare
        self._windows = windows

    def _wanted(self, relation_id: int, lsn: int) -> bool:
        window = self._windows.get(relation_id)
        return window is None or lsn > window[0]

    def _tolerant(self, relation_id: int, lsn: int) -> bool:
        window = self._windows.get(relation_id)
        return window is not None and lsn <= window[1]

    def _truncated(self, log: Log, message: pgoutput.Truncate, lsn: int) -> Truncate:
        relations = [log.relation(id_) for id_ in message.relation_ids if self._wanted(id_, lsn)]
        for relation in relations:
            self._prepare(relation)
        return Truncate(relations, message.cascade, message.restart_identity)


def incomplete(relation: Relation) -> DecodeError:
    return DecodeError(f"a row inserted into {relation.label} has a value that did not change")


def misfit(relation: Relation, width: int) -> DecodeError:
    return DecodeError(f"a row of {width} columns for {relation.label}, which has {len(relation.columns)}")
