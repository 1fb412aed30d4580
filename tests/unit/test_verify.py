"""Digests, verdicts and differing keys."""

import random
from collections import Counter
from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from cdc.verify import Digest, Verdict, differences, differing_buckets, digest, judge, key_text, overall, rows_in

Lines = list[tuple[bytes, bytes]]

rows = st.lists(st.tuples(st.integers(0, 30), st.binary(max_size=3)), max_size=40)


def _lines(pairs: list[tuple[int, bytes]]) -> Lines:
    return [(b"%d" % key, b"%d\t%s" % (key, value)) for key, value in pairs]


@given(rows, st.randoms(use_true_random=False))
def test_order_does_not_matter(pairs: list[tuple[int, bytes]], chance: random.Random) -> None:
    shuffled = pairs.copy()
    chance.shuffle(shuffled)
    assert digest(_lines(pairs)) == digest(_lines(shuffled))


@given(rows, rows)
def test_equal_exactly_where_the_rows_are(ours: list[tuple[int, bytes]], theirs: list[tuple[int, bytes]]) -> None:
    same = Counter(_lines(ours)) == Counter(_lines(theirs))
    assert (digest(_lines(ours)) == digest(_lines(theirs))) is same


@given(rows, rows)
def test_differing_keys_are_found(ours: list[tuple[int, bytes]], theirs: list[tuple[int, bytes]]) -> None:
    left, right = _lines(list(dict(ours).items())), _lines(list(dict(theirs).items()))
    buckets = differing_buckets(digest(left), digest(right))
    found = differences(rows_in(left, buckets), rows_in(right, buckets), limit=100, complete=True)
    mine, other = dict(left), dict(right)
    assert set(found.missing) == mine.keys() - other.keys()
    assert set(found.extra) == other.keys() - mine.keys()
    assert set(found.different) == {key for key in mine.keys() & other.keys() if mine[key] != other[key]}
    assert found.complete


def test_duplicates_count() -> None:
    once, twice = _lines([(1, b"a")]), _lines([(1, b"a"), (1, b"a")])
    assert digest(once) != digest(twice)
    buckets = differing_buckets(digest(once), digest(twice))
    assert differences(rows_in(once, buckets), rows_in(twice, buckets), limit=1, complete=True).different == (b"1",)


def test_limit_is_per_kind_and_told() -> None:
    left = _lines([(n, b"") for n in range(5)])
    found = differences(rows_in(left, range(4096)), {}, limit=2, complete=True)
    assert found.missing == (b"0", b"1")
    assert not found.complete


def test_digest_is_a_sum_of_hashes() -> None:
    """The documented definition: another program can compute it."""
    lines = _lines([(7, b"x"), (8, b"y")])
    total = sum(int.from_bytes(blake2b(line, digest_size=16).digest()) for _, line in lines) % (1 << 128)
    assert digest(lines).hex == f"{total:032x}"


def _sums(**buckets: int) -> Digest:
    return Digest(1, tuple(buckets.get(name, 0) for name in ("a", "b")))


def test_verdicts() -> None:
    ours, theirs = _sums(a=1), _sums(a=2)
    assert judge(ours, ours, settled=False) is Verdict.EQUAL
    assert judge(ours, theirs, settled=True) is Verdict.DIFFERS
    assert judge(ours, theirs, settled=False) is Verdict.BEHIND


def test_a_bucket_that_stood_still_convicts() -> None:
    follower = _sums(a=2, b=5)
    unchanged, changed = _sums(a=1, b=5), _sums(a=9, b=5)
    assert judge(unchanged, follower, settled=False, earlier=unchanged) is Verdict.DIFFERS
    assert judge(unchanged, follower, settled=False, earlier=changed) is Verdict.BEHIND


def test_the_worst_table_decides() -> None:
    assert overall([]) is Verdict.EQUAL
    assert overall([Verdict.EQUAL, Verdict.BEHIND]) is Verdict.BEHIND
    assert overall([Verdict.BEHIND, Verdict.DIFFERS, Verdict.EQUAL]) is Verdict.DIFFERS


def test_keys_for_people() -> None:
    assert key_text(b"7\tUlm", ["id", "place"]) == "id=7, place=Ulm"
    assert key_text(b"7\tUlm\t\\N", ["id"]) == "7, Ulm, \\N"
