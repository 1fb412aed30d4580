"""A ``kafka://`` URL and its environment, understood; and how topics are named. Pure but for the password's file."""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote

from cdc.errors import (
    LocalIOError,
    UsageError,
)

OPTIONS: Final[Mapping[str, str]] = {
    "security": "plaintext, ssl, sasl_ssl or sasl_plaintext; follows from the other options where it is not given",
    "mechanism": "SCRAM-SHA-512 (without a word), SCRAM-SHA-256 or PLAIN",
    "username": "who we are, for sasl",
    "password-file": "a file whose first line is the password",
    "cafile": "PEM file of the authorities to trust, the system's where it is not given",
    "certfile": "PEM file of our certificate, for mutual TLS",
    "keyfile": "PEM file of its key, where certfile does not hold it",
    "insecure": "true: a password may travel without TLS, to this very machine only",
    "retention-ms": "how long topics that we create keep messages, -1 (without a word): for ever",
    "replicas": "replication factor of topics that we create, without a word the broker's default",
    "timeout-s": "how long the brokers may take to make a batch durable: 30 without a word",
}


_DEFAULT_PORT: Final = 9092
_MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_SECURITIES: Final = ("plaintext", "ssl", "sasl_plaintext", "sasl_ssl")
_TOPIC_CHARACTERS_MAX: Final = 249  # https://kafka.apache.org/documentation/#basic_ops_add_topic


_ESCAPED: Final = re.compile(rb"[^a-zA-Z0-9._-]|_(?=-[0-9A-F]{2})")
_ESCAPE: Final = re.compile(rb"_-([0-9A-F]{2})")
_PREFIX: Final = re.compile(r"[a-zA-Z0-9._-]{0,200}\Z")


@dataclass(frozen=True, slots=True)
class Target:
    """Where the brokers are and how to speak to them: a URL and its environment, understood."""

    servers: tuple[tuple[str, int], ...]
    prefix: str = ""
    security: str = "plaintext"
    mechanism: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    cafile: str = ""
    certfile: str = ""
    keyfile: str = ""
    retention_ms: int = -1
    replicas: int = -1
    timeout_s: float = 30.0

    @property
    def label(self) -> str:
        """``kafka://host:port``, for people."""
        return f"kafka://{','.join(self.addresses)}"

    @property
    def addresses(self) -> list[str]:
        return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.servers]

    @property
    def has_tls(self) -> bool:
        return self.security.endswith("ssl")

    @property
    def has_sasl(self) -> bool:
        return self.security.startswith("sasl")


def parse(url: str, environ: Mapping[str, str]) -> Target:
    """Understand a ``kafka://`` URL; see the module's head. Reads the password's file where one is named.

    :raises UsageError, LocalIOError: as :func:`connect`.
    """
    scheme, separator, rest = url.partition("://")
    if scheme != "kafka" or not separator:
        shown = f": {scheme}://" if separator and scheme.isalpha() else ""  # the rest may be a password
        raise UsageError(f"not a kafka url{shown}", remedy="write it as kafka://host:port/")
    rest, hash_sign, _ = rest.partition("#")
    rest, _, query = rest.partition("?")
    authority, _, prefix = rest.partition("/")
    userinfo, _, servers = authority.rpartition("@")
    if hash_sign or "@" in prefix:
        raise UsageError(
            "a kafka url has no # in it, and no @ after the first slash",
            remedy="write # as %23, / as %2F and @ as %40 in a user's name or password",
        )
    given = _options(query, environ)
    name, colon, password = userinfo.partition(":")
    if name:
        given["username"] = unquote(name)
    secret = unquote(password) if colon else _password(given, environ)
    return _checked(
        Target(
            servers=_servers(servers),
            prefix=_checked_prefix(unquote(prefix)),
            security=given.get("security", "").lower(),
            mechanism=given.get("mechanism", "").upper(),
            username=given.get("username", ""),
            password=secret,
            cafile=given.get("cafile", ""),
            certfile=given.get("certfile", ""),
            keyfile=given.get("keyfile", ""),
            retention_ms=_number(given, "retention-ms", -1, least=-1),
            replicas=_number(given, "replicas", -1, least=1),
            timeout_s=_number(given, "timeout-s", 30, least=1),
        ),
        insecure=_truth(given, "insecure"),
    )


def encode_topic(name: str, prefix: str = "") -> str:
    """The name that Kafka knows a topic by: legal names as they are, other characters as ``_-XX`` per UTF-8 byte.

    :raises UsageError: it is empty, no Unicode, or too long for Kafka.
    """
    try:
        data = name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"topic name is not unicode: {name!r}", remedy="use letters and digits") from error
    escaped = _ESCAPED.sub(lambda match: b"_-%02X" % match[0][0], data).decode()
    if name in {".", ".."}:
        escaped = "_-2E" * len(name)
    topic = prefix + escaped
    if not name or len(topic) > _TOPIC_CHARACTERS_MAX:
        raise UsageError(
            f"topic name {name[:40]!r} is {len(topic)} characters long to kafka",
            remedy=f"use a name of 1 to {_TOPIC_CHARACTERS_MAX} letters, digits, dots, dashes and underscores",
        )
    return topic


def decode_topic(topic: str, prefix: str = "") -> str | None:
    """The name that :func:`encode_topic` writes as ``topic``; None where there is none."""
    if not topic.startswith(prefix):
        return None
    data = _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), topic.removeprefix(prefix).encode())
    try:
        name = data.decode()
        return name if encode_topic(name, prefix) == topic else None
    except (UnicodeDecodeError, UsageError):
        return None


def _options(query: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Every option that was given, by its name."""
    given = {
        name: environ[variable]
        for name in OPTIONS
        if environ.get(variable := f"CDC_KAFKA_{name.replace('-', '_').upper()}")
    }
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name == "password":
            raise UsageError(
                "a password has no place in a url's query",
                remedy="put it into CDC_KAFKA_PASSWORD, or into a file that password-file= names",
            )
        if name not in OPTIONS:
            raise UsageError(f"unknown option {name!r} in the kafka url", remedy=f"options are {', '.join(OPTIONS)}")
        given[name] = value
    return given


def _password(given: Mapping[str, str], environ: Mapping[str, str]) -> str:
    path = given.get("password-file", "")
    if not path:
        return environ.get("CDC_KAFKA_PASSWORD", "")
    try:
        return Path(path).read_text("utf-8").partition("\n")[0].removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise LocalIOError(
            f"cannot read the password's file {path!r}: {getattr(error, 'strerror', None) or 'not utf-8'}",
            remedy="name a readable file with password-file=",
        ) from error


def _servers(text: str) -> tuple[tuple[str, int], ...]:
    servers = tuple(_server(part) for part in text.split(","))
    if len(set(servers)) != len(servers):
        raise UsageError(f"a server stands twice in {text!r}", remedy="name each once")
    return servers


def _server(text: str) -> tuple[str, int]:
    match = _SERVER.match(text)
    port = int(match["port"] or _DEFAULT_PORT) if match else 0
    if match is None or not 0 < port < 65536:
        raise UsageError(f"not a server's address: {text!r}", remedy="write kafka://host:port[,host:port]/")
    return match["v6"] or match["host"], port


_SERVER: Final = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[a-zA-Z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?\Z")


def _checked_prefix(prefix: str) -> str:
    if not _PREFIX.match(prefix):
        raise UsageError(
            f"not a prefix for topic names: {prefix[:80]!r}", remedy="use letters, digits, dots, dashes and underscores"
        )
    return prefix


def _number(given: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    text = given.get(name, str(default))
    if not re.fullmatch(r"-?[0-9]{1,15}", text) or (int(text) < least and int(text) != default):
        raise UsageError(f"{name} is {text!r}", remedy=f"write a whole number of at least {least}")
    return int(text)


def _truth(given: Mapping[str, str], name: str) -> bool:
    text = given.get(name, "false").lower()
    if text not in {"true", "false"}:
        raise UsageError(f"{name} is {text!r}", remedy="write true or false")
    return text == "true"


def _checked(target: Target, *, insecure: bool) -> Target:
    """Complete what follows from other options, and refuse what does not fit together or is not safe."""
    security = target.security or _implied_security(target)
    mechanism = target.mechanism or ("SCRAM-SHA-512" if security.startswith("sasl") else "")
    done = _replaced(target, security, mechanism)
    if security not in _SECURITIES:
        raise UsageError(f"security is {security!r}", remedy=f"use one of {', '.join(_SECURITIES)}")
    if done.has_sasl:
        _check_sasl(done)
    elif target.username or target.mechanism:
        raise UsageError(
            f"security={security} has no use for a username or a mechanism",
            remedy="use security=sasl_ssl, or leave both out",
        )
    if not done.has_tls and (target.cafile or target.certfile or target.keyfile):
        raise UsageError(f"security={security} has no use for tls files", remedy="use security=ssl or sasl_ssl")
    if target.keyfile and not target.certfile:
        raise UsageError("a keyfile without its certfile", remedy="name the certificate with certfile=")
    if security == "sasl_plaintext" and not (insecure and all(is_loopback(host) for host, _ in target.servers)):
        raise UsageError(
            f"security=sasl_plaintext would send a password to {target.label} without tls",
            remedy="use security=sasl_ssl; on this very machine alone insecure=true allows it",
        )
    return done


def _implied_security(target: Target) -> str:
    if target.username or target.mechanism:
        return "sasl_ssl"
    return "ssl" if target.cafile or target.certfile or target.keyfile else "plaintext"


def _replaced(target: Target, security: str, mechanism: str) -> Target:
    return replace(target, security=security, mechanism=mechanism)


def _check_sasl(target: Target) -> None:
    if target.mechanism not in _MECHANISMS:
        raise UsageError(
            f"mechanism {target.mechanism!r} is not supported", remedy=f"use one of {', '.join(_MECHANISMS)}"
        )
    if not target.username or not target.password:
        raise UsageError(
            f"security={target.security} needs a username and a password",
            remedy="set CDC_KAFKA_USERNAME, and CDC_KAFKA_PASSWORD or CDC_KAFKA_PASSWORD_FILE",
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
