"""Where a snapshot lies in the log: every order in which commits may become visible."""

from itertools import product

import pytest

from shippers.postgresql.visible import Committed, Seen, image_lsn

LOG = [Committed(100, 1000), Committed(101, 1100), Committed(102, 1200)]


def seen(*visible: int) -> Seen:
    """A snapshot that sees these of the log's transactions."""
    return Seen(100, 103, frozenset({100, 101, 102} - set(visible)))


def test_a_snapshot_is_read_from_its_text() -> None:
    assert Seen.parse("100:105:100,103") == Seen(100, 105, frozenset({100, 103}))
    assert Seen.parse("100:100:") == Seen(100, 100, frozenset())


@pytest.mark.parametrize("flushed", [900, 1050, 1200, 1500])
def test_every_set_of_visible_transactions(flushed: int) -> None:
    """What lies at or below the place is what the snapshot sees; there is one exactly where a prefix is seen."""
    for mask in product((True, False), repeat=3):
        visible = [each for each, is_seen in zip(LOG, mask, strict=True) if is_seen]
        lsn = image_lsn(seen(*(each.xid for each in visible)), LOG, confirmed=800, flushed=flushed)
        assert (lsn is not None) == (visible == LOG[: len(visible)])
        if lsn is not None:
            assert [each for each in LOG if each.end_lsn <= lsn] == visible
            assert lsn >= 800


def test_what_became_visible_before_an_earlier_commit_has_no_place() -> None:
    assert image_lsn(seen(101), LOG, confirmed=800, flushed=900) is None


def test_an_empty_log_leaves_the_image_where_the_log_ended() -> None:
    assert image_lsn(Seen(5, 5, frozenset()), [], confirmed=800, flushed=900) == 900
    assert image_lsn(Seen(5, 5, frozenset()), [], confirmed=800, flushed=800) == 800


def test_what_began_later_is_not_seen() -> None:
    later = [*LOG, Committed(103, 1300), Committed(150, 1400)]
    assert image_lsn(seen(100, 101, 102), later, confirmed=800, flushed=1250) == 1250
    assert image_lsn(seen(100, 101, 102), later, confirmed=800, flushed=1350) == 1200


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_ids_wrap_around(epoch: int) -> None:
    wrap = epoch << 32
    snapshot = Seen(wrap + 5, wrap + 10, frozenset({wrap + 7}))
    assert snapshot.sees(4)
    assert snapshot.sees(9)
    assert not snapshot.sees(7)
    assert not snapshot.sees(10)
    if epoch:
        assert snapshot.sees((1 << 32) - 3), "of the epoch before"
    before = Seen(wrap + (1 << 32) - 5, wrap + (1 << 32) - 1, frozenset({wrap + (1 << 32) - 2}))
    assert before.sees((1 << 32) - 3)
    assert not before.sees((1 << 32) - 2)
    assert not before.sees(3), "of the epoch after"
