"""Schema changes on the leader, mid-stream and mid-transaction: followed, or stopped before what would not fit."""

import pytest

from cdc.errors import SchemaError
from tests.fix_stream import FOLLOWERS, FollowerFactory, Stream, everything, query, run

# Each a series of statements of its own transaction; rows before, between and after.
FOLLOWED = {
    "add a column": ["ALTER TABLE t ADD COLUMN x int"],
    "add a column with a default": ["ALTER TABLE t ADD COLUMN x text DEFAULT 'it''s \\ %s'"],
    "add a column with a default, not null": ["ALTER TABLE t ADD COLUMN x numeric(10,3) NOT NULL DEFAULT 1.5"],
    "add a column and drop its default": [
        "ALTER TABLE t ADD COLUMN x int NOT NULL DEFAULT 7",
        "ALTER TABLE t ALTER x DROP DEFAULT, ALTER x DROP NOT NULL",
    ],
    "drop a column": ["ALTER TABLE t DROP COLUMN b"],
    "drop the last column": ["ALTER TABLE t DROP COLUMN c"],
    "drop a column and add it again": ["ALTER TABLE t DROP COLUMN b", "ALTER TABLE t ADD COLUMN b text DEFAULT 'new'"],
    "rename the last column": ["ALTER TABLE t RENAME c TO renamed"],
    "rename a middle column": ['ALTER TABLE t RENAME b TO "re named"'],
    "rename the key": ["ALTER TABLE t RENAME id TO number"],
    "trade two names": [
        "BEGIN; ALTER TABLE t RENAME b TO x; ALTER TABLE t RENAME c TO b; ALTER TABLE t RENAME x TO c; COMMIT"
    ],
    "shift names": ["BEGIN; ALTER TABLE t RENAME c TO d; ALTER TABLE t RENAME b TO c; COMMIT"],
    "rename, drop and add at once": [
        "ALTER TABLE t DROP COLUMN b, ADD COLUMN x int DEFAULT 3",
        "ALTER TABLE t RENAME c TO d",
    ],
    "int to bigint": ["ALTER TABLE t ALTER n TYPE bigint"],
    "a longer varchar": ["ALTER TABLE t ALTER b TYPE varchar(200)"],
    "varchar to text": ["ALTER TABLE t ALTER b TYPE text"],
    "rename the table": ["ALTER TABLE t RENAME TO u"],
    "another schema": ["CREATE SCHEMA s", "ALTER TABLE t SET SCHEMA s"],
    "rename the table and a column": ["ALTER TABLE t RENAME TO u", "ALTER TABLE u RENAME b TO bb"],
    "nothing of the table": ["ALTER TABLE t REPLICA IDENTITY FULL", "CREATE INDEX ON t (b)", "ANALYZE t"],
    "no identity to key": [
        "ALTER TABLE t DROP CONSTRAINT t_pkey, REPLICA IDENTITY FULL",
        "ALTER TABLE t ADD PRIMARY KEY (id)",
        "ALTER TABLE t REPLICA IDENTITY DEFAULT",
    ],
}


def start(stream: Stream, followers: list[str]) -> None:
    stream.run("CREATE TABLE t (id int PRIMARY KEY, n int, b varchar(20), c text)")
    stream.run("INSERT INTO t SELECT g, g, 'b' || g, 'c' || g FROM generate_series(1, 5) g")
    stream.setup()
    stream.carry(*followers)


def table(stream: Stream) -> str:
    [relation] = stream.relations()
    return f'"{relation.schema}"."{relation.name}"'


def write(stream: Stream, base: int) -> None:
    """Rows as the table takes them now, whatever its columns are called."""
    [relation] = stream.relations()
    key, name = relation.columns[0].name, table(stream)
    values = ", ".join(
        f"{base + place}::int::text::{_type(stream, place)}" for place in range(1, len(relation.columns))
    )
    for number in (base, base + 1):
        stream.run(f"INSERT INTO {name} VALUES ({number}, {values})")
    stream.run(f'DELETE FROM {name} WHERE "{key}" = {base}', f'UPDATE {name} SET n = n + 1 WHERE "{key}" > 2')


def _type(stream: Stream, place: int) -> str:
    return str(
        query(
            stream.leader,
            "SELECT (array_agg(format_type(atttypid, atttypmod) ORDER BY attnum))[%s] FROM pg_attribute a"
            " JOIN pg_class c ON c.oid = attrelid WHERE relname IN ('t', 'u') AND attnum > 0 AND NOT attisdropped",
            place + 1,
        )[0][0]
    )


@pytest.mark.parametrize("live", [True, False], ids=["live", "later"])
@pytest.mark.parametrize("change", FOLLOWED)
def test_a_change_is_followed(stream: Stream, followers: list[str], change: str, live: bool) -> None:
    """Live, the catalog still is as the log says when the shipper reads it; later it is already ahead."""
    start(stream, followers)
    if live:
        for number, statement in enumerate(FOLLOWED[change]):
            stream.run(statement)
            write(stream, 100 + 10 * number)
            stream.ship()
    else:
        write(stream, 50)
        for statement in FOLLOWED[change]:
            stream.run(statement)
        write(stream, 100)
        stream.ship()
    for follower in followers:
        stream.apply(follower)
    stream.assert_equal(*followers)


def test_tables_that_come_and_go(stream: Stream, followers: list[str]) -> None:
    start(stream, followers)
    stream.run(
        "CREATE TABLE late (a int PRIMARY KEY, b text)",
        "INSERT INTO late VALUES (1, 'x')",
        "BEGIN; CREATE TABLE later (a int PRIMARY KEY); INSERT INTO later VALUES (1); COMMIT",
        "DROP TABLE late",
        "CREATE TABLE passing (a int PRIMARY KEY)",
        "INSERT INTO passing VALUES (1)",
        "DROP TABLE passing",
    )
    stream.carry(*followers)
    stream.assert_equal(*followers)


def test_a_table_dropped_and_made_again(stream: Stream, followers: list[str]) -> None:
    """A new relation id under an old name: its rows must not mix with those of the old table."""
    start(stream, followers)
    stream.run("DROP TABLE t", "CREATE TABLE t (id int PRIMARY KEY, other text)", "INSERT INTO t VALUES (1, 'new')")
    stream.ship()
    for follower in followers:
        with pytest.raises(SchemaError, match=r"public\.t") as caught:
            stream.apply(follower)
        assert caught.value.remedy


@pytest.mark.parametrize("streaming", [True, False])
def test_changes_within_a_transaction(stream: Stream, followers: list[str], streaming: bool) -> None:
    stream.options["streaming"] = streaming
    stream.run(f"ALTER DATABASE {stream.slot} SET logical_decoding_work_mem = '64kB'")
    start(stream, followers)
    stream.run(
        """BEGIN;
        INSERT INTO t SELECT g, g, 'before', repeat('x', 200) FROM generate_series(10, 600) g;
        ALTER TABLE t ADD COLUMN x int;
        INSERT INTO t SELECT g, g, 'after', repeat('y', 200), g FROM generate_series(1010, 1600) g;
        SAVEPOINT a;
        ALTER TABLE t ADD COLUMN z text DEFAULT 'aborted';
        INSERT INTO t SELECT g, g, 'aborted', repeat('y', 200), g, 'z' FROM generate_series(2010, 2600) g;
        ROLLBACK TO a;
        INSERT INTO t SELECT g, g, 'after', repeat('y', 200), g FROM generate_series(3010, 3600) g;
        ALTER TABLE t DROP COLUMN b;
        INSERT INTO t VALUES (5000, 1, 'c', 2);
        COMMIT"""
    )
    stream.run("INSERT INTO t VALUES (5001, 1, 'c', 2)")
    stream.carry(*followers)
    stream.assert_equal(*followers)


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_a_type_change_whose_result_only_the_leader_knows(
    stream: Stream, new_follower: FollowerFactory, kind: str
) -> None:
    """Stops before the first row of the new shape, and goes on once the operator did what the error says."""
    follower = new_follower(kind)
    start(stream, [follower])
    old = stream.relations()
    before = everything(follower, old)
    stream.run(
        "ALTER TABLE t ALTER c TYPE int USING length(c)",
        "INSERT INTO t VALUES (7, 7, 'after', 7)",
    )
    stream.ship()
    with pytest.raises(SchemaError, match=r"public\.t") as caught:
        stream.apply(follower)
    assert "ALTER TABLE" in caught.value.remedy
    assert everything(follower, old) == before
    if kind == "postgresql":
        run(follower, "ALTER TABLE t ALTER c TYPE int USING length(c)")
        stream.apply(follower)
        stream.assert_equal(follower)


@pytest.mark.parametrize(
    "column", ["r float8 NOT NULL DEFAULT random()", "r float8 DEFAULT random()", "r int GENERATED ALWAYS AS IDENTITY"]
)
def test_a_column_with_a_volatile_default(stream: Stream, followers: list[str], column: str) -> None:
    """The leader rewrote every row with a value of its own, of which the log says nothing."""
    start(stream, followers)
    stream.run(f"ALTER TABLE t ADD COLUMN {column}", "INSERT INTO t (id) VALUES (50)")
    stream.ship()
    for follower in followers:
        with pytest.raises(SchemaError, match="'r'") as caught:
            stream.apply(follower)
        assert "ADD COLUMN" in caught.value.remedy


def test_a_follower_with_columns_of_its_own(stream: Stream, new_follower: FollowerFactory) -> None:
    follower = new_follower("postgresql")
    start(stream, [follower])
    run(follower, "ALTER TABLE t ADD COLUMN mine text DEFAULT 'mine'", "ALTER TABLE t ALTER n TYPE numeric")
    stream.run("UPDATE t SET b = 'x' WHERE id = 1", "INSERT INTO t VALUES (60, 60, 'b', 'c')")
    stream.carry(follower)
    stream.assert_equal(follower)
    assert query(follower, "SELECT mine FROM t WHERE id IN (1, 60)") == [("mine",), ("mine",)]


def test_a_column_the_follower_lacks(stream: Stream, new_follower: FollowerFactory) -> None:
    follower = new_follower("postgresql")
    run(follower, "CREATE TABLE t (id int PRIMARY KEY, n int, b text)")
    stream.run(
        "CREATE TABLE t (id int PRIMARY KEY, n int, b varchar(20), c text)", "INSERT INTO t VALUES (1, 1, 'b', 'c')"
    )
    stream.setup()
    stream.ship()
    with pytest.raises(SchemaError, match="no column 'c'") as caught:
        stream.apply(follower)
    assert query(follower, "SELECT count(*) FROM t") == [(0,)]
    run(follower, caught.value.remedy)
    stream.apply(follower)
    stream.assert_equal(follower)
