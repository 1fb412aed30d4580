"""``cdc setup``, ``cdc teardown`` and ``cdc check``: what a database needs before anything flows."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from cdc import registry
from cdc.cli.console import Console
from cdc.cli.options import READER, SHAPING, Settings
from cdc.cli.session import leader_session
from cdc.cli.urls import shown
from cdc.errors import ConfigurationError, UsageError
from cdc.record import Format
from cdc.stores.postgresql import capture
from cdc.stores.postgresql.capture_check import check_triggers
from cdc.stores.postgresql.connect import connect
from cdc.stores.postgresql.polling import plan_polling, plan_polling_teardown
from cdc.stores.postgresql.preflight import Finding, check_follower, check_leader
from cdc.stores.postgresql.setup import Step, plan_setup, plan_teardown
from cdc.stores.postgresql.setup import run as run_steps

_LEVEL_WIDTH: Final = len("warning")


def run(settings: Settings) -> int:
    return {"setup": _setup, "teardown": _teardown, "check": _check}[settings.command](settings)


def _setup(settings: Settings) -> int:
    registry.shipper(settings.leader, settings.format)
    tables, schemas = settings.tables or (), settings.schemas or ()
    with leader_session(settings.leader, settings) as (connection, names):
        if settings.format is Format.TRIGGER:
            if settings.polling_role is not None:
                raise UsageError("--polling-role is for --format logical", remedy="write --reader instead")
            shaping = capture.Shaping(settings.columns or {}, settings.mask or {}, settings.where or {})
            steps = capture.plan_setup(
                connection, names, tables=tables, schemas=schemas, shaping=shaping, reader=settings.reader
            )
        else:
            _refuse_shaping(settings)
            steps = plan_setup(connection, names, tables=tables, schemas=schemas)
            if settings.polling_role is not None:
                steps += plan_polling(connection, names, settings.polling_role, tables=tables, schemas=schemas)
        return _run(settings, steps, connection)


def _refuse_shaping(settings: Settings) -> None:
    """
    :raises UsageError: an option that only triggers heed.
    """
    for option in (*SHAPING, READER):
        if getattr(settings, option.key) is not None:
            raise UsageError(
                f"--{option.name} is for --format trigger",
                remedy="publish columns and rows by SQL: CREATE PUBLICATION … FOR TABLE t (a, b) WHERE (…)"
                if option is not READER
                else "leave it out",
            )


def _teardown(settings: Settings) -> int:
    registry.shipper(settings.leader, settings.format)
    with leader_session(settings.leader, settings) as (connection, names):
        if settings.format is Format.TRIGGER:
            return _run(settings, capture.plan_teardown(connection, names), connection)
        steps = [*plan_polling_teardown(connection, names), *plan_teardown(connection, names)]
        return _run(settings, steps, connection)


def _run(settings: Settings, steps: Sequence[Step], connection: Any) -> int:
    console = Console(settings)
    if not settings.dry_run:
        run_steps(connection, steps)
    if console.json:
        console.out_json([_step_json(step, dry_run=settings.dry_run) for step in steps])
        return 0
    for step in steps:
        if settings.dry_run:
            console.out(f"-- {step.description}: already so" if step.done else f"{step.sql};")
        else:
            console.out(f"{step.description}: {'already so' if step.done else 'done'}")
    return 0


def _step_json(step: Step, *, dry_run: bool) -> dict[str, Any]:
    state = "already" if step.done else "planned" if dry_run else "done"
    return {"description": step.description, "sql": step.sql, "state": state}


def _check(settings: Settings) -> int:
    console = Console(settings)
    scheme = registry.scheme_of(settings.url)
    role = getattr(settings, "as") or ("leader" if scheme == "postgresql" else "follower")
    findings = _findings(settings, role, scheme)
    if console.json:
        console.out_json([_finding_json(finding) for finding in findings])
    else:
        console.note(f"{shown(settings.url)} as a {role}:")
        for finding in findings:
            _print(console, finding)
    return ConfigurationError.exit_code if any(finding.level == "error" for finding in findings) else 0


def _findings(settings: Settings, role: str, scheme: str) -> list[Finding]:
    if role == "leader":
        with leader_session(settings.url, settings) as (connection, names):
            if settings.format is Format.TRIGGER:
                return check_triggers(connection, names)
            return check_leader(connection, names, polling=settings.polling)
    if scheme == "postgresql":
        with closing(connect(settings.url)) as connection:
            return check_follower(connection, None)
    return _file_findings(settings.url, scheme)


def _file_findings(url: str, scheme: str) -> list[Finding]:
    """A follower in a file: it can be opened if it is there, or its directory takes it. Creates nothing."""
    store = registry.store(url)
    path = Path(url.partition("://")[2].removeprefix("/"))
    if path.exists():
        with closing(store.connect_store(url)) as opened:
            streams = ", ".join(sorted(opened.checkpoints())) or "none yet"
        return [Finding("ok", scheme, f"{path} can be opened; streams applied: {streams}")]
    if path.absolute().parent.is_dir():
        return [Finding("ok", scheme, f"{path} will be made")]
    message = f"there is no directory {path.absolute().parent}"
    return [Finding("error", scheme, message, (f"-- mkdir -p {path.absolute().parent}",))]


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {
        "level": finding.level,
        "subject": finding.subject,
        "message": finding.message,
        "statements": list(finding.statements),
    }


def _print(console: Console, finding: Finding) -> None:
    console.out(f"{finding.level:<{_LEVEL_WIDTH}} {finding.subject}: {finding.message}")
    for line in finding.remedy.splitlines():
        console.out(f"{' ' * _LEVEL_WIDTH} {line}")
