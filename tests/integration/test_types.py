"""Every type with its edge values, through the image and through the log, on every follower."""

import pytest

from cdc.errors import SchemaError
from tests.fix_stream import FollowerFactory, Stream, eventually, query, run

# Type, then values as PostgreSQL reads them.
VALUES: dict[str, tuple[str, ...]] = {
    "bool": ("t", "f"),
    "int2": ("-32768", "32767", "0"),
    "int4": ("-2147483648", "2147483647"),
    "int8": ("-9223372036854775808", "9223372036854775807"),
    "oid": ("0", "4294967295"),
    "float4": ("NaN", "Infinity", "-Infinity", "-0", "1.1754944e-38", "3.4028235e+38", "0.1", "1e-45"),
    "float8": ("NaN", "Infinity", "-Infinity", "-0", "2.2250738585072014e-308", "1.7976931348623157e+308", "5e-324"),
    "numeric": (
        "NaN",
        "Infinity",
        "-Infinity",
        "0",
        "0.00",
        "-0.000001",
        "1" + "0" * 1000,
        "-" + "9" * 300 + ".5",
        "1e-1000",
        "10000",
        "100000000.0000",
    ),
    "numeric(10,2)": ("0", "-99999999.99", "1.5"),
    "numeric(50,20)": ("1.00000000000000000001", "-123456789012345678901234567890"),
    "numeric(3,-2)": ("99900", "-100"),
    "money": ("-92233720368547758.08", "0.01"),
    "text": ("", "żółw 🐢", "tab\tnew\nline\rback\\slash", "NULL", "\\N", "\u0001", "e\u0301"),
    "varchar(5)": ("", "abcde", "żółw"),
    "char(5)": ("", "a", "abcde"),
    '"char"': ("a", ""),
    "name": ("a", ""),
    "bytea": ("", "\\x00ff5c27", "\\x" + "00" * 3000),
    "date": ("infinity", "-infinity", "4713-01-01 BC", "0001-12-31 BC", "0001-01-01", "5874897-12-31", "2000-02-29"),
    "time": ("00:00:00", "24:00:00", "23:59:59.999999"),
    "time(0)": ("12:00:00",),
    "timetz": ("00:00:00+15:59:59", "23:59:59.999999-15:59:59", "24:00:00-00"),
    "timestamp": ("infinity", "-infinity", "4713-01-01 00:00:00 BC", "1999-12-31 23:59:59.999999", "0044-03-15 BC"),
    "timestamptz": ("infinity", "-infinity", "4713-01-02 00:00:00+00 BC", "2000-01-01 00:00:00.000001+05:30"),
    "interval": ("0", "-178000000 years", "1 mon -1 day +00:00:00.000001", "-1 year -2 mons +3 days -04:05:06.7"),
    "uuid": ("00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"),
    "json": ("null", '{"b": 1, "a":  [1.50, "\\u00e9"], "b": 2}', '""'),
    "jsonb": ("null", '{"b": 1, "a": [1.50, 1e400], "": {}}', "[]"),
    "xml": (),
    "bit(3)": ("101", "000"),
    "varbit": ("", "1", "1011011110111"),
    "inet": ("0.0.0.0/0", "255.255.255.255", "::1", "fe80::1/64", "10.1.2.3/8"),
    "cidr": ("10.0.0.0/8", "::/0", "::ffff:1.2.3.0/120"),
    "macaddr": ("08:00:2b:01:02:03",),
    "macaddr8": ("08:00:2b:01:02:03:04:05",),
    "point": ("(1.5,-0)", "(NaN,Infinity)"),
    "line": ("{1,2,3}",),
    "lseg": ("[(0,0),(1,1)]",),
    "box": ("(1,1),(0,0)",),
    "path": ("[(0,0),(1,1)]", "((0,0),(1,1))"),
    "polygon": ("((0,0),(1,1),(1,0))",),
    "circle": ("<(1,2),3>",),
    "tsvector": ("'a':1A 'b c':2,3B", ""),
    "tsquery": ("'a' & !'b':*A <-> 'c'",),
    "pg_lsn": ("FFFFFFFF/FFFFFFFF", "0/0"),
    "xid8": ("18446744073709551615",),
    "tid": ("(4294967295,65535)",),
    "int4range": ("empty", "[1,5)", "(,)", "[1,)"),
    "numrange": ("(1.50,NaN)", "[0.0,]"),
    "tstzrange": ('["2000-01-01 00:00:00+00",infinity]',),
    "daterange": ("[-infinity,2000-01-01)",),
    "int8multirange": ("{}", "{[1,3),[5,7)}"),
    "int4[]": ("{}", "{NULL}", "{1,NULL,-3}", "{{1,2},{3,4}}", "[-2:0]={1,2,3}", "[0:1][5:5]={{1},{2}}"),
    "text[]": ('{"",NULL,"NULL","a,b","c\\"d","e\\\\f","{}"," g "}', "{}"),
    "numeric[]": ("{1.50,NaN,Infinity}",),
    "float8[]": ("{NaN,-0,Infinity}",),
    "timestamptz[]": ('{infinity,"4713-01-02 00:00:00+00 BC"}',),
    "bytea[]": ('{"\\\\x00ff",""}',),
    "jsonb[]": ('{"{\\"a\\": 1}",NULL}',),
    "box[]": ("{(1,1),(0,0);(2,2),(0,0)}",),
    "mood": ("sad", "it's", 'quo"te'),
    "mood[]": ('{sad,NULL,it\'s,"quo\\"te"}', "{}"),
    "positive": ("1", "2147483647"),
    "nested_domain": ("7",),
    "short": ("abc",),
    "positive[]": ("{1,2}",),
    "pair": ('(1,"a ""quoted"" text")', "(,)", '(2,"")'),
    "pair[]": ('{"(1,a)","(,)"}',),
    "outer_pair": ('("(1,x)",sad,"{1,2}")',),
    "moods": ("[sad,it's]",),
    "floats": ("[-0,Infinity)", "empty"),
    "floats[]": ('{"[1,2)",empty}',),
}
# What an engine's own type refuses; the follower says so (test_what_cannot_be_held_is_named).
BEYOND = {"duckdb": {"numeric(10,2)": ("NaN",), "timestamp": ("294276-12-31 23:59:59.999999",)}}

COMPOSITES = ("CREATE TYPE pair AS (n int, t text)", "CREATE TYPE outer_pair AS (p pair, m mood, a int[])")
MOOD = "CREATE TYPE mood AS ENUM ('sad', 'it''s', 'quo\"te')"
TYPES = (
    MOOD,
    *COMPOSITES,
    "CREATE DOMAIN positive AS int CHECK (VALUE > 0)",
    "CREATE DOMAIN nested_domain AS positive",
    "CREATE DOMAIN short AS varchar(3)",
    "CREATE TYPE moods AS RANGE (subtype = mood)",
    "CREATE TYPE floats AS RANGE (subtype = float8, subtype_diff = float8mi)",
)


def make_composites(follower: str) -> None:
    """A description does not tell what a composite type is made of: the operator makes it, as the error says."""
    if follower.startswith("postgresql:"):
        run(follower, MOOD, *COMPOSITES)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@pytest.mark.parametrize("values", ["binary", "text"])
def test_every_type_arrives(stream: Stream, followers: list[str], values: str) -> None:
    """The same rows by image, by insert, by update of all, and by update of a neighbour; NULLs among them."""
    stream.options.update(values=values)
    stream.run(*TYPES)
    tables = {sql: f"t{number}" for number, (sql, found) in enumerate(VALUES.items()) if found}
    for sql, table in tables.items():
        stream.run(f"CREATE TABLE {table} (id int PRIMARY KEY, v {sql}, w int)")
        rows = [f"({number}, {_quote(text)}, 0)" for number, text in enumerate((*VALUES[sql],))]
        stream.run(f"INSERT INTO {table} VALUES {', '.join(rows)}, (99, NULL, 0)")
    stream.setup()
    stream.ship()
    make_composites(followers[0])
    for table in tables.values():
        stream.run(
            f"INSERT INTO {table} SELECT id + 100, v, 1 FROM {table}; UPDATE {table} SET v = v WHERE id % 2 = 0;"
            f" UPDATE {table} SET w = 2 WHERE id % 3 = 0; UPDATE {table} SET id = -id WHERE id = 101;"
            f" DELETE FROM {table} WHERE id = 199"
        )
    stream.carry(*followers)
    stream.assert_equal(*followers)


@pytest.mark.parametrize("values", ["binary", "text"])
def test_types_that_find_rows(stream: Stream, followers: list[str], values: str) -> None:
    """Keys, and whole rows, of types whose equality is not that of their bytes or text."""
    stream.options.update(values=values)
    stream.run(*TYPES)
    kinds = [
        "numeric",
        "float8",
        "timestamptz",
        "uuid",
        "text",
        "char(5)",
        "bytea",
        "mood",
        "positive",
        "int4[]",
        "int4range",
        "inet",
        "interval",
        "bool",
        "date",
        "pair",
        "json",
        "point",
        "bit(3)",
        "floats",
    ]
    for number, sql in enumerate(kinds):
        comparable = sql not in {"json", "point"}
        values_sql = ", ".join(f"({_quote(text)}, 1)" for text in VALUES[sql])
        for table, key in ((f"f{number}", ""), (f"k{number}", ", PRIMARY KEY (v)")):
            if key and not comparable:
                continue
            stream.run(
                f"CREATE TABLE {table} (v {sql}, w int {key})",
                f"INSERT INTO {table} VALUES {values_sql} ON CONFLICT DO NOTHING",
            )
    stream.setup()
    stream.ship()
    make_composites(followers[0])
    for relation in stream.relations():
        table = relation.name
        stream.run(f"UPDATE {table} SET w = 2", f"DELETE FROM {table} WHERE ctid = (SELECT ctid FROM {table} LIMIT 1)")
    stream.carry(*followers)
    stream.assert_equal(*followers)


def test_types_that_come_along_mid_stream(stream: Stream, followers: list[str]) -> None:
    stream.run("CREATE TABLE t (id int PRIMARY KEY)")
    stream.setup()
    stream.carry(*followers)
    stream.run("CREATE SCHEMA old", "CREATE TYPE old.mood AS ENUM ('grey')")
    stream.run(
        *TYPES,
        "CREATE TABLE late (id int PRIMARY KEY, m mood, ms mood[], p pair, f floats, d nested_domain)",
        "INSERT INTO late VALUES (1, 'sad', '{sad,NULL}', '(1,a)', '[1,2)', 3)",
        "ALTER TABLE t ADD COLUMN m mood DEFAULT 'sad', ADD COLUMN p pair[]",
        "INSERT INTO t VALUES (1, 'it''s', ARRAY['(1,x)'::pair])",
    )
    stream.ship()
    with pytest.raises(SchemaError, match="pair") as caught:
        stream.apply(followers[0])
    assert "create composite type" in caught.value.remedy
    make_composites(followers[0])
    stream.carry(*followers)
    stream.assert_equal(*followers)
    stream.run("ALTER TYPE mood ADD VALUE 'glad' BEFORE 'sad'", "ALTER TYPE mood ADD VALUE 'new'")
    stream.run("INSERT INTO late (id, m, ms) VALUES (2, 'glad', '{glad,new}')", "UPDATE t SET m = 'new'")
    stream.carry(*followers)
    stream.assert_equal(*followers)
    assert query(followers[0], "SELECT enum_range(NULL::mood)::text") == [('{glad,sad,it\'s,"quo\\"te",new}',)]


def test_a_new_enum_label_used_by_a_table_that_never_changed(stream: Stream, new_follower: FollowerFactory) -> None:
    """The log does not tell of ALTER TYPE by itself: the follower stops, and says what mends it."""
    follower = new_follower("postgresql")
    stream.run("CREATE TYPE colour AS ENUM ('red')", "CREATE TABLE t (id int PRIMARY KEY, c colour)")
    stream.setup()
    stream.carry(follower)
    with stream.shipping() as shipper:
        stream.run("INSERT INTO t VALUES (1, 'red')")
        eventually(lambda: stream.confirmed_lsn() > 0 and stream.bounds()[1] > 3)
        stream.run("ALTER TYPE colour ADD VALUE 'blue'")
        stream.run("INSERT INTO t VALUES (2, 'blue')")
        eventually(lambda: stream.bounds()[1] > 4)
        assert shipper.end() is None
    with pytest.raises(SchemaError, match="blue") as caught:
        stream.apply(follower)
    run(follower, caught.value.remedy)
    stream.carry(follower)
    stream.assert_equal(follower)
