"""Time to first token, time per token, and the part of it that is spent in the layers which attend to the context."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Timed:
    """Seconds. first: to the first token, inputs included; token: of each later one (median); layers: of that, in the watched layers."""

    first: float
    token: float
    layers: float


class LayerClock:
    """Adds up the seconds in some modules (their projections included)."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.total, self._start = 0.0, 0.0
        self._modules = modules
        self._hooks: list[Any] = []

    def __enter__(self) -> LayerClock:
        for module in self._modules:
            self._hooks += [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self.total += time.perf_counter() - self._start


class TokenClock(BaseStreamer):
    """Reads the time whenever `generate` has a token; the first call brings the prompt."""

    def __init__(self, layers: LayerClock) -> None:
        self._layers = layers
        self.readings: list[tuple[float, float]] = []

    def put(self, value: torch.Tensor) -> None:
        self.readings.append((time.perf_counter(), self._layers.total))

    def end(self) -> None:
        pass


def answer(
    model: Any, inputs: Callable[[], dict[str, Any]], layers: Sequence[nn.Module], count: int
) -> Timed:
    """Greedy `generate` of `count` tokens after the first, as users call it."""
    with ExitStack() as stack:
        watched = stack.enter_context(LayerClock(layers))
        clock = TokenClock(watched)
        start = time.perf_counter()
        model.generate(**inputs(), max_new_tokens=count + 1, do_sample=False, streamer=clock)
    tokens = clock.readings[1:]
    if len(tokens) != count + 1:
        raise SystemExit(f"{len(tokens)} tokens instead of {count + 1}: no times are printed.")
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(tokens)]
    return Timed(tokens[0][0] - start, median(s[0] for s in steps), median(s[1] for s in steps))
