"""PostgreSQL's own output functions are the oracle for every value."""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, LiteralString

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.rows import namedtuple_row

from cdc.errors import DecodeError, SchemaError
from cdc.record import TypeDescription
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql.describe import describe_types
from cdc.wire import copy, oids
from cdc.wire.oids import BUILTIN, type_sql
from cdc.wire.values import python_reader, text_reader

Connection = psycopg.Connection[Any]

SETTINGS: LiteralString = """
    set datestyle = 'ISO'; set intervalstyle = 'postgres'; set timezone = 'UTC'; set extra_float_digits = 1;
    set bytea_output = 'hex'; set client_encoding = 'UTF8'; set lc_monetary = 'C'
"""

USER_TYPES: LiteralString = """
    drop schema if exists odd cascade;
    create schema odd;
    create type odd."Mo od" as enum ('sad', 'so, so', 'NULL', '"glad" \\ {}', '');
    create domain odd.small as numeric(6, 2);
    create domain odd.smaller as odd.small check (value < 1000);
    create domain odd.crate as box;
    create domain odd.ints as int4[];
    create type odd.floatrange as range (subtype = float8);
    create type odd.textrange as range (subtype = text, collation = "C");
    create type odd.rangerange as range (subtype = int4range);
    create type odd.pair as (a int4, "b c" text);
    create type odd.nest as (p odd.pair, ps odd.pair[], m odd."Mo od", d odd.smaller, n numeric[], r odd.floatrange);
    create type odd.nothing as ();
"""

LITERALS: Mapping[str, Sequence[str]] = {
    "bool": ["t", "f"],
    "int2": ["0", "-32768", "32767"],
    "int4": ["0", "-2147483648", "2147483647"],
    "int8": ["0", "-9223372036854775808", "9223372036854775807"],
    "oid": ["0", "4294967295"],
    "xid": ["0", "4294967295"],
    "cid": ["7"],
    "xid8": ["18446744073709551615"],
    "tid": ["(0,0)", "(4294967295,65535)"],
    "pg_lsn": ["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"],
    "float4": "0 -0 1 0.1 1e5 123456 1e6 1234567 16777216 3.4028235e38 1e-45 1.17549435e-38 -1e-5 0.0001 1e-37 9.5367431640625e-07 8388608.5 33554432 5e-44 NaN Infinity -Infinity".split(),  # noqa: E501, SIM905
    "float8": "0 -0 1 0.1 1e14 1e15 123456789012345 1234567890123456 4503599627370497.5 9007199254740993 1e16 1e22 1e23 -1e23 9e22 2e23 8.41e21 5e-324 2.2250738585072014e-308 1.7976931348623157e308 0.0001 0.00001 1e-5 123.456 4e21 9.5367431640625e-07 NaN Infinity -Infinity".split(),  # noqa: E501, SIM905
    "numeric": "0 0.0 0.00 -1 10000 100000000 0.0001 0.00001 -0.000000001234 123456789.987654321 1e100 1e-100 1e1000 12345678901234567890.12345678901234567890 9999.9999 NaN Infinity -Infinity".split(),  # noqa: E501, SIM905
    "text": ["", "é😀", 'a"b\\c\t\n', "NULL"],
    "varchar": ["", "x"],
    "bpchar": ["a  ", ""],
    "name": ["pg_class", ""],
    '"char"': ["a", "", "\\377", "\\200"],
    "json": ['{"a" :  1}', "null"],
    "jsonb": ['{"b": [1, "é"], "a": 1.50}', "null"],
    "jsonpath": ["$.a[*] ? (@ > 1)"],
    "uuid": ["00112233-4455-6677-8899-aabbccddeeff"],
    "bytea": ["", "\\x00ff5c27"],
    "date": [
        "2000-01-01",
        "1999-12-31",
        "0001-01-01",
        "0044-03-15 BC",
        "4713-01-01 BC",
        "4714-11-24 BC",
        "12345-06-07",
        "5874897-12-31",
        "infinity",
        "-infinity",
        "2024-02-29",
        "1900-03-01",
    ],
    "time": ["00:00", "24:00:00", "12:34:56.789", "00:00:00.000001", "01:02:03.1"],
    "timetz": ["00:00+00", "12:34:56.5-05:30", "23:59:59.999999+15:59:59", "24:00-15:59", "01:00+02"],
    "timestamp": [
        "2000-01-01 00:00",
        "1999-12-31 23:59:59.999999",
        "0044-03-15 12:00 BC",
        "infinity",
        "-infinity",
        "4714-11-24 00:00 BC",
        "294276-12-31 23:59:59.999999",
        "10000-01-01 01:02:03.4",
    ],
    "timestamptz": ["2024-02-29 12:34:56.123+02", "0001-12-31 23:59:59 BC", "infinity", "-infinity", "294276-12-31Z"],
    "interval": [
        "0",
        "1 year 2 mons 3 days 04:05:06.789",
        "-1 year +2 days -04:05:06",
        "1 mon -1 day +00:00:01",
        "-25 mon",
        "1 day",
        "-1 day",
        "-00:00:00.000001",
        "2562047788:00:54.775807",
        "178000000 years",
        "1 year -1 day",
        "13 mons",
        "-1 mon 1 day",
        "infinity",
        "-infinity",
    ],
    "inet": [
        "1.2.3.4",
        "1.2.3.4/24",
        "0.0.0.0/0",
        "::",
        "::1",
        "::2",
        "::ffff:1.2.3.4",
        "::1.2.3.4",
        "1::",
        "1:0:0:2::/64",
        "2001:db8::8:800:200c:417a/70",
        "1:0:2:0:3:0:4:0",
        "0:0:1::",
        "::ffff:0:1.2.3.4",
        "::5:0",
        "::1:0:5",
        "::ffff:0:0",
    ],
    "cidr": ["10.0.0.0/8", "1.2.3.4/32", "2001:db8::/32", "::1/128", "0.0.0.0/0", "::/0"],
    "macaddr": ["08:00:2b:01:02:03"],
    "macaddr8": ["08:00:2b:01:02:03:04:05"],
    "bit(11)": ["10110011101", "00000000000"],
    "bit(8)": ["00000001"],
    "varbit": ["", "1", "0000000001", "1111111111111111"],
    "point": ["(1,-2.5)", "(NaN,1e300)"],
    "line": ["{1,2.5,-3}"],
    "lseg": ["[(1,2),(3,4)]"],
    "box": ["(1,2),(3,4)"],
    "path": ["((1,2),(3,4))", "[(1,2),(3,4.5)]", "[(1,1)]"],
    "polygon": ["((1,2),(3,4),(5,6))"],
    "circle": ["<(1,2),3.25>"],
    "tsvector": ["", "a:1A,2B,3C,4 b 'it''s':16383 'back\\\\slash' 'sp ace'"],
    "tsquery": [
        "",
        "a",
        "a & b | c",
        "a & (b | !c)",
        "!(a | b) & !!c",
        "(a <-> b) <2> c",
        "a <-> (b <-> c)",
        "(a & b) <-> c",
        "fat:AB & rat:*C",
        "'it''s' | 'back\\\\slash'",
        "a | b | c | d",
        "a | (b | (c & d))",
        "!(a <-> b)",
        "a <-> !b",
    ],
    "pg_snapshot": ["10:20:10,14,15", "10:10:"],
    "txid_snapshot": ["10:20:10,14,15"],
    "int2vector": ["1 2 3", "", "-1"],
    "oidvector": ["1 4294967295", ""],
    "refcursor": ["c"],
    "int4[]": [
        "{}",
        "{1,2,NULL}",
        "{{1,2},{3,4}}",
        "[0:1]={1,2}",
        "[-2:-1][5:6]={{1,2},{3,NULL}}",
        "{{{1},{2}},{{3},{4}}}",
    ],
    "text[]": ['{"",NULL,"NULL","null","a b","a,b","{","}","\\"","\\\\","é","a;b","\\t","\\n","\\v"}', "{a,nuLL2}"],
    "varchar(3)[]": ["{abc,d}"],
    "bool[]": ["{t,f}"],
    "box[]": ["{(1,2),(3,4);(5,6),(7,8)}"],
    "timestamptz[]": ["{2024-01-01,infinity}"],
    "jsonb[]": ['{"{\\"a\\": [1]}"}'],
    "bytea[]": ['{"\\\\xff00"}'],
    "int4range": ["empty", "[1,5)", "(,)", "[,5)", "[1,)"],
    "numrange": ["(1.50,2.0]", "empty", "[1,1]"],
    "tsrange": ["[2024-01-01 00:00,2024-01-02 12:00:00.5)", "[-infinity,infinity]"],
    "tstzrange": ["[2024-01-01,)", "(0044-03-15 BC,2024-01-01]"],
    "daterange": ["[2024-01-01,2024-02-01)"],
    "int8range[]": ['{"[1,2)",empty,NULL}'],
    "int4multirange": ["{}", "{[1,2),[5,9)}", "{(,)}"],
    "datemultirange": ["{[2024-01-01,2024-02-01),[2025-01-01,)}"],
    "tstzmultirange": ["{[2024-01-01,2024-02-01)}"],
    "nummultirange[]": ['{"{[1,2],[3,4]}"}'],
    'odd."Mo od"': ["sad", "so, so", "NULL", '"glad" \\ {}', ""],
    'odd."Mo od"[]': ['{sad,"so, so","NULL",NULL,"","\\"glad\\" \\\\ {}"}'],
    "odd.smaller": ["12.5", "-0.01"],
    "odd.smaller[]": ["{1.00,NULL}"],
    "odd.crate[]": ["{(1,2),(3,4);(5,6),(7,8)}"],
    "odd.ints": ["{1,2}", "[0:0]={7}"],
    "odd.ints[]": ['{"{1,2}","{}"}'],
    "odd.floatrange": ["[1.5,1e23)", "(,)"],
    "odd.textrange": ['["a b","c,d")', '["","\\"")', '["(","[")', '["\\\\","é")'],
    "odd.rangerange": ['["[1,2)","[3,4)")'],
    "odd.floatmultirange": ["{[1,2),[3,4)}"],
    "odd.textmultirange": ['{["a b","c,d")}'],
    "odd.multirangerange": ['{["[1,2)","[3,4)")}'],
    "odd.pair": ["(1,a)", "(,)", '(1,"")', '(1,"a ""b"" \\\\ (,)")', "(-5,[x])"],
    "odd.pair[]": ['{"(1,a)",NULL,"(2,\\"b c\\")"}'],
    "odd.nest": ['("(1,""a b"")","{""(1,a)"",NULL}","so, so",1.5,"{1,NULL}","[1,2)")', "(,,,,,)"],
    "odd.nothing": ["()"],
}


class Oracle:
    """A database, asked for values in both of PostgreSQL's forms."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def oid(self, sql_type: str) -> int:
        row = self.connection.execute("select %s::regtype::oid::int8 as oid", [sql_type.partition("(")[0]]).fetchone()
        assert row is not None
        oid: int = row.oid
        if sql_type.endswith(")[]"):
            oid = next(array for array, known in BUILTIN.items() if known.kind == "array" and known.base == oid)
        return oid

    def types(self, oid: int) -> Mapping[int, TypeDescription]:
        return {described.oid: described for described in describe_types(self.connection, [oid])}

    def both(self, sql_type: str, literals: Iterable[str | None]) -> list[tuple[bytes, str]]:
        """(binary, text) of each literal."""
        return self._copied(
            f"select v::{sql_type} from unnest($1::text[]) with ordinality u(v, n) order by n", literals
        )

    def _copied(self, query: str, literals: Iterable[str | None]) -> list[tuple[bytes, str]]:
        values = "array[" + ",".join(_literal(literal) for literal in literals) + "]"
        query = query.replace("$1", values)
        binary = self._copy(f"copy ({query}) to stdout (format binary)")
        text = self._copy(f"copy ({query}) to stdout")
        return [
            (sent[4:], shown[4:].decode())
            for (sent,), (shown,) in zip(copy.rows(binary, "binary"), copy.rows(text, "text"), strict=True)
        ]

    def _copy(self, statement: str) -> bytes:
        with self.connection.cursor() as cursor, cursor.copy(statement.encode()) as out:
            return b"".join(bytes(piece) for piece in out)

    def agrees(self, sql_type: str, literals: Iterable[str | None]) -> None:
        oid = self.oid(sql_type)
        types = self.types(oid)
        read = text_reader(oid, types)
        binary_python, text_python = python_reader(oid, "b", types), python_reader(oid, "t", types)
        for sent, shown in self.both(sql_type, literals):
            assert read(sent) == shown
            of_binary, of_text = binary_python(sent), text_python(shown.encode())
            assert repr(of_binary) == repr(of_text)


def _literal(text: str | None) -> str:
    return "NULL" if text is None else "'" + text.replace("'", "''") + "'"


@pytest.fixture(scope="module")
def oracle(postgres18: EmbeddedPostgres) -> Iterator[Oracle]:
    with psycopg.connect(postgres18.url(), autocommit=True, row_factory=namedtuple_row) as connection:
        connection.execute(SETTINGS)
        connection.execute(USER_TYPES)
        yield Oracle(connection)
        connection.execute("drop schema odd cascade")


@pytest.mark.parametrize("sql_type", LITERALS)
def test_text_and_python_values_agree_with_the_server(oracle: Oracle, sql_type: str) -> None:
    oracle.agrees(sql_type, LITERALS[sql_type])


def test_values_agree_with_an_older_server(postgres16: EmbeddedPostgres) -> None:
    with psycopg.connect(postgres16.url(), autocommit=True, row_factory=namedtuple_row) as connection:
        connection.execute(SETTINGS)
        connection.execute(USER_TYPES)
        older = Oracle(connection)
        for sql_type, literals in LITERALS.items():
            older.agrees(sql_type, [one for one in literals if sql_type != "interval" or "infinity" not in one])
        connection.execute("drop schema odd cascade")


def test_money_is_a_number_with_two_digits(oracle: Oracle) -> None:
    read = text_reader(oids.MONEY, {})
    sent = [binary for binary, _ in oracle.both("money", ["0", "-0.05", "1234567.89", "-92233720368547758.08"])]
    assert [read(one) for one in sent] == ["0.00", "-0.05", "1234567.89", "-92233720368547758.08"]


def test_xml_is_its_text() -> None:
    assert text_reader(oids.XML, {})("<é/>".encode()) == "<é/>"


def test_infinite_intervals_need_no_server() -> None:
    read = text_reader(oids.INTERVAL, {})
    assert read(struct.pack(">qii", 2**63 - 1, 2**31 - 1, 2**31 - 1)) == "infinity"
    assert read(struct.pack(">qii", -(2**63), -(2**31), -(2**31))) == "-infinity"


# Generated values. The server takes many at once, so each example is a list.

GENERATED = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
NASTY_TEXT = st.text(st.sampled_from("\"\\{}()[],;' \t\n\v\rNULnulaé"), max_size=6)
TEXTS = st.lists(PLAIN_TEXT | NASTY_TEXT, min_size=1, max_size=30)


def many(one: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(one, min_size=1, max_size=100)


def _float4_literal(pattern: int) -> str:
    number: float = struct.unpack(">f", struct.pack(">I", pattern))[0]
    return repr(number)


@GENERATED
@given(many(st.floats().map(repr) | st.integers(1, 2**60).map(lambda n: repr(float(n)))))
def test_double_precision(oracle: Oracle, literals: list[str]) -> None:
    oracle.agrees("float8", literals)


@GENERATED
@given(many(st.tuples(st.integers(1, 99), st.integers(-30, 45)).map(lambda pair: f"{pair[0]}e{pair[1]}")))
def test_short_double_precision(oracle: Oracle, literals: list[str]) -> None:
    oracle.agrees("float8", literals)
    oracle.agrees("float4", [one for one in literals if int(one.split("e")[1]) <= 36])


def test_powers_of_two(oracle: Oracle) -> None:
    oracle.agrees("float8", [repr(2.0**n) for n in range(-1074, 1024)])
    oracle.agrees("float4", [repr(2.0**n) for n in range(-149, 128)])


@GENERATED
@given(many(st.integers(0, 2**32 - 1).map(_float4_literal)))
def test_real(oracle: Oracle, literals: list[str]) -> None:
    oracle.agrees("float4", literals)


@GENERATED
@given(many(st.decimals(allow_nan=False, allow_infinity=False, places=None).map(str)))
def test_numeric(oracle: Oracle, literals: list[str]) -> None:
    oracle.agrees("numeric", [one for one in literals if abs(int((one.upper() + "E0").split("E")[1])) < 1000])


@GENERATED
@given(many(st.integers(-2_451_545, 2_145_031_948).map(str)))
def test_date(oracle: Oracle, days: list[str]) -> None:
    pairs = oracle._copied("select date '2000-01-01' + v::int4 from unnest($1::text[]) with ordinality u(v, n)", days)
    read = text_reader(oids.DATE, {})
    assert [read(sent) for sent, _ in pairs] == [shown for _, shown in pairs]


@GENERATED
@given(
    many(st.integers(-211_813_488_000_000_000, 9_223_371_331_199_999_999).map(lambda us: struct.pack(">q", us).hex()))
)
def test_timestamp(oracle: Oracle, hexes: list[str]) -> None:
    """The server receives our bytes and shows them, so that no value is out of reach."""
    header = copy.SIGNATURE + bytes(8)
    rows = b"".join(struct.pack(">hi", 1, 8) + bytes.fromhex(one) for one in hexes)
    oracle.connection.execute("create temp table moments (at timestamp)")
    with oracle.connection.cursor() as cursor, cursor.copy("copy moments from stdin (format binary)") as into:
        into.write(header + rows + b"\xff\xff")
    found = oracle.connection.execute("select at::text as local, (at at time zone 'UTC')::text as utc from moments")
    shown = [tuple(row) for row in found.fetchall()]
    oracle.connection.execute("drop table moments")
    local, utc = text_reader(oids.TIMESTAMP, {}), text_reader(oids.TIMESTAMPTZ, {})
    assert [(local(bytes.fromhex(one)), utc(bytes.fromhex(one))) for one in hexes] == shown


@GENERATED
@given(
    many(
        st.tuples(st.integers(-(10**9), 10**9), st.integers(-(10**6), 10**6), st.integers(-(10**15), 10**15)).map(
            lambda part: f"{part[0]} mons {part[1]} days {part[2]} microseconds"
        )
    )
)
def test_interval(oracle: Oracle, literals: list[str]) -> None:
    oracle.agrees("interval", literals)


@GENERATED
@given(many(st.ip_addresses().map(str) | st.lists(st.sampled_from("01f"), min_size=8, max_size=8).map(":".join)))
def test_inet(oracle: Oracle, literals: list[str]) -> None:
    oracle.agrees("inet", literals)


@GENERATED
@given(TEXTS)
def test_quoting(oracle: Oracle, texts: list[str]) -> None:
    """The same texts inside an array, a composite, an array of composites and a range."""
    source = "unnest($1::text[]) with ordinality u(v, n)"
    for sql_type, made in (
        ("text[]", "array[[v, NULL], ['x', v]]"),
        ("odd.pair", "row(1, v)::odd.pair"),
        ("odd.pair[]", "array[row(1, v)::odd.pair]"),
        ("odd.textrange", "odd.textrange(v, NULL, '[]')"),
        ("tsvector", "array_to_tsvector(array[v || 'x'])"),
    ):
        oid = oracle.oid(sql_type)
        read = text_reader(oid, oracle.types(oid))
        for sent, shown in oracle._copied(f"select {made} from {source}", texts):
            assert read(sent) == shown


# What is refused


USER = {
    90001: TypeDescription(90001, "public", "geometry", "base"),
    90002: TypeDescription(90002, "public", "_geometry", "array", 90001),
    90003: TypeDescription(90003, "public", "loop", "domain", 90003),
    90004: TypeDescription(90004, "public", "pair", "composite"),
    90005: TypeDescription(90005, "public", "_loop", "array", 90005),
    90006: TypeDescription(90006, "public", "floats", "range", oids.FLOAT8),
    90007: TypeDescription(90007, "public", "by_range", "multirange", 90006),
    90008: TypeDescription(90008, "public", "by_subtype", "multirange", oids.FLOAT8),
    90009: TypeDescription(90009, "public", "mood", "enum", 0, ("sad", "glad")),
}


@pytest.mark.parametrize("oid", [90001, 90002, 90003, 90005, 99999, 2205, 2210, oids.ACLITEM])
def test_unknown_types_are_refused_by_name(oid: int) -> None:
    with pytest.raises(SchemaError, match=r"geometry|loop|99999|regclass|aclitem") as caught:
        text_reader(oid, USER)
    assert "--values text" in caught.value.remedy
    assert python_reader(oid, "t", USER)(b"x") == "x"


def test_a_composite_refuses_an_unknown_field() -> None:
    body = struct.pack(">iIi", 1, 90001, 1) + b"x"
    with pytest.raises(SchemaError, match=r"public\.geometry"):
        text_reader(90004, USER)(body)


def test_nesting_is_bounded() -> None:
    body = struct.pack(">i", 0)
    for _ in range(40):
        body = struct.pack(">iIi", 1, 90004, len(body)) + body
    with pytest.raises(DecodeError, match="deeper"):
        text_reader(90004, USER)(body)


def test_quotes_that_double_at_every_level_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc.wire.values.nested.TEXT_CHARACTERS_MAX", 10_000)
    body = struct.pack(">iIi", 1, oids.TEXT, 1) + b'"'
    for _ in range(20):
        body = struct.pack(">iIi", 1, 90004, len(body)) + body
    with pytest.raises(DecodeError, match="beyond the limit"):
        text_reader(90004, USER)(body)


@pytest.mark.parametrize("oid", [90007, 90008])
def test_a_multirange_may_name_its_range_or_its_subtype(oid: int) -> None:
    one = b"\x02" + struct.pack(">id", 8, 1.5) + struct.pack(">id", 8, 2)
    assert text_reader(oid, USER)(struct.pack(">ii", 1, len(one)) + one) == "{[1.5,2)}"


@pytest.mark.parametrize(
    ("oid", "data"),
    [
        (oids.INT4, b"\0\0\0"),
        (oids.BOOL, b"\2"),
        (oids.TEXT, b"\xff"),
        (oids.NUMERIC, struct.pack(">HhHHH", 1, 0, 0, 0, 10_000)),
        (oids.NUMERIC, struct.pack(">HhHH", 0xFFFF, 0, 0, 0)),
        (oids.NUMERIC, struct.pack(">HhHH", 0, 0, 0, 0x4000)),
        (oids.DATE, struct.pack(">i", 2_145_031_949)),
        (oids.TIMESTAMP, struct.pack(">q", 9_223_371_331_200_000_000)),
        (oids.TIME, struct.pack(">q", -1)),
        (oids.JSONB, b"\2{}"),
        (oids.VARBIT, struct.pack(">i", 2**31 - 1)),
        (oids.INET, b"\x02\x21\x00\x04abcd"),
        (oids.TSVECTOR, struct.pack(">i", 2**31 - 1)),
        (oids.TSQUERY, struct.pack(">ibb", 1, 2, 2)),
        (oids.POLYGON, struct.pack(">i", 2**31 - 1)),
        (oids.PG_SNAPSHOT, struct.pack(">iqq", 2**31 - 1, 1, 1)),
        (1007, struct.pack(">iiIii", 1, 0, oids.INT4, 2**31 - 1, 1)),
        (1007, struct.pack(">iiI", 0, 0, oids.TEXT)),
        (1007, struct.pack(">iiI", 7, 0, oids.INT4)),
        (1007, struct.pack(">iiI", 0, 0, oids.INT4) + b"x"),
        (oids.INT4RANGE, b"\x40"),
        (oids.INT4RANGE, b""),
        (4451, struct.pack(">i", -1)),
        (90004, struct.pack(">i", 2**31 - 1)),
    ],
)
def test_malformed_bytes(oid: int, data: bytes) -> None:
    with pytest.raises(DecodeError, match=f"malformed .* of {len(data)} bytes"):
        text_reader(oid, USER)(data)


@pytest.mark.parametrize(
    ("oid", "data"),
    [
        (oids.INT4, b"1_0"),
        (oids.INT4, b" 1"),
        (oids.INT4, b"2147483648"),
        (oids.INT8, b"9" * 10_000),
        (oids.OID, b"-1"),
        (oids.FLOAT8, b"1_0"),
        (oids.FLOAT8, b""),
        (oids.BOOL, b"true"),
        (oids.BYTEA, b"abc"),
        (oids.BYTEA, b"\\xf"),
        (oids.TEXT, b"\xff"),
    ],
)
def test_malformed_text(oid: int, data: bytes) -> None:
    with pytest.raises(DecodeError, match="malformed"):
        python_reader(oid, "t", {})(data)


def test_an_unknown_form() -> None:
    with pytest.raises(DecodeError, match="'x'"):
        python_reader(oids.TEXT, "x", {})


UNREADABLE = {"aclitem", "gtsvector"}
READABLE = [
    *(oid for oid, known in BUILTIN.items() if "reg" not in known.name and known.name.lstrip("_") not in UNREADABLE),
    *(90004, 90007, 90009),
]


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(READABLE), st.binary(max_size=64))
def test_any_bytes_give_text_or_a_decode_error(oid: int, data: bytes) -> None:
    _text_or_decode_error(oid, data, USER)


def _text_or_decode_error(oid: int, data: bytes, types: Mapping[int, TypeDescription]) -> None:
    try:
        assert isinstance(text_reader(oid, types)(data), str)
        python_reader(oid, "b", types)(data)
    except (DecodeError, SchemaError):  # a composite may name any type
        pass


def test_truncated_and_mutated_values(oracle: Oracle) -> None:
    """Every prefix of every value, and every value with one byte replaced."""
    for sql_type, literals in LITERALS.items():
        oid = oracle.oid(sql_type)
        types = oracle.types(oid)
        for sent, _ in oracle.both(sql_type, literals[:6]):
            for at in range(min(len(sent), 60)):
                _text_or_decode_error(oid, sent[:at], types)
                for byte in (0, 1, 0x7F, 0xFF, sent[at] ^ 1):
                    _text_or_decode_error(oid, sent[:at] + bytes([byte]) + sent[at + 1 :], types)


# Type names


def test_builtin_agrees_with_the_catalog(oracle: Oracle) -> None:
    rows = oracle.connection.execute(
        """
        select t.oid::int8 as oid, t.typname as name, format_type(t.oid, null) as sql,
               case when e.typarray = t.oid then 'array'
                    when t.typtype = 'r' then 'range' when t.typtype = 'm' then 'multirange' else 'base' end as kind,
               case when e.typarray = t.oid then t.typelem
                    when t.typtype = 'r' then (select rngsubtype from pg_range where rngtypid = t.oid)
                    when t.typtype = 'm' then (select rngtypid from pg_range where rngmultitypid = t.oid)
                    else 0 end::int8 as base
        from pg_type t left join pg_type e on e.oid = t.typelem
        where t.oid < 10000 and t.typtype in ('b', 'r', 'm') and coalesce(e.typtype, 'b') in ('b', 'r', 'm')
          and not exists (select from pg_class c where c.oid in (t.typrelid, e.typrelid) and c.oid <> 0)
        """
    ).fetchall()
    told = {row.oid: (row.name, row.sql, row.kind, row.base) for row in rows}
    inside_only = {"pg_node_tree", "pg_ndistinct", "pg_dependencies", "pg_mcv_list"}
    inside_only |= {"pg_brin_bloom_summary", "pg_brin_minmax_multi_summary"}
    assert {oid: one for oid, one in told.items() if one[0] not in inside_only} == {
        oid: tuple(known) for oid, known in BUILTIN.items()
    }


TYPES_WITH_MODIFIERS = (
    "varchar, varchar(10), char, char(3), bpchar, numeric, numeric(6,2), numeric(6,-2), numeric(1000,1000), bit, "
    "bit(3), varbit, varbit(5), time, time(3), timetz(0), timestamp(3), timestamptz(6), timestamptz, interval, "
    "interval(2), interval year, interval month, interval year to month, interval day to second(3), "
    'interval minute to second, interval hour, int4[], varchar(10)[], numeric(6,2)[][], "char", name, float8, '
    'odd."Mo od", odd."Mo od"[], odd.smaller, odd.textrange[], int4multirange, odd.pair'
)


def test_type_sql_agrees_with_format_type(oracle: Oracle) -> None:
    columns = TYPES_WITH_MODIFIERS.replace("numeric(6,", "numeric(6;").replace("(1000,1", "(1000;1").split(", ")
    listed = ", ".join(f"c{n} {one.replace(';', ',')}" for n, one in enumerate(columns))
    oracle.connection.execute(f"create table odd.all_types ({listed})".encode())
    rows = oracle.connection.execute(
        """
        select atttypid::int8 as oid, atttypmod as modifier, format_type(atttypid, atttypmod) as sql
        from pg_attribute where attrelid = 'odd.all_types'::regclass and attnum > 0 order by attnum
        """
    ).fetchall()
    for row in rows:
        shown = type_sql(row.oid, row.modifier, oracle.types(row.oid))
        if shown.startswith('"odd"'):  # ours are always quoted, format_type's where they must be
            found = oracle.connection.execute("select %s::regtype::oid::int8 as oid", [shown]).fetchone()
            assert found is not None and found.oid == row.oid
        else:
            assert shown == row.sql
    assert len(rows) == len(columns)


def test_type_sql_quotes_and_refuses() -> None:
    types = {7: TypeDescription(7, 'a"b', "c d", "enum"), 8: TypeDescription(8, "s", "_c", "array", 7)}
    assert type_sql(8, -1, types) == '"a""b"."c d"[]'
    with pytest.raises(SchemaError, match="99999"):
        type_sql(99999, -1, types)
    with pytest.raises(SchemaError, match="90005"):
        type_sql(90005, -1, USER)
