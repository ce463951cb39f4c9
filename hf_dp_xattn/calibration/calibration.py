"""`Calibration`: everything data-dependent that was computed from PUBLIC contexts only. Saved as safetensors + JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from ..artefacts import HubOptions, find_files, read_document
from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..mechanisms.base import LayerSpec
from ..mechanisms.kernel_sum.contributions import lattice_exponent
from ..mechanisms.kernel_sum.geometry import HeadGeometry
from ..mechanisms.kernel_sum.sketch import SketchBasis, SketchPlan
from .anchors.anchors_calibration import AnchorCalibration
from .anchors.files import KIND, load_anchors
from .files import load_kernel_sum, save_kernel_sum
from .stored import JSON_NAME, TENSORS_NAME, Shared

if TYPE_CHECKING:
    pass

# A calibration is made for these fields of the config; epsilon may differ (the nearest plan is used).
BOUND_FIELDS = ("features", "degree", "num_features", "feature_seed", "logit_bound", "unit")


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

    @classmethod
    def from_parts(cls, numbers: dict[str, Any], tensors: dict[str, Any]) -> PlanEntry:
        """Raises TypeError on a missing or unknown part."""
        return cls(**numbers, **tensors)


def sketch_plan(entry: PlanEntry, basis: SketchBasis, units: int) -> SketchPlan:
    """The sketch that a plan entry describes, for contexts of about `units` units."""
    return SketchPlan(
        basis=basis,
        exponent=lattice_exponent(entry.clip_norm),
        clip_norm=entry.clip_norm,
        units=units,
        **{name: getattr(entry, name) for name in PlanEntry.TENSORS},
    )


@dataclass(frozen=True)
class Calibration(Shared):
    """Public geometry, clipping bound, sketch basis and plans for one model's layers.

    Nothing in here may depend on a private context: it is not noised and is not counted.
    """

    layers: tuple[str, ...]
    geometries: tuple[HeadGeometry, ...]
    settings: dict[str, Any]
    clip_norm: float
    contexts: int
    units: int
    basis: SketchBasis | None = None
    plans: tuple[PlanEntry, ...] = ()
    _cache: dict[float, SketchPlan] = field(default_factory=dict, repr=False, compare=False)

    def check(self, config: DPXAttnConfig, specs: Sequence[LayerSpec]) -> None:
        """Raises ConfigError unless the calibration was made for these layers and these settings."""
        for name in BOUND_FIELDS:
            if getattr(config, name) != self.settings[name]:
                raise ConfigError(
                    f"The calibration was made with {name}={self.settings[name]!r}, the config says {getattr(config, name)!r}. "
                    "Calibrate again, or change the config."
                )
        shapes = [(s.name, s.heads, s.key_dim, s.value_dim) for s in specs]
        own = [
            (n, g.heads, g.key_dim, g.value_dim) for n, g in zip(self.layers, self.geometries, strict=True)
        ]
        if shapes != own:
            raise ConfigError(
                "The calibration is for another model: layer names or shapes differ. Calibrate for this one."
            )

    def plan(self, config: DPXAttnConfig) -> SketchPlan | None:
        """The sketch to release at config.epsilon, or None where there is none (no basis, or n not public)."""
        if self.basis is None or not self.plans or config.neighboring != "replace_one":
            return None
        # Any plan is private at any epsilon (the noise is always set for the config); the nearest one is the most useful.
        entry = min(self.plans, key=lambda p: abs(math.log(p.epsilon / config.epsilon)))
        if entry.epsilon not in self._cache:
            self._cache[entry.epsilon] = sketch_plan(entry, self.basis, self.units)
        return self._cache[entry.epsilon]

    def _write(self, folder: Path) -> None:
        save_kernel_sum(self, folder)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], **options: Unpack[HubOptions]
    ) -> Calibration | AnchorCalibration:
        """Reads a folder or a Hub repository (`HubOptions`), of whichever mechanism; raises ConfigError on anything missing, unknown,
        damaged or of another schema."""
        folder = find_files(name_or_path, (JSON_NAME, TENSORS_NAME), error=ConfigError, **options)
        return load_calibration(folder)


def load_calibration(folder: Path) -> Calibration | AnchorCalibration:
    """Reads and checks the files in a local folder, of whichever mechanism; raises ConfigError."""
    kind = read_document(folder / JSON_NAME, ConfigError).get("kind")
    return load_anchors(folder) if kind == KIND else load_kernel_sum(folder)
