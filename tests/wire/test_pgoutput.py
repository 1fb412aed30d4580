"""The decoder against what servers 15 to 18 really sent (golden/, see record_golden.py), and against broken bytes."""

import gzip
import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc.errors import DecodeError
from cdc.record import NULL, UNCHANGED, Value
from cdc.wire.pgoutput import (
    PG_EPOCH_US,
    BeforeKind,
    Begin,
    BeginPrepare,
    Change,
    ColumnMessage,
    Commit,
    CommitPrepared,
    Delete,
    Insert,
    LogicalMessage,
    Msg,
    Origin,
    Prepare,
    RelationMessage,
    RollbackPrepared,
    StreamAbort,
    StreamCommit,
    StreamPrepare,
    StreamStart,
    StreamStop,
    Truncate,
    TypeMessage,
    Update,
    decode,
    decode_change,
    decode_keepalive,
    decode_xlogdata,
    encode_status,
    read_tuple,
)
from tests.wire.replica import PUBLISHED, Replica, assert_same_tables, messages

GOLDEN = sorted((Path(__file__).parent / "golden").glob("pg*.jsonl.gz"))
MAJORS = [15, 16, 17, 18]


# An encoder, the decoder's other half -----------------------------------------------------------------------------


def encode(message: Msg) -> bytes:  # noqa: C901, PLR0911, PLR0912 (one case for each message)
    match message:
        case Begin(lsn, us, xid):
            return pack(">cQqI", b"B", lsn, us - PG_EPOCH_US, xid)
        case Commit(flags, commit, end, us):
            return pack(">cBQQq", b"C", flags, commit, end, us - PG_EPOCH_US)
        case Origin(lsn, name):
            return pack(">cQ", b"O", lsn) + _string(name)
        case RelationMessage(xid, oid, schema, name, identity, columns):
            head = b"R" + _xid(xid) + pack(">I", oid) + _schema(schema) + _string(name)
            return head + identity.encode() + pack(">H", len(columns)) + b"".join(map(_column, columns))
        case TypeMessage(xid, oid, schema, name):
            return b"Y" + _xid(xid) + pack(">I", oid) + _schema(schema) + _string(name)
        case Insert(xid, oid, after, forms):
            return b"I" + _xid(xid) + pack(">I", oid) + b"N" + _tuple(after, forms)
        case Update(xid, oid, before, kind, after, forms):
            old = b"" if before is None or kind is None else kind.encode() + _tuple(before, forms)
            return b"U" + _xid(xid) + pack(">I", oid) + old + b"N" + _tuple(after, forms)
        case Delete(xid, oid, before, kind, forms):
            return b"D" + _xid(xid) + pack(">I", oid) + kind.encode() + _tuple(before, forms)
        case Truncate(xid, oids, cascade, restart):
            return b"T" + _xid(xid) + pack(f">IB{len(oids)}I", len(oids), cascade + 2 * restart, *oids)
        case LogicalMessage(xid, transactional, lsn, prefix, content):
            head = b"M" + _xid(xid) + pack(">BQ", transactional, lsn) + _string(prefix)
            return head + pack(">I", len(content)) + content
        case StreamStart(xid, first):
            return pack(">cIB", b"S", xid, first)
        case StreamStop():
            return b"E"
        case StreamCommit(xid, flags, commit, end, us):
            return pack(">cIBQQq", b"c", xid, flags, commit, end, us - PG_EPOCH_US)
        case StreamAbort(xid, subxid, lsn, us):
            return pack(">cII", b"A", xid, subxid) + (
                b"" if lsn is None or us is None else pack(">Qq", lsn, us - PG_EPOCH_US)
            )
        case BeginPrepare(prepare, end, us, xid, gid):
            return pack(">cQQqI", b"b", prepare, end, us - PG_EPOCH_US, xid) + _string(gid)
        case Prepare(flags, lsn, end, us, xid, gid):
            return pack(">cBQQqI", b"P", flags, lsn, end, us - PG_EPOCH_US, xid) + _string(gid)
        case CommitPrepared(flags, lsn, end, us, xid, gid):
            return pack(">cBQQqI", b"K", flags, lsn, end, us - PG_EPOCH_US, xid) + _string(gid)
        case StreamPrepare(flags, lsn, end, us, xid, gid):
            return pack(">cBQQqI", b"p", flags, lsn, end, us - PG_EPOCH_US, xid) + _string(gid)
        case RollbackPrepared(flags, prepared, end, us, rolled_back, xid, gid):
            times = (us - PG_EPOCH_US, rolled_back - PG_EPOCH_US)
            return pack(">cBQQqqI", b"r", flags, prepared, end, *times, xid) + _string(gid)


def _xid(xid: int | None) -> bytes:
    return b"" if xid is None else pack(">I", xid)


def _string(text: str) -> bytes:
    return text.encode() + b"\0"


def _schema(name: str) -> bytes:
    return _string("" if name == "pg_catalog" else name)


def _column(column: ColumnMessage) -> bytes:
    return pack(">B", column.key) + _string(column.name) + pack(">Ii", column.type_oid, column.modifier)


def _tuple(values: Sequence[Value], forms: bytes) -> bytes:
    return pack(">H", len(values)) + b"".join(map(_value, values, forms))


def _value(value: Value, form: int) -> bytes:
    if value is UNCHANGED:
        return b"u"
    return b"n" if value == NULL else bytes([form]) + value


# What the servers said ------------------------------------------------------------------------------------------------


@lru_cache
def golden(major: int) -> tuple[dict[str, Any], dict[str, tuple[dict[str, str], list[bytes]]]]:
    """The facts of the server, and the options and frames of each configuration."""
    path = next(path for path in GOLDEN if path.name == f"pg{major}.jsonl.gz")
    facts, *lines = (json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines())
    return facts, {
        line["config"]: (line["options"], [bytes.fromhex(frame) for frame in line["frames"]]) for line in lines
    }


@lru_cache
def told(major: int, config: str) -> list[tuple[bytes, bool, Msg]]:
    options, frames = golden(major)[1][config]
    return messages(frames, int(options["proto_version"]))


def transcript(major: int, config: str) -> list[Msg]:
    return [message for _, _, message in told(major, config)]


def about(major: int, config: str, table: str) -> list[Msg]:
    """What is said of the rows of one table."""
    oids = {int(oid) for oid, name in golden(major)[0]["relations"].items() if name == table}
    return [m for m in transcript(major, config) if isinstance(m, Insert | Update | Delete) and m.relation_id in oids]


CASES = [(major, config) for major in MAJORS for config in golden(major)[1]]
every_recording = pytest.mark.parametrize(("major", "config"), CASES, ids=[f"{m}-{c}" for m, c in CASES])
every_server = pytest.mark.parametrize("major", MAJORS)
every_form = pytest.mark.parametrize("config", ["v1-text", "v1-binary"])


def of(kind: type, said: Sequence[Msg]) -> list[Any]:
    return [message for message in said if isinstance(message, kind)]


def v(text: str | bytes) -> bytes:
    """A value: its bytes behind their length."""
    raw = text.encode() if isinstance(text, str) else text
    return pack(">I", len(raw)) + raw


def i4(config: str, number: int) -> bytes:
    return v(pack(">i", number)) if config == "v1-binary" else v(str(number))


@every_recording
def test_every_recorded_message_encodes_back_to_its_bytes(major: int, config: str) -> None:
    assert [encode(message) for _, _, message in told(major, config)] == [raw for raw, _, _ in told(major, config)]


@every_recording
def test_replaying_the_log_gives_the_tables_the_server_has(major: int, config: str) -> None:
    expected = {"generated"} if config == "v4-generated" else PUBLISHED
    assert_same_tables(golden(major)[0]["tables"], transcript(major, config), expected)


@every_server
@every_form
def test_replaying_a_table_whose_columns_changed(major: int, config: str) -> None:
    replica = Replica()
    for message in transcript(major, config):
        replica.feed(message)
    rows = [(row["id"], row.get("name"), row.get("title"), row.get("extra")) for row in replica.tables["plain"]]
    assert rows == [
        (i4(config, 3), v("has extra"), None, i4(config, 7)),
        (i4(config, 4), v("with message"), None, None),
        (i4(config, 10), v("outer"), None, None),
        (i4(config, 12), NULL, None, None),
        (i4(config, 20), v("from elsewhere"), None, None),
        (i4(config, 30), None, v("renamed"), i4(config, 7)),
        (i4(config, 31), None, v("dropped"), i4(config, 7)),
    ]


@every_recording
def test_forms_are_what_was_asked_for(major: int, config: str) -> None:
    form = b"b" if "binary" in golden(major)[1][config][0] else b"t"
    seen = b"".join(m.forms for m in transcript(major, config) if isinstance(m, Insert | Update | Delete))
    assert {*seen} <= {*(form + b"nu")}
    assert form in seen


@every_recording
def test_xids_are_there_in_stream_blocks_only(major: int, config: str) -> None:
    for _, in_stream, message in told(major, config):
        if isinstance(message, RelationMessage | TypeMessage | Insert | Update | Delete | Truncate | LogicalMessage):
            assert (message.xid is not None) == in_stream


@every_recording
def test_decode_change_agrees_with_decode(major: int, config: str) -> None:
    for raw, in_stream, message in told(major, config):
        if in_stream or not isinstance(message, Insert | Update | Delete):
            continue
        before, kind = (None, None) if isinstance(message, Insert) else (message.before, message.before_kind)
        after = None if isinstance(message, Delete) else message.after
        assert decode_change(raw) == (raw[:1].decode(), message.relation_id, before, kind, after, message.forms)


@every_server
def test_the_log_is_in_commit_order_and_ends_above_where_it_began(major: int) -> None:
    commits = of(Commit, transcript(major, "v1-text"))
    begins = of(Begin, transcript(major, "v1-text"))
    ends = [commit.end_lsn for commit in commits]
    assert ends == sorted(set(ends))
    assert [begin.final_lsn for begin in begins] == [commit.commit_lsn for commit in commits]
    assert [begin.committed_us for begin in begins] == [commit.committed_us for commit in commits]
    assert all(commit.commit_lsn < commit.end_lsn for commit in commits)


@every_server
def test_times_are_of_this_century(major: int) -> None:
    first = of(Begin, transcript(major, "v1-text"))[0].committed_us
    assert 1_700_000_000_000_000 < first < 4_000_000_000_000_000
    # The origin's transaction carried a time we know: 2020-01-01 00:00:00 UTC.
    assert 1_577_836_800_000_000 in [begin.committed_us for begin in of(Begin, transcript(major, "v1-text"))]


@every_server
def test_relation_with_columns_and_modifiers(major: int) -> None:
    first = next(r for r in of(RelationMessage, transcript(major, "v1-text")) if r.name == "plain")
    assert first[2:] == (
        "public",
        "plain",
        "d",
        (
            ColumnMessage(True, "id", 23, -1),
            ColumnMessage(False, "name", 25, -1),
            ColumnMessage(False, "amount", 1700, (10 << 16 | 2) + 4),
            ColumnMessage(False, "at", 1184, -1),
            ColumnMessage(False, "ok", 16, -1),
            ColumnMessage(False, "data", 17, -1),
        ),
    )
    columns = [
        [c.name for c in r.columns] for r in of(RelationMessage, transcript(major, "v1-text")) if r.name == "plain"
    ]
    assert columns[0] == ["id", "name", "amount", "at", "ok", "data"]
    assert columns[-3:] == [
        ["id", "name", "amount", "at", "ok", "data", "extra"],
        ["id", "title", "amount", "at", "ok", "data", "extra"],
        ["id", "title", "amount", "at", "ok", "extra"],
    ]


@every_server
def test_identities_and_their_key_columns(major: int) -> None:
    said = {
        r.name: (r.identity, [c.name for c in r.columns if c.key])
        for r in of(RelationMessage, transcript(major, "v1-text"))
    }
    assert said["plain"] == ("d", ["id"])
    assert said["nothing"] == ("n", [])
    assert said["whole"] == ("f", ["id", "v", "large"])
    assert said["indexed"] == ("i", ["code"])
    assert said["columnless"] == ("d", [])
    assert said["Größe"] == ("d", ["id"])


@every_server
def test_odd_names(major: int) -> None:
    odd = next(r for r in of(RelationMessage, transcript(major, "v1-text")) if r.name == "Größe")
    assert (odd.schema, [c.name for c in odd.columns]) == ('odd "schema', ["id", "zwölf\\"])


@every_server
def test_types_are_named_and_a_domain_by_its_base(major: int) -> None:
    names = golden(major)[0]["types"]
    said = [(names[str(t.oid)], t.schema, t.name) for t in of(TypeMessage, transcript(major, "v1-text"))]
    assert said == [
        ("mood", "public", "mood"),
        ("positive", "pg_catalog", "int4"),
        ("_mood", "public", "_mood"),
        ("pair", "public", "pair"),
    ]


@every_server
@every_form
def test_before_images_of_the_default_identity(major: int, config: str) -> None:
    said = about(major, config, "plain")
    one, two = i4(config, 1), i4(config, 2)
    first, second, named, moved, deleted = said[:5]
    assert isinstance(first, Insert)
    assert isinstance(second, Insert)
    assert isinstance(named, Update)
    assert isinstance(moved, Update)
    assert (first.after[0], second.after[:2]) == (one, [two, NULL])
    assert (named.before, named.before_kind, named.after[:2]) == (None, None, [one, v("uno")])
    assert (moved.before, moved.before_kind, moved.after[0]) == ([two, *[NULL] * 5], "K", i4(config, 3))
    form = b"b" if config == "v1-binary" else b"t"
    assert moved.forms == form + b"n" + form * 4
    assert deleted == Delete(None, first.relation_id, [one, *[NULL] * 5], "K", form + b"n" * 5)


@every_server
def test_values_in_text(major: int) -> None:
    first, second = of(Insert, about(major, "v1-text", "plain"))[:2]
    assert first.after[2:] == [v("1.50"), v("2024-02-29 12:00:00.000001+00"), v("t"), v(r"\xdead")]
    assert second.after[2:] == [v("NaN"), v("infinity"), v("f"), v(r"\x")]
    custom = of(Insert, about(major, "v1-text", "custom"))[0]
    assert custom.after[1:] == [v("happy"), v("7"), v("{sad,NULL,ok}"), v("(1,x)"), v("seven")]


@every_server
def test_values_in_binary(major: int) -> None:
    first, second = of(Insert, about(major, "v1-binary", "plain"))[:2]
    assert first.after[3:] == [v(pack(">q", 762_523_200_000_001)), v(b"\1"), v(b"\xde\xad")]
    assert second.after[3:] == [v(pack(">q", 2**63 - 1)), v(b"\0"), v(b"")]
    assert of(Insert, about(major, "v1-binary", "custom"))[0].after[1:3] == [v("happy"), v(pack(">i", 7))]


@every_server
@every_form
def test_before_images_of_full_and_index_identity(major: int, config: str) -> None:
    whole = of(Update, about(major, config, "whole"))[0]
    assert (whole.before_kind, whole.before) == ("O", [i4(config, 1), v("a"), v("w" * 3000)])
    assert whole.after == [i4(config, 1), v("b"), UNCHANGED]
    assert whole.forms == (b"bbb" if config == "v1-binary" else b"ttt")
    deleted = of(Delete, about(major, config, "whole"))[0]
    assert (deleted.before_kind, deleted.before) == ("O", [i4(config, 2), NULL, v("short")])
    kept, moved = of(Update, about(major, config, "indexed"))
    assert (kept.before, kept.after[1:]) == (None, [v("A"), v("z")])
    assert (moved.before_kind, moved.before, moved.after) == ("K", [NULL, v("B"), NULL], [NULL, v("C"), v("y")])
    assert of(Delete, about(major, config, "indexed"))[0].before == [NULL, v("A"), NULL]


@every_server
@every_form
def test_unchanged_toast_is_not_null(major: int, config: str) -> None:
    small, moved = of(Update, about(major, config, "toasted"))
    form = b"b" if config == "v1-binary" else b"t"
    assert (small.before, small.after) == (None, [i4(config, 1), i4(config, 10), UNCHANGED])
    assert (moved.before_kind, moved.before[0], moved.after[2]) == ("K", i4(config, 1), UNCHANGED)
    assert small.forms == moved.forms == form * 2 + b"u"


@every_server
def test_truncates(major: int) -> None:
    names = golden(major)[0]["relations"]
    said = [
        (sorted(names[str(oid)] for oid in t.relation_ids), t.cascade, t.restart_identity)
        for t in of(Truncate, transcript(major, "v1-text"))
    ]
    assert said == [(["child", "parent"], True, True), (["nothing"], False, False), (["child"], False, False)]


@every_server
def test_a_row_without_columns(major: int) -> None:
    [row] = of(Insert, about(major, "v1-binary", "columnless"))
    assert (row.after, row.forms) == ([], b"")


@every_server
def test_messages(major: int) -> None:
    assert of(LogicalMessage, transcript(major, "v1-text")) == []
    said = of(LogicalMessage, transcript(major, "v1-messages"))
    assert [(m.transactional, m.prefix, m.content) for m in said] == [
        (False, "loose", b"not of any transaction"),
        (True, "bound", b"\0\xff"),
        (True, "alone", b""),
        (True, "streamed", b"in a stream"),
        (True, "flush", b""),
    ]


@every_server
def test_origin(major: int) -> None:
    assert of(Origin, transcript(major, "v1-text")) == [Origin(0x1_00AB_CDEF, "upstream")]
    said = transcript(major, "v1-text")
    assert isinstance(said[said.index(Origin(0x1_00AB_CDEF, "upstream")) - 1], Begin)


@pytest.mark.parametrize("major", [16, 17, 18])
def test_origin_none_leaves_out_what_came_from_elsewhere(major: int) -> None:
    ids = [row.after[0] for row in of(Insert, about(major, "v4-origin-none", "plain"))]
    assert v("20") not in ids
    assert v("12") in ids


@every_server
@every_form
def test_rolled_back_and_unpublished_work_is_not_there(major: int, config: str) -> None:
    ids = [row.after[0] for row in of(Insert, about(major, config, "plain"))]
    assert ids == [i4(config, n) for n in (1, 2, 4, 10, 12, 20, 30, 31)]
    assert about(major, config, "unpublished") == []


@every_server
def test_an_empty_transaction_is_not_told(major: int) -> None:
    said = transcript(major, "v1-text")
    assert not any(isinstance(a, Begin) and isinstance(b, Commit) for a, b in pairwise(said))


@every_server
@pytest.mark.parametrize("config", ["v2-streaming-text", "v2-streaming-binary", "v3-two-phase-streaming"])
def test_an_aborted_subtransaction_of_a_stream(major: int, config: str) -> None:
    said = transcript(major, config)
    xid = of(StreamStart, said)[0].xid
    [abort] = [a for a in of(StreamAbort, said) if a.xid == xid]
    assert (abort.subxid != xid, abort.abort_lsn, abort.aborted_us) == (True, None, None)
    taken_back = [m for m in of(Insert, said) if m.xid == abort.subxid]
    assert taken_back
    assert {value[-1:] for m in taken_back if isinstance(value := m.after[1], bytes)} == {b"q"}
    [commit] = [c for c in of(StreamCommit, said) if c.xid == xid]
    assert said.index(abort) < said.index(commit)
    first, *others = [start.first for start in of(StreamStart, said) if start.xid == xid]
    assert first
    assert len(others) > 2
    assert not any(others)


@pytest.mark.parametrize("major", [16, 17, 18])
@pytest.mark.parametrize("config", ["v4-parallel", "v4-parallel-two-phase"])
def test_parallel_streams_tell_where_and_when_they_aborted(major: int, config: str) -> None:
    said = transcript(major, config)
    xid = of(StreamStart, said)[0].xid
    [abort] = [a for a in of(StreamAbort, said) if a.xid == xid]
    [commit] = [c for c in of(StreamCommit, said) if c.xid == xid]
    assert 0 < abort.abort_lsn < commit.commit_lsn
    assert 0 <= commit.committed_us - abort.aborted_us < 60_000_000


@pytest.mark.parametrize("major", [16, 17, 18])
def test_protocol_4_without_parallel_says_no_more_than_protocol_2(major: int) -> None:
    assert {a.abort_lsn for a in of(StreamAbort, transcript(major, "v4-streaming-on"))} == {None}


@pytest.mark.parametrize("major", [15, 16, 17])  # 18 does not stream what it knows to be aborted: see the live tests
def test_a_stream_aborted_as_a_whole(major: int) -> None:
    said = transcript(major, "v2-streaming-text")
    [abort] = [a for a in of(StreamAbort, said) if a.xid == a.subxid]
    assert abort.xid in [start.xid for start in of(StreamStart, said)]
    assert abort.xid not in [commit.xid for commit in of(StreamCommit, said)]


@every_server
def test_in_a_stream_a_message_has_the_xid_of_the_top_transaction(major: int) -> None:
    said = transcript(major, "v2-streaming-binary")
    [message] = [m for m in of(LogicalMessage, said) if m.prefix == "streamed"]
    assert message.xid == of(StreamStart, said)[0].xid


@every_server
def test_two_phase(major: int) -> None:
    said = transcript(major, "v3-two-phase")
    steps = [
        (type(m).__name__, m.gid)
        for m in said
        if isinstance(m, BeginPrepare | Prepare | CommitPrepared | RollbackPrepared | StreamPrepare)
    ]
    assert steps == [
        ("BeginPrepare", "gold one"),
        ("Prepare", "gold one"),
        ("CommitPrepared", "gold one"),
        ("BeginPrepare", "gold none"),
        ("Prepare", "gold none"),
        ("RollbackPrepared", "gold none"),
        ("BeginPrepare", "gold big"),
        ("Prepare", "gold big"),
        ("CommitPrepared", "gold big"),
    ]
    begin, prepare, committed = of(BeginPrepare, said)[0], of(Prepare, said)[0], of(CommitPrepared, said)[0]
    assert begin == BeginPrepare(*prepare[1:])
    assert prepare.end_lsn < committed.commit_lsn < committed.end_lsn
    assert prepare.prepared_us < committed.committed_us
    assert prepare.xid == committed.xid
    second, [rolled_back] = of(Prepare, said)[1], of(RollbackPrepared, said)
    assert (rolled_back.prepare_end_lsn, rolled_back.prepared_us) == (second.end_lsn, second.prepared_us)
    assert rolled_back.rollback_end_lsn > second.end_lsn
    assert rolled_back.rolled_back_us > second.prepared_us


@every_server
def test_a_large_transaction_is_prepared_from_its_stream(major: int) -> None:
    said = transcript(major, "v3-two-phase-streaming")
    [prepared] = of(StreamPrepare, said)
    assert prepared.gid == "gold big"
    assert prepared.xid in [start.xid for start in of(StreamStart, said)]
    assert prepared.xid == of(CommitPrepared, said)[-1].xid


@every_form
def test_generated_columns_are_left_out(config: str) -> None:
    said = [r for r in of(RelationMessage, transcript(18, config)) if r.name == "generated"]
    assert [c.name for c in said[0].columns] == ["id", "v"]


def test_generated_columns_where_18_publishes_them() -> None:
    [relation] = of(RelationMessage, transcript(18, "v4-generated"))
    assert [c.name for c in relation.columns] == ["id", "doubled", "v"]
    assert of(Insert, transcript(18, "v4-generated"))[0].after == [v(pack(">i", 1)), v(pack(">i", 2)), v("g")]


@every_server
def test_frames_tell_where_they_are(major: int) -> None:
    frames = [frame for frame in golden(major)[1]["v1-text"][1] if frame[:1] == b"w"]
    commits = [decode_xlogdata(frame) for frame in frames if frame[25:26] == b"C"]
    assert [commit[0] for commit in commits] == [commit.end_lsn for commit in of(Commit, transcript(major, "v1-text"))]
    for frame in frames:
        start, end, sent_us, payload = decode_xlogdata(frame)
        assert start <= end
        assert sent_us > 1_700_000_000_000_000
        assert decode_xlogdata(memoryview(frame)) == (start, end, sent_us, payload)


# Frames ---------------------------------------------------------------------------------------------------------------


def test_keepalive() -> None:
    frame = b"k" + bytes.fromhex("00000001000000ff 0000000000000001 01")
    assert decode_keepalive(frame) == (0x1_0000_00FF, PG_EPOCH_US + 1, True)
    assert decode_keepalive(frame[:-1] + b"\0") == (0x1_0000_00FF, PG_EPOCH_US + 1, False)


def test_status() -> None:
    expected = b"r" + bytes.fromhex("0000000000000003 0000000000000002 0000000000000001 0000000000000007 01")
    assert encode_status(3, 2, 1, reply=True, now_us=PG_EPOCH_US + 7) == expected
    assert encode_status(3, 2, 1, reply=False, now_us=PG_EPOCH_US + 7) == expected[:-1] + b"\0"


@pytest.mark.parametrize("frame", [b"", b"w", b"w" + bytes(23), b"k" + bytes(24), b"z" + bytes(40)])
def test_broken_xlogdata(frame: bytes) -> None:
    with pytest.raises(DecodeError, match=r"replication frame .*at byte \d+"):
        decode_xlogdata(frame)


@pytest.mark.parametrize(
    "frame", [b"", b"k", b"k" + bytes(16), b"k" + bytes(18), b"k" + bytes(16) + b"\2", b"w" + bytes(17)]
)
def test_broken_keepalive(frame: bytes) -> None:
    with pytest.raises(DecodeError, match=r"at byte \d+"):
        decode_keepalive(frame)


# Broken messages ------------------------------------------------------------------------------------------------------

COLUMN = b"b" + v("x")


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (b"", "empty .* at byte 0"),
        (b"Z", "'Z' of 1 bytes: unknown message type, at byte 0"),
        (b"\xff", "'ÿ' of 1 bytes: unknown message type, at byte 0"),
        (b"B" + bytes(19), "'B' .* the transaction's beginning is cut short, at byte 1"),
        (b"B" + bytes(21), "'B' .* unexpected bytes after the message, at byte 21"),
        (b"E\0", "'E' .* unexpected bytes after the message, at byte 1"),
        (b"O" + bytes(8) + b"abc", "'O' .* the origin's name does not end, at byte 9"),
        (b"O" + bytes(8) + b"\xff\0", "'O' .* the origin's name is not UTF-8: .*, at byte 9"),
        (b"R" + bytes(4) + b"s\0t\0x\0\0", "'R' .* unknown replica identity 'x', at byte 9"),
        (b"R" + bytes(4) + b"s\0t\0d\xff\xff", "'R' .* the flag byte is cut short, at byte 12"),
        (b"R" + bytes(4) + b"s\0t\0d\0\1\2c\0" + bytes(8), "'R' .* unknown flags 0x02, at byte 12"),
        (b"T\xff\xff\xff\xff\0" + bytes(8), "'T' .* 4294967295 table ids are cut short, at byte 6"),
        (b"T\0\0\0\0\4", "'T' .* unknown flags 0x04, at byte 5"),
        (b"M\0" + bytes(8) + b"p\0\xff\xff\xff\xffx", "'M' .* content of 4294967295 bytes is cut short, at byte 16"),
        (b"S\0\0\0\1\2", "'S' .* unknown flags 0x02, at byte 5"),
        (b"A" + bytes(9), "'A' .* the LSN is cut short, at byte 9"),
        (b"I", "'I' .* the relation id is cut short, at byte 1"),
        (b"I\0\0\0\1K\0\0", "'I' .* unknown row image 'K', at byte 5"),
        (b"I\0\0\0\1N", "'I' .* column 1 is cut short, at byte 6"),
        (b"I\0\0\0\1N\0\1", "'I' .* column 1 is cut short, at byte 8"),
        (b"I\0\0\0\1N\0\2" + COLUMN, "'I' .* column 2 is cut short, at byte 14"),
        (b"I\0\0\0\1N\0\2n", "'I' .* column 2 is cut short, at byte 9"),
        (b"I\0\0\0\1N\0\1" + COLUMN[:-1], "'I' .* the last value reaches past the end, at byte 14"),
        (b"I\0\0\0\1N\0\1b\xff\xff\xff\xff", "'I' .* reaches past the end"),
        (b"I\0\0\0\1N\0\1t\xff\xff\xff\xff", "'I' .* reaches past the end"),
        (b"I\0\0\0\1N\0\1t\0\0", "'I' .* column 1 is cut short, at byte 8"),
        (b"I\0\0\0\1N\0\2nx", "'I' .* column 2 is of unknown kind 'x', at byte 9"),
        (b"I\0\0\0\1N\0\0!", "'I' .* unexpected bytes after the message, at byte 8"),
        (b"U\0\0\0\1K\0\0", "'U' .* the new row is missing, at byte 8"),
        (b"U\0\0\0\1K\0\1nN\0\0", "'U' .* rows of 1 and 0 columns do not agree"),
        (b"U\0\0\0\1O\0\1" + COLUMN + b"N\0\1t" + v("x"), "'U' .* rows of 1 and 1 columns do not agree"),
        (b"D\0\0\0\1N\0\0", "'D' .* unknown row image 'N', at byte 5"),
    ],
)
def test_broken_messages(message: bytes, says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        decode(message)


@pytest.mark.parametrize(("kind", "since"), [*((k, 2) for k in "SEcA"), *((k, 3) for k in "bPKrp")])
def test_messages_of_a_later_protocol(kind: str, since: int) -> None:
    with pytest.raises(DecodeError, match=f"it came with protocol {since}, but {since - 1} was agreed on, at byte 0"):
        decode(kind.encode() + bytes(60), protocol=since - 1)


def test_abort_details_belong_to_protocol_4() -> None:
    abort = pack(">cIIQq", b"A", 1, 2, 3, 4)
    assert decode(abort, protocol=4) == StreamAbort(1, 2, 3, PG_EPOCH_US + 4)
    with pytest.raises(DecodeError, match="unexpected bytes after the message, at byte 9"):
        decode(abort, protocol=3)


def test_decode_change_takes_row_messages_only() -> None:
    with pytest.raises(DecodeError, match=r"'B' .* not a row message, at byte 0"):
        decode_change(b"B" + bytes(20))
    with pytest.raises(DecodeError, match="cut short"):
        decode_change(b"")


def test_forms_of_an_update_are_those_of_either_image() -> None:
    old = b"\0\4" + COLUMN + b"n" + COLUMN + b"n"
    new = b"\0\4" + b"n" + COLUMN + b"u" + b"u"
    assert decode_change(b"U\0\0\0\1O" + old + b"N" + new) == Change(
        "U", 1, [v("x"), NULL, v("x"), NULL], "O", [NULL, v("x"), UNCHANGED, UNCHANGED], b"bbbu"
    )


def test_read_tuple_in_the_middle_of_a_message() -> None:
    data = b"...\0\3" + COLUMN + b"n" + b"t" + v("y") + b"..."
    assert read_tuple(data, 3) == ([v("x"), NULL, v("y")], b"bnt", len(data) - 3)
    with pytest.raises(DecodeError, match="at byte 99"):
        read_tuple(data, 99)


# Any message ----------------------------------------------------------------------------------------------------------

u8, u32, u64 = st.integers(0, 2**8 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
time_us = st.integers(PG_EPOCH_US - 2**63, PG_EPOCH_US + 2**63 - 1)
name = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
schema = name.filter(bool)
columns = st.builds(ColumnMessage, st.booleans(), name, u32, st.integers(-(2**31), 2**31 - 1))
LONGEST = 6


@st.composite
def rows(draw: st.DrawFn, forms: bytes) -> list[Value]:
    return [draw(_values(form)) for form in forms]


def _values(form: int) -> st.SearchStrategy[Value]:
    absent: dict[int, Value] = {ord("n"): NULL, ord("u"): UNCHANGED}
    return st.just(absent[form]) if form in absent else st.binary(max_size=300).map(v)


all_forms = st.lists(st.sampled_from(b"bbbtnu"), max_size=LONGEST).map(bytes)


def _insert(xid: int | None) -> st.SearchStrategy[Msg]:
    return all_forms.flatmap(lambda forms: st.builds(Insert, st.just(xid), u32, rows(forms), st.just(forms)))


def _delete(xid: int | None) -> st.SearchStrategy[Msg]:
    kind = st.sampled_from("KO")
    return all_forms.flatmap(lambda forms: st.builds(Delete, st.just(xid), u32, rows(forms), kind, st.just(forms)))


KINDS: list[BeforeKind | None] = [None, "K", "O"]


def _update(xid: int | None) -> st.SearchStrategy[Msg]:
    def of_forms(forms: bytes) -> st.SearchStrategy[Msg]:
        def of_kind(kind: BeforeKind | None) -> st.SearchStrategy[Msg]:
            before = st.none() if kind is None else rows(forms)
            return st.builds(Update, st.just(xid), u32, before, st.just(kind), rows(forms), st.just(forms))

        return st.sampled_from(KINDS).flatmap(of_kind)

    return all_forms.flatmap(of_forms)


def any_message(xid: int | None) -> st.SearchStrategy[Msg]:
    at = st.just(xid)
    return st.one_of(
        st.builds(Begin, u64, time_us, u32),
        st.builds(Commit, u8, u64, u64, time_us),
        st.builds(Origin, u64, name),
        st.builds(
            RelationMessage, at, u32, schema, name, st.sampled_from("dnfi"), st.lists(columns, max_size=5).map(tuple)
        ),
        st.builds(TypeMessage, at, u32, schema, name),
        _insert(xid),
        _update(xid),
        _delete(xid),
        st.builds(Truncate, at, st.lists(u32, max_size=5).map(tuple), st.booleans(), st.booleans()),
        st.builds(LogicalMessage, at, st.booleans(), u64, name, st.binary(max_size=50)),
        st.builds(StreamStart, u32, st.booleans()),
        st.just(StreamStop()),
        st.builds(StreamCommit, u32, u8, u64, u64, time_us),
        st.builds(StreamAbort, u32, u32, u64, time_us),
        st.builds(StreamAbort, u32, u32, st.none(), st.none()),
        st.builds(BeginPrepare, u64, u64, time_us, u32, name),
        st.builds(Prepare, u8, u64, u64, time_us, u32, name),
        st.builds(CommitPrepared, u8, u64, u64, time_us, u32, name),
        st.builds(RollbackPrepared, u8, u64, u64, time_us, time_us, u32, name),
        st.builds(StreamPrepare, u8, u64, u64, time_us, u32, name),
    )


streamed_or_not = st.none() | u32
settled = st.shared(streamed_or_not, key="xid")


@settings(max_examples=300, deadline=None)
@given(xid=settled, message=settled.flatmap(any_message))
def test_any_message_survives_encode_and_decode(xid: int | None, message: Msg) -> None:
    assert decode(encode(message), in_stream=xid is not None) == message


@settings(max_examples=200, deadline=None)
@given(xid=settled, message=settled.flatmap(any_message), extra=st.binary(min_size=1, max_size=4))
def test_no_message_is_right_when_cut_or_extended(xid: int | None, message: Msg, extra: bytes) -> None:
    whole = encode(message)
    shortened = whole[:9] if isinstance(message, StreamAbort) else None  # right again, without its details
    for end in range(len(whole)):
        if whole[:end] != shortened:
            with pytest.raises(DecodeError):
                decode(whole[:end], in_stream=xid is not None)
    if not (isinstance(message, StreamAbort) and message.abort_lsn is None):
        with pytest.raises(DecodeError, match="unexpected bytes after the message"):
            decode(whole + extra, in_stream=xid is not None)


# Fuzzing --------------------------------------------------------------------------------------------------------------


@lru_cache
def corpus() -> list[tuple[bytes, bool]]:
    """Short messages of every kind and server, real ones."""
    found = {(raw, in_stream) for case in CASES for raw, in_stream, _ in told(*case) if len(raw) < 400}
    return sorted(found)


def survives(message: bytes, *, in_stream: bool) -> None:
    """It decodes to what encodes to it again, or it is refused with a place in it; there is no third way."""
    try:
        decoded = decode(message, in_stream=in_stream)
    except DecodeError as error:
        assert "at byte " in str(error)
        assert len(str(error)) < 5000
        return
    # The one thing that has two spellings: the empty schema name stands for pg_catalog.
    again = message.replace(b"pg_catalog\0", b"\0") if isinstance(decoded, RelationMessage | TypeMessage) else message
    assert encode(decoded) in (message, again)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes(message: bytes, in_stream: bool) -> None:
    survives(message, in_stream=in_stream)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(b"BCORYIUDTMSEcAbPKrp"), st.binary(max_size=80), st.booleans())
def test_random_bodies_of_known_types(kind: int, body: bytes, in_stream: bool) -> None:
    survives(bytes([kind]) + body, in_stream=in_stream)


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_mutations_of_real_messages(data: st.DataObject) -> None:
    message, in_stream = data.draw(st.sampled_from(corpus()))
    broken = bytearray(message)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(broken)))
        edit = data.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        if edit == "set" and at < len(broken):
            broken[at] = data.draw(st.sampled_from(b"\0\1\x7f\x80\xffbtnuKONIUD") | u8)
        elif edit == "insert":
            broken[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif edit == "delete":
            del broken[at : at + data.draw(st.integers(1, 4))]
        else:
            del broken[at:]
    survives(bytes(broken), in_stream=data.draw(st.sampled_from([in_stream, not in_stream])))


def test_every_truncation_of_real_messages() -> None:
    kinds = {(raw[:1], in_stream): raw for raw, in_stream in corpus()}
    assert {kind for kind, _ in kinds} == {bytes([k]) for k in b"BCORYIUDTMSEcAbPKrp"}
    for (_, in_stream), raw in kinds.items():
        for end in range(len(raw)):
            survives(raw[:end], in_stream=in_stream)
