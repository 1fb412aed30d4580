"""Network addresses, geometric shapes, text search and a few internal types: binary send format to text.

https://www.postgresql.org/docs/current/datatype.html; the layouts are those of the types' send functions.
"""

import struct
from collections.abc import Iterator
from itertools import groupby
from typing import Final

from cdc.wire.values.numbers import INT4, UINT8, float8

_TID: Final = struct.Struct(">IH")
_SNAPSHOT: Final = struct.Struct(">iQQ")
_INET_FAMILIES: Final = {2: 4, 3: 16}  # address bytes


def text(data: bytes) -> str:
    return data.decode()


def char(data: bytes) -> str:
    """One byte; none where it is zero, an octal escape beyond ASCII (as from 16 on)."""
    if len(data) != 1:
        raise ValueError('a "char" is one byte')
    return f"\\{data[0]:03o}" if data[0] > 127 else data.decode().rstrip("\0")


def versioned(data: bytes) -> str:
    """A version byte, 1, then text: jsonb and jsonpath."""
    if data[0] != 1:
        raise ValueError(f"version {data[0]} where 1 is known")
    return data[1:].decode()


def bytea(data: bytes) -> str:
    return "\\x" + data.hex()


def uuid(data: bytes) -> str:
    if len(data) != 16:
        raise ValueError("a uuid has 16 bytes")
    digits = data.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def pg_lsn(data: bytes) -> str:
    lsn: int = UINT8.unpack(data)[0]
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def tid(data: bytes) -> str:
    block, offset = _TID.unpack(data)
    return f"({block},{offset})"


def snapshot(data: bytes) -> str:
    """Count, xmin, xmax, then the transactions in progress."""
    count, low, high = _SNAPSHOT.unpack_from(data)
    if count < 0 or len(data) != _SNAPSHOT.size + 8 * count:
        raise ValueError("snapshot count and bytes disagree")
    running = struct.unpack_from(f">{count}Q", data, _SNAPSHOT.size)
    return f"{low}:{high}:{','.join(map(str, running))}"


# Network addresses


def macaddr(data: bytes) -> str:
    if len(data) != 6:
        raise ValueError("a macaddr has 6 bytes")
    return data.hex(":")


def macaddr8(data: bytes) -> str:
    if len(data) != 8:
        raise ValueError("a macaddr8 has 8 bytes")
    return data.hex(":")


def inet(data: bytes) -> str:
    address, prefix, prefix_max = _address(data)
    return address if prefix == prefix_max else f"{address}/{prefix}"


def cidr(data: bytes) -> str:
    address, prefix, _ = _address(data)
    return f"{address}/{prefix}"


def _address(data: bytes) -> tuple[str, int, int]:
    """Family, prefix length, is it cidr, byte count, address."""
    family, prefix, _, size = data[:4]
    if _INET_FAMILIES.get(family) != size or len(data) != 4 + size or prefix > 8 * size:
        raise ValueError("bad network address")
    address = ".".join(map(str, data[4:])) if size == 4 else _ipv6(data[4:])
    return address, prefix, 8 * size


def _ipv6(address: bytes) -> str:
    """The first of the longest runs of two or more zero words becomes ``::``; embedded IPv4 keeps its dots."""
    words = struct.unpack(">8H", address)
    start, length = _longest_zeros(words)
    if length < 2:
        return ":".join(f"{word:x}" for word in words)
    is_ipv4 = start == 0 and (length == 6 or (length == 5 and words[5] == 0xFFFF))
    head = ":".join(f"{word:x}" for word in words[:start])
    if is_ipv4:
        return f"::{'ffff:' if length == 5 else ''}{'.'.join(map(str, address[12:]))}"
    return f"{head}::{':'.join(f'{word:x}' for word in words[start + length :])}"


def _longest_zeros(words: tuple[int, ...]) -> tuple[int, int]:
    best, at = (0, 0), 0
    for is_zero, run in groupby(words, key=lambda word: word == 0):
        length = len(list(run))
        if is_zero and length > best[1]:
            best = at, length
        at += length
    return best


# Shapes


def _floats(data: bytes) -> list[str]:
    if len(data) % 8:
        raise ValueError("not a sequence of floats")
    return [float8(data[at : at + 8]) for at in range(0, len(data), 8)]


def _points(data: bytes) -> list[str]:
    numbers = iter(_floats(data))
    return [f"({x},{y})" for x, y in zip(numbers, numbers, strict=True)]


def point(data: bytes) -> str:
    x, y = _floats(data)
    return f"({x},{y})"


def line(data: bytes) -> str:
    a, b, c = _floats(data)
    return f"{{{a},{b},{c}}}"


def lseg(data: bytes) -> str:
    start, end = _points(data)
    return f"[{start},{end}]"


def box(data: bytes) -> str:
    high, low = _points(data)
    return f"{high},{low}"


def circle(data: bytes) -> str:
    x, y, radius = _floats(data)
    return f"<({x},{y}),{radius}>"


def path(data: bytes) -> str:
    if data[0] > 1:
        raise ValueError("a path is open (0) or closed (1)")
    points = _counted_points(data[1:])
    return f"({points})" if data[0] else f"[{points}]"


def polygon(data: bytes) -> str:
    return f"({_counted_points(data)})"


def _counted_points(data: bytes) -> str:
    if len(data) != 4 + 16 * INT4.unpack_from(data)[0]:
        raise ValueError("point count and bytes disagree")
    return ",".join(_points(data[4:]))


# Text search: https://www.postgresql.org/docs/current/datatype-textsearch.html


def _lexeme(data: bytes, at: int) -> tuple[str, int]:
    """A zero-terminated lexeme, quoted, and where the next thing starts."""
    end = data.index(b"\0", at)
    lexeme = data[at:end].decode().replace("\\", "\\\\").replace("'", "''")
    return f"'{lexeme}'", end + 1


def tsvector(data: bytes) -> str:
    """A count, then lexemes with their positions; a position carries its weight in the top two bits."""
    count: int = INT4.unpack_from(data)[0]
    if not 0 <= count <= len(data) // 3:
        raise ValueError("more lexemes than bytes")
    at = 4
    words = []
    for _ in range(count):
        word, at = _lexeme(data, at)
        places: int = int.from_bytes(data[at : at + 2], "big")
        positions = struct.unpack_from(f">{places}H", data, at + 2)
        at += 2 + 2 * places
        shown = ",".join(f"{position & 0x3FFF}{('', 'C', 'B', 'A')[position >> 14]}" for position in positions)
        words.append(f"{word}:{shown}" if places else word)
    if at != len(data):
        raise ValueError("bytes after the last lexeme")
    return " ".join(words)


_VALUE, _OPERATOR = 1, 2
_NOT, _AND, _OR, _PHRASE = 1, 2, 3, 4
_BINDING: Final = {_NOT: 4, _PHRASE: 3, _AND: 2, _OR: 1}
_SIGNS: Final = {_AND: " & ", _OR: " | "}
_WEIGHTS: Final = ((8, "A"), (4, "B"), (2, "C"), (1, "D"))

# A query in the making: how tight it binds (5 for a lexeme), whether it is a phrase, and its pieces. The pieces nest,
# because joining texts at every level would take quadratic time, and are joined once without recursion.
_Piece = str | tuple["_Piece", ...]
_Node = tuple[int, bool, _Piece]


def tsquery(data: bytes) -> str:
    """Items in Polish order, the right operand before the left."""
    nodes: list[_Node] = []
    for kind, code, label in reversed(list(_query_items(data))):
        if kind == _VALUE:
            nodes.append((5, False, label))
        elif code == _NOT:
            nodes.append((_BINDING[_NOT], False, ("!", _operand(nodes.pop(), _BINDING[_NOT]))))
        else:
            binding = _BINDING[code]
            right = _operand(nodes.pop(), binding, after_phrase=code == _PHRASE)
            left = _operand(nodes.pop(), binding)
            nodes.append((binding, code == _PHRASE, (left, label, right)))
    if len(nodes) > 1:
        raise ValueError("operands without an operator")
    return "".join(_flat(nodes[0][2])) if nodes else ""


def _operand(node: _Node, parent: int, *, after_phrase: bool = False) -> _Piece:
    binding, is_phrase, piece = node
    return ("( ", piece, " )") if binding < parent or (is_phrase and after_phrase) else piece


def _query_items(data: bytes) -> Iterator[tuple[int, int, str]]:
    """(kind, operator, text) of each item."""
    count: int = INT4.unpack_from(data)[0]
    at = 4
    if not 0 <= count <= len(data) // 2:
        raise ValueError("more query items than bytes")
    for _ in range(count):
        kind, code = data[at], data[at + 1]
        at += 2
        if kind == _VALUE:
            prefix = data[at]
            word, at = _lexeme(data, at + 1)
            flags = ("*" if prefix else "") + "".join(name for bit, name in _WEIGHTS if code & bit)
            yield kind, 0, f"{word}:{flags}" if flags else word
        elif kind == _OPERATOR and code == _PHRASE:
            distance = int.from_bytes(data[at : at + 2], "big")
            at += 2
            yield kind, code, " <-> " if distance == 1 else f" <{distance}> "
        elif kind == _OPERATOR and code in _BINDING:
            yield kind, code, _SIGNS.get(code, "")
        else:
            raise ValueError("unknown query item")
    if at != len(data):
        raise ValueError("bytes after the last query item")


def _flat(piece: _Piece) -> Iterator[str]:
    todo = [piece]
    while todo:
        part = todo.pop()
        if isinstance(part, str):
            yield part
        else:
            todo.extend(reversed(part))
