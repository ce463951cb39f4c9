"""A search for private rows among all tensors that enter or leave the modules of a model while it answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WIDTH = 8  # neighbouring numbers of a row that are looked for together


def _windows(tensor: torch.Tensor) -> torch.Tensor:
    """[m] int64 names of all aligned windows, of which equal ones have equal names. Rounded to bfloat16, so that another order of
    summation changes few of them; windows that hold NaN or one number only are left out."""
    if not tensor.is_floating_point() or tensor.shape[-1] < WIDTH:
        return torch.zeros(0, dtype=torch.int64)
    values = tensor.detach().to("cpu", torch.bfloat16)
    values = values[..., : values.shape[-1] // WIDTH * WIDTH].reshape(-1, WIDTH)
    telling = values.isfinite().all(-1) & (values != values[:, :1]).any(-1)
    bits = values[telling].view(torch.int16).to(torch.int64)
    factors = torch.tensor(
        [(2 * i + 3) ** 25 % (2**61 - 1) for i in range(WIDTH)]
    )  # a hash; int64 wraps around
    return (bits * factors).sum(-1)


class Spy:
    """Counts how many tensors hold a window of the private rows [n, C]. modules, tensors: how many were looked at.

    unless: rows whose windows are not looked for.
    """

    def __init__(self, rows: torch.Tensor, unless: torch.Tensor | None = None) -> None:
        needles = _windows(rows).unique()
        self._needles = needles if unless is None else needles[~torch.isin(needles, _windows(unless))]
        self.modules = self.tensors = self.matches = 0

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """While inside, every forward of every module is looked at."""
        hooks = [m.register_forward_hook(self._look, with_kwargs=True) for m in model.modules()]
        self.modules = len(hooks)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        for tensor in _tensors([args, list(kwargs.values()), output]):
            self.tensors += 1
            self.matches += bool(torch.isin(_windows(tensor), self._needles).any())


def _tensors(thing: Any) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        if thing.ndim:
            yield thing
    elif isinstance(thing, dict):
        yield from _tensors(list(thing.values()))
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from _tensors(item)
