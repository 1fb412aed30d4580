"""Every command, its arguments, options and example: one table for the parser, the environment and the file."""

import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple

from cdc.config import Option
from cdc.errors import UsageError
from cdc.position import parse_lsn
from cdc.record import Format


class Argument(NamedTuple):
    """A positional argument. ``nargs`` as argparse has it."""

    name: str
    help: str
    nargs: str | None = None


class Command(NamedTuple):
    """One command; ``module`` has its ``run(settings) -> exit status``."""

    module: str
    help: str
    arguments: tuple[Argument, ...]
    options: tuple[Option, ...]
    example: str


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return text

    return parse


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = kind(text)
        if not low <= number <= high:
            raise ValueError(f"not between {low:g} and {high:g}")
        return number

    return parse


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError("an empty name")
    return names


def _on_off(text: str) -> bool:
    return _choice("on", "off")(text) == "on"


def _prefix(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", text):
        raise ValueError("not 1 to 100 of the characters A-Z, a-z, 0-9, '.', '_' and '-'")
    return text


def _format(text: str) -> Format:
    try:
        return Format(text)
    except ValueError:
        raise UsageError(
            f"unknown format {text!r}", remedy=f"the formats are {', '.join(Format)}; built so far: logical, trigger"
        ) from None


_TABLE_COLUMNS: Final = re.compile(r"\s*([^(),]+?)\s*\(([^()]*)\)\s*(?:,|$)")
_TABLE_CONDITION: Final = re.compile(r"\s*([^\s:'\"()]+)\s*:(?!:)\s*(.+)", re.DOTALL)


def _labelled(table: str) -> str:
    """``schema.table``, "" for no table."""
    return table if "." in table or not table else f"public.{table}"


def _columns(text: str) -> dict[str, tuple[str, ...]]:
    if "(" not in text:
        return {"": tuple(_names(text))}
    found: dict[str, tuple[str, ...]] = {}
    at = 0
    while at < len(text):
        match = _TABLE_COLUMNS.match(text, at)
        if match is None:
            raise ValueError(f"not TABLE(COLUMN, …) at {text[at : at + 40]!r}")
        found[_labelled(match[1])] = tuple(_names(match[2]))
        at = match.end()
    return found


def _conditions(text: str) -> dict[str, str]:
    from sqlparse import split  # which knows where a semicolon stands inside a string

    found: dict[str, str] = {}
    for part in split(text):
        condition = part.strip().removesuffix(";").strip()
        match = _TABLE_CONDITION.fullmatch(condition)
        label = _labelled(match[1]) if match is not None else ""
        if label in found:
            raise ValueError(f"two conditions for {label or 'no table'}")
        found[label] = match[2] if match is not None else condition
    if not all(found.values()) or not found:
        raise ValueError("an empty condition")
    return found


def _masks(text: str) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for part in _names(text):
        name, separator, mask = part.rpartition("=")
        table, _, column = name.strip().rpartition(".")
        if not separator or not column or mask.strip() not in ("hash", "null", "drop"):
            raise ValueError(f"{part!r} is not COLUMN=hash, =null or =drop")
        found[_labelled(table), column] = mask.strip()
    return found


def _ship_until(text: str) -> int | Literal["now"]:
    return "now" if text == "now" else parse_lsn(text)


def _apply_until(text: str) -> int | Literal["end"]:
    return "end" if text in {"end", "now"} else parse_lsn(text)


STREAM = Option(
    "stream", "the stream's name, by default cdc_DATABASE; for a reader the broker's only one", metavar="NAME"
)
TABLES = Option("tables", "only these tables, as schema.table, separated by commas", _names, metavar="LIST")
SCHEMAS = Option("schemas", "only the tables of these schemas, separated by commas", _names, metavar="LIST")
PUBLICATION = Option("publication", "the publication's name, by default the stream's", metavar="NAME")
SLOT = Option("slot", "the replication slot's name, by default the stream's", metavar="NAME")
FORMAT = Option("format", "the kind of log: logical (default) or trigger", _format, Format.LOGICAL)
ANY_FORMAT = Option("format", "the kind of log, by default the one that the leader is set up for", _format)
# What of the tables triggers capture.
SHAPING: Final = (
    Option(
        "columns",
        "trigger: only these columns: TABLE(COLUMN, …), …; without TABLE where there is only one",
        _columns,
        metavar="LIST",
    ),
    Option(
        "where",
        "trigger: only rows for which this holds: TABLE: CONDITION; …; without TABLE where there is only one",
        _conditions,
        metavar="CONDITION",
    ),
    Option(
        "mask",
        "trigger: [TABLE.]COLUMN=hash, =null or =drop, separated by commas; without TABLE in every table that has it",
        _masks,
        metavar="LIST",
    ),
)
READER = Option("reader", "trigger: let this role ship, and read what is captured", metavar="ROLE")
RETRY_S = Option(
    "retry-s", "seconds of retries without progress before giving up (default 60)", _number(float, 0, 1e9), 60.0, "S"
)
METRICS = Option("metrics", "serve Prometheus metrics on 127.0.0.1 at this port", _number(int, 1, 65535), None, "PORT")
NATIVE: Final = "native"
CODEC = Option(
    "codec",
    "what the topics hold: native (one topic per stream), or debezium-json (portable events, one topic per table)",
    _choice(NATIVE, "debezium-json"),
    NATIVE,
)
PREFIX = Option("prefix", "events: what their topics' names begin with, by default the stream's name", _prefix)
# How values were written is to be known where they are read, too.
MODES: Final = (
    Option(
        "decimal-handling",
        "events: numeric as precise (default), string or double",
        _choice("precise", "string", "double"),
        metavar="MODE",
    ),
    Option(
        "time-precision",
        "events: times as adaptive (default), adaptive_time_microseconds, connect, isostring, micro- or nanoseconds",
        _choice("adaptive", "adaptive_time_microseconds", "connect", "isostring", "microseconds", "nanoseconds"),
        metavar="MODE",
    ),
    Option(
        "binary-handling",
        "events: bytea as bytes (default), base64, base64-url-safe or hex",
        _choice("bytes", "base64", "base64-url-safe", "hex"),
        metavar="MODE",
    ),
    Option(
        "interval-handling",
        "events: intervals as numeric (default) or string",
        _choice("numeric", "string"),
        metavar="MODE",
    ),
)
EVENTS_OUT: Final = (
    PREFIX,
    Option(
        "partitions", "events: of each topic that is created (default 1); keep it", _number(int, 1, 9999), metavar="N"
    ),
    Option("schemas-enable", "events: schemas in every record, on (default) or off", _on_off, metavar="on|off"),
    Option("tombstones", "events: a tombstone after each delete, on (default) or off", _on_off, metavar="on|off"),
    Option("transactions", "events: the transaction topic and blocks, on (default) or off", _on_off, metavar="on|off"),
    Option("truncates", "events: tell truncates, on (default) or off", _on_off, metavar="on|off"),
    *MODES,
)
EVENTS_IN: Final = (
    PREFIX,
    Option("key-by-key", "events: bring each key to its last state, without transactions", None, False),
    *MODES,
)
NATIVE_IN: Final = (
    Option("reload", "begin at the topic's newest image, if it is younger than the follower", None, False),
    Option("schema-changed", "the follower's tables were made to fit the leader's by hand", None, False),
    Option(
        "lacking",
        "a column of the leader's that the follower's table lacks: stop (default), or leave-out",
        _choice("stop", "leave-out"),
        "stop",
    ),
)
POLLED_BY = Option("polling-role", "let this role ship by polling, without REPLICATION", metavar="ROLE")
POLLING = Option(
    "polling", "poll the slot by the functions that `cdc setup --polling-role` makes, without REPLICATION", None, False
)
DRY_RUN = Option("dry-run", "print the statements, change nothing", None, False)

CONFIG = Option("config", "a TOML file with options (flags > environment CDC_… > file)", metavar="FILE")
JSON = Option("json", "print JSON in the stable form of docs/json.md", None, False)
QUIET = Option("quiet", "print errors and results only", None, False)
VERBOSE = Option("verbose", "show where an error came from", None, False)
COMMON: Final = (CONFIG, JSON, QUIET, VERBOSE)

_LEADER = Argument("leader", "postgresql://user@host:port/database")
_BROKER = Argument("broker", "file:///path/of/the/log or kafka://host:port/")
_FOLLOWER = Argument("follower", "postgresql://…, sqlite:///… or duckdb:///…")
_NAMES: Final = (STREAM, PUBLICATION, SLOT)

COMMANDS: Final[Mapping[str, Command]] = {
    "setup": Command(
        "cdc.cli.leader",
        "make a leader ready: replica identities, publication, replication slot; or triggers",
        (_LEADER,),
        (FORMAT, *_NAMES, TABLES, SCHEMAS, POLLED_BY, *SHAPING, READER, DRY_RUN),
        "cdc setup postgresql://postgres@db1:5432/shop --format logical --dry-run",
    ),
    "teardown": Command(
        "cdc.cli.leader",
        "take the slot and the publication of a leader, or its triggers, away again",
        (_LEADER,),
        (FORMAT, *_NAMES, DRY_RUN),
        "cdc teardown postgresql://postgres@db1:5432/shop",
    ),
    "check": Command(
        "cdc.cli.leader",
        "look for what would stop a stream, or what it cannot carry, and print what mends it",
        (Argument("url", "the leader or follower"),),
        (
            Option("as", "leader or follower; by default leader for PostgreSQL", _choice("leader", "follower")),
            FORMAT,
            POLLING,
            *_NAMES,
        ),
        "cdc check postgresql://postgres@db1:5432/shop",
    ),
    "ship": Command(
        "cdc.cli.carry",
        "carry a leader's log into a broker, until stopped or up to a position",
        (_LEADER, _BROKER),
        (
            FORMAT,
            *_NAMES,
            Option("until", "stop at this LSN, or at what is committed now", _ship_until, metavar="LSN|now"),
            Option(
                "values",
                "how values travel: binary, or text for types that have no portable binary form",
                _choice("binary", "text"),
                "binary",
            ),
            Option(
                "image",
                "copy the tables first: auto (where the topic holds no copy), new or never",
                _choice("auto", "new", "never"),
                "auto",
            ),
            Option("workers", "connections that copy the image (default 4)", _number(int, 1, 64), 4, "N"),
            Option(
                "linger-ms",
                "how long a transaction waits for others to share its message (default 5)",
                _number(float, 0, 60_000),
                5.0,
                "MS",
            ),
            POLLING,
            Option(
                "poll-ms", "polling: how long to wait for news (default 100)", _number(float, 1, 60_000), 100.0, "MS"
            ),
            CODEC,
            *EVENTS_OUT,
            RETRY_S,
            METRICS,
        ),
        "cdc ship postgresql://postgres@db1:5432/shop file:///var/lib/cdc/log --format logical",
    ),
    "apply": Command(
        "cdc.cli.carry",
        "rebuild a follower from a broker's topic, until stopped or up to a position",
        (_BROKER, _FOLLOWER),
        (
            STREAM,
            Option("until", "stop at this LSN, or at what the topic holds now (end)", _apply_until, metavar="LSN|end"),
            *NATIVE_IN,
            CODEC,
            *EVENTS_IN,
            RETRY_S,
            METRICS,
        ),
        "cdc apply file:///var/lib/cdc/log sqlite:////var/lib/cdc/shop.db --until end",
    ),
    "status": Command(
        "cdc.cli.status",
        "show how far a leader's slot, a broker's topic and followers are",
        (Argument("urls", "a leader, a broker, followers: any of them", "+"),),
        (ANY_FORMAT, *_NAMES),
        "cdc status postgresql://postgres@db1:5432/shop file:///var/lib/cdc/log sqlite:////var/lib/cdc/shop.db",
    ),
    "verify": Command(
        "cdc.cli.verify",
        "compare a follower with its leader, row by row",
        (_LEADER, _FOLLOWER),
        (
            ANY_FORMAT,
            *_NAMES,
            TABLES,
            SCHEMAS,
            Option(
                "keys", "how many differing keys of each kind to show (default 10)", _number(int, 0, 10_000), 10, "N"
            ),
            Option(
                "wait",
                "seconds to wait for the follower to reach the leader (default 0)",
                _number(float, 0, 1e9),
                0.0,
                "S",
            ),
        ),
        "cdc verify postgresql://postgres@db1:5432/shop sqlite:////var/lib/cdc/shop.db --wait 30",
    ),
    "inspect": Command(
        "cdc.cli.inspect",
        "show what is in a broker's topic",
        (_BROKER,),
        (
            STREAM,
            Option(
                "from",
                "the first offset to show, by default the first there is",
                _number(int, 0, 1 << 62),
                None,
                "OFFSET",
            ),
            Option("limit", "how many batches to show, by default all", _number(int, 0, 1 << 62), None, "N"),
            Option("rows", "show the changes too", None, False),
        ),
        "cdc inspect file:///var/lib/cdc/log --rows --limit 3",
    ),
    "demo": Command(
        "cdc.cli.demo",
        "watch the whole thing work, on embedded parts, in less than a minute",
        (),
        (
            Option("directory", "where to keep the parts, by default a temporary directory", metavar="DIR"),
            Option("keep", "do not remove the directory", None, False),
            Option("seconds", "how long the workload runs (default 5)", _number(float, 1, 3600), 5.0, "S"),
        ),
        "cdc demo",
    ),
}


def options_of(command: str) -> tuple[Option, ...]:
    return (*COMMANDS[command].options, *COMMON)


class Settings(Namespace):
    """Everything a command was told: its arguments by name, its options by key."""
