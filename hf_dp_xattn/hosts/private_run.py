"""Running an encoder on what may be private: open for that moment, in evaluation mode, and with random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .access import gates_of
from .transformers.routing import evaluating


def parts_of(layer: Any) -> list[nn.Module]:
    """What runs when keys and values of a layer are made."""
    named = (getattr(layer, name, None) for name in ("module", "bridge", "to_k", "to_v"))
    return [part for part in named if isinstance(part, nn.Module)]


@contextmanager
def private_run(*modules: nn.Module) -> Iterator[None]:
    """While it lasts, these modules encode what may be private; their gates let them.

    A model in training mode would release a text with dropout in it, and draw from the process's random numbers as often as the text is
    long: whatever is drawn afterwards from a known seed would tell its length.

    Args:
        modules: all that runs.
    """
    devices = {p.device for m in modules for p in m.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(d.index or 0 for d in devices)))
        for module in modules:
            stack.enter_context(evaluating(module))
        # other protected hosts may share it
        for own in {gate.access for module in modules for gate in gates_of(module)}:
            stack.enter_context(own.enter("encoding"))
        yield
