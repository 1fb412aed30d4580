"""What travels: relations, transactions, batches, images and checkpoints.

Rows stay bytes. A *value* here is its bytes behind a four-byte big-endian length, as it stands in a pgoutput tuple and
in a binary COPY row, so that it can be passed on without being looked at; SQL NULL is the length -1 alone
(:data:`NULL`). A value the log did not carry because it did not change is :data:`UNCHANGED`, never NULL.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final, Literal, NamedTuple

from cdc.position import Position

NULL: Final = b"\xff\xff\xff\xff"


class Absent(Enum):
    """Why a value is not there."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Absent.UNCHANGED

Value = bytes | Literal[Absent.UNCHANGED]
Row = tuple[Value, ...]


class Format(StrEnum):
    """The four kinds of replication log (DDIA, chapter 5, "Implementation of Replication Logs")."""

    STATEMENT = "statement"
    PHYSICAL = "physical"
    LOGICAL = "logical"
    TRIGGER = "trigger"


@dataclass(frozen=True, slots=True)
class TypeDescription:
    """A type that is not built into PostgreSQL (OID 16384 and above): what a decoder must know of it.

    ``base`` is the element of an array, the base of a domain, the subtype of a range, the range of a multirange, 0
    otherwise. ``labels`` are an enum's, in order. Kinds follow ``pg_type.typtype``, arrays told apart; the kind "base"
    covers extension types, whose bytes we pass on but cannot read.
    """

    oid: int
    schema: str
    name: str
    kind: Literal["base", "array", "enum", "domain", "range", "multirange", "composite"]
    base: int = 0
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Column:
    """One captured column. ``key``: part of the replica identity. ``modifier``: ``pg_attribute.atttypmod``.

    ``number`` is the attribute number, known only where the leader's catalog still agreed with the log when it was
    read; it tells a rename from a drop and an add. ``missing`` is the text of the value that rows older than the
    column show (``pg_attribute.attmissingval``), None for NULL. ``untold``: those rows may hold other values, which the
    log does not tell: the column has a default but no such value, as when adding it rewrote the table.
    """

    name: str
    type_oid: int
    modifier: int = -1
    key: bool = False
    not_null: bool = False
    number: int | None = None
    missing: str | None = None
    untold: bool = False


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as it was when the change was written; the schema travels with the change.

    ``identity`` is ``pg_class.relreplident``: d(efault), n(othing), f(ull), i(ndex). ``primary_key`` names its columns
    in key order, empty where there is none or where the log does not tell. ``types`` describes every type that is not
    built in and that a column reaches, directly or through arrays and domains.
    """

    id: int
    schema: str
    name: str
    identity: str
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...] = ()
    types: tuple[TypeDescription, ...] = ()

    @property
    def label(self) -> str:
        """``schema.name``, for people."""
        return f"{self.schema}.{self.name}"


class Run(NamedTuple):
    """Consecutive row messages of one transaction: at most one description per relation id, at most one fragment."""

    relations: Mapping[int, Relation]
    lengths: Sequence[int]
    body: bytes


class Transaction(NamedTuple):
    """One committed leader transaction. ``runs`` may be read once, and reads from disk where it was large."""

    position: Position
    xid: int
    committed_us: int  # microseconds since 1970-01-01 UTC, by the leader's clock
    runs: Iterable[Run]
    size_bytes: int


class Heartbeat(NamedTuple):
    """Nothing to read just now: everything up to ``position`` has been told."""

    position: Position


class TransactionHead(NamedTuple):
    """A transaction inside a batch: its end, and how many of the batch's messages are its."""

    lsn: int
    xid: int
    committed_us: int
    messages: int


class Bundle(NamedTuple):
    """Small transactions one after the other, already put together: ``run`` holds the messages of all.

    ``position`` is the end of the last; descriptions hold for all of them.
    """

    position: Position
    heads: Sequence[TransactionHead]
    run: Run

    def upto(self, lsn: int) -> "Bundle | None":
        """Those of them that end at or below ``lsn``, if any does."""
        heads = [head for head in self.heads if head.lsn <= lsn]
        if not heads:
            return None
        lengths = self.run.lengths[: sum(head.messages for head in heads)]
        run = Run(self.run.relations, lengths, self.run.body[: sum(lengths)])
        return Bundle(self.position.at(heads[-1].lsn), heads, run)


class Fragment(NamedTuple):
    """Part ``number`` (from 0) of something too large for one message; only the ``last`` one completes it."""

    number: int
    last: bool


class ChunkPlan(NamedTuple):
    """How a relation's image is cut: ``bounds`` are the key texts between chunks, so n bounds make n + 1 chunks."""

    relation_id: int
    bounds: tuple[tuple[str, ...], ...]


class ImageHead(NamedTuple):
    """Which part of which image this batch is.

    ``sequence`` counts the chunks as they stand in the topic. ``lsn`` is the exact position of the snapshot the chunk
    was read in: an image resumed after a crash has chunks of more than one.
    """

    id: str
    sequence: int
    lsn: int
    chunk: int = 0
    relation_id: int = 0
    rows: int = 0
    form: Literal["binary", "text"] = "binary"


class Kind(StrEnum):
    """What a batch holds."""

    LOG = "log"
    HEARTBEAT = "heartbeat"
    IMAGE_BEGIN = "image-begin"  # relations and plan
    IMAGE_CHUNK = "image-chunk"  # COPY rows of one relation
    IMAGE_END = "image-end"


@dataclass(frozen=True, slots=True)
class Batch:
    """The transport unit: consecutive whole transactions, or one fragment of a large one, or part of an image.

    ``previous`` is the position of the batch before it, ``position`` its own; a reader that is at neither knows of a
    hole. ``relations`` describes every relation the body names. For LOG the body is pgoutput row messages
    (https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html, without the streaming xid), cut
    by ``lengths``; for IMAGE_CHUNK it is COPY data of ``image.form``.
    """

    stream: str
    format: Format
    kind: Kind
    previous: Position
    position: Position
    relations: tuple[Relation, ...] = ()
    transactions: tuple[TransactionHead, ...] = ()
    lengths: Sequence[int] = ()
    body: bytes = b""
    fragment: Fragment | None = None
    image: ImageHead | None = None
    plan: tuple[ChunkPlan, ...] = ()


class Message(NamedTuple):
    """A body as the broker keeps it."""

    offset: int
    body: bytes


class ImageProgress(NamedTuple):
    """How far a follower has loaded an image, and where its tables stand.

    ``sequence`` is the next chunk expected, -1 once the image is complete. ``tables`` maps a relation id to the lowest
    and highest snapshot LSN of its chunks.
    """

    id: str
    sequence: int
    tables: Mapping[int, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a follower has applied; stored in the follower, in the same commit as the data.

    ``offset`` is where to read next (a hint only). ``epoch`` counts the owners of the stream on this follower.
    """

    position: Position
    offset: int
    epoch: int
    image: ImageProgress | None = None


@dataclass(slots=True)
class RowSet:
    """Rows of one relation to be written in one statement.

    ``columns`` are indexes into ``relation.columns`` of the values in ``rows``. ``match`` likewise of those in
    ``matches``, which find the row to change (update, delete). ``unique`` says that match is a key; otherwise it is the
    whole row and one of possibly several equal rows is meant. ``forms`` has for each relation column ``b`` (binary) or
    ``t`` (text), the form of its values. No value is UNCHANGED here: rows with other columns are in another set.
    """

    relation: Relation
    forms: bytes
    columns: tuple[int, ...] = ()
    rows: list[tuple[bytes, ...]] = field(default_factory=list)
    match: tuple[int, ...] = ()
    matches: list[tuple[bytes, ...]] = field(default_factory=list)
    unique: bool = True
