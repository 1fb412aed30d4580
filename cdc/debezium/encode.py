"""Batches to Debezium's records.

https://debezium.io/documentation/reference/stable/connectors/postgresql.html#postgresql-events

A row change becomes a record of ``<prefix>.<schema>.<table>``; a deleted key is followed by a tombstone; a changed key
is a delete and a create. Where transactions are told, each begins and ends in ``<prefix>.transaction`` and every event
carries its place. ``lsn`` in the source block is the end of the transaction's commit, the same for all its events: our
batches know no other. With ``sequence`` and the transaction block the events still have a total order.

Records are put together as text: what does not change from row to row is prepared once for each table.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice, repeat
from operator import itemgetter
from typing import Final, Literal, NamedTuple

import cdc
from cdc.debezium.schema import (
    HEARTBEAT_KEY,
    HEARTBEAT_VALUE,
    MESSAGE_KEY,
    TRANSACTION_KEY,
    TRANSACTION_VALUE,
    Modes,
    Schema,
    column_field,
    envelope_schema,
    key_columns,
    key_schema,
    message_schema,
)
from cdc.debezium.values import (
    Write,
    WriteAll,
    bytes_writer,
    column_writer,
    compact,
    fallback,
    quoted,
    unavailable,
    writer,
)
from cdc.errors import DecodeError, SchemaError
from cdc.events import EventRecord, Headers
from cdc.record import NULL, UNCHANGED, Batch, Column, Kind, Relation, TransactionHead, Value
from cdc.wire import copy, pgoutput

Image = Sequence[Value]
Snapshot = Literal["true", "first", "first_in_data_collection", "last_in_data_collection", "last", "false"]

NEW_KEY: Final = "__debezium.newkey"
OLD_KEY: Final = "__debezium.oldkey"
_NOT_OF_TOPICS: Final = re.compile(r"[^A-Za-z0-9._-]")
_PRESENT: Final = bytes.maketrans(b"nu", b"bb")
"""Where a value is not there, its form does not matter."""
_ALIKE_MIN: Final = 8  # inserts in a row from which on columns are written at once
_BLOCK: Final = '{"id":%s,"total_order":%d,"data_collection_order":%d}'


@dataclass(frozen=True, slots=True)
class EventOptions:
    """Debezium's properties, with its defaults.

    ``prefix`` is ``topic.prefix``; ``schemas`` the converters' ``schemas.enable``; ``tombstones``
    ``tombstones.on.delete``; ``transactions`` ``provide.transaction.metadata``; ``skipped`` ``skipped.operations`` (op
    codes, "" for none).
    """

    prefix: str
    modes: Modes = field(default_factory=Modes)
    schemas: bool = True
    tombstones: bool = True
    transactions: bool = False
    skipped: str = "t"


class Encoder:
    """Encodes the batches of one stream, in order. Remembers the transaction and the image that are open."""

    def __init__(self, options: EventOptions) -> None:
        self._options = options
        self._tables: dict[int, _Table] = {}
        self._open: _Open | None = None
        self._image = _ImageMarkers()
        wrap = partial(_around, schemas=options.schemas)
        self._wrap_heartbeat = wrap(HEARTBEAT_KEY), wrap(HEARTBEAT_VALUE)
        self._wrap_boundary = wrap(TRANSACTION_KEY), wrap(TRANSACTION_VALUE)
        self._wrap_message = wrap(MESSAGE_KEY), wrap(message_schema(options.modes))

    @property
    def prefix(self) -> str:
        """What the names of all topics begin with."""
        return self._options.prefix

    def encode(self, batch: Batch, now_us: int) -> list[EventRecord]:
        """The records of a batch. ``now_us`` is the time of encoding, in microseconds since 1970-01-01 UTC.

        :raises DecodeError: the batch is malformed.
        :raises SchemaError: it holds a value that the format cannot carry.
        """
        stamps = f'"ts_ms":{now_us // 1000},"ts_us":{now_us},"ts_ns":{now_us * 1000}'
        if batch.kind is Kind.LOG:
            return list(self._log(batch, stamps))
        if batch.kind is Kind.HEARTBEAT:
            return [self._heartbeat(now_us)]
        if batch.kind is Kind.IMAGE_CHUNK:
            return self._chunk(batch, stamps, now_us)
        self._image.note(batch)
        return []

    def note(self, batch: Batch) -> None:
        """Learn of a part of an image that an earlier encoder encoded."""
        self._image.note(batch)

    def _heartbeat(self, now_us: int) -> EventRecord:
        prefix = self._options.prefix
        wrap_key, wrap_value = self._wrap_heartbeat
        key, value = wrap_key(f'{{"serverName":{quoted(prefix)}}}'), wrap_value(f'{{"ts_ms":{now_us // 1000}}}')
        return EventRecord(f"__debezium-heartbeat.{prefix}", key, value)

    def _table(self, relation: Relation) -> "_Table":
        known = self._tables.get(relation.id)
        if known is None or known.relation != relation:
            known = self._tables[relation.id] = _Table(relation, self._options)
        return known

    # Images.

    def _chunk(self, batch: Batch, stamps: str, now_us: int) -> list[EventRecord]:
        head = batch.image
        if head is None or len(batch.relations) != 1:
            raise DecodeError("an image chunk must be of one relation")
        table = self._table(batch.relations[0])
        forms = (b"b" if head.form == "binary" else b"t") * table.width
        rows = list(copy.rows(batch.body, head.form))
        markers = self._image.markers(batch, len(rows))
        records: list[EventRecord] = []
        for marker, group in groupby(zip(markers, rows, strict=True), itemgetter(0)):
            source = _source(
                self._options.prefix, batch, table, marker, us=now_us, lsn=head.lsn, xid=None, previous=None
            )
            columns = list(zip(*[row for _, row in group], strict=True))
            records += table.records(columns, forms, "r", _Around(source, "null", stamps))
        return records

    # The log.

    def _log(self, batch: Batch, stamps: str) -> Iterator[EventRecord]:
        log = _Log(batch, {relation.id: relation for relation in batch.relations}, stamps)
        previous = batch.previous.lsn
        number = at = 0
        for head in batch.transactions:
            opened = self._open
            if opened is None or batch.fragment is None or batch.fragment.number == 0:
                opened = self._open = _Open(head, previous)
                yield from self._boundary(opened, "BEGIN")
            lengths = batch.lengths[number : number + head.messages]
            size = sum(lengths)
            yield from self._messages(log, opened, batch.body[at : at + size], lengths)
            at += size
            number += head.messages
            previous = head.lsn
            if batch.fragment is None or batch.fragment.last:
                yield from self._boundary(opened, "END")
                self._open = None

    def _messages(
        self,
        log: "_Log",
        opened: "_Open",
        body: bytes,
        lengths: Sequence[int],
    ) -> Iterator[EventRecord]:
        number = at = 0
        while number < len(lengths):
            alike = _inserts_alike(body, at, lengths, number)
            if alike >= _ALIKE_MIN:
                pieces: list[bytes] = []
                end = at + sum(lengths[number : number + alike])
                done, size = pgoutput.copy_inserts(body[at:end], 0, lengths[number : number + alike], 0, pieces)
                if done:
                    yield from self._inserted(log, opened, body[at + 1 : at + 5], pieces)
                number, at, alike = number + done, at + size, alike - done
            for length in lengths[number : number + alike]:
                yield from self._message(log.batch, log.relations, opened, body[at : at + length], log.stamps)
                at += length
            number += alike

    def _inserted(
        self,
        log: "_Log",
        opened: "_Open",
        relation: bytes,
        pieces: Sequence[bytes],
    ) -> list[EventRecord]:
        """Events of rows in the form of :func:`pgoutput.copy_inserts`: the number of columns, then each one's value."""
        table = self._named(log.relations, int.from_bytes(relation))
        width = int.from_bytes(pieces[0])
        if width != table.width:
            raise DecodeError(f"a row of {width} columns for {table.relation.label}, which has {table.width}")
        columns = [pieces[1 + index :: 1 + width] for index in range(width)]
        count = len(pieces) // (1 + width)
        source = self._source_of(log.batch, table, opened)
        orders = opened.count_all(table.relation.label, count)
        block = opened.block if self._options.transactions else "null"
        return table.records(
            columns, b"b" * width, "c", _Around(source, block, log.stamps), orders if self._options.transactions else ()
        )

    def _boundary(self, opened: "_Open", status: Literal["BEGIN", "END"]) -> Iterator[EventRecord]:
        if not self._options.transactions or not opened.head.xid:
            return  # a message outside of all transactions has no xid
        counts = 'null,"data_collections":null'
        if status == "END":
            told = [{"data_collection": name, "event_count": count} for name, count in opened.counts.items()]
            counts = f'{opened.total},"data_collections":{compact(told)}'
        wrap_key, wrap_value = self._wrap_boundary
        ts_ms = opened.head.committed_us // 1000
        payload = f'{{"status":"{status}","id":{opened.id},"event_count":{counts},"ts_ms":{ts_ms}}}'
        key, value = wrap_key(f'{{"id":{opened.id}}}'), wrap_value(payload)
        yield EventRecord(f"{self._options.prefix}.transaction", key, value, (), 0)

    def _message(
        self, batch: Batch, relations: dict[int, Relation], opened: "_Open", message: bytes, stamps: str
    ) -> Iterable[EventRecord]:
        if message[0] in b"IUD":
            change = pgoutput.decode_change(message)
            table = self._named(relations, change.relation_id)
            return self._change(table, change, partial(self._around, batch, table, opened, stamps))
        decoded = pgoutput.decode(message)
        if isinstance(decoded, pgoutput.Truncate) and "t" not in self._options.skipped:
            tables = [self._named(relations, id_) for id_ in decoded.relation_ids]
            return [
                table.record(None, "null", "null", "t", self._around(batch, table, opened, stamps)) for table in tables
            ]
        if isinstance(decoded, pgoutput.LogicalMessage):
            return [self._logical_message(batch, opened, decoded, stamps)]
        if isinstance(decoded, pgoutput.Origin):
            opened.origin = f'{quoted(decoded.name)},"origin_lsn":{decoded.commit_lsn}'
        return []

    def _named(self, relations: dict[int, Relation], relation_id: int) -> "_Table":
        try:
            return self._table(relations[relation_id])
        except KeyError:
            raise DecodeError(f"a change names relation {relation_id}, which its batch does not describe") from None

    def _around(self, batch: Batch, table: "_Table", opened: "_Open", stamps: str) -> "_Around":
        """What stands around one more event of that transaction."""
        order = opened.count(table.relation.label)
        source = self._source_of(batch, table, opened)
        block = "null"
        if self._options.transactions:
            block = _BLOCK % (opened.id, opened.total, order)
        return _Around(source, block, stamps)

    def _source_of(self, batch: Batch, table: "_Table", opened: "_Open") -> str:
        source = opened.sources.get(table.relation.id)
        if source is None:
            head = opened.head
            source = opened.sources[table.relation.id] = _source(
                self._options.prefix,
                batch,
                table,
                "false",
                us=head.committed_us,
                lsn=head.lsn,
                xid=head.xid,
                previous=opened.previous,
                origin=opened.origin,
            )
        return source

    def _change(
        self, table: "_Table", change: pgoutput.Change, around: Callable[[], "_Around"]
    ) -> Iterator[EventRecord]:
        for image in (change.before, change.after):
            if image is not None and len(image) != table.width:
                raise DecodeError(f"a row of {len(image)} columns for {table.relation.label}, which has {table.width}")
        forms, full = change.forms, change.before_kind == "O"
        before, after = change.before, change.after
        if after is None:
            yield from self._deleted(table, change, around)
            return
        if before is not None:
            after = table.filled(after, before, full=full)
        key = table.key(after, forms)
        if change.op == "I":
            yield table.record(key, "null", table.row(after, forms), "c", around())
            return
        old_key = table.key(before, forms) if before is not None else key
        if old_key != key and key is not None and old_key is not None:
            table.check_whole(after)
            yield from self._deleted(table, change, around, ((NEW_KEY, key),))
            created = table.record(key, "null", table.row(after, forms), "c", around())
            yield created._replace(headers=((OLD_KEY, old_key),))
            return
        old = "null" if before is None else table.before(before, forms, full=full)
        yield table.record(key, old, table.row(after, forms), "u", around())

    def _deleted(
        self, table: "_Table", change: pgoutput.Change, around: Callable[[], "_Around"], headers: Headers = ()
    ) -> Iterator[EventRecord]:
        before = change.before or []
        key = table.key(before, change.forms)
        old = table.before(before, change.forms, full=change.before_kind == "O")
        yield table.record(key, old, "null", "d", around())._replace(headers=headers)
        if self._options.tombstones and key is not None:
            yield EventRecord(table.topic, key, None, headers)

    def _logical_message(
        self, batch: Batch, opened: "_Open", message: pgoutput.LogicalMessage, stamps: str
    ) -> EventRecord:
        content = bytes_writer(self._options.modes)(message.content)
        block = "null"
        if self._options.transactions and message.transactional:
            opened.total += 1
            opened.counts[""] += 1
            block = _BLOCK % (opened.id, opened.total, opened.counts[""])
        source = _source(
            self._options.prefix,
            batch,
            None,
            "false",
            us=opened.head.committed_us,
            lsn=message.lsn,
            xid=opened.head.xid if message.transactional else None,
            previous=opened.previous,
            origin=opened.origin,
        )
        prefix = quoted(message.prefix)
        payload = (
            f'{{"op":"m",{stamps.partition(",")[0]},"source":{source},"transaction":{block},'
            f'"message":{{"prefix":{prefix},"content":{content}}}}}'
        )
        wrap_key, wrap_value = self._wrap_message
        key, value = wrap_key(f'{{"prefix":{prefix}}}'), wrap_value(payload)
        return EventRecord(f"{self._options.prefix}.message", key, value)


class _Log(NamedTuple):
    """A batch of the log being encoded."""

    batch: Batch
    relations: dict[int, Relation]
    stamps: str


class _Open:
    """A transaction whose end was not encoded yet."""

    def __init__(self, head: TransactionHead, previous: int) -> None:
        self.head = head
        self.previous = previous
        self.id = f'"{head.xid}:{head.lsn}"'
        self.total = 0
        self.counts: Counter[str] = Counter()
        self.sources: dict[int, str] = {}
        self.origin = 'null,"origin_lsn":null'

    @property
    def block(self) -> str:
        """The transaction block without the two orders, where it stands in a template."""
        return _BLOCK.replace("%s", self.id.replace("%", "%%"), 1)

    def count_all(self, label: str, events: int) -> tuple[range, range]:
        """Count that many events at once: their places in the transaction, and in what it did to their table."""
        total, own = self.total + 1, self.counts[label] + 1
        self.total += events
        self.counts[label] += events
        return range(total, total + events), range(own, own + events)

    def count(self, label: str) -> int:
        self.total += 1
        self.counts[label] += 1
        return self.counts[label]


@dataclass(frozen=True, slots=True)
class _Around:
    """The envelope's other fields, as JSON. ``stamps`` are the three names with their values."""

    source: str
    transaction: str
    stamps: str


def _source(
    prefix: str,
    batch: Batch,
    table: "_Table | None",
    snapshot: Snapshot,
    *,
    us: int,
    lsn: int,
    xid: int | None,
    previous: int | None,
    origin: str = 'null,"origin_lsn":null',
) -> str:
    """The source block. ``us`` is the commit, or for a snapshot the reading."""
    database = batch.position.source.rpartition("/")[2]
    sequence = compact([None if previous is None else str(previous), str(lsn)])
    relation = table.relation if table is not None else None
    return (
        f'{{"version":"{cdc.__version__}","connector":"postgresql","name":{quoted(prefix)},"ts_ms":{us // 1000},'
        f'"snapshot":"{snapshot}","db":{quoted(database)},"sequence":{quoted(sequence)},'
        f'"ts_us":{us},"ts_ns":{us * 1000},'
        f'"schema":{quoted(relation.schema if relation else "")},"table":{quoted(relation.name if relation else "")},'
        f'"txId":{"null" if xid is None else xid},"lsn":{lsn},"xmin":null,"origin":{origin}}}'
    )


def _ends(of: Schema, *, schemas: bool) -> tuple[bytes, bytes]:
    """What stands before and behind a payload of that schema."""
    return (f'{{"schema":{compact(of)},"payload":'.encode(), b"}") if schemas else (b"", b"")


def _around(of: Schema, *, schemas: bool) -> Callable[[str], bytes]:
    """How a payload of that schema becomes bytes."""
    head, tail = _ends(of, schemas=schemas)
    return lambda payload: b"".join((head, payload.encode(), tail))


def _literal(text: bytes) -> bytes:
    """As it stands in a template."""
    return text.replace(b"%", b"%%")


def _inserts_alike(body: bytes, at: int, lengths: Sequence[int], first: int) -> int:
    """How many messages from the ``first``-th on, which begins at ``at``, are Inserts into one relation; 1 at least."""
    prefix = body[at : at + 5]
    if prefix[:1] != b"I":
        return 1
    number = first
    for length in islice(lengths, first, None):
        if body[at : at + 5] != prefix:
            break
        at += length
        number += 1
    return max(1, number - first)


class _Table:
    """Everything about one relation that is the same for all its rows."""

    def __init__(self, relation: Relation, options: EventOptions) -> None:
        self.relation = relation
        self.topic = _NOT_OF_TOPICS.sub("_", f"{options.prefix}.{relation.label}")
        self.width = len(relation.columns)
        self._modes = options.modes
        self._types = {description.oid: description for description in relation.types}
        self._fields = [column_field(column, self._types, options.modes) for column in relation.columns]
        self._keyed = key_columns(relation)
        key_fields = [self._fields[index] for index in self._keyed]
        key_ends = key_schema(self.topic, key_fields), envelope_schema(self.topic, self._fields)
        self._key_ends, self._value_ends = (_ends(of, schemas=options.schemas) for of in key_ends)
        self._wrap_key, self._wrap = (_around(of, schemas=options.schemas) for of in key_ends)
        self._row_template = _template(self._fields)
        self._key_template = _template(key_fields)
        self._writers: dict[bytes, list[Write]] = {}
        self._column_writers: dict[bytes, list[WriteAll]] = {}

    def key(self, row: Image, forms: bytes) -> bytes | None:
        """The record's key; None where the table has none."""
        if not self._keyed:
            return None
        values = [row[index] for index in self._keyed]
        if UNCHANGED in values or NULL in values:
            raise self._keyless()
        write = self._writing(forms)
        return self._wrap_key(
            self._key_template % tuple([write[index](row[index][4:]) for index in self._keyed])  # type: ignore[index]
        )

    def _keyless(self) -> SchemaError:
        names = ", ".join(self.relation.columns[index].name for index in self._keyed)
        return SchemaError(
            f"a change of {self.relation.label} does not carry its key ({names})",
            remedy=f'ALTER TABLE "{self.relation.schema}"."{self.relation.name}" REPLICA IDENTITY DEFAULT',
        )

    def row(self, row: Image, forms: bytes) -> str:
        """A row whose absent values did not change."""
        write = self._writing(forms)
        if UNCHANGED in row:
            shown = [
                self._unavailable(index) if value is UNCHANGED else "null" if value == NULL else write[index](value[4:])
                for index, value in enumerate(row)
            ]
        else:
            shown = ["null" if value == NULL else w(value[4:]) for w, value in zip(write, row, strict=True)]  # type: ignore[index]
        return self._row_template % tuple(shown)

    def before(self, row: Image, forms: bytes, *, full: bool) -> str:
        """An old row, of which the log carries the replica identity unless it is ``full``."""
        if full:
            return self.row(row, forms)
        write = self._writing(forms)
        shown = [
            fallback(self._fields[index]) if value is UNCHANGED or value == NULL else write[index](value[4:])
            for index, value in enumerate(row)
        ]
        return self._row_template % tuple(shown)

    def filled(self, after: list[Value], before: list[Value], *, full: bool) -> list[Value]:
        """``after`` with what did not change taken from ``before``, where that carries it."""
        if UNCHANGED not in after:
            return after
        carried = [full or column.key for column in self.relation.columns]
        return [
            old if new is UNCHANGED and there else new for new, old, there in zip(after, before, carried, strict=True)
        ]

    def check_whole(self, row: Image) -> None:
        """
        :raises SchemaError: something of a row under a new key is missing: no reader could put it together.
        """
        if UNCHANGED not in row:
            return
        missing = [c.name for c, value in zip(self.relation.columns, row, strict=True) if value is UNCHANGED]
        raise SchemaError(
            f"the key of a row of {self.relation.label} changed, and the log does not carry {', '.join(missing)}",
            remedy=f'ALTER TABLE "{self.relation.schema}"."{self.relation.name}" REPLICA IDENTITY FULL',
        )

    def record(self, key: bytes | None, before: str, after: str, op: str, around: _Around) -> EventRecord:
        payload = (
            f'{{"before":{before},"after":{after},"source":{around.source},"transaction":{around.transaction},'
            f'"op":"{op}",{around.stamps}}}'
        )
        return EventRecord(self.topic, key, self._wrap(payload))

    def records(
        self,
        columns: Sequence[Sequence[bytes]],
        forms: bytes,
        op: Literal["c", "r"],
        around: _Around,
        orders: Sequence[Sequence[int]] = (),
    ) -> list[EventRecord]:
        """Events of many new rows, given column by column. ``around.transaction`` is a template for ``orders``."""
        shown = [write(column) for write, column in zip(self._writing_columns(forms), columns, strict=True)]
        if not shown:
            raise DecodeError(f"rows without columns of {self.relation.label}")
        head, tail = self._value_ends
        row, source, stamps = self._row_template.encode(), around.source.encode(), around.stamps.encode()
        shape = (
            _literal(head + b'{"before":null,"after":')
            + row
            + _literal(b',"source":' + source + b',"transaction":')
            + around.transaction.encode()
            + _literal(b',"op":"%c",' % op.encode() + stamps + b"}" + tail)
        )
        values = [shape % told for told in zip(*shown, *orders, strict=True)]
        return list(map(EventRecord, repeat(self.topic), self._keys(columns, shown), values))

    def _keys(self, columns: Sequence[Sequence[bytes]], shown: Sequence[Sequence[bytes]]) -> Iterable[bytes | None]:
        if not self._keyed:
            return repeat(None)
        if any(NULL in columns[index] for index in self._keyed):
            raise self._keyless()
        head, tail = self._key_ends
        shape = _literal(head) + self._key_template.encode() + _literal(tail)
        return [shape % told for told in zip(*[shown[index] for index in self._keyed], strict=True)]

    def _writing_columns(self, forms: bytes) -> list[WriteAll]:
        known = self._column_writers.get(forms)
        if known is None:
            known = self._column_writers[forms] = [
                column_writer(column, chr(form), self._types, write)
                for column, form, write in zip(self.relation.columns, forms, self._writing(forms), strict=True)
            ]
        return known

    def _writing(self, forms: bytes) -> list[Write]:
        forms = forms.translate(_PRESENT)
        known = self._writers.get(forms)
        if known is None:
            known = self._writers[forms] = [
                self._writer(column, chr(form)) for column, form in zip(self.relation.columns, forms, strict=True)
            ]
        return known

    def _writer(self, column: Column, form: str) -> Write:
        """A writer, which where the form cannot be read says so once there is a value to write."""
        try:
            return writer(column, form, self._types, self._modes)
        except SchemaError as error:
            unreadable = error

        def refuse(_: bytes) -> str:
            raise unreadable

        return refuse

    def _unavailable(self, index: int) -> str:
        column = self.relation.columns[index]
        shown = unavailable(column.type_oid, self._fields[index], self._types, self._modes)
        if shown is None:
            raise SchemaError(
                f"column {column.name!r} of {self.relation.label} did not change and is not in the log, "
                "and its type has no placeholder",
                remedy=f'ALTER TABLE "{self.relation.schema}"."{self.relation.name}" REPLICA IDENTITY FULL',
            )
        return shown


def _template(fields: list[Schema]) -> str:
    names = [quoted(of["field"]).replace("%", "%%") for of in fields]
    return "{" + ",".join(f"{name}:%s" for name in names) + "}"


class _ImageMarkers:
    """Knows which row of an image is the first and the last, of all and of its table.

    The last row is known only where it stands in the very last part: an image that ends with an empty table, or an
    empty part, has no ``last``.
    """

    def __init__(self) -> None:
        self._left: dict[int, int] = {}
        self._begun: set[int] = set()

    def note(self, batch: Batch) -> None:
        if batch.kind is Kind.IMAGE_BEGIN:
            self._left = {plan.relation_id: len(plan.bounds) + 1 for plan in batch.plan}
            self._begun = set()
        elif batch.kind is Kind.IMAGE_CHUNK and batch.image is not None:
            self._begun.add(batch.image.relation_id)
            if batch.fragment is None or batch.fragment.last:
                self._left[batch.image.relation_id] = self._left.get(batch.image.relation_id, 0) - 1

    def markers(self, batch: Batch, rows: int) -> list[Snapshot]:
        """The markers of that part's rows."""
        relation_id = batch.image.relation_id if batch.image is not None else 0
        markers: list[Snapshot] = ["true"] * rows
        if rows and relation_id not in self._begun:
            markers[0] = "first_in_data_collection" if self._begun else "first"
        begun = set(self._begun)
        self.note(batch)
        if not rows:
            self._begun = begun
        elif self._left.get(relation_id) == 0:
            markers[-1] = "last_in_data_collection" if any(self._left.values()) else "last"
        return markers
