"""What `cdc check` finds: all that would stop the stream, or that it cannot carry, with the statements that mend it.

A remedy is SQL, ready to be run as it stands by somebody who may. What has to be done besides, or instead where no SQL
can help, is a comment among the statements.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, LiteralString, NamedTuple

from cdc.errors import CdcError, ConfigurationError
from cdc.record import Column, Relation
from cdc.sql.quote import identifier, literal, qualified
from cdc.stores.postgresql.connect import Connection, fetch
from cdc.stores.postgresql.describe import describe_tables
from cdc.stores.postgresql.polling import Polled, must_be_callable, unreadable
from cdc.stores.postgresql.setup import (
    TABLES,
    Names,
    create_publication,
    create_slot,
    drop_slot,
    give_identity,
    published_oids,
)
from cdc.wire.oids import type_sql

MIB: Final = 1 << 20
OLD_TRANSACTION_S: Final = 300
_NAMED_MAX: Final = 20


class Finding(NamedTuple):
    """One thing looked at. An ``error`` would stop the stream or the leader; a ``warning`` is for a person to judge.

    ``statements`` mend it, in this order; each is one SQL statement without a semicolon, or a comment (``-- …``).
    """

    level: Literal["error", "warning", "ok"]
    subject: str
    message: str
    statements: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """The statements as a script, empty where nothing mends it."""
        return "\n".join(text if text.startswith("--") else f"{text};" for text in self.statements)


def check_leader(connection: Connection, names: Names, *, polling: bool = False) -> list[Finding]:
    """Look at a leader as `cdc ship --format logical` needs it; ``polling``: with `--polling`. Changes nothing."""
    leader = Leader(connection, names, polling=polling)
    return [finding for check in _LEADER for finding in check(leader)]


def check_follower(connection: Connection, relations: Sequence[Relation] | None) -> list[Finding]:
    """Look at a follower as `cdc apply` needs it: its tables where ``relations`` says which, else the database.

    Changes nothing.
    """
    return [
        *version(connection),
        *_writable(connection),
        *encoding(connection, written=True),
        *_replica_role(connection),
        *_place(connection, relations),
        *_firing(connection, relations),
        *(finding for relation in relations or () for finding in _table(connection, relation)),
    ]


def _ok(subject: str, message: str) -> Finding:
    return Finding("ok", subject, message)


def _warning(subject: str, message: str, *statements: str) -> Finding:
    return Finding("warning", subject, message, statements)


def _error(subject: str, message: str, *statements: str) -> Finding:
    return Finding("error", subject, message, statements)


class Leader:
    """A leader being checked: what several checks ask for, asked once."""

    def __init__(self, connection: Connection, names: Names, *, polling: bool = False) -> None:
        self.connection = connection
        self.polling = polling
        self.names = names
        self.version = connection.info.server_version
        settings = fetch(connection, "SELECT name, setting FROM pg_settings WHERE name = ANY (%s)", [list(_ASKED)])
        self.settings: Mapping[str, str] = {row.name: row.setting for row in settings}
        self.role = fetch(connection, _ROLE)[0]
        self.slot = next(iter(fetch(connection, _SLOT, [names.slot])), None)
        self.publication = next(iter(fetch(connection, _PUBLICATION, [names.publication])), None)
        self.tables = fetch(connection, TABLES)
        self.published = published_oids(connection, names.publication) if self.publication else []
        below = {row.id for row in fetch(connection, _BELOW, [self.published])}
        # Where nothing is published yet everything is what setup would publish.
        self.captured = [row for row in self.tables if not self.publication or row.id in below]


_ASKED: Final = (
    "wal_level",
    "max_wal_senders",
    "max_replication_slots",
    "max_slot_wal_keep_size",
    "idle_replication_slot_timeout",
    "wal_sender_timeout",
    "logical_decoding_work_mem",
)
_ROLE: Final[LiteralString] = """
    SELECT rolname AS name, current_setting('is_superuser') = 'on' AS superuser, rolreplication AS replication,
           rolbypassrls AS bypasses, pg_has_role('pg_read_all_stats', 'USAGE') AS sees
    FROM pg_roles WHERE rolname = current_user
"""
_SLOT: Final[LiteralString] = "SELECT * FROM pg_replication_slots WHERE slot_name = %s"
# Another row version of the publication than the slot's catalog snapshot can see: made or altered since.
_PUBLICATION: Final[LiteralString] = """
    SELECT p.*, to_jsonb(p) ->> 'pubgencols' AS generated, age(p.xmin) AS age FROM pg_publication p WHERE pubname = %s
"""
_BELOW: Final[LiteralString] = """
    SELECT DISTINCT coalesce(t.relid::oid, r.id)::int8 AS id
    FROM unnest(%s::oid[]) r(id) LEFT JOIN LATERAL pg_partition_tree(r.id) t ON true
"""


def _labels(rows: Iterable[Any]) -> str:
    """The tables' names for people, the first of them where there are many."""
    names = [f"{row.schema}.{row.name}" for row in rows]
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return ", ".join(names[:_NAMED_MAX]) + more


def _each(rows: Iterable[Any], statement: Callable[[Any], str]) -> tuple[str, ...]:
    return tuple(statement(row) for row in rows)


def _note(text: str) -> str:
    """A comment. A line break in a name must not end it."""
    return f"-- {' '.join(text.split())}"


def _set(name: str, value: str, *, restart: bool) -> tuple[str, ...]:
    after = _note("then restart the server") if restart else "SELECT pg_reload_conf()"
    return f"ALTER SYSTEM SET {name} = {literal(value)}", after


# The server.


def version(connection: Connection) -> Iterator[Finding]:
    major = connection.info.server_version // 10000
    if major < 15:
        yield _error("version", f"postgresql {major} is not supported", "-- upgrade to 15 or later")
    elif major > 18:
        yield _warning("version", f"postgresql {major} is newer than what this was tested with (15 to 18)")
    else:
        yield _ok("version", f"postgresql {major}")


def encoding(connection: Connection, *, written: bool) -> Iterator[Finding]:
    """What is read converts to UTF8 from every encoding but none at all; what is written has to fit."""
    name = fetch(connection, "SELECT getdatabaseencoding()::text AS name")[0].name
    if name == "UTF8" or (name != "SQL_ASCII" and not written):
        yield _ok("encoding", name)
        return
    why = "not every character fits" if written else "its bytes need not be text of any encoding"
    create = f"CREATE DATABASE {identifier(connection.info.dbname + '_utf8')}"
    yield _error(
        "encoding",
        f"the database is in {name}, not UTF8: {why}",
        f"{create} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C'",
        "-- then move the data there; choose the locale you want",
    )


def _leader_server(leader: Leader) -> Iterator[Finding]:
    yield from version(leader.connection)
    yield from encoding(leader.connection, written=False)
    if fetch(leader.connection, "SELECT pg_is_in_recovery() AS yes")[0].yes:
        yield _warning("recovery", "the server is a standby: setup has to be run on its primary")
    level = leader.settings["wal_level"]
    if level == "logical":
        yield _ok("wal_level", "logical")
    else:
        yield _error("wal_level", f"wal_level is {level}", *_set("wal_level", "logical", restart=True))


def _leader_room(leader: Leader) -> Iterator[Finding]:
    in_use = fetch(leader.connection, _IN_USE)[0]
    senders = int(leader.settings["max_wal_senders"])
    # One reads the stream, one makes the snapshot.
    needed = 0 if leader.polling else 2 if leader.slot is None else 1
    yield _room("max_wal_senders", senders, in_use.senders, needed=needed)
    slots = int(leader.settings["max_replication_slots"])
    yield _room("max_replication_slots", slots, in_use.slots, needed=1 if leader.slot is None else 0)


_IN_USE: Final[LiteralString] = """
    SELECT (SELECT count(*) FROM pg_stat_get_wal_senders())::int4 AS senders,
           (SELECT count(*) FROM pg_replication_slots)::int4 AS slots
"""


def _room(name: str, limit: int, used: int, *, needed: int) -> Finding:
    if limit - used >= needed:
        return _ok(name, f"{used} of {limit} in use")
    return _error(name, f"{used} of {limit} in use", *_set(name, str(used + needed + 4), restart=True))


def _leader_limits(leader: Leader) -> Iterator[Finding]:
    keep = int(leader.settings["max_slot_wal_keep_size"])
    if keep == -1:
        yield _warning(
            "max_slot_wal_keep_size",
            "there is no limit: a shipper that stays away lets WAL fill the leader's disk",
            *_set("max_slot_wal_keep_size", "50GB", restart=False),
        )
    else:
        yield _ok("max_slot_wal_keep_size", f"{keep} MB")
    if (idle := leader.settings.get("idle_replication_slot_timeout", "0")) != "0":
        yield _warning(
            "idle_replication_slot_timeout",
            f"a shipper that stays away for {idle} s loses its slot",
            *_set("idle_replication_slot_timeout", "0", restart=False),
        )
    timeout_ms = int(leader.settings["wal_sender_timeout"])
    if timeout_ms == 0 or timeout_ms < 5000:
        why = "a dead peer keeps its slot busy" if timeout_ms == 0 else "a busy shipper would be cut off"
        remedy = _set("wal_sender_timeout", "60s", restart=False)
        yield _warning("wal_sender_timeout", f"it is {timeout_ms} ms: {why}", *remedy)
    else:
        yield _ok("wal_sender_timeout", f"{timeout_ms} ms")
    memory_kb = int(leader.settings["logical_decoding_work_mem"])
    if memory_kb < 4096:
        yield _warning(
            "logical_decoding_work_mem",
            f"{memory_kb} kB: the leader spills small transactions to disk",
            *_set("logical_decoding_work_mem", "64MB", restart=False),
        )
    else:
        yield _ok("logical_decoding_work_mem", f"{memory_kb} kB")


def _leader_transactions(leader: Leader) -> Iterator[Finding]:
    """Transactions that hold WAL back, and that the making of a slot waits for."""
    old = fetch(leader.connection, _OLD_TRANSACTIONS, [OLD_TRANSACTION_S])
    if not leader.role.sees:
        yield _warning(
            "open transactions",
            f"role {leader.role.name!r} may not see other roles' transactions",
            f"GRANT pg_read_all_stats TO {identifier(leader.role.name)}",
        )
    elif not old:
        yield _ok("open transactions", f"none has written and stayed open for {OLD_TRANSACTION_S} s")
    for row in old:
        what = f"session {row.pid}" if row.pid else f"prepared transaction {row.gid!r} of database {row.database!r}"
        yield _warning(
            "open transactions",
            f"{what} has been open for {row.age_s} s: it holds back WAL, and a new slot waits for it",
            f"SELECT pg_terminate_backend({row.pid})" if row.pid else f"ROLLBACK PREPARED {literal(row.gid)}",
        )


_OLD_TRANSACTIONS: Final[LiteralString] = """
    SELECT * FROM (
        SELECT pid, NULL AS gid, datname AS database, extract(epoch FROM now() - xact_start)::int8 AS age_s
        FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
        UNION ALL
        SELECT NULL, gid, database, extract(epoch FROM now() - prepared)::int8 FROM pg_prepared_xacts
    ) t WHERE age_s >= %s ORDER BY age_s DESC
"""


# The slot and the publication.


def _leader_publication(leader: Leader) -> Iterator[Finding]:
    name, publication = leader.names.publication, leader.publication
    if publication is None:
        everything = "FOR ALL TABLES"
        if not leader.role.superuser:
            owned = [row for row in leader.tables if row.owned and not row.is_partition]
            everything = f"FOR TABLE {', '.join(map(_name, owned))}" if owned else ""
        create = create_publication(name, everything, leader.version)
        yield _error("publication", f"there is no publication {name!r}", create)
        return
    alter = f"ALTER PUBLICATION {identifier(name)}"
    if not (publication.pubinsert and publication.pubupdate and publication.pubdelete and publication.pubtruncate):
        every = f"{alter} SET (publish = 'insert, update, delete, truncate')"
        yield _error("publication", f"{name!r} does not publish every kind of change", every)
    below = {row.id for row in leader.captured}
    whole = [row for row in leader.tables if not row.is_partition and not _is_ours(row)]
    if missed := [row for row in whole if row.id not in below]:
        remedy = _each(missed, lambda row: f"{alter} ADD TABLE {_name(row)}")
        yield _warning("publication", f"{name!r} leaves out {_labels(missed)}", *remedy)
    if own := [row for row in leader.captured if _is_ours(row)]:
        remedy = ("-- publish the other tables by name: cdc teardown, then cdc setup --tables",)
        if not publication.puballtables:
            remedy = _each(own, lambda row: f"{alter} DROP TABLE {_name(row)}")
        yield _warning("publication", f"{name!r} publishes a follower's own state: {_labels(own)}", *remedy)
    if not leader.published:
        yield _warning("publication", f"{name!r} holds no table yet")
    roots = [row for row in leader.captured if row.is_partition]
    if roots and not publication.pubviaroot:
        yield _warning(
            "partitions",
            f"{name!r} tells of each partition for itself: followers get a table for each of {_labels(roots)}",
            f"{alter} SET (publish_via_partition_root = true)",
        )
    yield _ok("publication", f"{name!r} covers {len(leader.published)} tables")
    yield from _narrowed(leader, alter)


def _is_ours(row: Any) -> bool:
    """A follower's own state, where the leader is somebody's follower."""
    return row.schema == "cdc" and row.name in {"checkpoint", "relation"}


def _narrowed(leader: Leader, alter: str) -> Iterator[Finding]:
    for row in fetch(leader.connection, _NARROWED, [leader.names.publication]):
        table = qualified(row.schema, row.name)
        what = " and ".join(
            filter(None, (row.condition and f"rows where {row.condition}", row.columns and "some columns"))
        )
        yield _warning(
            "filters",
            f"only {what} of {row.schema}.{row.name} are published",
            f"{alter} DROP TABLE {table}",
            f"{alter} ADD TABLE {table}",
        )


_NARROWED: Final[LiteralString] = """
    SELECT s.nspname AS schema, c.relname AS name, pg_get_expr(r.prqual, r.prrelid) AS condition,
           r.prattrs IS NOT NULL AS columns
    FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
    JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE p.pubname = %s AND (r.prqual IS NOT NULL OR r.prattrs IS NOT NULL)
    ORDER BY s.nspname, c.relname
"""


def _leader_slot(leader: Leader) -> Iterator[Finding]:
    name, slot = leader.names.slot, leader.slot
    if slot is None:
        remedy = create_slot(name, leader.version)
        message = f"there is no replication slot {name!r}"
        yield _error("slot", message, remedy, "-- not before the publication: cdc setup does both")
        return
    again = drop_slot(name), create_slot(name, leader.version), "-- then cdc ship --image new"
    if (slot.slot_type, slot.plugin, slot.database) != ("logical", "pgoutput", leader.connection.info.dbname):
        what = f"{slot.slot_type}, plugin {slot.plugin!r}, database {slot.database!r}"
        yield _error("slot", f"{name!r} is another's ({what})", "-- name another with --slot")
        return
    reason = getattr(slot, "invalidation_reason", None)
    if slot.wal_status == "lost" or reason:
        why = f" ({reason})" if reason else ""
        yield _error("slot", f"{name!r} is invalidated{why}: the WAL it needed is gone", *again)
        return
    if leader.publication is None:
        message = f"{name!r} is older than the publication, which does not exist yet"
        yield _error("slot", message, drop_slot(name), "-- then run cdc setup")
    elif fetch(leader.connection, _PUBLISHED_LATER, [leader.names.publication, name])[0].yes:
        message = f"the publication was made or altered after the place where {name!r} stands"
        yield _warning("slot", f"{message}: if made, the stream stops in between", *again)
    use = f", in use by process {slot.active_pid}" if slot.active_pid else ""
    yield _ok("slot", f"{name!r} stands at {slot.confirmed_flush_lsn}{use}")
    yield from _slot_space(leader, slot)


_PUBLISHED_LATER: Final[LiteralString] = """
    -- A slot made beside an older one begins with that one's horizon, which then says nothing of this one's age.
    SELECT age(p.xmin) < age(s.catalog_xmin) AND age(p.xmin) >= 0 AND NOT EXISTS (
               SELECT FROM pg_replication_slots o
               WHERE o.slot_name <> s.slot_name AND age(o.catalog_xmin) >= age(s.catalog_xmin)
           ) AS yes
    FROM pg_publication p, pg_replication_slots s WHERE p.pubname = %s AND s.slot_name = %s
"""


def _slot_space(leader: Leader, slot: Any) -> Iterator[Finding]:
    keep = int(leader.settings["max_slot_wal_keep_size"]) * MIB
    if slot.safe_wal_size is None or keep <= 0:
        return
    left = max(slot.safe_wal_size, 0)
    message = f"{left // MIB} MiB of WAL may still be written before the leader drops what {slot.slot_name!r} needs"
    if left * 2 >= keep:
        yield _ok("safe_wal_size", message)
        return
    remedy = _set("max_slot_wal_keep_size", f"{keep * 4 // MIB}MB", restart=False)
    level = _error if left * 5 < keep else _warning
    yield level("safe_wal_size", message, *remedy, "-- and start the shipper")


# The tables.


def _leader_identity(leader: Leader) -> Iterator[Finding]:
    bare = [row for row in leader.captured if not row.identified]
    if bare:
        remedy = _each(bare, lambda row: give_identity(row.schema, row.name, row.candidate))
        when = "fail" if leader.publication else "will fail once it is published (cdc setup mends that first)"
        message = f"no replica identity: the leader's own UPDATE and DELETE {when} on {_labels(bare)}"
        level = _error if leader.publication else _warning
        yield level("replica identity", message, *remedy)
    else:
        yield _ok("replica identity", f"all of {len(leader.captured)} tables have one")
    if full := [row for row in leader.captured if row.identity == "f"]:
        message = f"rows are found by all their columns, which is slow, and logged whole: {_labels(full)}"
        remedy = _each(
            (row for row in full if row.candidate),
            lambda row: give_identity(row.schema, row.name, row.candidate),
        )
        yield _warning("replica identity", message, *(remedy or ["-- give the tables a primary key"]))


def generated(leader: Leader) -> Iterator[Finding]:
    ids = [row.id for row in leader.captured]
    rows = fetch(leader.connection, _GENERATED, [ids])
    stored = [row for row in rows if row.kind == "s"]
    told = leader.publication is not None and leader.publication.generated == "s"
    if stored and not told:
        can = leader.version >= 180000
        remedy = "-- from version 18 on a publication can carry them; until then give the follower the same expression"
        if can and leader.publication:
            name = identifier(leader.names.publication)
            remedy = f"ALTER PUBLICATION {name} SET (publish_generated_columns = stored)"
        if not (can and leader.publication is None):
            yield _warning("generated columns", f"not carried: {_columns(stored)}", remedy)
    if virtual := [row for row in rows if row.kind == "v"]:
        remedy = "-- give the follower the same expression: a virtual column is never in the log"
        yield _warning("generated columns", f"virtual, not carried: {_columns(virtual)}", remedy)


_GENERATED: Final[LiteralString] = """
    SELECT s.nspname AS schema, c.relname AS name, a.attname AS column, a.attgenerated AS kind
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE a.attrelid = ANY (%s::oid[]) AND a.attgenerated <> '' AND NOT a.attisdropped
    ORDER BY s.nspname, c.relname, a.attnum
"""


def _columns(rows: Sequence[Any]) -> str:
    names = [f"{row.schema}.{row.name}.{row.column}" for row in rows]
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return ", ".join(names[:_NAMED_MAX]) + more


def _leader_types(leader: Leader) -> Iterator[Finding]:
    rows = fetch(leader.connection, _OPAQUE, [[row.id for row in leader.captured]])
    if rows:
        kinds = ", ".join(sorted({row.type for row in rows}))
        message = f"types whose binary form is unknown outside of postgresql ({kinds}): {_columns(rows)}"
        yield _warning("types", message, "-- for other followers than postgresql: cdc ship --values text")


_OPAQUE: Final[LiteralString] = """
    WITH RECURSIVE reached AS (
        SELECT a.attrelid, a.attnum, a.atttypid AS type FROM pg_attribute a
        WHERE a.attrelid = ANY (%s::oid[]) AND a.attnum > 0 AND NOT a.attisdropped AND a.atttypid >= 16384
        UNION
        SELECT r.attrelid, r.attnum, part.oid FROM reached r JOIN pg_type t ON t.oid = r.type
        CROSS JOIN LATERAL (
            SELECT t.typelem UNION ALL SELECT t.typbasetype
            UNION ALL SELECT g.rngsubtype FROM pg_range g WHERE t.oid IN (g.rngtypid, g.rngmultitypid)
            UNION ALL SELECT a.atttypid FROM pg_attribute a
                      WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
        ) part(oid) WHERE part.oid >= 16384
    )
    SELECT s.nspname AS schema, c.relname AS name, a.attname AS column, format_type(t.oid, NULL) AS type
    FROM reached r JOIN pg_type t ON t.oid = r.type
    JOIN pg_attribute a ON a.attrelid = r.attrelid AND a.attnum = r.attnum
    JOIN pg_class c ON c.oid = r.attrelid JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE t.typtype = 'b' AND t.typelem = 0
    ORDER BY s.nspname, c.relname, a.attnum
"""


def absent(leader: Leader) -> Iterator[Finding]:
    """What the logical log never carries."""
    objects = fetch(leader.connection, _ABSENT)
    for subject, message, statement in _NEVER_CARRIED:
        if found := [row for row in objects if row.kind == subject]:
            remedy = _each(found, statement) if statement else ()
            yield _warning(subject, f"{message}: {_labels(found)}", *remedy)
    large = fetch(leader.connection, "SELECT count(*)::int8 AS count FROM pg_largeobject_metadata")[0].count
    if large:
        message = f"not carried: {large} large objects"
        yield _warning("large objects", message, "-- keep the contents in a bytea column instead")


def _name(row: Any) -> str:
    return qualified(row.schema, row.name)


def _sequence(row: Any) -> str:
    if row.last is None:
        return f"GRANT SELECT ON SEQUENCE {_name(row)} TO {identifier(row.role)}"
    return f"SELECT setval({literal(_name(row))}, {row.last}, {str(row.called).lower()})"


# The remedies of sequences and materialized views are for the follower, where they are wanted.
_NEVER_CARRIED: Final[Sequence[tuple[str, str, Callable[[Any], str] | None]]] = (
    ("unlogged tables", "not carried", lambda row: f"ALTER TABLE {_name(row)} SET LOGGED"),
    ("temporary tables", "not carried", None),
    (
        "foreign tables",
        "not carried, a change through one happens on its own server",
        lambda row: _note(f"copy {row.schema}.{row.name} by other means"),
    ),
    (
        "materialized views",
        "not carried; a follower that has one refreshes it",
        lambda row: f"REFRESH MATERIALIZED VIEW {_name(row)}",
    ),
    (
        "sequences",
        "values are not carried; before a follower takes over, run there",
        _sequence,
    ),
)

_ABSENT: Final[LiteralString] = """
    SELECT s.nspname AS schema, c.relname AS name, NULL::int8 AS last, NULL::bool AS called, NULL AS role,
           CASE WHEN c.relpersistence = 'u' THEN 'unlogged tables' WHEN c.relpersistence = 't' THEN 'temporary tables'
                WHEN c.relkind = 'f' THEN 'foreign tables' ELSE 'materialized views' END AS kind
    FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE (c.relkind IN ('f', 'm') OR c.relkind IN ('r', 'p') AND c.relpersistence <> 'p') AND c.oid >= 16384
      AND s.nspname <> 'information_schema' AND (s.nspname !~ '^pg_' OR c.relpersistence = 't')
    UNION ALL
    SELECT q.schemaname, q.sequencename,
           CASE WHEN has_sequence_privilege(c.oid, 'SELECT') THEN coalesce(q.last_value, q.start_value) END,
           q.last_value IS NOT NULL, current_user, 'sequences'
    FROM pg_sequences q JOIN pg_namespace s ON s.nspname = q.schemaname
    JOIN pg_class c ON c.relnamespace = s.oid AND c.relname = q.sequencename
    ORDER BY kind, schema, name
"""


def _leader_privileges(leader: Leader) -> Iterator[Finding]:
    role, name = leader.role, identifier(leader.role.name)
    if leader.polling:
        yield from _polling(leader)
        return
    if role.superuser:
        yield _ok("privileges", f"role {role.name!r} is a superuser")
        return
    if not role.replication:
        yield _error("privileges", f"role {role.name!r} may not stream", f"ALTER ROLE {name} REPLICATION")
    whole = leader.published or [row.id for row in leader.captured if not row.is_partition]
    rows = fetch(leader.connection, _READABLE, [whole])
    if hidden := sorted({row.schema for row in rows if not row.usage}):
        remedy = _each(hidden, lambda schema: f"GRANT USAGE ON SCHEMA {identifier(schema)} TO {name}")
        yield _error("privileges", f"the image needs to see into schema {', '.join(hidden)}", *remedy)
    if unreadable := [row for row in rows if not row.readable]:
        remedy = _each(unreadable, lambda row: f"GRANT SELECT ON {_name(row)} TO {name}")
        yield _error("privileges", f"the image needs to read {_labels(unreadable)}", *remedy)
    yield from _secured(leader, rows)
    if role.replication and rows and not hidden and not unreadable:
        yield _ok("privileges", f"role {role.name!r} may stream, and read {len(rows)} tables")


def _secured(leader: Leader, tables: Sequence[Any]) -> Iterator[Finding]:
    if (secured := [row for row in tables if row.secured]) and not leader.role.bypasses:
        message = f"row level security would hide rows from the image: {_labels(secured)}"
        yield _error("privileges", message, f"ALTER ROLE {identifier(leader.role.name)} BYPASSRLS")


_READABLE: Final[LiteralString] = """
    SELECT s.nspname AS schema, c.relname AS name, has_schema_privilege(s.oid, 'USAGE') AS usage,
           has_table_privilege(c.oid, 'SELECT') AS readable,
           c.relrowsecurity AND (c.relforcerowsecurity OR NOT pg_has_role(c.relowner, 'USAGE')) AS secured
    FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE c.oid = ANY (%s::oid[]) ORDER BY s.nspname, c.relname
"""


def _polling(leader: Leader) -> Iterator[Finding]:
    """Of a superuser it is the readers' privileges that count: whoever polls has no others."""
    role, polled = leader.role, Polled.of(leader.names.slot)
    readers = polled.readers if role.superuser else role.name
    try:
        must_be_callable(leader.connection, leader.names.slot)
    except CdcError as error:
        grant = () if role.superuser else (f"GRANT {identifier(polled.readers)} TO {identifier(role.name)}",)
        missing = isinstance(error, ConfigurationError)
        yield _error("polling", str(error), *((_note(error.remedy),) if missing else grant))
        return
    yield _ok("polling", f"functions {polled.schema}.peek and {polled.schema}.acknowledge may be called")
    if role.replication and not role.superuser:
        message = f"role {role.name!r} has REPLICATION, which polling is meant to do without"
        yield _warning("polling", message, f"ALTER ROLE {identifier(role.name)} NOREPLICATION")
    whole = leader.published or [row.id for row in leader.captured if not row.is_partition]
    hidden = unreadable(leader.connection, whole, readers)
    granted = identifier(polled.readers)
    for schema in sorted({row.schema for row in hidden if not row.usage}):
        use = f"GRANT USAGE ON SCHEMA {identifier(schema)} TO {granted}"
        yield _error("polling", f"the image needs to see into schema {schema}", use)
    if tables := [row for row in hidden if not row.readable]:
        remedy = _each(tables, lambda row: f"GRANT SELECT ON {_name(row)} TO {granted}")
        yield _error("polling", f"the image needs to read {_labels(tables)}", *remedy)
    if not role.superuser:
        yield from _secured(leader, fetch(leader.connection, _READABLE, [whole]))
    if not hidden:
        yield _ok("polling", f"{len(whole)} tables can be read for the image")


_LEADER: Final[Sequence[Callable[[Leader], Iterator[Finding]]]] = (
    _leader_server,
    _leader_room,
    _leader_limits,
    _leader_privileges,
    _leader_publication,
    _leader_slot,
    _leader_transactions,
    _leader_identity,
    generated,
    _leader_types,
    absent,
)


# The follower.


def _writable(connection: Connection) -> Iterator[Finding]:
    if fetch(connection, "SELECT pg_is_in_recovery() AS yes")[0].yes:
        yield _error("recovery", "the server is a standby and takes no writes", "-- use its primary instead")
    else:
        yield _ok("recovery", "the server takes writes")


def _replica_role(connection: Connection) -> Iterator[Finding]:
    row = fetch(
        connection,
        "SELECT current_user AS role,"
        " has_parameter_privilege(current_user, 'session_replication_role', 'SET') AS allowed",
    )[0]
    if row.allowed:
        yield _ok("session_replication_role", f"role {row.role!r} may set it")
        return
    yield _error(
        "session_replication_role",
        f"role {row.role!r} may not set it: the follower's triggers and foreign keys would fire",
        f"GRANT SET ON PARAMETER session_replication_role TO {identifier(row.role)}",
    )


def _place(connection: Connection, relations: Sequence[Relation] | None) -> Iterator[Finding]:
    """May we make what is not there: our own schema and the leader's?"""
    needed = sorted({"cdc", *(relation.schema for relation in relations or ())})
    row = fetch(connection, _PLACE, [needed])[0]
    if not row.absent or row.may_create:
        yield _ok("schemas", f"role {row.role!r} has or may make {', '.join(needed)}")
        return
    remedy = f"GRANT CREATE ON DATABASE {identifier(connection.info.dbname)} TO {identifier(row.role)}"
    yield _error("schemas", f"role {row.role!r} may not make schema {', '.join(row.absent)}", remedy)


_PLACE: Final[LiteralString] = """
    SELECT current_user AS role, has_database_privilege(current_database(), 'CREATE') AS may_create,
           ARRAY(SELECT n FROM unnest(%s::text[]) n WHERE n NOT IN (SELECT nspname FROM pg_namespace)) AS absent
"""


def _firing(connection: Connection, relations: Sequence[Relation] | None) -> Iterator[Finding]:
    """Triggers and rules that fire even for an applier. Their code is the table owner's, but runs with our rights."""
    superuser = fetch(connection, "SELECT current_setting('is_superuser') = 'on' AS yes")[0].yes
    followed = None if relations is None else {(relation.schema, relation.name) for relation in relations}
    for row in fetch(connection, _FIRING):
        if followed is None or (row.schema, row.name) in followed:
            why = "and would run with a superuser's rights" if superuser else "for every row that is applied"
            level = _error if superuser else _warning
            yield level(
                "triggers",
                f"{row.kind} {row.trigger!r} on {row.schema}.{row.name} fires in a follower too, {why}",
                f"ALTER TABLE {_name(row)} ENABLE {row.kind.upper()} {identifier(row.trigger)}",
            )


_FIRING: Final[LiteralString] = """
    SELECT s.nspname AS schema, c.relname AS name, f.kind, f.trigger
    FROM (SELECT tgrelid, 'trigger', tgname FROM pg_trigger WHERE tgenabled IN ('A', 'R') AND NOT tgisinternal
          UNION ALL
          SELECT ev_class, 'rule', rulename FROM pg_rewrite WHERE ev_enabled IN ('A', 'R')) f(relid, kind, trigger)
    JOIN pg_class c ON c.oid = f.relid JOIN pg_namespace s ON s.oid = c.relnamespace
    ORDER BY s.nspname, c.relname, f.trigger
"""


def _table(connection: Connection, relation: Relation) -> Iterator[Finding]:
    found = fetch(connection, _FOLLOWED, [relation.schema, relation.name])
    role = fetch(connection, "SELECT current_user AS name")[0].name
    if not found:
        yield from _creatable(connection, relation, role)
        return
    table = found[0]
    yield from _granted(relation, table, identifier(role))
    yield from _types(connection, relation, table.id)
    there = {row.name: row for row in fetch(connection, _FOLLOWED_COLUMNS, [table.id])}
    captured = {column.name for column in relation.columns}
    name = qualified(relation.schema, relation.name)
    if absent := [column for column in relation.columns if column.name not in there]:
        message = f"{relation.label} lacks {', '.join(column.name for column in absent)}"
        yield _error("columns", message, *(_add(relation, column) for column in absent))
    for row in there.values():
        mine = identifier(row.name)
        if row.name in captured and row.generated:
            message = f"{relation.label}.{row.name} is generated here and cannot be written"
            yield _error("columns", message, f"ALTER TABLE {name} ALTER COLUMN {mine} DROP EXPRESSION")
        if row.name not in captured and row.demands:
            message = f"{relation.label}.{row.name} is NOT NULL without a default, and the leader has no such column"
            yield _error("columns", message, f"ALTER TABLE {name} ALTER COLUMN {mine} DROP NOT NULL")


def _types(connection: Connection, relation: Relation, here_id: int) -> Iterator[Finding]:
    table = qualified(relation.schema, relation.name)
    for here in describe_tables(connection, [here_id]):
        types = {column.name: _type(here, column) for column in here.columns}
        for column in relation.columns:
            mine, leads = types.get(column.name), _type(relation, column)
            if mine not in {None, leads}:
                message = f"{relation.label}.{column.name} is {mine} here and {leads} on the leader"
                remedy = f"ALTER TABLE {table} ALTER COLUMN {identifier(column.name)} TYPE {leads}"
                yield _warning("columns", message, remedy)


def _add(relation: Relation, column: Column) -> str:
    table = qualified(relation.schema, relation.name)
    return f"ALTER TABLE {table} ADD COLUMN {identifier(column.name)} {_type(relation, column)}"


def _type(relation: Relation, column: Column) -> str:
    return type_sql(column.type_oid, column.modifier, {kind.oid: kind for kind in relation.types})


def _creatable(connection: Connection, relation: Relation, role: str) -> Iterator[Finding]:
    rows = fetch(
        connection,
        "SELECT has_schema_privilege(oid, 'CREATE') AS yes FROM pg_namespace WHERE nspname = %s",
        [relation.schema],
    )
    if rows and not rows[0].yes:
        remedy = f"GRANT USAGE, CREATE ON SCHEMA {identifier(relation.schema)} TO {identifier(role)}"
        yield _error("tables", f"{relation.label} does not exist and role {role!r} may not make it", remedy)
    else:
        yield _ok("tables", f"{relation.label} will be made")


def _granted(relation: Relation, table: Any, role: str) -> Iterator[Finding]:
    if not table.usage:
        remedy = f"GRANT USAGE ON SCHEMA {identifier(relation.schema)} TO {role}"
        yield _error("privileges", f"schema {relation.schema} is closed to us", remedy)
    if table.missing:
        remedy = f"GRANT {', '.join(table.missing)} ON {qualified(relation.schema, relation.name)} TO {role}"
        yield _error("privileges", f"{relation.label} lacks {', '.join(table.missing)}", remedy)
    if table.secured:
        message = f"row level security on {relation.label} would refuse us"
        yield _error("privileges", message, f"ALTER ROLE {role} BYPASSRLS")
    if not (table.missing or table.secured) and table.usage:
        yield _ok("tables", f"{relation.label} can be written")


_FOLLOWED: Final[LiteralString] = """
    SELECT c.oid::int8 AS id, has_schema_privilege(s.oid, 'USAGE') AS usage,
           ARRAY(SELECT p FROM unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE}'::text[]) p
                 WHERE NOT has_table_privilege(c.oid, p)) AS missing,
           c.relrowsecurity AND (c.relforcerowsecurity OR NOT pg_has_role(c.relowner, 'USAGE'))
           AND NOT (SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user) AS secured
    FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE s.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p')
"""
_FOLLOWED_COLUMNS: Final[LiteralString] = """
    SELECT attname AS name, attgenerated <> '' AS generated,
           attnotnull AND NOT atthasdef AND attidentity = '' AS demands
    FROM pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped
"""
