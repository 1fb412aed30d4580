"""A follower that may lack columns of the leader's: what it lacks is left out, where that is wanted (``--lacking``).

Columns that only the follower has are never named in a statement: they take their default, or stop the follower where
they are NOT NULL without one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from cdc.errors import SchemaError
from cdc.ports import AddColumn, Follower, SchemaChange
from cdc.record import Relation, RowSet
from cdc.wire import copy

_T = TypeVar("_T")


def narrowed(follower: Follower) -> Follower:
    """``follower``, leaving out the columns that its tables lack."""
    return cast(Follower, _Narrowed(follower))


class _Narrowed:
    """What it does not do itself, the follower does."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._lacking: dict[Relation, frozenset[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._follower, name)

    def columns(self, relation: Relation) -> Mapping[str, str] | None:
        """The follower's own, and for those it lacks an empty type: nothing is missing that is to be left out."""
        there = self._follower.columns(relation)
        return None if there is None else {column.name: "" for column in relation.columns} | dict(there)

    def evolve(self, relation: Relation, change: SchemaChange) -> None:
        self._lacking.clear()
        if not isinstance(change, AddColumn):
            self._follower.evolve(relation, change)

    def create(self, relation: Relation) -> None:
        self._lacking.clear()
        self._follower.create(relation)

    def insert(self, rows: RowSet, *, replace: bool = False) -> int:
        return self._follower.insert(self._narrow(rows), replace=replace)

    def update(self, rows: RowSet) -> int:
        narrow = self._narrow(rows)
        if not narrow.columns:  # found and counted all the same
            narrow.columns, narrow.rows = narrow.match, narrow.matches
        return self._follower.update(narrow)

    def delete(self, rows: RowSet) -> int:
        return self._follower.delete(self._narrow(rows))

    def load(self, relation: Relation, body: bytes, form: str, *, replace: bool = False) -> int:
        if not self._missing(relation):
            return self._follower.load(relation, body, form, replace=replace)
        forms = (b"b" if form == "binary" else b"t") * len(relation.columns)
        rows = RowSet(relation, forms, tuple(range(len(relation.columns))), list(copy.rows(body, form)))
        return self.insert(rows, replace=replace) if rows.rows else 0

    def _missing(self, relation: Relation) -> frozenset[int]:
        """The columns that the follower's table lacks, by their indexes."""
        found = self._lacking.get(relation)
        if found is None:
            there = self._follower.columns(relation) or {}
            found = frozenset(index for index, column in enumerate(relation.columns) if column.name not in there)
            self._lacking[relation] = found
        return found

    def _narrow(self, rows: RowSet) -> RowSet:
        """
        :raises SchemaError: a row could not be found without what is missing.
        """
        missing = self._missing(rows.relation)
        if not missing:
            return rows
        columns = rows.relation.columns
        key = {index for index, column in enumerate(columns) if column.name in rows.relation.primary_key}
        if needed := missing & (key | set(rows.match)):
            names = ", ".join(repr(columns[index].name) for index in sorted(needed))
            raise SchemaError(
                f"the follower's table {rows.relation.label} lacks {names}, by which its rows are found",
                remedy="add what is missing to the follower's table; it cannot be left out",
            )
        places = [place for place, index in enumerate(rows.columns) if index not in missing]
        return RowSet(
            rows.relation,
            rows.forms,
            _picked(rows.columns, places),
            [_picked(row, places) for row in rows.rows],
            rows.match,
            rows.matches,
            rows.unique,
        )


def _picked(values: Sequence[_T], places: Sequence[int]) -> tuple[_T, ...]:
    return tuple([values[place] for place in places])
