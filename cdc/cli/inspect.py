"""``cdc inspect``: what is in a topic, batch by batch, and the changes themselves if asked."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Final

from cdc import registry
from cdc.cli.console import Console, size_text, time_text, without_none
from cdc.cli.options import Settings
from cdc.cli.urls import native_topics, shown
from cdc.codec import EnvelopeCodec
from cdc.errors import CdcError, DecodeError, SchemaError, UsageError
from cdc.ports import Broker
from cdc.position import format_lsn
from cdc.record import NULL, Absent, Batch, Kind, Message, Relation, Value
from cdc.wire import copy, pgoutput
from cdc.wire.values import text_reader

_READ_BYTES: Final = 4 << 20
_UNCHANGED: Final = "<unchanged>"
_OPERATIONS: Final = {"I": "insert", "U": "update", "D": "delete"}

# Shown values: None is NULL; what a row does not have is not in its mapping.
Shown = dict[str, str | None]


def run(settings: Settings) -> int:
    console = Console(settings)
    with closing(registry.broker(settings.broker)(settings.broker, create=False)) as broker:
        every = broker.topics()
        topics, prefixes = native_topics(every)
        if settings.stream is None and (len(topics) != 1 or prefixes):
            _list(console, broker, settings.broker, topics)
            _list_events(console, settings.broker, prefixes)
            return 0
        stream = settings.stream or topics[0]
        if stream in prefixes or stream in set(every) - set(topics):
            raise UsageError(
                f"{stream} of {shown(settings.broker)} holds portable events, no native stream",
                remedy="without --stream they are listed; any consumer of Debezium's JSON can read them",
            )
        if stream not in topics:
            known = ", ".join(topics) or "none"
            raise UsageError(f"{shown(settings.broker)} holds no stream {stream!r}", remedy=f"it holds: {known}")
        _show(console, broker, stream, settings)
    return 0


def _list(console: Console, broker: Broker, url: str, topics: Sequence[str]) -> None:
    for topic in topics:
        first, following = broker.bounds(topic)
        if console.json:
            console.out_json({"stream": topic, "first_offset": first, "next_offset": following})
        else:
            console.out(f"{topic}: offsets {first} to {following}")
    console.note(f"{shown(url)} holds {len(topics)} streams" + ("; choose one with --stream NAME" if topics else ""))


def _list_events(console: Console, url: str, prefixes: Sequence[str]) -> None:
    if not prefixes:
        return
    with closing(registry.event_broker(url)(url, create=False, partitions=None)) as broker:
        for place in broker.places():
            prefix = next((each for each in prefixes if place.topic.startswith(f"{each}.")), None)
            if prefix is None:
                continue
            first, following = broker.bounds(place)
            if console.json:
                console.out_json(
                    {
                        "prefix": prefix,
                        "topic": place.topic,
                        "partition": place.partition,
                        "first_offset": first,
                        "next_offset": following,
                    }
                )
            else:
                console.out(f"{place}: events {first} to {following}")
    console.note(
        f"{shown(url)} holds portable events (debezium-json) under {', '.join(prefixes)}; "
        "apply them with `cdc apply --codec debezium-json --prefix NAME`"
    )


def _show(console: Console, broker: Broker, stream: str, settings: Settings) -> None:
    first, _ = broker.bounds(stream)
    wanted: int | None = getattr(settings, "from")
    start = first if wanted is None else wanted
    for message, batch in _batches(broker, stream, start, settings.limit):
        if console.json:
            console.out_json(
                _batch_json(message, batch) | ({"changes": list(_changes(batch))} if settings.rows else {})
            )
            continue
        console.out(_line(message, batch))
        if settings.rows:
            for change in _changes(batch):
                console.out(f"    {_change_line(change)}")


def _batches(broker: Broker, stream: str, offset: int, limit: int | None) -> Iterator[tuple[Message, Batch]]:
    """:raises DecodeError: a batch is corrupt; the ones before it were yielded."""
    codec, shown_count = EnvelopeCodec(), 0
    while messages := broker.read(stream, offset, limit_bytes=_READ_BYTES, wait_s=0):
        for message in messages:
            if limit is not None and shown_count >= limit:
                return
            try:
                batch = codec.decode(message.body)
            except CdcError as error:
                where = f"(topic {stream!r}, offset {message.offset})"
                raise type(error)(f"{error} {where}", remedy=error.remedy) from error
            yield message, batch
            shown_count += 1
            offset = message.offset + 1


def _batch_json(message: Message, batch: Batch) -> dict[str, Any]:
    image = batch.image
    optional = {
        "fragment": None if batch.fragment is None else {"number": batch.fragment.number, "last": batch.fragment.last},
        "image": None
        if image is None
        else {
            "id": image.id,
            "sequence": image.sequence,
            "chunk": image.chunk,
            "lsn": format_lsn(image.lsn),
            "rows": image.rows,
            "form": image.form,
        },
    }
    return {
        "offset": message.offset,
        "stream": batch.stream,
        "format": batch.format.value,
        "kind": batch.kind.value,
        "source": batch.position.source,
        "epoch": batch.position.epoch,
        "previous": str(batch.previous),
        "position": str(batch.position),
        "transactions": [
            {
                "position": format_lsn(head.lsn),
                "xid": head.xid,
                "committed_us": head.committed_us,
                "messages": head.messages,
            }
            for head in batch.transactions
        ],
        "messages": len(batch.lengths),
        "bytes": len(message.body),
        "relations": [relation.label for relation in batch.relations],
    } | without_none(optional)


def _line(message: Message, batch: Batch) -> str:
    moved = f"{batch.previous} → {batch.position}" if batch.previous != batch.position else f"at {batch.position}"
    parts = [f"{message.offset:>8}  {batch.kind.value:<11}  {moved}"]
    if batch.fragment is not None:
        parts.append(f"fragment {batch.fragment.number}{' (last)' if batch.fragment.last else ''}")
    if batch.transactions:
        last = time_text(batch.transactions[-1].committed_us)
        parts.append(f"{len(batch.transactions)} transactions, {len(batch.lengths)} messages, committed {last}")
    if batch.image is not None and batch.kind is Kind.IMAGE_CHUNK:
        parts.append(f"chunk {batch.image.sequence}, {batch.image.rows} rows at {format_lsn(batch.image.lsn)}")
    parts.append(size_text(len(message.body)))
    if batch.relations:
        parts.append(", ".join(relation.label for relation in batch.relations))
    return "  ".join(parts)


def _changes(batch: Batch) -> Iterator[dict[str, Any]]:
    """What a batch does, in order: the stable form of ``--json --rows``."""
    readers = _Readers()
    if batch.kind is Kind.IMAGE_CHUNK and batch.image is not None:
        relation, form = batch.relations[0], batch.image.form
        forms = (b"b" if form == "binary" else b"t") * len(relation.columns)
        for row in copy.rows(batch.body, form):
            yield {"op": "image", "table": relation.label, "after": readers.row(relation, row, forms)}
        return
    relations = {relation.id: relation for relation in batch.relations}
    heads = iter(batch.transactions)
    left, at, position = 0, 0, ""
    for length in batch.lengths:
        while not left:
            head = next(heads)
            left, position = head.messages, format_lsn(head.lsn)
        body = batch.body[at : at + length]
        yield {"position": position} | _change(body, relations, readers)
        at += length
        left -= 1


def _change(body: bytes, relations: dict[int, Relation], readers: "_Readers") -> dict[str, Any]:
    if body[:1] in (b"I", b"U", b"D"):
        change = pgoutput.decode_change(body)
        relation = _relation(relations, change.relation_id)
        shown_rows: dict[str, Any] = {"op": _OPERATIONS[change.op], "table": relation.label}
        if change.before is not None:
            key_only = change.before_kind == "K"
            shown_rows["key" if key_only else "before"] = readers.row(
                relation, change.before, change.forms, key_only=key_only
            )
        if change.after is not None:
            shown_rows["after"] = readers.row(relation, change.after, change.forms)
        return shown_rows
    message = pgoutput.decode(body)
    if isinstance(message, pgoutput.Truncate):
        tables = [_relation(relations, id_).label for id_ in message.relation_ids]
        return {"op": "truncate", "tables": tables, "cascade": message.cascade, "restart": message.restart_identity}
    if isinstance(message, pgoutput.LogicalMessage):
        content = message.content.decode("utf-8", "backslashreplace")
        return {"op": "message", "prefix": message.prefix, "content": content}
    return {"op": type(message).__name__.lower()}


def _relation(relations: dict[int, Relation], relation_id: int) -> Relation:
    if relation_id not in relations:
        raise DecodeError(f"a change names relation {relation_id}, which its batch does not describe")
    return relations[relation_id]


class _Readers:
    """How each column's value becomes text, made once per relation and batch."""

    def __init__(self) -> None:
        self._binary: dict[tuple[int, int], Callable[[bytes], str]] = {}

    def row(self, relation: Relation, values: Sequence[Value], forms: bytes, *, key_only: bool = False) -> Shown:
        row: Shown = {}
        for index, (column, value) in enumerate(zip(relation.columns, values, strict=True)):
            if not key_only or column.key:
                row[column.name] = self._text(relation, index, value, forms[index])
        return row

    def _text(self, relation: Relation, index: int, value: Value, form: int) -> str | None:
        if isinstance(value, Absent):
            return _UNCHANGED
        if value == NULL:
            return None
        if form == ord("t"):
            return value[4:].decode("utf-8", "backslashreplace")
        return self._reader(relation, index)(value[4:])

    def _reader(self, relation: Relation, index: int) -> Callable[[bytes], str]:
        found = self._binary.get((relation.id, index))
        if found is None:
            types = {description.oid: description for description in relation.types}
            try:
                found = text_reader(relation.columns[index].type_oid, types)
            except SchemaError:
                found = _hexadecimal  # an extension's type: only its server can read it
            self._binary[relation.id, index] = found
        return found


def _hexadecimal(data: bytes) -> str:
    return f"<binary {data.hex()}>"


def _change_line(change: dict[str, Any]) -> str:
    parts = [change["op"]]
    if "table" in change:
        parts.append(change["table"])
    if "tables" in change:
        parts.append(", ".join(change["tables"]))
    if "prefix" in change:
        parts.append(f"{change['prefix']}: {change['content']}")
    parts += [f"{name} ({_row_text(change[name])})" for name in ("key", "before") if name in change]
    if "after" in change:
        parts.append(f"{'→ ' if len(parts) > 2 else ''}({_row_text(change['after'])})")
    return " ".join(parts)


def _row_text(row: Shown) -> str:
    return ", ".join(f"{name}={_value_text(value)}" for name, value in row.items())


def _value_text(value: str | None) -> str:
    if value is None:
        return "NULL"
    return value if value == _UNCHANGED else repr(value)
