"""Rebuilds a follower from rows: the payload of the logical log, and of every log that writes rows the same way.

A batch is first taken as sets, its net effect on each table. Where that does not fit (a constraint between the steps,
a row that is not there) the follower goes back to the batch's beginning and takes the changes one by one, in the
leader's order, to come through as the leader did or to stop at the very change that does not fit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace as changed_to
from typing import Final, NamedTuple

from appliers.changes import TURN_MAX, Identity, NotASetError, TableChanges, filled, identity
from cdc.errors import CdcError, ConflictError, DecodeError, SchemaError
from cdc.ports import Follower
from cdc.position import Position, format_lsn
from cdc.record import NULL, UNCHANGED, Absent, Batch, Checkpoint, Kind, Relation, Row, RowSet, TransactionHead
from cdc.sql.evolve import changes, numbered
from cdc.wire import copy, pgoutput
from cdc.wire.oids import type_sql
from cdc.wire.values import text_reader

_INSERT: Final = ord("I")
_NEW: Final = ord("N")
_BULK_MIN: Final = 64  # inserts in a row that are worth a COPY of their own
_COPY_HEAD: Final = copy.SIGNATURE + bytes(8)
_COPY_TAIL: Final = b"\xff\xff"
_SHOWN: Final = 80  # characters of a value in a message


class RowsApplier:
    """Applies to one follower. ``schema_changed`` takes the follower's tables to fit the leader's as they are now."""

    def __init__(self, follower: Follower, *, schema_changed: bool = False) -> None:
        self._follower = follower
        self._schema_changed = schema_changed
        self._stream = ""
        self._open = False
        self._relations: dict[int, Relation] = {}
        self._committed_relations: dict[int, Relation] = {}
        # One batch is written while the next is being planned; the follower's connection is never used by both.
        self._writer = ThreadPoolExecutor(1, "cdc-write")
        self._writing: Future[None] | None = None
        self._windows: Mapping[int, tuple[int, int]] = {}

    def claim(self, stream: str) -> tuple[int, Checkpoint | None]:
        self._stream = stream
        self._follower.begin()
        epoch = self._follower.claim(stream)
        checkpoint = self._follower.read_checkpoint(stream)
        self._relations = dict(self._follower.read_relations(stream))
        self._follower.commit()
        self._committed_relations = dict(self._relations)
        self._look_at(checkpoint)
        return epoch, checkpoint

    def apply(self, batch: Batch, *, after: Position | None, until: Position | None) -> None:
        if not self._open:
            self._follower.begin()
            self._open = True
        if batch.kind is Kind.LOG:
            self._apply_log(_Log(batch, after, until))
            return
        self._settle()
        if batch.kind is Kind.IMAGE_BEGIN:
            self._begin_image(batch)
        elif batch.kind is Kind.IMAGE_CHUNK:
            self._load(batch)

    def commit(self, checkpoint: Checkpoint) -> None:
        self._settle()
        self._follower.write_checkpoint(self._stream, checkpoint)
        self._follower.commit()
        self._open = False
        self._committed_relations = dict(self._relations)
        self._look_at(checkpoint)

    def rollback(self) -> None:
        with suppress(CdcError):  # what is rolled back need not have worked
            self._settle()
        self._follower.rollback()
        self._open = False
        self._relations = dict(self._committed_relations)

    def close(self) -> None:
        self._writer.shutdown()
        self._follower.close()

    def _settle(self) -> None:
        """Wait until the batch that is being written is."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _look_at(self, checkpoint: Checkpoint | None) -> None:
        image = checkpoint.image if checkpoint is not None else None
        self._windows = image.tables if image is not None and image.sequence < 0 else {}

    # Images.

    def _begin_image(self, batch: Batch) -> None:
        for relation in batch.relations:
            ours = relation.id in self._relations
            self._prepare(relation)
            if not self._follower.is_empty(relation):
                if not ours:
                    raise ConflictError(
                        f"table {relation.label} has rows that this stream did not put there",
                        remedy="empty it, or apply to another database",
                    )
                self._follower.truncate([relation], cascade=False, restart_identity=False)

    def _load(self, batch: Batch) -> None:
        head = batch.image
        if head is None or len(batch.relations) != 1:
            raise DecodeError("an image chunk must be of one relation")
        self._follower.load(batch.relations[0], batch.body, head.form)

    # Tables.

    def _prepare(self, relation: Relation) -> None:
        """Have the table, in the shape in which the leader had it when it wrote what comes next."""
        known = self._relations.get(relation.id)
        if known is relation or known == relation:
            return
        self._settle()
        self._prepare_here(relation)

    def _prepare_here(self, relation: Relation) -> None:
        """As :meth:`_prepare`, by whoever has the follower's connection."""
        known = self._relations.get(relation.id)
        if known is relation or known == relation:
            return
        there = self._follower.columns(relation)
        if there is None and known is None:
            self._follower.create(relation)
        elif known is None or self._schema_changed:
            self._fit(relation, there)
        else:
            relation = numbered(relation, known)
            for change in changes(known, relation):
                self._follower.evolve(relation, change)
        self._follower.write_relation(self._stream, relation)
        self._relations[relation.id] = relation

    def _fit(self, relation: Relation, there: Mapping[str, str] | None) -> None:
        missing = [column for column in relation.columns if column.name not in (there or {})]
        if there is None or missing:
            types = {description.oid: description for description in relation.types}
            adding = ", ".join(
                f'ADD COLUMN "{column.name}" {type_sql(column.type_oid, column.modifier, types)}' for column in missing
            )
            raise SchemaError(
                f"the follower's table {relation.label} has no column {', '.join(repr(c.name) for c in missing)}",
                remedy=f'ALTER TABLE "{relation.schema}"."{relation.name}" {adding}',
            )

    # The log.

    def _apply_log(self, log: "_Log") -> None:
        plan: list[_Write | _Load | _Truncate] | None
        try:
            plan = _Sets(self._follower, self._prepare, self._windows).plan(log)
        except NotASetError:
            plan = None
        self._settle()
        self._writing = self._writer.submit(self._write, log, plan)

    def _write(self, log: "_Log", plan: "list[_Write | _Load | _Truncate] | None") -> None:
        """Write the plan, or where it does not fit, or there is none, step by step."""
        try:
            if plan is None or not self._write_sets(plan):
                _Steps(self._follower, self._prepare_here, self._windows).take(log)
        except CdcError as error:
            batch = log.batch
            located = type(error)(f"{error} (stream {batch.stream!r}, batch of {batch.position})", remedy=error.remedy)
            located.located = True
            raise located from error

    def _write_sets(self, plan: "list[_Write | _Load | _Truncate]") -> bool:
        """:returns: False where the sets do not fit; the follower is then as it was before."""
        try:
            self._follower.savepoint()
        except NotImplementedError:
            _write(self._follower, plan)
            return True
        try:
            _write(self._follower, plan)
        except ConflictError:
            self._follower.rollback_to_savepoint()
            return False
        return True


class _Write(NamedTuple):
    """A set to write. ``tolerant``: some of it may have been done already."""

    operation: str
    rows: RowSet
    tolerant: bool


class _Load(NamedTuple):
    """A run of inserts as COPY data."""

    relation: Relation
    body: bytes
    rows: int


class _Truncate(NamedTuple):
    relations: list[Relation]
    cascade: bool
    restart_identity: bool


def _write(follower: Follower, plan: Iterable[_Write | _Load | _Truncate]) -> None:
    """Write a plan out.

    :raises ConflictError: a row is there that should not be, or the other way round.
    """
    for step in plan:
        if isinstance(step, _Truncate):
            if step.relations:  # none where a resumed image already has it
                follower.truncate(step.relations, cascade=step.cascade, restart_identity=step.restart_identity)
            continue
        if isinstance(step, _Load):
            follower.load(step.relation, step.body, "binary")
            continue
        wanted = len(step.rows.rows if step.operation == "I" else step.rows.matches)
        changed = _write_rows(follower, step.operation, step.rows, replace=step.tolerant)
        if changed != wanted and not step.tolerant:
            raise ConflictError(
                f"{wanted} changes ({step.operation}) of {step.rows.relation.label} found {changed} rows",
                remedy="the follower was written by somebody else: compare with `cdc verify`",
            )


def _write_rows(follower: Follower, operation: str, rows: RowSet, *, replace: bool) -> int:
    if operation == "I":
        return follower.insert(rows, replace=replace)
    return follower.update(rows) if operation == "U" else follower.delete(rows)


class _Log:
    """The transactions of a batch that are to take effect, as (head, messages)."""

    def __init__(self, batch: Batch, after: Position | None, until: Position | None) -> None:
        self.batch = batch
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

    def relation(self, relation_id: int) -> Relation:
        try:
            return self.relations[relation_id]
        except KeyError:
            raise DecodeError(f"a change names relation {relation_id}, which its batch does not describe") from None


class _Tables:
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

    def _truncated(self, log: _Log, message: pgoutput.Truncate, lsn: int) -> _Truncate:
        relations = [log.relation(id_) for id_ in message.relation_ids if self._wanted(id_, lsn)]
        for relation in relations:
            self._prepare(relation)
        return _Truncate(relations, message.cascade, message.restart_identity)


class _Sets(_Tables):
    """Plans a batch as net effects; what is pending for a table is planned before anything that must follow it."""

    def plan(self, log: _Log) -> list[_Write | _Load | _Truncate]:
        """
        :raises NotASetError: take it in steps.
        """
        self._tables: dict[bytes, TableChanges] = {}
        self._plan: list[_Write | _Load | _Truncate] = []
        for head, at, lengths in log.transactions():
            self._transaction(log, head, at, lengths)
        self._settle_all()
        return self._plan

    def _transaction(self, log: _Log, head: TransactionHead, at: int, lengths: Sequence[int]) -> None:
        body = log.batch.body
        tables = self._tables
        simple = not self._windows
        bulk = self._follower.bulk and simple
        number = 0
        while number < len(lengths):
            end = at + lengths[number]
            opcode = body[at]
            if opcode == _INSERT and bulk and len(lengths) - number >= _BULK_MIN:
                done, after = self._bulk(log, at, lengths, number)
                if done:
                    number, at = number + done, after
                    continue
                bulk = False  # this transaction is not of that kind
            table = tables.get(body[at + 1 : at + 5])
            if opcode == _INSERT and table is not None and simple:
                row, forms, place = pgoutput.read_tuple(body[at:end], 6)
                if len(row) != table.width or place != end - at or body[at + 5] != _NEW:
                    pgoutput.decode_change(body[at:end])  # which tells what else is wrong
                    raise _misfit(table.relation, len(row))
                if b"u" in forms:
                    raise _incomplete(table.relation)
                if b"t" in forms or b"t" in table.forms:
                    self._note(table, forms)
                table.insert(tuple(row))
            elif opcode in b"IUD":
                self._change(log, head, body[at:end])
            else:
                self._truncate(log, head, body[at:end])
            number, at = number + 1, end

    def _bulk(self, log: _Log, at: int, lengths: Sequence[int], number: int) -> tuple[int, int]:
        """Take a long run of inserts as COPY data; nothing where the run is short."""
        body = log.batch.body
        far = at + sum(lengths[number : number + _BULK_MIN - 1])
        if body[far : far + 8] != body[at : at + 8]:
            return 0, at
        relation = log.relation(int.from_bytes(body[at + 1 : at + 5]))
        self._prepare(relation)
        table = self._tables.setdefault(body[at + 1 : at + 5], TableChanges(relation))
        if int.from_bytes(body[at + 6 : at + 8]) != table.width:
            raise _misfit(relation, int.from_bytes(body[at + 6 : at + 8]))
        rows: list[bytes] = []
        done, after = pgoutput.copy_inserts(body, at, lengths, number, rows)
        if done:
            self._settle(table)
            self._plan.append(_Load(relation, b"".join([_COPY_HEAD, *rows, _COPY_TAIL]), done))
        return done, after

    def _change(self, log: _Log, head: TransactionHead, message: bytes) -> None:
        change = pgoutput.decode_change(message)
        if not self._wanted(change.relation_id, head.lsn):
            return
        table = self._table(log, change.relation_id, message[1:5], head.lsn)
        for image in (change.before, change.after):
            if image is not None and len(image) != table.width:
                raise _misfit(table.relation, len(image))
        if b"t" in change.forms or b"t" in table.forms:
            self._note(table, change.forms)
        if len(table.inserts) > TURN_MAX and change.op != "I":
            self._settle(table)
        before = tuple(change.before) if change.before is not None else None
        if change.op == "D":
            table.delete(before or ())
        elif change.op == "U":
            table.update(before, tuple(change.after or ()), full=change.before_kind == "O")
        else:
            if b"u" in change.forms:
                raise _incomplete(table.relation)
            table.insert(tuple(change.after or ()))

    def _table(self, log: _Log, relation_id: int, key: bytes, lsn: int) -> TableChanges:
        table = self._tables.get(key)
        tolerant = self._tolerant(relation_id, lsn)
        if table is None:
            relation = log.relation(relation_id)
            self._prepare(relation)
            table = self._tables[key] = TableChanges(relation, tolerant=tolerant)
        elif table.tolerant != tolerant:
            self._settle(table)
            table.tolerant = tolerant
        return table

    def _note(self, table: TableChanges, forms: bytes) -> None:
        """Some values are text. A column is of one form as long as its rows wait together."""
        wanted = bytes(new if new in b"bt" else old for old, new in zip(table.forms, forms, strict=True))
        if wanted != table.forms:
            self._settle(table)
            table.forms = wanted

    def _truncate(self, log: _Log, head: TransactionHead, message: bytes) -> None:
        decoded = pgoutput.decode(message)
        if isinstance(decoded, pgoutput.Truncate):
            self._settle_all()
            self._plan.append(self._truncated(log, decoded, head.lsn))

    def _settle_all(self) -> None:
        for table in self._tables.values():
            self._settle(table)

    def _settle(self, table: TableChanges) -> None:
        self._plan += [_Write(operation, rows, table.tolerant) for operation, rows in table.sets()]
        table.clear()


class _Steps(_Tables):
    """Takes a batch change by change, in the leader's order."""

    def take(self, log: _Log) -> None:
        for head, message in log.messages():
            if message[0] in b"IUD":
                self._step(log, head, pgoutput.decode_change(message))
            elif isinstance(decoded := pgoutput.decode(message), pgoutput.Truncate):
                _write(self._follower, [self._truncated(log, decoded, head.lsn)])

    def _step(self, log: _Log, head: TransactionHead, change: pgoutput.Change) -> None:
        if not self._wanted(change.relation_id, head.lsn):
            return
        relation = log.relation(change.relation_id)
        self._prepare(relation)
        tolerant = self._tolerant(change.relation_id, head.lsn)
        found = identity(relation)
        try:
            rows, match = _single(relation, found, change)
        except NotASetError:
            raise DecodeError(f"a change of {relation.label} at {format_lsn(head.lsn)} names no row") from None
        try:
            if tolerant and change.op == "U" and found.unique:
                changed = self._move(rows, match)
            else:
                changed = _write_rows(self._follower, change.op, rows, replace=tolerant)
        except CdcError as error:
            if isinstance(error, ConflictError):
                raise type(error)(
                    f"{_told(change, relation, match, rows, head)}: {error}", remedy=error.remedy
                ) from error
            raise
        if changed != 1 and not tolerant:
            raise ConflictError(
                f"{_told(change, relation, match, rows, head)} finds {changed} rows on the follower",
                remedy="the follower was written by somebody else: compare with `cdc verify`, and put the row back",
            )

    def _move(self, rows: RowSet, match: tuple[bytes, ...]) -> int:
        """An update where old and new row may each be there or not, as their chunks were copied before it or after.

        :raises ConflictError: the row is in neither chunk, and the log does not carry all of it.
        """
        values = dict(zip(rows.columns, rows.rows[0], strict=True))
        moved = tuple(values.get(index, old) for index, old in zip(rows.match, match, strict=True))
        if moved == match:
            return self._follower.update(rows)
        gone = changed_to(rows, columns=(), rows=[])
        if len(rows.columns) == len(rows.relation.columns):
            self._follower.delete(gone)
            return self._follower.insert(changed_to(rows, match=(), matches=[]), replace=True)
        if self._follower.update(changed_to(rows, matches=[moved])):
            self._follower.delete(gone)
        elif not self._follower.update(rows):
            raise ConflictError(
                "the row moved while the image was copied, and neither part of the image has it",
                remedy="take a new image with `cdc ship --image new`",
            )
        return 1


def _single(relation: Relation, found: Identity, change: pgoutput.Change) -> tuple[RowSet, tuple[bytes, ...]]:
    """One change as a set of one row, and the values that find its row."""
    forms = bytes(form if form in b"bt" else 0x62 for form in change.forms)
    before = tuple(change.before) if change.before is not None else None
    after = tuple(change.after) if change.after is not None else None
    for image in (before, after):
        if image is not None and len(image) != len(relation.columns):
            raise _misfit(relation, len(image))
    match: tuple[bytes, ...] = ()
    if change.op != "I":
        match = found.of(before if before is not None else after or ())
    rows = RowSet(relation, forms, match=found.columns, unique=found.unique)
    if change.op != "I":
        rows.matches.append(match)
    if after is not None:
        if change.op == "I" and UNCHANGED in after:
            raise _incomplete(relation)
        if before is not None and change.before_kind == "O":
            after = filled(after, before)
        rows.columns = tuple(index for index, value in enumerate(after) if value is not UNCHANGED)
        rows.rows.append(_present(after))
    return rows, match or rows.rows[0]


def _present(row: Row) -> tuple[bytes, ...]:
    return tuple([value for value in row if not isinstance(value, Absent)])


def _told(
    change: pgoutput.Change, relation: Relation, match: tuple[bytes, ...], rows: RowSet, head: TransactionHead
) -> str:
    """The change in words: ``update of public.t (id)=(5) at 0/16B3748``."""
    word = {"I": "insert into", "U": "update of", "D": "delete from"}[change.op]
    columns = rows.match if change.op != "I" else rows.columns
    names = ", ".join(relation.columns[index].name for index in columns)
    values = ", ".join(_shown(relation, index, rows.forms, value) for index, value in zip(columns, match, strict=False))
    return f"{word} {relation.label} ({names})=({values}) at {format_lsn(head.lsn)}"


def _shown(relation: Relation, index: int, forms: bytes, value: bytes) -> str:
    if value == NULL:
        return "null"
    if forms[index : index + 1] == b"t":
        text = value[4:].decode(errors="replace")
    else:
        types = {description.oid: description for description in relation.types}
        try:
            text = text_reader(relation.columns[index].type_oid, types)(value[4:])
        except CdcError:
            text = value[4:].hex()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _incomplete(relation: Relation) -> DecodeError:
    return DecodeError(f"a row inserted into {relation.label} has a value that did not change")


def _misfit(relation: Relation, width: int) -> DecodeError:
    return DecodeError(f"a row of {width} columns for {relation.label}, which has {len(relation.columns)}")
