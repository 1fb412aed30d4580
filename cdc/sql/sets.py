"""When one statement for many rows does what one row after the other would. Pure."""

from collections.abc import Iterator, Sequence

from cdc.record import RowSet


def waves(matches: Sequence[tuple[bytes, ...]]) -> Iterator[slice]:
    """Cut so that no two of one part are equal, in order: a set can then stand for one row after the other."""
    seen: set[tuple[bytes, ...]] = set()
    start = 0
    for index, match in enumerate(matches):
        if match in seen:
            yield slice(start, index)
            seen.clear()
            start = index
        seen.add(match)
    if start < len(matches):
        yield slice(start, len(matches))


def changing(rows: RowSet) -> tuple[tuple[int, ...], list[tuple[bytes, ...]]]:
    """The columns an update has to set, and their values: those of a key that no row changes are left out.

    An engine handles a key that is set as one that changes. Where nothing is left the match is set to itself, so that
    the rows are found and counted all the same.
    """
    key = [index for index in rows.match if rows.unique and index in rows.columns]
    places = [(rows.columns.index(index), rows.match.index(index)) for index in key]
    if any(row[new] != match[old] for row, match in zip(rows.rows, rows.matches, strict=True) for new, old in places):
        return rows.columns, rows.rows
    kept = [place for place, index in enumerate(rows.columns) if index not in key]
    if not kept:
        return rows.match, rows.matches
    if len(kept) == len(rows.columns):
        return rows.columns, rows.rows
    return tuple(rows.columns[place] for place in kept), [tuple([row[place] for place in kept]) for row in rows.rows]
