"""What people see: results on stdout, everything else on stderr, nothing twice."""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from cdc.cli.options import Settings

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class Console:
    """``note`` is silenced by ``--quiet``; ``out`` never is."""

    def __init__(self, settings: Settings) -> None:
        self.json: bool = settings.json
        self.quiet: bool = settings.quiet

    @property
    def live(self) -> bool:
        """Is somebody watching stderr?"""
        return not self.quiet and sys.stderr.isatty()

    def out(self, text: str) -> None:
        print(printable(text), flush=True)  # noqa: T201

    def out_json(self, value: Any) -> None:
        """One JSON value, on one line."""
        print(json.dumps(value, ensure_ascii=False), flush=True)  # noqa: T201

    def note(self, text: str) -> None:
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)  # noqa: T201

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
        """Rows under a header; the columns ``right`` hold numbers. Drawn by rich on a terminal."""
        cells = [[printable(cell) for cell in row] for row in rows]
        if sys.stdout.isatty():
            _draw(header, cells, right)
        else:
            for line in plain_table(header, cells, right):
                print(line, flush=True)  # noqa: T201


def _draw(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    RichConsole().print(table)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """The same without any drawing, for pipes and files."""
    lines = [header, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(header))]
    return ["  ".join(_padded(line, widths, right)).rstrip() for line in lines]


def _padded(line: Sequence[str], widths: Sequence[int], right: Sequence[int]) -> list[str]:
    return [
        cell.rjust(width) if index in right else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def printable(text: str) -> str:
    """Without what would move the cursor or change colours: names and keys come from databases."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def size_text(size_bytes: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in _UNITS:
        if abs(size_bytes) < 1024 or unit == _UNITS[-1]:
            break
        size_bytes /= 1024
    return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def time_text(time_us: int) -> str:
    """Microseconds since 1970 as ISO 8601 in UTC."""
    try:
        return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{time_us} us"


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
