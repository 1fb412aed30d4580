"""Copying an image into a topic, before the log."""

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Final, NamedTuple

from cdc.ports import ImageChunk, Progress, Report, Snapshot
from cdc.position import Position
from cdc.record import Batch, ChunkPlan, Format, Fragment, ImageHead, Kind, Relation
from cdc.topic import Tail

CHUNK_PARTS_HELD: Final = 12  # of an image chunk in memory before it is written


class Place(NamedTuple):
    """Where an image goes: ``write`` makes batches durable, together."""

    stream: str
    format: Format
    write: Callable[[list[Batch]], None]


class ImageCopy:
    """Copies a snapshot into the topic, chunk by chunk, several at a time; goes on where an earlier try was killed.

    Chunks may be read in any order but each stands whole in the topic. Those read in a later snapshot than the image's
    first carry that snapshot's position, by which the follower knows which changes they already contain.
    """

    def __init__(
        self, snapshot: Snapshot, place: Place, *, workers: int, stop: threading.Event, report: Report
    ) -> None:
        self._snapshot = snapshot
        self._place = place
        self._workers = workers
        self._stop = stop
        self._report = report
        self._lock = threading.Lock()
        self._sequence = 0
        self._failed: BaseException | None = None

    def copy(self, end: Tail) -> Position | None:
        """Copy what ``end`` does not have; the position to stream from, or None where told to stop."""
        relations = self._snapshot.relations()
        begin = end.begin if self._can_resume(end, relations) else None
        done = end.done if begin is not None else frozenset()
        self._sequence = end.sequence if begin is not None else 0
        begin = begin or self._begin(relations)
        todo = [
            (relation, plan, chunk)
            for relation, plan in zip(begin.relations, begin.plan, strict=True)
            for chunk in range(len(plan.bounds) + 1)
            if (relation.id, chunk) not in done
        ]
        total = len(todo) + len(done)
        if not self._copy_all(begin, todo, total):
            return None
        head = ImageHead(_id(begin), self._sequence, begin.position.lsn)
        self._place.write([replace(self._empty(Kind.IMAGE_END, begin.position), image=head)])
        return begin.position

    def _can_resume(self, end: Tail, relations: Iterable[Relation]) -> bool:
        """Only where no table has changed its shape since: rows of one table must be alike."""
        if end.begin is None:
            return False
        now = {relation.id: relation for relation in relations}
        same_leader = end.begin.position.source == self._snapshot.position.source
        return same_leader and all(now.get(relation.id) == relation for relation in end.begin.relations)

    def _empty(self, kind: Kind, position: Position) -> Batch:
        return Batch(self._place.stream, self._place.format, kind, position, position)

    def _begin(self, relations: Iterable[Relation]) -> Batch:
        relations = tuple(relations)
        plans = tuple(self._snapshot.plan(relation) for relation in relations)
        position = self._snapshot.position
        head = ImageHead(uuid.uuid4().hex, 0, position.lsn)
        empty = self._empty(Kind.IMAGE_BEGIN, position)
        batch = replace(empty, image=head, relations=relations, plan=plans)
        self._place.write([batch])
        return batch

    def _copy_all(self, begin: Batch, todo: list[tuple[Relation, ChunkPlan, int]], total: int) -> bool:
        with ThreadPoolExecutor(self._workers, "cdc-image") as pool:
            waiting = [pool.submit(self._copy_chunk, begin, *chunk) for chunk in todo]
            try:
                for done, future in enumerate(as_completed(waiting), total - len(todo) + 1):
                    progress = future.result()
                    if progress is None:
                        return False
                    self._report(progress._replace(done=done, of=total))
            finally:
                for future in waiting:
                    future.cancel()
        return True

    def _copy_chunk(self, begin: Batch, relation: Relation, plan: ChunkPlan, chunk: int) -> Progress | None:
        if self._stop.is_set():
            return None
        parts = self._snapshot.read(relation, plan, chunk)
        # Read ahead without the lock; what is larger than this is written while it is read, and others wait.
        held = list(islice(parts, CHUNK_PARTS_HELD))
        rows = size = 0
        with self._lock, self._unless_failed():
            batches: list[Batch] = []
            for index, (part, last) in enumerate(_marking_last(chain(held, parts))):
                head = ImageHead(
                    _id(begin),
                    self._sequence,
                    self._snapshot.position.lsn,
                    chunk,
                    relation.id,
                    part.rows,
                    "binary" if part.form == "binary" else "text",
                )
                empty = self._empty(Kind.IMAGE_CHUNK, begin.position)
                batches.append(
                    replace(empty, image=head, relations=(relation,), body=part.body, fragment=Fragment(index, last))
                )
                rows += part.rows
                size += len(part.body)
                if len(batches) == CHUNK_PARTS_HELD or last:
                    self._place.write(batches)
                    batches.clear()
            self._sequence += 1
        return Progress("image", relation.label, rows=rows, size_bytes=size)

    @contextmanager
    def _unless_failed(self) -> Iterator[None]:
        """After an append of which nobody knows whether it is done, nothing may take its place in the sequence."""
        if self._failed is not None:
            raise self._failed
        try:
            yield
        except BaseException as error:
            self._failed = error
            raise


def _id(begin: Batch) -> str:
    assert begin.image is not None  # noqa: S101
    return begin.image.id


def _marking_last(items: Iterable[ImageChunk]) -> Iterator[tuple[ImageChunk, bool]]:
    iterator = iter(items)
    held = next(iterator)
    for item in iterator:
        yield held, False
        held = item
    yield held, True
