"""The rows applier against a follower that is a model: tables as lists of rows, transactions as copies."""

# ruff: noqa: ARG002 - a protocol has arguments that a model has no use for

from array import array
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliers.changes import identity
from appliers.rows import RowsApplier
from cdc.errors import CdcError, ConflictError, DecodeError, FencedError
from cdc.ports import SchemaChange
from cdc.position import Position
from cdc.record import (
    NULL,
    UNCHANGED,
    Batch,
    Checkpoint,
    Column,
    Format,
    ImageProgress,
    Kind,
    Relation,
    Row,
    RowSet,
    TransactionHead,
    Value,
)
from cdc.wire import copy
from tests.unit.test_changes import Step, Table, _stepped, _v, histories

START = Position("leader", 1, 100)
KEYED = Relation(1, "public", "t", "d", tuple(Column(f"c{n}", 23, key=n == 0) for n in range(3)), ("c0",))
WHOLE = Relation(2, "public", "w", "f", tuple(Column(f"c{n}", 23, key=True) for n in range(2)))


@dataclass
class Kept:
    """What a follower's disk holds."""

    tables: dict[str, list[tuple[bytes, ...]]] = field(default_factory=dict)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)
    relations: dict[int, Relation] = field(default_factory=dict)
    forms: set[bytes] = field(default_factory=set)


class Disk:
    def __init__(self) -> None:
        self.kept = Kept()
        self.step: Callable[[str], None] = lambda _: None  # called before each step; a fault raises


class MemoryFollower:
    dialect: ClassVar[str] = "memory"
    bulk: ClassVar[bool] = False

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._now: Kept | None = None
        self._mark: Kept | None = None

    @property
    def now(self) -> Kept:
        assert self._now is not None, "no transaction is open"
        return self._now

    def begin(self) -> None:
        assert self._now is None
        self._now = deepcopy(self.disk.kept)

    def commit(self) -> None:
        self.disk.step("commit")
        self.disk.kept, self._now = self.now, None
        self.disk.step("committed")

    def rollback(self) -> None:
        self._now = None

    def close(self) -> None:
        self._now = None

    def savepoint(self) -> None:
        self._mark = deepcopy(self.now)

    def rollback_to_savepoint(self) -> None:
        assert self._mark is not None
        self._now = deepcopy(self._mark)

    def read_checkpoint(self, stream: str) -> Checkpoint | None:
        found = self.now.checkpoints.get(stream)
        return replace(found, epoch=self.now.owners.get(stream, found.epoch)) if found is not None else None

    def claim(self, stream: str) -> int:
        self.now.owners[stream] = self.now.owners.get(stream, 0) + 1
        return self.now.owners[stream]

    def write_checkpoint(self, stream: str, checkpoint: Checkpoint) -> None:
        if self.now.owners[stream] != checkpoint.epoch:
            raise FencedError(f"owner {checkpoint.epoch} of {stream} was replaced")
        self.now.checkpoints[stream] = checkpoint

    def read_relations(self, stream: str) -> Mapping[int, Relation]:
        return self.now.relations

    def write_relation(self, stream: str, relation: Relation) -> None:
        self.now.relations[relation.id] = relation

    def columns(self, relation: Relation) -> Mapping[str, str] | None:
        return {c.name: "" for c in relation.columns} if relation.label in self.now.tables else None

    def create(self, relation: Relation) -> None:
        self.now.tables[relation.label] = []

    def evolve(self, relation: Relation, change: SchemaChange) -> None:
        raise AssertionError("no test here changes a schema")

    def is_empty(self, relation: Relation) -> bool:
        return not self.now.tables[relation.label]

    def truncate(self, relations: Sequence[Relation], *, cascade: bool, restart_identity: bool) -> None:
        assert relations, "a TRUNCATE of no table is a syntax error"
        for relation in relations:
            self.now.tables[relation.label] = []

    def insert(self, rows: RowSet, *, replace: bool = False) -> int:
        self._look(rows)
        table = self.now.tables[rows.relation.label]
        found = identity(rows.relation)
        for row in rows.rows:
            assert len(row) == len(rows.relation.columns)
            if found.unique:
                there = [old for old in table if found.of(old) == found.of(row)]
                if there and not replace:
                    raise ConflictError(f"key {found.of(row)!r} is there")
                table[:] = [old for old in table if old not in there]
            table.append(row)
        return len(rows.rows)

    def update(self, rows: RowSet) -> int:
        self._look(rows)
        table = self.now.tables[rows.relation.label]
        changed = 0
        for match, values in zip(rows.matches, rows.rows, strict=True):
            at = self._find(rows, match)
            if at is None:
                continue
            new = tuple((dict(enumerate(table[at])) | dict(zip(rows.columns, values, strict=True))).values())
            found = identity(rows.relation)
            others = table[:at] + table[at + 1 :]
            if found.unique and any(found.of(other) == found.of(new) for other in others):
                raise ConflictError(f"key {found.of(new)!r} is there")
            table[at] = new
            changed += 1
        return changed

    def delete(self, rows: RowSet) -> int:
        self._look(rows)
        table = self.now.tables[rows.relation.label]
        changed = 0
        for match in rows.matches:
            at = self._find(rows, match)
            if at is not None:
                del table[at]
                changed += 1
        return changed

    def load(self, relation: Relation, body: bytes, form: str, *, replace: bool = False) -> int:
        rows = RowSet(relation, b"b" * len(relation.columns), rows=list(copy.rows(body, form)))
        return self.insert(rows, replace=replace)

    def _find(self, rows: RowSet, match: tuple[bytes, ...]) -> int | None:
        table = self.now.tables[rows.relation.label]
        hits = [at for at, row in enumerate(table) if tuple(row[n] for n in rows.match) == match]
        assert len(hits) <= 1 or not rows.unique
        return hits[0] if hits else None

    def _look(self, rows: RowSet) -> None:
        self.disk.step("write")
        self.now.forms.add(rows.forms)
        for row in rows.rows:
            assert all(isinstance(value, bytes) for value in row)
            for index, value in zip(rows.columns, row, strict=bool(rows.columns)):
                # These tests tell a text value by its first byte.
                assert value == NULL or (value[4:5] == b"'") == (rows.forms[index : index + 1] == b"t")


# Messages as pgoutput has them.


def _tuple(row: Row) -> bytes:
    def column(value: Value) -> bytes:
        if value is UNCHANGED:
            return b"u"
        return b"n" if value == NULL else (b"t" if value[4:5] == b"'" else b"b") + value

    return len(row).to_bytes(2) + b"".join(map(column, row))


def message(relation: Relation, step: Step) -> bytes:
    op, before, after, full = step
    old = b"" if before is None else (b"O" if full else b"K") + _tuple(before)
    new = b"" if after is None else b"N" + _tuple(after)
    return op.encode() + relation.id.to_bytes(4) + old + new


def truncation(*relations: Relation) -> bytes:
    return b"T" + len(relations).to_bytes(4) + b"\0" + b"".join([r.id.to_bytes(4) for r in relations])


def log(*transactions: tuple[int, list[bytes]], previous: Position = START) -> Batch:
    heads = tuple(TransactionHead(lsn, 1, 1, len(messages)) for lsn, messages in transactions)
    bodies = [each for _, messages in transactions for each in messages]
    end = previous.at(transactions[-1][0])
    lengths = array("I", map(len, bodies))
    return Batch("s", Format.LOGICAL, Kind.LOG, previous, end, (KEYED, WHOLE), heads, lengths, b"".join(bodies))


def _applier(rows: list[tuple[bytes, ...]], window: tuple[int, int] | None = None) -> tuple[Disk, RowsApplier, int]:
    """A follower that holds these rows of KEYED, and an applier that owns it."""
    disk = Disk()
    disk.kept.tables = {KEYED.label: list(rows), WHOLE.label: []}
    disk.kept.relations = {KEYED.id: KEYED, WHOLE.id: WHOLE}
    image = ImageProgress("i", -1, {KEYED.id: window}) if window is not None else None
    disk.kept.checkpoints["s"] = Checkpoint(START, 0, 0, image)
    applier = RowsApplier(MemoryFollower(disk))
    epoch, _ = applier.claim("s")
    return disk, applier, epoch


def _apply(applier: RowsApplier, epoch: int, *batches: Batch) -> None:
    for batch in batches:
        applier.apply(batch, after=None, until=None)
    applier.commit(Checkpoint(batches[-1].position, 0, epoch))


def _rows(table: Table) -> list[tuple[bytes, ...]]:
    return sorted(tuple(v for v in row if isinstance(v, bytes)) for row in table.values())


@settings(max_examples=300, deadline=None)
@given(histories(), st.integers(1, 4))
def test_the_follower_ends_where_the_leader_does(history: tuple[Table, list[Step]], per_batch: int) -> None:
    start, steps = history
    disk, applier, epoch = _applier(_rows(start))
    for at in range(0, len(steps), per_batch):
        messages = [message(KEYED, step) for step in steps[at : at + per_batch]]
        _apply(applier, epoch, log((START.lsn + at + per_batch, messages)))
    assert sorted(disk.kept.tables[KEYED.label]) == _rows(_stepped(start, steps))


@settings(max_examples=300, deadline=None)
@given(histories(), st.data())
def test_a_resumed_image_ends_where_the_leader_does_or_says_that_it_cannot(
    history: tuple[Table, list[Step]], data: st.DataObject
) -> None:
    """Each row was copied at any moment of the window, and is then ahead of the log by some of it."""
    start, steps = history
    moments = [start]
    for step in steps:
        moments.append(_stepped(moments[-1], [step]))
    copied: Table = {}
    for key in map(_v, range(5)):
        row = data.draw(st.sampled_from(moments)).get((key,))
        if row is not None:
            copied[(key,)] = row
    disk, applier, epoch = _applier(_rows(copied), (START.lsn, START.lsn + len(steps) + 1))
    try:
        for lsn, step in enumerate(steps, START.lsn + 1):
            _apply(applier, epoch, log((lsn, [message(KEYED, step)])))
            applier._windows = {KEYED.id: (START.lsn, START.lsn + len(steps) + 1)}
    except ConflictError as error:
        assert "new image" in error.remedy
        return
    assert sorted(disk.kept.tables[KEYED.label]) == _rows(moments[-1])


def test_a_row_that_moved_between_chunks_is_not_lost() -> None:
    """The chunk it left was copied after the move, the chunk it came to before."""
    partial: Step = ("U", (_v(1), NULL, NULL), (_v(2), _v(5), UNCHANGED), False)
    disk, applier, epoch = _applier([], (START.lsn, 200))
    with pytest.raises(ConflictError) as caught:
        _apply(applier, epoch, log((150, [message(KEYED, partial)])))
    assert "new image" in caught.value.remedy
    applier.rollback()
    whole: Step = ("U", (_v(1), NULL, NULL), (_v(2), _v(5), _v(6)), False)
    _apply(applier, epoch, log((150, [message(KEYED, whole)])))
    assert disk.kept.tables[KEYED.label] == [(_v(2), _v(5), _v(6))]


def test_a_row_that_is_in_both_chunks_is_kept_once() -> None:
    partial: Step = ("U", (_v(1), NULL, NULL), (_v(2), _v(5), UNCHANGED), False)
    disk, applier, epoch = _applier([(_v(1), _v(4), _v(6)), (_v(2), _v(5), _v(6))], (START.lsn, 200))
    _apply(applier, epoch, log((150, [message(KEYED, partial)])))
    assert disk.kept.tables[KEYED.label] == [(_v(2), _v(5), _v(6))]


def test_a_truncate_that_every_chunk_has_seen_is_left_out() -> None:
    disk, applier, epoch = _applier([(_v(1), _v(1), _v(1))], (200, 200))
    _apply(applier, epoch, log((150, [truncation(KEYED)])))
    assert len(disk.kept.tables[KEYED.label]) == 1
    _apply(applier, epoch, log((250, [truncation(KEYED)])))
    assert disk.kept.tables[KEYED.label] == []


def test_whole_rows_are_found_one_at_a_time() -> None:
    disk, applier, epoch = _applier([])
    row: Row = (_v(1), NULL)
    insert: Step = ("I", None, row, False)
    _apply(applier, epoch, log((110, [message(WHOLE, insert)] * 3), (120, [message(WHOLE, ("D", row, None, True))])))
    assert disk.kept.tables[WHOLE.label] == [row, row]


def test_a_conflict_names_the_change_and_leaves_the_follower_alone() -> None:
    rows: list[tuple[bytes, ...]] = [(_v(1), _v(1), _v(1))]
    missing: Step = ("D", (_v(7), NULL, NULL), None, False)
    for step, words in ((("I", None, rows[0], False), "insert into public.t"), (missing, "delete from public.t")):
        disk, applier, epoch = _applier(rows)
        before = deepcopy(disk.kept)
        good = message(KEYED, ("I", None, (_v(3), _v(3), _v(3)), False))
        with pytest.raises(ConflictError, match=words):
            _apply(applier, epoch, log((110, [good]), (120, [message(KEYED, step)])))
        applier.rollback()
        assert disk.kept == before


def test_text_and_binary_values_of_one_column_are_never_mixed_up() -> None:
    def text(number: int) -> bytes:
        return b"\0\0\0\2'" + bytes([number])

    disk, applier, epoch = _applier([])
    rows: list[Row] = [(_v(1), _v(1), NULL), (_v(2), text(2), NULL), (_v(3), _v(3), NULL), (_v(4), NULL, text(4))]
    _apply(applier, epoch, log((110, [message(KEYED, ("I", None, row, False)) for row in rows])))
    assert sorted(disk.kept.tables[KEYED.label]) == sorted(rows)


@pytest.mark.parametrize(
    "messages",
    [
        [message(KEYED, ("I", None, (_v(1), UNCHANGED, _v(1)), False))],
        [message(KEYED, ("I", None, (_v(n), _v(1) if n < 2 else UNCHANGED, _v(1)), False)) for n in range(3)],
        [message(KEYED, ("U", None, (UNCHANGED, _v(1), _v(1)), False))],
        [message(KEYED, ("D", (UNCHANGED, NULL, NULL), None, False))],
        [message(WHOLE, ("U", None, (_v(1), UNCHANGED), False))],
        [message(KEYED, ("I", None, (_v(1),), False))],
        [message(replace(KEYED, id=77), ("I", None, (_v(1), _v(1), _v(1)), False))],
        [b"I"],
        [b"?"],
    ],
)
def test_rows_that_say_too_little_are_undecodable(messages: list[bytes]) -> None:
    disk, applier, epoch = _applier([])
    before = deepcopy(disk.kept)
    with pytest.raises(DecodeError):
        _apply(applier, epoch, log((110, messages)))
    applier.rollback()
    assert disk.kept == before


@pytest.mark.parametrize(("after", "until", "wanted"), [(None, None, 3), (110, None, 2), (110, 120, 1), (None, 100, 0)])
def test_only_what_lies_between_takes_effect(after: int | None, until: int | None, wanted: int) -> None:
    disk, applier, epoch = _applier([])
    batch = log(*[(lsn, [message(KEYED, ("I", None, (_v(lsn), NULL, NULL), False))]) for lsn in (110, 120, 130)])
    bounds = [None if lsn is None else START.at(lsn) for lsn in (after, until)]
    applier.apply(batch, after=bounds[0], until=bounds[1])
    applier.commit(Checkpoint(batch.position, 0, epoch))
    assert len(disk.kept.tables[KEYED.label]) == wanted


def test_a_second_applier_fences_the_first() -> None:
    disk, first, epoch = _applier([])
    RowsApplier(MemoryFollower(disk)).claim("s")
    with pytest.raises(FencedError):
        _apply(first, epoch, log((110, [message(KEYED, ("I", None, (_v(1), NULL, NULL), False))])))
    assert disk.kept.tables[KEYED.label] == []
    assert issubclass(FencedError, CdcError)
