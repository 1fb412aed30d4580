"""What `cdc setup` and `cdc teardown` do to a leader for the logical format: planned first, run afterwards.

The publication comes before the slot: decoding looks publications up in the catalog as it was at each change, so a
slot older than its publication stops at the first change in between.
(https://www.postgresql.org/docs/current/logical-replication-publication.html)

A published table without a replica identity makes the *leader's* own UPDATE and DELETE fail. Setup therefore gives
such tables one, before it publishes them: a unique index where one qualifies, else the whole row. Who wants to decide
that table by table passes ``mend_identity=False`` and gets the statements instead.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, LiteralString, NamedTuple

from cdc.errors import AccessError, ConfigurationError, UsageError
from cdc.sql.quote import identifier, literal, qualified
from cdc.stores.postgresql.connect import Connection, fetch, translated

# Waiting longer for a table's lock would stop everyone who queues behind us.
LOCK_TIMEOUT_S: Final = 10


class Names(NamedTuple):
    """What a stream's things are called on its leader."""

    stream: str
    publication: str
    slot: str


class Step(NamedTuple):
    """One statement of a plan. ``done``: the leader already is as the statement would make it.

    ``locks``: the statement waits for locks on tables, for :data:`LOCK_TIMEOUT_S` at most.
    """

    description: str
    sql: str
    done: bool
    locks: bool = False


def default_names(
    database: str, *, stream: str | None = None, publication: str | None = None, slot: str | None = None
) -> Names:
    """The names used for what is not named: the stream after its database, publication and slot after the stream.

    :raises UsageError: a given name is one that PostgreSQL does not take.
    """
    stream = stream or safe_name(f"cdc_{database}")
    publication = publication or stream
    slot = slot or safe_name(stream)
    if not 1 <= len(publication.encode()) <= 63 or "\0" in publication:
        raise UsageError(f"not a publication name: {publication!r}", remedy="use 1 to 63 bytes")
    if not re.fullmatch(r"[a-z0-9_]{1,63}", slot):
        raise UsageError(f"not a slot name: {slot!r}", remedy="use 1 to 63 of the characters a-z, 0-9 and _")
    return Names(stream, publication, slot)


def plan_setup(
    connection: Connection,
    names: Names,
    *,
    tables: Sequence[str] = (),
    schemas: Sequence[str] = (),
    mend_identity: bool = True,
) -> list[Step]:
    """What makes the leader ready: replica identities, then the publication, then the slot.

    ``tables`` are written ``schema.table`` as the catalog has them, without quotes; a bare name is in ``public``.
    With neither tables nor schemas everything is published: as FOR ALL TABLES for a superuser, else table by table,
    which needs all of them to be the role's own. An existing publication is then taken as it is.

    :raises ConfigurationError: what exists differs from what is asked; or tables have no replica identity and
        ``mend_identity`` is false, with the statements as the remedy.
    :raises AccessError: the role may not do it.
    """
    _must_be_able(connection)
    publication = _publication(connection, names.publication)
    _must_be_usable_slot(connection, names, published=publication is not None)
    asked = scope(connection, tables, schemas)
    wanted = _targets(connection, asked, schemas=schemas, everything=not tables and not schemas)
    if publication is not None:
        _must_match(names.publication, publication, wanted if tables or schemas else None)
    return [
        *_identity_steps(_captured(connection, names.publication, asked, publication), mend=mend_identity),
        Step(
            f"publication {names.publication}: {wanted.text}",
            create_publication(names.publication, wanted.sql, connection.info.server_version),
            done=publication is not None,
            locks=True,
        ),
        Step(
            f"replication slot {names.slot}",
            create_slot(names.slot, connection.info.server_version),
            done=_slot(connection, names.slot) is not None,
        ),
    ]


def plan_teardown(connection: Connection, names: Names) -> list[Step]:
    """What takes the slot and the publication away again. Replica identities stay as they are.

    :raises ConfigurationError: the slot is not one of ours: of another database or plugin.
    """
    slot = _slot(connection, names.slot)
    if slot is not None:
        _must_be_ours(connection, slot)
    return [
        Step(f"replication slot {names.slot}", drop_slot(names.slot), done=slot is None),
        Step(
            f"publication {names.publication}",
            f"DROP PUBLICATION IF EXISTS {identifier(names.publication)}",
            done=_publication(connection, names.publication) is None,
            locks=True,
        ),
    ]


def run(connection: Connection, steps: Iterable[Step]) -> None:
    """Run what is not done, statement by statement. A run that was cut short is completed by the next.

    :raises TransientError: a table stayed locked for :data:`LOCK_TIMEOUT_S`.
    :raises FencedError: the slot to be dropped is in use.
    """
    for step in steps:
        if not step.done:
            with translated():
                connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S if step.locks else 0}s'".encode())
                try:
                    connection.execute(step.sql.encode())
                finally:
                    connection.execute("SET lock_timeout = 0")


def create_publication(name: str, targets: str, server_version: int) -> str:
    """The statement that makes a publication of ``FOR …`` targets."""
    options = "publish_via_partition_root = true"
    if server_version >= 180000:
        options += ", publish_generated_columns = stored"
    return f"CREATE PUBLICATION {identifier(name)} {targets} WITH ({options})"


def create_slot(name: str, server_version: int) -> str:
    """The statement that makes a slot, from 17 on one that a standby may take over.

    https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION
    """
    failover = ", true" if server_version >= 170000 else ""
    return f"SELECT pg_create_logical_replication_slot({literal(name)}, 'pgoutput', false, false{failover})"


def drop_slot(name: str) -> str:
    return f"SELECT pg_drop_replication_slot({literal(name)})"


def give_identity(schema: str, name: str, index: str | None) -> str:
    """The statement that gives a table without a replica identity one."""
    using = f"USING INDEX {identifier(index)}" if index else "FULL"
    return f"ALTER TABLE {qualified(schema, name)} REPLICA IDENTITY {using}"


def safe_name(name: str) -> str:
    """The name in the characters of a slot; with a hash where that changed it, so that two never meet."""
    safe = re.sub(r"[^a-z0-9_]", "_", name)
    if safe == name and len(name) <= 63:
        return name
    return f"{safe[:54]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def readable(connection: Connection, names: Names, *, tables: Sequence[str], schemas: Sequence[str]) -> list[Any]:
    """What an image of the publication reads, as rows of :data:`TABLES`: of the one to be made where there is none."""
    if _publication(connection, names.publication) is not None:
        published = set(published_oids(connection, names.publication))
        return [row for row in fetch(connection, TABLES) if row.id in published]
    # Partitions are read through their root, but for those asked for by name.
    return [row for row in scope(connection, tables, schemas) if tables or not row.is_partition]


# Every permanent table that is not the system's, partitions and their roots included. ``identified``: the server
# lets a published UPDATE pass. ``candidate``: an index that would serve as the replica identity.
TABLES: Final[LiteralString] = """
    SELECT c.oid::int8 AS id, s.nspname AS schema, c.relname AS name, c.relkind AS kind, c.relreplident AS identity,
           c.relispartition AS is_partition, pg_has_role(c.relowner, 'USAGE') AS owned,
           CASE c.relreplident WHEN 'f' THEN true WHEN 'n' THEN false ELSE EXISTS (
               SELECT FROM pg_index x WHERE x.indrelid = c.oid AND x.indisvalid AND x.indimmediate
               AND CASE c.relreplident WHEN 'd' THEN x.indisprimary ELSE x.indisreplident END) END AS identified,
           (SELECT i.relname FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
            WHERE x.indrelid = c.oid AND x.indisunique AND x.indisvalid AND x.indimmediate
              AND x.indpred IS NULL AND x.indexprs IS NULL
              AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attnotnull
                              AND a.attnum = ANY ((x.indkey::int2[])[0:x.indnkeyatts - 1]))
            ORDER BY x.indisprimary DESC, x.indnkeyatts, i.relname LIMIT 1) AS candidate
    FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND c.oid >= 16384
      AND s.nspname <> 'information_schema' AND s.nspname !~ '^pg_'
    ORDER BY s.nspname, c.relname
"""


class _Targets(NamedTuple):
    """What a publication is to be made for; ``tables`` and ``schemas`` as the catalog would list them."""

    sql: str
    text: str
    everything: bool = False
    tables: frozenset[int] = frozenset()
    schemas: frozenset[str] = frozenset()


def _one(connection: Connection, query: LiteralString, *values: Any) -> Any | None:
    return next(iter(fetch(connection, query, values or None)), None)


def _must_be_able(connection: Connection) -> None:
    server = _one(
        connection,
        "SELECT current_setting('wal_level') AS wal_level, pg_is_in_recovery() AS standby, current_user AS role,"
        " current_setting('is_superuser') = 'on' OR rolreplication AS replication"
        " FROM pg_roles WHERE rolname = current_user",
    )
    assert server is not None  # noqa: S101
    if server.standby:
        raise ConfigurationError(
            "the server is a standby, where no publication can be made", remedy="run setup on its primary"
        )
    if server.wal_level != "logical":
        raise ConfigurationError(
            f"wal_level is {server.wal_level!r}, not 'logical'",
            remedy="run ALTER SYSTEM SET wal_level = 'logical' and restart the server",
        )
    if not server.replication:
        raise AccessError(
            f"role {server.role!r} may not make a replication slot",
            remedy=f"ALTER ROLE {identifier(server.role)} REPLICATION",
        )


def _publication(connection: Connection, name: str) -> Any | None:
    return _one(
        connection,
        "SELECT p.oid::int8 AS id, puballtables AS everything,"
        " pubinsert AND pubupdate AND pubdelete AND pubtruncate AS complete,"
        " ARRAY(SELECT prrelid::int8 FROM pg_publication_rel WHERE prpubid = p.oid) AS tables,"
        " ARRAY(SELECT nspname::text FROM pg_publication_namespace m JOIN pg_namespace n ON n.oid = m.pnnspid"
        "       WHERE pnpubid = p.oid) AS schemas"
        " FROM pg_publication p WHERE pubname = %s",
        name,
    )


def _slot(connection: Connection, name: str) -> Any | None:
    return _one(connection, "SELECT * FROM pg_replication_slots WHERE slot_name = %s", name)


def _must_be_ours(connection: Connection, slot: Any) -> None:
    database = connection.info.dbname
    if (slot.slot_type, slot.plugin, slot.database) != ("logical", "pgoutput", database):
        of = f" of database {slot.database!r}" if slot.database else ""
        raise ConfigurationError(
            f"slot {slot.slot_name!r} is a {slot.slot_type} slot{of} with plugin {slot.plugin!r},"
            f" not a pgoutput slot of {database!r}",
            remedy="name another slot with --slot",
        )


def _must_be_usable_slot(connection: Connection, names: Names, *, published: bool) -> None:
    slot = _slot(connection, names.slot)
    if slot is None:
        return
    _must_be_ours(connection, slot)
    if slot.wal_status == "lost":
        raise ConfigurationError(
            f"slot {names.slot!r} is lost: the leader removed WAL it needed",
            remedy="run `cdc teardown`, then `cdc setup`, then take a new image with `cdc ship --image new`",
        )
    if not published:
        raise ConfigurationError(
            f"slot {names.slot!r} is older than publication {names.publication!r}, which does not exist yet:"
            " it would stop at the first change in between",
            remedy="run `cdc teardown`, then `cdc setup`",
        )


def scope(
    connection: Connection, tables: Sequence[str], schemas: Sequence[str], among: LiteralString = TABLES
) -> list[Any]:
    """The tables asked for, all where nothing is asked; partitions come with their roots."""
    everything = fetch(connection, among)
    if not tables and not schemas:
        return everything
    existing = {row.nspname for row in fetch(connection, "SELECT nspname FROM pg_namespace")}
    if absent := [name for name in schemas if name not in existing]:
        raise ConfigurationError(f"there is no schema {absent[0]!r}", remedy="mend the name given to --schemas")
    asked = [_find(everything, name) for name in tables]
    return [*asked, *(row for row in everything if row.schema in schemas and row not in asked)]


def _find(everything: Iterable[Any], name: str) -> Any:
    labels = {name, f"public.{name}"}
    found = [row for row in everything if f"{row.schema}.{row.name}" in labels]
    if len(found) == 1:
        return found[0]
    raise ConfigurationError(
        f"{'more than one' if found else 'no permanent'} table is called {name!r}",
        remedy="write schema.table as the catalog has it, without quotes; views, foreign, unlogged and temporary"
        " tables cannot be published",
    )


def _targets(connection: Connection, scope: Sequence[Any], *, schemas: Sequence[str], everything: bool) -> _Targets:
    superuser = _one(connection, "SELECT current_setting('is_superuser') = 'on' AS yes")
    if superuser is not None and superuser.yes:
        if everything:
            return _Targets("FOR ALL TABLES", "all tables", everything=True)
        named = [row for row in scope if row.schema not in schemas]
        parts = [f"TABLE {_list(named)}"] if named else []
        parts += [f"TABLES IN SCHEMA {', '.join(map(identifier, schemas))}"] if schemas else []
        text = ", ".join([*(f"{row.schema}.{row.name}" for row in named), *(f"{name}.*" for name in schemas)])
        return _Targets(
            f"FOR {', '.join(parts)}", text, tables=frozenset(row.id for row in named), schemas=frozenset(schemas)
        )
    _must_own(scope)
    # Publishing the root publishes its partitions, those to come included.
    named = [row for row in scope if not (row.is_partition and (everything or row.schema in schemas))]
    if not named:
        remedy = "create the tables first, or run setup as a superuser, who can publish tables to come"
        raise ConfigurationError("there is no table to publish", remedy=remedy)
    return _Targets(f"FOR TABLE {_list(named)}", f"{len(named)} tables", tables=frozenset(row.id for row in named))


def _list(tables: Iterable[Any]) -> str:
    return ", ".join(qualified(row.schema, row.name) for row in tables)


def _must_own(scope: Iterable[Any]) -> None:
    if foreign := [f"{row.schema}.{row.name}" for row in scope if not row.owned]:
        raise AccessError(
            f"only the owner of a table may publish it; not the role's own: {', '.join(foreign)}",
            remedy="run setup as a superuser, or as the owner of all of them, or narrow it with --tables or --schemas",
        )


def _must_match(name: str, publication: Any, wanted: _Targets | None) -> None:
    if not publication.complete:
        raise ConfigurationError(
            f"publication {name!r} does not publish all of insert, update, delete and truncate",
            remedy=f"ALTER PUBLICATION {identifier(name)} SET (publish = 'insert, update, delete, truncate')",
        )
    if wanted is None:
        return
    there = (publication.everything, frozenset(publication.tables), frozenset(publication.schemas))
    if there != (wanted.everything, wanted.tables, wanted.schemas):
        change = f"ALTER PUBLICATION {identifier(name)} {wanted.sql.replace('FOR', 'SET', 1)}"
        recreate = "run `cdc teardown`, then `cdc setup`"
        raise ConfigurationError(
            f"publication {name!r} exists and is not for {wanted.text}",
            remedy=recreate if publication.everything or wanted.everything else change,
        )


def _captured(connection: Connection, name: str, scope: Sequence[Any], publication: Any | None) -> list[Any]:
    """The tables whose UPDATE and DELETE the publication governs: the partitions below a published root as well."""
    if publication is not None and publication.everything:
        return fetch(connection, TABLES)
    roots = [row.id for row in scope] if publication is None else published_oids(connection, name)
    below = {row.id for row in fetch(connection, _BELOW, [roots])}
    return [row for row in fetch(connection, TABLES) if row.id in below]


_BELOW: Final[LiteralString] = """
    SELECT DISTINCT coalesce(p.relid::oid, r.id)::int8 AS id
    FROM unnest(%s::oid[]) r(id) LEFT JOIN LATERAL pg_partition_tree(r.id) p ON true
"""


def published_oids(connection: Connection, publication: str) -> list[int]:
    query: LiteralString = "SELECT relid::oid::int8 AS id FROM pg_get_publication_tables(%s)"
    return [row.id for row in fetch(connection, query, [publication])]


def _identity_steps(tables: Iterable[Any], *, mend: bool) -> list[Step]:
    steps = [
        Step(
            f"replica identity of {row.schema}.{row.name}",
            give_identity(row.schema, row.name, row.candidate),
            done=False,
            locks=True,
        )
        for row in tables
        if not row.identified
    ]
    if steps and not mend:
        raise ConfigurationError(
            "published without a replica identity, the leader's own UPDATE and DELETE would fail on "
            + ", ".join(step.description.removeprefix("replica identity of ") for step in steps),
            remedy="; ".join(step.sql for step in steps),
        )
    return steps
