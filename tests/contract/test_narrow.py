"""A follower that lacks columns of the leader's, with `--lacking leave-out`: the same on every engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliers.narrow import narrowed
from cdc.errors import CdcError, SchemaError
from cdc.ports import AddColumn, DropColumn, Follower
from cdc.record import Column, RowSet
from cdc.wire import copy
from tests.contract.test_follower import BINARY, ENGINES, INT4, TEXT, Engine, gone, i4, items, seen, table, text
from tests.contract.test_follower import ITEMS as WIDE

NARROW = table(Column("id", INT4, key=True), Column("n", INT4))
KEYLESS_WIDE = table(Column("a", INT4, key=True), Column("b", TEXT, key=True), identity="f")
ONLY_B = table(Column("b", TEXT, key=True), identity="f")


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    return ENGINES[request.param](request, tmp_path)


@contextmanager
def working(engine: Engine) -> Iterator[Follower]:
    follower = narrowed(engine.follower())
    try:
        follower.begin()
        yield follower
        follower.commit()
    except BaseException:
        follower.rollback()
        raise
    finally:
        follower.close()


def changed(columns: tuple[int, ...], *changes: tuple[int, tuple[bytes, ...]]) -> RowSet:
    return RowSet(WIDE, BINARY, columns, [new for _, new in changes], (0,), [(i4(key),) for key, _ in changes])


def test_what_is_lacking_is_left_out(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(NARROW)
        assert follower.insert(items((1, "a", 1), (2, "b", 2), (3, None, 3))) == 3
        assert follower.update(changed((1, 2), (1, (text("x"), i4(10))))) == 1
        assert follower.delete(gone(2)) == 1
        assert follower.insert(items((3, "r", 30), (4, "r", 40)), replace=True) == 2
    assert seen(engine, NARROW) == [b"1\t10", b"3\t30", b"4\t40"]


def test_an_update_of_nothing_but_what_is_lacking_still_finds_its_row(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(NARROW)
        follower.insert(items((1, "a", 1)))
        assert follower.update(changed((1,), (1, (text("x"),)), (9, (text("nobody"),)))) == 1
    assert seen(engine, NARROW) == [b"1\t1"]


@pytest.mark.parametrize("replace", [False, True])
def test_an_image_is_narrowed_too(engine: Engine, replace: bool) -> None:
    rows = [b"\0\3" + b"".join(row) for row in ((i4(1), text("a"), i4(1)), (i4(2), text("b"), i4(2)))]
    body = copy.HEADER + b"".join(rows) + copy.TRAILER
    with working(engine) as follower:
        follower.create(NARROW)
        assert follower.load(WIDE, body, "binary", replace=replace) == 2
        assert follower.load(WIDE, copy.HEADER + copy.TRAILER, "binary", replace=replace) == 0
        assert follower.load(WIDE, b"3\tx\t\\N\n", "text", replace=replace) == 1
    assert seen(engine, NARROW) == [b"1\t1", b"2\t2", b"3\t\\N"]


def test_what_lacks_nothing_is_passed_on(engine: Engine) -> None:
    with working(engine) as follower:
        follower.create(WIDE)
        follower.insert(items((1, "a", 1)))
        assert follower.load(WIDE, b"2\tb\t2\n", "text") == 1
    assert seen(engine, WIDE) == [b"1\ta\t1", b"2\tb\t2"]


@pytest.mark.parametrize("what", ["insert", "update", "delete"])
def test_a_key_cannot_be_left_out(engine: Engine, what: str) -> None:
    keyless = table(Column("v", TEXT), Column("n", INT4))
    with pytest.raises(SchemaError, match="'id'") as caught, working(engine) as follower:
        follower.create(keyless)
        if what == "insert":
            follower.insert(items((1, "a", 1)), replace=True)
        elif what == "update":
            follower.update(changed((1,), (1, (text("x"),))))
        else:
            follower.delete(gone(1))
    assert "public.t" in str(caught.value)


def test_a_row_that_is_found_by_all_of_it_cannot_be_narrowed(engine: Engine) -> None:
    row = (i4(1), text("x"))
    with pytest.raises(SchemaError, match="'a'"), working(engine) as follower:
        follower.create(ONLY_B)
        follower.insert(RowSet(KEYLESS_WIDE, b"bb", (0, 1), [row]))
        follower.delete(RowSet(KEYLESS_WIDE, b"bb", match=(0, 1), matches=[row], unique=False))


def test_a_column_that_comes_is_left_out_and_others_go(engine: Engine) -> None:
    later = table(Column("id", INT4, key=True), Column("v", TEXT), Column("n", INT4), Column("x", TEXT))
    with working(engine) as follower:
        follower.create(WIDE)
        follower.insert(items((1, "a", 1)))
        follower.evolve(WIDE, AddColumn(later.columns[3]))
        columns = follower.columns(later)
        assert columns is not None
        assert list(columns) == ["id", "v", "n", "x"], "nothing is missing"
        follower.insert(RowSet(later, b"bbbb", (0, 1, 2, 3), [(i4(2), text("b"), i4(2), text("x"))]))
    assert seen(engine, WIDE) == [b"1\ta\t1", b"2\tb\t2"]
    with working(engine) as follower:
        follower.evolve(WIDE, DropColumn("v"))
    assert seen(engine, NARROW) == [b"1\t1", b"2\t2"]


def test_a_table_that_is_not_there_is_not_made_up(engine: Engine) -> None:
    with working(engine) as follower:
        assert follower.columns(WIDE) is None


def test_a_column_of_the_followers_own(engine: Engine) -> None:
    """It takes its default; where it must have a value and has none, the error names it."""
    more = table(Column("id", INT4, key=True), Column("mine", INT4), Column("n", INT4))
    strict = table(Column("id", INT4, key=True), Column("mine", INT4, not_null=True), Column("n", INT4), name="u")
    of_u = table(*WIDE.columns, name="u")
    with working(engine) as follower:
        follower.create(more)
        assert follower.insert(items((1, "a", 1))) == 1
    assert seen(engine, more) == [b"1\t\\N\t1"]
    if engine.name != "postgresql":
        return  # the others' tables take NULL, whatever the leader's do
    with pytest.raises(CdcError, match="mine") as caught, working(engine) as follower:
        follower.create(strict)
        follower.insert(items((1, "a", 1), relation=of_u))
    assert "u" in str(caught.value)
    assert caught.value.exit_code != 70, "no bug of ours"
