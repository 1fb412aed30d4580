"""Records of ours and of Debezium's own to changes; and records that are neither."""

import json
import random
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.debezium.assemble import Assembler, Unit
from cdc.debezium.decode import OTHER, Boundary, Decoder, Event, Table
from cdc.debezium.encode import Encoder, EventOptions
from cdc.debezium.schema import Modes
from cdc.errors import ConfigurationError, DecodeError, GapError, SchemaError
from cdc.events import PackedEvents, Place, StoredEvent, murmur2, pack, partition_of, unpack
from cdc.position import Position
from cdc.record import NULL, UNCHANGED
from tests.unit import test_debezium_encode as made

PLACE = Place("p.public.t", 0)
# The update of Debezium's documentation (2.x: no transaction field before op, no origin), without its schemas.
FOREIGN = {
    "before": {"id": 1},
    "after": {"id": 1, "first_name": "Anne Marie", "last_name": "Kretchmar"},
    "source": {"version": "2.7.4.Final", "connector": "postgresql", "name": "PostgreSQL_server", "ts_ms": 1559033904863,
               "snapshot": False, "db": "postgres", "schema": "public", "table": "customers", "txId": 556,
               "lsn": 24023128, "xmin": None},
    "op": "u",
    "ts_ms": 1465584025523,
}  # fmt: skip


def stored(value: Any, key: Any = None, place: Place = PLACE) -> StoredEvent:
    def shown(part: Any) -> bytes | None:
        return part if part is None or isinstance(part, bytes) else json.dumps(part).encode()

    return StoredEvent(place, 7, shown(key), shown(value))


def text(value: str) -> bytes:
    return len(value.encode()).to_bytes(4) + value.encode()


@pytest.mark.parametrize("schemas", [True, False])
def test_what_we_encode_we_decode(schemas: bool) -> None:
    options = EventOptions("p", schemas=schemas, transactions=True)
    batch = made.log(
        made.insert(made.row("1", "é", "12.34")),
        made.update(made.row("1", made.UNCHANGED, "0.00")),
        made.delete(b"K" + made.row("1", None, None)),
    )
    decoder = Decoder()
    items = [
        decoder.decode(StoredEvent(Place(r.topic, 0), n, r.key, r.value))
        for n, r in enumerate(Encoder(options).encode(batch, 1))
    ]
    begin, insert, update, delete, tombstone, end = items
    assert begin == Boundary("555", 24023128, False, {})
    assert end == Boundary("555", 24023128, True, {"public.t": 3})
    assert tombstone is OTHER
    assert isinstance(insert, Event)
    assert isinstance(update, Event)
    assert isinstance(delete, Event)
    assert (insert.xid, insert.order, insert.label) == ("555", 1, "public.t")
    assert insert.position == Position("p/d", 1, 24023128)
    declared = {"id": "integer", "name": "text", "price": "numeric(6,2)"}
    table = Table(insert, declared, Modes())
    assert table.row(insert.after or {}) == (text("1"), text("é"), text("12.34"))
    assert table.row(update.after or {}) == (text("1"), UNCHANGED, text("0.00"))
    assert table.key(delete.key or {}) == (text("1"),)
    assert table.relation.primary_key == ("id",)


def test_debezium_itself() -> None:
    event = Decoder().decode(stored(FOREIGN, {"id": 1}))
    assert isinstance(event, Event)
    assert (event.op, event.label, event.xid) == ("u", "public.customers", None)
    assert event.position == Position("PostgreSQL_server/postgres", 1, 24023128)
    declared = {"id": "integer", "first_name": "character varying(20)", "last_name": "text", "mine": "text"}
    table = Table(event, declared, Modes())
    assert table.row({**event.after, "last_name": None} if event.after else {}) == (text("1"), text("Anne Marie"), NULL)


def test_types_of_the_follower_stand_in_for_schemas() -> None:
    after = {"a": [1, None], "b": 1577934245123, "c": "BNI=", "d": "AP8=", "e": 18263, "f": "x"}
    event = Decoder().decode(stored({**FOREIGN, "after": after}, {"e": 18263}))
    assert isinstance(event, Event)
    declared = {"a": "integer[]", "b": "timestamp(3) without time zone", "c": "numeric(6,2)", "d": "bytea", "e": "date",
                "f": "public.mood"}  # fmt: skip
    row = Table(event, declared, Modes()).row(after)
    assert row == tuple(map(text, ('{"1",NULL}', "2020-01-02 03:04:05.123", "12.34", "\\x00ff", "2020-01-02", "x")))
    with pytest.raises(SchemaError, match="no column 'f'"):
        Table(event, {name: of for name, of in declared.items() if name != "f"}, Modes())


@pytest.mark.parametrize(
    "value",
    [
        b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"1", b'{"a":1}', b'{"op":"c","source":1}',
        {**FOREIGN, "op": "x"}, {**FOREIGN, "op": 1}, {**FOREIGN, "after": None}, {**FOREIGN, "op": "d"},
        {**FOREIGN, "after": [1]}, {**FOREIGN, "source": {}}, {**FOREIGN, "transaction": {"id": 1}},
        {**FOREIGN, "transaction": {"id": "1:2"}}, {"schema": {"type": "int32"}, "payload": FOREIGN},
        {"status": "END", "id": "1:x"}, {"status": "MAYBE", "id": "1:2"}, {"status": "END", "id": 5},
        {"status": "END", "id": "1:2", "data_collections": [{"data_collection": 1}]},
        {"status": "END", "id": "1:2", "data_collections": 3},
        b'{"id":1,"__op":"c"}',
    ],
)  # fmt: skip
def test_hostile_records(value: Any) -> None:
    with pytest.raises(DecodeError, match=r"topic 'p\.public\.t', partition 0, offset 7"):
        Decoder().decode(stored(value))


@pytest.mark.parametrize("key", [b"{", b"1", {"schema": 1, "payload": 2}])
def test_hostile_keys(key: Any) -> None:
    with pytest.raises(DecodeError):
        Decoder().decode(stored(FOREIGN, key))


def test_rows_that_are_not_of_their_shape() -> None:
    event = Decoder().decode(stored(FOREIGN, {"id": 1}))
    assert isinstance(event, Event)
    table = Table(event, {"id": "integer", "first_name": "text", "last_name": "text"}, Modes())
    for row in (
        {"id": 1},
        {"id": "x", "first_name": "", "last_name": ""},
        {"id": 1, "first_name": "\ud800", "last_name": ""},
    ):
        with pytest.raises(DecodeError):
            table.row(row)
    for key in ({}, {"id": None}):
        with pytest.raises(DecodeError):
            table.key(key)
    with pytest.raises(DecodeError, match="names 'other'"):
        Table(event._replace(key={"other": 1}),
              {"id": "integer", "first_name": "text", "last_name": "text"}, Modes())  # fmt: skip


WORDS = [
    *("op", "source", "after", "before", "schema", "payload", "fields", "field", "type"),
    *("status", "id", "lsn", "name", "db", "table", "transaction", "data_collections"),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=6),
)


@given(json_values)
def test_any_json_is_decoded_or_refused(value: Any) -> None:
    for record in (stored({"payload": value, "schema": value}), stored(json.dumps(value).encode())):
        try:
            event = Decoder().decode(record)
            if isinstance(event, Event):
                Table(event, None, Modes())
        except (DecodeError, SchemaError):
            pass


# Putting transactions together ----------------------------------------------------------------------------------------

LEFT, RIGHT, TOLD = Place("p.s.a", 0), Place("p.s.a", 1), Place("p.transaction", 0)


def event(xid: str | None, order: int, table: str = "a") -> Event:
    return Event("c", "s", table, Position("p/d", 1, 5), {"id": order}, None, {"id": order}, None, xid, order)


class Feed:
    """Feeds an assembler and keeps the offsets."""

    def __init__(self, **options: Any) -> None:
        self.assembler = Assembler(**options)
        self.offsets = {LEFT: 0, RIGHT: 0, TOLD: 0}

    def add(self, place: Place, *items: Event | Boundary) -> "Feed":
        for item in items:
            self.assembler.add(place, self.offsets[place], item, 10)
            self.offsets[place] += 1
        return self

    def units(self) -> list[tuple[list[tuple[str | None, int]], int | None]]:
        return [([(e.xid, e.order) for e in unit.events], unit.lsn) for unit in self.assembler.units() if unit.events]


def end(xid: str, lsn: int, count: int, **others: int) -> Boundary:
    return Boundary(xid, lsn, True, {"s.a": count, **{f"s.{name}": n for name, n in others.items()}})


def test_a_transaction_waits_for_all_its_events() -> None:
    feed = Feed().add(LEFT, event("1", 1), event("1", 3)).add(TOLD, end("1", 10, 3))
    assert feed.units() == []
    assert feed.assembler.waiting == "transaction 1:10, lacking events: {'s.a': 1}"
    feed.add(RIGHT, event("1", 2))
    assert feed.units() == [([("1", 1), ("1", 2), ("1", 3)], 10)]
    assert feed.assembler.waiting is None


def test_transactions_come_in_the_order_of_their_ends() -> None:
    feed = Feed().add(LEFT, event("1", 1), event("2", 1)).add(RIGHT, event("2", 2))
    assert feed.units() == []
    feed.add(TOLD, end("1", 10, 1), end("2", 20, 2))
    assert feed.units() == [([("1", 1)], 10), ([("2", 1), ("2", 2)], 20)]


def test_offsets_follow_what_was_applied() -> None:
    feed = Feed().add(LEFT, event("1", 1), event("2", 1)).add(TOLD, end("1", 10, 1))
    (unit,) = feed.assembler.units()
    assert unit == Unit([event("1", 1)], {LEFT: 1, TOLD: 1}, 10)


def test_events_told_again_after_a_crash() -> None:
    """The first telling was cut short, in both partitions at another place."""
    feed = Feed().add(LEFT, event("1", 1), event("2", 1), event("1", 1), event("2", 1), event("2", 3))
    feed.add(RIGHT, event("1", 2), event("2", 2), event("2", 2))
    feed.add(TOLD, end("1", 10, 2), end("1", 10, 2), end("2", 20, 3))
    assert feed.units() == [([("1", 1), ("1", 2)], 10), ([("2", 1), ("2", 2), ("2", 3)], 20)]


def test_an_end_told_again_changes_nothing() -> None:
    feed = Feed(applied_lsn=10).add(LEFT, event("1", 1), event("2", 1)).add(TOLD, end("1", 10, 1), end("2", 20, 1))
    assert feed.units() == [([("2", 1)], 20)]


def test_what_is_of_no_transaction_keeps_its_place() -> None:
    feed = Feed().add(LEFT, event(None, 7), event("1", 1), event(None, 8)).add(TOLD, end("1", 10, 1))
    assert feed.units() == [([(None, 7)], None), ([("1", 1)], 10), ([(None, 8)], None)]


def test_an_empty_transaction() -> None:
    (unit,) = Feed().add(TOLD, Boundary("1", 10, True, {})).assembler.units()
    assert unit == Unit([], {TOLD: 1}, 10)


def test_memory_is_bounded() -> None:
    feed = Feed(limit_bytes=25).add(LEFT, event("1", 1), event("1", 2))
    assert feed.units() == []
    feed.add(LEFT, event("1", 3))
    with pytest.raises(ConfigurationError, match="30 bytes of events wait"):
        feed.units()


def begin(xid: str, lsn: int) -> Boundary:
    return Boundary(xid, lsn, False, {})


def test_a_large_transaction_comes_in_parts() -> None:
    feed = Feed(held_bytes=15).add(TOLD, begin("1", 10)).add(LEFT, event("1", 1), event("1", 3))
    (part,) = feed.assembler.units()
    assert part == Unit([event("1", 1)], {LEFT: 1}, None, open=True)
    assert feed.assembler.is_open
    feed.add(RIGHT, event("1", 2))
    assert feed.units() == [([("1", 2), ("1", 3)], None)]
    feed.add(LEFT, event("1", 4)).add(TOLD, end("1", 10, 4))
    (rest,) = feed.assembler.units()
    assert rest == Unit([event("1", 4)], {LEFT: 3, TOLD: 2}, 10)
    assert not feed.assembler.is_open


def test_parts_told_again_are_left_out() -> None:
    feed = Feed(held_bytes=5).add(TOLD, begin("1", 10)).add(LEFT, event("1", 1), event("1", 2))
    assert feed.units() == [([("1", 1), ("1", 2)], None)]
    # The shipper was killed, and tells the transaction from its beginning.
    feed.add(TOLD, begin("1", 10)).add(LEFT, event("1", 1), event("1", 2), event("1", 3)).add(TOLD, end("1", 10, 3))
    assert feed.units() == [([("1", 3)], 10)]


def test_what_was_applied_is_not_told_in_parts() -> None:
    feed = Feed(applied_lsn=10, held_bytes=5).add(TOLD, begin("1", 10)).add(LEFT, event("1", 1), event("1", 2))
    assert feed.units() == []


def test_a_transaction_that_was_told_in_part_must_end() -> None:
    feed = Feed(held_bytes=5).add(TOLD, begin("1", 10)).add(LEFT, event("1", 1))
    assert feed.units() == [([("1", 1)], None)]
    with pytest.raises(GapError, match="only a part was told"):
        feed.add(TOLD, end("2", 20, 0)).units()


@pytest.mark.parametrize("seed", range(200))
def test_every_transaction_comes_once_however_often_told(seed: int) -> None:
    """Shippers that are killed at random; partitions that are read at random."""
    dice = random.Random(seed)
    sizes = [dice.randint(1, 4) for _ in range(dice.randint(1, 6))]
    told: dict[Place, list[Event | Boundary]] = {LEFT: [], RIGHT: [], TOLD: []}
    start = 0
    while start < len(sizes):
        # One shipper: goes on after the last position kept, and is killed within the last transaction it tells.
        until = dice.randint(start + 1, len(sizes))
        for number in range(start, until):
            events = [event(str(number), order) for order in range(1, sizes[number] + 1)]
            cut = dice.randint(0, len(events)) if number == until - 1 else len(events)
            for each in events[:cut]:
                told[LEFT if each.order % 2 else RIGHT].append(each)
            if cut == len(events):
                told[TOLD].append(end(str(number), 10 * number + 10, len(events)))
        start = dice.randint(start, until if cut == len(events) else until - 1)
    feed = Feed()
    got = []
    while any(told.values()):
        place = dice.choice([place for place, items in told.items() if items])
        feed.add(place, told[place].pop(0))
        got += feed.units()
    assert got == [([(str(n), o) for o in range(1, size + 1)], 10 * n + 10) for n, size in enumerate(sizes)]


# Partitions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "hashed"),
    # Kafka's own expectations of its murmur2.
    [(b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536),
     (b"a-little-bit-longer-string", -1486304829), (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
     (b"abc", 479470107)],
)  # fmt: skip
def test_keys_go_where_every_kafka_client_puts_them(key: bytes, hashed: int) -> None:
    assert murmur2(key) == hashed & 0xFFFFFFFF
    assert partition_of(key, 7) == (hashed & 0x7FFFFFFF) % 7


@given(st.none() | st.binary(), st.none() | st.binary(), st.lists(st.tuples(st.text(max_size=5), st.binary())))
def test_packing(key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes]]) -> None:
    assert unpack(pack(key, value, tuple(headers))) == (key, value, tuple(headers))


@given(st.binary(max_size=40))
def test_unpacking_anything(body: bytes) -> None:
    with suppress(DecodeError):
        unpack(body)


def test_packed_events_have_places(tmp_path: Any) -> None:
    from cdc.brokers.embedded import EmbeddedBroker
    from cdc.events import EventRecord

    broker = PackedEvents(EmbeddedBroker(tmp_path / "log"), partitions=2)
    broker.publish([EventRecord("p.t", bytes([n]), b"v", (("h", b"1"),)) for n in range(20)])
    broker.publish([EventRecord("p.transaction", b"k", None)])
    assert broker.places() == [Place("p.t", 0), Place("p.t", 1), Place("p.transaction", 0)]
    assert broker.bounds(Place("p.transaction", 0)) == (0, 1)
    got = broker.fetch({Place("p.t", 0): 1, Place("p.t", 1): 0}, limit_bytes=1 << 20, wait_s=0)
    assert len(got) == 19
    assert got[0].headers == (("h", b"1"),)
    broker.close()
