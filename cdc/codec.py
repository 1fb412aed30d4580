"""Batches to bytes and back: the envelope every topic holds, whatever the broker.

::

    "CDC" version:u8 crc32:u32 header_length:u32 relations_length:u32 | header | relations | payload

Integers are little-endian; the checksum covers all that follows it. The header is one JSON object, the relations are
JSON objects, one a line. The payload of a log batch is two counts, the table of its transactions, the lengths of its
messages, and the messages; that of an image chunk is COPY data. A reader ignores header fields it does not know and
refuses a version it does not know, so that followers can be upgraded before leaders.
"""

import json
import struct
import sys
import zlib
from array import array
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

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

VERSION: Final = 1
_MAGIC: Final = b"CDC"
_PREFIX: Final = struct.Struct("<3sBIII")
_CRC_FROM: Final = 8
_COUNTS: Final = struct.Struct("<II")
_HEAD: Final = struct.Struct("<QIqI")
_REMEMBERED_BYTES: Final = 64 << 10  # a description up to here is kept for the next batch
_LENGTHS: Final = "I"  # four bytes on every platform CPython runs on


def relation_json(relation: Relation) -> dict[str, Any]:
    """A relation as plain JSON values; fields at their default are left out."""
    return {
        "id": relation.id,
        "schema": relation.schema,
        "name": relation.name,
        "identity": relation.identity,
        "columns": [_column_json(column) for column in relation.columns],
        "primary_key": list(relation.primary_key),
        "types": [
            {"oid": t.oid, "schema": t.schema, "name": t.name, "kind": t.kind, "base": t.base, "labels": list(t.labels)}
            for t in relation.types
        ],
    }


def _column_json(column: Column) -> dict[str, Any]:
    optional = {
        "key": column.key or None,
        "not_null": column.not_null or None,
        "number": column.number,
        "missing": column.missing,
        "untold": column.untold or None,
        "modifier": None if column.modifier == -1 else column.modifier,
    }
    return {"name": column.name, "type": column.type_oid} | {k: v for k, v in optional.items() if v is not None}


def relation_from_json(value: Mapping[str, Any]) -> Relation:
    """The inverse of :func:`relation_json`.

    :raises KeyError, TypeError, ValueError, OverflowError: the value is not of that shape.
    """
    return Relation(
        int(value["id"]),
        str(value["schema"]),
        str(value["name"]),
        str(value["identity"]),
        tuple(
            Column(
                str(c["name"]),
                int(c["type"]),
                int(c.get("modifier", -1)),
                bool(c.get("key", False)),
                bool(c.get("not_null", False)),
                None if c.get("number") is None else int(c["number"]),
                None if c.get("missing") is None else str(c["missing"]),
                bool(c.get("untold", False)),
            )
            for c in value["columns"]
        ),
        tuple(map(str, value.get("primary_key", ()))),
        tuple(
            TypeDescription(int(t["oid"]), t["schema"], t["name"], t["kind"], int(t["base"]), tuple(t["labels"]))
            for t in value.get("types", ())
        ),
    )


def progress_json(progress: ImageProgress) -> dict[str, Any]:
    """An image's progress as plain JSON values."""
    return {"id": progress.id, "sequence": progress.sequence, "tables": {str(k): v for k, v in progress.tables.items()}}


def progress_from_json(value: Mapping[str, Any]) -> ImageProgress:
    """The inverse of :func:`progress_json`."""
    tables = {int(k): (int(low), int(high)) for k, (low, high) in value["tables"].items()}
    return ImageProgress(str(value["id"]), int(value["sequence"]), tables)


class EnvelopeCodec:
    """The native codec. Keeps the text of relations it has written, since batch after batch names the same ones."""

    name: Final = "cdc"

    def __init__(self) -> None:
        self._written: dict[int, tuple[Relation, bytes]] = {}

    def encode(self, batch: Batch) -> bytes:
        header = json.dumps(_header(batch), separators=(",", ":"), ensure_ascii=False).encode()
        relations = b"\n".join([self._relation(relation) for relation in batch.relations])
        parts = [header, relations]
        if batch.kind is Kind.LOG:
            lengths = array(_LENGTHS, batch.lengths)
            if sys.byteorder == "big":
                lengths.byteswap()
            parts += [
                _COUNTS.pack(len(batch.transactions), len(lengths)),
                b"".join([_HEAD.pack(*head) for head in batch.transactions]),
                lengths.tobytes(),
            ]
        parts.append(batch.body)
        sizes = struct.pack("<II", len(header), len(relations))
        crc = zlib.crc32(sizes)
        for part in parts:
            crc = zlib.crc32(part, crc)
        return b"".join([_MAGIC, bytes([VERSION]), crc.to_bytes(4, "little"), sizes, *parts])

    def _relation(self, relation: Relation) -> bytes:
        known = self._written.get(relation.id)
        if known is not None and known[0] is relation:
            return known[1]
        text = json.dumps(relation_json(relation), separators=(",", ":"), ensure_ascii=False).encode()
        self._written[relation.id] = (relation, text)
        return text

    def decode(self, body: bytes) -> Batch:
        header, relations, at = _open(body)
        try:
            return _batch(header, relations, body, at)
        except DecodeError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise DecodeError(f"batch header is not one of ours: {error!r}") from error


def _header(batch: Batch) -> dict[str, Any]:
    previous, position = batch.previous, batch.position
    header: dict[str, Any] = {
        "stream": batch.stream,
        "format": batch.format.value,
        "kind": batch.kind.value,
        "source": position.source,
        "previous": [previous.epoch, previous.lsn],
        "position": [position.epoch, position.lsn],
    }
    if batch.fragment is not None:
        header["fragment"] = list(batch.fragment)
    if batch.image is not None:
        header["image"] = batch.image._asdict()
    if batch.plan:
        header["plan"] = [[plan.relation_id, plan.bounds] for plan in batch.plan]
    return header


def _open(body: bytes) -> tuple[bytes, bytes, int]:
    """Check the envelope and return header, relations, and where the payload begins."""
    if len(body) < _PREFIX.size:
        raise DecodeError(f"batch of {len(body)} bytes is shorter than its envelope of {_PREFIX.size}")
    magic, version, crc, header_length, relations_length = _PREFIX.unpack_from(body)
    if magic != _MAGIC:
        raise DecodeError(
            f"not a batch of ours: begins with {body[:4].hex(' ')}",
            remedy="check that the topic is one that `cdc ship` writes",
        )
    if version != VERSION:
        raise DecodeError(
            f"batch is of version {version}, this program reads version {VERSION}",
            remedy="upgrade this program: followers are upgraded before leaders",
        )
    payload = _PREFIX.size + header_length + relations_length
    if payload > len(body):
        raise DecodeError(f"batch claims {payload} bytes of header, {len(body)} are there")
    actual = zlib.crc32(memoryview(body)[_CRC_FROM:])
    if actual != crc:
        raise DecodeError(f"batch checksum is {actual:08x}, should be {crc:08x}")
    at = _PREFIX.size
    return body[at : at + header_length], body[at + header_length : payload], payload


def _batch(header_text: bytes, relations: bytes, body: bytes, at: int) -> Batch:
    header = json.loads(header_text)
    source = header["source"]
    kind = Kind(header["kind"])
    transactions: tuple[TransactionHead, ...] = ()
    lengths: array[int] | tuple[int, ...] = ()
    if kind is Kind.LOG:
        transactions, lengths, at = _log(body, at)
    fragment = header.get("fragment")
    image = header.get("image")
    return Batch(
        stream=str(header["stream"]),
        format=Format(header["format"]),
        kind=kind,
        previous=_position(source, header["previous"]),
        position=_position(source, header["position"]),
        relations=tuple(map(_read_relation, relations.split(b"\n"))) if relations else (),
        transactions=transactions,
        lengths=lengths,
        body=body[at:],
        fragment=None if fragment is None else Fragment(int(fragment[0]), bool(fragment[1])),
        image=None if image is None else _image(image),
        plan=tuple(ChunkPlan(int(r), tuple(tuple(map(str, b)) for b in bs)) for r, bs in header.get("plan", ())),
    )


def _image(value: Mapping[str, Any]) -> ImageHead:
    form = value.get("form", "binary")
    if form not in ("binary", "text"):
        raise DecodeError(f"image of an unknown form {form!r}")
    chunk, relation_id, rows = (int(value.get(name, 0)) for name in ("chunk", "relation_id", "rows"))
    id_, sequence, lsn = str(value["id"]), int(value["sequence"]), int(value["lsn"])
    return ImageHead(id_, sequence, lsn, chunk, relation_id, rows, "text" if form == "text" else "binary")


def _position(source: str, pair: list[int]) -> Position:
    epoch, lsn = pair
    if not (isinstance(source, str) and isinstance(epoch, int) and isinstance(lsn, int) and 0 <= lsn < 1 << 64):
        raise DecodeError(f"not a position: {pair!r} of {source!r}")
    return Position(source, epoch, lsn)


def _log(body: bytes, at: int) -> tuple[tuple[TransactionHead, ...], "array[int]", int]:
    if len(body) - at < _COUNTS.size:
        raise DecodeError(f"log batch ends at byte {len(body)}, before its counts")
    heads, messages = _COUNTS.unpack_from(body, at)
    start = at + _COUNTS.size
    middle = start + heads * _HEAD.size
    end = middle + messages * 4
    if end > len(body):
        raise DecodeError(f"log batch claims {heads} transactions and {messages} messages, past its {len(body)} bytes")
    transactions = tuple(map(TransactionHead._make, _HEAD.iter_unpack(body[start:middle])))
    lengths = array(_LENGTHS, body[middle:end])
    if sys.byteorder == "big":
        lengths.byteswap()
    if 0 in lengths:
        raise DecodeError(f"log batch has an empty message, the {lengths.index(0)}-th")
    if sum(lengths) != len(body) - end:
        raise DecodeError(f"log batch has {len(body) - end} bytes of messages, their lengths add up to {sum(lengths)}")
    if sum(head.messages for head in transactions) != messages:
        raise DecodeError(f"log batch has {messages} messages, its transactions claim another number")
    return transactions, lengths, end


def _read_relation(line: bytes) -> Relation:
    return _remembered(line) if len(line) <= _REMEMBERED_BYTES else relation_from_json(json.loads(line))


@lru_cache(maxsize=1024)
def _remembered(line: bytes) -> Relation:
    return relation_from_json(json.loads(line))
