"""``cdc``: arguments in, exit status out. An error becomes one message with its remedy."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

import cdc
from cdc.cli.options import COMMANDS, Argument, Command, Settings, options_of
from cdc.cli.urls import without_password
from cdc.config import Option, read_file, resolve
from cdc.errors import CdcError, LocalIOError, UsageError

EXIT_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status (README, "Exit codes")."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments
    _accept_any_text()
    try:
        settings = _settings(arguments, os.environ)
        verbose = settings.verbose
        status: int = import_module(COMMANDS[settings.command].module).run(settings)
        sys.stdout.flush()
    except SystemExit as done:  # argparse's --help and --version
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001
        return _report(error, verbose=verbose)
    return status


def _accept_any_text() -> None:
    """A name that the terminal's encoding lacks must not end a command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _settings(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    given = vars(_parser().parse_args(arguments))
    command: str = given["command"]
    options = options_of(command)
    known = {name: options_of(name) for name in COMMANDS}
    flags = {option.name: given[option.name] for option in options if option.name in given}
    path = flags.get("config") or environ.get("CDC_CONFIG")
    file = read_file(Path(path), command, known) if path else {}
    places = {argument.name: given[argument.name] for argument in COMMANDS[command].arguments}
    return Settings(command=command, **places, **resolve(options, flags=flags, environ=environ, file=file))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cdc",
        description="Carry a leader's replication log to followers, and see through it.",
        epilog="Try it: cdc demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cdc {cdc.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        _add_command(commands.add_parser, name, command)
    return parser


def _add_command(add_parser: Any, name: str, command: Command) -> None:
    parser = add_parser(
        name,
        help=command.help,
        description=f"{command.help[0].upper()}{command.help[1:]}.",
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for argument in command.arguments:
        _add_argument(parser, argument)
    for option in options_of(name):
        _add_option(parser, option)


def _add_argument(parser: argparse.ArgumentParser, argument: Argument) -> None:
    parser.add_argument(argument.name, metavar=argument.name.upper(), nargs=argument.nargs, help=argument.help)


def _add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    """Kept as text, or absent: only :mod:`cdc.config` reads values, wherever they come from."""
    flag, text = f"--{option.name}", option.help.replace("%", "%%")
    if option.parse is None:
        parser.add_argument(flag, dest=option.name, action="store_true", default=argparse.SUPPRESS, help=text)
    else:
        metavar = option.metavar or option.name.upper()
        parser.add_argument(flag, dest=option.name, metavar=metavar, default=argparse.SUPPRESS, help=text)


def _report(error: Exception, *, verbose: bool) -> int:
    """Say what went wrong and what to do, and return the exit status that means it."""
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has enough. Python's own flush at exit must not fail on it again.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if verbose:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, CdcError):
        message, remedy, status = str(error), error.remedy, error.exit_code
    elif isinstance(error, OSError):
        message, remedy, status = str(error), LocalIOError.default_remedy, LocalIOError.exit_code
    else:
        message, remedy, status = f"{type(error).__name__}: {error}", CdcError.default_remedy, CdcError.exit_code
    if status == CdcError.exit_code and not verbose:
        remedy += "; `--verbose` shows where it happened"
    with contextlib.suppress(OSError):
        print(without_password(f"cdc: error: {message}\nremedy: {remedy}"), file=sys.stderr, flush=True)  # noqa: T201
    return status
