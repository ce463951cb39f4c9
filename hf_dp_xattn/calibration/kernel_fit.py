r"""Fitting a `Calibration` to PUBLIC contexts: geometry, then sketch basis, then one plan per epsilon.

*Geometry*: centres, balancing maps and scales from first and second moments.
*Basis*: principal directions of the public contexts' kernel sums in the metric of the output error. With output
N/D + c, an error dS of a head's sums moves the output by about phi(q)^T dS / D, so its mean square over public queries is
tr(dS^T Q dS) / D^2 with Q = E phi(q) phi(q)^T; the normaliser's column weighs |out|^2. Each layer's errors are divided by that layer's
output variance: the metric is the sum over layers of the fraction of unexplained variance (FVU).
*Plan*: number of directions, noise allocation and clipping bound with the least predicted FVU at (epsilon, delta), on
public contexts that the basis has not seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..mechanisms.base import LayerSpec
from ..mechanisms.kernel_sum.contributions import (
    LayerEncoder,
    joint_norm_squared,
    unit_contribution,
    unit_rows,
)
from ..mechanisms.kernel_sum.features import FeatureMap, features_of
from ..mechanisms.kernel_sum.geometry import HeadGeometry, balance
from ..mechanisms.kernel_sum.sketch import SketchBasis, integer_analysis, sketch_units
from ..privacy.lattice import lattice_exponent
from .anchors.objective import LayerProbe
from .calibration import BOUND_FIELDS, Calibration
from .calibration_options import CalibrationOptions
from .kernel_plans import HeldOut, Probe, fit_plan
from .kinds import CalibrationKind
from .public_data import PublicData

Rows = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]  # keys, values per layer: [H, n, d], [H, n, dv]

_FEWEST = 8  # public contexts


@dataclass
class Moments:
    """Mean and covariance of [H, n, d] rows, accumulated in float64."""

    count: int = 0
    total: torch.Tensor | None = None
    product: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        wide = x.detach().to(torch.float64)
        total, product = wide.sum(1), wide.mT @ wide
        self.count += wide.shape[1]
        self.total = total if self.total is None else self.total + total
        self.product = product if self.product is None else self.product + product

    @property
    def mean(self) -> torch.Tensor:
        """[H, d]"""
        assert self.total is not None and self.count
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """[H, d, d], centred."""
        assert self.product is not None
        mean = self.mean
        return self.product / self.count - mean.unsqueeze(-1) * mean.unsqueeze(-2)


@torch.no_grad()
def fit_kernel_sums(
    config: DPXAttnConfig,
    data: PublicData,
    options: CalibrationOptions,
    *,
    row_weight_spread: float = 0.0,
) -> Calibration:
    """Fits everything.

    Args:
        config: what a release promises; its epsilon is not looked at.
        data: layers, and public contexts, which are read several times.
        options: epsilons, rank (directions of the sketch; 0 fits geometry and bounds only) and progress.
        row_weight_spread: how much of the mean query may become a row weight (see `absorbed_query`); 0 for none, which has been the
            best choice where logits are large.

    Raises:
        ConfigError: too few contexts.
    """
    count, rank, progress, layers = data.count, options.rank, options.progress, data.objective.layers
    if count < _FEWEST:
        raise ConfigError(f"A calibration needs at least {_FEWEST} public contexts, got {count}.")

    def contexts() -> Iterator[Rows]:
        for rows in data.rows():
            pairs = [layer.project(rows.unsqueeze(0)) for layer in layers]
            yield [k[0] for k, _ in pairs], [v[0] for _, v in pairs]

    def stream(label: str) -> Iterable[Rows]:
        return progress.track(contexts(), label, count)

    # every pass takes about as long for a context as the first one, the choice of a plan as long as some of them
    progress.expect("moments", count, 0.0, decides=True)
    geometries, n = _fit_geometry(config, data.specs, stream("moments"), layers, row_weight_spread)
    each = progress.each("moments")
    later = ("clipping bound", *(() if rank == 0 else ("metric", "sketch basis", "held-out contexts")))
    for label in later:
        progress.expect(label, count, each)
    if rank:
        progress.expect("plans", len(options.epsilons), 1.0)
    features = [features_of(config, g.projected_dim) for g in geometries]
    units = _units(config.unit, n, data.groups)
    clip_norm = _unit_norm(geometries, features, stream("clipping bound"), units, limit=64)
    encoders = [
        LayerEncoder(g, f, lattice_exponent(clip_norm)) for g, f in zip(geometries, features, strict=True)
    ]
    settings = {name: getattr(config, name) for name in BOUND_FIELDS}
    result = Calibration(
        layers=tuple(s.name for s in data.specs),
        geometries=tuple(geometries),
        settings=settings,
        clip_norm=clip_norm,
        contexts=count,
        units=len(units[0]),
    )
    if rank == 0:
        return result
    metric = _fit_metric(encoders, layers, stream("metric"), limit=32)
    used = max(4, count * 2 // 3)
    basis = _fit_basis(encoders, metric, stream("sketch basis"), used, min(rank, used - 1), len(units[0]))
    held_out = _sketch_held_out(encoders, metric, basis, stream("held-out contexts"), used, units, layers, 24)
    probe = Probe(encoders, basis, [p.queries.cpu() for p in layers], [p.gain.cpu() for p in layers])
    plans = tuple(
        fit_plan(config, float(e), held_out, probe) for e in progress.track(options.epsilons, "plans")
    )
    return dataclasses.replace(result, basis=basis, plans=plans)


def _units(
    unit: str, n: int, groups: torch.Tensor | Sequence[torch.Tensor] | None
) -> Sequence[Sequence[torch.Tensor]]:
    """Each context's units, by its number modulo their length."""
    if groups is None or isinstance(groups, torch.Tensor):
        return [unit_rows(unit, n, groups)]
    units = [unit_rows(unit, len(g), g) for g in groups]
    if len({len(u) for u in units}) > 1:
        raise ConfigError("Public contexts of kernel_sum must have as many groups as each other.")
    return units


def _fit_geometry(
    config: DPXAttnConfig,
    specs: Sequence[LayerSpec],
    contexts: Iterable[Rows],
    public: Sequence[LayerProbe],
    row_weight_spread: float,
) -> tuple[list[HeadGeometry], int]:
    keys, values = [Moments() for _ in specs], [Moments() for _ in specs]
    ranges = [torch.zeros(s.heads, dtype=torch.float64) for s in specs]
    n = 0
    for layer_keys, layer_values in contexts:
        n = layer_keys[0].shape[1]
        for i, (k, v) in enumerate(zip(layer_keys, layer_values, strict=True)):
            keys[i].add(k)
            values[i].add(v)
            ranges[i] = torch.maximum(ranges[i], k.double().abs().amax((1, 2)).cpu())
    geometries = []
    for i, spec in enumerate(specs):
        queries = Moments()
        queries.add(public[i].queries)
        absorbed = absorbed_query(queries.mean, keys[i].covariance, spec.scale, row_weight_spread)
        rest = queries.mean - absorbed
        second = queries.covariance + rest.unsqueeze(-1) * rest.unsqueeze(-2)
        key_map, query_map, _ = balance(keys[i].covariance, second, spec.scale, config.projection_dim)
        ones = torch.ones(spec.heads, dtype=torch.float64)
        variance = values[i].covariance.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-12)  # [H] E|v - c|^2
        # a head's share of the joint norm follows its effect on the layer's output; layers count alike
        effect = (public[i].gain.double() * variance).sum().clamp_min(1e-30)
        radius = ones * math.sqrt(config.logit_bound)
        geometries.append(
            HeadGeometry(
                key_center=keys[i].mean.cpu(),
                query_center=absorbed.cpu(),
                key_map=key_map.cpu(),
                query_map=query_map.cpu(),
                weight_map=(absorbed * spec.scale).cpu(),
                key_radius=radius,
                query_radius=radius,
                value_center=values[i].mean.cpu(),
                value_scale=(public[i].gain.double() / effect).sqrt().clamp_min(1e-12).cpu(),
                normalizer_weight=(variance.sqrt() / spec.value_dim**0.25).cpu(),
                key_range=2.0 * ranges[i] + keys[i].mean.abs().amax(-1).cpu() + 1e-6,
                scale=spec.scale,
            )
        )
    return geometries, n


def absorbed_query(
    mean: torch.Tensor, key_cov: torch.Tensor, scale: float, spread_limit: float
) -> torch.Tensor:
    """The part [H, d] of the mean query that becomes a row weight exp(scale m.(k - c)): as much of it as keeps the log weight's
    standard deviation within `spread_limit`. Peaked weights let a few rows rule the normaliser, and the ratio of two noised sums
    breaks."""
    spread = scale * torch.einsum("hd,hde,he->h", mean, key_cov, mean).clamp_min(0).sqrt()
    return mean * (spread_limit / spread.clamp_min(1e-12)).clamp_max(1.0).unsqueeze(-1)


def _unit_norm(
    geometries: Sequence[HeadGeometry],
    features: Sequence[FeatureMap],
    contexts: Iterable[Rows],
    units: Sequence[Sequence[torch.Tensor]],
    limit: int,
) -> float:
    """95 % quantile of the public units' joint norms: the clipping bound without a sketch."""
    encoders = [LayerEncoder(g, f, lattice_exponent(64.0)) for g, f in zip(geometries, features, strict=True)]
    norms = []
    for i, (keys, values) in enumerate(contexts):
        if i == limit:
            break
        members = units[i % len(units)]
        if len(members) == keys[0].shape[1]:  # unit = row
            factors = [e.factors(k, v) for e, k, v in zip(encoders, keys, values, strict=True)]
            norms.append(joint_norm_squared(factors).sqrt())
            continue
        for unit in members:
            parts = unit_contribution(encoders, keys, values, unit)
            norms.append(torch.stack([p.square().sum() for p in parts]).sum().sqrt().reshape(1))
    return float(torch.cat(norms).quantile(0.95)) * 2.0 ** -lattice_exponent(64.0)


@dataclass(frozen=True)
class _LayerMetric:
    root: torch.Tensor  # [H, r, r] symmetric square root of the (scaled) second moment of query features
    column: torch.Tensor  # [H, dv + 1]


def _fit_metric(
    encoders: Sequence[LayerEncoder], public: Sequence[LayerProbe], contexts: Iterable[Rows], limit: int
) -> list[_LayerMetric]:
    mean_sums = [torch.zeros(1) for _ in encoders]
    seen = 0
    feats = [_query_features(e, p.queries) for e, p in zip(encoders, public, strict=True)]
    moments: list[list[torch.Tensor]] = [[] for _ in encoders]
    for i, (keys, values) in enumerate(contexts):
        if i == limit:
            break
        parts = unit_contribution(encoders, keys, values, torch.arange(keys[0].shape[1]))
        for j, (part, encoder) in enumerate(zip(parts, encoders, strict=True)):
            scaled = part * 2.0**-encoder.exponent
            mean_sums[j] = mean_sums[j] + scaled if seen else scaled
            out, _ = _output(encoder, feats[j], scaled)
            moments[j].append(torch.stack([out.mean(1), out.square().mean(1)]))
        seen += 1
    result = []
    for j, (encoder, feat) in enumerate(zip(encoders, feats, strict=True)):
        g = encoder.geometry
        _, normalizer = _output(encoder, feat, mean_sums[j] / seen)
        stacked = torch.stack(moments[j])  # [N, 2, H, dv]
        out_square = stacked[:, 1].mean(0).sum(-1)  # [H]
        # variance over contexts and queries of the centred output
        variance_h = (stacked[:, 1].mean(0) - stacked[:, 0].mean(0).square()).sum(-1).clamp_min(1e-12)
        gain = public[j].gain.double().cpu()
        weight = gain / (gain * variance_h).sum()  # [H], so that a layer's metric is its FVU
        feature = feat / normalizer.clamp_min(1e-6).unsqueeze(-1)
        second = feature.mT @ feature / feature.shape[1] * weight[:, None, None]
        values_, vectors = torch.linalg.eigh(second)
        root = (vectors * values_.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
        inverse = 1.0 / g.value_scale
        column = torch.cat(
            [
                inverse[:, None].expand(-1, g.value_dim),
                (inverse / g.normalizer_weight * out_square.sqrt())[:, None],
            ],
            dim=-1,
        )
        result.append(_LayerMetric(root, column))
    return result


def _query_features(encoder: LayerEncoder, query: torch.Tensor) -> torch.Tensor:
    """[H, m, r] folded features of public queries, float64 on the CPU."""
    g = encoder.geometry
    centred = (query.double().cpu() - g.query_center[:, None]) @ g.query_map.mT
    norm = centred.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    centred = centred * (g.query_radius[:, None, None] / norm).clamp_max(1.0)
    table = encoder.features.query_table().double()
    return encoder.features.query_features(centred, table) * encoder.features.query_fold()


def _output(
    encoder: LayerEncoder, feats: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(centred output [H, m, dv], normaliser [H, m]) of one context's sums in encoded units."""
    g = encoder.geometry
    result = feats @ sums.cpu()
    normalizer = result[..., -1] / (g.value_scale * g.normalizer_weight)[:, None]
    return result[..., :-1] / g.value_scale[:, None, None] / normalizer.clamp_min(1e-6).unsqueeze(
        -1
    ), normalizer


def _fit_basis(
    encoders: Sequence[LayerEncoder],
    metric: Sequence[_LayerMetric],
    contexts: Iterable[Rows],
    used: int,
    rank: int,
    units: int,
) -> SketchBasis:
    raw: list[list[torch.Tensor]] = [[] for _ in encoders]
    for i, (keys, values) in enumerate(contexts):
        if i == used:
            break
        parts = unit_contribution(encoders, keys, values, torch.arange(keys[0].shape[1]))
        for j, (part, encoder) in enumerate(zip(parts, encoders, strict=True)):
            raw[j].append((part * 2.0**-encoder.exponent).to(torch.float32).cpu())
    stacked = [torch.stack(r) for r in raw]  # per layer [N, H, r, dv + 1]
    means = [s.mean(0) for s in stacked]
    stacked = [s - m for s, m in zip(stacked, means, strict=True)]
    whitened = [m.root.float() @ s * m.column.float()[:, None] for s, m in zip(stacked, metric, strict=True)]
    gram = sum(
        (w.flatten(1).double() @ w.flatten(1).double().T for w in whitened),
        torch.zeros(used, used, dtype=torch.float64),
    )
    eigenvalues, vectors = torch.linalg.eigh(gram)
    order = torch.argsort(eigenvalues, descending=True)[:rank]
    mix = (vectors[:, order] / eigenvalues[order].clamp_min(1e-12 * eigenvalues.max()).sqrt()).to(
        torch.float32
    )  # [N, R]
    analysis, synthesis = [], []
    for s, w, m in zip(stacked, whitened, metric, strict=True):
        direction = torch.einsum("nhrc,nk->hrck", w, mix)
        dual = torch.einsum("hrs,hsck->hrck", m.root.float(), direction) * m.column.float()[:, None, :, None]
        analysis.append(dual.contiguous())
        synthesis.append(torch.einsum("nhrc,nk->hrck", s, mix).contiguous())
    return SketchBasis(tuple(analysis), tuple(synthesis), tuple(m / units for m in means))


def _sketch_held_out(
    encoders: Sequence[LayerEncoder],
    metric: Sequence[_LayerMetric],
    basis: SketchBasis,
    contexts: Iterable[Rows],
    used: int,
    units: Sequence[Sequence[torch.Tensor]],
    public: Sequence[LayerProbe],
    simulated: int,
) -> HeldOut:
    matrices = [integer_analysis(a) for a in basis.analysis]
    sketches, totals = [], []
    outputs: list[list[torch.Tensor]] = []
    for i, (keys, values) in enumerate(contexts):
        if i < used:
            continue
        if len(outputs) < simulated:
            scales = [e.geometry.scale for e in encoders]
            outputs.append(
                [_exact(p.queries, k, v, s) for p, k, v, s in zip(public, keys, values, scales, strict=True)]
            )
        members = units[i % len(units)]
        sketches.append(sketch_units(encoders, keys, values, members, matrices))
        parts = unit_contribution(encoders, keys, values, torch.arange(keys[0].shape[1]))
        total = torch.zeros((), dtype=torch.float64)
        for part, encoder, mean, m in zip(parts, encoders, basis.mean_sums, metric, strict=True):
            deviation = part.cpu() * 2.0**-encoder.exponent - mean * len(members)
            total = total + (m.root @ deviation * m.column[:, None]).square().sum()
        totals.append(total)
    return HeldOut(torch.stack(sketches).cpu(), torch.stack(totals), outputs)


def _exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """[H, m, dv] exact attention on the CPU."""
    return (torch.softmax(query.float() @ key.float().mT * scale, -1) @ value.float()).cpu()


KIND = CalibrationKind(Calibration, fit_kernel_sums, fewest=_FEWEST)
