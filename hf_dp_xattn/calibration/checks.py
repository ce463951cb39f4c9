"""Checks of what a calibration's file holds. Each raises ConfigError, and says which part does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from ..errors import ConfigError


def refuse(what: str) -> NoReturn:
    raise ConfigError(
        f"The calibration's parts do not fit each other ({what}): it is damaged, or of another version. Download it again, or calibrate "
        "again."
    )


def check_keys(values: Any, known: set[str], where: str) -> None:
    """Unknown and missing keys are both errors."""
    if not isinstance(values, Mapping):
        refuse(f"{where} is no object")
    if set(values) != known:
        raise ConfigError(f"Unknown or missing keys in {where}: {sorted(set(values) ^ known)}.")


def number(value: Any, where: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high]."""
    bad = isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    if bad or not low <= value <= high:
        refuse(f"{where} is {value!r}")
    return float(value)


def integer(value: Any, where: str, *, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        refuse(f"{where} is {value!r}")
    return value


class Sizes:
    """Binds the names of dimensions to the sizes that are met first, and holds all later tensors to them."""

    def __init__(self, **known: int) -> None:
        self._known = known

    def fit(self, name: str, tensor: torch.Tensor, *dims: str | int) -> None:
        """The tensor is finite and has the shape `dims`: sizes, or names such as "K".

        Raises:
            ConfigError: it does not, or another tensor has another K.
        """
        expected = [self._known.get(d, d) if isinstance(d, str) else d for d in dims]
        same = tensor.ndim == len(dims) and all(
            isinstance(e, str) or e == size for e, size in zip(expected, tensor.shape, strict=True)
        )
        if not same:
            refuse(f"{name} has shape {list(tensor.shape)}, expected {expected}")
        for dim, size in zip(dims, tensor.shape, strict=True):
            if isinstance(dim, str):
                self._known[dim] = size
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            refuse(f"{name} holds NaN or Inf")

    def get(self, name: str) -> int:
        return self._known[name]
