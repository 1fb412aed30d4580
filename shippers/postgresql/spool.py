"""Where a transaction waits for its commit: in memory while small, in a temporary file beyond that.

The leader sends large transactions before they commit (``streaming 'on'``), interleaved and with subtransactions that
may yet abort. The broker must hold committed transactions only, so they wait here, already cut into runs.
"""

import tempfile
from array import array
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Final, NamedTuple

from cdc.errors import LocalIOError
from cdc.record import Relation, Run

MEMORY_BYTES: Final = 4 << 20


class _Stored(NamedTuple):
    """A run in the file: what it describes, and where its lengths and body lie."""

    relations: Mapping[int, Relation]
    messages: int
    body_bytes: int


class Spool:
    """The runs of one transaction, each marked with the subtransaction that wrote it."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._runs: list[tuple[int, Run | _Stored]] = []
        self._file: IO[bytes] | None = None
        self._in_memory = 0
        self.size_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add(self, subxid: int, run: Run) -> None:
        """Keep a run.

        :raises LocalIOError: the temporary directory is full.
        """
        self.size_bytes += len(run.body)
        if self._file is None and self._in_memory + len(run.body) <= self._memory_bytes:
            self._in_memory += len(run.body)
            self._runs.append((subxid, run))
            return
        try:
            if self._file is None:
                # Closed by close(), or by the garbage collector: the file has no name.
                self._file = tempfile.TemporaryFile(prefix="cdc-spool-", buffering=0)  # noqa: SIM115
            _write(self._file, array("I", run.lengths).tobytes() + run.body)
        except OSError as error:
            raise LocalIOError(
                f"cannot spool a transaction of {self.size_bytes} bytes in {tempfile.gettempdir()}: {error}",
                remedy="free space there, or point TMPDIR to a larger file system",
            ) from error
        self._runs.append((subxid, _Stored(run.relations, len(run.lengths), len(run.body))))

    def runs(self, without: Collection[int] = ()) -> Iterator[Run]:
        """The runs in order, leaving out those of the subtransactions ``without``; once, then the spool is closed."""
        try:
            if self._file is not None:
                self._file.seek(0)
            for subxid, run in self._runs:
                wanted = subxid not in without
                if isinstance(run, Run):
                    if wanted:
                        yield run
                elif wanted:
                    yield self._load(run)
                elif self._file is not None:
                    self._file.seek(4 * run.messages + run.body_bytes, 1)
        finally:
            self.close()

    def _load(self, stored: _Stored) -> Run:
        assert self._file is not None  # noqa: S101
        data = self._file.read(4 * stored.messages + stored.body_bytes)
        if len(data) < 4 * stored.messages + stored.body_bytes:
            raise LocalIOError(f"a spooled run of {stored.body_bytes} bytes came back as {len(data)}")
        lengths = array("I", data[: 4 * stored.messages])
        return Run(stored.relations, lengths, data[4 * stored.messages :])

    def close(self) -> None:
        """Give memory and file back."""
        self._runs = []
        if self._file is not None:
            self._file.close()
            self._file = None


def _write(file: IO[bytes], data: bytes) -> None:
    """All of it: where the disk is full, a write is first cut short, and only the next one fails."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
