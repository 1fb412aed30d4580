"""What is captured of a table: columns, rows, masks; and what happens when the table gets another shape."""

from contextlib import closing

import psycopg
import pytest

from cdc.errors import ConfigurationError, GapError
from cdc.stores.postgresql.capture import Shaping
from tests.fix_postgresql import postgres_major
from tests.fix_stream import STREAM, FollowerFactory, TriggerStream, query, run
from tests.integration.test_types import TYPES, VALUES, _quote, make_composites

SECRET = "unmistakable-secret"
PEOPLE = (
    "CREATE TABLE people (id int, mail text, born timestamptz, salary float8, note text, PRIMARY KEY (id, mail))",
    f"INSERT INTO people SELECT g, '{SECRET}' || g, timestamptz '2000-01-01 12:00+00' + g * interval '1 day', g / 3.0,"
    f" '{SECRET}' FROM generate_series(1, 9) g",
)
# Each changes how values print or parse.
FOREIGN = (
    "BEGIN; SET LOCAL DateStyle = 'German, DMY'; SET LOCAL TimeZone = 'Asia/Kathmandu';"
    " SET LOCAL extra_float_digits = -10; SET LOCAL IntervalStyle = 'iso_8601'; SET LOCAL bytea_output = 'escape';"
    " SET LOCAL search_path = pg_temp; "
)


def everything_in_the_topic(stream: TriggerStream) -> bytes:
    with closing(stream.topic()) as topic:
        first, end = topic.bounds(STREAM)
        bodies = []
        while first < end:
            found = topic.read(STREAM, first, limit_bytes=1 << 24, wait_s=0)
            bodies += [message.body for message in found]
            first = found[-1].offset + 1
    return b"".join(bodies)


def everything_in_change_tables(stream: TriggerStream) -> bytes:
    s = stream.schema
    both = f"SELECT data FROM {s}.change_0 UNION ALL SELECT data FROM {s}.change_1"
    with psycopg.connect(stream.leader) as connection:
        return b"".join(bytes(data) for (data,) in connection.execute(both.encode()).fetchall() if data is not None)


@postgres_major(16, 18)
def test_masks(triggers: TriggerStream, followers: list[str]) -> None:
    """In clear nowhere: not in the change tables, not in the topic, not by image nor by log. Keys still find rows."""
    triggers.run(*PEOPLE)
    masks = {("public.people", "mail"): "hash", ("", "note"): "null", ("public.people", "salary"): "drop"}
    triggers.setup(shaping=Shaping(masks={**masks, ("public.people", "born"): "hash"}))
    triggers.carry(*followers)
    triggers.run(
        f"INSERT INTO people VALUES (10, '{SECRET}10', now(), 1, '{SECRET}')",
        FOREIGN + "UPDATE public.people SET note = 'unmistakable-secret' WHERE id < 4; COMMIT",
        FOREIGN + "DELETE FROM public.people WHERE id = 2; COMMIT",
        f"UPDATE people SET mail = '{SECRET}33' WHERE id = 3",
    )
    assert SECRET.encode() not in everything_in_change_tables(triggers)
    triggers.carry(*followers)
    assert SECRET.encode() not in everything_in_the_topic(triggers)
    for follower in followers[:1]:
        rows = query(follower, "SELECT id, mail, born, note FROM people ORDER BY id")
        assert [row[0] for row in rows] == [1, 3, 4, 5, 6, 7, 8, 9, 10]
        assert {len(row[1]) for row in rows} == {64}
        assert {row[3] for row in rows} == {None}
        assert len({row[1] for row in rows}) == 9
    before = query(followers[0], "SELECT id, mail, born FROM people WHERE id < 9 ORDER BY id")
    triggers.ship(image="new")
    triggers.apply(followers[0], reload=True)
    assert query(followers[0], "SELECT id, mail, born FROM people WHERE id < 9 ORDER BY id") == before


@postgres_major(16, 18)
def test_columns_and_rows(triggers: TriggerStream, followers: list[str]) -> None:
    """Rows move into and out of the condition; a writer's settings do not change what it means."""
    triggers.run(
        "CREATE TABLE t (id int PRIMARY KEY, a text, hidden text, at timestamptz, n int)",
        "INSERT INTO t SELECT g, 'a', 'hidden', '2024-02-01 00:00+00', g FROM generate_series(1, 9) g",
        "CREATE TABLE keyless (a int, b text)",
    )
    condition = "n % 2 = 0 AND at >= '2024-01-31 23:00' -- and so on"
    triggers.setup(
        shaping=Shaping(
            columns={"public.t": ("id", "a", "n")}, conditions={"public.t": condition, "public.keyless": "a > 5"}
        )
    )
    triggers.carry(*followers)
    triggers.run(
        "INSERT INTO t SELECT g, 'b', 'hidden', '2024-02-01 00:00+00', g FROM generate_series(10, 99) g",
        "UPDATE t SET n = n + 1",
        FOREIGN + "UPDATE public.t SET at = '2024-01-31 22:30+00' WHERE id < 50; COMMIT",
        "UPDATE t SET at = '2023-01-01 00:00+00' WHERE id BETWEEN 20 AND 30",
        "UPDATE t SET id = id + 1000, hidden = 'still' WHERE id % 3 = 0",
        "DELETE FROM t WHERE id % 5 = 0",
        "INSERT INTO keyless SELECT g, 'x' FROM generate_series(1, 10) g",
        "UPDATE keyless SET a = 11 - a",
        "DELETE FROM keyless WHERE a IN (1, 6)",
    )
    triggers.carry(*followers)
    wanted = query(
        triggers.leader, "SELECT id, a, n FROM t WHERE n % 2 = 0 AND at >= '2024-01-31 23:00+00' ORDER BY id"
    )
    assert query(followers[0], "SELECT * FROM t ORDER BY id") == wanted
    assert b"hidden" not in everything_in_the_topic(triggers)
    assert query(followers[0], "SELECT a FROM keyless ORDER BY a") == [(7,), (8,), (9,), (10,)]


def test_a_condition_is_read_as_it_will_be_used(triggers: TriggerStream) -> None:
    triggers.run("CREATE TABLE t (id int PRIMARY KEY)", "CREATE FUNCTION f(int) RETURNS bool RETURN true")
    for condition in ("f(n.id)", "nothing", "id = 'x'", "id", ""):
        with pytest.raises(ConfigurationError) if condition else pytest.MonkeyPatch.context():
            triggers.setup(shaping=Shaping(conditions={"public.t": condition}))


@pytest.mark.parametrize("drop", ["note", "born"])
def test_a_named_column_that_is_dropped_stops_the_shipper_and_no_writer(
    triggers: TriggerStream, new_follower: FollowerFactory, drop: str
) -> None:
    follower = new_follower("postgresql")
    triggers.run(*PEOPLE)
    shaping = Shaping(
        columns={"public.people": ("id", "mail", "note")}, conditions={"public.people": "born IS NOT NULL"}
    )
    triggers.setup(shaping=shaping)
    triggers.carry(follower)
    triggers.run(f"ALTER TABLE people DROP COLUMN {drop}", "INSERT INTO people (id, mail) VALUES (50, 'x')")
    with pytest.raises(ConfigurationError, match=drop) as caught:
        triggers.ship()
    assert "setup" in caught.value.remedy
    triggers.run("UPDATE people SET mail = 'y' WHERE id = 50", "DELETE FROM people WHERE id = 1")
    triggers.heal(follower)
    assert query(follower, "SELECT count(*) FROM people") == [(9,)]


# Other shapes between capture and shipping.

CHANGES = {
    "add a column": ("ALTER TABLE t ADD COLUMN x text DEFAULT 'd'",),
    "drop a column": ("ALTER TABLE t DROP COLUMN b",),
    "rename a column": ("ALTER TABLE t RENAME b TO bb",),
    "vacuum full": ("VACUUM FULL t",),
    "cluster": ("CLUSTER t USING t_pkey",),
    "int to bigint": ("ALTER TABLE t ALTER n TYPE bigint",),
    "rename the table": ("ALTER TABLE t RENAME TO u", "ALTER TABLE u RENAME TO t"),
    "another type of its own": (
        "ALTER TABLE t ADD COLUMN y int",
        "ALTER TABLE t ADD COLUMN x numeric(5, 2) DEFAULT 1.5",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_changes_within_a_tick(triggers: TriggerStream, followers: list[str], change: str) -> None:
    triggers.run(
        "CREATE TABLE t (id int PRIMARY KEY, n int, b varchar(20), c text)",
        "INSERT INTO t SELECT g, g, 'b', 'c' FROM generate_series(1, 5) g",
    )
    triggers.setup()
    triggers.carry(*followers)
    triggers.run("INSERT INTO t VALUES (10, 10, 'b', 'c')", "UPDATE t SET n = n + 1 WHERE id < 3")
    triggers.run(*CHANGES[change])
    triggers.run("INSERT INTO t (id, n, c) VALUES (11, 11, 'after')", "UPDATE t SET n = n + 1 WHERE id = 10")
    triggers.carry(*followers)
    triggers.assert_equal(*followers)


@pytest.mark.parametrize(
    "changes",
    [
        ("ALTER TABLE t DROP COLUMN c", "ALTER TABLE t ADD COLUMN z text"),
        ("ALTER TABLE t ADD COLUMN x int", "INSERT INTO t VALUES (12, 1, 'b', 'c', 5)", "ALTER TABLE t DROP COLUMN x"),
    ],
)
def test_columns_that_cannot_be_told_apart(
    triggers: TriggerStream, followers: list[str], changes: tuple[str, ...]
) -> None:
    triggers.run(
        "CREATE TABLE t (id int PRIMARY KEY, n int, b varchar(20), c text)", "INSERT INTO t VALUES (1, 1, 'b', 'c')"
    )
    triggers.setup()
    triggers.carry(*followers)
    triggers.run("INSERT INTO t VALUES (10, 10, 'b', 'c')", *changes, "INSERT INTO t (id, n) VALUES (11, 11)")
    with pytest.raises(GapError, match=r"public\.t") as caught:
        triggers.ship()
    assert "--image new" in caught.value.remedy
    triggers.ship(image="new")
    for statement in changes:
        run(followers[0], *([statement] if statement.startswith("ALTER") else []))
    triggers.apply(followers[0], reload=True, schema_changed=True)
    triggers.assert_equal(followers[0])


# Types.


@postgres_major(16, 18)
def test_every_type_arrives(triggers: TriggerStream, followers: list[str]) -> None:
    triggers.run(*TYPES)
    tables = {sql: f"t{number}" for number, (sql, found) in enumerate(VALUES.items()) if found}
    for sql, table in tables.items():
        triggers.run(f"CREATE TABLE {table} (id int PRIMARY KEY, v {sql}, w int)")
        rows = [f"({number}, {_quote(text)}, 0)" for number, text in enumerate((*VALUES[sql],))]
        triggers.run(f"INSERT INTO {table} VALUES {', '.join(rows)}, (99, NULL, 0)")
    triggers.setup()
    triggers.ship()
    make_composites(followers[0])
    for table in tables.values():
        triggers.run(
            f"INSERT INTO {table} SELECT id + 100, v, 1 FROM {table}; UPDATE {table} SET v = v WHERE id % 2 = 0;"
            f" UPDATE {table} SET w = 2 WHERE id % 3 = 0; UPDATE {table} SET id = -id WHERE id = 101;"
            f" DELETE FROM {table} WHERE id = 199"
        )
    triggers.carry(*followers)
    triggers.assert_equal(*followers)


@postgres_major(16, 18)
def test_generated_columns(triggers: TriggerStream, followers: list[str]) -> None:
    with psycopg.connect(triggers.leader) as connection:
        virtual = (
            ", thrice int GENERATED ALWAYS AS (id * 3) VIRTUAL" if connection.info.server_version >= 180000 else ""
        )
    triggers.run(
        f"CREATE TABLE g (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED{virtual}, v text)",
        "INSERT INTO g (id, v) VALUES (1, 'image')",
    )
    triggers.setup()
    triggers.carry(*followers)
    triggers.run("INSERT INTO g (id, v) VALUES (2, 'log')", "UPDATE g SET id = 3 WHERE id = 1", "UPDATE g SET v = 'x'")
    triggers.carry(*followers)
    triggers.assert_equal(*followers)


# Names.

HOSTILE = (
    'quo"te',
    "new\nline",
    "percent %s %(x)s %%",
    "back\\slash 'single'",
    "ż" * 31,
    "$cdc$ $$ ; DROP SCHEMA public CASCADE --",
    "a.b",
    "here",
    "slot",
    "began",
    "n",
    "r",
    "s",
    "new",
    "old",
    "op",
    "data",
    "xid",
    "tg_op",
    "origin",
)


@postgres_major(16, 18)
@pytest.mark.parametrize("shaped", [False, True])
def test_hostile_names(triggers: TriggerStream, followers: list[str], shaped: bool) -> None:
    names = ['"' + name.replace('"', '""') + '"' for name in HOSTILE]
    columns = ", ".join(f"{name} text" for name in names)
    tables = []
    conditions = {}
    for number in (0, 2, 4, 5):
        triggers.run(f"CREATE SCHEMA {names[number]}")
        for other in (1, 3, number):
            table = f"{names[number]}.{names[other]}"
            tables.append(table)
            triggers.run(f"CREATE TABLE {table} ({columns}, PRIMARY KEY ({names[0]}, {names[2]}, {names[7]}))")
            conditions[f"{HOSTILE[number]}.{HOSTILE[other]}"] = f"n.{names[8]} <> '%s'"
            values = ", ".join(["'1'"] * len(names))
            triggers.run(f"INSERT INTO {table} VALUES ({values})")
    masks = {("", 'quo"te'): "hash", ("", "xid"): "null", ("", "op"): "drop"} if shaped else {}
    triggers.setup(shaping=Shaping(masks=masks, conditions=conditions if shaped else {}))
    triggers.carry(*followers)
    for table in tables:
        for key in ("l", "m", "%s"):
            values = ", ".join([f"'{key}'"] * len(names))
            triggers.run(f"INSERT INTO {table} VALUES ({values})")
        triggers.run(
            f"UPDATE {table} SET {names[3]} = 'new' WHERE {names[0]} = 'l'",
            f"UPDATE {table} SET {names[0]} = 'n' WHERE {names[0]} = 'l'",
            f"DELETE FROM {table} WHERE {names[0]} = 'm'",
        )
    triggers.carry(*followers)
    if not shaped:
        triggers.assert_equal(*followers)
    else:
        with psycopg.connect(followers[0]) as connection:
            for table in tables:
                found = connection.execute(f"SELECT {names[3]} FROM {table} ORDER BY 1".encode()).fetchall()
                assert found == [("1",), ("new",)]
    triggers.teardown()
    for table in tables:
        triggers.run(f"DELETE FROM {table}")
