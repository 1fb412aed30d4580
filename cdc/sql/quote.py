"""Names and literals as SQL text. Only for what cannot be a bound parameter."""

from cdc.errors import UsageError


def identifier(name: str) -> str:
    """A double-quoted SQL identifier, the same in PostgreSQL, SQLite and DuckDB.

    https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS

    :raises UsageError: the name is empty or holds a NUL byte, which no database takes.
    """
    if not name or "\0" in name:
        raise UsageError(f"not a usable SQL name: {name!r}")
    return '"' + name.replace('"', '""') + '"'


def qualified(schema: str, name: str) -> str:
    """``"schema"."name"``."""
    return f"{identifier(schema)}.{identifier(name)}"


def literal(text: str) -> str:
    """A single-quoted string literal under ``standard_conforming_strings = on``."""
    if "\0" in text:
        raise UsageError(f"a NUL byte cannot stand in an SQL string: {text!r}")
    return "'" + text.replace("'", "''") + "'"
