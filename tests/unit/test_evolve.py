"""Schema changes: what is found, made in order, turns the old table into the new one."""

from hypothesis import assume, given
from hypothesis import strategies as st

from cdc.errors import SchemaError
from cdc.ports import AddColumn, ChangeType, DropColumn, RenameColumn, RenameTable, SchemaChange
from cdc.record import Column, Relation
from cdc.sql.evolve import changes

Table = tuple[tuple[str, str], dict[str, tuple[int, int]]]


def _relation(*columns: Column, name: str = "t") -> Relation:
    return Relation(1, "public", name, "d", columns)


def _table(relation: Relation) -> Table:
    return (relation.schema, relation.name), {c.name: (c.type_oid, c.modifier) for c in relation.columns}


def _made(table: Table, change: SchemaChange, new: Relation) -> Table:
    """What a follower does, refusing what no database would do."""
    name, columns = table
    columns = dict(columns)
    match change:
        case RenameTable(old):
            assert name == (old.schema, old.name)
            name = (new.schema, new.name)
        case DropColumn(gone):
            del columns[gone]
        case RenameColumn(old_name, new_name):
            assert new_name not in columns, f"column {new_name!r} exists"
            columns[new_name] = columns.pop(old_name)
        case ChangeType(before, after):
            assert columns[after.name] == (before.type_oid, before.modifier)
            columns[after.name] = (after.type_oid, after.modifier)
        case AddColumn(column):
            assert column.name not in columns, f"column {column.name!r} exists"
            columns[column.name] = (column.type_oid, column.modifier)
    return name, columns


def _followed(old: Relation, new: Relation) -> Table:
    table = _table(old)
    for change in changes(old, new):
        table = _made(table, change, new)
    return table


_NAMES = st.lists(st.sampled_from("abcdef"), unique=True, min_size=1, max_size=6)


@st.composite
def _numbered(draw: st.DrawFn) -> Relation:
    names = draw(_NAMES)
    numbers = sorted(draw(st.lists(st.integers(1, 8), unique=True, min_size=len(names), max_size=len(names))))
    types = st.tuples(st.sampled_from([20, 23, 25]), st.sampled_from([-1, 7]))
    columns = [
        Column(name, *draw(types), key=draw(st.booleans()), number=number)
        for name, number in zip(names, numbers, strict=True)
    ]
    return _relation(*columns, name=draw(st.sampled_from(["t", "u"])))


@given(_numbered(), _numbered())
def test_with_numbers_any_table_is_followed(old: Relation, new: Relation) -> None:
    assert _followed(old, new) == _table(new)


def test_swapped_names_go_through_a_third() -> None:
    old = _relation(Column("a", 23, number=1), Column("b", 25, number=2))
    new = _relation(Column("b", 23, number=1), Column("a", 25, number=2))
    assert _followed(old, new) == _table(new)


def test_a_name_moves_to_a_new_column() -> None:
    old = _relation(Column("a", 23, number=1))
    new = _relation(Column("b", 23, number=1), Column("a", 25, number=2))
    assert changes(old, new) == [RenameColumn("a", "b"), AddColumn(new.columns[1])]


def test_dropped_and_added_under_one_name_loses_the_values() -> None:
    old = _relation(Column("id", 23, number=1), Column("a", 23, number=2))
    new = _relation(Column("id", 23, number=1), Column("a", 23, number=3, missing="7"))
    assert changes(old, new) == [DropColumn("a"), AddColumn(new.columns[1])]


@given(_numbered(), st.booleans())
def test_what_needs_nothing_done_is_no_change(relation: Relation, numbers: bool) -> None:
    other = _relation(
        *[
            Column(c.name, c.type_oid, c.modifier, not c.key, not c.not_null, c.number if numbers else None)
            for c in relation.columns
        ],
        name=relation.name,
    )
    assert changes(relation, other) == []


@given(_NAMES, _NAMES)
def test_without_numbers_a_table_is_followed_or_refused(before: list[str], after: list[str]) -> None:
    """Columns that stay keep their order: no leader can change it."""
    assume([name for name in before if name in after] == [name for name in after if name in before])
    old, new = _relation(*[Column(n, 23) for n in before]), _relation(*[Column(n, 23) for n in after])
    try:
        followed = _followed(old, new)
    except SchemaError as error:
        assert set(before) - set(after)
        assert set(after) - set(before)
        assert "does not tell" in str(error)
        assert "public.t" in error.remedy
    else:
        assert followed == _table(new)


def test_a_table_that_moved_is_renamed_first() -> None:
    old, new = _relation(Column("a", 23)), _relation(Column("a", 25), name="u")
    assert changes(old, new) == [RenameTable(old), ChangeType(old.columns[0], new.columns[0])]
