"""What changed between two descriptions of one table. Pure.

PostgreSQL's log tells names, types and order of columns, not what was done to them. Attribute numbers, where known on
both sides, tell exactly: a number never comes back. Without them only the cases that have one reading are read.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from cdc.errors import SchemaError
from cdc.ports import AddColumn, ChangeType, DropColumn, RenameColumn, RenameTable, SchemaChange
from cdc.record import Column, Relation


def changes(old: Relation, new: Relation) -> list[SchemaChange]:
    """The changes that turn ``old`` into ``new``, in an order in which they can be made.

    Of columns only name and type count: identity, NOT NULL and numbers may differ without anything to do. Where one of
    the leader's own types became another, its columns change to the type they have.

    :raises SchemaError: a column may have been renamed, or dropped and another added: the log does not tell.
    """
    found: list[SchemaChange] = []
    if (old.schema, old.name) != (new.schema, new.name):
        found.append(RenameTable(old))
    pairs = _paired(old, new)
    kept = {before.name for before, _ in pairs}
    arrived = {after.name for _, after in pairs}
    found += [DropColumn(column.name) for column in old.columns if column.name not in kept]
    found += _renames({before.name: after.name for before, after in pairs if before.name != after.name})
    redefined = _redefined(old, new)
    found += [
        ChangeType(before, after)
        for before, after in pairs
        if (before.type_oid, before.modifier) != (after.type_oid, after.modifier) or after.type_oid in redefined
    ]
    found += [AddColumn(column) for column in new.columns if column.name not in arrived]
    return found


def numbered(new: Relation, old: Relation) -> Relation:
    """``new`` with the attribute numbers that ``old`` knows of columns of the same name, where ``new`` has none.

    The catalog was ahead of the log when ``new`` was read; the next description that has numbers finds them here.
    """
    if any(column.number is not None for column in new.columns):
        return new
    numbers = {column.name: column.number for column in old.columns}
    return replace(new, columns=tuple(replace(each, number=numbers.get(each.name)) for each in new.columns))


def _paired(old: Relation, new: Relation) -> list[tuple[Column, Column]]:
    """The columns that are on both sides, under whatever name: by number, then by name, then by place."""
    by_number = {column.number: column for column in new.columns if column.number is not None}
    pairs = {column.name: by_number[column.number] for column in old.columns if column.number in by_number}
    taken = {column.name for column in pairs.values()}
    by_name = {column.name: column for column in new.columns if column.name not in taken}
    for column in old.columns:
        other = by_name.get(column.name)
        if column.name not in pairs and other is not None and None in (column.number, other.number):
            pairs[column.name] = other
    pairs |= _renamed_in_place(old, new, pairs)
    gone = [column for column in old.columns if column.name not in pairs]
    came = [column for column in new.columns if column not in pairs.values()]
    places = [new.columns.index(pairs[column.name]) for column in old.columns if column.name in pairs]
    # Columns keep their order: a pair that does not was paired wrongly.
    if places != sorted(places) or any(None in (one.number, other.number) for one in gone for other in came):
        raise SchemaError(
            f"columns of {new.label} changed from {_names(old.columns)} to {_names(new.columns)}: "
            "which were renamed, and which dropped and added, the log does not tell",
            remedy=f"make the follower's table {new.label} equal to the leader's by hand, then start again "
            "with `--schema-changed`",
        )
    return [(column, pairs[column.name]) for column in old.columns if column.name in pairs]


def _renamed_in_place(old: Relation, new: Relation, pairs: Mapping[str, Column]) -> dict[str, Column]:
    """What was added stands at the end: one column for one between two that stayed is that column, renamed."""
    found: dict[str, Column] = {}
    rest = list(new.columns)
    waiting: list[Column] = []
    for column in old.columns:
        kept = pairs.get(column.name)
        if kept is None:
            waiting.append(column)
        elif kept in rest:
            before_it = rest.index(kept)
            came = [each for each in rest[:before_it] if each not in pairs.values()]
            rest = rest[before_it + 1 :]
            if len(came) == len(waiting):
                found |= {before.name: after for before, after in zip(waiting, came, strict=True)}
            waiting = []
    return found


def _names(columns: Iterable[Column]) -> list[str]:
    return [column.name for column in columns]


def _renames(names: dict[str, str]) -> Iterator[RenameColumn]:
    """In an order in which no name is taken yet; columns that trade names go round by a third."""
    while names:
        free = next((old for old, new in names.items() if new not in names), None)
        if free is not None:
            yield RenameColumn(free, names.pop(free))
            continue
        old = next(iter(names))
        interim = f"cdc_renamed_{len(names)}"
        yield RenameColumn(old, interim)
        names[interim] = names.pop(old)


def _redefined(old: Relation, new: Relation) -> set[int]:
    """The types of which a part is described differently now."""
    before = {each.oid: each for each in old.types}
    found = {each.oid for each in new.types if before.get(each.oid, each) != each}
    while more := {each.oid for each in new.types if each.base in found} - found:
        found |= more
    return found
