"""What capture costs the leader: ``python -m benchmarks.trigger``.

Time and WAL of three workloads without capture, with the logical log (publication and slot), with our triggers and with
the triggers that are usually written: one call and one jsonb row for each row changed, or one jsonb row each by one
statement. All in one run, on one server, in turns; the shortest time of all rounds counts, beside the time that the
server's process itself took (CPU), which noise disturbs less.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

import psycopg

from benchmarks.common import sql
from cdc.stores.embedded import EmbeddedPostgres
from cdc.stores.postgresql import capture, setup
from cdc.stores.postgresql.connect import connect

TABLE: Final = "CREATE TABLE t (id int PRIMARY KEY, a int, b text, c timestamptz DEFAULT now())"
_JSONB_TABLE: Final = """
    CREATE TABLE log (id bigserial PRIMARY KEY, at timestamptz DEFAULT now(), tab text, op text, old jsonb, new jsonb);
"""
PER_ROW: Final = f"""{_JSONB_TABLE}
    CREATE FUNCTION capture() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF TG_OP = 'INSERT' THEN INSERT INTO log (tab, op, new) VALUES (TG_TABLE_NAME, 'I', to_jsonb(NEW));
        ELSIF TG_OP = 'UPDATE' THEN
            INSERT INTO log (tab, op, old, new) VALUES (TG_TABLE_NAME, 'U', to_jsonb(OLD), to_jsonb(NEW));
        ELSE INSERT INTO log (tab, op, old) VALUES (TG_TABLE_NAME, 'D', to_jsonb(OLD)); END IF;
        RETURN NULL; END $$;
    CREATE TRIGGER capture AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION capture();
"""
PER_STATEMENT: Final = f"""{_JSONB_TABLE}
    CREATE FUNCTION capture() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO log (tab, op, new) SELECT TG_TABLE_NAME, left(TG_OP, 1), to_jsonb(n) FROM new n;
        RETURN NULL; END $$;
    CREATE TRIGGER i AFTER INSERT ON t REFERENCING NEW TABLE AS new FOR EACH STATEMENT EXECUTE FUNCTION capture();
    CREATE TRIGGER u AFTER UPDATE ON t REFERENCING NEW TABLE AS new FOR EACH STATEMENT EXECUTE FUNCTION capture();
"""


class Workload(NamedTuple):
    """``goal``: the most that our triggers may add, as a part of what per-row jsonb adds."""

    name: str
    statement: str
    goal: float


WORKLOADS: Final = (
    Workload(
        "one insert of 500,000 rows",
        "INSERT INTO t SELECT g, g % 100, 'row number ' || g FROM generate_series(1, 500000) g",
        0.5,
    ),
    Workload(
        "40,000 transactions of ten rows",
        """DO $$ BEGIN FOR x IN 1..40000 LOOP
           INSERT INTO t SELECT 1000000 + 10 * x + g, g, 'row number ' || g FROM generate_series(0, 9) g;
           COMMIT; END LOOP; END $$""",
        0.5,
    ),
    Workload(
        "100,000 updates of one row",
        "DO $$ BEGIN FOR x IN 1..100000 LOOP UPDATE t SET a = a + 1 WHERE id = x; COMMIT; END LOOP; END $$",
        1.0,
    ),
)


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float
    wal_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often (default 3)")
    arguments = parser.parse_args()
    settings = {"max_wal_size": "8GB", "autovacuum": "off", "synchronous_commit": "off"}
    captures: dict[str, Callable[[str], None]] = {
        "none": lambda _: None,
        "logical": _logical,
        "trigger": _trigger,
        "per-row jsonb": lambda url: sql(url, PER_ROW),
        "per-statement jsonb": lambda url: sql(url, PER_STATEMENT),
    }
    found: dict[tuple[str, str], list[Cost]] = {}
    with EmbeddedPostgres(18, settings=settings) as server:
        for number in range(arguments.rounds):
            for name, begin in captures.items():
                database = f"b{number}_{list(captures).index(name)}"
                sql(server.url(), f"CREATE DATABASE {database}")
                url = server.url(database)
                sql(url, TABLE)
                begin(url)
                for workload in WORKLOADS:
                    found.setdefault((workload.name, name), []).append(_measured(url, workload))
                sql(server.url(), "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
                sql(server.url(), f"DROP DATABASE {database}")
    for workload in WORKLOADS:
        costs = {name: _least(found[workload.name, name]) for name in captures}
        for name, cost in costs.items():
            print(json.dumps({"workload": workload.name, "capture": name, **_figures(cost, costs["none"])}), flush=True)
        ratio = _added(costs, "trigger") / _added(costs, "per-row jsonb")
        print(json.dumps({"workload": workload.name, "added_beside_per_row": round(ratio, 2), "goal": workload.goal}))


def _logical(url: str) -> None:
    with closing(connect(url)) as connection:
        names = setup.default_names(connection.info.dbname)
        setup.run(connection, setup.plan_setup(connection, names))


def _trigger(url: str) -> None:
    with closing(connect(url)) as connection:
        names = setup.default_names(connection.info.dbname)
        setup.run(connection, capture.plan_setup(connection, names))


def _measured(url: str, workload: Workload) -> Cost:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
        before_wal, before_cpu = _wal(connection), _cpu_s(connection.info.backend_pid)
        start = time.perf_counter()
        connection.execute(workload.statement.encode())
        wall_s = time.perf_counter() - start
        cpu_s = _cpu_s(connection.info.backend_pid) - before_cpu
        return Cost(wall_s, cpu_s, _wal(connection) - before_wal)


def _wal(connection: "psycopg.Connection[tuple[object, ...]]") -> int:
    row = connection.execute("SELECT (pg_current_wal_insert_lsn() - '0/0')::int8").fetchone()
    assert row is not None
    return int(str(row[0]))


def _cpu_s(pid: int) -> float:
    """What a process has taken until now (proc(5), utime and stime in hundredths of a second)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _least(costs: list[Cost]) -> Cost:
    return Cost(*(min(each) for each in zip(*costs, strict=True)))


def _added(costs: dict[str, Cost], name: str) -> float:
    return costs[name].cpu_s - costs["none"].cpu_s


def _figures(cost: Cost, none: Cost) -> dict[str, object]:
    return {
        "wall_s": round(cost.wall_s, 2),
        "cpu_s": round(cost.cpu_s, 2),
        "wal_mb": round(cost.wal_bytes / 1e6, 1),
        "times_the_wal": round(cost.wal_bytes / none.wal_bytes, 2),
    }


if __name__ == "__main__":
    main()
