"""Positions: text form, order, and what has no order."""

from operator import ge, gt, le, lt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import UsageError
from cdc.position import Position, format_lsn, parse_lsn

_LSNS = st.integers(0, 2**64 - 1)


@given(_LSNS)
def test_text_and_back(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn
    assert parse_lsn(format_lsn(lsn).lower()) == lsn
    assert str(Position("leader", 1, lsn)) == format_lsn(lsn)


@pytest.mark.parametrize(
    ("text", "lsn"), [("0/0", 0), ("0/16B3748", 0x16B3748), ("1/0", 1 << 32), ("FFFFFFFF/FFFFFFFF", 2**64 - 1)]
)
def test_text_is_postgresqls(text: str, lsn: int) -> None:
    assert parse_lsn(text) == lsn
    assert format_lsn(lsn) == text


@pytest.mark.parametrize("text", ["", "0", "/", "0/", "/0", "0/G", "0/0\n", " 0/0", "-1/0", "100000000/0", "0/0/0"])
def test_other_text_is_refused_with_the_text_in_the_message(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_lsn(text)
    assert repr(text) in str(caught.value)


@given(_LSNS, _LSNS)
def test_order_is_that_of_the_log(a: int, b: int) -> None:
    here, there = Position("leader", 1, a), Position("leader", 1, b)
    for compare in (lt, le, gt, ge):
        assert compare(here, there) == compare(a, b)
    assert (here == there) == (a == b)


@pytest.mark.parametrize("compare", [lt, le, gt, ge])
def test_two_sources_have_no_order(compare: object) -> None:
    assert callable(compare)
    with pytest.raises(ValueError, match="no order"):
        compare(Position("one", 1, 5), Position("other", 1, 5))


def test_at_keeps_the_history() -> None:
    assert Position("leader", 3, 7).at(9) == Position("leader", 3, 9)
