"""PostgreSQL's dates and times in ISO style, and the numbers and ISO 8601 texts that Debezium makes of them.

Days and microseconds count from 1970-01-01 UTC, in the proleptic Gregorian calendar; years before Christ are 0, -1 ….
https://www.postgresql.org/docs/current/datatype-datetime.html
"""

import re
from datetime import date
from functools import lru_cache
from typing import Final

DAY_US: Final = 86_400_000_000
_EPOCH: Final = date(1970, 1, 1).toordinal()
_CYCLE_YEARS: Final = 400
_CYCLE_DAYS: Final = 146_097  # the Gregorian calendar repeats every 400 years

_DATE: Final = re.compile(r"(\d{4,7})-(\d\d)-(\d\d)( BC)?")
_ISO_DATE: Final = re.compile(r"([+-]?\d{4,9})-(\d\d)-(\d\d)")
_CLOCK: Final = re.compile(r"(\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?")
_ZONE: Final = re.compile(r"([+-])(\d\d)(?::?(\d\d)(?::?(\d\d))?)?")

INFINITIES: Final = ("infinity", "-infinity")


def _ordinal(year: int, month: int, day: int) -> int:
    cycles, rest = divmod(year - 1, _CYCLE_YEARS)
    return date(rest + 1, month, day).toordinal() - _EPOCH + cycles * _CYCLE_DAYS


@lru_cache(4096)
def days(text: str) -> int:
    """Days of a date as PostgreSQL prints it.

    :raises ValueError: it is none, or infinite.
    """
    found = _DATE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no finite date")
    year = int(found[1])
    return _ordinal(1 - year if found[4] else year, int(found[2]), int(found[3]))


@lru_cache(4096)
def _calendar(days_: int) -> tuple[int, int, int]:
    cycles, rest = divmod(days_ + _EPOCH - 1, _CYCLE_DAYS)
    found = date.fromordinal(rest + 1)
    return found.year + _CYCLE_YEARS * cycles, found.month, found.day


def date_text(days_: int) -> str:
    """The inverse of :func:`days`."""
    year, month, day = _calendar(days_)
    return f"{year:04}-{month:02}-{day:02}" if year > 0 else f"{1 - year:04}-{month:02}-{day:02} BC"


def clock_us(text: str) -> int:
    """Microseconds since midnight of ``13:51:30.123456``; finer digits are cut off.

    :raises ValueError: it is no time of day.
    """
    found = _CLOCK.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no time of day")
    hour, minute, second, fraction = found.groups()
    seconds = (int(hour) * 60 + int(minute)) * 60 + int(second or 0)
    return seconds * 1_000_000 + int((fraction or "").ljust(6, "0")[:6])


def clock_text(us: int) -> str:
    """The inverse of :func:`clock_us`: ``13:51:30.123456`` with as many digits as it takes."""
    seconds, fraction = divmod(us, 1_000_000)
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    text = f"{hour:02}:{minute:02}:{second:02}"
    return f"{text}.{fraction:06}".rstrip("0") if fraction else text


def timestamp_us(text: str) -> int:
    """Microseconds of ``2020-01-01 13:51:30.123456``, with ``BC`` at the end where it is so.

    :raises ValueError: it is no finite timestamp.
    """
    day, _, clock = text.removesuffix(" BC").partition(" ")
    return days(day + " BC" if text.endswith(" BC") else day) * DAY_US + clock_us(clock)


def timestamp_text(us: int) -> str:
    """The inverse of :func:`timestamp_us`."""
    day, rest = divmod(us, DAY_US)
    shown = date_text(day)
    return f"{shown.removesuffix(' BC')} {clock_text(rest)}" + (" BC" if shown.endswith(" BC") else "")


# ISO 8601, as java.time prints and reads it ---------------------------------------------------------------------------


def iso_date(days_: int) -> str:
    """``2020-01-01``; years beyond four digits carry a sign."""
    year, month, day = _calendar(days_)
    shown = f"{year:04}" if 0 <= year <= 9999 else f"{year:+05}"
    return f"{shown}-{month:02}-{day:02}"


def iso_timestamp(us: int, digits: int | None = None) -> str:
    """``2020-01-01T13:51:30.123456Z``, with so many ``digits`` of a second, or with as many as it takes."""
    day, rest = divmod(us, DAY_US)
    clock = clock_text(rest)
    if digits:
        whole, _, fraction = clock.partition(".")
        clock = f"{whole}.{fraction.ljust(digits, '0')}"
    return f"{iso_date(day)}T{clock}Z"


def iso_time_utc(text: str) -> str:
    """A time with its zone, ``13:51:30+02``, in UTC: ``11:51:30Z``.

    :raises ValueError: it is none.
    """
    found = _ZONE.search(text)
    if found is None or found.end() != len(text):
        raise ValueError(f"{text!r} is no time with a zone")
    return clock_text((clock_us(text[: found.start()]) - _zone_us(found)) % DAY_US) + "Z"


def _zone_us(found: re.Match[str]) -> int:
    sign, hours, minutes, seconds = found.groups()
    offset = (int(hours) * 60 + int(minutes or 0)) * 60 + int(seconds or 0)
    return (-offset if sign == "-" else offset) * 1_000_000


def days_of_iso(text: str) -> int:
    """Days of ``2020-01-01`` or ``2020-01-01Z``.

    :raises ValueError: it is no such date.
    """
    found = _ISO_DATE.fullmatch(text.removesuffix("Z"))
    if found is None:
        raise ValueError(f"{text!r} is no ISO date")
    return _ordinal(int(found[1]), int(found[2]), int(found[3]))


def us_of_iso(text: str) -> int:
    """Microseconds of ``2020-01-01T13:51:30.5Z`` or with another offset.

    :raises ValueError: it is no such timestamp.
    """
    day, _, clock = text.partition("T")
    clock = clock.removesuffix("Z")
    found = _ZONE.search(clock)
    offset = _zone_us(found) if found is not None else 0
    return days_of_iso(day) * DAY_US + clock_us(clock[: found.start()] if found is not None else clock) - offset


# Intervals ------------------------------------------------------------------------------------------------------------

_UNIT: Final = re.compile(r"([+-]?\d+) (year|mon|day)s?(?: |$)")
_SPAN: Final = re.compile(r"([+-]?)(\d+):(\d\d):(\d\d)(?:\.(\d{1,6}))?")
_MONTHS_PER: Final = {"year": 12, "mon": 1}
_ISO_INTERVAL: Final = re.compile(
    r"P(?:(-?\d+)Y)?(?:(-?\d+)M)?(?:(-?\d+)D)?(?:T(?:(-?\d+)H)?(?:(-?\d+)M)?(?:(-?\d+(?:\.\d+)?)S)?)?"
)


def interval_parts(text: str) -> tuple[int, int, int]:
    """Months, days and microseconds of an interval in the ``postgres`` style: ``1 year 2 mons -3 days +04:05:06.7``.

    :raises ValueError: it is none, or infinite.
    """
    months = days_ = at = 0
    for found in _UNIT.finditer(text):
        if found.start() != at:
            break
        at = found.end()
        if found[2] == "day":
            days_ += int(found[1])
        else:
            months += int(found[1]) * _MONTHS_PER[found[2]]
    if at == len(text) and at:
        return months, days_, 0
    span = _SPAN.fullmatch(text, at)
    if span is None:
        raise ValueError(f"{text!r} is no finite interval")
    sign, hours, minutes, seconds, fraction = span.groups()
    us = ((int(hours) * 60 + int(minutes)) * 60 + int(seconds)) * 1_000_000 + int((fraction or "").ljust(6, "0"))
    return months, days_, -us if sign == "-" else us


def interval_us(text: str) -> int:
    """Its microseconds, with a month of 365.25 / 12 days."""
    months, days_, us = interval_parts(text)
    return months * (DAY_US * 1461 // 48) + days_ * DAY_US + us


def iso_interval(text: str) -> str:
    """``P1Y2M3DT4H5M6.78S``: all six parts, each with its sign."""
    months, days_, us = interval_parts(text)
    years, months = _divided(months, 12)
    seconds, fraction = _divided(us, 1_000_000)
    minutes, second = _divided(seconds, 60)
    hours, minute = _divided(minutes, 60)
    shown = f"{'-' if us < 0 else ''}{abs(second)}.{abs(fraction):06}".rstrip("0").rstrip(".")
    return f"P{years}Y{months}M{days_}DT{hours}H{minute}M{'0' if shown == '-0' else shown}S"


def _divided(value: int, by: int) -> tuple[int, int]:
    """Quotient towards zero, and the rest of the same sign."""
    quotient, rest = divmod(abs(value), by)
    return (-quotient, -rest) if value < 0 else (quotient, rest)


def interval_of_iso(text: str) -> str:
    """Check an ISO interval, which PostgreSQL reads as it is.

    :raises ValueError: it is none.
    """
    if _ISO_INTERVAL.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no ISO interval")
    return text
