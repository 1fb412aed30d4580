"""How a leader's slot stands: how far behind, how much WAL it holds back, how much it may."""

from typing import Final, LiteralString, NamedTuple

from cdc.errors import ConfigurationError
from cdc.stores.postgresql.connect import Connection, fetch
from cdc.stores.postgresql.setup import Names


class LeaderStatus(NamedTuple):
    """LSNs are numbers. What the server does not tell is None.

    ``lag_bytes``: WAL written since what the topic has durable. ``retained_bytes``: WAL the slot keeps on the disk.
    ``safe_wal_bytes``: what may still be written before the slot is in danger, None without a limit. ``wal_status``:
    reserved, extended, unreserved or lost. ``active_pid``: the walsender that uses the slot.
    ``oldest_transaction_s``: the age of the oldest open transaction that has written; its WAL cannot be let go of.
    (https://www.postgresql.org/docs/current/view-pg-replication-slots.html)
    """

    current_lsn: int
    confirmed_flush_lsn: int | None
    restart_lsn: int | None
    lag_bytes: int | None
    retained_bytes: int | None
    safe_wal_bytes: int | None
    wal_status: str | None
    active_pid: int | None
    oldest_transaction_s: float | None


def has_slot(connection: Connection, names: Names) -> bool:
    return bool(fetch(connection, "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", [names.slot]))


def leader_status(connection: Connection, names: Names) -> LeaderStatus:
    """:raises ConfigurationError: there is no such slot."""
    for row in fetch(connection, _STATUS, [names.slot]):
        return LeaderStatus(*row)
    raise ConfigurationError(f"there is no replication slot {names.slot!r}", remedy="run `cdc setup`")


_STATUS: Final[LiteralString] = """
    WITH now AS (
        SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS lsn
    )
    SELECT (now.lsn - '0/0')::int8 AS current_lsn,
           (s.confirmed_flush_lsn - '0/0')::int8 AS confirmed_flush_lsn,
           (s.restart_lsn - '0/0')::int8 AS restart_lsn,
           greatest(now.lsn - s.confirmed_flush_lsn, 0)::int8 AS lag_bytes,
           greatest(now.lsn - s.restart_lsn, 0)::int8 AS retained_bytes,
           s.safe_wal_size AS safe_wal_bytes, s.wal_status, s.active_pid,
           (SELECT extract(epoch FROM clock_timestamp() - min(t.began))::float8 FROM (
                SELECT xact_start FROM pg_stat_activity WHERE backend_xid IS NOT NULL
                UNION ALL SELECT prepared FROM pg_prepared_xacts) t(began)) AS oldest_transaction_s
    FROM pg_replication_slots s, now WHERE s.slot_name = %s
"""
