"""What can go wrong, sorted by what to do next.

Every error carries three attributes that callers may rely on:

- ``exit_code``: the process exit status (README, "Exit codes");
- ``retriable``: whether trying the same thing again may succeed;
- ``remedy``: one sentence the operator can act on.

Retry lives in one place, :mod:`cdc.pipeline`, which reads these attributes and nothing else.
"""

from typing import ClassVar


class CdcError(Exception):
    """Base of everything raised on purpose. The message is lower-case and holds the offending value."""

    exit_code: ClassVar[int] = 70
    retriable: ClassVar[bool] = False
    # Did the failed operation certainly not happen? False where only re-reading the peer can tell.
    definite: ClassVar[bool] = True
    default_remedy: ClassVar[str] = "report this as a bug, with the command and its output"

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy or self.default_remedy
        self.located = False
        """The message already says where in the topic."""


class UsageError(CdcError):
    """The command or a URL is not one we understand."""

    exit_code = 64
    default_remedy = "see `cdc --help`"


class DecodeError(CdcError):
    """Bytes that are not what they claim to be: corrupt, truncated, hostile, or of an unknown version."""

    exit_code = 65
    default_remedy = "do not skip it: compare the topic with a backup, or take a new image with `cdc ship --image new`"


class UnavailableError(CdcError):
    """A peer cannot be reached, or went away."""

    exit_code = 69
    retriable = True
    default_remedy = "check that the server is up and the address is right; the stream resumes where it was"


class OutcomeUnknownError(UnavailableError):
    """A peer went away after it was told to do something: only re-reading it tells whether it did."""

    definite = False


class LocalIOError(CdcError):
    """A file of ours cannot be read or written (disk full, permission, I/O error)."""

    exit_code = 74
    default_remedy = "free disk space or mend the file's permissions, then start again: nothing was counted as done"


class TransientError(CdcError):
    """The follower or leader refused for a passing reason: deadlock, serialization, lock timeout."""

    exit_code = 75
    retriable = True
    default_remedy = "start again: the stream resumes where it was"


class AccessError(CdcError):
    """Authentication failed or a privilege is missing."""

    exit_code = 77
    default_remedy = "grant what is missing; `cdc check` prints the statements"


class ConfigurationError(CdcError):
    """The leader, follower or broker is not set up for what is asked of it."""

    exit_code = 78
    default_remedy = "run `cdc check`, which prints what to change"


class GapError(CdcError):
    """A hole between what was applied (or shipped) and what comes next. Nobody steps over a hole."""

    exit_code = 80
    default_remedy = "take a new image with `cdc ship --image new`, then load it with `cdc apply --reload`"


class DivergedError(GapError):
    """A newer epoch of the leader branched off below what was already applied."""

    default_remedy = (
        "the follower holds writes that the new leader never had: compare with `cdc verify`, "
        "then rebuild the follower from a new image"
    )


class ConflictError(CdcError):
    """A change does not fit the follower's data: a person must decide."""

    exit_code = 81
    default_remedy = "mend the follower's row, or rebuild the follower; nothing of this transaction was applied"


class SchemaError(ConflictError):
    """A change does not fit the follower's table: wrong columns or types."""

    default_remedy = "change the follower's table as the message says; nothing of this transaction was applied"


class FencedError(CdcError):
    """Another process owns this stream."""

    exit_code = 82
    default_remedy = "stop the other process, or leave it running and do not start this one"
