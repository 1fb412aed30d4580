"""The net effect of a batch on one table: what its rows were and are, not the steps between. Pure.

Written out in three sets, first deletes, then updates, then inserts, it leaves the table as the steps would have. Where
the steps themselves do not fit together (an insert of a key that is there) the caller takes them one by one instead,
to stop at the very step that does not fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cdc.record import UNCHANGED, Relation, Row, RowSet

TURN_MAX: Final = 5_000  # inserts that are worth keying when an update follows; more are written first

Key = tuple[bytes, ...]


class NotASetError(Exception):
    """These changes cannot be told as sets: take them one by one."""


@dataclass(slots=True)
class _Entry:
    """One key: was a row deleted under it, and what row is there now."""

    deleted: bool = False
    inserted: Row | None = None
    updated: Row | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """The columns that find a row. ``unique``: they are a key, not merely the whole row."""

    columns: tuple[int, ...]
    unique: bool

    def of(self, row: Row) -> Key:
        """The key of a row.

        :raises NotASetError: the log did not carry it.
        """
        key = tuple([row[index] for index in self.columns])
        if UNCHANGED in key:
            raise NotASetError
        return key  # type: ignore[return-value]

    def kept(self, after: Row, before: Row) -> Row:
        """``after``, whose key did not change where it is not there."""
        if UNCHANGED not in after:
            return after
        return tuple([before[n] if v is UNCHANGED and n in self.columns else v for n, v in enumerate(after)])


def identity(relation: Relation) -> Identity:
    """How rows of ``relation`` are found: by its replica identity, or by the primary key where the identity is full.

    https://www.postgresql.org/docs/current/logical-replication-publication.html#LOGICAL-REPLICATION-PUBLICATION-REPLICA-IDENTITY
    """
    names = [column.name for column in relation.columns]
    keyed = relation.identity != "f" and any(column.key for column in relation.columns)
    # A column list may leave out a part of the primary key: what is left of it is no key.
    if relation.primary_key and not keyed and set(relation.primary_key) <= set(names):
        return Identity(tuple(names.index(name) for name in relation.primary_key), True)
    columns = tuple(index for index, column in enumerate(relation.columns) if column.key)
    if relation.identity == "f" or not columns:
        return Identity(tuple(range(len(names))), False)
    return Identity(columns, True)


class TableChanges:
    """Collects the changes of one table. ``tolerant``: the table may already be ahead of them (a resumed image)."""

    def __init__(self, relation: Relation, *, tolerant: bool = False) -> None:
        self.relation = relation
        self.identity = identity(relation)
        self.tolerant = tolerant
        self.width = len(relation.columns)
        self.forms = b"b" * self.width
        self.inserts: list[Row] = []
        self._entries: dict[Key, _Entry] = {}

    def insert(self, row: Row) -> None:
        if self._entries:
            self._insert(row)
        else:
            self.inserts.append(row)

    def update(self, before: Row | None, after: Row, *, full: bool) -> None:
        """``before`` is the old row where ``full``, else the old key; None where the key did not change."""
        if not self.identity.unique:
            raise NotASetError
        self._turn()
        key = self.identity.of(after if before is None else before)
        if before is not None:
            after = filled(after, before) if full else self.identity.kept(after, before)
        if before is not None and self.identity.of(after) != key:
            self._move(key, after)
            return
        entry = self._entries.get(key)
        if entry is None:
            self._entries[key] = _Entry(updated=after)
        elif entry.inserted is not None:
            entry.inserted = filled(after, entry.inserted)
        elif entry.updated is not None:
            entry.updated = filled(after, entry.updated)
        elif not self.tolerant:
            raise NotASetError

    def delete(self, before: Row) -> None:
        if not self.identity.unique:
            raise NotASetError
        self._turn()
        self._delete(self.identity.of(before))

    def clear(self) -> None:
        """Forget what was written."""
        self.inserts = []
        self._entries = {}

    def sets(self) -> Iterator[tuple[str, RowSet]]:
        """("D" | "U" | "I", rows) in the order to write them."""
        columns = tuple(range(len(self.relation.columns)))
        deletes = [key for key, entry in self._entries.items() if entry.deleted]
        if deletes:
            yield "D", self._set(match=self.identity.columns, matches=deletes)
        yield from self._updates()
        inserts = self.inserts + [entry.inserted for entry in self._entries.values() if entry.inserted is not None]
        if inserts:
            yield "I", self._set(columns=columns, rows=inserts)

    def _updates(self) -> Iterator[tuple[str, RowSet]]:
        """One set for each choice of columns that the log carried."""
        by_columns: dict[tuple[int, ...], RowSet] = {}
        everything = tuple(range(len(self.relation.columns)))
        for key, entry in self._entries.items():
            row = entry.updated
            if row is None or entry.deleted:
                continue
            columns = everything
            if UNCHANGED in row:
                columns = tuple(index for index in everything if row[index] is not UNCHANGED)
                row = tuple([row[index] for index in columns])
            rows = by_columns.get(columns)
            if rows is None:
                rows = by_columns[columns] = self._set(columns=columns, match=self.identity.columns)
            rows.rows.append(row)  # type: ignore[arg-type]
            rows.matches.append(key)
        for rows in by_columns.values():
            yield "U", rows

    def _set(
        self,
        *,
        columns: tuple[int, ...] = (),
        rows: list[Row] | None = None,
        match: tuple[int, ...] = (),
        matches: list[Key] | None = None,
    ) -> RowSet:
        return RowSet(self.relation, self.forms, columns, rows or [], match, matches or [], self.identity.unique)  # type: ignore[arg-type]

    def _turn(self) -> None:
        """From inserts alone to net effects."""
        if self.inserts and not self._entries:
            waiting, self.inserts = self.inserts, []
            for row in waiting:
                self._insert(row)

    def _insert(self, row: Row) -> None:
        if not self.identity.unique:
            raise NotASetError
        entry = self._entries.setdefault(self.identity.of(row), _Entry())
        if (entry.inserted or entry.updated) is not None and not self.tolerant:
            raise NotASetError
        entry.inserted, entry.updated = row, None

    def _delete(self, key: Key) -> None:
        entry = self._entries.get(key)
        if entry is None:
            self._entries[key] = _Entry(deleted=True)
        elif entry.inserted is not None and not entry.deleted and not self.tolerant:
            del self._entries[key]
        elif entry.inserted is None and entry.updated is None and not self.tolerant:
            raise NotASetError
        else:
            self._entries[key] = _Entry(deleted=True)

    def _move(self, key: Key, after: Row) -> None:
        """An update that changes the key: a delete and an insert, where all of the row is known."""
        entry = self._entries.get(key)
        known = (entry.inserted or entry.updated) if entry is not None else None
        row = filled(after, known) if known is not None else after
        if UNCHANGED in row:
            raise NotASetError
        self._delete(key)
        self._insert(row)


def filled(after: Row, before: Row) -> Row:
    """``after`` with the values that did not change taken from ``before``."""
    if UNCHANGED not in after:
        return after
    return tuple([old if new is UNCHANGED else new for old, new in zip(before, after, strict=True)])
