"""The command line without any server: what is refused, with which status and words."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

import cdc
from cdc import registry
from cdc.brokers.embedded import EmbeddedBroker
from cdc.cli import main
from cdc.cli.console import Console, plain_table, printable, size_text
from cdc.cli.options import COMMANDS, Settings
from cdc.cli.progress import Meter, WatchedCodec
from cdc.codec import EnvelopeCodec
from cdc.errors import ConfigurationError, UsageError
from cdc.ports import Progress
from cdc.position import Position
from cdc.record import Batch, Column, Format, Fragment, Kind, Relation, TransactionHead

LEADER = "postgresql://nobody:s3cret@127.0.0.1:1/shop"


class Result(NamedTuple):
    status: int
    out: str
    err: str


Cdc = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cdc:
    monkeypatch.chdir(tmp_path)

    def cdc_(*arguments: str) -> Result:
        status = main(arguments)
        out, err = capsys.readouterr()
        assert "s3cret" not in out + err
        return Result(status, out, err)

    return cdc_


@pytest.fixture
def log(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'log'}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run: Cdc, command: str) -> None:
    done = run(command, "--help")
    assert done.status == 0
    assert f"example:\n  {COMMANDS[command].example}" in done.out
    assert COMMANDS[command].example.startswith(f"cdc {command}")


def test_version(run: Cdc) -> None:
    assert run("--version") == Result(0, f"cdc {cdc.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["ship", LEADER], "required: BROKER"),
        (["ship", LEADER, "file:///l", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["ship", LEADER, "file:///l", LEADER], "unrecognized arguments: postgresql://nobody:***@"),
        (["ship", LEADER, "file:///l", "--form", "logical"], "unrecognized arguments"),
        (["ship", LEADER, "file:///l", "--format", "telepathy"], "--format: unknown format 'telepathy'"),
        (["ship", LEADER, "file:///l", "--format", "physical"], "format 'physical' is not built yet"),
        (["setup", LEADER, "--format", "statement"], "format 'statement' is not built yet"),
        (["ship", LEADER, "file:///l", "--until", "tomorrow"], "--until: not an LSN: 'tomorrow'"),
        (["ship", LEADER, "file:///l", "--values", "morse"], "--values is 'morse': not one of binary, text"),
        (["ship", LEADER, "file:///l", "--image", "old"], "--image is 'old': not one of auto, new, never"),
        (["ship", LEADER, "file:///l", "--workers", "0"], "--workers is '0': not between 1 and 64"),
        (["ship", LEADER, "file:///l", "--linger-ms", "soon"], "--linger-ms is 'soon'"),
        (["ship", LEADER, "file:///l", "--metrics", "65536"], "--metrics is '65536'"),
        (["ship", LEADER, "file:///l", "--slot", "Not-A-Slot"], "not a slot name: 'Not-A-Slot'"),
        (["ship", "sqlite:///a", "file:///l"], "no leader can be read at sqlite:// urls"),
        (["ship", "mysql://u:s3cret@h/db", "file:///l"], "no leader can be read at mysql:// urls"),
        (["ship", "host=h password=s3cret", "file:///l"], "not a url: 'host'"),
        (["ship", "postgresql://u:s3cret@:x/db", "file:///l"], "not a readable postgresql url"),
        (["ship", LEADER, "carrier://pigeon"], "no broker is known for carrier:// urls"),
        (["ship", LEADER, "file://relative/log"], "not a file URL"),
        (["apply", "file:///l", "mongodb://u:s3cret@h/db"], "no database is known for mongodb:// urls"),
        (["apply", "postgresql://a/b", "file:///l"], "no broker is known for postgresql:// urls"),
        (["verify", "sqlite:///a", "sqlite:///b"], "not a leader: sqlite://"),
        (["check", "duckdb:///a", "--as", "leader"], "not a leader: duckdb://"),
        (["check", "duckdb:///a", "--as", "boss"], "--as is 'boss': not one of leader, follower"),
        (["setup", LEADER, "--tables", "a,,b"], "--tables is 'a,,b': an empty name"),
        (["inspect", "file:///l", "--config", "/absent.toml"], "cannot read the configuration file /absent.toml"),
    ],
)
def test_usage_errors(run: Cdc, arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.status == 64
    assert done.out == ""
    first, second = done.err.splitlines()
    assert first.startswith("cdc: error: ")
    assert message in first
    assert second.startswith("remedy: ")


def test_unavailable_leader(run: Cdc, log: str) -> None:
    done = run("ship", LEADER, log, "--retry-s", "0")
    assert done.status == 69
    assert "connection refused" in done.err.lower()
    assert "Traceback" not in done.err
    assert "Traceback" in run("ship", LEADER, log, "--retry-s", "0", "--verbose").err


def test_environment_and_file(run: Cdc, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cdc.toml").write_text('stream = "from_file"\n[apply]\nretry-s = 1\n')
    monkeypatch.setenv("CDC_CONFIG", str(tmp_path / "cdc.toml"))
    assert "stream from_file" in run("apply", log, "sqlite:///f.db", "--until", "end").err
    monkeypatch.setenv("CDC_STREAM", "from_environment")
    assert "stream from_environment" in run("apply", log, "sqlite:///f.db", "--until", "end").err
    assert "stream flag" in run("apply", log, "sqlite:///f.db", "--until", "end", "--stream", "flag").err
    (tmp_path / "cdc.toml").write_text("sream = 1\n")
    done = run("apply", log, "sqlite:///f.db")
    assert done.status == 64
    assert "unknown key 'sream'" in done.err


def _batch(stream: str, lsn: int, table: str = "t") -> bytes:
    relation = Relation(1, "public", table, "d", (Column("id", 23, key=True),), ("id",))
    body = b"I\x00\x00\x00\x01N\x00\x01t\x00\x00\x00\x017"
    before, after = Position("7/shop", 1, lsn - 1), Position("7/shop", 1, lsn)
    heads = (TransactionHead(lsn, 9, 0, 1),)
    return EnvelopeCodec().encode(
        Batch(stream, Format.LOGICAL, Kind.LOG, before, after, (relation,), heads, (len(body),), body)
    )


def _write(log: str, stream: str, *bodies: bytes) -> None:
    broker = EmbeddedBroker(Path(log.removeprefix("file://")))
    broker.append(stream, bodies)
    broker.close()


def test_a_reader_takes_the_only_stream(run: Cdc, log: str) -> None:
    done = run("apply", log, "sqlite:///f.db")
    assert done.status == 64
    assert "holds no stream yet" in done.err
    _write(log, "one", _batch("one", 10))
    assert run("inspect", log).out.startswith("       0  log          0/9 → 0/A")
    _write(log, "two", _batch("two", 10))
    done = run("apply", log, "sqlite:///f.db")
    assert done.status == 64
    assert "holds 2 streams: one, two" in done.err
    assert "--stream" in done.err
    assert run("inspect", log).out == "one: offsets 0 to 1\ntwo: offsets 0 to 1\n"
    assert run("inspect", log, "--stream", "three").status == 64


def test_inspect_rows(run: Cdc, log: str) -> None:
    _write(log, "s", _batch("s", 10), _batch("s", 11))
    done = run("inspect", log, "--rows", "--limit", "1")
    assert done.out.splitlines()[1:] == ["    insert public.t (id='7')"]
    done = run("inspect", log, "--rows", "--json", "--from", "1")
    (line,) = done.out.splitlines()
    assert json.loads(line) == {
        "offset": 1,
        "stream": "s",
        "format": "logical",
        "kind": "log",
        "source": "7/shop",
        "epoch": 1,
        "previous": "0/A",
        "position": "0/B",
        "transactions": [{"position": "0/B", "xid": 9, "committed_us": 0, "messages": 1}],
        "messages": 1,
        "bytes": len(_batch("s", 11)),
        "relations": ["public.t"],
        "changes": [{"position": "0/B", "op": "insert", "table": "public.t", "after": {"id": "7"}}],
    }


def test_inspect_shows_what_stands_before_a_corrupt_batch(run: Cdc, log: str) -> None:
    broken = bytearray(_batch("s", 11))
    broken[-1] ^= 1
    _write(log, "s", _batch("s", 10), bytes(broken), _batch("s", 12))
    done = run("inspect", log)
    assert done.status == 65
    assert len(done.out.splitlines()) == 1
    assert "checksum" in done.err
    assert "(topic 's', offset 1)" in done.err


def test_names_cannot_move_the_cursor(run: Cdc, log: str) -> None:
    _write(log, "s", _batch("s", 10, table="t\x1b[2J\nx"))
    assert "\x1b" not in run("inspect", log, "--rows").out


def test_a_closed_pipe_is_no_error(log: str) -> None:
    _write(log, "s", *(_batch("s", 10 + n) for n in range(5000)))
    command = [sys.executable, "-m", "cdc", "inspect", log]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


def test_check_of_a_file(run: Cdc, tmp_path: Path) -> None:
    assert run("check", f"sqlite:///{tmp_path}/f.db") == Result(
        0, f"ok      sqlite: {tmp_path}/f.db will be made\n", f"sqlite:///{tmp_path}/f.db as a follower:\n"
    )
    assert not (tmp_path / "f.db").exists()
    done = run("check", "sqlite:///absent/f.db", "--json")
    assert done.status == 78
    (finding,) = json.loads(done.out)
    assert finding["level"] == "error"
    assert finding["statements"][0].startswith("-- mkdir")


def test_a_bug_is_told_as_one(run: Cdc, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> object:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(registry, "broker", broken)
    done = run("inspect", "file:///l")
    assert done.status == 70
    assert "ZeroDivisionError: division by zero" in done.err
    assert "--verbose" in done.err
    assert "Traceback" not in done.err


def test_registry_loads_only_what_is_asked_for() -> None:
    code = (
        "import sys; from cdc import registry; registry.store('sqlite:///x'); registry.broker('file:///x');"
        "print(sorted({'duckdb', 'psycopg', 'rich', 'kafka', 'importlib.metadata'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_built_in_part_can_be_loaded() -> None:
    for group, parts in registry.BUILT_IN.items():
        for name in parts:
            assert registry.load(group, name) is not None


def test_third_party_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file and one line, nothing else touched."""
    (tmp_path / "pigeon.py").write_text("def connect(url, *, create):\n    return (url, create)\n")
    about = tmp_path / "pigeon-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: pigeon\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[cdc.brokers]\ncarrier = pigeon:connect\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found: object = registry.broker("carrier://loft")("carrier://loft", create=True)
    assert found == ("carrier://loft", True)
    assert registry.is_broker("carrier://loft")


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("duckdb", "prometheus_client"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "cdc.stores.duckdb", raising=False)
    with pytest.raises(ConfigurationError, match="not installed") as caught:
        registry.store("duckdb:///x")
    assert "cdc[duckdb]" in caught.value.remedy
    with pytest.raises(ConfigurationError, match="not installed") as caught:
        registry.optional("prometheus_client")
    assert "cdc[metrics]" in caught.value.remedy


def test_scheme() -> None:
    assert registry.scheme_of("postgres://h/db") == "postgresql"
    with pytest.raises(UsageError):
        registry.scheme_of("://x")


def test_texts() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert printable("a\tb\x1b[1m\n") == "a\\tb\\x1b[1m\n"
    assert plain_table(["name", "n"], [["a", "10"]], [1]) == ["name   n", "a     10"]


def test_lines_where_nobody_watches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc.cli.progress.LINE_EVERY_S", 0.0)
    codec = WatchedCodec()
    meter = Meter(Console(Settings(json=False, quiet=False)), codec)
    meter(Progress("image", "public.t", 1, 2, 30, 300))
    meter(Progress("image", "public.t", 2, 2, 12, 120))
    codec.encode(EnvelopeCodec().decode(_batch("s", 10)))
    meter(Progress("stream", "0/A", 1, 0, 1, 20))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("image: 30 rows, ")
    assert lines[1].startswith("image complete: 42 rows in ")
    assert lines[2].startswith("at 0/A: 1 transactions, 1 rows, ")
    assert len(lines) == 3
    assert meter.summary("shipped").startswith("shipped an image of 42 rows and 1 transactions with 1 rows (440 B) in ")


def test_a_large_transaction_counts_once() -> None:
    codec = WatchedCodec()
    meter = Meter(Console(Settings(json=False, quiet=True)), codec)
    batch = EnvelopeCodec().decode(_batch("s", 10))
    for number, last in enumerate((False, False, True)):
        codec.encode(replace(batch, fragment=Fragment(number, last)))
        meter(Progress("stream", "0/A", 1, 0, 1, 20))
    assert (meter.totals.transactions, meter.totals.rows, meter.totals.size_bytes) == (1, 3, 60)
