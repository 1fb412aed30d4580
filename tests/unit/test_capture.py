"""What is asked of a trigger log, and how its tables are described: without a server."""

import json
from typing import Any

import pytest

from cdc.cli.options import options_of
from cdc.config import resolve
from cdc.errors import ConfigurationError, GapError, UsageError
from cdc.record import Column, Relation
from cdc.stores.postgresql.capture import Captured, Shaping, schema_of, wake_of
from cdc.wire.record import Layout
from shippers.postgresql.trigger import _beyond, _Change, _Known, _Shapes


def parsed(option: str, text: str) -> Any:
    return resolve(options_of("setup"), flags={option: text}, environ={}, file={})[option]


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("a, b", {"": ("a", "b")}),
        ("t(a,b)", {"public.t": ("a", "b")}),
        ("s.t( a , b c ), u(x)", {"s.t": ("a", "b c"), "public.u": ("x",)}),
    ],
)
def test_columns(text: str, meaning: dict[str, tuple[str, ...]]) -> None:
    assert parsed("columns", text) == meaning


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("a > 1", {"": "a > 1"}),
        ("a::text = 'x;y: z'", {"": "a::text = 'x;y: z'"}),
        ("t: a > 1; s.u: b = 'x;y'", {"public.t": "a > 1", "s.u": "b = 'x;y'"}),
        ("t: a::int = 1;", {"public.t": "a::int = 1"}),
        ("a = ':x'", {"": "a = ':x'"}),
    ],
)
def test_conditions(text: str, meaning: dict[str, str]) -> None:
    assert parsed("where", text) == meaning


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("mail=hash", {("", "mail"): "hash"}),
        ("t.mail=null, s.t.name=drop", {("public.t", "mail"): "null", ("s.t", "name"): "drop"}),
        ("a=b=hash", {("", "a=b"): "hash"}),
    ],
)
def test_masks(text: str, meaning: dict[tuple[str, str], str]) -> None:
    assert parsed("mask", text) == meaning


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("columns", ""),
        ("columns", "a,,b"),
        ("columns", "t(a"),
        ("columns", "t(a)u(b)"),
        ("columns", "t()"),
        ("where", ""),
        ("where", "t: a; t: b"),
        ("mask", "mail"),
        ("mask", "mail=md5"),
        ("mask", "=hash"),
        ("mask", "t.=hash"),
    ],
)
def test_what_cannot_be_read(option: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"--{option}"):
        parsed(option, text)


# Shaping.

TABLES = {"public.t": ("id", "mail"), "public.u": ("id", "note")}


def test_a_mask_without_a_table_is_for_whoever_has_the_column() -> None:
    shaping = Shaping(masks={("", "mail"): "hash", ("", "id"): "null", ("public.u", "id"): "hash"})
    shaping.check(TABLES)
    assert shaping.of("public.t", TABLES["public.t"]).masks == {"mail": "hash", "id": "null"}
    assert shaping.of("public.u", TABLES["public.u"]).masks == {"id": "hash"}


def test_a_table_of_its_own_wins() -> None:
    shaping = Shaping({"": ("id",), "public.t": ("mail",)}, {}, {"": "a", "public.u": "b"})
    assert shaping.of("public.t", ()) == (("mail",), {}, "a")
    assert shaping.of("public.u", ()) == (("id",), {}, "b")


@pytest.mark.parametrize(
    "shaping",
    [
        Shaping(columns={"public.x": ("id",)}),
        Shaping(conditions={"public.x": "true"}),
        Shaping(masks={("public.x", "id"): "hash"}),
        Shaping(columns={"": ("id",)}),
        Shaping(conditions={"": "true"}),
        Shaping(masks={("", "nobody's"): "hash"}),
    ],
)
def test_what_is_asked_of_nobody(shaping: Shaping) -> None:
    with pytest.raises(ConfigurationError) as caught:
        shaping.check(TABLES)
    assert caught.value.remedy


# Names.


def test_names() -> None:
    assert schema_of("shop") == "cdc_shop"
    assert schema_of("cdc_shop") == "cdc_shop"
    assert len(schema_of("x" * 63)) == 63
    key = wake_of("cdc_shop")
    assert key == wake_of("cdc_shop") != wake_of("cdc_shop2")
    assert -(2**63) <= key < 2**63


def test_what_a_snapshot_does_not_see() -> None:
    assert _beyond("5:9:") == "(xid >= 9)"
    assert _beyond("5:9:5,7") == "(xid >= 9 OR xid IN (5, 7))"
    with pytest.raises(ValueError, match="invalid literal"):
        _beyond("5:9:5);DROP")


# Descriptions.

INT4, TEXT = 23, 25


def captured(*columns: tuple[str, int, int], highest: int | None = None) -> Captured:
    """By name, type and attribute number."""
    relation = Relation(
        7, "public", "t", "d", tuple(Column(name, oid, number=number) for name, oid, number in columns), ("id",)
    )
    oids = tuple(oid for _, oid, _ in columns)
    return Captured(
        7, relation, Layout(oids, tuple(range(len(oids)))), highest or max(n for *_, n in columns), plain=True
    )


def test_a_description_survives_json() -> None:
    before = captured(("id", INT4, 1), ("zażółć \"'\n", TEXT, 3), highest=9)
    assert Captured.from_json(json.loads(json.dumps(before.to_json()))) == before


def change(*oids: int) -> _Change:
    data = len(oids).to_bytes(4) + b"".join(oid.to_bytes(4) + b"\xff" * 4 for oid in oids)
    return _Change(1, 1, 1, len(data), 7, b"I", data)


def shapes(now: Captured, before: Captured | None) -> _Shapes:
    found = _Shapes(None, "cdc_s")  # type: ignore[arg-type]
    found._known[7] = _Known(3, now, before)
    found._tick = 3
    return found


A = captured(("id", INT4, 1), ("v", TEXT, 2))
ADDED = captured(("id", INT4, 1), ("v", TEXT, 2), ("w", TEXT, 3))
RENAMED = captured(("id", INT4, 1), ("vv", TEXT, 2))
REPLACED = captured(("id", INT4, 1), ("w", TEXT, 3))
PASSED_BY = captured(("id", INT4, 1), ("v", TEXT, 2), highest=3)


def test_records_tell_which_of_two_descriptions_they_are_of() -> None:
    both = shapes(ADDED, A)
    assert both.of(change(INT4, TEXT, TEXT)) is ADDED
    assert both.of(change(INT4, TEXT)) is A
    assert shapes(RENAMED, A).of(change(INT4, TEXT)) is RENAMED


@pytest.mark.parametrize(
    ("now", "before", "oids"),
    [
        (REPLACED, A, (INT4, TEXT)),
        (PASSED_BY, A, (INT4, TEXT)),
        (ADDED, A, (INT4, INT4)),
    ],
)
def test_records_that_could_be_of_either_or_neither(now: Captured, before: Captured | None, oids: list[int]) -> None:
    with pytest.raises(GapError, match=r"public\.t") as caught:
        shapes(now, before).of(change(*oids))
    assert "--image new" in caught.value.remedy


def test_a_change_that_was_not_captured_names_its_reason() -> None:
    refused = _Change(1, 1, 1, 0, 7, b"!", b'column "x" does not exist')
    with pytest.raises(ConfigurationError, match='column "x" does not exist'):
        shapes(A, None).of(refused)
    with pytest.raises(GapError, match="not described"):
        shapes(A, None).of(refused._replace(origin=8))
