"""What Debezium told of the same changes, beside what we tell: equal, but for what is listed here with its reason."""

import base64
import gzip
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cdc.codec import EnvelopeCodec
from cdc.debezium.encode import Encoder, EventOptions
from cdc.events import EventRecord

GOLDEN = Path(__file__).parents[1] / "wire" / "golden_debezium"
FORMS = ("schemas", "bare")
NOW_US = 1_700_000_000_000_000

OF_A_RUN = {
    "source.version": "each names itself",
    "source.lsn": "we know the end of the commit, Debezium that of each change",
    "source.sequence": "made of the same",
    "source.ts_ms": "of an image's rows: when they were read",
    "source.ts_us": "likewise",
    "source.ts_ns": "likewise",
    "source.txId": "of an image's rows: Debezium tells a transaction that did nothing, we tell none",
    "source.snapshot": "first and last depend on the order in which the tables are read",
    "ts_ms": "when the event was made",
    "ts_us": "likewise",
    "ts_ns": "likewise",
    "transaction.id": "the part behind the colon is an LSN",
}
"""Fields that no two runs agree in, or that hold an LSN."""

DELIBERATE = {
    ("p.public.kinds", "after.free.scale"): "PostgreSQL's 1.50 is not its 1.5; Debezium drops trailing zeros",
    ("p.public.kinds", "after.free.value"): "likewise",
    ("p.public.defaults", "after.n"): "the row holds NULL; Connect puts the column's default there, which loses it",
    ("p.transaction", "id"): "the part behind the colon is an LSN",
    ("p.transaction", "data_collections.data_collection"): "of messages: Debezium writes the name of a Java object",
}
DELIBERATE_IN_SCHEMAS = {
    ("p.public.defaults", "default"): "the log knows no defaults, and a default in the schema turns NULL into itself",
    ("p.public.kinds", "default"): "likewise",
    ("p.public.kinds", "parameters.allowed"): "a comma in an enum's label is escaped, as Debezium does from 3.7 on",
    ("p.public.required", "parameters.allowed"): "likewise",
}
HEADERS = "__debezium.context."
"""Debezium 3.5 tells in each record's headers which task of which connector wrote it; there is no such thing here."""
WITHOUT_KEY = "p.public.keyless"
"""Debezium writes a tombstone for a row without a key as well, which has neither key nor value and says nothing."""


@cache
def recorded(form: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(gzip.decompress((GOLDEN / f"recorded_{form}.json.gz").read_bytes()))
    return content


def theirs(form: str) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for record in recorded(form)["records"]:
        if record["topic"] != WITHOUT_KEY or record["value"] is not None:
            found[record["topic"]].append(record)
    return found


def ours(form: str) -> dict[str, list[EventRecord]]:
    encoder = Encoder(EventOptions("p", schemas=form == "schemas", transactions=True, skipped=""))
    codec = EnvelopeCodec()
    found = defaultdict(list)
    for body in recorded(form)["batches"]:
        for record in encoder.encode(codec.decode(base64.b64decode(body)), NOW_US):
            found[record.topic].append(record)
    return found


def pairs(form: str) -> Iterator[tuple[EventRecord, dict[str, Any]]]:
    told, expected = ours(form), theirs(form)
    for topic in sorted(expected.keys() | told.keys()):
        if not topic.startswith("__debezium-heartbeat"):  # how many there are is a matter of time
            assert len(told[topic]) == len(expected[topic]), topic
            yield from zip(told[topic], expected[topic], strict=True)


def split(data: str | bytes | None, form: str) -> tuple[Any, Any]:
    """(schema, payload) of a key or a value."""
    whole = None if data is None else json.loads(data)
    return (whole["schema"], whole["payload"]) if form == "schemas" and whole is not None else (None, whole)


def differences(one: Any, other: Any, path: Sequence[str] = ()) -> Iterator[str]:
    """Where two values of JSON differ, also in the order of their fields; list indexes are left out."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in {**one, **other}:
            if name not in one or name not in other:
                yield ".".join([*path, name])
            else:
                yield from differences(one[name], other[name], [*path, name])
        if one.keys() == other.keys() and list(one) != list(other):
            yield ".".join([*path, "order"])
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for mine, its in zip(one, other, strict=True):
            yield from differences(mine, its, path)
    elif one != other or type(one) is not type(other):
        yield ".".join(path)


@pytest.mark.parametrize("form", FORMS)
def test_payloads_are_debeziums(form: str) -> None:
    found = set()
    for record, expected in pairs(form):
        for mine, its in ((record.key, expected["key"]), (record.value, expected["value"])):
            found |= {(record.topic, path) for path in differences(split(mine, form)[1], split(its, form)[1])}
    assert {(topic, path) for topic, path in found if path not in OF_A_RUN} == DELIBERATE.keys()


def test_schemas_are_debeziums() -> None:
    found = set()
    for record, expected in pairs("schemas"):
        for mine, its in ((record.key, expected["key"]), (record.value, expected["value"])):
            here = set(differences(split(mine, "schemas")[0], split(its, "schemas")[0]))
            # The same columns stand in keys, before and after.
            found |= {(record.topic, path.replace("fields.", "")) for path in here}
            if not here and mine is not None:
                assert mine.partition(b',"payload":')[0] == its.encode().partition(b',"payload":')[0]
    assert found == DELIBERATE_IN_SCHEMAS.keys()


@pytest.mark.parametrize("form", FORMS)
def test_headers_are_debeziums(form: str) -> None:
    changed = 0
    for record, expected in pairs(form):
        told = {name: json.loads(content) for name, content in record.headers}
        wanted = {
            name: json.loads(content) for name, content in expected["headers"].items() if not name.startswith(HEADERS)
        }
        assert told == wanted
        changed += bool(told)
    assert changed == 9  # a delete, its tombstone and a create for each of three keys that changed
