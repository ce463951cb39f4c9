"""What is told where something fails after the charge: one line, with what was spent and where the release is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DPXAttnError

if TYPE_CHECKING:
    from .watched_ledger import WatchedLedger

STOPPED = "Stopped. Nothing was spent."
_LONGEST = 200  # characters of a foreign message


class CommandFailed(DPXAttnError):
    """The input was good and the command failed all the same. The message says what was spent; the exit code is 1."""


class Stopped(CommandFailed):
    """Ctrl-C before anything was spent; the exit code is 130, as shells have it."""


@dataclass
class Stage:
    """doing: what is under way, for a message. private: the private text takes part, so that a foreign message is not shown.
    kept: the folder of the release, once it is there."""

    doing: str
    private: bool = True
    kept: str | None = None


@contextmanager
def watching(ledger: WatchedLedger | None, stage: Stage) -> Iterator[Stage]:
    """Runs what releases a private text and what is made from it. ledger: None where a saved release is read.

    Raises:
        CommandFailed: anything failed after the charge, or (with a saved release) something that is not the package's own failed. Before
            the charge everything is raised as it is.
    """
    try:
        yield stage
    except (Exception, KeyboardInterrupt) as error:
        if ledger is None:
            if isinstance(error, KeyboardInterrupt):
                raise Stopped("Stopped. Nothing was charged, and the saved release is as it was.") from None
            if isinstance(error, DPXAttnError):
                raise
            what = f"{_failed(stage, error)} Nothing was charged, and the saved release is as it was."
            raise CommandFailed(what) from None
        if ledger.charged is None:
            if isinstance(error, KeyboardInterrupt):
                raise Stopped(STOPPED) from None
            raise
        raise CommandFailed(f"{_failed(stage, error)} {_state(ledger, stage)}") from None


def _failed(stage: Stage, error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"{stage.doing} was stopped."
    kind = type(error).__name__
    said = "" if stage.private else " ".join(str(error).split())
    if len(said) > _LONGEST:
        said = said[:_LONGEST] + " ..."
    return f"{stage.doing} failed ({kind}{': ' if said else ''}{said})."


def _state(ledger: WatchedLedger, stage: Stage) -> str:
    name = repr(ledger.place) if ledger.persistent else "the ledger"
    charged = f"The release {ledger.charged} to {name}"
    if stage.kept is not None:
        return f"{charged} and is kept in {stage.kept!r}: go on with --release {stage.kept}, which costs nothing."
    return f"{charged}, was not kept and is lost; the ledger refuses another where it exceeds the budget."
