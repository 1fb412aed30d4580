"""Sessions with pinned settings, and the database's errors as ours.

Every setting that changes how a value prints or parses, which object a name means, or when the server gives up on us
is pinned, whatever the role, the database or the environment says.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, LiteralString
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow, namedtuple_row

from cdc.errors import (
    AccessError,
    CdcError,
    ConfigurationError,
    ConflictError,
    FencedError,
    GapError,
    LocalIOError,
    SchemaError,
    TransientError,
    UnavailableError,
    UsageError,
)
from cdc.sql.capture import PRINTING

Connection = psycopg.Connection[TupleRow]

# https://www.postgresql.org/docs/current/runtime-config-client.html
SETTINGS: Final[Mapping[str, str]] = {
    "search_path": "pg_catalog",
    **PRINTING,
    # A policy that hides rows from us would be a silent loss: fail instead.
    "row_security": "off",
    "default_transaction_isolation": "read\\ committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "jit": "off",
}

# A peer that went away without a word is noticed within 25 seconds, receiving or sending.
_NETWORK: Final[Mapping[str, int]] = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}

_SCHEMES = ("postgresql://", "postgres://")
_SHOWN = ("sslmode", "target_session_attrs")


def connect(
    url: str, *, replication: bool = False, application_name: str = "cdc", autocommit: bool = True
) -> Connection:
    """Open a session on the database that ``url`` names, with every setting pinned.

    ``replication`` opens a walsender bound to the database, which takes replication commands and simple queries but
    no bound parameters (https://www.postgresql.org/docs/current/protocol-replication.html).

    :raises UsageError: not a PostgreSQL URL.
    :raises UnavailableError, AccessError, ConfigurationError: the server is away, refuses us, or has no such database.
    """
    parameters = _parameters(url)
    asked = [str(parameters["options"])] if parameters.get("options") else []
    pinned = [f"-c {name}={value}" for name, value in SETTINGS.items()]
    ours: dict[str, str | int] = {
        **_NETWORK,
        "application_name": application_name,
        "client_encoding": "UTF8",
        "options": " ".join([*asked, *pinned]),
        **({"replication": "database"} if replication else {}),
    }
    password = str(parameters.get("password") or "")
    with translated(secret=password):
        connection = psycopg.connect(make_conninfo("", **{**parameters, **ours}), autocommit=True)
        # Unknown to older servers, which would refuse the session were it among the options.
        if connection.info.server_version >= 170000:
            connection.execute("SET transaction_timeout = 0")
        connection.autocommit = autocommit
        return connection


def source_of(connection: Connection) -> tuple[str, int]:
    """The history a session reads: (``system_identifier/database``, timeline).

    The timeline is that of the WAL being written, or on a standby of the one being replayed at its last restart point.
    """
    query = """
        SELECT s.system_identifier::text || '/' || current_database() AS source,
               CASE WHEN pg_is_in_recovery() THEN c.timeline_id::text
                    ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int::text END AS timeline
        FROM pg_control_system() s, pg_control_checkpoint() c
    """
    row = fetch(connection, query)[0]
    return row.source, int(row.timeline)


def safe_url(url: str) -> str:
    """The URL without its password, for people: ``postgresql://user@host:port/database``."""
    try:
        parameters = _parameters(url)
    except UsageError:
        return "postgresql://***"
    text = {name: str(value) for name, value in parameters.items() if value is not None}
    user = f"{quote(text['user'], safe='')}@" if "user" in text else ""
    hosts = [f"[{host}]" if ":" in host else quote(host, safe="") for host in text.get("host", "").split(",")]
    ports = text.get("port", "").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    places = ",".join(f"{host}:{port}" if port else host for host, port in zip(hosts, ports, strict=False))
    shown = "&".join(f"{name}={quote(text[name], safe='')}" for name in _SHOWN if name in text)
    return f"postgresql://{user}{places}/{quote(text.get('dbname', ''), safe='')}{'?' if shown else ''}{shown}"


def translate(error: psycopg.Error, *, secret: str = "") -> CdcError:
    """The error as one of ours, by SQLSTATE; never with a password in its message.

    https://www.postgresql.org/docs/current/errcodes-appendix.html
    """
    message = _message(error, secret)
    state = error.sqlstate or _state_of_refusal(message)
    hint = _scrub(error.diag.message_hint or "", secret) or None
    if state is None:
        # Without a state the server never answered, unless psycopg itself refused what we asked of it.
        return UnavailableError(message) if isinstance(error, psycopg.OperationalError) else CdcError(message)
    if state == "55000" and _FORGOTTEN.search(message):
        return GapError(message)
    kind = _STATES.get(state) or _CLASSES.get(state[:2]) or CdcError
    return kind(message, remedy=hint or _REMEDIES.get(state))


@contextmanager
def translated(*, secret: str = "") -> Iterator[None]:
    """Raise what psycopg raises as one of our errors. ``secret`` is struck out of the message."""
    try:
        yield
    except psycopg.Error as error:
        raise translate(error, secret=secret) from error


def fetch(
    connection: Connection, query: LiteralString, values: Sequence[Any] | Mapping[str, Any] | None = None
) -> list[Any]:
    """All rows of a query as named tuples, whatever the connection's own row factory is."""
    with translated(), connection.cursor(row_factory=namedtuple_row) as cursor:
        return list(cursor.execute(query, values).fetchall())


_CLASSES: Final[Mapping[str, type[CdcError]]] = {
    "08": UnavailableError,
    "22": SchemaError,
    "23": ConflictError,
    "28": AccessError,
    "40": TransientError,
    "53": UnavailableError,
    "58": LocalIOError,
}

_STATES: Final[Mapping[str, type[CdcError]]] = {
    "0A000": ConfigurationError,
    "25006": UnavailableError,  # read only: a standby until it is promoted
    "3D000": ConfigurationError,
    "3F000": SchemaError,
    "42501": AccessError,
    "42703": SchemaError,
    "42704": ConfigurationError,
    "42710": ConfigurationError,
    "42804": SchemaError,
    "42846": SchemaError,
    "42P01": SchemaError,
    "42P07": SchemaError,
    "42P10": SchemaError,
    "44000": ConflictError,
    "53100": LocalIOError,
    "55000": ConfigurationError,
    "55006": FencedError,
    "55P03": TransientError,
    "57014": TransientError,
    "57P01": UnavailableError,
    "57P02": UnavailableError,
    "57P03": UnavailableError,
    "57P04": ConfigurationError,
    "57P05": UnavailableError,
    "25P03": UnavailableError,
    "25P04": UnavailableError,
    "58P01": ConfigurationError,
}

_REMEDIES: Final[Mapping[str, str]] = {
    "3D000": "create the database, or mend its name in the url",
    "53100": "free disk space on the database server, then start again: nothing was counted as done",
    "53300": "raise max_connections or max_wal_senders on the server, or end sessions that are not needed",
    "28000": "let the role in: add a line for it to the server's pg_hba.conf, then SELECT pg_reload_conf()",
    "28P01": "mend the password: PGPASSWORD, ~/.pgpass or the url",
    "25006": "point the url at the primary, or wait until this server is promoted",
}

# libpq gives no SQLSTATE when the server refuses a session at its start: only the text tells.
_REFUSALS: Final = (
    ("28P01", re.compile(r"password authentication failed|no password supplied|SCRAM")),
    ("28000", re.compile(r"no pg_hba\.conf entry|pg_hba\.conf rejects|authentication failed|not permitted to log in")),
    ("28000", re.compile(r'role ".*" does not exist|SSL required|server does not support SSL')),
    ("42501", re.compile(r"permission denied|REPLICATION attribute|must be superuser or replication role")),
    ("3D000", re.compile(r'database ".*" does not exist')),
    ("55000", re.compile(r"is not currently accepting connections")),
    ("53300", re.compile(r"too many|remaining connection slots|max_wal_senders|number of requested standby")),
)
_FORGOTTEN: Final = re.compile(
    r"can no longer (get changes|access|be read|decode)|cannot read from (logical )?replication slot"
    r"|has been invalidated"
)
_PASSWORDS: Final = re.compile(r"(?i)(password\s*=\s*|password\s+(?='))('(?:[^'\\]|''|\\.)*'|[^\s'&]+)")
_USERINFO: Final = re.compile(r"(://[^:@/\s]*):[^@\s]*@")


def _parameters(url: str) -> dict[str, str | int | None]:
    if not url.startswith(_SCHEMES):
        scheme = re.match(r"[a-z0-9+]+(?=://)", url)
        shown = f"{scheme[0]}://" if scheme else "it has no scheme"
        raise UsageError(f"not a postgresql url: {shown}", remedy="write postgresql://user@host:port/database")
    _, _, rest = url.partition("://")
    userinfo, at, _ = rest.partition("@")
    # libpq cuts at the first '@' and '/': the rest of a password would show up as a host name or a port.
    if rest.count("@") > 1 or (at and "/" in userinfo):
        raise UsageError(
            "ambiguous postgresql url: a second '@', or a '/' before the '@'",
            remedy="percent-encode the special characters of the user name and password ('@' is %40, '/' is %2F)",
        )
    unreadable = UsageError(
        "not a readable postgresql url: postgresql://***",
        remedy="write postgresql://user@host:port/database, special characters percent-encoded",
    )
    try:
        parameters = dict(conninfo_to_dict(url))
    except psycopg.Error:
        # The parser's message quotes what it could not read, which may be the password.
        raise unreadable from None
    if not re.fullmatch(r"[0-9,]*", str(parameters.get("port") or "")):
        raise unreadable
    return parameters


def _message(error: psycopg.Error, secret: str) -> str:
    primary = error.diag.message_primary or str(error) or type(error).__name__
    detail = f" ({error.diag.message_detail})" if error.diag.message_detail else ""
    return _scrub(" ".join(f"{primary}{detail}".split()), secret)


def _scrub(message: str, secret: str) -> str:
    if secret:
        message = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", message)
    return _PASSWORDS.sub(r"\1***", _USERINFO.sub(r"\1:***@", message))


def _state_of_refusal(message: str) -> str | None:
    return next((state for state, text in _REFUSALS if text.search(message)), None)
