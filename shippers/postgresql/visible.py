"""Where in the log an exported snapshot lies: a pure decider.

A commit is first written to the log and only then shown to others, so commits may become visible in another order than
they have in the log. A snapshot has a place in the log only where what it sees is a prefix of it; where it is not, the
next snapshot a moment later will do.
"""

from collections.abc import Sequence
from typing import NamedTuple

_XIDS = 1 << 32


class Seen(NamedTuple):
    """A snapshot: transactions below ``xmin`` are seen, from ``xmax`` on they are not, ``running`` are not either.

    The ids are the 64-bit ones, which never wrap around
    (https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT-PARTS).
    """

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> "Seen":
        """From ``pg_current_snapshot()``'s text, ``xmin:xmax:xip,…``."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, filter(None, running.split(",")))))

    def sees(self, xid: int) -> bool:
        """Is a committed transaction visible? ``xid`` is its 32-bit id, taken for the nearest to the snapshot."""
        ahead = (xid - self.xmax + _XIDS // 2) % _XIDS - _XIDS // 2
        return ahead < 0 and self.xmax + ahead not in self.running


class Committed(NamedTuple):
    """A transaction as the log tells it: its 32-bit id, and where its commit ends."""

    xid: int
    end_lsn: int


def image_lsn(seen: Seen, log: Sequence[Committed], *, confirmed: int, flushed: int) -> int | None:
    """The LSN that parts what the snapshot sees from what it does not; None where nothing does.

    ``log`` is in commit order and holds every transaction beyond ``confirmed`` that the snapshot may see. ``flushed``,
    where the log ended before the snapshot was taken, is that LSN too where nothing hidden lies below it.
    """
    visible = [seen.sees(each.xid) for each in log]
    count = sum(visible)
    if not all(visible[:count]):
        return None
    last = log[count - 1].end_lsn if count else confirmed
    hidden = log[count].end_lsn if count < len(log) else None
    return flushed if flushed > last and (hidden is None or flushed < hidden) else last
