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
from ...errors import DPXAttnError
from ..base import GuaranteeNumbers, Integers, LayerSpec, Mechanism, NoisePart, State
from ..inputs import LayerRows, check_groups, layers_of
from ..kernel_sum.canary_rows import far_apart, public_centre
from ..kernel_sum.contributions import LayerEncoder, check_rows
from ..kernel_sum.kernel_sum import NO_CALIBRATION, PublicCalibration
from .budget import BudgetSplit
from .softmax import SoftmaxPlan
from .tree_attention import attention_of, exact_sums, plan_attention
from .tree_moments import moments_of, parts_of
from .tree_structure import DistanceFeatures, DPTreeStructure, structure_of

BASELINE = "mechanism='dptree' is the paper's own construction, kept for reference; at equal privacy mechanism='kernel_sum' has less noise."
STRUCTURES = {"dptree": DPTreeStructure}
FEATURES = {"distance": DistanceFeatures}


@dataclass(frozen=True)
class PreparedDPTree(Mechanism[LayerRows]):
    """A tree release of which everything public is fixed."""

    config: DPXAttnConfig
    plan: SoftmaxPlan
    clip_norm: float
    warnings: tuple[str, ...]
    calibrated: bool

    @property
    def split(self) -> BudgetSplit:
        return self.plan.split

    @property
    def encoders(self) -> tuple[LayerEncoder, ...]:
        return self.plan.encoders

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return (NoisePart(self.split.noise, (self.split.event,)),)

    @property
    def size(self) -> int:
        """How many numbers are released."""
        moments = self.plan.moments
        channels = [e.geometry.heads * (e.geometry.value_dim + 1) for e in self.encoders]
        trees = sum(c * (e.features.size - 1) for c, e in zip(channels, self.encoders, strict=True))
        return len(moments.trees) * trees * (2 * moments.leaves - 1) + len(moments.plain) * sum(channels)

    def canaries(self, count: int, rows: int, generator: torch.Generator) -> list[LayerRows]:
        # keys away from the centre fill the moments of first and second order as well
        return far_apart(self.encoders, rows, (0.0, 1.0), count, self.size)

    def bystander(self) -> LayerRows:
        return public_centre(self.encoders)

    def count(self, private: LayerRows, groups: torch.Tensor | None, *, empty: bool = False) -> int:
        rows = layers_of(private)
        n = check_rows(rows.keys, rows.values, self.encoders)
        check_groups(self.config.unit, n, groups)
        return n

    def exact(self, private: LayerRows, groups: torch.Tensor | None) -> Integers:
        """Every node of every tree and what stands beside them: part by part as in `split`, and within a part layer by layer."""
        rows = layers_of(private)
        sums = parts_of(exact_sums(self.plan, self.config, rows.keys, rows.values, groups), self.plan.moments)
        if list(sums) != [p.name for p in self.split.parts]:
            raise DPXAttnError("What would leave is not what the budget split counts: refusing to release.")
        return tuple(t for part in sums.values() for t in part)

    def decode(self, noised: Integers, state: State) -> tuple[DPTreeStructure, ...]:
        layers = len(self.encoders)
        released = {
            part.name: [t.to(torch.float64) * part.step for t in noised[i * layers : (i + 1) * layers]]
            for i, part in enumerate(self.split.parts)
        }
        moments = moments_of(released, self.plan.moments)
        return tuple(map(structure_of, attention_of(self.plan, self.config, moments, state.rows)))

    @property
    def numbers(self) -> GuaranteeNumbers:
        split = self.split
        step = 2.0 ** -self.encoders[0].exponent
        return GuaranteeNumbers(
            clip_norm=self.clip_norm,
            sensitivity=math.sqrt(split.event.shape[2]) * step,
            sigma=math.sqrt(2.0) * float(split.event.scale) * step,
            clipping=(
                f"each {self.config.unit}'s joint contribution over {len(self.encoders)} layer(s), all heads, channels and the "
                f"normaliser is clipped in each of {len(split.parts)} parts (levels of trees, sums of weights, weighted norms), so that "
                f"nothing of kernel norm up to {self.clip_norm:.4g} is touched"
            ),
        )


def prepare(
    config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: PublicCalibration | None
) -> PreparedDPTree:
    """Fixes geometry, features, split, lattice and noise from public data and the config.

    Raises:
        ConfigError: the calibration does not fit, or the release would be too large.
    """
    plan, clip_norm = plan_attention(config, specs, calibration)
    notes = (BASELINE,) if calibration is not None else (BASELINE, NO_CALIBRATION)
    return PreparedDPTree(config, plan, clip_norm, notes, calibration is not None)
