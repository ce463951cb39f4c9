"""A call that is tried with a public text, through the first forward of a model: what is wrong with it shows before a charge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

import torch
from torch import nn

from ..random_states import random_kept


class Reached(BaseException):
    """The trial is over. No Exception: a host may catch those."""


@torch.compiler.disable
def _reach(module: nn.Module, args: Any, output: Any) -> NoReturn:
    raise Reached


@contextmanager
def one_step(models: Iterable[nn.Module], arguments: Iterable[Any]) -> Iterator[None]:
    """The block ends where one of these models has run. What is drawn inside does not count: the process's random numbers, and
    those of the generators among the arguments."""
    flat = [g for value in arguments for g in (value if isinstance(value, (list, tuple)) else [value])]
    states = [(g, g.get_state()) for g in flat if isinstance(g, torch.Generator)]
    with ExitStack() as stack:
        stack.enter_context(random_kept())
        for generator, state in states:
            stack.callback(generator.set_state, state)
        for model in models:
            stack.callback(model.register_forward_hook(_reach).remove)
        with suppress(Reached):
            yield
