"""What `cdc check --format trigger` finds: all that would stop a trigger log, or that it cannot carry."""

from collections.abc import Iterator
from typing import Final, LiteralString

from cdc.sql.quote import identifier, qualified
from cdc.stores.postgresql import capture
from cdc.stores.postgresql.connect import Connection, fetch
from cdc.stores.postgresql.preflight import Finding, Leader, absent, encoding, generated, version
from cdc.stores.postgresql.setup import Names

_ABSENT_TOO: Final = {"unlogged tables", "temporary tables"}


def check_triggers(connection: Connection, names: Names) -> list[Finding]:
    """Look at a leader as `cdc ship --format trigger` needs it. Changes nothing."""
    schema = capture.schema_of(names.slot)
    findings = [*version(connection), *encoding(connection, written=False)]
    if fetch(connection, "SELECT pg_is_in_recovery() AS yes")[0].yes:
        findings.append(Finding("error", "recovery", "the server is a standby, which has no triggers of its own"))
    is_there = fetch(connection, "SELECT to_regclass(%s) IS NOT NULL AS yes", [qualified(schema, "captured")])[0].yes
    findings += _captured(connection, schema) if is_there else _to_be_captured(connection)
    leader = Leader(connection, names)
    findings += generated(leader)
    findings += (finding for finding in absent(leader) if finding.subject not in _ABSENT_TOO)
    findings.append(
        Finding(
            "warning",
            "replica role",
            "writes under session_replication_role = replica, such as another follower's, are not captured",
            ("-- ship from the database that they come from",),
        )
    )
    return findings


def _to_be_captured(connection: Connection) -> Iterator[Finding]:
    """Would setup go through?"""
    yield Finding("error", "triggers", "nothing is captured yet", ("-- run cdc setup --format trigger",))
    role = fetch(connection, _ROLE)[0]
    me = identifier(role.name)
    if role.may_place:
        yield Finding("ok", "privileges", f"role {role.name!r} may make a schema")
    else:
        remedy = f"GRANT CREATE ON DATABASE {identifier(connection.info.dbname)} TO {me}"
        yield Finding("error", "privileges", f"role {role.name!r} may not make a schema", (remedy,))
    if not role.may_create:
        message = f"role {role.name!r} may not make a role: the functions will be its own, not those of nobody else"
        yield Finding("warning", "privileges", message, (f"ALTER ROLE {me} CREATEROLE",))
    for row in fetch(connection, _NOT_ALLOWED):
        remedy = f"GRANT TRIGGER ON {qualified(row.schema, row.name)} TO {me}"
        yield Finding("error", "privileges", f"no privilege to make triggers on {row.schema}.{row.name}", (remedy,))
    for row in fetch(connection, _INHERITED):
        message = f"{row.schema}.{row.name} has children that inherit from it, and cannot be captured"
        yield Finding("error", "tables", message, ("-- leave it out: cdc setup --tables",))
    for row in fetch(connection, _UNSENDABLE):
        label = f"{row.schema}.{row.name}.{row.column}"
        message = f"{label} is of type {row.type}, which has no binary form"
        yield Finding("error", "types", message, (f"-- cdc setup --mask {label}=drop",))


_ROLE: Final[LiteralString] = """
    SELECT rolname AS name, rolsuper OR rolcreaterole AS may_create,
           has_database_privilege(current_database(), 'CREATE') AS may_place
    FROM pg_roles WHERE rolname = current_user
"""
_TABLES: Final[LiteralString] = """
    SELECT c.oid, c.relkind, s.nspname AS schema, c.relname AS name
    FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND c.oid >= 16384 AND NOT c.relispartition
      AND s.nspname <> 'information_schema' AND s.nspname !~ '^(pg_|cdc_|cdc$)'
"""
_NOT_ALLOWED: Final[LiteralString] = (
    f"SELECT schema, name FROM ({_TABLES}) t WHERE NOT has_table_privilege(oid, 'TRIGGER') ORDER BY 1, 2"
)
_INHERITED: Final[LiteralString] = (
    f"SELECT schema, name FROM ({_TABLES}) t WHERE relkind = 'r'"
    " AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = t.oid) ORDER BY 1, 2"
)
_UNSENDABLE: Final[LiteralString] = (
    f"SELECT t.schema, t.name, a.attname AS column, format_type(y.oid, NULL) AS type FROM ({_TABLES}) t"
    " JOIN pg_attribute a ON a.attrelid = t.oid JOIN pg_type y ON y.oid = a.atttypid"
    " WHERE a.attnum > 0 AND NOT a.attisdropped AND y.typsend = 0 ORDER BY 1, 2, 3"
)
_NOT_CAPTURED: Final[LiteralString] = (
    f"SELECT schema, name FROM ({_TABLES}) t WHERE NOT oid::int8 = ANY (%s::int8[]) ORDER BY 1, 2"
)


def _captured(connection: Connection, schema: str) -> Iterator[Finding]:
    noted = capture.fetch_captured(connection, schema)
    damaged = capture.faults(connection, schema)
    for fault in damaged:
        remedy = "-- run cdc setup --format trigger again, then cdc ship --image new"
        yield Finding("error", "triggers", f"{fault.message}: writes may have been missed since", (remedy,))
    if not damaged:
        yield Finding("ok", "triggers", f"{len(noted)} tables are captured")
    if left := fetch(connection, _NOT_CAPTURED, [[row.relation for row in noted]]):
        message = f"not captured: {', '.join(f'{row.schema}.{row.name}' for row in left)}"
        yield Finding("warning", "triggers", message, ("-- run cdc setup --format trigger, then cdc ship --image new",))
    for row in noted:
        if len(row.origins) > 1:
            message = f"rows that MERGE moves between partitions of {row.schema}.{row.name} are not shown to triggers"
            yield Finding("warning", "partitions", message, ("-- move them by UPDATE, or take the logical log",))
        if row.condition:
            yield Finding("warning", "filters", f"of {row.schema}.{row.name} only rows where {row.condition}")
        if row.columns is not None:
            shown = ", ".join(
                f"{name} ({mask})" if mask else name for name, mask in zip(row.columns, row.masks, strict=True)
            )
            yield Finding("warning", "filters", f"of {row.schema}.{row.name} only {shown}")
    yield from _may_ship(connection, schema)


_MAY: Final[LiteralString] = """
    SELECT current_user::text AS role, has_table_privilege(%(table)s, 'SELECT') AS reads,
           has_function_privilege(%(function)s, 'EXECUTE') AS ticks
"""


def _may_ship(connection: Connection, schema: str) -> Iterator[Finding]:
    tick = f"{identifier(schema)}.tick(pg_snapshot, int4, jsonb)"
    row = fetch(connection, _MAY, {"table": qualified(schema, "change_0"), "function": tick})[0]
    if row.reads and row.ticks:
        yield Finding("ok", "privileges", f"role {row.role!r} may ship")
    else:
        remedy = f"-- run cdc setup --format trigger --reader {row.role}, as somebody who may"
        yield Finding("error", "privileges", f"role {row.role!r} may not ship", (remedy,))
