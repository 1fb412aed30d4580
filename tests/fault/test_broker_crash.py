"""The embedded broker under SIGKILL, a full disk and a damaged file."""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc.brokers.embedded import EmbeddedBroker
from cdc.errors import CdcError, ConfigurationError, DecodeError, GapError, LocalIOError
from cdc.record import Message

PLENTY = 1 << 30
SEED = 7

# Appends batches of bodies that know their place, and tells the end of each batch once it was acknowledged.
WRITER = """
import hashlib, random, struct, sys
from pathlib import Path
from cdc.brokers.embedded import EmbeddedBroker

def body(number, first, count, size):
    data = struct.pack(">QQQ", number, first, count) + random.randbytes(size)
    return data + hashlib.sha256(data).digest()

broker = EmbeddedBroker(Path(sys.argv[1]))
print("ready", flush=True)
first = broker.bounds("t")[1]
while True:
    count = random.randint(1, 5)
    size = random.choice([10, 1000, 50_000, 900_000])
    assert broker.append("t", [body(number, first, count, size) for number in range(first, first + count)]) == first
    first += count
    print(first, flush=True)
"""


def start_writer(path: Path, script: str = WRITER) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)


def kill_after(writer: subprocess.Popen[str], delay_s: float) -> int:
    """Kill the writer ``delay_s`` after it is ready and return the last end it was told is durable."""
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    time.sleep(delay_s)
    writer.send_signal(signal.SIGKILL)
    lines = writer.stdout.read().split("\n")
    writer.wait()
    ends = [int(line) for line in lines[:-1]]  # what follows the last line feed was cut off
    return ends[-1] if ends else 0


def read_all(broker: EmbeddedBroker, topic: str = "t") -> Iterator[Message]:
    offset, end = broker.bounds(topic)
    while offset < end:
        messages = broker.read(topic, offset, limit_bytes=1 << 20, wait_s=0)
        yield from messages
        offset += len(messages)


def check_whole(path: Path) -> int:
    """Every body in its place and unharmed, every batch complete; returns how many there are."""
    count = batch_start = batch_end = 0
    with EmbeddedBroker(path, create=False) as broker:
        for message in read_all(broker):
            data, digest = message.body[:-32], message.body[-32:]
            number, first, size = (int.from_bytes(data[at : at + 8]) for at in (0, 8, 16))
            assert hashlib.sha256(data).digest() == digest
            assert message.offset == number == count
            if count == batch_end:
                batch_start, batch_end = first, first + size
            assert first == batch_start <= count < batch_end
            count += 1
    assert count == batch_end
    return count


def test_what_was_acknowledged_survives_sigkill(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    path = tmp_path / "log"
    total = 0
    for _ in range(20):
        acknowledged = kill_after(start_writer(path), chance.uniform(0, 0.12))
        count = check_whole(path)
        assert count >= max(acknowledged, total)
        total = count
    assert total > 100


def test_a_writer_killed_while_it_creates_the_log(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for number in range(15):
        path = tmp_path / f"new-{number}" / "log"
        acknowledged = kill_after(start_writer(path), chance.uniform(0, 0.02))
        assert check_whole(path) >= acknowledged
        with EmbeddedBroker(path) as broker:
            end = broker.bounds("t")[1]
            assert broker.append("t", [b"x"]) == end


def test_a_log_whose_creation_was_cut_short_is_created_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    with EmbeddedBroker(path, create=False) as reader:
        assert reader.topics() == []
        assert reader.read("t", 0, limit_bytes=1, wait_s=0) == []
        with EmbeddedBroker(path) as writer:
            writer.append("t", [b"a"])
        assert list(read_all(reader)) == [Message(0, b"a")]


def test_readers_go_on_while_a_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EmbeddedBroker(path, create=False) as reader:
        for _ in range(3):
            acknowledged = kill_after(start_writer(path), 0.1)
            assert reader.bounds("t")[1] >= acknowledged
            assert len(list(read_all(reader))) == reader.bounds("t")[1]


FILLER = """
import resource, signal, sys
from pathlib import Path
from cdc.brokers.embedded import EmbeddedBroker
from cdc.errors import LocalIOError

path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
broker = EmbeddedBroker(path)
broker.append("t", [b"0" * 300_000])
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, hard))
end = 1
try:
    while True:
        broker.append("t", [b"%d" % (end % 10) * 300_000])
        end += 1
except LocalIOError as error:
    print(end, error, flush=True)
assert broker.bounds("t") == (0, end), broker.bounds("t")
for offset in range(end):
    (message,) = broker.read("t", offset, limit_bytes=1, wait_s=0)
    assert message.body == b"%d" % (offset % 10) * 300_000
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert broker.append("t", [b"after"]) == end
print("went on", flush=True)
"""


def test_a_file_that_may_not_grow_is_a_local_error_and_the_log_stays(tmp_path: Path) -> None:
    path = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", FILLER, path], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("went on\n"), done.stderr
    end = int(done.stdout.split()[0])
    assert end > 3
    with EmbeddedBroker(path, create=False) as reader:
        assert [len(message.body) for message in read_all(reader)] == [300_000] * end + [5]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root can mount a small file system")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run([shutil.which("umount") or "umount", disk], check=True)


def test_a_full_disk_is_a_local_error_and_the_log_stays(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * 1_000_000)
    end = 0
    with EmbeddedBroker(small_disk / "log") as broker:
        with pytest.raises(LocalIOError, match="log"):
            while end < 1000:
                broker.append("t", [b"%d" % (end % 10) * 100_000])
                end += 1
        assert broker.bounds("t") == (0, end)
        assert [m.body[:1] for m in read_all(broker)] == [b"%d" % (offset % 10) for offset in range(end)]
        ballast.unlink()
        assert broker.append("t", [b"after"]) == end
    with EmbeddedBroker(small_disk / "log", create=False) as reader:
        assert len(list(read_all(reader))) == end + 1


@pytest.fixture
def closed_log(tmp_path: Path) -> Path:
    """A log of 2 topics and about 3 MB, wholly in its one file."""
    path = tmp_path / "log"
    with EmbeddedBroker(path) as broker:
        for number in range(30):
            broker.append("t", [bytes([number]) * 100_000])
            broker.append("u", [b"small"] * 20)
    assert [entry.name for entry in tmp_path.iterdir()] == ["log"]
    return path


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"these are the voyages " * 1000)
    for create in (False, True):
        with EmbeddedBroker(path, create=create) as broker, pytest.raises(DecodeError, match=r"log: .*not a database"):
            broker.append("t", [b"a"]) if create else broker.topics()
    assert path.read_bytes().startswith(b"these are")


def test_a_log_cut_short_is_refused(closed_log: Path) -> None:
    os.truncate(closed_log, closed_log.stat().st_size // 2)
    with EmbeddedBroker(closed_log, create=False) as broker, pytest.raises(DecodeError, match="log"):
        list(read_all(broker))


def test_zeroed_pages_are_refused(closed_log: Path) -> None:
    data = bytearray(closed_log.read_bytes())
    data[32768:] = bytes(len(data) - 32768)
    closed_log.write_bytes(data)
    with EmbeddedBroker(closed_log, create=False) as broker, pytest.raises(DecodeError, match="log"):
        broker.bounds("t")


def test_a_lost_message_is_refused(closed_log: Path) -> None:
    with contextlib.closing(sqlite3.connect(closed_log)) as connection, connection:
        connection.execute('delete from message where "offset" = 7')
    with EmbeddedBroker(closed_log, create=False) as broker:
        with pytest.raises(DecodeError, match=r"'t'.* from 5 on"):
            broker.read("t", 5, limit_bytes=PLENTY, wait_s=0)
        with pytest.raises(DecodeError, match=r"'t'.* from 7 on"):
            broker.read("t", 7, limit_bytes=1, wait_s=0)


def test_scribbles_anywhere_end_in_a_typed_error_or_dense_offsets(closed_log: Path) -> None:
    chance = random.Random(SEED)
    whole = closed_log.read_bytes()
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        # Most of the file is bodies; half of the scribbles go where the structure is, the heads of the first pages.
        at = (
            chance.randrange(6) * 32768 + chance.randrange(120)
            if chance.random() < 0.5
            else chance.randrange(len(data))
        )
        noise = chance.randbytes(chance.choice([1, 4, 40]))
        data[at : at + len(noise)] = noise
        closed_log.write_bytes(data[: len(whole)])
        try:
            with EmbeddedBroker(closed_log, create=False) as broker:
                for topic in broker.topics():
                    offsets = [message.offset for message in read_all(broker, topic)]
                    assert offsets == [*range(*broker.bounds(topic))]
        except (DecodeError, ConfigurationError, GapError, LocalIOError) as error:
            assert type(error) is not CdcError
            refused += 1
        for suffix in ("-wal", "-shm"):
            closed_log.with_name(closed_log.name + suffix).unlink(missing_ok=True)
    assert refused > 10
