"""The envelope: what goes in comes out, and nothing else does."""

import json
import struct
import zlib
from array import array
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc.codec import EnvelopeCodec, progress_from_json, progress_json, relation_from_json, relation_json
from cdc.errors import DecodeError
from cdc.position import Position
from cdc.record import (
    Batch,
    ChunkPlan,
    Column,
    Format,
    Fragment,
    ImageHead,
    ImageProgress,
    Kind,
    Relation,
    TransactionHead,
    TypeDescription,
)

_PREFIX = struct.Struct("<3sBIII")

_U32 = st.integers(0, 2**32 - 1)
_U64 = st.integers(0, 2**64 - 1)
_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)

_COLUMNS = st.builds(
    Column,
    _TEXT,
    _U32,
    st.integers(-(2**31), 2**31 - 1),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(1, 1600),
    st.none() | _TEXT,
)
_TYPES = st.builds(
    TypeDescription,
    _U32,
    _TEXT,
    _TEXT,
    st.sampled_from(["base", "array", "enum", "domain", "range", "multirange", "composite"]),
    _U32,
    st.lists(_TEXT, max_size=3).map(tuple),
)
_RELATIONS = st.builds(
    Relation,
    _U32,
    _TEXT,
    _TEXT,
    st.sampled_from("dnfi"),
    st.lists(_COLUMNS, max_size=4).map(tuple),
    st.lists(_TEXT, max_size=2).map(tuple),
    st.lists(_TYPES, max_size=2).map(tuple),
)
_PROGRESS = st.builds(
    ImageProgress, _TEXT, st.integers(-1, 9), st.dictionaries(_U32, st.tuples(_U64, _U64), max_size=3)
)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    source, epochs = draw(_TEXT), st.integers(0, 2**32 - 1)
    kind = draw(st.sampled_from(Kind))
    empty = Batch(
        draw(_TEXT),
        draw(st.sampled_from(Format)),
        kind,
        Position(source, draw(epochs), draw(_U64)),
        Position(source, draw(epochs), draw(_U64)),
        draw(st.lists(_RELATIONS, max_size=2).map(tuple)),
        fragment=draw(st.none() | st.builds(Fragment, _U32, st.booleans())),
    )
    if kind is Kind.LOG:
        messages = draw(st.lists(st.binary(min_size=1, max_size=9), max_size=6))
        cuts = sorted(draw(st.lists(st.integers(0, len(messages)), max_size=3))) if messages else []
        spans = [high - low for low, high in zip([0, *cuts], [*cuts, len(messages)], strict=True)]
        heads = [TransactionHead(draw(_U64), draw(_U32), draw(st.integers(-(2**63), 2**63 - 1)), n) for n in spans]
        body = b"".join(messages)
        return replace(empty, transactions=tuple(heads), lengths=array("I", map(len, messages)), body=body)
    if kind is Kind.HEARTBEAT:
        return empty
    forms: list[Literal["binary", "text"]] = ["binary", "text"]
    form = draw(st.sampled_from(forms))
    image = ImageHead(draw(_TEXT), draw(_U32), draw(_U64), draw(_U32), draw(_U32), draw(_U32), form)
    bounds = st.lists(st.lists(_TEXT, min_size=1, max_size=2).map(tuple), max_size=3).map(tuple)
    plan = draw(st.lists(st.builds(ChunkPlan, _U32, bounds), max_size=2).map(tuple))
    return replace(empty, image=image, plan=plan, body=draw(st.binary(max_size=20)))


def _sample() -> Batch:
    relation = Relation(7, "public", "t", "d", (Column("id", 23, key=True),), ("id",))
    start = Position("leader", 1, 100)
    heads = (TransactionHead(110, 5, 1, 1), TransactionHead(120, 6, 2, 2))
    lengths = array("I", [2, 3, 4])
    return Batch("s", Format.LOGICAL, Kind.LOG, start, start.at(120), (relation,), heads, lengths, b"aabbbcccc")


@given(batches())
def test_what_goes_in_comes_out(batch: Batch) -> None:
    assert EnvelopeCodec().decode(EnvelopeCodec().encode(batch)) == batch


@given(batches(), batches())
def test_one_codec_serves_many_batches(first: Batch, second: Batch) -> None:
    codec = EnvelopeCodec()
    for batch in (first, second, first):
        assert codec.decode(codec.encode(batch)) == batch


def test_a_relation_described_anew_is_written_anew() -> None:
    codec, batch = EnvelopeCodec(), _sample()
    codec.encode(batch)
    wider = replace(batch.relations[0], columns=(*batch.relations[0].columns, Column("v", 25)))
    assert codec.decode(codec.encode(replace(batch, relations=(wider,)))).relations == (wider,)


@settings(max_examples=300)
@given(st.data())
def test_any_flipped_bit_is_found(data: st.DataObject) -> None:
    body = bytearray(EnvelopeCodec().encode(_sample()))
    bit = data.draw(st.integers(0, len(body) * 8 - 1))
    body[bit >> 3] ^= 1 << (bit & 7)
    with pytest.raises(DecodeError):
        EnvelopeCodec().decode(bytes(body))


def test_any_truncation_and_any_addition_is_found() -> None:
    body = EnvelopeCodec().encode(_sample())
    for size in range(len(body)):
        with pytest.raises(DecodeError):
            EnvelopeCodec().decode(body[:size])
    with pytest.raises(DecodeError):
        EnvelopeCodec().decode(body + b"\0")


@given(st.binary(max_size=60))
def test_foreign_bytes_are_refused(body: bytes) -> None:
    for candidate in (body, b"CDC" + body, b"CDC\x01" + body):
        with pytest.raises(DecodeError):
            EnvelopeCodec().decode(candidate)


def sealed(header: bytes, relations: bytes = b"", payload: bytes = b"", version: int = 1) -> bytes:
    """An envelope around anything, with a checksum that is right: what a hostile writer can do."""
    rest = struct.pack("<II", len(header), len(relations)) + header + relations + payload
    return b"CDC" + bytes([version]) + zlib.crc32(rest).to_bytes(4, "little") + rest


def _header(**changes: Any) -> dict[str, Any]:
    header: dict[str, Any] = {
        "stream": "s",
        "format": "logical",
        "kind": "heartbeat",
        "source": "leader",
        "previous": [1, 1],
        "position": [1, 2],
    }
    return header | changes


def _decoded(header: Any, relations: bytes = b"", payload: bytes = b"") -> Batch:
    return EnvelopeCodec().decode(sealed(json.dumps(header).encode(), relations, payload))


def test_an_unknown_version_is_named_even_where_its_form_is_another() -> None:
    with pytest.raises(DecodeError, match="version 9") as caught:
        EnvelopeCodec().decode(sealed(b"whatever version 9 writes", version=9))
    assert "upgrade" in caught.value.remedy


def test_unknown_header_fields_are_ignored() -> None:
    image = {"id": "i", "sequence": 1, "lsn": 2, "colour": "blue"}
    batch = _decoded(_header(kind="image-end", image=image, later={"deep": [1]}))
    assert batch.image == ImageHead("i", 1, 2)
    assert batch.position == Position("leader", 1, 2)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        "text",
        None,
        *[{k: v for k, v in _header().items() if k != missing} for missing in _header()],
        _header(kind="poem"),
        _header(format="poem"),
        _header(source=5),
        _header(position=[1]),
        _header(position=[1, -1]),
        _header(position=[1, 1 << 64]),
        _header(position=["1", "2"]),
        _header(position={"lsn": 1}),
        _header(fragment=[]),
        _header(fragment=[float("inf"), True]),
        _header(fragment=7),
        _header(image=7),
        _header(image={"id": "i"}),
        _header(image={"id": "i", "sequence": "x", "lsn": 1}),
        _header(image={"id": "i", "sequence": [0], "lsn": 1}),
        _header(image={"id": "i", "sequence": float("inf"), "lsn": 1}),
        _header(image={"id": "i", "sequence": 0, "lsn": 1, "form": "poem"}),
        _header(plan=[[1]]),
        _header(plan=7),
        _header(plan=[[float("inf"), []]]),
    ],
)
def test_a_sealed_header_of_another_shape_is_refused(header: Any) -> None:
    with pytest.raises(DecodeError):
        _decoded(header)


@pytest.mark.parametrize(
    "relations",
    [
        b"7",
        b"[]",
        b"{}",
        b"not json",
        b"\xff",
        b"[" * 100_000,
        b'{"id":Infinity,"schema":"s","name":"n","identity":"d","columns":[]}',
        b'{"id":1,"schema":"s","name":"n","identity":"d","columns":[{"name":"a"}]}',
        b'{"id":1,"schema":"s","name":"n","identity":"d","columns":[{"name":"a","type":1,"number":"x"}]}',
        b'{"id":1,"schema":"s","name":"n","identity":"d","columns":[],"types":[{"oid":1}]}',
    ],
)
def test_sealed_relations_of_another_shape_are_refused(relations: bytes) -> None:
    with pytest.raises(DecodeError):
        _decoded(_header(), relations)


@pytest.mark.parametrize("header", [b"", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"9" * 10_000])
def test_sealed_headers_that_are_not_json_are_refused(header: bytes) -> None:
    with pytest.raises(DecodeError):
        EnvelopeCodec().decode(sealed(header))


@given(_U32, _U32, st.binary(max_size=64))
def test_counts_past_the_end_are_refused_at_once(heads: int, messages: int, rest: bytes) -> None:
    payload = struct.pack("<II", heads, messages) + rest
    if heads * 24 + messages * 4 > len(rest):
        with pytest.raises(DecodeError):
            _decoded(_header(kind="log"), payload=payload)
    with pytest.raises(DecodeError):
        _decoded(_header(kind="log"), payload=payload[:7])


@pytest.mark.parametrize(
    ("lengths", "messages"), [([3, 3], 2), ([5], 2), ([2, 3], 1), ([2, 3], 3), ([2**32 - 1, 6], 2), ([0, 5], 2)]
)
def test_lengths_and_heads_must_add_up(lengths: list[int], messages: int) -> None:
    head = struct.pack("<QIqI", 9, 1, 1, messages)
    payload = struct.pack("<II", 1, len(lengths)) + head + array("I", lengths).tobytes() + b"aabbb"
    with pytest.raises(DecodeError):
        _decoded(_header(kind="log"), payload=payload)


def test_lengths_that_claim_more_than_the_envelope_holds() -> None:
    body = _PREFIX.pack(b"CDC", 1, 0, 2**32 - 1, 2**32 - 1)
    with pytest.raises(DecodeError, match="claims"):
        EnvelopeCodec().decode(body)


@given(_RELATIONS)
def test_a_relation_as_json_and_back(relation: Relation) -> None:
    assert relation_from_json(json.loads(json.dumps(relation_json(relation)))) == relation


@given(_PROGRESS)
def test_progress_as_json_and_back(progress: ImageProgress) -> None:
    assert progress_from_json(json.loads(json.dumps(progress_json(progress)))) == progress
