"""What a follower does with the next batch: a pure decider, so that every case can be tested by itself.

Invariant: a follower equals a prefix of the leader's history in commit order, namely everything up to
:attr:`Applied.position`; while an image loads it equals the chunks below :attr:`Applied.image`'s sequence.
"""

from dataclasses import dataclass, replace
from enum import Enum

from cdc.errors import ConfigurationError, DecodeError, DivergedError, GapError
from cdc.position import Position
from cdc.record import Batch, ImageHead, ImageProgress, Kind


class Verdict(Enum):
    APPLY = "apply"
    SKIP = "skip"
    RESTART = "restart"  # roll the half-applied transaction or chunk back, then apply: it begins anew


@dataclass(frozen=True, slots=True)
class Applied:
    """What is in the follower, the open transaction included. ``fragment`` is the next one expected, 0 between."""

    position: Position | None = None
    image: ImageProgress | None = None
    fragment: int = 0

    @property
    def loading(self) -> bool:
        return self.image is not None and self.image.sequence >= 0


def decide(batch: Batch, applied: Applied) -> Verdict:
    """Apply, skip, begin anew; or stop.

    :raises GapError: something is missing between what was applied and this batch.
    :raises DivergedError: the batch is of a history that the follower has already left.
    :raises ConfigurationError: the batch is another leader's.
    """
    at = applied.position
    if at is not None and batch.position.source != at.source:
        raise ConfigurationError(
            f"the topic is of leader {batch.position.source}, this follower of {at.source}",
            remedy="apply another leader's stream under another --stream, to tables of its own",
        )
    if batch.kind is Kind.IMAGE_BEGIN:
        return _decide_image_begin(batch, applied)
    if batch.kind in {Kind.IMAGE_CHUNK, Kind.IMAGE_END}:
        return _decide_image(batch, applied)
    return _decide_log(batch, applied)


def advance(batch: Batch, applied: Applied, until: Position | None) -> Applied:
    """What is applied once ``batch`` is."""
    if batch.fragment is not None and not batch.fragment.last:
        return replace(applied, fragment=batch.fragment.number + 1)
    if batch.kind is Kind.IMAGE_BEGIN:
        return Applied(batch.position, ImageProgress(_image(batch).id, 0, {}))
    if batch.kind is Kind.IMAGE_CHUNK:
        return Applied(applied.position, _loaded(applied.image, _image(batch)))
    if batch.kind is Kind.IMAGE_END:
        return Applied(batch.position, _completed(applied.image, batch.position))
    reached = batch.position if until is None or batch.position <= until else until
    return Applied(reached, _expired(applied.image, reached))


def _decide_log(batch: Batch, applied: Applied) -> Verdict:
    at = applied.position
    if at is None:
        raise GapError(
            f"this follower is empty, and the topic begins at {batch.previous} without an image",
            remedy="put an image into the topic with `cdc ship --image new`",
        )
    if applied.loading:
        raise GapError(f"the image {applied.image and applied.image.id} ends unfinished before {batch.position}")
    if batch.position.epoch > at.epoch and batch.previous < at:
        raise DivergedError(
            f"timeline {batch.position.epoch} of the leader branched off at {batch.previous}, "
            f"below {at} which this follower has applied"
        )
    if batch.position <= at:
        return Verdict.SKIP
    if batch.position.epoch < at.epoch:
        raise DivergedError(
            f"the batch at {batch.position} is of timeline {batch.position.epoch}, "
            f"which this follower left for timeline {at.epoch} at or below {at}"
        )
    if batch.previous > at:
        raise GapError(f"a hole in the topic: {at} is applied, the next batch follows {batch.previous}")
    return _decide_fragment(batch, applied)


def _decide_fragment(batch: Batch, applied: Applied) -> Verdict:
    index = batch.fragment.number if batch.fragment is not None else 0
    if index == applied.fragment:
        return Verdict.APPLY
    if index == 0:
        return Verdict.RESTART
    raise GapError(f"fragment {applied.fragment} of what ends at {batch.position} is missing, {index} came")


def _decide_image_begin(batch: Batch, applied: Applied) -> Verdict:
    mine = applied.image is not None and applied.image.id == _image(batch).id
    if applied.position is None:
        return Verdict.APPLY
    if mine or (not applied.loading and batch.position <= applied.position):
        return Verdict.SKIP
    return Verdict.RESTART if applied.fragment else Verdict.APPLY


def _decide_image(batch: Batch, applied: Applied) -> Verdict:
    head = _image(batch)
    progress = applied.image
    if progress is None or progress.id != head.id or not applied.loading:
        if applied.position is not None and not applied.loading and batch.position <= applied.position:
            return Verdict.SKIP
        raise GapError(f"the beginning of image {head.id} is missing")
    if head.sequence < progress.sequence:
        return Verdict.SKIP
    if head.sequence > progress.sequence:
        raise GapError(f"chunk {progress.sequence} of image {head.id} is missing, {head.sequence} came")
    return _decide_fragment(batch, applied)


def _image(batch: Batch) -> ImageHead:
    if batch.image is None:
        raise DecodeError(f"a batch of kind {batch.kind.value} names no image")
    return batch.image


def _loaded(progress: ImageProgress | None, head: ImageHead) -> ImageProgress:
    tables = dict(progress.tables) if progress is not None else {}
    low, high = tables.get(head.relation_id, (head.lsn, head.lsn))
    tables[head.relation_id] = (min(low, head.lsn), max(high, head.lsn))
    return ImageProgress(head.id, head.sequence + 1, tables)


def _completed(progress: ImageProgress | None, position: Position) -> ImageProgress | None:
    """Keep only the tables whose chunks are younger than the position the log continues from."""
    if progress is None:
        return None
    return _expired(ImageProgress(progress.id, -1, progress.tables), position)


def _expired(progress: ImageProgress | None, position: Position) -> ImageProgress | None:
    if progress is None:
        return None
    tables = {id_: span for id_, span in progress.tables.items() if span[1] > position.lsn}
    return ImageProgress(progress.id, -1, tables) if tables else None
