r"""`mechanism="dptree"`: the paper's trees through `release_attention` and `protect`, as one joint release over layers and heads.

*Formal guarantee.* **Released:** every node of every tree, the sums of weights and the weighted norms, over all layers, heads, coordinates
of P and channels, the normaliser's included, each with independent truncated discrete Laplace noise. **Neighbouring relation and unit:**
config's; a unit's joint contribution to each moment is clipped in l2 norm (tree_moments.py). **Theorem:** privacy/truncated_laplace.py,
steps 1 to 4; charged as ONE `TruncatedLaplaceEvent`. **Split:** `PreparedDPTree.split.table()`. Everything after it is post-processing.

*Cost.* 6 H (r - 1)(dv + 1) tree_bins numbers a layer are drawn, of which queries read 2 r - 1 for each channel and head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...config import DPXAttnConfig
from ...privacy.accountant import Event
from ...privacy.bits import Entropy, SystemEntropy
from ...privacy.noise import sampling_distance
from ...privacy.units import public_counts
from ...report import Guarantee
from ..base import NO_CALIBRATION, LayerRelease, LayerSpec, PublicCalibration
from .budget import BudgetSplit
from .softmax import SoftmaxPlan
from .tree_attention import plan_attention, release_layers
from .tree_structure import structure_of

BASELINE = "mechanism='dptree' is the paper's own construction, kept for reference; at equal privacy mechanism='kernel_sum' has less noise."


@dataclass(frozen=True)
class PreparedDPTree:
    """A tree release of which everything public is fixed. `events` must be charged before `run`."""

    config: DPXAttnConfig
    plan: SoftmaxPlan
    clip_norm: float
    warnings: tuple[str, ...]
    calibrated: bool

    @property
    def split(self) -> BudgetSplit:
        return self.plan.split

    @property
    def events(self) -> tuple[Event, ...]:
        return (self.plan.split.event,)

    def run(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        groups: torch.Tensor | None = None,
        entropy: Entropy | None = None,
    ) -> LayerRelease:
        """Encodes, clips, sums, adds noise; keys and values per layer [H, n, d] and [H, n, dv].

        Raises:
            ContextError, ConfigError: bad rows or groups; nothing is released.
        """
        entropy = SystemEntropy() if entropy is None else entropy
        layers = release_layers(self.plan, self.config, keys, values, groups=groups, entropy=entropy)
        n = keys[0].shape[-2]
        units = n if self.config.unit == "row" else 1 if groups is None else int(torch.unique(groups).numel())
        return LayerRelease(tuple(map(structure_of, layers)), self._guarantee(n, units, entropy.private))

    def _guarantee(self, n: int, units: int, private: bool) -> Guarantee:
        split = self.plan.split
        step = 2.0 ** -self.plan.encoders[0].exponent
        return Guarantee(
            mechanism="dptree",
            epsilon=self.config.epsilon,
            delta=self.config.delta,
            unit=self.config.unit,
            neighboring=self.config.neighboring,
            **public_counts(self.config.unit, self.config.neighboring, n, units),
            clip_norm=self.clip_norm,
            sensitivity=math.sqrt(split.event.shape[2]) * step,
            sigma=math.sqrt(2.0) * float(split.event.scale) * step,
            sampling_distance=sampling_distance(),
            private_noise=private,
            calibrated=self.calibrated,
            clipping=(
                f"each {self.config.unit}'s joint contribution over {len(self.plan.encoders)} layer(s), all heads, channels and the "
                f"normaliser is clipped in each of {len(split.parts)} parts (levels of trees, sums of weights, weighted norms), so that "
                f"nothing of kernel norm up to {self.clip_norm:.4g} is touched"
            ),
        )


def prepare_dptree(
    config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: PublicCalibration | None
) -> PreparedDPTree:
    """Fixes geometry, features, split, lattice and noise from public data and the config.

    Raises:
        ConfigError: the calibration does not fit, or the release would be too large.
    """
    plan, clip_norm = plan_attention(config, specs, calibration)
    notes = (BASELINE,) if calibration is not None else (BASELINE, NO_CALIBRATION)
    return PreparedDPTree(config, plan, clip_norm, notes, calibration is not None)
