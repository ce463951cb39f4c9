"""`mechanism="none"`: exact attention through the same shape, without noise. NOT private; for parity tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import DPXAttnConfig
from ..errors import ContextError
from ..privacy.bits import Entropy
from .base import GuaranteeNumbers, Integers, LayerSpec, Mechanism, NoisePart, State
from .inputs import LayerRows, count_rows
from .structure import ExactStructure


@dataclass(frozen=True)
class PreparedExact(Mechanism[LayerRows]):
    """Keeps the rows themselves."""

    config: DPXAttnConfig
    specs: tuple[LayerSpec, ...]
    warnings: tuple[str, ...] = ("mechanism='none' is exact attention: NOT private.",)
    calibrated: bool = False

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return ()

    @property
    def numbers(self) -> GuaranteeNumbers:
        return GuaranteeNumbers(clip_norm=math.inf, sensitivity=math.inf, sigma=0.0)

    def count(self, private: LayerRows, groups: torch.Tensor | None, *, empty: bool = False) -> int:
        n = count_rows(private)
        if n == 0 and not empty:
            raise ContextError("The context has no rows (n = 0).")
        if not all(bool(torch.isfinite(t).all()) for t in (*private.keys, *private.values)):
            raise ContextError("The context's keys or values hold NaN or Inf.")
        return n

    def exact(self, private: LayerRows, groups: torch.Tensor | None) -> Integers:
        return (*private.keys, *private.values)

    def noise(self, exact: Integers, entropy: Entropy) -> Integers:
        return exact

    def decode(self, noised: Integers, state: State) -> tuple[ExactStructure, ...]:
        layers = len(self.specs)
        return tuple(
            ExactStructure(k.unsqueeze(0), v.unsqueeze(0), spec.scale)
            for k, v, spec in zip(noised[:layers], noised[layers:], self.specs, strict=True)
        )


def prepare(config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: Any) -> PreparedExact:
    """`mechanism="none"` needs nothing of a calibration."""
    return PreparedExact(config, tuple(specs))
