"""The follower's decider: whatever the topic repeats and wherever it is killed, a follower is a prefix of the leader.

The leader here counts: its n-th transaction stands at position n, and its image at position n is all up to n. A
follower that applies one twice, or leaves one out, has another list than the leader.
"""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc.decide import Applied, Verdict, advance, decide
from cdc.errors import ConfigurationError, DecodeError, DivergedError, GapError
from cdc.position import Position
from cdc.record import Batch, Format, Fragment, ImageHead, ImageProgress, Kind, TransactionHead

_ORIGIN = Position("leader", 1, 0)


def _at(lsn: int, epoch: int = 1) -> Position:
    return Position("leader", epoch, lsn)


def _log(previous: int, position: int, fragment: Fragment | None = None, *, epoch: int = 1, told: bool = True) -> Batch:
    """``told`` is for fragments: does this one carry the transaction's one message?"""
    heads = tuple(TransactionHead(lsn, 1, 1, 1) for lsn in range(previous + 1, position + 1)) if told else ()
    return Batch("s", Format.LOGICAL, Kind.LOG, _at(previous), _at(position, epoch), (), heads, fragment=fragment)


def _beat(previous: int, position: int) -> Batch:
    return Batch("s", Format.LOGICAL, Kind.HEARTBEAT, _at(previous), _at(position))


def _image(  # noqa: PLR0917
    kind: Kind, id_: str, position: int, sequence: int = 0, lsn: int = 0, fragment: Fragment | None = None
) -> Batch:
    head = ImageHead(id_, sequence, lsn or position, sequence, 7)
    return Batch("s", Format.LOGICAL, kind, _at(position), _at(position), image=head, fragment=fragment)


_CHUNKS = 3
"""of every image; a chunk's mark is its number"""


@dataclass
class _Follower:
    """Effects and checkpoint, committed at once; a crash loses what is not committed."""

    log: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    applied: Applied = field(default_factory=Applied)
    committed: tuple[list[int], list[int], Applied] = field(default_factory=lambda: ([], [], Applied()))
    offset: int = 0

    def take(self, batch: Batch, offset: int = 0) -> None:
        if batch.fragment == Fragment(0, False):
            self.commit(offset)
        verdict = decide(batch, self.applied)
        if verdict is Verdict.SKIP:
            return
        if verdict is Verdict.RESTART:
            self.crash()
        self._effect(batch)
        self.applied = advance(batch, self.applied, None)

    def _effect(self, batch: Batch) -> None:
        if batch.kind is Kind.IMAGE_BEGIN:
            self.log, self.chunks = list(range(1, batch.position.lsn + 1)), []
        elif batch.kind is Kind.IMAGE_CHUNK and batch.image and (batch.fragment is None or batch.fragment.last):
            self.chunks = [*self.chunks, batch.image.chunk]
        after = self.applied.position
        self.log = self.log + [head.lsn for head in batch.transactions if after is None or head.lsn > after.lsn]

    def commit(self, offset: int = 0) -> None:
        if self.applied.fragment == 0:
            self.committed = (self.log, self.chunks, self.applied)
            self.offset = offset

    def crash(self) -> None:
        self.log, self.chunks, applied = self.committed
        # The checkpoint knows no fragments.
        self.applied = replace(applied, fragment=0)

    def check(self) -> None:
        """The invariant."""
        position, image = self.applied.position, self.applied.image
        if position is None:
            assert (self.log, self.chunks) == ([], [])
        elif image is not None and image.sequence >= 0:
            assert self.chunks == list(range(image.sequence))
        elif self.applied.fragment == 0:
            assert self.log == list(range(1, position.lsn + 1))


@dataclass
class _Topic:
    """Written by shippers that are killed anywhere and resume from the topic's end, as :mod:`cdc.pipeline` does."""

    bodies: list[Batch] = field(default_factory=list)
    position: int | None = None
    images: int = 0

    def image(self, draw: st.DrawFn, leader: int) -> None:
        """An image, begun as often as it takes; each part may be torn, or appended twice in a row by a retry."""
        while True:
            self.images += 1
            id_ = f"image {self.images}"
            self.bodies.append(_image(Kind.IMAGE_BEGIN, id_, leader))
            if draw(st.integers(0, 3)) == 3:
                continue  # killed, and the tables changed: it cannot be resumed
            for sequence in range(_CHUNKS):
                self._chunk(draw, id_, leader, sequence)
            self.bodies.append(_image(Kind.IMAGE_END, id_, leader, _CHUNKS))
            self.position = leader
            return

    def _chunk(self, draw: st.DrawFn, id_: str, leader: int, sequence: int) -> None:
        lsn = leader + draw(st.integers(0, 2))
        parts = draw(st.integers(1, 3))
        for torn in [*draw(st.lists(st.integers(0, parts - 1), max_size=2)), parts]:
            for number in range(torn):
                fragment = Fragment(number, number == parts - 1)
                self.bodies.append(_image(Kind.IMAGE_CHUNK, id_, leader, sequence, lsn, fragment))

    def extend(self, draw: st.DrawFn) -> None:
        assert self.position is not None
        start, size = self.position, draw(st.integers(1, 3))
        kind = draw(st.sampled_from(["log", "fragments", "again"]))
        if kind == "again" and self.bodies:
            # A shipper that did not know whether its append was done, without having read the topic's end.
            self.bodies.append(self.bodies[-1])
        elif kind == "fragments":
            parts = draw(st.integers(1, 3))
            for torn in [*draw(st.lists(st.integers(0, parts - 1), max_size=2)), parts]:
                for number in range(torn):
                    fragment = Fragment(number, number == parts - 1)
                    self.bodies.append(_log(start, start + 1, fragment, told=number == 0))
            self.position = start + 1
        else:
            self.bodies.append(_log(start, start + size))
            self.position = start + size


@st.composite
def _topics(draw: st.DrawFn) -> tuple[list[Batch], int]:
    topic = _Topic()
    topic.image(draw, draw(st.integers(0, 3)))
    for _ in range(draw(st.integers(0, 8))):
        if draw(st.integers(0, 5)) == 5:
            assert topic.position is not None
            topic.image(draw, topic.position + draw(st.integers(0, 2)))
        else:
            topic.extend(draw)
    return topic.bodies, topic.position or 0


@settings(max_examples=400)
@given(_topics(), st.data())
def test_interrupted_anywhere_the_follower_is_a_prefix_of_the_leader(
    topic: tuple[list[Batch], int], data: st.DataObject
) -> None:
    bodies, end = topic
    follower, offset, crashes = _Follower(), 0, 0
    while offset < len(bodies):
        follower.take(bodies[offset], offset)
        follower.check()
        offset += 1
        what = data.draw(st.sampled_from(["on", "on", "commit", "crash"]))
        if what == "commit":
            follower.commit(offset)
        elif what == "crash" and crashes < 20:
            crashes += 1
            follower.crash()
            follower.check()
            # The checkpoint has the offset. It is but a hint: between images the reader may as well begin below it.
            kept = follower.offset
            offset = kept if follower.applied.loading else data.draw(st.integers(0, kept))
    assert follower.log == list(range(1, end + 1))
    assert follower.chunks == list(range(_CHUNKS))
    before = (follower.log, follower.chunks)
    for batch in bodies:
        follower.take(batch)
    assert (follower.log, follower.chunks) == before


@settings(max_examples=200)
@given(_topics(), st.data())
def test_a_hole_always_stops_the_follower(topic: tuple[list[Batch], int], data: st.DataObject) -> None:
    """Any batch left out, unless what is left tells the same all the same."""
    bodies, end = topic
    hole = data.draw(st.integers(0, len(bodies) - 1))
    follower = _Follower()
    try:
        for batch in bodies[:hole] + bodies[hole + 1 :]:
            follower.take(batch)
            follower.check()
    except GapError:
        return
    follower.crash() if follower.applied.fragment else follower.commit()
    follower.check()
    last = follower.applied.position
    if hole < len(bodies) - 1 and not follower.applied.loading:
        assert last is not None
        # Nothing but what the torn end was part of may be missing.
        assert last.lsn == end or bodies[hole:][-1].fragment is not None


def test_heartbeats_move_the_position() -> None:
    at = Applied(_at(5))
    assert decide(_beat(5, 9), at) is Verdict.APPLY
    assert advance(_beat(5, 9), at, None).position == _at(9)
    assert decide(_beat(5, 9), Applied(_at(9))) is Verdict.SKIP
    assert decide(_beat(3, 9), Applied(_at(5))) is Verdict.APPLY
    with pytest.raises(GapError, match=r"0/5 is applied.*0/6"):
        decide(_beat(6, 9), at)
    # The shipper began anew before the half transaction's position.
    assert decide(_beat(5, 6), Applied(_at(5), fragment=2)) is Verdict.RESTART


def test_an_empty_follower_needs_an_image() -> None:
    with pytest.raises(GapError, match="without an image"):
        decide(_log(0, 1), Applied())
    for kind in (Kind.IMAGE_CHUNK, Kind.IMAGE_END):
        with pytest.raises(GapError, match="beginning of image"):
            decide(_image(kind, "a", 5), Applied())


def test_an_image_must_be_whole() -> None:
    loading = Applied(_at(5), ImageProgress("a", 1, {7: (5, 5)}))
    assert decide(_image(Kind.IMAGE_CHUNK, "a", 5, 0), loading) is Verdict.SKIP
    assert decide(_image(Kind.IMAGE_CHUNK, "a", 5, 1), loading) is Verdict.APPLY
    for missing in (
        _image(Kind.IMAGE_CHUNK, "a", 5, 2),
        _image(Kind.IMAGE_END, "a", 5, 2),
        _image(Kind.IMAGE_CHUNK, "b", 5, 1),
        _log(5, 6),
    ):
        with pytest.raises(GapError):
            decide(missing, loading)


def test_fragments_come_in_order() -> None:
    half = Applied(_at(5), fragment=1)
    assert decide(_log(5, 6, Fragment(1, False)), half) is Verdict.APPLY
    assert decide(_log(5, 6, Fragment(0, False)), half) is Verdict.RESTART
    assert decide(_log(5, 6), half) is Verdict.RESTART
    with pytest.raises(GapError, match="fragment 1"):
        decide(_log(5, 6, Fragment(2, True)), half)
    assert decide(_log(5, 6, Fragment(2, True)), Applied(_at(6))) is Verdict.SKIP


def test_another_leader_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="leader"):
        decide(_log(5, 6), Applied(Position("other", 1, 5)))


def test_a_newer_epoch_may_begin_where_the_older_was_left() -> None:
    assert decide(_log(5, 6, epoch=2), Applied(_at(5))) is Verdict.APPLY
    with pytest.raises(DivergedError, match="timeline 2"):
        decide(_log(5, 6, epoch=2), Applied(_at(6)))
    with pytest.raises(DivergedError):
        decide(_log(5, 9, epoch=2), Applied(_at(7)))


def test_one_place_named_by_two_epochs_is_one_place() -> None:
    after = Batch("s", Format.LOGICAL, Kind.HEARTBEAT, _at(8, epoch=2), _at(9, epoch=2))
    assert decide(after, Applied(_at(8))) is Verdict.APPLY
    here = Batch("s", Format.LOGICAL, Kind.HEARTBEAT, _at(7), _at(8, epoch=2))
    assert advance(here, Applied(_at(7)), _at(8)).position == _at(8, epoch=2)


def test_a_batch_of_an_epoch_that_was_left_is_refused() -> None:
    """The old leader is still alive and ships."""
    at = Applied(_at(8, epoch=2))
    with pytest.raises(DivergedError, match="timeline 1"):
        decide(_log(7, 9), at)
    assert decide(_log(7, 8), at) is Verdict.SKIP


def test_until_cuts_a_batch_in_two() -> None:
    assert advance(_log(5, 9), Applied(_at(5)), _at(7)).position == _at(7)
    assert advance(_log(5, 9), Applied(_at(5)), _at(9)).position == _at(9)
    assert decide(_log(5, 9), Applied(_at(7))) is Verdict.APPLY


def test_windows_last_as_long_as_their_chunks_are_ahead() -> None:
    loading = Applied(_at(5), ImageProgress("a", 0, {}))
    for sequence, lsn in enumerate((5, 9, 7)):
        loading = advance(_image(Kind.IMAGE_CHUNK, "a", 5, sequence, lsn), loading, None)
    assert loading.image == ImageProgress("a", 3, {7: (5, 9)})
    done = advance(_image(Kind.IMAGE_END, "a", 5, 3), loading, None)
    assert done == Applied(_at(5), ImageProgress("a", -1, {7: (5, 9)}))
    assert advance(_log(5, 8), done, None).image == done.image
    assert advance(_log(5, 9), done, None) == Applied(_at(9))


def test_an_image_without_a_head_is_undecodable() -> None:
    with pytest.raises(DecodeError, match="names no image"):
        decide(replace(_image(Kind.IMAGE_CHUNK, "a", 5), image=None), Applied(_ORIGIN))
