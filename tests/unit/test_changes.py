"""Net effects: the sets leave the same table as the steps, or say that they cannot."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliers.changes import NotASetError, TableChanges, filled, identity
from cdc.record import NULL, UNCHANGED, Column, Relation, Row, RowSet, Value

Table = dict[tuple[Value, ...], Row]
Step = tuple[str, Row | None, Row | None, bool]  # operation, before, after, is the before image whole?


def _v(number: int) -> bytes:
    return b"\0\0\0\1" + bytes([number])


def _relation(identity_: str = "d", keys: int = 1, width: int = 3, primary_key: tuple[str, ...] = ()) -> Relation:
    columns = tuple(Column(f"c{n}", 23, key=identity_ == "f" or n < keys) for n in range(width))
    return Relation(1, "public", "t", identity_, columns, primary_key)


_KEYED = _relation()


def _stepped(table: Table, steps: list[Step]) -> Table:
    """One change after the other; the oracle.

    :raises KeyError: a step does not fit.
    """
    table = dict(table)
    for op, before, after, full in steps:
        if op == "I":
            assert after is not None
            if after[:1] in table:
                raise KeyError(after[:1])
            table[after[:1]] = after
            continue
        old = before if before is not None else after
        assert old is not None
        row = table.pop(old[:1])
        if op == "U":
            assert after is not None
            assert not full or row == before
            row = filled(after, row)
            if row[:1] in table:
                raise KeyError(row[:1])
            table[row[:1]] = row
    return table


def _written(table: Table, sets: list[tuple[str, RowSet]]) -> Table:
    """The sets as a database takes them: each names rows that are there (or, inserted, are not), and each once."""
    table = dict(table)
    for op, rows in sets:
        assert rows.unique
        keys = [tuple(match) for match in rows.matches]
        assert len(set(keys)) == len(keys)
        assert all(isinstance(value, bytes) for row in rows.rows for value in row)
        if op == "D":
            for key in keys:
                del table[key]
        elif op == "U":
            assert len(rows.rows) == len(keys)
            for key, values in zip(keys, rows.rows, strict=True):
                row = list(table[key])
                for column, value in zip(rows.columns, values, strict=True):
                    row[column] = value
                table[key] = tuple(row)
                assert tuple(row[:1]) == key
        else:
            for new in rows.rows:
                assert new[:1] not in table
                table[new[:1]] = new
    assert [op for op, _ in sets] == sorted((op for op, _ in sets), key="DUI".index)
    return table


def _collected(steps: list[Step], relation: Relation = _KEYED) -> list[tuple[str, RowSet]]:
    changes = TableChanges(relation)
    for op, before, after, full in steps:
        if op == "I":
            assert after is not None
            changes.insert(after)
        elif op == "U":
            assert after is not None
            changes.update(before, after, full=full)
        else:
            assert before is not None
            changes.delete(before)
    return list(changes.sets())


_KEYS = st.integers(0, 4).map(_v)
_VALUES = st.one_of(st.integers(0, 3).map(_v), st.just(NULL))


def _key_only(row: Row) -> Row:
    return (row[0], NULL, NULL)


@st.composite
def histories(draw: st.DrawFn) -> tuple[Table, list[Step]]:
    """A table and steps that a leader could have made on it, told with every kind of before image."""
    start: Table = {(key,): (key, _v(9), _v(9)) for key in draw(st.sets(_KEYS, max_size=4))}
    table, steps = dict(start), list[Step]()
    for _ in range(draw(st.integers(0, 12))):
        op = draw(st.sampled_from("IUUUD"))
        if op == "I":
            row: Row = (draw(_KEYS), draw(_VALUES), draw(_VALUES))
            if row[:1] in table:
                continue
            step: Step = ("I", None, row, False)
        elif not table:
            continue
        else:
            old = table[draw(st.sampled_from(sorted(table)))]
            full = draw(st.booleans())
            before = old if full else _key_only(old)
            if op == "D":
                step = ("D", before, None, full)
            else:
                key = draw(st.one_of(st.just(old[0]), _KEYS))
                after: Row = (key, *[draw(st.one_of(_VALUES, st.just(UNCHANGED))) for _ in range(2)])
                if key != old[0] and (key,) in table:
                    continue
                if key == old[0] and not full and draw(st.booleans()):
                    step = ("U", None, after, False)
                else:
                    step = ("U", before, after, full)
        table = _stepped(table, [step])
        steps.append(step)
    return start, steps


@settings(max_examples=500)
@given(histories())
def test_sets_leave_the_table_as_the_steps_do(history: tuple[Table, list[Step]]) -> None:
    table, steps = history
    try:
        sets = _collected(steps)
    except NotASetError:
        # Only a move of a row of which not all is known must be told in steps.
        assert any(
            op == "U" and before is not None and not full and UNCHANGED in (after or ())
            for op, before, after, full in steps
        )
        return
    assert _written(table, sets) == _stepped(table, steps)


_WILD_ROWS = st.tuples(_KEYS, _VALUES, _VALUES)
_WILD = st.one_of(
    st.tuples(st.just("I"), st.none(), _WILD_ROWS, st.just(False)),
    st.tuples(st.just("U"), st.none() | _WILD_ROWS.map(_key_only), _WILD_ROWS, st.just(False)),
    st.tuples(st.just("D"), _WILD_ROWS.map(_key_only), st.none(), st.just(False)),
)


@settings(max_examples=500)
@given(st.sets(_KEYS, max_size=4), st.lists(_WILD, max_size=8))
def test_steps_that_do_not_fit_are_never_hidden_by_the_sets(keys: set[bytes], steps: list[Step]) -> None:
    """Where the steps fail on this table, the sets are refused, or fail on it too: an insert beside the row that the
    follower should not have, a change of one it lacks."""
    table: Table = {(key,): (key, _v(9), _v(9)) for key in keys}
    try:
        wanted: Table | None = _stepped(table, steps)
    except KeyError:
        wanted = None
    try:
        got: Table | None = _written(table, _collected(steps))
    except (NotASetError, KeyError, AssertionError):
        return  # taken in steps then
    if wanted is None:
        # Sets may be kinder than the steps in one way only: what was inserted and deleted again never conflicts.
        assert any(op == "I" for op, *_ in steps)
        assert any(op == "D" or (op == "U" and before is not None) for op, before, *_ in steps)
    else:
        assert got == wanted


def test_a_key_inserted_twice_is_no_set() -> None:
    row: Row = (_v(1), _v(1), _v(1))
    with pytest.raises(NotASetError):
        _collected([("I", None, row, False), ("I", None, row, False), ("D", row, None, True)])


def test_inserts_alone_are_not_keyed() -> None:
    """The fast way: duplicates among them are for the database to find."""
    row: Row = (_v(1), _v(1), _v(1))
    [(op, rows)] = _collected([("I", None, row, False), ("I", None, row, False)])
    assert (op, rows.rows) == ("I", [row, row])


@given(st.lists(_WILD, min_size=1, max_size=5))
def test_whole_rows_are_never_keys(steps: list[Step]) -> None:
    relation = _relation("f")
    assert not identity(relation).unique
    if any(op != "I" for op, *_ in steps):
        with pytest.raises(NotASetError):
            _collected(steps, relation)
    else:
        [(op, rows)] = _collected(steps, relation)
        assert (op, rows.unique, len(rows.rows)) == ("I", False, len(steps))


@pytest.mark.parametrize(
    ("relation", "columns", "unique"),
    [
        (_relation("d", keys=2), (0, 1), True),
        (_relation("i", keys=1), (0,), True),
        (_relation("d", keys=2, primary_key=("c1", "c0")), (0, 1), True),
        (_relation("f"), (0, 1, 2), False),
        (_relation("f", primary_key=("c2", "c0")), (2, 0), True),
        (_relation("n", keys=0), (0, 1, 2), False),
        (_relation("n", keys=0, primary_key=("c1",)), (1,), True),
        # A column list may leave out a part of the primary key, and what is left of it is no key.
        (_relation("n", keys=0, primary_key=("c1", "elsewhere")), (0, 1, 2), False),
        (_relation("d", keys=0, primary_key=("elsewhere",)), (0, 1, 2), False),
    ],
)
def test_identity(relation: Relation, columns: tuple[int, ...], unique: bool) -> None:
    found = identity(relation)
    assert (found.columns, found.unique) == (columns, unique)


def test_an_unchanged_key_that_the_log_left_out_still_finds_its_row() -> None:
    """A large key is sent as old key, and as unchanged in the new row."""
    steps: list[Step] = [("U", (_v(1), NULL, NULL), (UNCHANGED, _v(5), UNCHANGED), False)]
    [(op, rows)] = _collected(steps)
    assert (op, rows.matches, rows.columns, rows.rows) == ("U", [(_v(1),)], (0, 1), [(_v(1), _v(5))])


def test_a_key_nobody_told_is_no_set() -> None:
    with pytest.raises(NotASetError):
        _collected([("U", None, (UNCHANGED, _v(1), _v(1)), False)])
    with pytest.raises(NotASetError):
        _collected([("D", (UNCHANGED, NULL, NULL), None, False)])


def test_what_was_written_is_forgotten() -> None:
    changes = TableChanges(_KEYED)
    changes.insert((_v(1), _v(1), _v(1)))
    changes.update(None, (_v(2), _v(2), UNCHANGED), full=False)
    changes.clear()
    assert list(changes.sets()) == []


# A resumed image: the table may be ahead of the changes, and at their end is equal to the leader's.


@settings(max_examples=500)
@given(histories(), st.data())
def test_tolerant_sets_end_where_the_leader_does(history: tuple[Table, list[Step]], data: st.DataObject) -> None:
    """Each key's row was copied at any moment of the history; all of the history is then applied on top."""
    start, steps = history
    moments = [start]
    for step in steps:
        moments.append(_stepped(moments[-1], [step]))
    copied: Table = {}
    for key in (_v(n) for n in range(5)):
        row = data.draw(st.sampled_from(moments)).get((key,))
        if row is not None:
            copied[(key,)] = row
    changes = TableChanges(_KEYED, tolerant=True)
    try:
        for op, before, after, full in steps:
            if op == "I":
                changes.insert(after or ())
            elif op == "U":
                changes.update(before, after or (), full=full)
            else:
                changes.delete(before or ())
    except NotASetError:
        return
    assert _tolerated(copied, list(changes.sets())) == moments[-1]


def _tolerated(table: Table, sets: list[tuple[str, RowSet]]) -> Table:
    table = dict(table)
    for op, rows in sets:
        for key in map(tuple, rows.matches) if op == "D" else ():
            table.pop(key, None)
        if op == "U":
            for key, values in zip(map(tuple, rows.matches), rows.rows, strict=True):
                row = dict(enumerate(table.get(key, ()))) | dict(zip(rows.columns, values, strict=True))
                if key in table:
                    table[key] = tuple(row[n] for n in range(3))
        for new in rows.rows if op == "I" else ():
            table[new[:1]] = new
    return table
