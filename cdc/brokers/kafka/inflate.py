"""Bounded decompression: kafka-python inflates what others compressed without a limit of its own."""

import contextlib
import importlib
import io
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from cdc.brokers.kafka.client import library

INFLATED_BYTES_MAX: Final = 64 << 20


class InflatedError(Exception):
    """A batch became larger than allowed."""


class _Allowance(threading.local):
    """How many bytes this thread may still inflate; None: it does not read for us."""

    left: int | None = None


_allowance: Final = _Allowance()


@contextlib.contextmanager
def inflating(limit_bytes: int) -> Iterator[None]:
    """Bound what kafka-python inflates in this thread meanwhile, ``limit_bytes`` in all.

    It has no such limit of its own, nor a place to set one: its two modules that read batches have their
    decompressing functions replaced, which do as before wherever nobody set a limit.
    """
    _replace_decoders()
    _allowance.left = limit_bytes
    try:
        yield
    finally:
        _allowance.left = None


def _replace_decoders() -> None:
    for name in ("record.default_records", "record.legacy_records"):
        module = library(name)
        for function, bounded in _DECODERS.items():
            original = getattr(module, function, None)
            if original is not None and not hasattr(original, "bounded"):
                setattr(module, function, _limited(original, bounded))


def _limited(original: Callable[[Any], bytes], bounded: Callable[[bytes, int], bytes]) -> Callable[[Any], bytes]:
    def decode(payload: Any) -> bytes:
        if _allowance.left is None:
            return original(payload)
        inflated = bounded(bytes(payload), _allowance.left)
        _allowance.left -= len(inflated)
        if _allowance.left < 0:
            raise InflatedError(f"inflates to more than {INFLATED_BYTES_MAX} bytes")
        return inflated

    decode.bounded = True  # type: ignore[attr-defined]
    return decode


def _gunzip(payload: bytes, limit_bytes: int) -> bytes:
    """One byte more than allowed at the most, as the others below."""
    inflated = b""
    while payload and len(inflated) <= limit_bytes:
        member = zlib.decompressobj(wbits=31)
        inflated += member.decompress(payload, limit_bytes + 1 - len(inflated))
        payload = member.unused_data
    return inflated


def _unlz4(payload: bytes, limit_bytes: int) -> bytes:
    inflated: bytes = importlib.import_module("lz4.frame").LZ4FrameDecompressor().decompress(payload, limit_bytes + 1)
    return inflated


def _unzstd(payload: bytes, limit_bytes: int) -> bytes:
    library = importlib.import_module("zstandard")
    if library.frame_content_size(payload) > limit_bytes:
        raise InflatedError(f"inflates to more than {limit_bytes} bytes")
    # The window is memory too, of whatever size the batch asks for.
    decompressor = library.ZstdDecompressor(max_window_size=INFLATED_BYTES_MAX)
    try:
        inflated: bytes = decompressor.stream_reader(io.BytesIO(payload), read_across_frames=True).read(limit_bytes + 1)
    except library.ZstdError as error:
        if "memory" in str(error):
            raise InflatedError(f"inflates to more than {INFLATED_BYTES_MAX} bytes: {error}") from error
        raise
    return inflated


def _unsnappy(payload: bytes, limit_bytes: int) -> bytes:
    """Each block begins with its length when inflated, which the library holds it to."""
    library = importlib.import_module("snappy")
    blocks = _xerial_blocks(payload) if payload.startswith(_XERIAL) else [payload]
    inflated = b""
    for block in blocks:
        if len(inflated) + _varint(block) > limit_bytes:
            raise InflatedError(f"inflates to more than {limit_bytes} bytes")
        inflated += library.decompress(block)
    return inflated


_XERIAL: Final = b"\x82SNAPPY\0"
_DECODERS: Final[Mapping[str, Callable[[bytes, int], bytes]]] = {
    "gzip_decode": _gunzip,
    "lz4_decode": _unlz4,
    "lz4_decode_old_kafka": _unlz4,
    "zstd_decode": _unzstd,
    "snappy_decode": _unsnappy,
}


def _xerial_blocks(payload: bytes) -> Iterator[bytes]:
    """The blocks that Java's snappy writes: a head of 16 bytes, then each behind its length of four."""
    at = 16
    while at < len(payload):
        size = int.from_bytes(payload[at : at + 4])
        yield payload[at + 4 : at + 4 + size]
        at += 4 + size


def _varint(data: bytes) -> int:
    """https://github.com/google/snappy/blob/main/format_description.txt, section 1."""
    value = 0
    for index, byte in enumerate(data[:5]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            break
    return value
