"""Record batches, written and read by us and by kafka-python; and batches that inflate, in every codec."""

import contextlib
import gzip
import importlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.brokers.kafka.framing import CHECKED_FROM, HEADER, Bare, Producer, frame, parse, seal, varint, with_header
from cdc.brokers.kafka.inflate import InflatedError, inflating
from cdc.brokers.kafka.sending import PreparedRecords

memory_records = pytest.importorskip("kafka.record.memory_records")
codec = importlib.import_module("kafka.codec")
checksum = importlib.import_module("kafka.record.util").calc_crc32c

Record = tuple[bytes | None, bytes | None, tuple[tuple[str, bytes], ...]]
records = st.lists(
    st.tuples(
        st.none() | st.binary(max_size=300),
        st.none() | st.binary(max_size=20) | st.binary(min_size=100, max_size=9000),
        st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=5)), max_size=3).map(tuple),
    ),
    max_size=40,
)


def sealed(bare: Bare, producer: Producer = Producer()) -> bytes:  # noqa: B008 - a constant
    whole = with_header(bare, 1700000000123, producer)
    seal(whole, checksum(memoryview(whole)[CHECKED_FROM:]))
    return bytes(whole)


def read_by_kafka_python(data: bytes) -> tuple[Any, list[Record]]:
    (batch,) = memory_records.MemoryRecords(data)
    assert batch.validate_crc()
    read = [(each.key, each.value, tuple(each.headers)) for each in batch]
    return batch, read


@given(records, st.integers(100, 20_000))
def test_kafka_python_reads_what_we_write(content: list[Record], limit_bytes: int) -> None:
    got = []
    for bare in frame(content, limit_bytes):
        data = sealed(bare, Producer(4000, 3, 77))
        batch, read = read_by_kafka_python(data)
        assert batch.records_count == len(read) == batch.last_offset_delta + 1
        assert (batch.producer_id, batch.producer_epoch, batch.base_sequence) == (4000, 3, 77)
        assert len(data) <= limit_bytes or len(read) == 1
        assert [record[1:] for record in parse(bare.body, 0, bare.records)] == read
        assert [record.delta for record in parse(bare.body, 0, bare.records)] == list(range(len(read)))
        got += read
    assert got == content


@given(records)
def test_we_read_what_kafka_python_writes(content: list[Record]) -> None:
    builder = memory_records.MemoryRecordsBuilder(2, 0, 1 << 30)
    for key, value, headers in content:
        assert builder.append(1700000000000, key, value, list(headers))
    builder.close()
    body = bytes(builder.buffer())[HEADER.size :]
    assert [record[1:] for record in parse(body, 0, len(content))] == content


@given(st.binary(max_size=60), st.integers(-1, 5))
def test_anything_is_read_or_refused(body: bytes, count: int) -> None:
    with contextlib.suppress(ValueError):
        assert len(parse(body, 0, count)) == max(count, 0)


@given(records.filter(bool), st.data())
def test_a_byte_that_changed_is_never_more_than_a_wrong_record(content: list[Record], data: st.DataObject) -> None:
    (bare,) = frame(content, 1 << 30)
    at = data.draw(st.integers(0, len(bare.body) - 1))
    broken = bytearray(bare.body)
    broken[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ValueError):
        assert len(parse(bytes(broken), 0, bare.records)) == bare.records


@pytest.mark.parametrize(("number", "written"), [(0, "00"), (-1, "01"), (1, "02"), (-2, "03"), (300, "d804")])
def test_varints(number: int, written: str) -> None:
    assert varint(number).hex() == written


def test_a_retry_sends_the_very_same_bytes() -> None:
    (bare,) = frame([(b"k", b"v", ())], 1000)
    prepared = PreparedRecords(bare)
    prepared.set_producer_state(5, 1, 9, False)
    prepared.close()
    first = bytes(prepared.buffer())
    prepared.close()
    assert bytes(prepared.buffer()) == first
    assert (prepared.producer_id, prepared.producer_epoch, prepared.base_sequence) == (5, 1, 9)
    assert prepared.size_in_bytes() == len(first)
    with pytest.raises(Exception, match="keeps the producer"):
        prepared.set_producer_state(5, 1, 10, False)


# Compressed ones ------------------------------------------------------------------------------------------------------

CODECS = {"gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
LIMIT = 1 << 20


def compressed(name: str, value: bytes) -> bytes:
    builder = memory_records.MemoryRecordsBuilder(2, CODECS[name], 1 << 30)
    builder.append(1700000000000, b"k", value, [])
    builder.close()
    return bytes(builder.buffer())


@pytest.mark.parametrize("name", CODECS)
def test_compressed_batches_are_read(name: str) -> None:
    value = b"so much of the same, " * 1000
    data = compressed(name, value)
    assert len(data) < len(value)
    with inflating(LIMIT):
        _, read = read_by_kafka_python(data)
    assert read == [(b"k", value, ())]


@pytest.mark.parametrize("name", CODECS)
def test_bombs_are_defused(name: str) -> None:
    data = compressed(name, bytes(64 * LIMIT))
    assert len(data) < 4 * LIMIT
    tracemalloc = importlib.import_module("tracemalloc")
    tracemalloc.start()
    try:
        with inflating(LIMIT), pytest.raises(InflatedError, match="inflates to more than"):
            read_by_kafka_python(data)
        assert tracemalloc.get_traced_memory()[1] < 16 * LIMIT  # the batch itself, a copy or two, and the limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", CODECS)
def test_what_several_batches_inflate_to_is_counted_together(name: str) -> None:
    data = compressed(name, bytes(LIMIT * 2 // 3))
    with inflating(LIMIT):
        read_by_kafka_python(data)
        with pytest.raises(InflatedError):
            read_by_kafka_python(data)


@pytest.mark.parametrize("name", CODECS)
def test_broken_compression_is_an_error(name: str) -> None:
    data = bytearray(compressed(name, b"so much of the same, " * 1000))
    data[HEADER.size + 5 :] = bytes(len(data) - HEADER.size - 5)
    (batch,) = memory_records.MemoryRecords(bytes(data))
    with inflating(LIMIT), pytest.raises(Exception):  # noqa: B017 - each library has its own
        list(batch)


def test_snappy_without_the_head_that_java_writes() -> None:
    snappy = importlib.import_module("snappy")
    from cdc.brokers.kafka.inflate import _unsnappy

    assert _unsnappy(snappy.compress(b"x" * 1000), LIMIT) == b"x" * 1000
    with pytest.raises(InflatedError):
        _unsnappy(snappy.compress(bytes(2 * LIMIT)), LIMIT)


def test_gzip_of_several_members() -> None:
    from cdc.brokers.kafka.inflate import _gunzip

    assert _gunzip(gzip.compress(b"a" * 10) + gzip.compress(b"b" * 10), LIMIT) == b"a" * 10 + b"b" * 10
    assert len(_gunzip(gzip.compress(bytes(LIMIT)) * 5, LIMIT)) == LIMIT + 1
