"""``cdc status``: how far a leader's slot, a broker's topic and its followers are, and how far apart."""

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any, Final

from cdc import registry
from cdc.cli.console import Console, seconds_text, size_text
from cdc.cli.options import Settings
from cdc.cli.session import leader_session
from cdc.cli.urls import native_topics, shown
from cdc.codec import EnvelopeCodec
from cdc.ports import Broker
from cdc.position import format_lsn, parse_lsn
from cdc.record import Batch, Checkpoint, Format
from cdc.stores.postgresql import capture
from cdc.stores.postgresql.status import has_slot, leader_status
from cdc.topic import decoded

_LOOKED_BACK_MAX: Final = 200  # batches, for the last one with a transaction

Report = dict[str, Any]


def run(settings: Settings) -> int:
    console = Console(settings)
    brokers = [url for url in settings.urls if registry.is_broker(url)]
    stores = [url for url in settings.urls if url not in brokers]
    # Two databases are leader and follower; one beside a broker is a leader where it can be one.
    has_leader = bool(stores) and registry.scheme_of(stores[0]) == "postgresql"
    report: Report = {
        "leader": _leader(stores[0], settings) if has_leader else None,
        "topics": [topic for url in brokers for topic in _topics(url, settings)],
        "followers": [entry for url in stores[has_leader:] for entry in _follower(url, settings)],
    }
    _relate(report, brokers)
    if console.json:
        console.out_json(report)
    else:
        _print(console, report)
    return 0


def _leader(url: str, settings: Settings) -> Report:
    with leader_session(url, settings) as (connection, names):
        schema = capture.schema_of(names.slot)
        chosen = settings.format
        if chosen is None and not has_slot(connection, names) and capture.is_there(connection, schema):
            chosen = Format.TRIGGER
        if chosen is Format.TRIGGER:
            return _capturing(url, names.stream, schema, capture.capture_status(connection, schema))
        status = leader_status(connection, names)
    return {
        "url": shown(url),
        "stream": names.stream,
        "format": Format.LOGICAL.value,
        "publication": names.publication,
        "slot": names.slot,
        "current": format_lsn(status.current_lsn),
        "confirmed": _lsn(status.confirmed_flush_lsn),
        "lag_bytes": status.lag_bytes,
        "lag_s": 0.0 if status.lag_bytes == 0 else None,
        "retained_wal_bytes": status.retained_bytes,
        "safe_wal_bytes": status.safe_wal_bytes,
        "wal_status": status.wal_status,
        "active": status.active_pid is not None,
        "oldest_transaction_s": status.oldest_transaction_s,
    }


def _capturing(url: str, stream: str, schema: str, status: capture.CaptureStatus) -> Report:
    return {
        "url": shown(url),
        "stream": stream,
        "format": Format.TRIGGER.value,
        "schema": schema,
        "tables": status.tables,
        "tick": status.tick,
        "tick_age_s": status.tick_age_s,
        "waiting_changes": status.changes,
        "retained_bytes": status.size_bytes,
        "lag_s": 0.0 if status.changes == 0 else None,
        "open_transactions": status.open_transactions,
        "oldest_transaction_s": status.oldest_transaction_s,
    }


def _lsn(lsn: int | None) -> str | None:
    return None if lsn is None else format_lsn(lsn)


def _topics(url: str, settings: Settings) -> list[Report]:
    with closing(registry.broker(url)(url, create=False)) as broker:
        names = [settings.stream] if settings.stream is not None else native_topics(broker.topics())[0]
        return [_topic(broker, url, name) for name in names]


def _topic(broker: Broker, url: str, name: str) -> Report:
    first, following = broker.bounds(name)
    last = decoded(broker, EnvelopeCodec(), name, following - 1) if following > first else None
    committed_us = _last_commit(broker, name, first, following)
    return {
        "url": shown(url),
        "stream": name,
        "first_offset": first,
        "next_offset": following,
        "source": last.position.source if last is not None else None,
        "position": str(last.position) if last is not None else None,
        "last_kind": last.kind.value if last is not None else None,
        "last_commit_us": committed_us,
    }


def _last_commit(broker: Broker, name: str, first: int, following: int) -> int | None:
    codec = EnvelopeCodec()
    for offset in range(following - 1, max(first, following - _LOOKED_BACK_MAX) - 1, -1):
        batch = decoded(broker, codec, name, offset)
        if batch.transactions:
            return batch.transactions[-1].committed_us
    return None


def _follower(url: str, settings: Settings) -> list[Report]:
    with closing(registry.store(url).connect_store(url)) as store:
        checkpoints = store.checkpoints()
    if not checkpoints:
        return [{"url": shown(url), "stream": None}]
    return [
        _applied(url, stream, checkpoint)
        for stream, checkpoint in sorted(checkpoints.items())
        if settings.stream in (None, stream)
    ]


def _applied(url: str, stream: str, checkpoint: Checkpoint) -> Report:
    return {
        "url": shown(url),
        "stream": stream,
        "source": checkpoint.position.source,
        "position": str(checkpoint.position),
        "next_offset": checkpoint.offset,
        "owner_epoch": checkpoint.epoch,
        "loading_image": checkpoint.image is not None and checkpoint.image.sequence >= 0,
        "behind_batches": None,
        "lag_bytes": None,
        "lag_s": None,
    }


def _relate(report: Report, brokers: Sequence[str]) -> None:
    """Fill in what only two parts together tell."""
    leader, topics = report["leader"], {topic["stream"]: topic for topic in report["topics"]}
    if leader is not None and leader["lag_s"] is None and (topic := topics.get(leader["stream"])) is not None:
        # What is not in the topic was committed later than the last transaction that is.
        leader["lag_s"] = _age_s(topic["last_commit_us"])
    for follower in report["followers"]:
        topic = topics.get(follower["stream"])
        if topic is not None and topic["source"] == follower["source"]:
            _relate_follower(follower, topic, brokers)


def _relate_follower(follower: Report, topic: Report, brokers: Sequence[str]) -> None:
    follower["behind_batches"] = max(0, topic["next_offset"] - follower["next_offset"])
    follower["lag_bytes"] = max(0, parse_lsn(topic["position"]) - parse_lsn(follower["position"]))
    waiting = _first_waiting(follower, topic, brokers) if follower["behind_batches"] else None
    if waiting is None:
        follower["lag_s"] = 0.0 if not follower["behind_batches"] else None
    else:
        follower["lag_s"] = _age_s(waiting)


def _first_waiting(follower: Report, topic: Report, brokers: Sequence[str]) -> int | None:
    """When the first transaction that the follower has not applied was committed."""
    url = next(url for url in brokers if shown(url) == topic["url"])
    with closing(registry.broker(url)(url, create=False)) as broker:
        first = max(follower["next_offset"], topic["first_offset"])
        codec = EnvelopeCodec()
        for offset in range(first, min(topic["next_offset"], first + _LOOKED_BACK_MAX)):
            batch: Batch = decoded(broker, codec, topic["stream"], offset)
            if batch.transactions:
                return batch.transactions[0].committed_us
    return None


def _age_s(committed_us: int | None) -> float | None:
    return None if committed_us is None else round(max(0.0, time.time() - committed_us / 1e6), 3)


def _print(console: Console, report: Report) -> None:
    leader = report["leader"]
    if leader is not None:
        _print_leader(console, leader)
    for topic in report["topics"]:
        console.out(f"topic    {topic['stream']} of {topic['url']}")
        console.out(f"  offsets {topic['first_offset']} to {topic['next_offset']}, at {topic['position'] or 'nothing'}")
    for follower in report["followers"]:
        _print_follower(console, follower)
    if not report["topics"] and leader is None and not report["followers"]:
        console.out("no stream yet")


def _print_leader(console: Console, leader: Report) -> None:
    console.out(f"leader   {leader['url']}, stream {leader['stream']}")
    if leader["format"] == Format.TRIGGER.value:
        _print_capturing(console, leader)
        return
    safe = leader["safe_wal_bytes"]
    console.out(
        f"  slot {leader['slot']}: {'in use' if leader['active'] else 'not in use'}, WAL {leader['wal_status']}"
    )
    console.out(f"  at {leader['current']}, durable in the broker up to {leader['confirmed']}")
    console.out(f"  lag {_size(leader['lag_bytes'])}, at most {seconds_text(leader['lag_s'])}")
    console.out(
        f"  retained WAL {_size(leader['retained_wal_bytes'])}, "
        f"safe to write {'without limit' if safe is None else size_text(safe)}"
    )
    if leader["oldest_transaction_s"] is not None:
        console.out(f"  oldest open transaction {seconds_text(leader['oldest_transaction_s'])}")


def _print_capturing(console: Console, leader: Report) -> None:
    console.out(f"  triggers on {leader['tables']} tables write into schema {leader['schema']}")
    tick = "none yet" if leader["tick"] is None else f"{leader['tick']}, {seconds_text(leader['tick_age_s'])} ago"
    console.out(
        f"  last tick {tick}; {leader['waiting_changes']} changes since, at most {seconds_text(leader['lag_s'])}"
    )
    console.out(f"  change tables hold {_size(leader['retained_bytes'])}")
    if leader["open_transactions"]:
        oldest = leader["oldest_transaction_s"]
        age = "" if oldest is None else f", the oldest for {seconds_text(oldest)}"
        console.out(
            f"  {leader['open_transactions']} transactions are open{age}: what they wrote waits for their commit"
        )


def _print_follower(console: Console, follower: Report) -> None:
    if follower["stream"] is None:
        console.out(f"follower {follower['url']}: nothing applied")
        return
    console.out(f"follower {follower['url']}, stream {follower['stream']}")
    loading = ", loading an image" if follower["loading_image"] else ""
    console.out(f"  applied {follower['position']}, reads on at offset {follower['next_offset']}{loading}")
    if follower["behind_batches"] is not None:
        lag = f"{_size(follower['lag_bytes'])}, {seconds_text(follower['lag_s'])}"
        console.out(f"  behind the topic by {follower['behind_batches']} batches, {lag}")


def _size(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else size_text(size_bytes)
