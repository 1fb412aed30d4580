"""Clients of kafka-python: their settings, how they are connected, and what their errors mean."""

import contextlib
import importlib
import logging
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from cdc.brokers.kafka.target import Target, is_loopback
from cdc.errors import (
    AccessError,
    CdcError,
    ConfigurationError,
    DecodeError,
    GapError,
    UnavailableError,
    UsageError,
)

_CONNECT_S: Final = 5.0
_REQUEST_MS: Final = 15_000
_LINGER_MS: Final = 120_000  # batches leave when we flush them, not before
_FETCH_BYTES: Final = 8 << 20

# Measured with bodies of 900 KiB, one batch after the other: 1 a batch 106 MB/s, 4 127, 8 140.
BATCH_BYTES: Final = 8 << 20

PRODUCER: Final[Mapping[str, Any]] = {
    "acks": "all",
    "enable_idempotence": True,
    "max_in_flight_requests_per_connection": 5,
    "compression_type": None,
    "linger_ms": _LINGER_MS,
    "batch_size": BATCH_BYTES + (1 << 20),
    "max_request_size": 1 << 30,  # the topic's own limit is checked before
    "delivery_timeout_ms": _LINGER_MS + 2 * _REQUEST_MS,
    "allow_auto_create_topics": False,
    "max_block_ms": _REQUEST_MS,
    "metrics_enabled": False,
}
CONSUMER: Final[Mapping[str, Any]] = {
    "group_id": None,
    "auto_offset_reset": "none",
    "enable_auto_commit": False,
    "isolation_level": "read_committed",
    "check_crcs": True,
    "allow_auto_create_topics": False,
    "fetch_max_bytes": _FETCH_BYTES,
    "max_partition_fetch_bytes": _FETCH_BYTES,
    "fetch_max_wait_ms": 100,  # another topic or offset can be asked for only after it
    "retry_backoff_ms": 20,
    "metrics_enabled": False,
}


def connect_client(target: Target, kind: str, settings: Mapping[str, Any]) -> Any:
    """A client of kafka-python. One that reaches nobody leaves a thread behind, so that is found out before."""
    _probe(target)
    _quieten()
    client, manager = _built(getattr(library(""), kind), {**_connection(target), **settings})
    if target.security == "sasl_plaintext":
        _check_advertised(client, manager, target)
    return client


def end_producer(producer: Any) -> None:
    """Have it deliver nothing more."""
    with contextlib.suppress(library("errors").KafkaError):
        producer.close(timeout=0)
    # A flush that times out keeps close() from getting further, and the thread would go on trying to deliver.
    producer._sender.force_close()
    producer._sender.join(_CONNECT_S)


@contextlib.contextmanager
def translated(target: Target, doing: str) -> Iterator[None]:
    """Errors of kafka-python leave as ours; ``doing`` begins their message."""
    try:
        yield
    except CdcError:
        raise
    except Exception as error:
        if isinstance(error, (library("errors").KafkaError, OSError)):
            raise translate(error, doing, target) from error
        raise


class _Reasons(logging.Handler):
    """Keeps the exceptions that kafka-python logs while it connects: what it raises at last tells of none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args if isinstance(record.args, tuple) else ()
        self.found += [each for each in arguments if isinstance(each, BaseException)]


def _built(kind: Callable[..., Any], settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """A connected client, and the manager of its connections. One that could not connect leaves no thread behind."""
    made: list[Any] = []

    def net_client(**configs: Any) -> Any:
        made.append(library("net.compat").KafkaNetClient(**configs))
        return made[-1]

    errors = library("errors")
    reasons = _Reasons()
    logger = logging.getLogger("kafka.net.manager")
    logger.addHandler(reasons)
    try:
        return kind(**settings, kafka_client=net_client), made[0]._manager
    except errors.KafkaError as error:
        for client in made:
            client.close()
            client._manager._net.stop()
        refusals = (errors.SaslAuthenticationFailedError, errors.UnsupportedSaslMechanismError)
        raise next((each for each in reasons.found if isinstance(each, refusals)), error) from error
    finally:
        logger.removeHandler(reasons)


def _connection(target: Target) -> dict[str, Any]:
    """What every client of kafka-python is told."""
    settings: dict[str, Any] = {
        "bootstrap_servers": target.addresses,
        "client_id": "cdc",
        "security_protocol": target.security.upper(),
        "bootstrap_timeout_ms": int(_CONNECT_S * 1000),
        "request_timeout_ms": _REQUEST_MS,
        "reconnect_backoff_max_ms": 1000,
    }
    if target.has_tls:
        settings["ssl_context"] = _tls(target)
    if target.has_sasl:
        settings["sasl_mechanism"] = target.mechanism
        settings["sasl_plain_username"] = target.username
        settings["sasl_plain_password"] = target.password
    return settings


def _tls(target: Target) -> ssl.SSLContext:
    """:raises ConfigurationError: a file cannot be used."""
    try:
        context = ssl.create_default_context(cafile=target.cafile or None)
        if target.certfile:
            # An empty password: a key that wants one must not ask at the terminal.
            context.load_cert_chain(target.certfile, target.keyfile or None, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        names = [name for name in (target.cafile, target.certfile, target.keyfile) if name]
        raise ConfigurationError(
            f"cannot use the tls files {', '.join(map(repr, names))}: {error}",
            remedy="name readable PEM files with cafile=, certfile= and keyfile=; the key without a password",
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _probe(target: Target) -> None:
    """Is there a server that accepts a connection, with TLS where we want it?

    :raises UnavailableError, AccessError: none does; with the reason of each.
    """
    context = _tls(target) if target.has_tls else None
    reasons: list[str] = []
    refused = False
    for host, port in target.servers:
        try:
            with socket.create_connection((host, port), timeout=_CONNECT_S) as plain:
                if context is not None:
                    _shake_hands(context, plain, host)
                return
        except OSError as error:
            refused = refused or isinstance(error, ssl.SSLCertVerificationError) or "alert" in str(error).lower()
            reasons.append(f"{host}:{port}: {(error.strerror or str(error) or type(error).__name__).lower()}")
    message = f"cannot reach kafka at {'; '.join(reasons)}"
    if refused:
        raise AccessError(
            message, remedy="check cafile=, certfile= and keyfile=, and the host in the server's certificate"
        )
    raise UnavailableError(message)


def _shake_hands(context: ssl.SSLContext, plain: socket.socket, host: str) -> None:
    with context.wrap_socket(plain, server_hostname=host) as secured:
        # With TLS 1.3 a server refuses our certificate only after the handshake.
        secured.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            secured.recv(1)


def _check_advertised(client: Any, manager: Any, target: Target) -> None:
    """A password must not go where a server on this machine sends us.

    :raises UsageError: a broker says that it is elsewhere.
    """
    for broker in manager.cluster.brokers():
        if not is_loopback(broker.host):
            client.close()
            raise UsageError(
                f"{target.label} sends us to {broker.host}:{broker.port}, and the password would travel without tls",
                remedy="use security=sasl_ssl",
            )


def _quieten() -> None:
    """Errors come out as exceptions; and at DEBUG kafka-python logs its configuration, passwords too."""
    logger = logging.getLogger("kafka")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)


def library(module: str) -> Any:
    """A module of kafka-python. Importing it takes half a second, so nobody does who does not need it."""
    return importlib.import_module(f"kafka.{module}" if module else "kafka")


def partition_zero(name: str) -> Any:
    return library("structs").TopicPartition(name, 0)


def translate(error: Exception, doing: str, target: Target) -> CdcError:
    """What an error of kafka-python means for us (https://kafka.apache.org/protocol#protocol_error_codes)."""
    errors = library("errors")
    message = f"{doing}: {words(error)}"
    if isinstance(error, (errors.OffsetOutOfRangeError, errors.LogTruncationError)):
        return GapError(f"{message}: the messages from there on were removed")
    if isinstance(error, (errors.AuthorizationError, errors.SaslAuthenticationFailedError)):
        return AccessError(
            f"{message} (as {target.username or 'nobody'!r})",
            remedy="grant the user Describe, Read and, to write, Write, Create and IdempotentWrite; check its password",
        )
    if isinstance(error, errors.CorruptRecordError):
        return DecodeError(message)
    for kinds, remedy in (
        ((errors.UnsupportedCodecError,), "install the package of that codec: lz4, zstandard or python-snappy"),
        ((errors.UnsupportedSaslMechanismError,), "choose a mechanism= that the brokers know"),
        ((errors.UnsupportedVersionError,), "use kafka 2.8 or newer"),
    ):
        if isinstance(error, kinds):
            return ConfigurationError(message, remedy=remedy)
    return UnavailableError(f"{message} ({target.label})")


def words(error: Exception) -> str:
    """An error's name and text, without the name twice and without what Kafka answered in full."""
    text = str(error).partition("failed with response")[0].strip() or "no reason told"
    name = type(error).__name__
    return text[:300] if text.startswith("[Error") or name in text else f"{name}: {text[:300]}"
