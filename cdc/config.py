"""Options from the command line, the environment and a TOML file, in this order of precedence.

An option ``--retry-s`` is ``CDC_RETRY_S`` in the environment and ``retry-s`` in the file. The file's top level holds
for every command; a table named after a command holds for that one and wins over the top level::

    stream = "orders"
    [ship]
    linger-ms = 20
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cdc.errors import UsageError

_NO_WORDS: Final = {"": False, "0": False, "no": False, "false": False, "off": False}
_YES_WORDS: Final = {"1": True, "yes": True, "true": True, "on": True}


@dataclass(frozen=True, slots=True)
class Option:
    """One option of one or more commands. ``parse`` raises UsageError or ValueError; a flag has none."""

    name: str
    help: str
    parse: Callable[[str], Any] | None = str
    default: Any = None
    metavar: str | None = None

    @property
    def key(self) -> str:
        """Its name as an attribute."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return f"CDC_{self.key.upper()}"


def resolve(
    options: Sequence[Option], *, flags: Mapping[str, str | bool], environ: Mapping[str, str], file: Mapping[str, Any]
) -> dict[str, Any]:
    """Every option's value by its key. ``flags`` and ``file`` are by name, and hold only what was given.

    :raises UsageError: a value that its option does not take, with the place it came from.
    """
    return {option.key: _value(option, flags, environ, file) for option in options}


def _value(option: Option, flags: Mapping[str, str | bool], environ: Mapping[str, str], file: Mapping[str, Any]) -> Any:
    if option.name in flags:
        return _parsed(option, flags[option.name], f"--{option.name}")
    if option.variable in environ:
        return _parsed(option, environ[option.variable], f"{option.variable} in the environment")
    if option.name in file:
        return _parsed(option, file[option.name], f"{option.name} in the configuration file")
    return option.default


def _parsed(option: Option, value: Any, place: str) -> Any:
    if option.parse is None:
        return _truth(value, place)
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if isinstance(value, (bool, dict)):
        raise UsageError(f"{place} is {value!r}", remedy=f"it takes: {option.help}")
    try:
        return option.parse(str(value))
    except UsageError as error:
        raise UsageError(f"{place}: {error}", remedy=error.remedy) from error
    except ValueError as error:
        raise UsageError(f"{place} is {value!r}: {error}", remedy=f"it takes: {option.help}") from error


def _truth(value: Any, place: str) -> bool:
    words: Mapping[str, bool] = _NO_WORDS | _YES_WORDS
    word = str(value).lower()
    if word not in words:
        raise UsageError(f"{place} is {value!r}", remedy="write true or false")
    return words[word]


def read_file(path: Path, command: str, known: Mapping[str, Sequence[Option]]) -> dict[str, Any]:
    """What a TOML file says for ``command``. ``known`` holds the options of every command.

    :raises UsageError: the file cannot be read, or says something nobody understands.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the configuration file {path}: {getattr(error, 'strerror', None) or error}",
            remedy="name a readable file with --config",
        ) from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{path} is not TOML: {error}", remedy="mend that line (https://toml.io); texts stand in double quotes"
        ) from error
    return select(document, command, known)


def select(document: Mapping[str, Any], command: str, known: Mapping[str, Sequence[Option]]) -> dict[str, Any]:
    """The values that hold for ``command``, by option name.

    :raises UsageError: an unknown key.
    """
    tables = {key: value for key, value in document.items() if key in known and isinstance(value, dict)}
    common = {key: value for key, value in document.items() if key not in tables}
    _must_know("the top level", common, {option.name for options in known.values() for option in options})
    for name, table in tables.items():
        _must_know(f"table [{name}]", table, {option.name for option in known[name]})
    mine = {option.name for option in known[command]}
    return {key: value for key, value in {**common, **tables.get(command, {})}.items() if key in mine}


def _must_know(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise UsageError(
            f"unknown key {unknown[0]!r} at {where} of the configuration file",
            remedy=f"known keys are {', '.join(sorted(known))}",
        )
