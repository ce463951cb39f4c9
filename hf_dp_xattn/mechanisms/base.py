"""What a mechanism is given, and what it gives back: the types between hosts, calibrations and mechanisms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..config import DPXAttnConfig
from ..privacy.accountant import Event
from ..privacy.bits import Entropy
from ..report import Guarantee
from .kernel_sum.geometry import HeadGeometry, declared_geometry, weights_geometry
from .kernel_sum.sketch import SketchPlan
from .structure import AttentionStructure

NO_CALIBRATION = (
    "No calibration: the clipping bound is the declared one (logit_bound, value_bound), keys and values are neither centred nor "
    "rotated, and nothing is shrunk to a public prior. A calibration on public contexts (dpx.calibrate) spends no privacy budget: it "
    "fits the bound to what public contexts need and releases only the directions in which they differ, so there is less noise."
)


@dataclass(frozen=True)
class LayerSpec:
    """A layer's public shape: heads, dims of keys and values, the logit scale, and (for hosts) its public weights.

    query_weight, key_weight: [H, d, channels] or None.
    """

    name: str
    heads: int
    key_dim: int
    value_dim: int
    scale: float
    query_weight: torch.Tensor | None = None
    key_weight: torch.Tensor | None = None

    def geometry(self, config: DPXAttnConfig) -> HeadGeometry:
        """The conservative geometry that needs no data."""
        if self.query_weight is None or self.key_weight is None:
            return declared_geometry(
                self.heads,
                self.key_dim,
                self.value_dim,
                scale=self.scale,
                logit_bound=config.logit_bound,
                value_bound=config.value_bound,
            )
        return weights_geometry(
            self.query_weight,
            self.key_weight,
            self.value_dim,
            scale=self.scale,
            logit_bound=config.logit_bound,
            value_bound=config.value_bound,
            projection_dim=config.projection_dim,
        )


@dataclass(frozen=True)
class LayerRelease:
    """What left: one structure per layer (batch 1 each), and what is promised about them."""

    structures: tuple[AttentionStructure, ...]
    guarantee: Guarantee


class PreparedRelease(Protocol):
    """Everything public is decided; `events` must be charged before `run` touches the context."""

    @property
    def config(self) -> DPXAttnConfig: ...

    @property
    def events(self) -> tuple[Event, ...]: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...

    def run(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        groups: torch.Tensor | None = None,
        entropy: Entropy | None = None,
    ) -> LayerRelease: ...


class PublicCalibration(Protocol):
    """What kernel_sum reads of a calibration (`calibration/calibration.py`); all of it from public data."""

    @property
    def geometries(self) -> Sequence[HeadGeometry]: ...

    @property
    def clip_norm(self) -> float: ...

    def check(self, config: DPXAttnConfig, specs: Sequence[LayerSpec]) -> None:
        """Raises ConfigError unless it was made for these layers and settings."""
        ...

    def plan(self, config: DPXAttnConfig) -> SketchPlan | None:
        """The sketch to release, or None for the full sums."""
        ...
