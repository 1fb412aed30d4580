"""The embedded PostgreSQL and what only the embedded broker has."""

import contextlib
import mmap
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from cdc.brokers.embedded import BODY_BYTES_MAX, EmbeddedBroker, connect
from cdc.errors import ConfigurationError, DecodeError, GapError, LocalIOError, TransientError, UsageError
from cdc.stores import embedded
from cdc.stores.embedded import EmbeddedPostgres, find_bindir
from tests.fix_postgresql import DatabaseFactory, create_database, drop_database, postgres_major

PLENTY = 1 << 40


# PostgreSQL


def ask(url: str, query: str) -> object:
    with psycopg.connect(url) as connection:
        row = connection.execute(query).fetchone()
        assert row is not None
        return row[0]


@postgres_major(16, 18)
def test_a_server_is_complete(postgres: EmbeddedPostgres) -> None:
    assert ask(postgres.url(), "select current_setting('server_version_num')::int / 10000") == postgres.major
    assert ask(postgres.url(), "show wal_level") == "logical"
    assert ask(postgres.url(), "show server_encoding") == "UTF8"
    assert ask(postgres.url(), "select datcollate from pg_database where datname = 'postgres'") == "C"
    for program in ("pg_recvlogical", "pg_basebackup", "pg_waldump", "pgbench", "psql"):
        assert (postgres.bindir / program).exists()


def test_it_can_be_reached_by_socket_and_only_from_here(postgres18: EmbeddedPostgres) -> None:
    url = f"host={postgres18.socket_directory} port={postgres18.port} user=postgres dbname=postgres"
    assert ask(url, "select inet_server_addr() is null") is True
    assert ask(postgres18.url(), "show listen_addresses") == "127.0.0.1"


def test_it_does_not_run_as_root(postgres18: EmbeddedPostgres) -> None:
    assert postgres18.pid is not None
    owner = Path(f"/proc/{postgres18.pid}").stat().st_uid
    assert owner != 0
    assert postgres18.data.stat().st_uid == owner
    assert os.geteuid() in (0, owner)


def test_databases_are_fresh_and_go_with_their_slots(postgres18: EmbeddedPostgres) -> None:
    one, two = create_database(postgres18), create_database(postgres18)
    with psycopg.connect(postgres18.url(one), autocommit=True) as connection:
        connection.execute("select pg_create_logical_replication_slot('s_' || current_database(), 'pgoutput')")
        connection.execute("create table t (a int)")
        connection.execute("begin; insert into t values (1); prepare transaction 'left behind'")
        assert ask(postgres18.url(two), "select count(*) from pg_class where relname = 't'") == 0
        drop_database(postgres18, one)
    drop_database(postgres18, two)
    count = "select (select count(*) from {} where {} in ('" + one + "', '" + two + "'))"
    assert ask(postgres18.url(), count.format("pg_database", "datname")) == 0
    assert ask(postgres18.url(), count.format("pg_replication_slots", "database")) == 0


def test_the_database_fixture_gives_urls(postgres18: EmbeddedPostgres, database: DatabaseFactory) -> None:
    one, two = database(postgres18), database(postgres18)
    assert ask(one, "select current_database()") != ask(two, "select current_database()")


def test_settings_kill_restart_and_stop() -> None:
    with EmbeddedPostgres(18, settings={"fsync": "off", "application_name": "it's"}) as server:
        assert ask(server.url(), "show application_name") is not None
        directory, socket_directory, port = server.directory, server.socket_directory, server.port
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("create table t as select generate_series(1, 1000) a")
            server.kill()
            assert not server.is_running
            with pytest.raises(psycopg.OperationalError):
                connection.execute("select 1")
        server.start()
        assert ask(server.url(), "select count(*) from t") == 1000
        server.settings["work_mem"] = "5MB"
        server.restart()
        assert server.port == port
        assert ask(server.url(), "show work_mem") == "5MB"
        assert "recover" in server.log.read_text()
        pid = server.pid
        assert pid is not None
    assert server.pid is None
    assert not directory.exists()
    assert not socket_directory.exists()


@pytest.fixture
def open_tmp_path(tmp_path: Path) -> Path:
    """A directory that the server's user can reach; pytest's own are closed to others."""
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(path.stat().st_mode | 0o011)
    return tmp_path


def test_a_kept_directory_keeps_the_cluster(open_tmp_path: Path) -> None:
    home = open_tmp_path / "a directory's home"
    with EmbeddedPostgres(18, home, settings={"fsync": "off"}) as server:
        identifier = ask(server.url(), "select system_identifier from pg_control_system()")
    assert (home / "data" / "PG_VERSION").read_text().strip() == "18"
    with EmbeddedPostgres.from_bindir(find_bindir(18), Path(os.path.relpath(home))) as again:
        assert again.major == 18
        assert ask(again.url(), "select system_identifier from pg_control_system()") == identifier
        assert ask(again.url(), "show fsync") == "on"


def test_a_base_backup_becomes_a_server(postgres18: EmbeddedPostgres, open_tmp_path: Path) -> None:
    (open_tmp_path / "copy").mkdir()
    program, target = postgres18.bindir / "pg_basebackup", open_tmp_path / "copy" / "data"
    backup: list[str | Path] = [program, "-d", postgres18.url(), "-c", "fast", "-D", target]
    subprocess.run(backup, check=True, capture_output=True)
    with EmbeddedPostgres(18, open_tmp_path / "copy", settings={"fsync": "off"}) as copy:
        identifier = "select system_identifier from pg_control_system()"
        assert ask(copy.url(), identifier) == ask(postgres18.url(), identifier)
        assert ask(copy.url(), "show fsync") == "off"


def test_alter_system_outlives_a_restart() -> None:
    with EmbeddedPostgres(18, settings={"fsync": "off", "work_mem": "5MB"}) as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("alter system set work_mem = '6MB'")
        server.restart()
        assert ask(server.url(), "show work_mem") == "6MB"


def test_a_bad_setting_is_told_with_the_log() -> None:
    server = EmbeddedPostgres(18, settings={"wal_level": "sometimes"})
    with pytest.raises(ConfigurationError, match=r'invalid value for parameter "wal_level": "sometimes"'):
        server.start()
    assert not server.is_running


def test_a_missing_server_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CDC_PG18_BINDIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match=str(tmp_path)) as caught:
        EmbeddedPostgres(18)
    assert "cdc[embedded]" in caught.value.remedy
    with pytest.raises(ConfigurationError, match="postgresql 9 server"):
        EmbeddedPostgres(9)
    with pytest.raises(ConfigurationError, match="no working postgresql"):
        EmbeddedPostgres.from_bindir(tmp_path)


def test_the_environment_names_other_installations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_PG17_BINDIR", str(find_bindir(16)))
    assert find_bindir(17) == find_bindir(16)


def test_a_server_ends_with_a_killed_process(tmp_path: Path) -> None:
    script = """
import sys, time
from cdc.stores.embedded import EmbeddedPostgres
server = EmbeddedPostgres(18, settings={"fsync": "off"})
server.start()
print(server.pid, server.directory, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, directory = owner.stdout.readline().split()
    assert Path(directory, "data", "postmaster.pid").exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert eventually(lambda: not embedded._is_alive(int(pid)))
    assert eventually(lambda: not Path(directory).exists())


def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs servers as somebody else")
def test_binaries_out_of_the_servers_reach_are_copied_once(
    monkeypatch: pytest.MonkeyPatch, open_tmp_path: Path
) -> None:
    cache = open_tmp_path / "cache"
    monkeypatch.setenv("CDC_CACHE_DIR", str(cache))
    package = find_bindir(18).parent.parent
    closed = open_tmp_path / "closed"
    shutil.copytree(package / "pginstall18", closed / package.name / "pginstall18", symlinks=True)
    shutil.copytree(f"{package}.libs", closed / f"{package.name}.libs")
    closed.chmod(0o700)
    bindir = closed / package.name / "pginstall18" / "bin"

    made: list[EmbeddedPostgres] = []
    threads = [threading.Thread(target=lambda: made.append(EmbeddedPostgres.from_bindir(bindir))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {server.bindir.is_relative_to(cache) for server in made} == {True}
    assert len(made) == 3
    assert len(list(cache.iterdir())) == 1
    with EmbeddedPostgres.from_bindir(bindir, settings={"fsync": "off"}) as server:
        assert ask(server.url(), "select 1") == 1
        done = subprocess.run(
            [server.bindir / "psql", server.url(), "-Atc", "select 2"], capture_output=True, check=True
        )
        assert done.stdout == b"2\n"

    cache.chmod(0o777)
    with pytest.raises(ConfigurationError, match="cache directory"):
        EmbeddedPostgres.from_bindir(bindir)


# The broker's URL


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///tmp/log", "/tmp/log"),
        ("file://localhost/tmp/log", "/tmp/log"),
        ("file:/tmp/log", "/tmp/log"),
        ("file:///tmp/a%20b%23c%3Fd", "/tmp/a b#c?d"),
        ("file:///tmp/a b", "/tmp/a b"),
    ],
)
def test_a_file_url_names_the_file(url: str, path: str) -> None:
    assert connect(url).path == Path(path)


@pytest.mark.parametrize(
    "url",
    [
        "log",
        "/tmp/log",
        "file://host/log",
        "file:log",
        "file:///tmp/log?x",
        "file:///tmp/log#x",
        "file:///tmp/%00",
        "file:///",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="file"):
        connect(url)


def test_names_that_mean_something_to_sqlite_are_only_names(tmp_path: Path) -> None:
    for name in ("a?mode=memory", "b#c", "d%41", ":memory:", "ü"):
        with EmbeddedBroker(tmp_path / name) as broker:
            broker.append("t", [b"a"])
        assert (tmp_path / name).is_file()


# The broker's file


def read(broker: EmbeddedBroker, offset: int, topic: str = "t") -> list[bytes]:
    return [message.body for message in broker.read(topic, offset, limit_bytes=PLENTY, wait_s=0)]


def test_a_reader_creates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "log"
    with EmbeddedBroker(path, create=False) as reader:
        assert reader.topics() == []
        assert reader.bounds("t") == (0, 0)
        assert list(reader.read("t", 0, limit_bytes=1, wait_s=0.05)) == []
        with pytest.raises(GapError, match="no offset 1"):
            read(reader, 1)
        with pytest.raises(UsageError, match="for reading"):
            reader.append("t", [b"a"])
        assert list(tmp_path.iterdir()) == []
        with EmbeddedBroker(path) as writer:
            writer.append("t", [b"a"])
            assert read(reader, 0) == [b"a"]


def test_reading_or_waiting_with_a_writer_object_creates_nothing(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path / "log") as broker:
        assert broker.bounds("t") == (0, 0)
        assert read(broker, 0) == []
    assert list(tmp_path.iterdir()) == []


def test_a_topic_created_again_is_noticed(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path / "log") as writer, EmbeddedBroker(tmp_path / "log", create=False) as reader:
        writer.append("t", [b"a", b"b"])
        assert read(reader, 0) == [b"a", b"b"]
        writer.delete("t")
        with pytest.raises(GapError, match=r"'t'.* was deleted while"):
            read(reader, 2)
        writer.append("t", [b"other", b"thing", b"here"])
        with pytest.raises(GapError, match=r"'t'.* was deleted and created again"):
            read(reader, 2)
        with EmbeddedBroker(tmp_path / "log", create=False) as fresh:
            assert read(fresh, 2) == [b"here"]


def test_another_writer_notices_a_topic_created_again(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path / "log") as one, EmbeddedBroker(tmp_path / "log") as two:
        one.append("t", [b"a"])
        two.delete("t")
        with pytest.raises(GapError, match="deleted"):
            one.append("t", [b"b"])
        two.append("t", [b"c"])
        with pytest.raises(GapError, match="created again"):
            one.append("t", [b"b"])
        assert read(two, 0) == [b"c"]


def test_a_file_created_again_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    reader = EmbeddedBroker(path, create=False)
    old = EmbeddedBroker(path)
    old.append("t", [b"a", b"b"])
    assert read(reader, 0) == [b"a", b"b"]
    for name in ("log", "log-wal", "log-shm"):
        (tmp_path / name).unlink()
    with pytest.raises(GapError, match="deleted"):
        read(reader, 2)
    with pytest.raises(GapError, match="removed or replaced"):
        old.append("t", [b"lost"])
    with EmbeddedBroker(path) as new:
        new.append("t", [b"c", b"d", b"e"])
        with pytest.raises(GapError, match="created again"):
            read(reader, 2)
        with pytest.raises(GapError):
            old.append("t", [b"lost"])
        old.close()
        reader.close()
        assert read(new, 0) == [b"c", b"d", b"e"]
    with EmbeddedBroker(path, create=False) as fresh:
        assert read(fresh, 0) == [b"c", b"d", b"e"]


def test_trim_forgets_what_is_below(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path / "log") as broker:
        broker.append("t", [b"%d" % number for number in range(10)])
        broker.append("u", [b"kept"])
        assert broker.trim("t", 4) == 4
        assert broker.bounds("t") == (4, 10)
        assert read(broker, 4) == [b"%d" % number for number in range(4, 10)]
        with pytest.raises(GapError, match="no offset 3: it holds 4 to 10"):
            read(broker, 3)
        assert broker.trim("t", 2) == 0
        assert broker.bounds("t") == (4, 10)
        assert broker.trim("t", 10) == 6
        assert broker.bounds("t") == (10, 10)
        assert broker.append("t", [b"next"]) == 10
        assert read(broker, 0, "u") == [b"kept"]
        with pytest.raises(UsageError, match="ends at 11"):
            broker.trim("t", 12)
        with pytest.raises(UsageError, match="ends at 0"):
            broker.trim("none", 1)


def test_trimmed_space_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EmbeddedBroker(path) as broker:
        for turn in range(20):
            end = broker.append("t", [bytes(1_000_000)] * 2) + 2
            if turn > 2:
                broker.trim("t", end - 2)
    assert path.stat().st_size < 15_000_000


def test_a_large_body_passes_and_an_impossible_one_is_refused(tmp_path: Path) -> None:
    large = os.urandom(1 << 20) * 64
    with EmbeddedBroker(tmp_path / "log") as broker, mmap.mmap(-1, BODY_BYTES_MAX + 1) as impossible:
        broker.append("t", [large])
        assert read(broker, 0) == [large]
        with pytest.raises(UsageError, match=str(BODY_BYTES_MAX + 1)) as caught:
            broker.append("t", [b"first", impossible])  # type: ignore[list-item]
        assert "fragments" in caught.value.remedy
        assert broker.bounds("t") == (0, 1)


def test_a_read_is_bounded_by_its_limit(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path / "log") as broker:
        broker.append("t", [bytes(100)] * 5 + [bytes(1_000_000)] + [bytes(100)])
        assert [len(m.body) for m in broker.read("t", 0, limit_bytes=350, wait_s=0)] == [100] * 3
        assert [len(m.body) for m in broker.read("t", 3, limit_bytes=350, wait_s=0)] == [100] * 2
        assert [len(m.body) for m in broker.read("t", 5, limit_bytes=350, wait_s=0)] == [1_000_000]


def test_a_second_writer_waits_then_gives_up(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EmbeddedBroker(path) as one, EmbeddedBroker(path, busy_s=0.2) as two, EmbeddedBroker(path) as patient:
        one.append("t", [b"a"])
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as holder:
            holder.execute("begin immediate")
            with pytest.raises(TransientError, match="locked"):
                two.append("t", [b"b"])
            assert read(two, 0) == [b"a"]
            timer = threading.Timer(0.3, holder.execute, ("commit",))
            timer.start()
            assert patient.append("t", [b"c"]) == 1
            timer.join()
        assert two.append("t", [b"b"]) == 2


def test_a_newer_format_and_a_foreign_database_are_refused(tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    with EmbeddedBroker(newer) as broker:
        broker.append("t", [b"a"])
    alter(newer, "update header set format_version = 2")
    foreign = tmp_path / "foreign"
    alter(foreign, "create table message (topic text)")
    for path, said in ((newer, "format version"), (foreign, "no log of ours")):
        for create in (True, False):
            with EmbeddedBroker(path, create=create) as broker, pytest.raises(ConfigurationError, match=said):
                broker.append("t", [b"b"]) if create else broker.topics()


def test_a_log_with_somebody_elses_trigger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EmbeddedBroker(path) as broker:
        broker.append("t", [b"a"])
    alter(path, "create trigger evil after insert on message begin delete from message; end")
    with EmbeddedBroker(path) as broker, pytest.raises(DecodeError, match="evil"):
        broker.append("t", [b"b"])


def alter(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)


def test_an_unusable_place_is_a_local_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with EmbeddedBroker(tmp_path / "file" / "log") as broker:
        assert broker.topics() == []
        with pytest.raises(LocalIOError, match="file"):
            broker.append("t", [b"a"])


def test_the_wal_stays_bounded_beside_a_busy_reader(tmp_path: Path) -> None:
    path = tmp_path / "log"
    done = threading.Event()
    received = 0

    def follow() -> None:
        nonlocal received
        with EmbeddedBroker(path, create=False) as reader:
            while not done.is_set() or received < reader.bounds("t")[1]:
                received += len(reader.read("t", received, limit_bytes=8 << 20, wait_s=0.01))

    thread = threading.Thread(target=follow)
    thread.start()
    largest = 0
    with EmbeddedBroker(path) as writer:
        for _ in range(150):
            writer.append("t", [bytes(1 << 20)])
            largest = max(largest, path.with_name("log-wal").stat().st_size)
        done.set()
        thread.join()
    assert received == 150
    assert largest < 80 << 20


def test_the_wal_stays_bounded_beside_readers_that_never_pause(tmp_path: Path) -> None:
    path = tmp_path / "log"
    done = threading.Event()

    def overlap() -> None:
        with contextlib.ExitStack() as stack:
            connections = [sqlite3.connect(path, timeout=30, isolation_level=None) for _ in range(2)]
            readers = [stack.enter_context(contextlib.closing(connection)) for connection in connections]
            while not done.is_set():
                for reader in readers:
                    if reader.in_transaction:
                        reader.execute("rollback")
                    reader.execute("begin")
                    reader.execute("select count(*) from topic").fetchone()
                    time.sleep(0.01)

    with EmbeddedBroker(path) as writer:
        writer.append("t", [b"a"])
        thread = threading.Thread(target=overlap)
        thread.start()
        for _ in range(250):
            writer.append("t", [bytes(1 << 20)])
        done.set()
        thread.join()
        assert path.with_name("log-wal").stat().st_size < 100 << 20


def test_the_journal_is_synced_at_every_commit(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path / "log") as broker:
        broker.append("t", [b"a"])
        assert broker._connection is not None
        assert broker._connection.execute("pragma synchronous").fetchone() == (2,)
        assert broker._connection.execute("pragma journal_mode").fetchone() == ("wal",)


@pytest.mark.skipif(shutil.which("strace") is None, reason="only strace sees what reached the kernel")
def test_between_an_append_and_its_return_stands_a_sync(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from cdc.brokers.embedded import EmbeddedBroker
with EmbeddedBroker(Path(sys.argv[1])) as broker:
    broker.append("t", [b"a"])
    os.write(1, b"BEFORE")
    broker.append("t", [b"b"])
    os.write(1, b"AFTER")
"""
    tracer = shutil.which("strace") or "strace"
    command = [tracer, "-f", "-e", "trace=fsync,fdatasync,write", sys.executable, "-c", script, str(tmp_path / "log")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "sync(" in text[text.index("BEFORE") : text.index("AFTER")]
