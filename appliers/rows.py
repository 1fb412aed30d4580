"""Rebuilds a follower from rows: the payload of the logical log, and of every log that writes rows the same way.

A batch is first taken as sets, its net effect on each table. Where that does not fit (a constraint between the steps,
a row that is not there) the follower goes back to the batch's beginning and takes the changes one by one, in the
leader's order, to come through as the leader did or to stop at the very change that does not fit.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from appliers.batch import Load, Log, Truncate, Write, write
from appliers.changes import NotASetError
from appliers.sets import Sets
from appliers.steps import Steps
from cdc.errors import CdcError, ConflictError, DecodeError, FencedError, SchemaError
from cdc.ports import Follower
from cdc.position import Position
from cdc.record import Batch, Checkpoint, Kind, Relation
from cdc.sql.evolve import changes, numbered
from cdc.wire.oids import type_sql

_TOGETHER_BYTES: Final = 1 << 20  # of small batches that are taken as one
_TOGETHER_MAX: Final = 1_000


class RowsApplier:
    """Applies to one follower. ``schema_changed`` takes the follower's tables to fit the leader's as they are now."""

    def __init__(self, follower: Follower, *, schema_changed: bool = False) -> None:
        self._follower = follower
        self._schema_changed = schema_changed
        self._stream = ""
        self._epoch = 0
        self._open = False
        self._relations: dict[int, Relation] = {}
        self._committed_relations: dict[int, Relation] = {}
        # One batch is written while the next is being planned; the follower's connection is never used by both.
        self._writer = ThreadPoolExecutor(1, "cdc-write")
        self._writing: Future[None] | None = None
        self._held: list[Log] = []
        self._held_relations: dict[int, Relation] = {}
        self._held_bytes = 0
        self._windows: Mapping[int, tuple[int, int]] = {}

    def claim(self, stream: str) -> tuple[int, Checkpoint | None]:
        self._stream = stream
        self._follower.begin()
        epoch = self._epoch = self._follower.claim(stream)
        checkpoint = self._follower.read_checkpoint(stream)
        self._relations = dict(self._follower.read_relations(stream))
        self._follower.commit()
        self._committed_relations = dict(self._relations)
        self._look_at(checkpoint)
        return epoch, checkpoint

    def apply(self, batch: Batch, *, after: Position | None, until: Position | None, offset: int = 0) -> None:
        if not self._open:
            self._follower.begin()
            self._open = True
        if batch.kind is Kind.LOG:
            self._hold(Log(batch, after, until, offset))
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
        self._held, self._held_relations, self._held_bytes = [], {}, 0
        with suppress(CdcError):  # what is rolled back need not have worked
            self._settle()
        self._follower.rollback()
        self._open = False
        self._relations = dict(self._committed_relations)

    def close(self) -> None:
        self._writer.shutdown()
        self._follower.close()

    def _settle(self) -> None:
        """Wait until all that was taken is written."""
        self._plan_held()
        self._written()

    def _written(self) -> None:
        """Wait until what is being written is."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except ConflictError as error:
                self._check_owner(error)
                raise

    def _check_owner(self, conflict: ConflictError) -> None:
        """Rows that another applier has put there conflict before our checkpoint does.

        :raises FencedError: it was that.
        """
        self._follower.rollback()
        self._open = False
        self._follower.begin()
        now = self._follower.read_checkpoint(self._stream)
        self._follower.rollback()
        if now is not None and now.epoch != self._epoch:
            raise FencedError(f"stream {self._stream!r} has another applier on this follower") from conflict

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
        self._written()
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

    def _hold(self, log: Log) -> None:
        """Keep a batch until there is enough for sets that are worth it, or one comes that does not go with it."""
        size = len(log.batch.body)
        if (
            self._held_bytes + size > _TOGETHER_BYTES
            or len(self._held) >= _TOGETHER_MAX
            or not log.agrees(self._held_relations)
        ):
            self._plan_held()
        self._held.append(log)
        self._held_bytes += size
        self._held_relations |= log.relations

    def _plan_held(self) -> None:
        logs, self._held = self._held, []
        self._held_relations, self._held_bytes = {}, 0
        if not logs:
            return
        plan: list[Write | Load | Truncate] | None
        try:
            plan = Sets(self._follower, self._prepare, self._windows).plan(logs)
        except NotASetError:
            plan = None
        self._written()
        self._writing = self._writer.submit(self._write, logs, plan)

    def _write(self, logs: list[Log], plan: list[Write | Load | Truncate] | None) -> None:
        """Write the plan, or where it does not fit, or there is none, step by step."""
        with logs[-1].located():
            if plan is not None and self._write_sets(plan):
                return
        for log in logs:
            with log.located():
                Steps(self._follower, self._prepare_here, self._windows).take(log)

    def _write_sets(self, plan: list[Write | Load | Truncate]) -> bool:
        """:returns: False where the sets do not fit; the follower is then as it was before."""
        try:
            self._follower.savepoint()
        except NotImplementedError:
            write(self._follower, plan)
            return True
        try:
            write(self._follower, plan)
        except ConflictError:
            self._follower.rollback_to_savepoint()
            return False
        return True
