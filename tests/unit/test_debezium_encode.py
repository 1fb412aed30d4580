"""Batches to records, against expectations written by hand from Debezium's documentation."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from struct import pack
from typing import Any

import pytest

import cdc
from cdc.debezium.encode import Encoder, EventOptions
from cdc.debezium.schema import Modes, key_columns
from cdc.errors import DecodeError, SchemaError
from cdc.events import EventRecord
from cdc.position import Position
from cdc.record import Batch, ChunkPlan, Column, Format, Fragment, ImageHead, Kind, Relation, TransactionHead
from cdc.wire import oids
from cdc.wire.copy import text_line

GOLDEN = Path(__file__).parents[1] / "wire" / "golden_debezium"
NOW_US, COMMITTED_US = 1700000000200123, 1700000000123456
START, END = Position("7300000000000000001/d", 1, 24023119), Position("7300000000000000001/d", 1, 24023128)
T = Relation(
    16384,
    "public",
    "t",
    "d",
    (
        Column("id", oids.INT4, key=True, not_null=True),
        Column("name", oids.TEXT),
        Column("price", oids.NUMERIC, (6 << 16 | 2) + 4, not_null=True),
    ),
    ("id",),
)
FULL = replace(T, identity="f", columns=tuple(replace(c, key=True) for c in T.columns))
NO_KEY = replace(T, identity="n", columns=tuple(replace(c, key=False) for c in T.columns), primary_key=())
PLAIN = EventOptions("p", schemas=False)
TOLD = replace(PLAIN, transactions=True)


class _Unchanged:
    pass


UNCHANGED = _Unchanged()
Cell = str | None | _Unchanged


def row(*values: Cell) -> bytes:
    """TupleData in text form."""
    return pack(">H", len(values)) + b"".join(map(_cell, values))


def _cell(value: Cell) -> bytes:
    if value is None:
        return b"n"
    return b"u" if isinstance(value, _Unchanged) else b"t" + pack(">I", len(value.encode())) + value.encode()


def insert(after: bytes, relation: int = T.id) -> bytes:
    return b"I" + pack(">I", relation) + b"N" + after


def update(after: bytes, before: bytes = b"", relation: int = T.id) -> bytes:
    """``before`` with its kind, K or O, in front."""
    return b"U" + pack(">I", relation) + before + b"N" + after


def delete(before: bytes, relation: int = T.id) -> bytes:
    return b"D" + pack(">I", relation) + before


def log(
    *messages: bytes, relations: Sequence[Relation] = (T,), end: Position = END, start: Position = START, xid: int = 555
) -> Batch:
    """A batch of one transaction."""
    head = TransactionHead(end.lsn, xid, COMMITTED_US, len(messages))
    lengths = [len(message) for message in messages]
    return Batch("s", Format.LOGICAL, Kind.LOG, start, end, tuple(relations), (head,), lengths, b"".join(messages))


def encode(batch: Batch, options: EventOptions = PLAIN) -> list[EventRecord]:
    return Encoder(options).encode(batch, NOW_US)


def parsed(record: EventRecord) -> tuple[Any, Any]:
    key, value = record.key, record.value
    return key and json.loads(key), value and json.loads(value)


def golden(name: str) -> dict[str, bytes]:
    """The parts of a record as they must be, byte for byte."""
    lines = json.loads((GOLDEN / f"{name}.json").read_text())
    return {
        part: json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        .replace("VERSION", cdc.__version__)
        .encode()
        for part, content in lines.items()
    }


def test_an_update_with_its_schemas() -> None:
    (record,) = encode(log(update(row("1", "a", "12.34"))), EventOptions("p"))
    assert record.topic == "p.public.t"
    assert {"key": record.key, "value": record.value} == golden("update")
    assert not record.headers


def test_a_transaction_is_told() -> None:
    options = EventOptions("p", transactions=True)
    begin, *_, end = encode(log(insert(row("1", "a", "1.00")), insert(row("2", None, "1.00"))), options)
    assert (begin.topic, end.topic) == ("p.transaction", "p.transaction")
    assert {"key": end.key, "value": end.value} == golden("transaction_end")
    assert parsed(begin)[1]["payload"] == {
        "status": "BEGIN", "id": "555:24023128", "event_count": None, "data_collections": None, "ts_ms": 1700000000123,
    }  # fmt: skip


def test_a_heartbeat() -> None:
    (record,) = encode(Batch("s", Format.LOGICAL, Kind.HEARTBEAT, START, END), EventOptions("p"))
    assert record.topic == "__debezium-heartbeat.p"
    assert {"key": record.key, "value": record.value} == golden("heartbeat")


def test_a_message() -> None:
    message = b"M\x01" + pack(">Q", 24023000) + b"audit\0" + pack(">I", 2) + b"hi"
    (record,) = encode(log(message), EventOptions("p"))
    expected = golden("message")
    assert record.topic == "p.message"
    assert record.key == expected["key"]
    schema = json.loads(record.value or b"")["schema"]
    assert [f["field"] for f in schema["fields"]] == ["op", "ts_ms", "source", "transaction", "message"]
    assert schema["name"] == "io.debezium.connector.postgresql.MessageValue"
    assert (record.value or b"").endswith(expected["value"][1:])


def test_inserts_updates_and_deletes() -> None:
    records = encode(
        log(insert(row("1", None, "1.00")), update(row("1", "b", "2.00")), delete(b"K" + row("1", None, None)))
    )
    (key, c), (_, u), (_, d), (tombstone_key, tombstone) = map(parsed, records)
    assert key == tombstone_key == {"id": 1}
    assert tombstone is None
    assert (c["op"], c["before"], c["after"]) == ("c", None, {"id": 1, "name": None, "price": "ZA=="})
    assert (u["op"], u["before"], u["after"]["name"]) == ("u", None, "b")
    # Of a key alone the rest is what its type falls back to: null, or zero where a column may not be null.
    assert (d["op"], d["before"], d["after"]) == ("d", {"id": 1, "name": None, "price": "AA=="}, None)
    assert all(event["source"]["lsn"] == END.lsn for event in (c, u, d))


def test_no_tombstones_on_request() -> None:
    assert len(encode(log(delete(b"K" + row("1", None, None))), replace(PLAIN, tombstones=False))) == 1


def test_a_key_change_is_a_delete_and_a_create() -> None:
    changed = update(row("2", "a", "1.00"), b"K" + row("1", None, None))
    begin, deleted, tombstone, created, end = encode(log(changed), TOLD)
    assert parsed(deleted)[0] == parsed(tombstone)[0] == {"id": 1}
    assert deleted.headers == (("__debezium.newkey", b'{"id":2}'),)
    assert parsed(created)[0] == {"id": 2}
    assert created.headers == (("__debezium.oldkey", b'{"id":1}'),)
    assert [parsed(r)[1]["op"] for r in (deleted, created)] == ["d", "c"]
    assert parsed(created)[1]["before"] is None
    assert [parsed(r)[1]["transaction"]["total_order"] for r in (deleted, created)] == [1, 2]
    assert tombstone.value is None
    assert parsed(end)[1]["event_count"] == 2
    assert parsed(begin)[1]["status"] == "BEGIN"


def test_a_full_before_image_fills_what_did_not_change() -> None:
    changed = update(row("1", UNCHANGED, "2.00"), b"O" + row("1", "long", "1.00"))
    (record,) = encode(log(changed, relations=[FULL]))
    value = parsed(record)[1]
    assert value["before"] == {"id": 1, "name": "long", "price": "ZA=="}
    assert value["after"] == {"id": 1, "name": "long", "price": "AMg="}


def test_an_unchanged_value_is_a_placeholder() -> None:
    (record,) = encode(log(update(row("1", UNCHANGED, "2.00"))))
    assert parsed(record)[1]["after"]["name"] == "__debezium_unavailable_value"
    with pytest.raises(SchemaError, match=r"'price' of public\.t did not change"):
        encode(log(update(row("1", "a", UNCHANGED))))


def test_a_row_under_a_new_key_must_be_whole() -> None:
    with pytest.raises(SchemaError, match="does not carry name") as caught:
        encode(log(update(row("2", UNCHANGED, "2.00"), b"K" + row("1", None, None))))
    assert "REPLICA IDENTITY FULL" in caught.value.remedy


def test_a_table_without_a_key() -> None:
    (record,) = encode(log(insert(row("1", None, "1.00")), relations=[NO_KEY]))
    assert record.key is None


def test_which_columns_are_the_key() -> None:
    a, b, c = Column("a", 23, key=True), Column("b", 23), Column("c", 23, key=True)
    swapped = Relation(1, "s", "t", "d", (a, b, c), ("c", "a"))
    assert key_columns(swapped) == (2, 0)
    # An index is the identity and the log does not carry the primary key: the index it is.
    assert key_columns(replace(swapped, identity="i", primary_key=("b",))) == (0, 2)
    assert key_columns(replace(swapped, primary_key=())) == (0, 2)
    assert key_columns(replace(swapped, identity="f", primary_key=())) == ()


def test_truncate_is_skipped_unless_wanted() -> None:
    message = b"T" + pack(">IBI", 1, 0, T.id)
    assert encode(log(message)) == []
    (record,) = encode(log(message), replace(PLAIN, skipped=""))
    key, value = parsed(record)
    assert key is None
    assert (value["op"], value["before"], value["after"]) == ("t", None, None)


def test_an_origin_is_named() -> None:
    origin = b"O" + pack(">Q", 77) + b"elsewhere\0"
    (record,) = encode(log(origin, insert(row("1", None, "1.00"))))
    source = parsed(record)[1]["source"]
    assert (source["origin"], source["origin_lsn"]) == ("elsewhere", 77)


def test_a_large_transaction_goes_on_over_its_fragments() -> None:
    encoder = Encoder(TOLD)
    whole = log(insert(row("1", None, "1.00")))
    first = encoder.encode(replace(whole, fragment=Fragment(0, False)), NOW_US)
    last = encoder.encode(replace(whole, fragment=Fragment(1, True)), NOW_US)
    assert [r.topic for r in first] == ["p.transaction", "p.public.t"]
    assert [r.topic for r in last] == ["p.public.t", "p.transaction"]
    assert parsed(last[0])[1]["transaction"] == {"id": "555:24023128", "total_order": 2, "data_collection_order": 2}
    assert parsed(last[1])[1]["event_count"] == 2


def test_a_fragment_begun_anew_counts_anew() -> None:
    encoder = Encoder(TOLD)
    whole = log(insert(row("1", None, "1.00")))
    encoder.encode(replace(whole, fragment=Fragment(0, False)), NOW_US)
    again = encoder.encode(replace(whole, fragment=Fragment(0, False)), NOW_US)
    assert parsed(again[0])[1]["status"] == "BEGIN"
    assert parsed(again[1])[1]["transaction"]["total_order"] == 1


def test_the_next_transaction_names_the_commit_before_it() -> None:
    one = log(insert(row("1", None, "1.00")))
    batch = replace(
        one,
        transactions=(one.transactions[0], TransactionHead(END.lsn + 8, 556, COMMITTED_US, 1)),
        lengths=[*one.lengths, *one.lengths],
        body=one.body * 2,
        position=END.at(END.lsn + 8),
    )
    assert [json.loads(parsed(r)[1]["source"]["sequence"]) for r in encode(batch)] == [
        ["24023119", "24023128"],
        ["24023128", "24023136"],
    ]


def chunk(relation: Relation, number: int, *rows: Sequence[str | None], last: bool = True) -> Batch:
    body = b"".join(text_line(values) + b"\n" for values in rows)
    head = ImageHead("i", number, START.lsn, number, relation.id, len(rows), "text")
    return Batch(
        "s",
        Format.LOGICAL,
        Kind.IMAGE_CHUNK,
        START,
        START,
        (relation,),
        body=body,
        image=head,
        fragment=Fragment(0, last),
    )


def test_an_image_says_which_row_is_first_and_last() -> None:
    other = replace(T, id=16385, name="u")
    encoder = Encoder(PLAIN)
    plan = (ChunkPlan(T.id, (("2",),)), ChunkPlan(other.id, ()))
    begin = Batch(
        "s", Format.LOGICAL, Kind.IMAGE_BEGIN, START, START, (T, other), plan=plan, image=ImageHead("i", 0, START.lsn)
    )
    assert encoder.encode(begin, NOW_US) == []
    rows: list[list[str | None]] = [["1", "a", "1.00"], ["2", "b", "1.00"], ["3", None, "1.00"]]
    records = [
        record
        for batch in (chunk(T, 0, rows[0]), chunk(other, 1, *rows), chunk(T, 2, *rows[1:]))
        for record in encoder.encode(batch, NOW_US)
    ]
    told = [(r.topic, parsed(r)[1]["source"]["snapshot"]) for r in records]
    assert told == [
        ("p.public.t", "first"),
        ("p.public.u", "first_in_data_collection"),
        ("p.public.u", "true"),
        ("p.public.u", "last_in_data_collection"),
        ("p.public.t", "true"),
        ("p.public.t", "last"),
    ]
    value = parsed(records[0])[1]
    assert (value["op"], value["before"], value["after"]["id"]) == ("r", None, 1)
    assert (value["source"]["lsn"], value["source"]["txId"]) == (START.lsn, None)
    assert parsed(records[0])[0] == {"id": 1}


def test_a_column_name_with_a_percent_sign() -> None:
    odd = replace(T, columns=(*T.columns, Column('100% "x"', oids.TEXT)))
    (record,) = encode(log(insert(row("1", None, "1.00", "y")), relations=[odd]))
    assert parsed(record)[1]["after"]['100% "x"'] == "y"


@pytest.mark.parametrize(
    "message", [insert(row("1", "2")), insert(row("1", "2", "3"), relation=9), insert(row("x", "2", "3.00"))]
)
def test_malformed_batches(message: bytes) -> None:
    with pytest.raises(DecodeError):
        encode(log(message))


def test_another_placeholder() -> None:
    (record,) = encode(log(update(row("1", UNCHANGED, "1.00"))), replace(PLAIN, modes=Modes(placeholder="gone")))
    assert parsed(record)[1]["after"]["name"] == "gone"
