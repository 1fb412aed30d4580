"""What lets a role ship without REPLICATION: two functions over a slot, as `cdc setup --polling-role` makes them.

A role with REPLICATION reads every table, every slot and the whole cluster's files. Here that attribute belongs to an
owner that nobody can log in as; its two functions name slot and publication themselves, so that whoever may call them
gets what this publication shows and nothing else (https://www.postgresql.org/docs/current/sql-createfunction.html,
"Writing SECURITY DEFINER Functions Safely").

- ``SCHEMA.peek(upto pg_lsn, as_binary boolean)`` returns pgoutput's messages, protocol 1, of the transactions that the
  slot holds and that commit before ``upto``;
- ``SCHEMA.acknowledge(upto pg_lsn)`` lets the leader forget what lies before ``upto``, and never moves back.

Every privilege belongs to a second role without login, the readers, of which the shipper's role becomes a member: so
teardown takes away exactly what setup gave, whatever else the shipper's role was granted before.
"""

from collections.abc import Sequence
from typing import Any, Final, LiteralString, NamedTuple

from cdc.errors import AccessError, ConfigurationError
from cdc.sql.quote import identifier, literal, qualified
from cdc.stores.postgresql.connect import Connection, fetch
from cdc.stores.postgresql.setup import Names, Step, readable, safe_name

FUNCTIONS: Final = ("peek", "acknowledge")
_PATH: Final = "search_path=pg_catalog, pg_temp"


class Polled(NamedTuple):
    """What belongs to a slot that is polled. Slots' names are the whole server's, so these roles' names are too."""

    schema: str
    owner: str
    readers: str

    @classmethod
    def of(cls, slot: str) -> "Polled":
        return cls(safe_name(f"polling_{slot}"), safe_name(f"polling_{slot}_owner"), safe_name(f"polling_{slot}"))

    def function(self, name: str) -> str:
        return qualified(self.schema, name)


class _Function(NamedTuple):
    name: str
    arguments: str
    result: str
    body: str


def plan_polling(
    connection: Connection, names: Names, role: str, *, tables: Sequence[str] = (), schemas: Sequence[str] = ()
) -> list[Step]:
    """What makes ``role`` able to ship by polling, once the steps of ``plan_setup`` are done.

    :raises ConfigurationError: there is no such role; or the schema's name is taken.
    """
    if not fetch(connection, "SELECT FROM pg_roles WHERE rolname = %s", [role]):
        raise ConfigurationError(
            f"there is no role {role!r} to ship as", remedy=f"CREATE ROLE {identifier(role)} LOGIN, with a password"
        )
    polled = Polled.of(names.slot)
    there = _there(connection, polled)
    if there.schema_owner not in {None, polled.owner}:
        raise ConfigurationError(
            f"schema {polled.schema!r} belongs to role {there.schema_owner!r}", remedy="name another slot with --slot"
        )
    owner, readers = identifier(polled.owner), identifier(polled.readers)
    verb = "CREATE" if there.owner is None else "ALTER"
    return [
        Step(
            f"role {polled.owner}, which nobody logs in as",
            f"{verb} ROLE {owner} NOLOGIN REPLICATION",
            bool(there.owner),
        ),
        Step(f"role {polled.readers}, who may poll", f"CREATE ROLE {readers} NOLOGIN", there.readers),
        Step(
            f"schema {polled.schema}",
            f"CREATE SCHEMA {identifier(polled.schema)} AUTHORIZATION {owner}",
            there.schema_owner is not None,
        ),
        *(_function_step(connection, polled, function) for function in _functions(names)),
        *_grant_steps(connection, polled, readable(connection, names, tables=tables, schemas=schemas)),
        _member_step(connection, polled, role),
    ]


def plan_polling_teardown(connection: Connection, names: Names) -> list[Step]:
    """What takes all of it away again; nothing where there is nothing."""
    polled = Polled.of(names.slot)
    there = _there(connection, polled)
    owner, readers, schema = identifier(polled.owner), identifier(polled.readers), identifier(polled.schema)
    steps = []
    if there.schema_owner == polled.owner:
        drop = "; ".join(f"DROP FUNCTION IF EXISTS {polled.function(name)}" for name in FUNCTIONS)
        steps.append(Step(f"schema {polled.schema}", f"{drop}; DROP SCHEMA {schema}", done=False))
    if there.readers:
        sql = f"DROP OWNED BY {readers}; DROP ROLE {readers}"
        steps.append(Step(f"role {polled.readers} and its privileges", sql, done=False))
    if there.owner is not None:
        steps.append(Step(f"role {polled.owner}", f"DROP ROLE {owner}", done=False))
    return steps


def must_be_callable(connection: Connection, slot: str) -> Polled:
    """The functions of a slot, which our role may call.

    :raises ConfigurationError: they are not there.
    :raises AccessError: we may not call them.
    """
    polled = Polled.of(slot)
    callable_ = {row.name: row.callable for row in fetch(connection, _CALLABLE, [polled.schema])}
    if missing := [name for name in FUNCTIONS if name not in callable_]:
        raise ConfigurationError(
            f"there is no function {polled.schema}.{missing[0]}",
            remedy="run `cdc setup --polling-role ROLE` on the leader",
        )
    if forbidden := [name for name in FUNCTIONS if not callable_[name]]:
        role = fetch(connection, "SELECT current_user AS name")[0].name
        raise AccessError(
            f"role {role!r} may not call {polled.schema}.{forbidden[0]}",
            remedy=f"GRANT {identifier(polled.readers)} TO {identifier(role)}, or run `cdc setup --polling-role` again",
        )
    return polled


_CALLABLE: Final[LiteralString] = """
    SELECT p.proname AS name,
           has_schema_privilege(s.oid, 'USAGE') AND has_function_privilege(p.oid, 'EXECUTE') AS callable
    FROM pg_proc p JOIN pg_namespace s ON s.oid = p.pronamespace WHERE s.nspname = %s
"""


def _there(connection: Connection, polled: Polled) -> Any:
    """``owner`` is None where there is no such role, else whether it is as it should be."""
    return fetch(
        connection,
        "SELECT (SELECT rolreplication AND NOT rolcanlogin FROM pg_roles WHERE rolname = %(owner)s) AS owner,"
        " EXISTS (SELECT FROM pg_roles WHERE rolname = %(readers)s) AS readers,"
        " (SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = %(schema)s) AS schema_owner",
        polled._asdict(),
    )[0]


def _functions(names: Names) -> tuple[_Function, _Function]:
    slot, publication = literal(names.slot), literal(identifier(names.publication))
    return (
        _Function(
            "peek",
            "upto pg_lsn, as_binary boolean",
            "SETOF bytea",
            f"SELECT data FROM pg_catalog.pg_logical_slot_peek_binary_changes({slot}, upto, NULL,"
            f" 'proto_version', '1', 'publication_names', {publication},"
            " 'binary', as_binary::pg_catalog.text, 'messages', 'true')",
        ),
        _Function(
            "acknowledge",
            "upto pg_lsn",
            "void",
            "SELECT pg_catalog.pg_replication_slot_advance(slot_name, upto) FROM pg_catalog.pg_replication_slots"
            f" WHERE slot_name = {slot} AND confirmed_flush_lsn < upto",
        ),
    )


def _function_step(connection: Connection, polled: Polled, function: _Function) -> Step:
    """One string of statements is one transaction: the function is never anybody else's, or everybody's to call."""
    name, owner, readers = polled.function(function.name), identifier(polled.owner), identifier(polled.readers)
    statements = (
        f"CREATE OR REPLACE FUNCTION {name}({function.arguments}) RETURNS {function.result}"
        f" LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {literal(function.body)}",
        f"ALTER FUNCTION {name} OWNER TO {owner}",
        f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC",
        f"GRANT EXECUTE ON FUNCTION {name} TO {readers}",
    )
    found = fetch(connection, _FUNCTION, [polled.schema, function.name])
    done = [(row.body, row.owner, row.is_safe, set(row.granted)) for row in found] == [
        (function.body, polled.owner, True, {polled.owner, polled.readers})
    ]
    return Step(f"function {polled.schema}.{function.name}", "; ".join(statements), done)


_FUNCTION: Final[LiteralString] = f"""
    SELECT p.prosrc AS body, pg_get_userbyid(p.proowner)::text AS owner,
           p.prosecdef AND p.proconfig = ARRAY['{_PATH}'] AS is_safe,
           ARRAY(SELECT CASE WHEN grantee = 0 THEN 'public' ELSE pg_get_userbyid(grantee)::text END
                 FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner)))) AS granted
    FROM pg_proc p JOIN pg_namespace s ON s.oid = p.pronamespace WHERE s.nspname = %s AND p.proname = %s
"""


def _grant_steps(connection: Connection, polled: Polled, tables: Sequence[Any]) -> list[Step]:
    """USAGE on schemas and SELECT on tables, so far as everybody does not have them already."""
    readers = identifier(polled.readers)
    lacking = unreadable(connection, [row.id for row in tables], polled.readers)
    closed = sorted({row.schema for row in lacking if not row.usage})
    hidden = [row for row in lacking if not row.readable]
    own = f"GRANT USAGE ON SCHEMA {identifier(polled.schema)} TO {readers}"
    steps = [Step(f"use of schema {polled.schema}", own, _may_use(connection, polled))]
    if closed:
        use = f"GRANT USAGE ON SCHEMA {', '.join(map(identifier, closed))} TO {readers}"
        steps.append(Step(f"use of schema {', '.join(closed)}", use, done=False))
    select = f"GRANT SELECT ON {', '.join(qualified(row.schema, row.name) for row in hidden)} TO {readers}"
    steps.append(Step(f"reading of {len(tables)} published tables", select, done=not hidden))
    return steps


def _may_use(connection: Connection, polled: Polled) -> bool:
    query: LiteralString = """
        SELECT FROM pg_namespace s, pg_roles r
        WHERE s.nspname = %s AND r.rolname = %s AND has_schema_privilege(r.oid, s.oid, 'USAGE')
    """
    return bool(fetch(connection, query, [polled.schema, polled.readers]))


def unreadable(connection: Connection, oids: Sequence[int], role: str) -> list[Any]:
    """Those of the tables that a role cannot read; one that does not exist yet has what everybody has."""
    return fetch(connection, _UNREADABLE, {"role": role, "oids": list(oids)})


_UNREADABLE: Final[LiteralString] = """
    SELECT * FROM (
        SELECT s.nspname AS schema, c.relname AS name,
               has_schema_privilege(r.name, s.oid, 'USAGE') AS usage,
               has_table_privilege(r.name, c.oid, 'SELECT') AS readable
        FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace,
             (SELECT coalesce((SELECT rolname FROM pg_roles WHERE rolname = %(role)s), 'public') AS name) r
        WHERE c.oid = ANY (%(oids)s::oid[])) t
    WHERE NOT (usage AND readable) ORDER BY schema, name
"""


def _member_step(connection: Connection, polled: Polled, role: str) -> Step:
    """From 16 on it is the membership that says whether it is inherited, before it is the role."""
    inherited = " WITH INHERIT TRUE" if connection.info.server_version >= 160000 else ""
    query: LiteralString = "SELECT FROM pg_roles WHERE rolname = %s AND pg_has_role(%s, oid, 'USAGE')"
    return Step(
        f"role {role} is one of {polled.readers}",
        f"GRANT {identifier(polled.readers)} TO {identifier(role)}{inherited}",
        done=bool(fetch(connection, query, [polled.readers, role])),
    )
