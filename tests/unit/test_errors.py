"""Errors sort by what to do next."""

import pytest

from cdc import errors
from cdc.errors import CdcError


def _below(kind: type[CdcError]) -> list[type[CdcError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _below(child))]


_KINDS = [kind for kind in _below(CdcError) if kind.__module__ == errors.__name__]

# The design's table of exit codes: what a script may rely on.
_EXIT_CODES = {
    "CdcError": 70,
    "UsageError": 64,
    "DecodeError": 65,
    "UnavailableError": 69,
    "OutcomeUnknownError": 69,
    "LocalIOError": 74,
    "TransientError": 75,
    "AccessError": 77,
    "ConfigurationError": 78,
    "GapError": 80,
    "DivergedError": 80,
    "ConflictError": 81,
    "SchemaError": 81,
    "FencedError": 82,
}


def test_every_error_has_the_exit_code_of_the_design() -> None:
    assert {kind.__name__: kind.exit_code for kind in _KINDS} == _EXIT_CODES


@pytest.mark.parametrize("kind", _KINDS)
def test_a_remedy_is_always_there_and_can_be_replaced(kind: type[CdcError]) -> None:
    assert kind("offset 7 is gone").remedy == kind.default_remedy
    assert kind("offset 7 is gone", remedy="read from 9").remedy == "read from 9"
    assert str(kind("offset 7 is gone", remedy="read from 9")) == "offset 7 is gone"
    assert kind.default_remedy
    assert not kind.default_remedy[0].isupper()
    assert not kind.default_remedy.endswith(".")


def test_only_passing_troubles_are_tried_again() -> None:
    retriable = {kind.__name__ for kind in _KINDS if kind.retriable}
    assert retriable == {"UnavailableError", "OutcomeUnknownError", "TransientError"}


def test_only_an_unknown_outcome_is_indefinite() -> None:
    assert {kind.__name__ for kind in _KINDS if not kind.definite} == {"OutcomeUnknownError"}
