"""`DPTreeDistance` (one dimension, weighted) and `DPTreeHighDim` (l_1 and squared l_2 distances as sums over coordinates)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch

from ...errors import ConfigError
from ...privacy.bits import Entropy, SystemEntropy
from ...privacy.lattice import ENTRY_BITS, quantize
from .budget import BudgetSplit, noise_error
from .tree import level_name, number_of_leaves, range_sums
from .tree_moments import MomentPlan, Moments, ReleasedMoments, release_sums, sum_moments

_WEIGHT_BITS, _FACTOR_BITS = ENTRY_BITS - 1, ENTRY_BITS - 2


def bin_of(
    x: torch.Tensor, low: torch.Tensor | float, width: torch.Tensor | float, leaves: int
) -> torch.Tensor:
    """Index of the bin that holds x, of `leaves` bins of that width from `low` on; elementwise. NaN has the first: no row may fail."""
    at = ((x.to(torch.float64) - low) / width).floor().nan_to_num_(0.0)
    return at.clamp_(0, leaves - 1).to(torch.int64)


class DPTreeDistance:
    """sum_i w_i |x_i - y| (power 1) or sum_i w_i (x_i - y)^2 (power 2), for one number y, or many, from trees over bins of [low, high].

    *Source.* arXiv 2407.14717, DPTreeDistance, after Backurs et al. (2403.08917) and Liu et al. (2409.01688, without the alpha factor). The
    bins hold the sums of w, of w x and, for squares, of w x^2; x is taken from the middle of [low, high] (entries may be signed; the paper
    takes [0, R]). Points are clipped to [low, high], weights to [-weight_bound, weight_bound].

    *Formal guarantee.* `init` is (epsilon, delta)-DP when one point and its weights are replaced (`replace_one`), or appear or disappear.
    A row enters one leaf and its ancestors in each tree, with |w| R^m / 2^m for the m-th moment, R = high - low.

    *Error.* Power 1: the sums left and right of y's own bin, so at most 2 (L - 1) nodes for each of two moments, and the points in that
    bin, left out: at most (R / bins) sum of their |w|. Power 2: one range, all bins, answers for each moment; that is the root, so no
    points are misplaced. The noise is within `error_bound`: with t the scale of the noise in w (t R / 2 in w x, t R^2 / 4 in w x^2) it is
    O(t R sqrt(L) log(1/beta)) for power 1 and O(t R^2 log(1/beta)) for power 2, t = O(L weight_bound / epsilon): the paper's
    O(epsilon^-1 R^p R_w log(n)^1.5). That a square needs the root alone is why its trees waste a factor of L.

    The class holds many such structures as one (coordinates, channels): `levels` are [..., channels, nodes].
    """

    def __init__(
        self,
        released: ReleasedMoments,
        *,
        middle: torch.Tensor,
        half: torch.Tensor,
        power: int,
        split: BudgetSplit,
        squeeze: bool = False,
    ) -> None:
        """middle, half [...]: where x is counted from, and how far it reaches. squeeze: one channel, without a dimension for it."""
        self.levels = released.trees
        self.middle, self.half, self.power, self.split, self.squeeze = middle, half, power, split, squeeze

    @classmethod
    def init(
        cls,
        points: torch.Tensor,
        weights: torch.Tensor,
        *,
        low: float,
        high: float,
        weight_bound: float,
        power: int = 2,
        bins: int = 64,
        epsilon: float,
        delta: float,
        neighboring: str = "replace_one",
        entropy: Entropy | None = None,
    ) -> Self:
        """points [n] (or [T, n]: T coordinates of the same rows), weights [n] (or [c, n]: c channels)."""
        x, w = torch.atleast_2d(points).to(torch.float64), torch.atleast_2d(weights).to(torch.float64)
        if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or x.numel() == 0:
            raise ConfigError(f"points {list(points.shape)} and weights {list(weights.shape)} do not fit.")
        if not (bool(x.isfinite().all()) and bool(w.isfinite().all())):
            raise ConfigError("points or weights hold NaN or Inf.")
        if not (math.isfinite(high - low) and high > low and 0 < weight_bound < math.inf):
            raise ConfigError("Needs low < high and weight_bound > 0, all finite.")
        if power not in (1, 2) or bins < 1:
            raise ConfigError(f"power is 1 or 2 and bins at least 1, not {power!r} and {bins!r}.")
        leaves = number_of_leaves(bins)
        unit = ((x.clamp(low, high) - (low + high) / 2) * (2 / (high - low))).mT.unsqueeze(0)  # [1, n, T]
        powers = {name: unit**m for m, name in enumerate(("weights", "first", "second")[: power + 1])}

        def plan_at(bits: int) -> MomentPlan:
            return _plan(powers, x.shape[0] * w.shape[0], (high - low) / 2, weight_bound, leaves, bits)

        bits, split = BudgetSplit.fit_lattice(
            lambda bits: plan_at(bits).parts(),
            _WEIGHT_BITS,
            epsilon=epsilon,
            delta=delta,
            neighboring=neighboring,
        )
        plan, source = plan_at(bits), SystemEntropy() if entropy is None else entropy
        moments = Moments(
            weights=quantize(w.mT.unsqueeze(0), 2.0**bits / weight_bound, 2**bits),
            bins=bin_of(unit, -1.0, 2.0 / leaves, leaves),
            trees={name: quantize(f, 2.0**_FACTOR_BITS, 2**_FACTOR_BITS) for name, f in powers.items()},
            plain={},
        )
        released = release_sums(sum_moments([moments], plan), plan, split, source)[0]
        first = 0 if points.ndim == 2 else (0, 0)
        trees = {name: [nodes[first] for nodes in levels] for name, levels in released.trees.items()}
        shape = points.shape[:-1]
        return cls(
            ReleasedMoments(trees, {}),
            middle=x.new_full(shape, (low + high) / 2),
            half=x.new_full(shape, (high - low) / 2),
            power=power,
            split=split,
            squeeze=weights.ndim == 1,
        )

    def query(self, y: torch.Tensor) -> torch.Tensor:
        """y [..., q], clipped to [low, high] -> [..., channels, q] ([..., q] where the weights had one channel and no dimension for it)."""
        half, middle = self.half.unsqueeze(-1), self.middle.unsqueeze(-1)
        centred = torch.minimum(torch.maximum(y.to(torch.float64) - middle, -half), half)
        result = self._power_1(centred) if self.power == 1 else self._power_2(centred)
        return result.squeeze(-2) if self.squeeze else result

    def _sums(self, moment: str, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return range_sums(self.levels[moment], low.unsqueeze(-2), high.unsqueeze(-2))

    def _power_1(self, y: torch.Tensor) -> torch.Tensor:
        leaves = self.levels["weights"][0].shape[-1]
        half = self.half.unsqueeze(-1)
        leaf = bin_of(y, -half, 2 * half / leaves, leaves)
        zero = torch.zeros_like(leaf)
        left, right = (zero, leaf), (leaf + 1, zero + leaves)
        at = y.unsqueeze(-2)
        below = at * self._sums("weights", *left) - self._sums("first", *left)
        above = self._sums("first", *right) - at * self._sums("weights", *right)
        return below + above

    def _power_2(self, y: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros(
            *y.shape[:-1], 1, dtype=torch.int64, device=y.device
        )  # the range does not depend on y
        whole = zero, zero + self.levels["weights"][0].shape[-1]
        at = y.unsqueeze(-2)
        return (
            self._sums("second", *whole)
            - 2 * at * self._sums("first", *whole)
            + at.square() * self._sums("weights", *whole)
        )

    def noise_scales(self) -> list[float]:
        """|coefficient| times scale of every noise in one answer, at the worst y of one structure."""
        half = float(self.half.max())
        depth = len(self.levels["weights"])
        nodes = max(1, 2 * (depth - 1))
        weights, first = (self.split.scale(level_name(m, 0)) for m in ("weights", "first"))
        if self.power == 1:
            return [half * weights] * nodes + [first] * nodes
        return [half**2 * weights, 2 * half * first, self.split.scale(level_name("second", 0))]

    def error_bound(self, beta: float) -> float:
        """What the noise of one answer (of one structure and channel) exceeds with probability at most beta."""
        scales = self.noise_scales()
        ratio = self.split.event.bound / float(self.split.event.scale)
        return noise_error(scales, beta, ratio * sum(scales))


class DPTreeHighDim:
    """sum_i w_i |x_i - y|_1 (power 1) or sum_i w_i |x_i - y|_2^2 (power 2) in d dimensions: one `DPTreeDistance` for each coordinate.

    *Source.* arXiv 2407.14717, DPTreeHighDim. *Formal guarantee.* That of `DPTreeDistance`, with one joint release over the coordinates:
    l2 sensitivity grows with sqrt(d), and the accountant composes coordinates by the joint Renyi curve or, for few, by the plain sum.
    *Error.* The sum of d independent noises: sqrt(d) times `DPTreeDistance`'s, whose scale grows with sqrt(d): O(d) in all (the paper's
    count is the same).
    """

    def __init__(self, distance: DPTreeDistance) -> None:
        self.distance = distance

    @classmethod
    def init(cls, points: torch.Tensor, weights: torch.Tensor, **arguments: object) -> Self:
        """points [n, d], weights [n] or [n, channels]; the other arguments are those of `DPTreeDistance.init`."""
        if points.ndim != 2:
            raise ConfigError(f"points must be [n, d], got {list(points.shape)}.")
        return cls(DPTreeDistance.init(points.mT, weights.mT if weights.ndim == 2 else weights, **arguments))  # type: ignore[arg-type]

    @property
    def split(self) -> BudgetSplit:
        return self.distance.split

    def query(self, y: torch.Tensor) -> torch.Tensor:
        """y [..., q, d] -> [..., q] ([..., channels, q] for weights with channels)."""
        per_coordinate = self.distance.query(y.mT)
        return per_coordinate.sum(-2 if self.distance.squeeze else -3)

    def error_bound(self, beta: float) -> float:
        """As `DPTreeDistance.error_bound`, for the sum over coordinates."""
        scales = self.distance.noise_scales() * self.distance.middle.shape[-1]
        ratio = self.split.event.bound / float(self.split.event.scale)
        return noise_error(scales, beta, ratio * sum(scales))


def _plan(
    powers: Mapping[str, object], touched: int, half: float, weight_bound: float, leaves: int, bits: int
) -> MomentPlan:
    """x counts in units of R/2 (from the middle) and w in units of weight_bound, so every moment lies in [-1, 1] and gets one share."""
    lattice = 2.0 ** (_FACTOR_BITS + bits)
    largest = math.ceil(
        lattice * (1 + 2.0**-18)
    )  # slack: `clip_factor` leaves alone what is within the bounds
    norm = math.isqrt(touched * largest**2) + 1
    trees = {name: (touched, norm, weight_bound * half**m / lattice) for m, name in enumerate(powers)}
    return MomentPlan(trees, {}, leaves)
