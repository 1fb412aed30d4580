"""Values to Connect's JSON and back: expectations written by hand from Debezium's documentation."""

import json
from typing import Any, get_args

import pytest

from cdc.debezium import times
from cdc.debezium.schema import Modes, TimeMode, column_schema
from cdc.debezium.texts import reader
from cdc.debezium.values import fallback, unavailable, writer
from cdc.errors import DecodeError, SchemaError
from cdc.record import Column, TypeDescription
from cdc.wire import oids

DEFAULT = Modes()
HSTORE = TypeDescription(20000, "public", "hstore", "base")
MOOD = TypeDescription(20001, "public", "mood", "enum", labels=("sad", "so, so", "back\\slash"))
PRICE = TypeDescription(20002, "public", "price", "domain", base=oids.NUMERIC)
LTREE = TypeDescription(20003, "public", "ltree", "base")
TYPES = {t.oid: t for t in (HSTORE, MOOD, PRICE, LTREE)}


def numeric(precision: int, scale: int) -> int:
    return (precision << 16 | scale & 0x7FF) + 4


def written(type_oid: int, text: str, modifier: int = -1, modes: Modes = DEFAULT) -> Any:
    column = Column("c", type_oid, modifier)
    return json.loads(writer(column, "t", TYPES, modes)(text.encode()))


def told(type_oid: int, modifier: int = -1, modes: Modes = DEFAULT) -> tuple[str, str | None]:
    schema = column_schema(type_oid, modifier, TYPES, modes)
    return schema["type"], schema.get("name")


D, T, C = "io.debezium.data.", "io.debezium.time.", "org.apache.kafka.connect.data."


@pytest.mark.parametrize(
    ("type_oid", "modifier", "text", "kind", "name", "value"),
    [
        (oids.BOOL, -1, "t", "boolean", None, True),
        (oids.BIT, 1, "0", "boolean", None, False),
        (oids.BIT, 10, "1000000011", "bytes", D + "Bits", "AwI="),
        (oids.VARBIT, -1, "101", "bytes", D + "Bits", "BQ=="),
        (oids.INT2, -1, "-7", "int16", None, -7),
        (oids.INT4, -1, "7", "int32", None, 7),
        (oids.INT8, -1, "9007199254740993", "int64", None, 9007199254740993),
        (oids.OID, -1, "4294967295", "int64", None, 4294967295),
        (oids.FLOAT4, -1, "1.5", "float", None, 1.5),
        (oids.FLOAT8, -1, "1e+20", "double", None, 1e20),
        (oids.FLOAT8, -1, "NaN", "double", None, "NaN"),
        (oids.TEXT, -1, 'é"\\\n', "string", None, 'é"\\\n'),
        (oids.INET, -1, "10.0.0.1/8", "string", None, "10.0.0.1/8"),
        (oids.INT4RANGE, -1, "[1,3)", "string", None, "[1,3)"),
        (oids.JSONB, -1, '{"a": 1}', "string", D + "Json", '{"a": 1}'),
        (oids.UUID, -1, "a" * 8, "string", D + "Uuid", "a" * 8),
        (oids.XML, -1, "<a/>", "string", D + "Xml", "<a/>"),
        (oids.TSVECTOR, -1, "'a':1", "string", D + "Tsvector", "'a':1"),
        (MOOD.oid, -1, "sad", "string", D + "Enum", "sad"),
        (LTREE.oid, -1, "a.b", "string", D + "Ltree", "a.b"),
        (HSTORE.oid, -1, '"a"=>"1", "b\\"c"=>NULL', "string", D + "Json", '{"a":"1","b\\"c":null}'),
        (oids.BYTEA, -1, "\\x00ff", "bytes", None, "AP8="),
        (oids.DATE, -1, "2020-01-02", "int32", T + "Date", 18263),
        (oids.DATE, -1, "0001-12-31 BC", "int32", T + "Date", -719163),
        (oids.TIME, -1, "13:51:30.123456", "int64", T + "MicroTime", 49890123456),
        (oids.TIME, 3, "13:51:30.123", "int32", T + "Time", 49890123),
        (oids.TIME, 6, "24:00:00", "int64", T + "MicroTime", 86400000000),
        (oids.TIMESTAMP, -1, "2020-01-02 03:04:05.000006", "int64", T + "MicroTimestamp", 1577934245000006),
        (oids.TIMESTAMP, 3, "1969-12-31 23:59:59.999", "int64", T + "Timestamp", -1),
        (oids.TIMESTAMP, -1, "infinity", "int64", T + "MicroTimestamp", 9223372036825200000),
        (oids.TIMESTAMP, 0, "-infinity", "int64", T + "Timestamp", -9223372036832400000),
        (oids.TIMESTAMPTZ, -1, "2020-01-01 00:00:00.123456+00", "string", T + "ZonedTimestamp",
         "2020-01-01T00:00:00.123456Z"),
        (oids.TIMESTAMPTZ, -1, "0044-03-15 12:00:00+00 BC", "string", T + "ZonedTimestamp",
         "-0043-03-15T12:00:00.000000Z"),
        (oids.TIMESTAMPTZ, -1, "infinity", "string", T + "ZonedTimestamp", "infinity"),
        (oids.TIMETZ, -1, "01:30:00.5+02", "string", T + "ZonedTime", "23:30:00.5Z"),
        (oids.INTERVAL, -1, "1 year 2 mons 3 days 04:05:06.78", "int64", T + "MicroDuration", 37091106780000),
        (oids.NUMERIC, numeric(6, 2), "12.34", "bytes", C + "Decimal", "BNI="),
        (oids.NUMERIC, numeric(6, 2), "-1.28", "bytes", C + "Decimal", "gA=="),
        (oids.NUMERIC, numeric(6, -2), "12300", "bytes", C + "Decimal", "ew=="),
        (oids.NUMERIC, -1, "12.340", "struct", D + "VariableScaleDecimal", {"scale": 3, "value": "MDQ="}),
        (PRICE.oid, -1, "1", "struct", D + "VariableScaleDecimal", {"scale": 0, "value": "AQ=="}),
        (oids.MONEY, -1, "-$1,234.50", "bytes", C + "Decimal", "/h3G"),
        (oids.POINT, -1, "(1,-2.5)", "struct", D + "geometry.Point",
         {"x": 1.0, "y": -2.5, "wkb": "AQEAAAAAAAAAAADwPwAAAAAAAATA", "srid": None}),
        (1007, -1, "{1,NULL,3}", "array", None, [1, None, 3]),
        (1009, -1, '{a,"b,c",NULL,"NULL","q\\"\\\\",""}', "array", None, ["a", "b,c", None, "NULL", 'q"\\', ""]),
        (1182, -1, "{2020-01-02}", "array", None, [18263]),
        (1020, -1, "{(1,1),(0,0);(3,3),(2,2)}", "array", None, ["(1,1),(0,0)", "(3,3),(2,2)"]),
    ],
)  # fmt: skip
def test_default_modes(  # noqa: PLR0917
    type_oid: int, modifier: int, text: str, kind: str, name: str | None, value: Any
) -> None:
    assert told(type_oid, modifier) == (kind, name)
    assert written(type_oid, text, modifier) == value


@pytest.mark.parametrize(
    ("mode", "date", "time", "timestamp"),
    [
        ("connect", 18263, 49890123, 1577934245123),
        ("isostring", "2020-01-02Z", "13:51:30.123456Z", "2020-01-02T03:04:05.123456Z"),
        ("microseconds", 18263, 49890123456, 1577934245123456),
        ("nanoseconds", 18263, 49890123456000, 1577934245123456000),
        ("adaptive_time_microseconds", 18263, 49890123456, 1577934245123456),
    ],
)
def test_time_precision_mode(mode: TimeMode, date: Any, time: Any, timestamp: Any) -> None:
    modes = Modes(time=mode)
    assert written(oids.DATE, "2020-01-02", modes=modes) == date
    assert written(oids.TIME, "13:51:30.123456", modes=modes) == time
    assert written(oids.TIMESTAMP, "2020-01-02 03:04:05.123456", modes=modes) == timestamp
    assert told(oids.TIME, 3, Modes(time="adaptive_time_microseconds")) == ("int64", T + "MicroTime")


def test_the_other_modes() -> None:
    assert told(oids.NUMERIC, numeric(6, 2), Modes(decimal="string")) == ("string", None)
    assert written(oids.NUMERIC, "12.30", numeric(6, 2), Modes(decimal="string")) == "12.30"
    assert written(oids.NUMERIC, "NaN", modes=Modes(decimal="double")) == "NaN"
    assert written(oids.NUMERIC, "12.30", modes=Modes(decimal="double")) == 12.3
    assert written(oids.BYTEA, "\\xfbff", modes=Modes(binary="base64")) == "+/8="
    assert written(oids.BYTEA, "\\xfbff", modes=Modes(binary="base64-url-safe")) == "-_8="
    assert written(oids.BYTEA, "\\xfbff", modes=Modes(binary="hex")) == "fbff"
    iso = Modes(interval="string")
    assert written(oids.INTERVAL, "1 year 2 mons 3 days 04:05:06.78", modes=iso) == "P1Y2M3DT4H5M6.78S"
    assert written(oids.INTERVAL, "00:00:00", modes=iso) == "P0Y0M0DT0H0M0S"
    assert written(oids.INTERVAL, "-1 mons +2 days -00:00:00.5", modes=iso) == "P0Y-1M2DT0H0M-0.5S"


def test_schemas_name_their_parameters() -> None:
    assert column_schema(MOOD.oid, -1, TYPES, DEFAULT)["parameters"] == {"allowed": "sad,so\\, so,back\\\\slash"}
    decimal = column_schema(oids.NUMERIC, numeric(6, 2), TYPES, DEFAULT)
    assert decimal["parameters"] == {"scale": "2", "connect.decimal.precision": "6"}
    assert column_schema(oids.BIT, 10, TYPES, DEFAULT)["parameters"] == {"length": "10"}
    assert column_schema(oids.VARBIT, -1, TYPES, DEFAULT)["parameters"] == {"length": "2147483647"}


@pytest.mark.parametrize(
    ("type_oid", "modifier", "text", "modes"),
    [
        (oids.DATE, -1, "infinity", DEFAULT),
        (oids.INTERVAL, -1, "-infinity", DEFAULT),
        (oids.NUMERIC, -1, "NaN", DEFAULT),
        (oids.NUMERIC, -1, "1e400", Modes(decimal="double")),
        (oids.TIMESTAMP, -1, "2300-01-01 00:00:00", Modes(time="nanoseconds")),
        (1007, -1, "{{1,2}}", DEFAULT),
        (1007, -1, "[0:1]={1,2}", DEFAULT),
    ],
)
def test_what_the_format_cannot_carry_is_refused(type_oid: int, modifier: int, text: str, modes: Modes) -> None:
    with pytest.raises(SchemaError, match="'c' holds") as caught:
        written(type_oid, text, modifier, modes)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("type_oid", "text"),
    [
        (oids.BOOL, "maybe"), (oids.DATE, "today"), (oids.TIME, "noon"), (oids.INTERVAL, "1 eon"),
        (1007, "{1"), (1007, "{1}2"),
    ],
)  # fmt: skip
def test_malformed_text(type_oid: int, text: str) -> None:
    with pytest.raises(DecodeError, match="column 'c'"):
        written(type_oid, text)


def placeholder(type_oid: int, modes: Modes = DEFAULT) -> Any:
    shown = unavailable(type_oid, column_schema(type_oid, -1, TYPES, modes), TYPES, modes)
    return None if shown is None else json.loads(shown)


def test_unavailable_values() -> None:
    text = "__debezium_unavailable_value"
    raw = "X19kZWJleml1bV91bmF2YWlsYWJsZV92YWx1ZQ=="
    assert placeholder(oids.TEXT) == placeholder(oids.JSONB) == text
    assert placeholder(oids.BYTEA) == raw
    assert placeholder(1009) == [text]
    assert placeholder(1001) == [raw]
    assert placeholder(1007) == placeholder(1182) == placeholder(1016) == list(text.encode())
    assert json.loads(placeholder(HSTORE.oid)) == {text: text}
    assert placeholder(2951) == ["b68a35a7-17ad-35b3-af2a-ae46edb4545a"]
    assert placeholder(oids.NUMERIC) is None
    assert placeholder(oids.TEXT, Modes(placeholder="hex:414243")) == "hex:414243"


def test_fallbacks_of_values_a_key_does_not_carry() -> None:
    def of(type_oid: int, *, optional: bool = False) -> Any:
        return json.loads(fallback({**column_schema(type_oid, -1, TYPES, DEFAULT), "optional": optional}))

    assert of(oids.INT4, optional=True) is None
    assert [of(oids.INT4), of(oids.TEXT), of(oids.BOOL), of(oids.FLOAT8)] == [0, "", False, 0.0]
    assert of(oids.NUMERIC) == {"scale": 0, "value": "AA=="}


@pytest.mark.parametrize("mode", get_args(TimeMode))
@pytest.mark.parametrize(
    ("type_oid", "text"),
    [
        (oids.DATE, "2020-02-29"), (oids.DATE, "0001-01-01"), (oids.DATE, "4714-11-24 BC"), (oids.DATE, "12345-06-07"),
        (oids.TIME, "00:00:00"), (oids.TIME, "23:59:59.999"), (oids.TIME, "24:00:00"),
        (oids.TIMESTAMP, "1969-12-31 23:59:59.001"), (oids.TIMESTAMP, "2020-02-29 12:00:00"),
        (oids.TIMESTAMPTZ, "0001-01-01 00:00:00+00 BC"), (oids.TIMESTAMPTZ, "-infinity"),
    ],
)  # fmt: skip
def test_times_come_back(mode: TimeMode, type_oid: int, text: str) -> None:
    modes = Modes(time=mode)
    schema = column_schema(type_oid, -1, TYPES, modes)
    assert reader(schema, modes)(written(type_oid, text, modes=modes)) == text


@pytest.mark.parametrize("days", [-2440588 - 400, -719528, -719529, -1, 0, 11016, 2932897, 10**6 * 100])
def test_days_and_dates_are_inverse(days: int) -> None:
    assert times.days(times.date_text(days)) == days
    assert times.days_of_iso(times.iso_date(days)) == days


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "int32"}, True),
        ({"type": "int32"}, 2**31),
        ({"type": "int64"}, "1"),
        ({"type": "string"}, 1),
        ({"type": "string"}, "a\0"),
        ({"type": "bytes"}, "no base64!"),
        ({"type": "double"}, "one"),
        ({"type": "array", "items": {"type": "int32"}}, {"a": 1}),
        ({"type": "bytes", "name": C + "Decimal", "parameters": {"scale": "99999"}}, "AA=="),
        ({"type": "struct", "name": D + "VariableScaleDecimal"}, {"scale": 1}),
        ({"type": "int32", "name": T + "Time"}, 86400001),
        ({"type": "string", "name": T + "ZonedTimestamp"}, "yesterday"),
        ({"type": "string", "name": T + "Interval"}, "1 day; drop table t"),
    ],
)
def test_hostile_json_values(schema: dict[str, Any], value: Any) -> None:
    with pytest.raises(DecodeError, match="is no"):
        reader({**schema, "field": "f"}, DEFAULT)(value)


def test_an_unknown_schema() -> None:
    with pytest.raises(DecodeError, match="'struct' strange"):
        reader({"type": "struct", "name": "strange", "field": "f"}, DEFAULT)
