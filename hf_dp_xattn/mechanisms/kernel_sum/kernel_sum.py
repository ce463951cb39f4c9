r"""`kernel_sum`: the paper's polynomial-kernel cross-attention as ONE joint Gaussian release.

*Source.* arXiv 2407.14717 (polynomial features, DPTreeSoftmax); sum_i w_i <P(x_i), P(y)> is linear in sum_i P(x_i) (w_i, 1)^T, so a
single noised sum replaces its r trees, and the terms that the paper lets out without noise (the normaliser, sum_i w_i
|P(x_i)|^2) do not arise: the normaliser is one more column of the same sum.

*Formal guarantee.* **Released:** y = sum_u a(u) + Z in Z^D, the integer contributions of all units over all layers, heads, features and
channels and the normaliser, or of a public linear sketch of them; Z has independent coordinates from the discrete Gaussian
N_Z(0, sigma^2). **Neighbouring relation:** `replace_one` (number of rows and units public) or `add_or_remove_one`, of one unit (row,
group, or the whole context). **Sensitivity:** |a(u)|_2 <= C exactly (privacy/clipping.py), so 2 C or C. **Noise:** the smallest sigma whose
epsilon at delta is <= config.epsilon (privacy/accountant.py). **Theorem:** for integer vectors with l2 sensitivity Delta the
discrete Gaussian satisfies Delta^2/(2 sigma^2)-concentrated DP (Canonne, Kamath, Steinke 2020, Theorem 14), converted to (epsilon, delta).
The sampler is exact; its statistical distance is 0 under the assumptions in privacy/noise.py. Everything after y is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...privacy.accountant import GaussianEvent
from ...privacy.additive import GaussianNoise
from ...privacy.lattice import lattice_exponent
from ...privacy.split import gaussian_sigma_squared_beside
from ...privacy.units import NeighboringRelation, sensitivity_factor
from ..base import GuaranteeNumbers, Integers, LayerSpec, Mechanism, NoisePart, State, Summed
from ..inputs import LayerRows, check_groups, count_rows, layers_of, may_be_empty
from ..structure import KernelSumStructure
from .canary_rows import far_apart, public_centre
from .contributions import LayerEncoder, check_rows, make_encoders, sum_rows, sum_units, unit_rows
from .features import FeatureMap, PositiveRandomFeatures, TaylorFeatures, features_of
from .geometry import HeadGeometry, feature_norm, geometry_of
from .sketch import SketchPlan, sum_sketch

NO_CALIBRATION = (
    "No calibration: the clipping bound is the declared one (logit_bound, value_bound), keys and values are neither centred nor "
    "rotated, and nothing is shrunk to a public prior. A calibration on public contexts (dpx.calibrate) spends no privacy budget: it "
    "fits the bound to what public contexts need and releases only the directions in which they differ, so there is less noise."
)
DROWNED = 0.1  # noise over what is summed, from which on uncalibrated sums were further off than no answer
SKETCH_NEEDS_UNITS = (
    "The decoder of a calibrated kernel_sum needs the number of units, which add_or_remove_one keeps private while a context "
    "grows. Use replace_one, or no calibration."
)
STRUCTURES = {"kernel_sum": KernelSumStructure}
FEATURES = {"positive_random": PositiveRandomFeatures, "taylor": TaylorFeatures}


def declared_clip_norm(
    geometries: Sequence[HeadGeometry], features: Sequence[FeatureMap], value_bound: float
) -> float:
    """C such that no row within the declared bounds is clipped: C^2 = sum_h |phi|^2 (|v|^2 + beta^2)."""
    total = 0.0
    for geometry, feature in zip(geometries, features, strict=True):
        phi = feature_norm(feature, geometry).square()
        value = value_bound**2 * geometry.value_dim + geometry.normalizer_weight.square()
        total += float((phi * value * geometry.value_scale.square()).sum())
    return math.sqrt(total)


class PublicCalibration(Protocol):
    """What kernel sums read of a calibration (`calibration/calibration.py`); all of it from public data."""

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


@dataclass(frozen=True)
class PreparedKernelSum(Mechanism[LayerRows]):
    """A kernel-sum release of which everything public is fixed; a context that grows sums the same."""

    additive = True
    config: DPXAttnConfig
    encoders: tuple[LayerEncoder, ...]
    clip_norm: float
    bound: int
    sigma_squared: int | Fraction
    event: GaussianEvent
    warnings: tuple[str, ...]
    calibrated: bool
    sketch: SketchPlan | None = None

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return (NoisePart(GaussianNoise(self.sigma_squared), (self.event,)),)

    def count(self, private: LayerRows, groups: torch.Tensor | None, *, empty: bool = False) -> int:
        rows = layers_of(private)
        n = 0 if empty and count_rows(rows) == 0 else check_rows(rows.keys, rows.values, self.encoders)
        check_groups(self.config.unit, n, groups)
        return n

    def exact(self, private: LayerRows, groups: torch.Tensor | None) -> Integers:
        """Clipped integer sums: [H, r, dv + 1] per layer, or one sketch [K]."""
        rows = layers_of(private)
        if count_rows(rows) == 0 and may_be_empty(self.config.neighboring):
            return tuple(torch.zeros(shape, dtype=torch.int64) for shape in self._shapes)
        n = check_rows(rows.keys, rows.values, self.encoders)
        if self.sketch is None and self.config.unit == "row":
            # no list of units here: n may be a million
            return tuple(sum_rows(self.encoders, rows.keys, rows.values, self.bound))
        units = unit_rows(self.config.unit, n, groups)
        if self.sketch is None:
            return tuple(sum_units(self.encoders, rows.keys, rows.values, self.bound, units))
        return (sum_sketch(self.encoders, rows.keys, rows.values, self.bound, units, self.sketch),)

    def decode(self, noised: Integers, state: State) -> tuple[KernelSumStructure, ...]:
        scale = 2.0**-self.exponent
        sums = [t.to(torch.float64) * scale for t in noised]
        if self.sketch is not None:
            if state.units is None:
                raise ConfigError(SKETCH_NEEDS_UNITS)
            deviation = math.sqrt(self.sigma_squared) if state.deviation is None else state.deviation
            sums = self.sketch.reconstruct(sums[0], state.units, deviation * scale)
        return tuple(
            layer_structure(encoder, part, state.rows, self.config.normalizer_floor)
            for encoder, part in zip(self.encoders, sums, strict=True)
        )

    def growing(self, units: int | None) -> PreparedKernelSum:
        if self.sketch is not None and may_be_empty(self.config.neighboring):
            raise ConfigError(SKETCH_NEEDS_UNITS)
        return self

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        if self.sketch is not None:
            return [(self.sketch.rank,)]
        return [(e.geometry.heads, e.features.size, e.geometry.value_dim + 1) for e in self.encoders]

    @property
    def size(self) -> int:
        """How many numbers are released."""
        return sum(math.prod(shape) for shape in self._shapes)

    @property
    def summed(self) -> Summed:
        sensitivity = sensitivity_factor(self.config.neighboring) * self.bound
        return Summed(self.size, sensitivity, self.exponent, self.clip_norm, self.describe())

    def canaries(self, count: int, rows: int, generator: torch.Generator) -> list[LayerRows]:
        return far_apart(self.encoders, rows, (0.0,), count, sum(e.size for e in self.encoders))

    def bystander(self) -> LayerRows:
        return public_centre(self.encoders)

    @property
    def exponent(self) -> int:
        """The released numbers live on the lattice 2^-exponent."""
        return self.encoders[0].exponent if self.sketch is None else self.sketch.exponent

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise, in the units of the clipping bound."""
        return math.sqrt(self.sigma_squared) * 2.0**-self.exponent

    def drowned(self, rows: int) -> str | None:
        """Why sums without a calibration would be noise, by public numbers alone: the noise of one sum beside the number of rows, which is
        what the sum of the normaliser's constant feature, and of values of length 1, comes to. None: they would not, or a calibration
        shrinks them to what is known.

        Args:
            rows: of the context.
        """
        if self.calibrated or self.sigma <= DROWNED * rows:
            return None
        enough = math.ceil(self.sigma / DROWNED)
        return (
            f"{rows} rows are too few for epsilon = {self.config.epsilon:g} and unit={self.config.unit!r}: the noise on each sum has "
            f"standard deviation {self.sigma:.3g}; from {enough:,} rows on it is a tenth of what is summed"
        )

    def describe(self) -> str:
        return (
            f"each {self.config.unit}'s joint contribution over {len(self.encoders)} layer(s), all heads, channels and the "
            "normaliser"
        )

    @property
    def numbers(self) -> GuaranteeNumbers:
        return GuaranteeNumbers(
            clip_norm=self.clip_norm,
            sensitivity=sensitivity_factor(self.config.neighboring) * self.clip_norm,
            sigma=self.sigma,
            clipping=f"{self.describe()} is clipped to l2 norm {self.clip_norm:.4g}",
        )


def layer_structure(
    encoder: LayerEncoder, sums: torch.Tensor, public_rows: int | None, floor_fraction: float
) -> KernelSumStructure:
    """Post-processing of one layer's noised sums [H, r, dv + 1] (float64, scaled) into what queries read."""
    g, features, device = encoder.geometry, encoder.features, sums.device
    scale = g.value_scale.to(device)[:, None, None]
    sums = torch.cat(
        [sums[..., :-1] / scale, sums[..., -1:] / (scale * g.normalizer_weight.to(device)[:, None, None])],
        dim=-1,
    )
    sums = sums * features.query_fold().to(device)[:, None]
    unweighted = ~g.weight_map.abs().amax(-1).gt(0).to(device)
    if public_rows is not None and features.has_constant:
        # Without row weights, the constant feature of the normaliser counts the rows, which replace_one makes public.
        sums[:, 0, -1] = torch.where(
            unweighted, torch.full_like(sums[:, 0, -1], float(public_rows)), sums[:, 0, -1]
        )
    zero = sums.new_zeros(1, g.projected_dim)
    table = features.query_table().to(device)
    at_centre = features.query_features(zero, table.to(zero)) @ sums[..., -1:]
    floor = floor_fraction * at_centre.reshape(g.heads).clamp_min(1.0)
    return KernelSumStructure(
        sums=sums.to(torch.float32).unsqueeze(0),
        floor=floor.to(torch.float32).reshape(1, g.heads, 1),
        query_center=g.query_center.to(device, torch.float32),
        query_map=g.query_map.to(device, torch.float32),
        query_radius=g.query_radius.to(device, torch.float32),
        key_center=(g.key_center * g.scale).to(device, torch.float32),
        value_center=g.value_center.to(device, torch.float32),
        table=table.to(torch.float32),
        features=features,
    )


def prepare(
    config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: PublicCalibration | None
) -> PreparedKernelSum:
    """Fixes geometry, features, clipping bound, lattice and noise from public data and the config.

    Raises:
        ConfigError: the calibration does not fit, the release would be too large, or the sampler has no noise for this epsilon.
    """
    if calibration is not None:
        calibration.check(config, specs)
    geometries = (
        [geometry_of(s, config) for s in specs] if calibration is None else list(calibration.geometries)
    )
    features = [features_of(config, g.projected_dim) for g in geometries]
    plan = None if calibration is None else calibration.plan(config)
    encoding_norm = (
        declared_clip_norm(geometries, features, config.value_bound)
        if calibration is None
        else calibration.clip_norm
    )
    clip_norm = encoding_norm if plan is None else plan.clip_norm
    if not (
        math.isfinite(clip_norm) and clip_norm > 0 and math.isfinite(encoding_norm) and encoding_norm > 0
    ):
        raise ConfigError(f"The clipping bound must be positive and finite, got {clip_norm!r}.")
    exponent = lattice_exponent(encoding_norm)
    bound = math.floor(clip_norm * 2.0 ** (exponent if plan is None else plan.exponent))
    sensitivity = sensitivity_factor(NeighboringRelation(config.neighboring)) * bound
    sigma_squared = gaussian_sigma_squared_beside(config.epsilon, config.delta, sensitivity, ())
    event = GaussianEvent(sensitivity=sensitivity, sigma_squared=sigma_squared)
    return PreparedKernelSum(
        config=config,
        encoders=make_encoders(geometries, features, exponent),
        clip_norm=clip_norm,
        bound=bound,
        sigma_squared=sigma_squared,
        event=event,
        warnings=() if calibration is not None else (NO_CALIBRATION,),
        calibrated=calibration is not None,
        sketch=plan,
    )
