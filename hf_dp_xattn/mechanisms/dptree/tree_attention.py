"""`DPTreeCrossAttention`: numerators and normaliser from one joint release of `DPTreeSoftmax` structures; the answer is their ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...privacy.bits import Entropy, SystemEntropy
from ..base import LayerSpec
from ..inputs import check_groups, may_be_empty, units_of_rows
from ..kernel_sum.contributions import check_rows
from ..kernel_sum.features import TaylorFeatures, features_of, taylor_relative_error
from ..kernel_sum.geometry import HeadGeometry, geometry_of
from ..kernel_sum.kernel_sum import PublicCalibration, declared_clip_norm
from .softmax import DPTreeSoftmax, SoftmaxPlan, plan_softmax
from .tree_moments import ReleasedMoments, Sums, release_sums

MAX_NODES = 2**27  # numbers that a release draws noise for: 1 GiB of int64


def plan_attention(
    config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: PublicCalibration | None
) -> tuple[SoftmaxPlan, float]:
    """The public part of a joint release over layers, and its clipping bound.

    Raises:
        ConfigError: not the paper's features, an unfit calibration, or too many nodes.
    """
    if config.features != "taylor" or config.degree < 1:
        raise ConfigError(
            "mechanism='dptree' takes the paper's polynomial features: features='taylor' and a degree of at least 1. "
            "For other features use mechanism='kernel_sum'."
        )
    if calibration is not None:
        calibration.check(config, specs)
    geometries = (
        [geometry_of(s, config) for s in specs] if calibration is None else list(calibration.geometries)
    )
    features = [
        f for g in geometries if isinstance(f := features_of(config, g.projected_dim), TaylorFeatures)
    ]
    clip_norm = (
        declared_clip_norm(geometries, features, config.value_bound)
        if calibration is None
        else calibration.clip_norm
    )
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ConfigError(f"The clipping bound must be positive and finite, got {clip_norm!r}.")
    trees = sum(
        3 * g.heads * (f.size - 1) * (g.value_dim + 1) for g, f in zip(geometries, features, strict=True)
    )
    if 2 * trees * config.tree_bins > MAX_NODES:
        raise ConfigError(
            f"dptree needs {trees:,} trees of {2 * config.tree_bins} nodes, more than {MAX_NODES:,} numbers. Lower `projection_dim`, "
            "`degree` or `tree_bins`, or use mechanism='kernel_sum', which needs one number a feature and channel."
        )
    plan = plan_softmax(
        geometries,
        features,
        [g.value_dim + 1 for g in geometries],
        clip_norm=clip_norm,
        bins=config.tree_bins,
        epsilon=config.epsilon,
        delta=config.delta,
        neighboring=config.neighboring,
    )
    return plan, clip_norm


def exact_sums(
    plan: SoftmaxPlan,
    config: DPXAttnConfig,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    groups: torch.Tensor | None,
) -> Sums:
    """Clipped integer sums of a context's rows, keys and values [H, n, d] and [H, n, dv] per layer. Private: they must not leave.

    Raises:
        ContextError, ConfigError: bad rows or groups.
    """
    n = check_rows(keys, values, plan.encoders)
    check_groups(config.unit, n, groups)
    units = units_of_rows(config.unit, n, groups)
    columns = [_columns(e.geometry, v) for e, v in zip(plan.encoders, values, strict=True)]
    return plan.exact_sums(keys, columns, units)


def attention_of(
    plan: SoftmaxPlan, config: DPXAttnConfig, released: Sequence[ReleasedMoments], rows: int | None
) -> list[DPTreeCrossAttention]:
    """One structure per layer. Post-processing of noised moments.

    Where each row is a unit and their number is public (`rows`), the noised sum of the normaliser's weights (which stays counted) is
    overwritten by it.
    """
    layers = []
    for moments, encoder in zip(released, plan.encoders, strict=True):
        if rows is not None and not bool(encoder.geometry.weight_map.any()):
            _know_the_count(moments, rows, encoder.geometry)
        softmax = DPTreeSoftmax(moments, encoder, plan.split)
        layers.append(DPTreeCrossAttention(softmax, config.normalizer_floor))
    return layers


def _columns(geometry: HeadGeometry, value: torch.Tensor) -> torch.Tensor:
    """[H, n, dv + 1]: scaled centred values and, last, the normaliser's constant."""
    centred = value.to(torch.float64) - geometry.value_center.to(value.device)[:, None]
    constant = geometry.normalizer_weight.to(value.device)[:, None, None].expand(-1, value.shape[1], 1)
    return torch.cat([centred, constant], dim=-1) * geometry.value_scale.to(value.device)[:, None, None]


def _know_the_count(moments: ReleasedMoments, n: int, geometry: HeadGeometry) -> None:
    known = (n * geometry.value_scale * geometry.normalizer_weight).to(moments.plain["total"])
    moments.plain["total"][:, -1] = known
    moments.trees["weights"][-1][:, :, -1, 0] = known[:, None]


class DPTreeCrossAttention:
    """Cross-attention from trees: dv structures with the weights V[:, j] for the numerators, one with weight 1 for the normaliser.

    *Source.* arXiv 2407.14717, DPTreeCrossAttention. *Formal guarantee.* `init` is (config.epsilon, config.delta)-DP in config.unit and
    config.neighboring: one joint release of all trees of all heads, coordinates and channels, the sums of weights, the weighted norms and
    the normaliser (`split.table()`). Rows are clipped: keys to the logit bound, and each unit's joint contribution as tree_moments.py says.

    *Error.* With T the true normaliser, U_j and U the noise (`DPTreeSoftmax.error_bound`) of a numerator and of the normaliser, and
    |v_j| <= R_w, the ratio is off by at most (|U_j| + R_w |U|) / (T - |U|) (`error_bound`) beyond the relative error
    2 eps_s / (1 - eps_s) of the features. As T >= n (1 - eps_s) e^-b, b the logit bound, that is the paper's
    O((1 - eps_s)^-1 n^-1 epsilon^-1 R^2s R_w r^2), up to logarithms, once n exceeds the noise. A public floor keeps the normaliser
    positive below that, where nothing is promised about the error.
    """

    def __init__(self, softmax: DPTreeSoftmax, floor_fraction: float) -> None:
        self.softmax = softmax
        g = softmax.geometry
        device = softmax.total.device
        self.value_scale, self.value_center = g.value_scale.to(device), g.value_center.to(device)
        self.normalizer_scale = self.value_scale * g.normalizer_weight.to(device)
        at_center = softmax.total[:, -1] / self.normalizer_scale
        self.floor = floor_fraction * at_center.clamp_min(1.0)  # [H]

    @classmethod
    def init(
        cls,
        key: torch.Tensor,
        value: torch.Tensor,
        config: DPXAttnConfig,
        *,
        scale: float | None = None,
        groups: torch.Tensor | None = None,
        entropy: Entropy | None = None,
    ) -> Self:
        """key [H, n, d], value [H, n, dv]; of config: epsilon, delta, unit, neighboring, degree, logit_bound, value_bound, tree_bins."""
        heads, _, d = key.shape
        spec = LayerSpec("attention", heads, d, value.shape[-1], d**-0.5 if scale is None else scale)
        plan, _ = plan_attention(config, [spec], None)
        source = SystemEntropy() if entropy is None else entropy
        sums = exact_sums(plan, config, [key], [value], groups)
        released = release_sums(sums, plan.moments, plan.split, source)
        n = key.shape[-2] if config.unit == "row" and not may_be_empty(config.neighboring) else None
        layer = attention_of(plan, config, released, n)[0]
        return cls(layer.softmax, config.normalizer_floor)

    def error_bound(self, n: int, value_bound: float, beta: float) -> float:
        """The additive error of one number of one answer with probability 1 - beta, for n rows whose centred values are at most
        value_bound and which nothing clips: the class's formula. Infinite where the noise may reach the normaliser."""
        softmax, g = self.softmax, self.softmax.geometry
        noise = softmax.error_bound(beta / 2)
        numerator, normalizer = (
            noise / float(self.value_scale.min()),
            noise / float(self.normalizer_scale.min()),
        )
        bound = float((g.key_radius * g.query_radius).max())
        least = n * (1 - taylor_relative_error(bound, softmax.features.degree)) * math.exp(-bound)
        return (
            math.inf if normalizer >= least else (numerator + value_bound * normalizer) / (least - normalizer)
        )

    def query(self, y: torch.Tensor) -> torch.Tensor:
        """[H, q, d] -> [H, q, dv], float64: through the trees."""
        answer = self.softmax.query(y)
        normalizer = torch.maximum(answer[..., -1] / self.normalizer_scale[:, None], self.floor[:, None])
        numerators = answer[..., :-1] / self.value_scale[:, None, None]
        return numerators / normalizer.unsqueeze(-1) + self.value_center[:, None]
