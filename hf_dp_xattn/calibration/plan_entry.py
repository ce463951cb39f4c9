"""A plan of `kernel_sum` for one epsilon, as a calibration keeps it, and the sketch that it describes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..mechanisms.kernel_sum.sketch import SketchBasis, SketchPlan
from ..privacy.lattice import lattice_exponent


@dataclass(frozen=True)
class PlanEntry:
    """The part of a `SketchPlan` that depends on epsilon, and the FVU predicted for it on public contexts."""

    epsilon: float
    delta: float
    clip_norm: float
    weight: torch.Tensor
    center: torch.Tensor
    mean_a: torch.Tensor
    cov_y: torch.Tensor
    cov_zy: torch.Tensor
    predicted_fvu: float

    TENSORS = ("weight", "center", "mean_a", "cov_y", "cov_zy")
    NUMBERS = ("epsilon", "delta", "clip_norm", "predicted_fvu")


def sketch_plan(entry: PlanEntry, basis: SketchBasis, units: int) -> SketchPlan:
    """The sketch that a plan entry describes, for contexts of about `units` units."""
    return SketchPlan(
        basis=basis,
        exponent=lattice_exponent(entry.clip_norm),
        clip_norm=entry.clip_norm,
        units=units,
        **{name: getattr(entry, name) for name in PlanEntry.TENSORS},
    )
