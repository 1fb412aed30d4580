"""Dates, times and intervals: binary send format to text in ISO style, time zone UTC.

Microseconds or days since 2000-01-01, with integer datetimes (the only kind since PostgreSQL 10).
https://www.postgresql.org/docs/current/datatype-datetime.html#DATATYPE-DATETIME-OUTPUT
"""

import struct
from datetime import date as calendar_date
from functools import lru_cache
from typing import Final

from cdc.wire.values.numbers import INT4, INT8

_DAY_US: Final = 86_400_000_000
_EPOCH: Final = calendar_date(2000, 1, 1).toordinal()
_CYCLE_DAYS: Final = 146_097  # the Gregorian calendar repeats every 400 years

_INT4_MIN, _INT4_MAX = -(2**31), 2**31 - 1
_INT8_MIN, _INT8_MAX = -(2**63), 2**63 - 1
_DATE_MIN, _DATE_END = -2_451_545, 2_145_031_949  # 4714-11-24 BC, 5874898-01-01
_TIMESTAMP_MIN, _TIMESTAMP_END = -211_813_488_000_000_000, 9_223_371_331_200_000_000
_ZONE_LIMIT_S: Final = 16 * 3600

_TIMETZ: Final = struct.Struct(">qi")
_INTERVAL: Final = struct.Struct(">qii")


@lru_cache(4096)
def _day(days: int) -> tuple[str, str]:
    """The date that many days from 2000-01-01, and its era: "" or " BC"."""
    cycles, rest = divmod(days, _CYCLE_DAYS)
    day = calendar_date.fromordinal(_EPOCH + rest)
    year = day.year + 400 * cycles
    shown, era = (year, "") if year > 0 else (1 - year, " BC")
    return f"{shown:04}-{day.month:02}-{day.day:02}", era


def _clock(us: int) -> str:
    """``us`` since midnight, not negative."""
    seconds, fraction = divmod(us, 1_000_000)
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    text = f"{hour:02}:{minute:02}:{second:02}"
    return f"{text}.{fraction:06}".rstrip("0") if fraction else text


def date(data: bytes) -> str:
    days: int = INT4.unpack(data)[0]
    if _DATE_MIN <= days < _DATE_END:
        day, era = _day(days)
        return day + era
    return _infinity(days, _INT4_MIN, _INT4_MAX)


def timestamp(data: bytes) -> str:
    return _timestamp(data, "")


def timestamptz(data: bytes) -> str:
    return _timestamp(data, "+00")


def _timestamp(data: bytes, zone: str) -> str:
    us: int = INT8.unpack(data)[0]
    if _TIMESTAMP_MIN <= us < _TIMESTAMP_END:
        days, rest = divmod(us, _DAY_US)
        day, era = _day(days)
        return f"{day} {_clock(rest)}{zone}{era}"
    return _infinity(us, _INT8_MIN, _INT8_MAX)


def _infinity(value: int, lowest: int, highest: int) -> str:
    if value == highest:
        return "infinity"
    if value == lowest:
        return "-infinity"
    raise ValueError(f"{value} is outside the calendar")


def time(data: bytes) -> str:
    us: int = INT8.unpack(data)[0]
    return _time(us)


def timetz(data: bytes) -> str:
    """The zone is stored in seconds west of Greenwich, and shown east."""
    us, west = _TIMETZ.unpack(data)
    if abs(west) >= _ZONE_LIMIT_S:
        raise ValueError("time zone beyond 16 hours")
    minutes, second = divmod(abs(west), 60)
    hour, minute = divmod(minutes, 60)
    zone = f"{'-' if west > 0 else '+'}{hour:02}"
    if minute or second:
        zone += f":{minute:02}"
    if second:
        zone += f":{second:02}"
    return _time(us) + zone


def _time(us: int) -> str:
    if not 0 <= us <= _DAY_US:
        raise ValueError("time of day outside 24 hours")
    return _clock(us)


def interval(data: bytes) -> str:
    """Microseconds, days and months in the ``postgres`` style; all three at an extreme mean infinity (17 and later)."""
    us, days, months = _INTERVAL.unpack(data)
    if (us, days, months) == (_INT8_MAX, _INT4_MAX, _INT4_MAX):
        return "infinity"
    if (us, days, months) == (_INT8_MIN, _INT4_MIN, _INT4_MIN):
        return "-infinity"
    sign = -1 if months < 0 else 1
    years, rest = divmod(abs(months), 12)
    parts: list[str] = []
    negative = False  # was the part before negative? then a positive one says so
    for value, unit in ((sign * years, "year"), (sign * rest, "mon"), (days, "day")):
        if value:
            parts.append(f"{'+' if negative and value > 0 else ''}{value} {unit}{'' if value == 1 else 's'}")
            negative = value < 0
    if us or not parts:
        parts.append(("-" if us < 0 else "+" if negative else "") + _clock(abs(us)))
    return " ".join(parts)
