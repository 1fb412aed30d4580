"""Numbers and bit strings: binary send format to text.

https://www.postgresql.org/docs/current/datatype-numeric.html; the layouts are those of the types' send functions.
"""

import struct
from fractions import Fraction
from math import inf, isfinite, nextafter
from typing import Final

from cdc.errors import DecodeError

INT2: Final = struct.Struct(">h")
INT4: Final = struct.Struct(">i")
INT8: Final = struct.Struct(">q")
UINT4: Final = struct.Struct(">I")
UINT8: Final = struct.Struct(">Q")
FLOAT4: Final = struct.Struct(">f")
FLOAT8: Final = struct.Struct(">d")
_NUMERIC_HEAD: Final = struct.Struct(">HhHH")

_NUMERIC_SPECIAL: Final = {0xC000: "NaN", 0xD000: "Infinity", 0xF000: "-Infinity"}
_NUMERIC_NEGATIVE: Final = 0x4000
_SCALE_MAX: Final = 0x3FFF
_WHOLE_MIN: Final = 2.0**53  # from here on every double is a whole number


def boolean(data: bytes) -> bool:
    if data == b"\x01":
        return True
    if data == b"\x00":
        return False
    raise ValueError("a boolean is one byte, 0 or 1")


def boolean_text(data: bytes) -> str:
    return "t" if boolean(data) else "f"


def money_of_text(data: bytes) -> str:
    """The same number, from the text that a server prints under ``lc_monetary = 'C'``: ``-$1,234.50``."""
    return data.decode("ascii").replace("$", "").replace(",", "")


def money(data: bytes) -> str:
    """As a number with two digits, which money's input takes; its own output depends on the server's lc_monetary."""
    cents: int = INT8.unpack(data)[0]
    units, rest = divmod(abs(cents), 100)
    return f"{'-' if cents < 0 else ''}{units}.{rest:02}"


def numeric(data: bytes) -> str:
    """Base-10000 digits, of which the first stands for ``10000 ** weight``; ``scale`` decimal digits are shown."""
    count, weight, sign, scale = _NUMERIC_HEAD.unpack_from(data)
    if sign in _NUMERIC_SPECIAL and len(data) == 8 and not count:
        return _NUMERIC_SPECIAL[sign]
    digits = struct.unpack_from(f">{count}H", data, 8)
    if len(data) != 8 + 2 * count or sign not in (0, _NUMERIC_NEGATIVE) or scale > _SCALE_MAX:
        raise ValueError("bad numeric header")
    if count and max(digits) > 9999:
        raise ValueError("numeric digit above 9999")
    text = "%04d" * count % digits
    point = 4 * (weight + 1)
    whole = text[:point].ljust(point, "0").lstrip("0") if point > 0 else ""
    if scale:
        part = text[point:] if point >= 0 else "0" * -point + text
        whole = f"{whole or '0'}.{part[:scale].ljust(scale, '0')}"
    return ("-" if sign else "") + (whole or "0")


def bits(data: bytes) -> str:
    """Bit count, then the bits, the last byte padded on the right."""
    count: int = INT4.unpack_from(data)[0]
    if count < 0 or len(data) != 4 + (count + 7) // 8:
        raise ValueError("bit count and bytes disagree")
    return f"{int.from_bytes(data[4:], 'big'):0{8 * (len(data) - 4)}b}"[:count] if count else ""


def float8(data: bytes) -> str:
    """The shortest decimal that lies strictly between the midpoints to the neighbouring doubles."""
    number: float = FLOAT8.unpack(data)[0]
    if not isfinite(number):
        return _special(number)
    text = repr(number).removesuffix(".0")
    size = abs(number)
    if size < 1e15 or size >= 1e40:
        return text
    # From here on Python and PostgreSQL differ: Python prints exponents from 1e16 on, and it takes a decimal that is
    # exactly a midpoint (1e23) where the mantissa is even. Only whole numbers up to 1e40 can be such midpoints.
    digits, exponent = _digits(text.removeprefix("-"))
    if size >= _WHOLE_MIN:
        near = 2 * int(digits) * 10**exponent - int(size)
        if near in (int(nextafter(size, 0)), int(nextafter(size, inf))):
            digits, exponent = _shortest(size, _midpoint(size, 0), _midpoint(size, inf))
    return ("-" if number < 0 else "") + _layout(digits, exponent, 15)


def _midpoint(number: float, towards: float) -> Fraction:
    return (Fraction(number) + Fraction(nextafter(number, towards))) / 2


def _digits(text: str) -> tuple[str, int]:
    """A decimal without sign as its digits and the power of ten they count."""
    mantissa, _, exponent = text.partition("e")
    whole, _, part = mantissa.partition(".")
    return whole + part, int(exponent or 0) - len(part)


def float4(data: bytes) -> str:
    """As :func:`float8`, between single-precision neighbours."""
    number: float = FLOAT4.unpack(data)[0]
    if not isfinite(number):
        return _special(number)
    if not number:
        return "-0" if data[0] else "0"
    size = abs(number)
    pattern: int = UINT4.unpack(data)[0] & 0x7FFFFFFF
    below: float = FLOAT4.unpack(UINT4.pack(pattern - 1))[0]
    above: float = FLOAT4.unpack(UINT4.pack(pattern + 1))[0] if pattern < 0x7F7FFFFF else size + (size - below)
    low, high = (below + size) / 2, (size + above) / 2  # exact: a double has the room
    return ("-" if number < 0 else "") + _layout(*_shortest_single(size, low, high), 6)


def _special(number: float) -> str:
    return "NaN" if number != number else "Infinity" if number > 0 else "-Infinity"  # noqa: PLR0124


def _shortest_single(size: float, low: float, high: float) -> tuple[str, int]:
    # Below 1.2e-38 fewer than 6 digits may do, and at a power of 2 the nearest decimal need not be the one inside.
    if size >= 1.2e-38 and size - low == high - size:
        for precision in range(5, 9):
            text = f"{size:.{precision}e}"
            value = float(text)
            if low < value < high:
                return _digits(text)
            if value in (low, high):  # perhaps only so by rounding
                break
    return _shortest(size, Fraction(low), Fraction(high))


def _shortest(size: float, low: Fraction, high: Fraction) -> tuple[str, int]:
    """The fewest digits with ``low < digits * 10 ** exponent < high``, of several the nearest to ``size``. Exact."""
    exact = Fraction(size)
    top = int(f"{size:.16e}".split("e")[1])
    for exponent in range(top, top - 18, -1):
        unit = Fraction(10) ** exponent
        floor = exact // unit
        inside = [n for n in (floor, floor + 1) if n and low < n * unit < high]
        if inside:
            return str(min(inside, key=lambda n: abs(n * unit - exact))), exponent
    raise DecodeError(f"no decimal found for float {size!r}")


def _layout(digits: str, exponent: int, fixed_max: int) -> str:
    """``digits * 10 ** exponent`` as C's %g lays it out: exponents below 1e-4 and from ``10 ** fixed_max`` on."""
    kept = digits.rstrip("0")
    point = len(digits) + exponent  # digits before the decimal point
    if not -4 < point <= fixed_max:
        mantissa = kept[0] + ("." + kept[1:] if len(kept) > 1 else "")
        return f"{mantissa}e{point - 1:+03}"
    if point <= 0:
        return "0." + "0" * -point + kept
    return kept.ljust(point, "0") if len(kept) <= point else f"{kept[:point]}.{kept[point:]}"
