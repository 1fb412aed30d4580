"""Options: flags over environment over file, and what is refused."""

from pathlib import Path

import pytest

from cdc.cli.options import COMMANDS, options_of
from cdc.config import Option, read_file, resolve, select
from cdc.errors import UsageError

PORT = Option("http-port", "a port", int, 80)
QUIET = Option("quiet", "no notes", None, False)
KNOWN = {"ship": (PORT, QUIET), "apply": (QUIET,)}


def test_precedence() -> None:
    flags, environ, file = {"http-port": "1"}, {"CDC_HTTP_PORT": "2"}, {"http-port": 3}
    assert resolve([PORT], flags=flags, environ=environ, file=file) == {"http_port": 1}
    assert resolve([PORT], flags={}, environ=environ, file=file) == {"http_port": 2}
    assert resolve([PORT], flags={}, environ={}, file=file) == {"http_port": 3}
    assert resolve([PORT], flags={}, environ={}, file={}) == {"http_port": 80}


@pytest.mark.parametrize(("word", "meaning"), [("1", True), ("Yes", True), ("", False), ("off", False), ("0", False)])
def test_flag_in_environment(word: str, meaning: bool) -> None:
    assert resolve([QUIET], flags={}, environ={"CDC_QUIET": word}, file={}) == {"quiet": meaning}


@pytest.mark.parametrize(
    ("option", "flags", "environ", "file", "place"),
    [
        (PORT, {"http-port": "x"}, {}, {}, "--http-port"),
        (PORT, {}, {"CDC_HTTP_PORT": "x"}, {}, "CDC_HTTP_PORT in the environment"),
        (PORT, {}, {}, {"http-port": "x"}, "http-port in the configuration file"),
        (PORT, {}, {}, {"http-port": True}, "http-port in the configuration file"),
        (QUIET, {}, {"CDC_QUIET": "perhaps"}, {}, "CDC_QUIET in the environment"),
    ],
)
def test_bad_value_names_its_place(
    option: Option, flags: dict[str, str], environ: dict[str, str], file: dict[str, object], place: str
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve([option], flags=flags, environ=environ, file=file)
    assert place in str(caught.value)


def test_command_table_wins_over_top_level() -> None:
    document = {"quiet": True, "http-port": 1, "ship": {"http-port": 2}, "apply": {"quiet": False}}
    assert select(document, "ship", KNOWN) == {"quiet": True, "http-port": 2}
    assert select(document, "apply", KNOWN) == {"quiet": False}


@pytest.mark.parametrize(
    ("document", "where"), [({"colour": 1}, "the top level"), ({"apply": {"http-port": 1}}, "table [apply]")]
)
def test_unknown_key(document: dict[str, object], where: str) -> None:
    with pytest.raises(UsageError, match="unknown key") as caught:
        select(document, "ship", KNOWN)
    assert where in str(caught.value)
    assert "quiet" in caught.value.remedy


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "cdc.toml"
    path.write_text('stream = "orders"\ntables = ["a", "b.c"]\n[ship]\nlinger-ms = 2.5\n')
    known = {name: options_of(name) for name in COMMANDS}
    assert read_file(path, "ship", known) == {"stream": "orders", "linger-ms": 2.5}
    setup = read_file(path, "setup", known)
    assert resolve(options_of("setup"), flags={}, environ={}, file=setup)["tables"] == ["a", "b.c"]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the configuration file"):
        read_file(tmp_path / "absent", "ship", KNOWN)
    path = tmp_path / "broken"
    path.write_text("= 1")
    with pytest.raises(UsageError, match="is not TOML"):
        read_file(path, "ship", KNOWN)
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="cannot read the configuration file"):
        read_file(path, "ship", KNOWN)


def test_an_option_means_one_thing_everywhere() -> None:
    """The top level of a file holds for every command, so a name may not have two meanings."""
    parsers = [(option.name, option.parse) for command in COMMANDS for option in options_of(command)]
    shared = {name for name, _ in parsers} - {"until"}
    for name in shared:
        assert len({parse for other, parse in parsers if other == name}) == 1, name
