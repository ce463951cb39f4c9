r"""From private rows to exact integer sums of clipped moments, in the leaves of trees.

A row has weights w (one for each channel) and coordinates x_1, ..., x_r. It contributes

* to each coordinate's trees, in the leaf of its bin: w ("weights"), w x_j ("first") and, for squares, w x_j^2 ("second");
* beside the trees, for the softmax: w ("total") and w |x|^2 ("norms"). The paper lets these two out without noise; here they are parts.

Every contribution is an outer product of integers, factor x weight. All tensors are [H, ...]: heads that the same row enters together.

*Clipping.* Each moment m has a public integer bound C_m on the l2 norm of one unit's contribution, jointly over layers, heads, coordinates
and channels (in one level of the trees: a level holds every row once). A unit's weights are multiplied by one
t = min_m min(1, C_m / norm_m) and truncated towards zero, so every bound holds (privacy/clipping.py). For a unit of several rows, norm_m is
the sum of their norms, which is at least the norm of their sum (triangle inequality). A row's l1 norm is at most sqrt(touched) times its l2
norm, and these add up alike, so `Part.l1` covers such units as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...privacy.bits import Entropy
from ...privacy.clipping import clip_factor, verify_clipped
from ..kernel_sum.contributions import joint_norm_squared
from .budget import BudgetSplit, Part
from .tree import build_levels, level_name

_CHUNK = 2**22  # contributions that are held at a time


@dataclass(frozen=True)
class Moments:
    """One layer's rows as integers (float64, |entries| <= 2^19).

    weights [H, n, channels]; bins [H, n, r] in 0..leaves - 1; trees: moment -> factor [H, n, r]; plain: moment -> factor [H, n, 1].
    """

    weights: torch.Tensor
    bins: torch.Tensor
    trees: dict[str, torch.Tensor]
    plain: dict[str, torch.Tensor]


@dataclass(frozen=True)
class MomentPlan:
    """Public: the moments in their order, each with (touched, bound, step) as in `Part`, and the number of leaves of a tree."""

    trees: Mapping[str, tuple[int, int, float]]
    plain: Mapping[str, tuple[int, int, float]]
    leaves: int

    @property
    def depth(self) -> int:
        return self.leaves.bit_length()

    def parts(self) -> list[Part]:
        """A part for each level of each moment's trees, and for each moment beside them."""
        parts = [
            Part(level_name(name, level), *m) for name, m in self.trees.items() for level in range(self.depth)
        ]
        return parts + [Part(name, *m) for name, m in self.plain.items()]

    def bounds(self) -> dict[str, int]:
        return {name: bound for name, (_, bound, _) in {**self.trees, **self.plain}.items()}


@dataclass(frozen=True)
class ReleasedMoments:
    """One layer's noised sums: trees: moment -> levels [H, r, channels, nodes]; plain: moment -> [H, channels]. float64."""

    trees: dict[str, list[torch.Tensor]]
    plain: dict[str, torch.Tensor]


Sums = dict[
    str, list[torch.Tensor]
]  # moment -> int64 sums of every layer: leaves [H, r, channels, leaves], or [H, channels]


def sum_moments(layers: Sequence[Moments], plan: MomentPlan, units: torch.Tensor | None = None) -> Sums:
    """Clipped, exact sums of some rows (of all rows of each unit). units [n]: integer unit of each row; None where every row is one."""
    clipped = clip_weights(layers, plan.bounds(), units)
    pairs = list(zip(layers, clipped, strict=True))
    trees = {name: [leaf_sums(m, name, w, plan.leaves) for m, w in pairs] for name in plan.trees}
    return {**trees, **{name: [plain_sums(m, name, w) for m, w in pairs] for name in plan.plain}}


def add_sums(a: Sums, b: Sums) -> Sums:
    """The sums over both sets of rows; exact."""
    return {name: [x + y for x, y in zip(a[name], b[name], strict=True)] for name in a}


def parts_of(sums: Sums, plan: MomentPlan) -> dict[str, list[torch.Tensor]]:
    """Everything that leaves, before noise: the nodes of every level, and the moments beside the trees, in the order of `plan.parts`."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name in plan.trees:
        for level, nodes in enumerate(zip(*map(build_levels, sums[name]), strict=True)):
            parts[level_name(name, level)] = list(nodes)
    return parts | {name: sums[name] for name in plan.plain}


def moments_of(released: Mapping[str, Sequence[torch.Tensor]], plan: MomentPlan) -> list[ReleasedMoments]:
    """Noised parts, layer by layer. Post-processing."""
    return [
        ReleasedMoments(
            trees={t: [released[level_name(t, v)][i] for v in range(plan.depth)] for t in plan.trees},
            plain={p: released[p][i] for p in plan.plain},
        )
        for i in range(len(next(iter(released.values()))))
    ]


def release_sums(sums: Sums, plan: MomentPlan, split: BudgetSplit, entropy: Entropy) -> list[ReleasedMoments]:
    """Builds the trees and noises everything.

    *Formal guarantee.* That of `split.event`: every tensor of the result is noised and is a part of the split.
    """
    return moments_of(split.noised(parts_of(sums, plan), entropy), plan)


def clip_weights(
    layers: Sequence[Moments], bounds: Mapping[str, int], units: torch.Tensor | None
) -> list[torch.Tensor]:
    """The weights [H, n, channels] after clipping; every bound is checked again before anything is drawn."""
    weights = [m.weights for m in layers]
    norms = _unit_norms(layers, weights, bounds, units)
    factor = torch.stack([clip_factor(norms[name], bound) for name, bound in bounds.items()]).amin(0)
    if units is not None:
        factor = factor[units.to(factor.device)]
    clipped = [torch.trunc(w * factor.to(w.device)[None, :, None]) for w in weights]
    for name, norm_squared in _unit_norms(layers, clipped, bounds, units).items():
        verify_clipped(norm_squared, bounds[name])
    return clipped


def _unit_norms(
    layers: Sequence[Moments],
    weights: Sequence[torch.Tensor],
    names: Mapping[str, int],
    units: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Squared norm of each unit's contribution to each moment, or an upper bound of it."""
    result = {}
    for name in names:
        factors = [m.trees[name] if name in m.trees else m.plain[name] for m in layers]
        squared = joint_norm_squared(list(zip(factors, weights, strict=True)))
        if units is not None:
            index = units.to(squared.device)
            total = squared.new_zeros(int(units.max()) + 1).index_add_(0, index, squared.sqrt())
            squared = total.square()
        result[name] = squared
    return result


def leaf_sums(moments: Moments, name: str, weights: torch.Tensor, leaves: int) -> torch.Tensor:
    """int64 [H, r, channels, leaves]: exact, in any order of the rows."""
    factor, bins = moments.trees[name], moments.bins
    heads, n, r = factor.shape
    channels = weights.shape[-1]
    offset = torch.arange(heads * r, device=bins.device).reshape(heads, 1, r) * leaves
    total = torch.zeros(heads * r * leaves, channels, dtype=torch.int64, device=factor.device)
    for rows in torch.arange(n, device=factor.device).split(max(1, _CHUNK // (heads * r * channels))):
        product = factor[:, rows].unsqueeze(-1) * weights[:, rows].unsqueeze(-2)  # below 2^38: exact
        index = (bins[:, rows] + offset).flatten()
        total.index_add_(0, index, product.to(torch.int64).flatten(0, -2))
    return total.reshape(heads, r, leaves, channels).transpose(-1, -2).contiguous()


def plain_sums(moments: Moments, name: str, weights: torch.Tensor) -> torch.Tensor:
    """int64 [H, channels]."""
    return (moments.plain[name] * weights).to(torch.int64).sum(1)
