"""The SQL of the trigger log: its schema, its functions, and a table's triggers. Pure.

A schema of its own holds everything. Writes are captured once per statement, from transition tables, into one of two
change tables, which take turns by the minute so that the other one can be emptied by TRUNCATE. What a row of a change
table says:

========== ===========================================================================================================
``xid``    the transaction, as ``txid_current()``
``here``   where the WAL stood when the statement ended: of two changes of one row the earlier has the lower
``began``  where it stood when the statement began, told only where it deletes; where statements may stand inside each
           other, where it stood when the last of its own rows was written and no trigger had fired yet for any
``origin`` the table or partition that the statement named
``depth``  ``pg_trigger_depth()``: 1 for a client's own statement
``op``     I, U (new rows), D (old rows), K (an old row whose key an UPDATE changed, and its new one), T, or ``!``: the
           statement was not captured, ``data`` says why
``data``   records of ``record_send``, end to end (:mod:`cdc.wire.record`)
========== ===========================================================================================================

The order that holds is: ``began``, or where it is not told, ``here``. Within a statement what goes comes before what
changes before what comes.

https://www.postgresql.org/docs/current/plpgsql-trigger.html, https://www.postgresql.org/docs/current/sql-createtrigger.html
"""

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from cdc.sql.quote import identifier, literal, qualified

SLOTS: Final = (0, 1)
_FEW: Final = 50  # rows that share one change without a look at their size
_CHUNK_BYTES: Final = 7_500  # of rows that share one change otherwise: what fits a page
_LARGE_BYTES: Final = 1_000_000
# What of a session changes how values print and parse; https://www.postgresql.org/docs/current/runtime-config-client.html
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
_BEGAN: Final = "cdc.began"
_DELETING: Final = "cdc.deleting"
_WRITING: Final = "cdc.writing"


class Table(NamedTuple):
    """A table or partition to be given triggers.

    ``key``: the columns whose change an UPDATE must tell; none where updates are told as old rows gone and new ones
    come, as those of partitioned tables are, whose rows may move, and of tables of which only a part is captured.
    ``nesting``: triggers of others, or foreign keys, may change it while a statement of its own runs.
    ``is_partition``: it has the row triggers of its partitioned table.
    ``expressions``: what of a row is captured, over the alias ``n``, None for all; ``condition``: of which rows.
    """

    id: int
    schema: str
    name: str
    key: tuple[str, ...] = ()
    nesting: bool = False
    is_partition: bool = False
    expressions: tuple[str, ...] | None = None
    condition: str = ""

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


def create_schema(schema: str, owner: str, wake: tuple[int, int]) -> str:
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
    """CREATE TABLE {s}.captured (relation int8 PRIMARY KEY, origins int8[] NOT NULL, keyed bool NOT NULL,
    nesting bool NOT NULL, columns text[], masks text[], condition text NOT NULL, triggers text NOT NULL)""",
    "CREATE TABLE {s}.granted (revoke text NOT NULL)",
    "CREATE TABLE {s}.secret (salt bytea NOT NULL)",
    "INSERT INTO {s}.secret SELECT sha256(string_agg(uuid_send(gen_random_uuid()), '')) FROM generate_series(1, 4)",
)


def _functions(schema: str, wake: tuple[int, int]) -> Iterator[str]:
    s = identifier(schema)
    yield _function(schema, "hashed(value text)", "text", _HASHED.format(s=s), language="sql", kind="STABLE STRICT")
    yield _function(schema, "capture()", "trigger", _capture(schema, wake))
    yield _function(schema, "capture_whole()", "trigger", _capture(schema, wake, pairs=True))
    yield _function(schema, "capture_key()", "trigger", _capture_key(schema))
    yield _function(schema, "begin()", "trigger", _BEGIN)
    tick = "tick(snapshot pg_snapshot, timeline int4, shapes jsonb)"
    yield _function(schema, tick, "int8", _TICK.format(s=s))
    yield _function(schema, "forget(upto int8)", "void", _FORGET.format(s=s, schema=literal(schema)))


def drop_schema(schema: str) -> str:
    """The statement that takes all of it away. Triggers depend on its functions, and go along."""
    return f"DROP SCHEMA IF EXISTS {identifier(schema)} CASCADE"


def create_triggers(schema: str, owner: str, wake: tuple[int, int], table: Table) -> str:
    """The triggers of a table, and its function where only a part of it is captured. Several statements, as one."""
    s, name = identifier(schema), qualified(table.schema, table.name)
    function = f"{s}.{'capture' if table.key else 'capture_whole'}()"
    own = ""
    if table.shaped:
        called = f"capture_{table.id}()"
        own = (
            f"SET LOCAL ROLE {identifier(owner)}; DROP FUNCTION IF EXISTS {s}.{called} CASCADE; "
            f"{_function(schema, called, 'trigger', _capture(schema, wake, table), settings=PRINTING)}; RESET ROLE; "
        )
        function = f"{s}.{called}"
    mark = _BEGAN if table.nesting else _DELETING
    began = function.replace("()", f"({literal(mark)})")
    olds = "" if table.key else "OLD TABLE AS old "
    triggers = [
        (
            "begin",
            f"BEFORE {'INSERT OR UPDATE OR DELETE' if table.nesting else 'DELETE'} ON {name}",
            f"{s}.begin({literal(mark)})",
        ),
        ("insert", f"AFTER INSERT ON {name} REFERENCING NEW TABLE AS new", began),
        (
            "update",
            f"AFTER UPDATE ON {name} REFERENCING NEW TABLE AS new {olds}".rstrip(),
            began if table.nesting else function,
        ),
        ("delete", f"AFTER DELETE ON {name} REFERENCING OLD TABLE AS old", began),
        ("truncate", f"AFTER TRUNCATE ON {name}", function),
    ]
    created = [
        f"CREATE OR REPLACE TRIGGER {trigger_name(schema, kind)} {event} FOR EACH STATEMENT EXECUTE FUNCTION {called}"
        for kind, event, called in triggers
    ]
    if table.key:
        old, new = (", ".join(f"{row}.{identifier(column)}" for column in table.key) for row in ("OLD", "NEW"))
        told = literal(mark) if table.nesting else ""
        created.append(
            f"CREATE OR REPLACE TRIGGER {trigger_name(schema, 'a_row')} AFTER UPDATE ON {name} FOR EACH ROW"
            f" WHEN (ROW({old})::record OPERATOR(pg_catalog.*<>) ROW({new})::record)"
            f" EXECUTE FUNCTION {s}.capture_key({told})"
        )
    if table.nesting and not table.is_partition:
        # Only the statement's first row queues an event; it is the first to fire, when all rows are written.
        setting = f"'{_WRITING}' || pg_trigger_depth() + 1"
        created.append(
            f"CREATE OR REPLACE TRIGGER {identifier(f'!{schema}'[:63])} AFTER INSERT OR UPDATE OR DELETE ON {name}"
            f" FOR EACH ROW WHEN (current_setting({setting}, true) = '' AND set_config({setting}, '1', true) = '1')"
            f" EXECUTE FUNCTION {s}.begin({literal(mark)})"
        )
    return own + "; ".join(created)


def trigger_name(schema: str, kind: str) -> str:
    """Quoted. Triggers of one kind fire in the order of their names."""
    return identifier(f"{schema[: 62 - len(kind)]} {kind}")


def grant_reading(schema: str, role: str) -> str:
    """The statements that let ``role`` ship."""
    s, to = identifier(schema), identifier(role)
    called = ", ".join(
        f"{s}.{function}" for function in ("tick(pg_snapshot, int4, jsonb)", "forget(int8)", "hashed(text)")
    )
    tables = ", ".join(f"{s}.{name}" for name in (*map(change_table, SLOTS), "tick", "shape", "captured"))
    return (
        f"GRANT USAGE ON SCHEMA {s} TO {to}; GRANT SELECT ON {tables} TO {to}; "
        f"GRANT EXECUTE ON FUNCTION {called} TO {to}"
    )


def change_table(slot: int) -> str:
    return f"change_{slot}"


def _change_table(schema: str, slot: int) -> str:
    """Never vacuumed: it is emptied before it would need to be. A change of :data:`_CHUNK_BYTES` stands in its page."""
    name = qualified(schema, change_table(slot))
    return (
        f'CREATE TABLE {name} (xid int8, here pg_lsn, began pg_lsn, origin oid, depth int2, op "char", data bytea)'
        " WITH (autovacuum_enabled = off, toast_tuple_target = 8160); "
        f"ALTER TABLE {name} ALTER data SET STORAGE EXTERNAL; "
        f"CREATE INDEX {identifier(index_name(slot))} ON {name} USING brin (xid) WITH (pages_per_range = 16)"
    )


def index_name(slot: int) -> str:
    return f"change_{slot}_xid"


def _function(
    schema: str,
    signature: str,
    returns: str,
    body: str,
    *,
    language: str = "plpgsql",
    kind: str = "VOLATILE",
    settings: Mapping[str, str] = {},
) -> str:
    """What a function of ours is called with is all that its caller decides."""
    name, _, arguments = signature.partition("(")
    called = f"{identifier(schema)}.{name}({arguments}"
    types = ", ".join(part.strip().rpartition(" ")[2] for part in arguments[:-1].split(",")) if arguments != ")" else ""
    pinned = "".join(f"SET {setting} = {literal(value)} " for setting, value in settings.items())
    return (
        f"CREATE FUNCTION {called} RETURNS {returns} LANGUAGE {language} {kind} SECURITY DEFINER "
        f"SET search_path = pg_catalog, pg_temp {pinned}AS {literal(body)}; "
        f"REVOKE ALL ON FUNCTION {identifier(schema)}.{name}({types}) FROM PUBLIC"
    )


def _capture(schema: str, wake: tuple[int, int], table: Table | None = None, *, pairs: bool = False) -> str:
    """A statement trigger, of one table where only a part of it is captured.

    ``pairs``: an UPDATE is told as its old rows gone and its new ones come.
    """
    old, new = _records(table, "old"), _records(table, "new")
    updated = _chunks(schema, "D", old) + _chunks(schema, "I", new)
    if table is None and not pairs:
        updated = _insert(schema, f"SELECT {_head('U')}, r FROM ({new}) s")
    body = f"""
    IF TG_OP = 'UPDATE' THEN{updated}
    ELSIF TG_OP = 'INSERT' THEN{_chunks(schema, "I", new)}
    ELSIF TG_OP = 'DELETE' THEN{_chunks(schema, "D", old)}
    ELSE{_insert(schema, f"VALUES ({_head('T')}, NULL::bytea)")}
    END IF;"""
    if table is not None:
        # Whoever writes must not be stopped by what we do with a part of the row: it is the shipper that stops.
        refused = _insert(schema, f"VALUES ({_head('!')}, convert_to(SQLERRM, 'UTF8'))")
        body = f"""
    BEGIN{body}
    EXCEPTION WHEN OTHERS THEN{refused}
    END;"""
    number, key = wake
    return f"""
#variable_conflict use_column
DECLARE
    here pg_lsn := pg_current_wal_insert_lsn();
    slot int4 := date_part('minute', now())::int4 % {len(SLOTS)};
    began pg_lsn;
BEGIN
    IF TG_NARGS > 0 THEN
        began := nullif(current_setting(TG_ARGV[0] || pg_trigger_depth(), true), '')::pg_lsn;
        IF TG_OP = 'DELETE' AND TG_ARGV[0] = '{_DELETING}' THEN
            PERFORM set_config('{_DELETING}' || pg_trigger_depth(), '', true);
        END IF;
    END IF;{body}
    -- What has sent a notification cannot be prepared: where that may come, the shipper finds the change by itself.
    IF current_setting('max_prepared_transactions') <> '0' THEN
        NULL;
    ELSIF NOT pg_try_advisory_lock_shared({number}, {key}) THEN
        PERFORM pg_notify({literal(schema)}, '');
    ELSIF pg_advisory_unlock_shared({number}, {key}) THEN
        NULL;
    END IF;
    RETURN NULL;
END"""


def _head(op: str) -> str:
    """All of a change but its data. Named by position: a column of the table may be called like one of ours."""
    return f"txid_current(), here, began, TG_RELID, pg_trigger_depth(), '{op}'"


def _records(table: Table | None, rows: str) -> str:
    """A query for the rows of a transition table as records ``r``."""
    if table is None:
        return f"SELECT record_send(n.*) AS r FROM {rows} n"
    row = "n.*" if table.expressions is None else f"ROW({', '.join(table.expressions)})"
    where = f" WHERE {parenthesized(table.condition)}" if table.condition else ""
    return f"SELECT record_send({row}) AS r FROM {rows} n{where}"


def _chunks(schema: str, op: str, records: str) -> str:
    """A few rows as one change; where there are more, or large ones, as many changes as that many bytes make."""
    few = (
        f"SELECT {_head(op)}, string_agg(r, '') FILTER (WHERE length(r) <= {_LARGE_BYTES}) "
        f"FROM ({records} LIMIT {_FEW + 1}) s "
        f"HAVING count(*) BETWEEN 1 AND {_FEW} AND max(length(r)) <= {_LARGE_BYTES}"
    )
    many = (
        f"SELECT {_head(op)}, string_agg(r, '') FROM (SELECT r, sum(length(r)) OVER (ROWS UNBOUNDED PRECEDING)"
        f" / {_CHUNK_BYTES} AS part FROM ({records} OFFSET 0) q) s GROUP BY part ORDER BY part"
    )
    return f"""{_insert(schema, few)}
        IF NOT FOUND THEN{_insert(schema, many)}
        END IF;"""


def _insert(schema: str, query: str) -> str:
    """Into the change table whose turn it is. Static statements: the plans are kept for the session."""
    inserts = [f"INSERT INTO {qualified(schema, change_table(slot))} {query};" for slot in SLOTS]
    return f"""
        IF slot = {SLOTS[0]} THEN {inserts[0]} ELSE {inserts[1]} END IF;"""


def _capture_key(schema: str) -> str:
    """A row trigger that fires where an UPDATE changes the key."""
    return f"""
#variable_conflict use_column
DECLARE
    here pg_lsn := pg_current_wal_insert_lsn();
    slot int4 := date_part('minute', now())::int4 % {len(SLOTS)};
    began pg_lsn;
BEGIN
    IF TG_NARGS > 0 THEN
        began := nullif(current_setting(TG_ARGV[0] || pg_trigger_depth(), true), '')::pg_lsn;
    END IF;{_insert(schema, f"VALUES ({_head('K')}, record_send(OLD) || record_send(NEW))")}
    RETURN NULL;
END"""


# Settings are looked at by nobody else, and end with the transaction or with what of it is rolled back.
_BEGIN: Final = f"""
BEGIN
    IF TG_WHEN = 'BEFORE' THEN
        PERFORM set_config('{_WRITING}' || pg_trigger_depth(), '', true);
    END IF;
    PERFORM set_config(TG_ARGV[0] || pg_trigger_depth(), pg_current_wal_insert_lsn()::text, true);
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

# Emptied is a change table whose turn it is not and of which nothing is needed, as seen by somebody who has it alone.
_FORGET: Final = """
DECLARE
    seen txid_snapshot := (SELECT snapshot::text::txid_snapshot FROM {s}.tick WHERE id = upto);
    slot int4;
    name text;
    needed bool;
BEGIN
    IF seen IS NULL THEN
        RAISE EXCEPTION 'no tick %', upto USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    DELETE FROM {s}.tick WHERE id < upto;
    DELETE FROM {s}.shape o WHERE EXISTS (
        SELECT FROM {s}.shape n WHERE n.origin = o.origin AND n.tick > o.tick AND n.tick <= upto);
    FOREACH slot IN ARRAY ARRAY[0, 1] LOOP
        name := format('%I.%I', {schema}, 'change_' || slot);
        PERFORM brin_summarize_new_values(format('%I.%I', {schema}, 'change_' || slot || '_xid')::regclass);
        CONTINUE WHEN slot = date_part('minute', clock_timestamp())::int4 % 2 OR pg_relation_size(name::regclass) = 0;
        BEGIN
            EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', name);
            EXECUTE format('SELECT EXISTS (SELECT FROM %s WHERE NOT txid_visible_in_snapshot(xid, $1))', name)
                INTO needed USING seen;
            IF NOT needed THEN
                EXECUTE format('TRUNCATE %s', name);
            END IF;
        EXCEPTION WHEN lock_not_available THEN
            NULL;
        END;
    END LOOP;
END"""
