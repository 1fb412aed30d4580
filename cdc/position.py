"""Where in one leader's history we are.

A position is the end of one committed leader transaction: never a place inside one. Positions are ordered only
within one source; comparing positions of two sources is an error, because such an order would mean nothing.
"""

import re
from dataclasses import dataclass

from cdc.errors import UsageError

_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})\Z")


def parse_lsn(text: str) -> int:
    """Read PostgreSQL's ``pg_lsn`` text, two hexadecimal halves around a slash.

    https://www.postgresql.org/docs/current/datatype-pg-lsn.html

    :raises UsageError: the text is not of that form.
    """
    match = _LSN.match(text)
    if match is None:
        raise UsageError(f"not an LSN: {text!r}", remedy="write it as PostgreSQL does, for example 0/16B3748")
    return int(match[1], 16) << 32 | int(match[2], 16)


def format_lsn(lsn: int) -> str:
    """Write a 64-bit LSN as PostgreSQL does: ``format_lsn(0x16B3748) == "0/16B3748"``."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


@dataclass(frozen=True, slots=True)
class Position:
    """The end of one committed transaction of one leader.

    ``source`` names the history (for PostgreSQL ``system_identifier/database``), ``epoch`` its branch (the timeline),
    ``lsn`` the byte after the commit record.
    """

    source: str
    epoch: int
    lsn: int

    # Order goes by LSN alone: where one epoch branched off another, one place has two names.

    def __lt__(self, other: "Position") -> bool:
        return self.lsn < self._comparable(other).lsn

    def __le__(self, other: "Position") -> bool:
        return self.lsn <= self._comparable(other).lsn

    def __gt__(self, other: "Position") -> bool:
        return self.lsn > self._comparable(other).lsn

    def __ge__(self, other: "Position") -> bool:
        return self.lsn >= self._comparable(other).lsn

    def _comparable(self, other: "Position") -> "Position":
        if self.source != other.source:
            raise ValueError(f"positions of two sources have no order: {self} and {other}")
        return other

    def __str__(self) -> str:
        return format_lsn(self.lsn)

    def at(self, lsn: int) -> "Position":
        """The same history at another LSN."""
        return Position(self.source, self.epoch, lsn)
