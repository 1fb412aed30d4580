"""The SQL of the trigger log: its schema, its functions, and a table's triggers. Pure.

A schema of its own holds everything. Writes are captured once per statement, from transition tables, into one of two
change tables, which take turns, so that the other one can be emptied by TRUNCATE. What a row of a change table says:

========== ===========================================================================================================
``xid``    the transaction, as ``txid_current()``
``here``   where the WAL stood when the statement ended: of two changes of one row the earlier has the lower
``origin`` the table or partition that the statement named
``depth``  ``pg_trigger_depth()`` where statements may stand inside each other, else 0
``op``     I, U (new rows), D (old rows), P (old rows that an UPDATE replaced by others), T (TRUNCATE); B and M are
           marks, see below; ``!``: the statement was not captured, ``data`` says why
``data``   records of ``record_send``, end to end (:mod:`cdc.wire.record`)
========== ===========================================================================================================

There are two ways of capturing. *Plainly*, where a table has a key and nobody else's triggers: an UPDATE tells its new
rows. Where rows may leave their keys (DELETE, an UPDATE that names a key's column, MERGE with either) a mark is left
as the statement begins: what goes by it went there, before anything else that the statement did. *Wholly*, everywhere
else: every statement leaves a mark as it begins; where triggers of others may do something inside of it, another one
when its own rows are written and none of those has fired after; all it did was done at the last. An UPDATE is told as
rows gone and come. :data:`ORDERED` is the order that follows.

https://www.postgresql.org/docs/current/plpgsql-trigger.html,
https://www.postgresql.org/docs/current/sql-createtrigger.html
"""

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from cdc.sql.quote import identifier, literal, qualified

SLOTS: Final = (0, 1)
# Of changes in a relation ``c`` that has ``relation``, the table that an origin is a partition of, beside its columns:
# all but the marks, the transaction's last place as ``ended``, their own as ``told``. What goes uses a mark up.
PLACED: Final = """
    SELECT m.*, max(here) OVER (PARTITION BY xid) AS ended, CASE
        WHEN op IN ('T', '!') OR mark IS NULL THEN here
        WHEN depth > 0 OR here = min(here) OVER (PARTITION BY xid, relation, depth, op, mark) THEN mark
        ELSE here END AS told
    FROM (
        SELECT c.*, CASE WHEN depth > 0 OR op = 'D' THEN max(here) FILTER (WHERE op = 'B') OVER before
                         WHEN op = 'P' THEN max(here) FILTER (WHERE op = 'M') OVER before END AS mark
        FROM c WINDOW before AS (PARTITION BY xid, relation, depth ORDER BY here)) m
    WHERE op NOT IN ('B', 'M')
"""
ORDERED: Final = "ended, xid, told, depth, CASE op WHEN 'I' THEN 2 WHEN 'U' THEN 1 ELSE 0 END, here"
_FEW: Final = 50  # rows that share one change without a look at their size
_CHUNK_BYTES: Final = 7_500  # of rows that share one change otherwise: what fits a page
_LARGE_BYTES: Final = 1_000_000
_TURN_BYTES: Final = 64 << 20  # after so many, or
_TURN_MINUTES: Final = 10  # so long, it is the other change table's turn

# What of a session changes how values print; https://www.postgresql.org/docs/current/runtime-config-client.html
PRINTING: Final[Mapping[str, str]] = {
    "DateStyle": "ISO,YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
    "lc_monetary": "C",
    "xmloption": "content",
    "array_nulls": "on",
    "transform_null_equals": "off",
}
NO_SETTINGS: Final[Mapping[str, str]] = {}


class Table(NamedTuple):
    """A table or partition to be given triggers.

    ``root``: the table that it is a partition of, itself where it is none.
    ``key``: its columns, where it is captured plainly; none where it is wholly. ``expressions``: what of a row is
    captured, over the alias ``n``, None for all; ``condition``: of which rows. ``nesting``: triggers of others, or
    foreign keys, may change it while a statement of its own runs; what its partitions have of it is its own.
    ``looping``: foreign keys lead back to it, and what they do to it within a statement stands among that statement's
    own rows.
    """

    id: int
    root: int
    schema: str
    name: str
    key: tuple[str, ...] = ()
    expressions: tuple[str, ...] | None = None
    condition: str = ""
    nesting: bool = False
    looping: bool = False

    @property
    def shaped(self) -> bool:
        """Is anything less than whole rows captured?"""
        return self.expressions is not None or bool(self.condition)


def masked(schema: str, column: str, mask: str) -> str:
    """What is captured of a column over the alias ``n``. ``mask``: "hash", "null", or "" for the value itself."""
    value = f"n.{identifier(column)}"
    if mask == "hash":
        return f"{identifier(schema)}.hashed({value}::text)"
    return f"CASE WHEN false THEN {value} END" if mask == "null" else value


def parenthesized(condition: str) -> str:
    """A condition that somebody wrote, as a part of ours; on lines of its own, should it end with a comment."""
    return f"(\n{condition}\n)"


def create_schema(schema: str, owner: str, wake: int) -> str:
    """Everything but the triggers. ``wake``: the advisory lock that a shipper holds while it sleeps.

    Several statements, to be run as one.
    """
    statements = [
        f"CREATE SCHEMA {identifier(schema)} AUTHORIZATION {identifier(owner)}",
        f"SET LOCAL ROLE {identifier(owner)}",
        *(_change_table(schema, slot) for slot in SLOTS),
        *(table.format(s=identifier(schema)) for table in _TABLES),
        *_functions(schema, wake),
        "RESET ROLE",
    ]
    return ";\n".join(statements)


_TABLES: Final = (
    """CREATE TABLE {s}.tick (id int8 PRIMARY KEY, snapshot pg_snapshot NOT NULL, timeline int4 NOT NULL,
    made timestamptz NOT NULL DEFAULT clock_timestamp())""",
    "CREATE TABLE {s}.shape (origin int8, tick int8, description jsonb NOT NULL, PRIMARY KEY (origin, tick))",
    """CREATE TABLE {s}.captured (relation int8 PRIMARY KEY, origins int8[] NOT NULL, plain bool NOT NULL,
    columns text[], masks text[], condition text NOT NULL, triggers text NOT NULL)""",
    "CREATE TABLE {s}.turn (slot int4 NOT NULL, since timestamptz NOT NULL)",
    "INSERT INTO {s}.turn VALUES (0, clock_timestamp())",
    "CREATE TABLE {s}.source (called text PRIMARY KEY, settings text NOT NULL, body text NOT NULL)",
    "CREATE TABLE {s}.granted (revoke text NOT NULL)",
    "CREATE TABLE {s}.secret (salt bytea NOT NULL)",
    "INSERT INTO {s}.secret SELECT sha256(string_agg(uuid_send(gen_random_uuid()), '')) FROM generate_series(1, 4)",
)


def _functions(schema: str, wake: int) -> Iterator[str]:
    s = identifier(schema)
    tables = [literal(_change(schema, slot)) for slot in SLOTS]
    yield _function(schema, "hashed(value text)", "text", _HASHED.format(s=s), language="sql", kind="STABLE STRICT")
    tick = "tick(snapshot pg_snapshot, timeline int4, shapes jsonb)"
    yield _function(schema, tick, "int8", _TICK.format(s=s))
    yield _function(schema, "turn_to(slot int4)", "void", _TURN_TO.format(s=s, tables=", ".join(tables)))
    limits = {"bytes": _TURN_BYTES, "minutes": _TURN_MINUTES}
    yield _function(schema, "forget(upto int8)", "void", _FORGET.format(s=s, tables=", ".join(tables), **limits))
    yield from _capturing(schema, "begin", _begin(schema))
    yield from _capturing(schema, "capture", _plain(schema, wake))
    yield from _capturing(schema, "capture_whole", _whole(schema, wake))
    yield from _capturing(schema, "capture_looping", _whole(schema, wake, looping=True))
    yield f"SELECT {s}.turn_to(0)"


def _capturing(schema: str, called: str, body: str, settings: Mapping[str, str] = NO_SETTINGS) -> Iterator[str]:
    """A function that writes into the change table whose turn it is, by its body for the first one."""
    pinned = " ".join(f"SET {name} = {literal(value)}" for name, value in settings.items())
    yield _function(schema, f"{called}()", "trigger", "BEGIN RETURN NULL; END")
    yield (
        f"INSERT INTO {identifier(schema)}.source VALUES ({literal(called)}, {literal(pinned)}, {literal(body)})"
        " ON CONFLICT (called) DO UPDATE SET settings = excluded.settings, body = excluded.body"
    )


def drop_schema(schema: str) -> str:
    """The statement that takes all of it away. Triggers depend on its functions, and go along."""
    return f"DROP SCHEMA IF EXISTS {identifier(schema)} CASCADE"


def create_triggers(schema: str, owner: str, wake: int, table: Table) -> str:
    """The triggers of a table, and its function where only a part of it is captured. Several statements, as one."""
    s, name = identifier(schema), qualified(table.schema, table.name)
    called = f"capture_{table.id}" if table.shaped else "capture" if table.key else "capture_whole"
    if table.looping and not table.shaped:
        called = "capture_looping"
    statements = []
    if table.shaped:
        statements = [
            f"SET LOCAL ROLE {identifier(owner)}",
            f"DROP FUNCTION IF EXISTS {s}.{called}() CASCADE",
            *_capturing(schema, called, _whole(schema, wake, table, looping=table.looping), PRINTING),
            f"SELECT {s}.turn_to(slot) FROM {s}.turn",
            "RESET ROLE",
        ]
    events = {"insert": "INSERT", "update": "UPDATE", "delete": "DELETE", "truncate": "TRUNCATE"}
    rows = {
        "insert": " REFERENCING NEW TABLE AS new",
        "update": " REFERENCING OLD TABLE AS old NEW TABLE AS new",
        "delete": " REFERENCING OLD TABLE AS old",
    }
    triggers = [(kind, f"AFTER {event} ON {name}{rows.get(kind, '')}", f"{called}()") for kind, event in events.items()]
    if table.key:
        key = ", ".join(map(identifier, table.key))
        triggers += [
            ("deletes", f"BEFORE DELETE ON {name}", f"begin('{table.root}', 'B')"),
            ("moves", f"BEFORE UPDATE OF {key} ON {name}", f"begin('{table.root}', 'M')"),
        ]
    else:
        triggers.append(("begin", f"BEFORE INSERT OR UPDATE OR DELETE ON {name}", f"begin('{table.root}')"))
    if table.nesting:
        # Only the statement's first row queues an event, which is the first to fire once all rows are written.
        mark = "'cdc.writing' || pg_trigger_depth() + 1"
        written = f"current_setting({mark}, true) = '' AND set_config({mark}, '1', true) = '1'"
        statements += [
            f"DROP TRIGGER IF EXISTS {_first_trigger(schema)} ON {name}",
            f"CREATE TRIGGER {_first_trigger(schema)} AFTER INSERT OR UPDATE OR DELETE ON {name} FOR EACH ROW"
            f" WHEN ({written}) EXECUTE FUNCTION {s}.begin('{table.root}')",
        ]
    return "; ".join(
        [
            *statements,
            *(f"DROP TRIGGER IF EXISTS {trigger_name(schema, kind)} ON {name}" for kind in _KINDS),
            *(
                f"CREATE TRIGGER {trigger_name(schema, kind)} {event} FOR EACH STATEMENT"
                f" EXECUTE FUNCTION {s}.{function}"
                for kind, event, function in triggers
            ),
        ]
    )


_KINDS: Final = ("insert", "update", "delete", "truncate", "begin", "deletes", "moves")


def _first_trigger(schema: str) -> str:
    return identifier(f"!{schema}"[:63])


def trigger_name(schema: str, kind: str) -> str:
    """Quoted. Triggers of one kind fire in the order of their names."""
    return identifier(f"{schema[: 62 - len(kind)]} {kind}")


def grant_reading(schema: str, role: str) -> str:
    """The statements that let ``role`` ship."""
    s, to = identifier(schema), identifier(role)
    called = ", ".join(
        f"{s}.{function}" for function in ("tick(pg_snapshot, int4, jsonb)", "forget(int8)", "hashed(text)")
    )
    tables = ", ".join(f"{s}.{name}" for name in (*map(change_table, SLOTS), "tick", "shape", "captured", "turn"))
    return (
        f"GRANT USAGE ON SCHEMA {s} TO {to}; GRANT SELECT ON {tables} TO {to}; "
        f"GRANT EXECUTE ON FUNCTION {called} TO {to}"
    )


def change_table(slot: int) -> str:
    return f"change_{slot}"


def _change(schema: str, slot: int) -> str:
    return qualified(schema, change_table(slot))


def _change_table(schema: str, slot: int) -> str:
    """Never vacuumed: it is emptied before it would need to be. A change of :data:`_CHUNK_BYTES` stands in its page."""
    name = _change(schema, slot)
    return (
        f'CREATE TABLE {name} (xid int8, here pg_lsn, origin oid, depth int2, op "char", data bytea)'
        " WITH (autovacuum_enabled = off, toast_tuple_target = 8160); "
        f"ALTER TABLE {name} ALTER data SET STORAGE EXTERNAL; "
        f"CREATE INDEX {identifier(index_name(slot))} ON {name} USING brin (xid) WITH (pages_per_range = 16)"
    )


def index_name(slot: int) -> str:
    return f"change_{slot}_xid"


def _function(
    schema: str, signature: str, returns: str, body: str, *, language: str = "plpgsql", kind: str = "VOLATILE"
) -> str:
    """What a function of ours is called with is all that its caller decides."""
    name, _, arguments = signature.partition("(")
    called = f"{identifier(schema)}.{name}({arguments}"
    types = ", ".join(part.strip().rpartition(" ")[2] for part in arguments[:-1].split(",")) if arguments != ")" else ""
    return (
        f"CREATE FUNCTION {called} RETURNS {returns} LANGUAGE {language} {kind} SECURITY DEFINER "
        f"SET search_path = pg_catalog, pg_temp AS {literal(body)}; "
        f"REVOKE ALL ON FUNCTION {identifier(schema)}.{name}({types}) FROM PUBLIC"
    )


def _plain(schema: str, wake: int) -> str:
    """The statement trigger of a table that is captured plainly. Its UPDATE of a row or two is what has to be fast."""
    where, old, new = _Into(schema, "0"), _records(None, "old"), _records(None, "new")
    at_once = _Into(schema, "0", here="pg_current_wal_insert_lsn()")
    return f"""
DECLARE
    here pg_lsn;
BEGIN
    IF TG_OP = 'UPDATE' AND current_setting('cdc.leaving', true) IS DISTINCT FROM 'on' THEN
        {at_once.rows("U", new)}
    ELSE
        here := pg_current_wal_insert_lsn();
        IF TG_OP = 'UPDATE' AND current_setting('cdc.moving' || pg_trigger_depth(), true) IS DISTINCT FROM 'on' THEN
            {where.rows("U", new)}
        ELSE{_each_operation(where, old, new)}
        END IF;
        IF TG_OP = 'UPDATE' THEN
            PERFORM set_config('cdc.moving' || pg_trigger_depth(), '', true);
        END IF;
    END IF;{_wake(schema, wake)}
    RETURN NULL;
END"""


def _whole(schema: str, wake: int, table: Table | None = None, *, looping: bool = False) -> str:
    """The statement trigger of a table that is captured wholly; of ``table`` alone where only a part of it is."""
    where, old, new = _Into(schema, "pg_trigger_depth()"), _records(table, "old"), _records(table, "new")
    body = _each_operation(where, old, new, looping=looping)
    if table is not None:
        # Whoever writes must not be stopped by what we do with a part of the row: it is the shipper that stops.
        body = f"""
    BEGIN{body}
    EXCEPTION WHEN OTHERS THEN
        {where.value("!", "convert_to(SQLERRM, 'UTF8')")}
    END;"""
    return f"""
#variable_conflict use_column
DECLARE
    here pg_lsn := pg_current_wal_insert_lsn();
BEGIN{body}{_wake(schema, wake)}
    RETURN NULL;
END"""


def _each_operation(where: "_Into", old: str, new: str, *, looping: bool = False) -> str:
    return f"""
        IF TG_OP = 'UPDATE' THEN
            {where.net(old, new) if looping else where.pairs(old, new)}
        ELSIF TG_OP = 'INSERT' THEN
            {where.chunks("I", new)}
        ELSIF TG_OP = 'DELETE' THEN
            {where.chunks("D", old)}
        ELSE
            {where.value("T", "NULL::bytea")}
        END IF;"""


def _wake(schema: str, wake: int) -> str:
    lock = str(wake)
    return f"""
    IF NOT (pg_try_advisory_lock_shared({lock}) AND pg_advisory_unlock_shared({lock})) THEN
        -- What has sent a notification cannot be prepared: where that may come, the shipper looks for itself.
        IF current_setting('max_prepared_transactions') = '0' THEN
            PERFORM pg_notify({literal(schema)}, '');
        END IF;
    END IF;"""


def _records(table: Table | None, rows: str) -> str:
    """A query for the rows of a transition table as records ``r``."""
    if table is None:
        return f"SELECT record_send(n.*) AS r FROM {rows} n"
    row = "n.*" if table.expressions is None else f"ROW({', '.join(table.expressions)})"
    where = f" WHERE {parenthesized(table.condition)}" if table.condition else ""
    return f"SELECT record_send({row}) AS r FROM {rows} n{where}"


class _Into(NamedTuple):
    """Statements that write changes, static so that their plans are kept for the session.

    Columns are told by their place: those of the table may be called like ours.
    """

    schema: str
    depth: str
    here: str = "here"
    origin: str = "TG_RELID"

    def value(self, op: str, data: str) -> str:
        return f"{self._insert} VALUES ({self._head(literal(op))}, {data});"

    def mark(self, op: str) -> str:
        return f"{self._insert} VALUES ({self._head(op)}, NULL::bytea);"

    def rows(self, op: str, records: str) -> str:
        """Each row as a change."""
        return f"{self._insert} SELECT {self._head(literal(op))}, r FROM ({records}) s;"

    def pairs(self, old: str, new: str) -> str:
        """Each old row as gone and each new one as come."""
        both = f"SELECT 'P'::\"char\" AS op, r FROM ({old}) o UNION ALL SELECT 'I', r FROM ({new}) c"
        return f"{self._insert} SELECT {self._head('op')}, r FROM ({both}) s;"

    def net(self, old: str, new: str) -> str:
        """As :meth:`pairs`, without rows that only stood in between."""
        return self.pairs(f"({old}) EXCEPT ALL ({new})", f"({new}) EXCEPT ALL ({old})")

    def chunks(self, op: str, records: str) -> str:
        """A few rows as one change; where there are more, or large ones, as many as that many bytes make."""
        head = self._head(literal(op))
        few = (
            f"SELECT {head}, string_agg(r, '') FILTER (WHERE length(r) <= {_LARGE_BYTES})"
            f" FROM ({records} LIMIT {_FEW + 1}) s"
            f" HAVING count(*) BETWEEN 1 AND {_FEW} AND max(length(r)) <= {_LARGE_BYTES}"
        )
        parts = f"SELECT r, sum(length(r)) OVER (ROWS UNBOUNDED PRECEDING) / {_CHUNK_BYTES} AS part"
        many = (
            f"SELECT {head}, string_agg(r, '') FROM ({parts} FROM ({records} OFFSET 0) q) s GROUP BY part ORDER BY part"
        )
        return f"""{self._insert} {few};
            IF NOT FOUND THEN {self._insert} {many}; END IF;"""

    @property
    def _insert(self) -> str:
        return f"INSERT INTO {_change(self.schema, SLOTS[0])}"

    def _head(self, op: str) -> str:
        return f"txid_current(), {self.here}, {self.origin}, {self.depth}, {op}"


def _begin(schema: str) -> str:
    """Leaves a mark. Its arguments: the table, and of one that is captured plainly what its statement does.

    Settings end with the transaction, or with what of it is rolled back. Whoever tampers with those makes an UPDATE
    that moves rows look like one that does not, which followers find out, or what triggers did look earlier or later.
    """
    mark = _Into(
        schema,
        "CASE TG_NARGS WHEN 1 THEN pg_trigger_depth() ELSE 0 END",
        here="pg_current_wal_insert_lsn()",
        origin="TG_ARGV[0]::oid",
    )
    return f"""
BEGIN
    IF TG_NARGS = 1 AND TG_WHEN = 'BEFORE' THEN
        PERFORM set_config('cdc.writing' || pg_trigger_depth(), '', true);
    ELSIF TG_NARGS = 2 AND TG_ARGV[1] = 'M' THEN
        PERFORM set_config('cdc.leaving', 'on', true);
        PERFORM set_config('cdc.moving' || pg_trigger_depth(), 'on', true);
    END IF;
    {mark.mark("coalesce(TG_ARGV[1], 'B')")}
    RETURN NULL;
END"""


_HASHED: Final = "SELECT encode(sha256(salt || convert_to(value, 'UTF8')), 'hex') FROM {s}.secret"

# Numbers go with the clock, in hundredths of a second since 2026, so that those of a schema that was set up anew are
# higher than those that a topic knows of the one before.
_TICK: Final = """
DECLARE
    number int8 := greatest((SELECT max(id) FROM {s}.tick) + 1,
        (extract(epoch FROM clock_timestamp() - timestamptz '2026-01-01 00:00:00+00') * 100)::int8, 1);
BEGIN
    INSERT INTO {s}.tick (id, snapshot, timeline) VALUES (number, $1, $2);
    INSERT INTO {s}.shape SELECT (d ->> 'origin')::int8, number, d FROM jsonb_array_elements(shapes) d;
    RETURN number;
END"""

# A statement that has begun still writes by the function as it was: both change tables are always read.
_TURN_TO: Final = """
DECLARE
    tables text[] := ARRAY[{tables}];
    each record;
BEGIN
    FOR each IN SELECT called, settings, replace(body, tables[1], tables[slot + 1]) AS body FROM {s}.source LOOP
        EXECUTE format('CREATE OR REPLACE FUNCTION {s}.%I() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER '
            'SET search_path = pg_catalog, pg_temp %s AS %L', each.called, each.settings, each.body);
    END LOOP;
    UPDATE {s}.turn t SET slot = $1, since = clock_timestamp();
END"""

# Emptied is the change table whose turn it is not, once nothing of it is needed, as seen by somebody who has it alone.
_FORGET: Final = """
DECLARE
    seen txid_snapshot := (SELECT snapshot::text::txid_snapshot FROM {s}.tick WHERE id = upto);
    tables text[] := ARRAY[{tables}];
    turn record;
    needed bool;
BEGIN
    IF seen IS NULL THEN
        RAISE EXCEPTION 'no tick %', upto USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    DELETE FROM {s}.tick WHERE id < upto;
    DELETE FROM {s}.shape o WHERE EXISTS (
        SELECT FROM {s}.shape n WHERE n.origin = o.origin AND n.tick > o.tick AND n.tick <= upto);
    PERFORM brin_summarize_new_values(i.indexrelid) FROM pg_index i WHERE i.indrelid = ANY (tables::regclass[]);
    SELECT slot, tables[slot + 1] AS mine, tables[2 - slot] AS other, since INTO turn FROM {s}.turn;
    IF pg_relation_size(turn.other::regclass) > 0 THEN
        BEGIN
            EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', turn.other);
            EXECUTE format('SELECT EXISTS (SELECT FROM %s WHERE NOT txid_visible_in_snapshot(xid, $1))', turn.other)
                INTO needed USING seen;
            IF NOT needed THEN
                EXECUTE format('TRUNCATE %s', turn.other);
            END IF;
        EXCEPTION WHEN lock_not_available THEN
            NULL;
        END;
    ELSIF pg_table_size(turn.mine::regclass) > {bytes}
        OR (pg_relation_size(turn.mine::regclass) > 0
            AND turn.since < clock_timestamp() - interval '{minutes} minutes') THEN
        PERFORM {s}.turn_to(1 - turn.slot);
    END IF;
END"""
