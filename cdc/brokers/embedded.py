"""A broker in one SQLite file: one writer and many readers, in as many processes, without a server.

The file is in WAL mode with ``synchronous=FULL``: what :meth:`EmbeddedBroker.append` returned for survives a crash of
the process and of the machine (https://www.sqlite.org/wal.html). It belongs on a local file system, as SQLite's locks
and shared memory do. Beside it lie ``-wal`` and ``-shm`` files while it is open; they are part of it.
"""

import contextlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar, Final, NamedTuple
from urllib.parse import unquote, urlsplit

from cdc.errors import (
    CdcError,
    ConfigurationError,
    DecodeError,
    GapError,
    LocalIOError,
    TransientError,
    UsageError,
)
from cdc.record import Message

_FORMAT_VERSION: Final = 1
_SCHEMA: Final = {
    "header": "CREATE TABLE header (format_version INTEGER NOT NULL)",
    "topic": (
        "CREATE TABLE topic (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, identity BLOB NOT NULL, "
        "first_offset INTEGER NOT NULL, next_offset INTEGER NOT NULL)"
    ),
    "message": (
        'CREATE TABLE message (topic INTEGER NOT NULL, "offset" INTEGER NOT NULL, body BLOB NOT NULL, '
        'PRIMARY KEY (topic, "offset"))'
    ),
}

# Bodies are about 1 MiB. Measured with pages of 4, 8, 16 and 32 KiB: bodies of 900 KiB went in at 171, 256, 266 and
# 344 MB/s, of 64 KiB at 88, 108, 98 and 102.
_PAGE_BYTES: Final = 32768
_CHECKPOINT_PAGES: Final = 512  # 16 MiB
_WAL_BYTES_MAX: Final = 64 * 1024 * 1024
_CHECKPOINT_WAIT_MS: Final = 100

BODY_BYTES_MAX: Final = 1_000_000_000 - 4096  # SQLITE_MAX_LENGTH holds a whole row (https://www.sqlite.org/limits.html)
TOPIC_BYTES_MAX: Final = 1024
_READ_MESSAGES_MAX: Final = 65_536  # empty bodies take memory too
_PAUSE_S_MIN: Final = 0.001
_PAUSE_S_MAX: Final = 0.02


class LogWriteError(LocalIOError):
    """The disk failed while a commit was being made durable: only re-reading the topic's end tells whether it is."""

    definite: ClassVar[bool] = False


class _Topic(NamedTuple):
    id: int
    identity: bytes
    first: int
    next: int


class _FileIdentity(NamedTuple):
    device: int
    inode: int


class EmbeddedBroker:
    """:class:`~cdc.ports.Broker` on the SQLite file ``path``, which the first append creates, directories too.

    With ``create=False`` it only reads and never creates anything; a file that is not there yet has no topics.
    ``busy_s`` is how long a writer waits for another one. May be used by several threads, but not across a fork.

    Every method raises DecodeError where the file is corrupt or no database, ConfigurationError where it is a
    database but not a log of ours or of a newer version, LocalIOError where the disk is full or fails.
    """

    def __init__(self, path: Path, *, create: bool = True, busy_s: float = 30.0) -> None:
        self.path = path.absolute()
        self._create = create
        self._busy_s = busy_s
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._file: _FileIdentity | None = None
        self._seen: dict[str, bytes] = {}

    def __enter__(self) -> "EmbeddedBroker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EmbeddedBroker({str(self.path)!r})"

    def append(self, topic: str, bodies: Sequence[bytes]) -> int:
        """Add bodies in one transaction and return the first one's offset once they are on the disk.

        :raises TransientError: another process kept the file locked for ``busy_s``; nothing was added.
        :raises GapError: the topic or the file was removed or replaced since this object used it.
        :raises LogWriteError: the disk failed while committing.
        """
        _check_topic(topic)
        for body in bodies:
            _check_body(topic, body)
        if not bodies:
            return self.bounds(topic)[1]
        with self._lock, self._translated(), self._writing() as connection:
            state = self._checked(topic, _find_topic(connection, topic)) or _create_topic(connection, topic)
            rows = ((state.id, offset, body) for offset, body in enumerate(bodies, state.next))
            connection.executemany('INSERT INTO message (topic, "offset", body) VALUES (?, ?, ?)', rows)
            end = state.next + len(bodies)
            connection.execute("UPDATE topic SET next_offset = ? WHERE id = ?", (end, state.id))
        self._seen[topic] = state.identity
        return state.next

    def read(self, topic: str, offset: int, *, limit_bytes: int, wait_s: float) -> Sequence[Message]:
        """Messages from ``offset`` on: at least one where there is one, otherwise as many as fit ``limit_bytes``.

        :raises GapError: as :meth:`cdc.ports.Broker.read` says; also where the topic or the file was removed or
            replaced since this object used it.
        """
        _check_topic(topic)
        deadline = time.monotonic() + wait_s
        pause_s = _PAUSE_S_MIN
        while True:
            messages = self._read_now(topic, offset, limit_bytes)
            left_s = deadline - time.monotonic()
            if messages or left_s <= 0:
                return messages
            time.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 2, _PAUSE_S_MAX)

    def bounds(self, topic: str) -> tuple[int, int]:
        _check_topic(topic)
        with self._lock, self._translated(), self._reading() as connection:
            state = _find_topic(connection, topic) if connection else None
        return (state.first, state.next) if state else (0, 0)

    def topics(self) -> Sequence[str]:
        with self._lock, self._translated(), self._reading() as connection:
            rows = connection.execute("SELECT name FROM topic").fetchall() if connection else []
        return sorted(name for (name,) in rows)

    def trim(self, topic: str, before_offset: int) -> int:
        """Forget the messages below ``before_offset`` and return how many. Their space is used again, not given back.

        :raises UsageError: there is no such topic, or it does not reach that far.
        """
        _check_topic(topic)
        with self._lock, self._translated(), self._writing() as connection:
            state = _find_topic(connection, topic)
            if state is None or before_offset > state.next:
                raise UsageError(
                    f"cannot trim topic {topic!r} of {self.path} before offset {before_offset}: "
                    f"it ends at {state.next if state else 0}",
                    remedy="name an offset between the topic's bounds, which `cdc status` shows",
                )
            done = connection.execute(
                'DELETE FROM message WHERE topic = ? AND "offset" < ?', (state.id, before_offset)
            ).rowcount
            first = max(state.first, before_offset)
            connection.execute("UPDATE topic SET first_offset = ? WHERE id = ?", (first, state.id))
        return done

    def delete(self, topic: str) -> None:
        """Forget a topic and all it holds. Readers and writers that have it open get a GapError."""
        _check_topic(topic)
        with self._lock, self._translated(), self._writing() as connection:
            state = _find_topic(connection, topic)
            if state:
                connection.execute("DELETE FROM message WHERE topic = ?", (state.id,))
                connection.execute("DELETE FROM topic WHERE id = ?", (state.id,))
        self._seen.pop(topic, None)

    def close(self) -> None:
        with self._lock, self._translated():
            self._disconnect()

    def _read_now(self, topic: str, offset: int, limit_bytes: int) -> list[Message]:
        with self._lock, self._translated(), self._reading() as connection:
            state = self._checked(topic, _find_topic(connection, topic) if connection else None)
            first, end = (state.first, state.next) if state else (0, 0)
            if not first <= offset <= end:
                raise GapError(f"topic {topic!r} of {self.path} has no offset {offset}: it holds {first} to {end}")
            if connection is None or state is None:
                return []
            self._seen[topic] = state.identity
            return _fetch(connection, state, topic, offset, limit_bytes)

    def _checked(self, topic: str, state: _Topic | None) -> _Topic | None:
        """``state`` itself, unless it is not the topic that this object used before."""
        seen = self._seen.get(topic)
        if seen is not None and (state is None or state.identity != seen):
            what = "deleted" if state is None else "deleted and created again"
            raise GapError(f"topic {topic!r} of {self.path} was {what} while it was in use")
        return state

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """A connection inside a read transaction; None where there is no log yet."""
        now = _identify(self.path)
        if now != self._file:
            self._disconnect()
        if now is not None and self._connection is None:
            self._connect(now)
        if self._connection is None:
            yield None
            return
        connection = self._connection
        connection.execute("BEGIN")
        try:
            yield connection
        finally:
            _roll_back(connection)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A connection inside a write transaction, committed on leaving."""
        connection = self._writer()
        self._bound_wal(connection)
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            self._commit(connection)
        finally:
            _roll_back(connection)
        # A file that was unlinked takes writes without complaint: what is in it is nowhere.
        if _identify(self.path) != self._file:
            raise GapError(f"{self.path} was removed or replaced while it was being written")

    def _commit(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if _primary_code(error) == sqlite3.SQLITE_IOERR:
                self._disconnect()  # a failed fsync is never tried again: the next use recovers from the file
                raise LogWriteError(f"{self.path}: {error}") from error
            raise

    def _writer(self) -> sqlite3.Connection:
        if not self._create:
            raise UsageError(f"{self.path} was opened for reading", remedy="open it with create=True to write")
        if self._connection is None:
            _make_directory(self.path.parent)
            is_new = not self.path.exists()
            self._initialise()
            if is_new:
                _sync_directory(self.path.parent)
        assert self._connection is not None  # noqa: S101
        return self._connection

    def _initialise(self) -> None:
        connection = self._open("rwc")
        try:
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")  # takes effect in an empty file only
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            if _is_empty(connection):
                for statement in _SCHEMA.values():
                    connection.execute(statement)
                connection.execute("INSERT INTO header VALUES (?)", (_FORMAT_VERSION,))
            connection.execute("COMMIT")
            self._adopt(connection, _identify(self.path))
        except BaseException:
            connection.close()
            raise

    def _connect(self, identity: _FileIdentity) -> None:
        connection = self._open("rw")
        try:
            # A writer may have been killed between creating the file and its tables.
            if _is_empty(connection):
                connection.close()
                return
            self._adopt(connection, identity)
        except BaseException:
            connection.close()
            raise

    def _open(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode={mode}",
            uri=True,
            timeout=self._busy_s,
            isolation_level=None,
            check_same_thread=False,
        )
        for pragma in (
            "synchronous = FULL",
            "trusted_schema = OFF",
            "cell_size_check = ON",
            f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
            f"journal_size_limit = {_WAL_BYTES_MAX}",
        ):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _adopt(self, connection: sqlite3.Connection, identity: _FileIdentity | None) -> None:
        _check_schema(connection, self.path)
        self._connection = connection
        self._file = identity

    def _disconnect(self) -> None:
        connection, self._connection, self._file = self._connection, None, None
        if connection:
            connection.close()

    def _bound_wal(self, connection: sqlite3.Connection) -> None:
        """Start the WAL anew once it is too large, waiting for the readers that kept SQLite from doing so."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.with_name(self.path.name + "-wal").stat().st_size > _WAL_BYTES_MAX:
                connection.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_WAIT_MS}")  # a frozen reader must not freeze us
                connection.execute("PRAGMA wal_checkpoint(RESTART)")
                connection.execute(f"PRAGMA busy_timeout = {self._busy_s * 1000:.0f}")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _translate(error, self.path) from error
        except OSError as error:
            raise LocalIOError(f"{self.path}: {error.strerror or error}") from error


def connect(url: str, *, create: bool = True) -> EmbeddedBroker:
    """The broker of a ``file:///absolute/path`` URL, whose path is the SQLite file itself. Nothing is opened yet.

    :raises UsageError: not such a URL.
    """
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not path.startswith("/"):
        raise UsageError(f"not a file URL: {url!r}", remedy="write it as file:///absolute/path")
    if parts.query or parts.fragment:
        raise UsageError(
            f"a file URL has neither ? nor #: {url!r}", remedy="write them as %3F and %23 in a file's name"
        )
    if "\0" in path or path.endswith("/") or Path(path).is_dir():
        raise UsageError(f"not the path of a file: {url!r}", remedy="name a file, for example file:///var/lib/cdc/log")
    return EmbeddedBroker(Path(path), create=create)


def _find_topic(connection: sqlite3.Connection, name: str) -> _Topic | None:
    row = connection.execute(
        "SELECT id, identity, first_offset, next_offset FROM topic WHERE name = ?", (name,)
    ).fetchone()
    if row is None:
        return None
    state = _Topic(*row)
    if not isinstance(state.identity, bytes) or not _is_range(state.first, state.next):
        raise DecodeError(f"topic {name!r} is described as {row!r}")
    return state


def _is_range(first: object, end: object) -> bool:
    return isinstance(first, int) and isinstance(end, int) and 0 <= first <= end


def _create_topic(connection: sqlite3.Connection, name: str) -> _Topic:
    identity = secrets.token_bytes(16)
    done = connection.execute("INSERT INTO topic VALUES (NULL, ?, ?, 0, 0)", (name, identity))
    return _Topic(done.lastrowid or 0, identity, 0, 0)


def _fetch(connection: sqlite3.Connection, state: _Topic, name: str, offset: int, limit_bytes: int) -> list[Message]:
    where = 'FROM message WHERE topic = ? AND "offset" >= ? ORDER BY "offset"'
    # Lengths first: SQLite tells them without reading the bodies.
    sizes = connection.execute(f'SELECT "offset", length(body) {where}', (state.id, offset))
    count = _count_within(islice(sizes, _READ_MESSAGES_MAX), limit_bytes)
    rows = connection.execute(f'SELECT "offset", body {where} LIMIT {count}', (state.id, offset))
    messages = [Message(*row) for row in rows]
    expected = range(offset, offset + len(messages))
    if (offset < state.next) != bool(messages) or [message.offset for message in messages] != [*expected]:
        raise DecodeError(f"topic {name!r} should hold {state.first} to {state.next}, but misses some from {offset} on")
    for message in messages:
        if not isinstance(message.body, bytes):
            raise DecodeError(f"topic {name!r} holds something else than bytes at offset {message.offset}")
    return messages


def _count_within(sizes: Iterator[tuple[int, int]], limit_bytes: int) -> int:
    """How many of the first messages fit into ``limit_bytes``, at least one."""
    count = total = 0
    for _, size in sizes:
        total += size
        if count and total > limit_bytes:
            break
        count += 1
    return count


def _is_empty(connection: sqlite3.Connection) -> bool:
    return not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse any schema but ours: a view or a trigger would be somebody else's code."""
    found = dict(connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL"))
    if found.get("header") != _SCHEMA["header"]:
        raise ConfigurationError(
            f"{path} is an sqlite database, but no log of ours", remedy="name another file for the broker"
        )
    versions = connection.execute("SELECT format_version FROM header LIMIT 2").fetchall()
    if versions != [(_FORMAT_VERSION,)]:
        raise ConfigurationError(
            f"{path} has format version {[version for (version,) in versions]}, we know {_FORMAT_VERSION}",
            remedy="use the version of cdc that wrote it, or a newer one",
        )
    if found != _SCHEMA:
        raise DecodeError(f"{path} has other tables than a log of format version {_FORMAT_VERSION}: {sorted(found)}")


def _check_topic(topic: str) -> None:
    try:
        size = len(topic.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"topic name is not unicode: {topic!r}", remedy="use letters and digits") from error
    if not 0 < size <= TOPIC_BYTES_MAX:
        raise UsageError(
            f"topic name of {size} bytes: {topic[:40]!r}", remedy=f"use a name of 1 to {TOPIC_BYTES_MAX} bytes"
        )


def _check_body(topic: str, body: bytes) -> None:
    if len(body) > BODY_BYTES_MAX:
        raise UsageError(
            f"a message of {len(body)} bytes for topic {topic!r}: this broker takes at most {BODY_BYTES_MAX}",
            remedy="send it in fragments",
        )


def _roll_back(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.ProgrammingError):  # closed since
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _identify(path: Path) -> _FileIdentity | None:
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _FileIdentity(about.st_dev, about.st_ino)


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_LOCKED: Final = (TransientError, "stop the other process that writes to it, or try again")
_FORBIDDEN: Final = (LocalIOError, "allow writing to the file and its directory: readers too keep an index beside it")
_KINDS: Final[Mapping[int | None, tuple[type[CdcError], str | None]]] = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_READONLY: _FORBIDDEN,
    sqlite3.SQLITE_CANTOPEN: _FORBIDDEN,
    sqlite3.SQLITE_PERM: _FORBIDDEN,
    sqlite3.SQLITE_FULL: (LocalIOError, None),
    sqlite3.SQLITE_IOERR: (LocalIOError, None),
    sqlite3.SQLITE_CORRUPT: (DecodeError, None),
    sqlite3.SQLITE_NOTADB: (DecodeError, None),
    sqlite3.SQLITE_ERROR: (DecodeError, None),  # our statements are good, so the tables they name are not
    None: (DecodeError, None),  # from the driver itself: text that is not UTF-8
}


def _primary_code(error: sqlite3.Error) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)  # absent where python itself raised it
    return None if code is None else code & 0xFF


def _translate(error: sqlite3.Error, path: Path) -> CdcError:
    """What an error of SQLite means for us (https://www.sqlite.org/rescode.html)."""
    extended = getattr(error, "sqlite_errorcode", None)
    if extended == sqlite3.SQLITE_READONLY_DBMOVED:
        return GapError(f"{path} was removed or replaced while it was in use")
    if extended == sqlite3.SQLITE_IOERR_SHORT_READ:
        return DecodeError(f"{path} is cut short")
    kind, remedy = _KINDS.get(_primary_code(error), (CdcError, None))
    return kind(f"{path}: {error}", remedy=remedy)
