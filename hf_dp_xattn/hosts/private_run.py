"""Running an encoder on what may be private: open for that moment, in evaluation mode, and without a word in the logs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, Token

from torch import nn

from .model_gates import accesses_of

_silent: ContextVar[bool] = ContextVar("hf_dp_xattn_silent", default=False)


class _WhileSilent(type):
    """Takes in all warnings of code that runs in silence."""

    def __subclasscheck__(cls, kind: type) -> bool:
        return _silent.get()


class _Unsaid(Warning, metaclass=_WhileSilent):
    """No warning is one, except in silence: what is filtered depends on who runs, and not on when (other threads warn as ever)."""


class _Silence(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _silent.get()


_SILENCE = _Silence()


def _silence() -> Token[bool]:
    """From now on no code logs or warns in this context, a user's encoder neither; other threads and tasks do as ever."""
    named = [y for y in list(logging.root.manager.loggerDict.values()) if isinstance(y, logging.Logger)]
    handlers = [h for y in (logging.root, *named) for h in y.handlers]  # of loggers that are made inside
    for said in (logging.root, *named, *handlers, logging.lastResort):
        if said is not None:
            said.addFilter(_SILENCE)  # once, however often it is added
    if not warnings.filters or warnings.filters[0][2] is not _Unsaid:
        warnings.filterwarnings("ignore", category=_Unsaid)
    return _silent.set(True)


def _evaluate(models: Iterable[nn.Module]) -> list[tuple[nn.Module, bool]]:
    modes = [(m, m.training) for model in models for m in model.modules()]
    for model in models:
        model.eval()
    return modes


def _restore(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in evaluation mode, every module's own mode restored afterwards."""
    modes = _evaluate(models)
    try:
        yield
    finally:
        _restore(modes)


@contextmanager
def opened(*modules: nn.Module) -> Iterator[None]:
    """The gates of these modules let them encode, of whichever protected hosts they are; other hosts may share them."""
    with ExitStack() as stack:
        for access in accesses_of(modules):
            stack.enter_context(access.enter("encoding"))
        yield


@contextmanager
def private_run(*modules: nn.Module) -> Iterator[None]:
    """While it lasts, these modules encode what may be private; their gates let them.

    A model in training mode would release a text with dropout in it, and draw from the process's random numbers as often as the text is
    long: whatever is drawn afterwards from a known seed would tell its length. And libraries log and warn of what they notice: that a text
    begins with padding, how long it is, or that it looks like an address.

    Args:
        modules: all that runs.
    """
    before, modes = _silence(), []
    try:
        modes = _evaluate(modules)
        with opened(*modules):
            yield
    finally:
        _restore(modes)
        _silent.reset(before)
