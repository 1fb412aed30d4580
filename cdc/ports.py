"""The protocols everything plugs into, with what each side promises.

Composition happens in :mod:`cdc.cli` alone. Third parties add an implementation through the entry point groups
``cdc.shippers``, ``cdc.brokers`` and ``cdc.stores``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from cdc.position import Position
from cdc.record import (
    Batch,
    Bundle,
    Checkpoint,
    ChunkPlan,
    Column,
    Format,
    Heartbeat,
    Message,
    Relation,
    RowSet,
    Transaction,
)


class ImageChunk(NamedTuple):
    """One message-sized part of a chunk: COPY data with header and trailer, complete in itself."""

    body: bytes
    rows: int
    form: str  # "binary" | "text"


class Snapshot(Protocol):
    """A consistent image of the leader, tied to the exact position the log continues from."""

    @property
    def position(self) -> Position: ...

    def relations(self) -> Sequence[Relation]:
        """Everything captured, described as of the snapshot."""
        ...

    def plan(self, relation: Relation) -> ChunkPlan:
        """Cut a relation into key ranges of a few MiB; one range where it is small or has no key."""
        ...

    def read(self, relation: Relation, plan: ChunkPlan, chunk: int) -> Iterator[ImageChunk]:
        """The rows of chunk ``chunk``, in parts of about 1 MiB. Safe to call from several threads at once."""
        ...


class Shipper(Protocol):
    """Tells one leader's log as transactions, in commit order."""

    format: ClassVar[Format]

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """Open an image. It is consistent for as long as the context lives."""
        ...

    def stream(self, after: Position, *, wait_s: float) -> Iterator[Transaction | Bundle | Heartbeat]:
        """Every transaction whose position is beyond ``after``, by itself or in a bundle, then wait for more.

        Yields a :class:`~cdc.record.Heartbeat` once all that had arrived has been told and nothing more came for
        ``wait_s`` seconds, and now and then while nothing comes.

        :raises GapError: the leader no longer holds what follows ``after``.
        """
        ...

    def confirm(self, position: Position) -> None:
        """The broker holds everything up to ``position``: the leader may forget it. Never moves back."""
        ...

    def end(self) -> Position:
        """Where the leader's log ends now: everything committed before the call lies at or below."""
        ...

    def close(self) -> None: ...


class Codec(Protocol):
    """Batches to bytes and back, without any I/O. ``decode(encode(b)) == b``."""

    def encode(self, batch: Batch) -> bytes: ...

    def decode(self, body: bytes) -> Batch:
        """:raises DecodeError: the body is corrupt, or of an unknown version; never half a batch."""
        ...


class Broker(Protocol):
    """Keeps bodies in order. Knows nothing of them, nor of anyone's progress."""

    def append(self, topic: str, bodies: Sequence[bytes]) -> int:
        """Add bodies at the end, in order, and return the offset of the first once all are durable.

        :raises OutcomeUnknownError: they may or may not be there: read the topic's end before going on.
        """
        ...

    def read(self, topic: str, offset: int, *, limit_bytes: int, wait_s: float) -> Sequence[Message]:
        """Messages from ``offset`` on, at least one where there is one, about ``limit_bytes`` in all.

        Waits up to ``wait_s`` seconds for the first. Empty where none came.

        :raises GapError: ``offset`` is below what is kept, or beyond the end, or the topic does not exist although
            ``offset`` is not 0.
        """
        ...

    def bounds(self, topic: str) -> tuple[int, int]:
        """The first offset kept and the next to be written; (0, 0) where there is no such topic."""
        ...

    def topics(self) -> Sequence[str]:
        """The names of the topics there are, sorted."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Preparing(Broker, Protocol):
    """A broker that makes more of a batch than its bytes, and can do so while the batch before it is being written."""

    def prepare(self, batch: Batch) -> None:
        """Do ahead what can be: the next body that :meth:`append` gets and that was not prepared yet is this batch's.

        :raises SchemaError: as :meth:`append` does.
        """
        ...


class Applier(Protocol):
    """Rebuilds one follower from one stream. Effects and checkpoint are one commit."""

    def claim(self, stream: str) -> tuple[int, Checkpoint | None]:
        """Become the stream's owner on this follower, fencing any earlier one: our epoch, and what is applied.

        The checkpoint is None where this follower never saw the stream.
        """
        ...

    def apply(self, batch: Batch, *, after: Position | None, until: Position | None, offset: int = 0) -> None:
        """Put a batch into the follower's open transaction, opening it where none is.

        Only transactions with ``after < position <= until`` take effect. What does not fit may be told by a later call,
        at the latest by ``commit``; ``offset`` is where the batch stands in the topic, for such errors to name.

        :raises ConflictError, SchemaError: a change does not fit; the open transaction is of no use any more.
        """
        ...

    def commit(self, checkpoint: Checkpoint) -> None:
        """Make everything applied since the last commit and ``checkpoint`` durable, at once.

        :raises FencedError: another applier owns the stream; nothing was committed.
        :raises OutcomeUnknownError: ask :meth:`claim` whether it happened.
        """
        ...

    def rollback(self) -> None:
        """Forget everything since the last commit."""
        ...

    def close(self) -> None: ...


class AddColumn(NamedTuple):
    """The leader added a column; rows that were there show ``column.missing``."""

    column: Column


class DropColumn(NamedTuple):
    name: str


class RenameColumn(NamedTuple):
    old: str
    new: str


class ChangeType(NamedTuple):
    old: Column
    new: Column


class RenameTable(NamedTuple):
    """The leader renamed the table or moved it to another schema; the relation given along is the new one."""

    old: Relation


SchemaChange = AddColumn | DropColumn | RenameColumn | ChangeType | RenameTable


class Follower(Protocol):
    """The rows applier's hands on one follower database. One connection, one open transaction at a time.

    Every method but ``close`` runs inside the transaction that ``begin`` opened. Errors of the database come out as the
    types of :mod:`cdc.errors`: a duplicate key or a failed constraint is a ConflictError, a value or a column that does
    not fit a SchemaError, a lost connection an UnavailableError (OutcomeUnknownError from ``commit``), a lock or
    serialization failure a TransientError, a missing privilege an AccessError, a full disk a LocalIOError.
    """

    dialect: ClassVar[str]  # "postgresql", "sqlite", "duckdb": also the entry point's name
    bulk: ClassVar[bool]  # takes COPY data faster than rows

    def begin(self) -> None: ...

    def commit(self) -> None: ...

    def rollback(self) -> None:
        """Forget the open transaction. Does nothing where none is open."""
        ...

    def close(self) -> None: ...

    def savepoint(self) -> None:
        """Mark where :meth:`rollback_to_savepoint` returns to, forgetting an earlier mark."""
        ...

    def rollback_to_savepoint(self) -> None:
        """Undo everything since the mark. A dialect without savepoints raises NotImplementedError."""
        ...

    # What is applied: one row per stream in a table of our own, created on first use.

    def read_checkpoint(self, stream: str) -> Checkpoint | None:
        """What is applied, with the epoch of the stream's owner as of now."""
        ...

    def claim(self, stream: str) -> int:
        """Count one more owner of the stream and return the number, the epoch of its owner."""
        ...

    def write_checkpoint(self, stream: str, checkpoint: Checkpoint) -> None:
        """:raises FencedError: the stored epoch is not ``checkpoint.epoch``."""
        ...

    def read_relations(self, stream: str) -> Mapping[int, Relation]:
        """The leader's tables as this follower last followed them, by relation id."""
        ...

    def write_relation(self, stream: str, relation: Relation) -> None: ...

    # Tables.

    def columns(self, relation: Relation) -> Mapping[str, str] | None:
        """The follower's columns of that table, name to declared type in the dialect's words; None without a table."""
        ...

    def create(self, relation: Relation) -> None:
        """Create the table (and schema and types it needs) from the leader's description."""
        ...

    def evolve(self, relation: Relation, change: SchemaChange) -> None:
        """Follow one schema change. ``relation`` is the table as it is afterwards.

        :raises SchemaError: this dialect cannot follow, with the statement that would mend it as the remedy.
        """
        ...

    def is_empty(self, relation: Relation) -> bool: ...

    def truncate(self, relations: Sequence[Relation], *, cascade: bool, restart_identity: bool) -> None: ...

    # Rows, in sets. Each returns how many rows it changed.

    def insert(self, rows: RowSet, *, replace: bool = False) -> int:
        """Insert ``rows.rows``. ``replace``: a row that is there with the same key is overwritten."""
        ...

    def update(self, rows: RowSet) -> int:
        """Set ``rows.columns`` to the n-th of ``rows.rows`` in the row that the n-th of ``rows.matches`` finds."""
        ...

    def delete(self, rows: RowSet) -> int:
        """Delete the rows that ``rows.matches`` find."""
        ...

    def load(self, relation: Relation, body: bytes, form: str, *, replace: bool = False) -> int:
        """Insert COPY data (``form`` "binary" or "text") of all columns of ``relation`` in their order."""
        ...


class Store(Protocol):
    """The eyes: what verify and the lab see of a database. Used outside of any stream."""

    def checkpoints(self) -> Mapping[str, Checkpoint]:
        """What was applied here, by stream. Empty for a database that is no follower."""
        ...

    def lines(self, relation: Relation) -> Iterator[tuple[bytes, bytes]]:
        """Every row as (key, line), each in PostgreSQL's COPY text form under pinned settings.

        ``line`` holds all columns of ``relation`` in order, ``key`` those of its identity (the line itself where it has
        none). Equal values give equal lines on every store.
        (https://www.postgresql.org/docs/current/sql-copy.html, "Text Format")
        """
        ...

    def close(self) -> None: ...


class Progress(NamedTuple):
    """Something to show. ``what``: image, stream, apply. ``of`` is 0 where the end is not known."""

    what: Literal["image", "stream", "apply"]
    subject: str
    done: int = 0
    of: int = 0
    rows: int = 0
    size_bytes: int = 0


Report = Callable[[Progress], None]
