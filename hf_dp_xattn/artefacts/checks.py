"""Strict checks of what a file holds: keys, numbers, and shapes by the names of their dimensions. Each says which part does not fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import DPXAttnError

if TYPE_CHECKING:
    import torch


_LARGEST = sys.float_info.max  # integers of JSON have no end


@dataclass(frozen=True)
class Checks:
    """The checks of one kind of artefact.

    Args:
        word: what it is called ("calibration").
        error: what is raised.
        again: what to do where no good copy is left ("calibrate again").
    """

    word: str
    error: type[DPXAttnError]
    again: str

    def refuse(self, what: str) -> NoReturn:
        """Raises `error`: this part does not fit."""
        raise self.error(
            f"The {self.word}'s parts do not fit each other ({what}): it is damaged, or of another version. Download it again, or "
            f"{self.again}."
        )

    def keys(self, values: Any, known: Set[str], where: str, *, optional: Set[str] = frozenset()) -> None:
        """Unknown and missing keys are both refused; `optional` ones may be missing."""
        if not isinstance(values, Mapping):
            self.refuse(f"{where} is no object")
        if set(values) - optional != known:
            self.refuse(f"unknown or missing keys in {where}: {sorted(set(values) ^ known)}")

    def number(self, value: Any, where: str, *, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number in [low, high]."""
        bad = isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST
        if bad or not low <= value <= high:
            self.refuse(f"{where} is {value!r}")
        return float(value)

    def integer(self, value: Any, where: str, *, low: int = 1, high: int = 2**53) -> int:
        """An integer in [low, high]; True is none."""
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(f"{where} is {value!r}")
        return value

    def texts(self, value: Any, where: str) -> tuple[str, ...]:
        """A list of texts."""
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            self.refuse(f"{where} is no list of texts")
        return tuple(value)

    def name(self, value: Any, where: str) -> str:
        """A text, such as the name of a class."""
        if not isinstance(value, str):
            self.refuse(f"{where} is no text")
        return value

    def sizes(self, **known: int) -> Sizes:
        """Checks of shapes that share the sizes of their dimensions."""
        return Sizes(self, known)


class Sizes:
    """Binds the names of dimensions to the sizes that are met first, and holds all later tensors to them."""

    def __init__(self, checks: Checks, known: dict[str, int]) -> None:
        self._checks, self._known = checks, known

    def __getitem__(self, name: str) -> int:
        return self._known[name]

    def fit(self, name: str, tensor: torch.Tensor, *dims: str | int, floats: bool = False) -> None:
        """Refuses a tensor that is not finite, or not of the shape `dims`.

        Args:
            name: of the tensor, for the message.
            tensor: of any device and dtype.
            dims: sizes, or names such as "K": the same size wherever the name stands.
            floats: refuse integers as well.
        """
        expected = [self._known.get(d, d) if isinstance(d, str) else d for d in dims]
        same = tensor.ndim == len(dims) and all(
            (self._known.setdefault(dim, size) if isinstance(dim, str) else dim) == size
            for dim, size in zip(dims, tensor.shape, strict=True)
        )
        if not same:
            self._checks.refuse(f"{name} has shape {list(tensor.shape)}, expected {expected}")
        if floats and not tensor.is_floating_point():
            self._checks.refuse(f"{name} holds no floats")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            self._checks.refuse(f"{name} holds NaN or Inf")
