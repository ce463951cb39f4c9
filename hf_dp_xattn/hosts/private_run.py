"""Running an encoder on what may be private: open for that moment, in evaluation mode, and without a word in the logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from torch import nn

from .access import gates_of
from .transformers.routing import evaluating

LIBRARIES = ("accelerate", "diffusers", "peft", "tokenizers", "transformers")
_silent: ContextVar[bool] = ContextVar("hf_dp_xattn_silent", default=False)


class _Silence(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _silent.get()


_SILENCE = _Silence()


@contextmanager
def unlogged() -> Iterator[None]:
    """While it lasts, the libraries that run a host log nothing in this context; other threads and tasks log as ever."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in LIBRARIES:
            logger.addFilter(_SILENCE)  # once, however often it is added
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)


@contextmanager
def private_run(*modules: nn.Module) -> Iterator[None]:
    """While it lasts, these modules encode what may be private; their gates let them.

    A model in training mode would release a text with dropout in it, and draw from the process's random numbers as often as the text is
    long: whatever is drawn afterwards from a known seed would tell its length. And libraries log what they notice: that a text begins with
    padding, or how long it is.

    Args:
        modules: all that runs.
    """
    with ExitStack() as stack:
        stack.enter_context(unlogged())
        for module in modules:
            stack.enter_context(evaluating(module))
        # other protected hosts may share it
        for own in {gate.access for module in modules for gate in gates_of(module)}:
            stack.enter_context(own.enter("encoding"))
        yield
