r"""`DPTreeSoftmax`: sum_i w_i exp(scale <k_i, y>) from weighted squared distances between polynomial features.

With P the Taylor features (features.py), <P(x), P(y)> ~ exp(<x, y>), and without its constant coordinate, whose distance is always 0,

    sum_i w_i <P(x_i), P(y)> = W + (N + |P(y)|^2 W - sum_i w_i |P(x_i) - P(y)|^2) / 2,    W = sum_i w_i,  N = sum_i w_i |P(x_i)|^2.

The distance is a `DPTreeHighDim` with power 2 in r coordinates; W and N are noised numbers of their own, one for each channel. (In exact
arithmetic W and N cancel against the trees. With noise they do not, which is what the detour by distances costs.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from ...errors import ConfigError
from ...privacy.bits import Entropy, SystemEntropy
from ...privacy.lattice import ENTRY_BITS, power_of_two, quantize, sequential_sum
from ..kernel_sum.contributions import LayerEncoder, make_encoders
from ..kernel_sum.features import TaylorFeatures
from ..kernel_sum.geometry import HeadGeometry, declared_geometry, feature_norm
from .budget import BudgetSplit, noise_error
from .distance import DPTreeDistance, DPTreeHighDim, bin_of
from .tree import level_name, number_of_leaves
from .tree_moments import MomentPlan, Moments, ReleasedMoments, Sums, add_sums, release_sums, sum_moments

TREES, PLAIN = ("weights", "first", "second"), ("total", "norms")
_FACTOR_BITS = ENTRY_BITS - 2
_BOUND_BITS = 31
_CHUNK = 2**20  # features that are held at a time


@dataclass(frozen=True)
class SoftmaxPlan:
    """Public: how the layers' rows become moments. stretch: moment -> how far it is stretched on the lattice (its share of the budget)."""

    encoders: tuple[LayerEncoder, ...]
    stretch: dict[str, float]
    moments: MomentPlan
    split: BudgetSplit

    def exact_sums(
        self,
        keys: Sequence[torch.Tensor],
        columns: Sequence[torch.Tensor],
        units: torch.Tensor | None = None,
    ) -> Sums:
        """Per layer: keys [H, n, d], and columns [H, n, channels] that the row weight exp(b) of the geometry multiplies; units [n] as in
        `sum_moments`. Rows that are units of their own are taken in chunks, so n may be large. Private: without noise it must not leave.
        """
        n = keys[0].shape[-2]
        width = sum(e.geometry.heads * e.features.size for e in self.encoders)
        step = n if units is not None else max(1, _CHUNK // width)
        sums: Sums | None = None
        for start in range(0, n, step):
            rows = slice(start, start + step)
            moments = self._encode([k[:, rows] for k in keys], [c[:, rows] for c in columns])
            part = sum_moments(moments, self.moments, units)
            sums = part if sums is None else add_sums(sums, part)
        assert sums is not None
        return sums

    def release(
        self, keys: Sequence[torch.Tensor], columns: Sequence[torch.Tensor], entropy: Entropy
    ) -> list[ReleasedMoments]:
        """`exact_sums` of rows that are units of their own, noised. *Formal guarantee.* That of `split.event`."""
        return release_sums(self.exact_sums(keys, columns), self.moments, self.split, entropy)

    def _encode(self, keys: Sequence[torch.Tensor], columns: Sequence[torch.Tensor]) -> list[Moments]:
        leaves = self.moments.leaves
        return [
            _encode(e, self.stretch, leaves, k, c)
            for e, k, c in zip(self.encoders, keys, columns, strict=True)
        ]


def features_of_degree(features: TaylorFeatures) -> torch.Tensor:
    """[r] degree of each coordinate of P but the constant one."""
    counts = [math.comb(features.dim + j - 1, j) for j in range(1, features.degree + 1)]
    return torch.repeat_interleave(torch.arange(1, features.degree + 1), torch.tensor(counts))


def coordinate_range(features: TaylorFeatures, radius: torch.Tensor) -> torch.Tensor:
    """[H, r] bound of |P(x)_j| for |x| <= radius [H]: radius^j / sqrt(j!), since the squares of degree j add up to |x|^2j / j!."""
    degree = features_of_degree(features).to(torch.float64)
    return radius.to(torch.float64)[:, None] ** degree * torch.exp(-0.5 * torch.lgamma(degree + 1))


def plan_softmax(
    geometries: Sequence[HeadGeometry],
    features: Sequence[TaylorFeatures],
    channels: Sequence[int],
    *,
    clip_norm: float,
    bins: int,
    epsilon: float,
    delta: float,
    neighboring: str,
) -> SoftmaxPlan:
    """Shares, clipping bounds, lattice and noise of a joint release over layers.

    clip_norm: l2 norm up to which the kernel contribution w P(x) of a unit, over all layers, heads and channels, is left alone (that of
    `kernel_sum`). With X the largest |P(x)|^2 without the constant, C_m = clip_norm * (sqrt(r), sqrt(X/(1+X)), X/sqrt(1+X), 1, X/sqrt(1+X))
    for m = weights, first, second, total, norms: no row within clip_norm exceeds any of them.

    *Shares.* An answer's noise is sum_m g_m Z_m, with at most g = (Y/2, sqrt(Y), sqrt(r)/2, 1 + Y/2, 1/2), Y the largest |P(y)|^2, and a
    part costs multiplicity times (stretch_m C_m)^2; stretch_m^2 = g_m / (sqrt(multiplicity) C_m) is the best split of a fixed total.
    """
    largest_x = max(
        float(f.key_norm_bound(float(r))) ** 2 - 1
        for g, f in zip(geometries, features, strict=True)
        for r in g.key_radius
    )
    largest_y = max(
        float(f.key_norm_bound(float(r))) ** 2 - 1
        for g, f in zip(geometries, features, strict=True)
        for r in g.query_radius
    )
    rank = max(f.size - 1 for f in features)
    if rank == 0:
        raise ConfigError("Trees need coordinates: a degree of at least 1.")
    if not (0 < largest_x < math.inf and 0 < largest_y < math.inf):
        raise ConfigError("The logit bound is too small or too large for trees; change `logit_bound`.")
    leaves = number_of_leaves(bins)
    square = largest_x / math.sqrt(1 + largest_x)
    reach = {
        "weights": math.sqrt(rank),
        "first": math.sqrt(largest_x / (1 + largest_x)),
        "second": square,
        "total": 1.0,
        "norms": square,
    }
    gain = {
        "weights": largest_y / 2,
        "first": math.sqrt(largest_y),
        "second": math.sqrt(rank) / 2,
        "total": 1 + largest_y / 2,
        "norms": 0.5,
    }
    times = {**dict.fromkeys(TREES, leaves.bit_length()), **dict.fromkeys(PLAIN, 1)}
    stretch = {m: math.sqrt(gain[m] / (math.sqrt(times[m]) * reach[m])) for m in reach}
    touched = {
        m: sum(
            g.heads * c * (f.size - 1 if m in TREES else 1)
            for g, f, c in zip(geometries, features, channels, strict=True)
        )
        for m in reach
    }
    bound = {m: stretch[m] * reach[m] * clip_norm for m in reach}

    def moments_at(exponent: int) -> MomentPlan:
        entry = {
            m: (touched[m], math.floor(bound[m] * 2.0**exponent), 2.0**-exponent / stretch[m]) for m in reach
        }
        return MomentPlan({m: entry[m] for m in TREES}, {m: entry[m] for m in PLAIN}, leaves)

    exponent, split = BudgetSplit.fit_lattice(
        lambda exponent: moments_at(exponent).parts(),
        _BOUND_BITS - 1 - math.floor(math.log2(max(bound.values()))),
        epsilon=epsilon,
        delta=delta,
        neighboring=neighboring,
    )
    encoders = make_encoders(geometries, features, exponent)
    return SoftmaxPlan(encoders, stretch, moments_at(exponent), split)


def _encode(
    encoder: LayerEncoder, stretch: dict[str, float], leaves: int, key: torch.Tensor, columns: torch.Tensor
) -> Moments:
    geometry, features, device = encoder.geometry, encoder.features, key.device
    assert isinstance(features, TaylorFeatures)
    clipped, weight = encoder.projected_keys(key)
    x = features.key_features(clipped)[..., 1:]
    squares = x.square()
    norm = sequential_sum(squares).unsqueeze(-1)
    one = torch.ones_like(norm)
    reach = [features.key_norm_bound(float(r)) ** 2 - 1 for r in geometry.key_radius]
    # the largest factor of a head gets _FACTOR_BITS bits, the weights what is left of the lattice's exponent
    sizes = [max(stretch[m] * max(1.0, r, r**0.5) for m in stretch) for r in reach]
    bits = [_FACTOR_BITS - math.ceil(math.log2(size)) for size in sizes]
    scale = power_of_two(bits, device)[:, None, None]
    column_scale = power_of_two([encoder.exponent - b for b in bits], device)[:, None, None]
    half = coordinate_range(features, geometry.key_radius).to(device)[:, None]
    return Moments(
        weights=quantize(columns.to(torch.float64) * weight, column_scale),
        bins=bin_of(x, -half, 2 * half / leaves, leaves),
        trees={
            m: quantize(f, scale * stretch[m])
            for m, f in (("weights", torch.ones_like(x)), ("first", x), ("second", squares))
        },
        plain={m: quantize(f, scale * stretch[m]) for m, f in (("total", one), ("norms", norm))},
    )


class DPTreeSoftmax:
    """sum_i w_i exp(scale <k_i, y>) for any query y: W, N and a `DPTreeHighDim` over the features (module's docstring).

    *Source.* arXiv 2407.14717, DPTreeSoftmax. Keys and queries are clipped to scale |k|^2, scale |y|^2 <= logit_bound (they may be signed),
    weights to [-weight_bound, weight_bound].

    *Formal guarantee.* `init` is (epsilon, delta)-DP when one key with its weights is replaced, or appears or disappears: one joint
    release of the trees, W and N, clipped in every moment (tree_moments.py), split as `split.table()` says.

    *Error.* Relative: the Taylor error of the degree on [-logit_bound, logit_bound] (`features.taylor_relative_error`). Additive: the
    noise, for one query within `error_bound(beta)` with probability 1 - beta, for all queries at once (adaptive ones too) within
    `uniform_error_bound(beta)`. Both are O(t r log(1/beta)), t the noise scale: O(weight_bound sqrt(r L log(1/delta)) / epsilon)
    times sums over r coordinates, within the paper's O(epsilon^-1 R^2s R_w r^2 log^1.5 n) with R^2s = P_s(logit_bound).
    """

    def __init__(
        self, released: ReleasedMoments, encoder: LayerEncoder, split: BudgetSplit, *, squeeze: bool = False
    ) -> None:
        """released: one layer's [H, r, channels, ...]. squeeze: one head, without a dimension for it."""
        features, geometry = encoder.features, encoder.geometry
        assert isinstance(features, TaylorFeatures)
        self.features, self.geometry, self.split, self.squeeze = features, geometry, split, squeeze
        self.total, self.norms = released.plain["total"], released.plain["norms"]
        half = coordinate_range(features, torch.maximum(geometry.key_radius, geometry.query_radius)).to(
            self.total
        )
        self.distances = DPTreeHighDim(
            DPTreeDistance(released, middle=torch.zeros_like(half), half=half, power=2, split=split)
        )

    @classmethod
    def init(
        cls,
        keys: torch.Tensor,
        weights: torch.Tensor,
        *,
        epsilon: float,
        delta: float,
        degree: int = 2,
        scale: float | None = None,
        logit_bound: float = 1.0,
        weight_bound: float = 1.0,
        bins: int = 64,
        neighboring: str = "replace_one",
        entropy: Entropy | None = None,
    ) -> Self:
        """keys [n, d], weights [n] or [n, channels]; scale is 1/sqrt(d) by default (the paper's is 1/d)."""
        columns = weights.unsqueeze(-1) if weights.ndim == 1 else weights
        if keys.ndim != 2 or columns.ndim != 2 or keys.shape[0] != columns.shape[0] or keys.numel() == 0:
            raise ConfigError(f"keys {list(keys.shape)} and weights {list(weights.shape)} do not fit.")
        if not (bool(keys.isfinite().all()) and bool(columns.isfinite().all())):
            raise ConfigError("keys or weights hold NaN or Inf.")
        d, channels = keys.shape[1], columns.shape[1]
        scale = d**-0.5 if scale is None else scale
        geometry = declared_geometry(
            1, d, channels, scale=scale, logit_bound=logit_bound, value_bound=weight_bound
        )
        features = TaylorFeatures(d, degree)
        plan = plan_softmax(
            [geometry],
            [features],
            [channels],
            clip_norm=float(feature_norm(features, geometry)) * weight_bound * math.sqrt(channels),
            bins=bins,
            epsilon=epsilon,
            delta=delta,
            neighboring=neighboring,
        )
        clipped = columns.clamp(-weight_bound, weight_bound)
        source = SystemEntropy() if entropy is None else entropy
        released = plan.release([keys.unsqueeze(0)], [clipped.unsqueeze(0)], source)[0]
        return cls(released, plan.encoders[0], plan.split, squeeze=True)

    def query_features(self, y: torch.Tensor) -> torch.Tensor:
        """[H, q, d] -> P(y) without the constant, [H, q, r], float64; y is centred, mapped and clipped as the geometry says."""
        g = self.geometry
        centred = (y.to(torch.float64) - g.query_center.to(y.device)[:, None]) @ g.query_map.to(y.device).mT
        norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
        centred = centred * (g.query_radius.to(y.device)[:, None, None] / norm.clamp_min(1e-30)).clamp_max(
            1.0
        )
        return self.features.key_features(centred)[..., 1:]

    def query(self, y: torch.Tensor) -> torch.Tensor:
        """[H, q, d] -> [H, q, channels] ([q, d] -> [q, channels] as made by `init`)."""
        p = self.query_features(y.unsqueeze(0) if self.squeeze else y)
        total, norms = self.total.unsqueeze(-2), self.norms.unsqueeze(-2)
        distance = self.distances.query(p).mT
        answer = total + 0.5 * (norms + p.square().sum(-1, keepdim=True) * total - distance)
        return answer[0] if self.squeeze else answer

    def noise_scales(self) -> list[float]:
        """|coefficient| times scale of every noise in one answer of one channel, at the worst query."""
        r = self.features.size - 1
        y = max(self.features.key_norm_bound(float(v)) ** 2 - 1 for v in self.geometry.query_radius)
        t = {m: self.split.scale(level_name(m, 0) if m in TREES else m) for m in (*TREES, *PLAIN)}
        # the linear terms have sum_j y_j^2 <= Y, hence sum_j |y_j| <= sqrt(r Y); the squares sum_j y_j^2 <= Y, sum_j y_j^4 <= Y^2
        linear = [math.sqrt(y / r) * t["first"]] * r
        return [
            (1 + y / 2) * t["total"],
            t["norms"] / 2,
            y / 2 * t["weights"],
            *linear,
            *[t["second"] / 2] * r,
        ]

    def error_bound(self, beta: float) -> float:
        """What the noise of one channel's answer to one query exceeds with probability at most beta."""
        scales = self.noise_scales()
        ratio = self.split.event.bound / float(self.split.event.scale)
        # one linear coefficient alone may be sqrt(Y) = sqrt(r) sqrt(Y/r)
        largest = max(*scales, math.sqrt(self.features.size - 1) * scales[3])
        return noise_error(scales, beta, ratio * sum(scales), largest=largest)

    def lipschitz_bound(self, beta: float) -> float:
        """Lipschitz constant in the mapped query of one channel's noise, with probability 1 - beta: what a net's width costs.

        With p = P(y) its derivative in p is (W - C_j) p_j + F_j, and |dP| <= sqrt(f'(b) + b f''(b)) |dy|, f the Taylor polynomial and b the
        squared radius: the second derivative of the kernel f(<x, y>) on its diagonal.
        """
        squared, s = float(self.geometry.query_radius.max()) ** 2, self.features.degree
        first = sum(squared**j / math.factorial(j) for j in range(s))
        second = sum(squared**j / math.factorial(j) for j in range(s - 1))
        r = self.features.size - 1
        event, split = self.split.event, self.split
        ratio = min(event.bound / float(event.scale), math.log(2 * (3 * r + 2) / beta))
        y = self.features.key_norm_bound(math.sqrt(squared)) ** 2 - 1
        trees = {m: split.scale(level_name(m, 0)) for m in TREES}
        in_p = math.sqrt(y) * (split.scale("total") + trees["weights"]) + math.sqrt(r) * trees["first"]
        return ratio * in_p * math.sqrt(first + squared * second)

    def uniform_error_bound(self, beta: float) -> float:
        """What no answer of one channel exceeds, whatever the queries and however chosen, with probability 1 - beta.

        All D noises that a channel reads are below t ln(2 D / beta) at once with probability 1 - beta (each tail is at most 2 exp(-z/t)),
        and below B with certainty; an answer is at most their largest times the l1 norm of its coefficients. No net, no copies.
        """
        scales = self.noise_scales()
        reads = 3 * (self.features.size - 1) + 2
        event = self.split.event
        ratio = min(event.bound / float(event.scale), math.log(2 * reads / beta))
        return ratio * sum(scales)
