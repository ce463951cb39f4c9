"""Errors of other code, whose words may quote private text: raised as our own, without theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def unquoted(
    run: Callable[[], T],
    say: Callable[[str], Exception],
    kinds: tuple[type[Exception], ...] = (Exception,),
) -> T:
    """What `run` returns. `raise ... from None` would keep the other error as `__context__`, where debuggers and error trackers read it.

    Args:
        run: may fail with words that quote what it was given.
        say: the error that is raised in its stead, by the name of the class that failed.
        kinds: of errors that are replaced; others pass.
    """
    try:
        return run()
    except kinds as error:
        name = type(error).__name__
    raise say(name)
