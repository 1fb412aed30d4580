"""Are two stores equal, table by table? Pure: rows come in as (key, line), as :meth:`cdc.ports.Store.lines` has them.

A table's digest does not depend on the order of its rows: the sum, modulo 2**128, of a 128-bit hash of each row's
line. It is kept per bucket of keys, so that a second look at a table that differs needs the rows of a few buckets only.
"""

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from hashlib import blake2b
from typing import Final, NamedTuple

BUCKETS: Final = 4096
EXAMINED_BUCKETS_MAX: Final = 64
_MODULUS: Final = 1 << 128


class Verdict(StrEnum):
    """What is known of one table. ``behind``: it differs, but the follower has not applied all that was compared."""

    EQUAL = "equal"
    DIFFERS = "differs"
    BEHIND = "behind"


class Digest(NamedTuple):
    """``sums`` are by bucket: of the 128-bit hashes of the rows whose keys fall into it, modulo 2**128."""

    rows: int
    sums: tuple[int, ...]

    @property
    def hex(self) -> str:
        """The whole table's digest: 32 hexadecimal digits."""
        return f"{sum(self.sums) % _MODULUS:032x}"


class Differences(NamedTuple):
    """Keys as COPY text. ``complete``: these are all there are."""

    missing: tuple[bytes, ...]
    extra: tuple[bytes, ...]
    different: tuple[bytes, ...]
    complete: bool


def digest(lines: Iterable[tuple[bytes, bytes]]) -> Digest:
    """One pass over a table."""
    # The hot loop of `cdc verify`: about a million rows a second.
    sums = [0] * BUCKETS
    crc, number, mask, rows = zlib.crc32, int.from_bytes, BUCKETS - 1, 0
    for key, line in lines:
        sums[crc(key) & mask] += number(blake2b(line, digest_size=16).digest())
        rows += 1
    return Digest(rows, tuple(total % _MODULUS for total in sums))


def judge(leader: Digest, follower: Digest, *, settled: bool, earlier: Digest | None = None) -> Verdict:
    """Compare a leader's table with a follower's.

    ``settled``: the follower has applied everything that ``leader`` saw, and nothing beyond it. Where it cannot be
    told for a leader that goes on writing, ``earlier`` is the leader's digest at a position that the follower has
    passed: a bucket that has not changed on the leader since must be the same on the follower.
    """
    if leader == follower:
        return Verdict.EQUAL
    if settled:
        return Verdict.DIFFERS
    if earlier is not None and any(
        then == now != there for then, now, there in zip(earlier.sums, leader.sums, follower.sums, strict=True)
    ):
        return Verdict.DIFFERS
    return Verdict.BEHIND


def differing_buckets(leader: Digest, follower: Digest) -> list[int]:
    """Which buckets of keys hold a difference."""
    pairs = zip(leader.sums, follower.sums, strict=True)
    return [bucket for bucket, (ours, theirs) in enumerate(pairs) if ours != theirs]


def rows_in(lines: Iterable[tuple[bytes, bytes]], buckets: Collection[int]) -> dict[bytes, tuple[int, int]]:
    """The rows of some buckets, by key: how many have it, and the sum of their hashes."""
    wanted = frozenset(buckets)
    found: dict[bytes, tuple[int, int]] = {}
    for key, line in lines:
        if zlib.crc32(key) & (BUCKETS - 1) in wanted:
            count, total = found.get(key, (0, 0))
            found[key] = (count + 1, total + int.from_bytes(blake2b(line, digest_size=16).digest()))
    return found


def differences(
    leader: Mapping[bytes, tuple[int, int]], follower: Mapping[bytes, tuple[int, int]], *, limit: int, complete: bool
) -> Differences:
    """The differing keys, at most ``limit`` of each kind, in order of the keys' text."""
    missing = [key for key in leader if key not in follower]
    extra = [key for key in follower if key not in leader]
    different = [key for key, row in leader.items() if key in follower and follower[key] != row]
    kinds = (missing, extra, different)
    first, second, third = (tuple(sorted(keys)[:limit]) for keys in kinds)
    return Differences(first, second, third, complete and all(len(keys) <= limit for keys in kinds))


def key_text(key: bytes, columns: Sequence[str]) -> str:
    """A key for people: ``id=7, place=Ulm``. ``key`` is COPY text of these columns, or of a whole row."""
    values = key.decode("utf-8", "replace").split("\t")
    if len(values) != len(columns):
        return ", ".join(values)
    return ", ".join(f"{name}={value}" for name, value in zip(columns, values, strict=True))


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Of several tables: one that differs outweighs one that is behind."""
    found = set(verdicts)
    return next((verdict for verdict in _worst_first() if verdict in found), Verdict.EQUAL)


def _worst_first() -> Iterator[Verdict]:
    return iter((Verdict.DIFFERS, Verdict.BEHIND))
