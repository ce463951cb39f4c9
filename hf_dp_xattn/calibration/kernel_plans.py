r"""Plans: for one epsilon, how many directions are released, how the noise is shared, where units are clipped, how far to shrink.

Candidates are ranked by a cross-validated linear prediction; the winner's outputs are then simulated with fresh noise on public contexts
that the basis has not seen, to choose how far the decoder goes (the ratio of two noised sums is not linear) and to state the FVU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import DPXAttnConfig
from ..mechanisms.kernel_sum.contributions import LayerEncoder
from ..mechanisms.kernel_sum.kernel_sum import layer_structure
from ..mechanisms.kernel_sum.sketch import SketchBasis, clip_sketch
from ..privacy.accountant import gaussian_sigma_squared
from ..privacy.units import NeighboringRelation, sensitivity_factor
from .plan_entry import PlanEntry, sketch_plan

SCALES = (1.0, 0.7, 0.4, 0.1)
_FOLDS = 4


@dataclass(frozen=True)
class HeldOut:
    """Public contexts that the basis has not seen: unit sketches [N, U, R], each context's total squared deviation from the
    public mean in the metric [N], and for the first few the exact outputs per layer [H, m, dv]."""

    sketches: torch.Tensor
    total: torch.Tensor
    outputs: Sequence[Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Probe:
    """What the simulation needs besides: public queries [H, m, d] and output gains [H] per layer."""

    encoders: Sequence[LayerEncoder]
    basis: SketchBasis
    queries: Sequence[torch.Tensor]
    gains: Sequence[torch.Tensor]


def fit_plan(config: DPXAttnConfig, epsilon: float, held_out: HeldOut, probe: Probe) -> PlanEntry:
    """The plan for `epsilon`; all from public data."""
    entry = _search(config, epsilon, held_out)
    sigma = _noise(config, epsilon) * entry.clip_norm
    errors = {scale: simulate_fvu(config, entry, sigma, scale, held_out, probe) for scale in SCALES}
    scale = min(errors, key=lambda s: errors[s])
    return dataclasses.replace(entry, cov_zy=entry.cov_zy * scale, predicted_fvu=errors[scale])


def simulate_fvu(
    config: DPXAttnConfig, entry: PlanEntry, sigma: float, scale: float, held_out: HeldOut, probe: Probe
) -> float:
    """FVU of the attention outputs of held-out public contexts with simulated noise (a seeded float Gaussian: public
    data only), averaged over layers."""
    gen = torch.Generator().manual_seed(0)
    count, units = len(held_out.outputs), held_out.sketches.shape[1]
    plan = sketch_plan(dataclasses.replace(entry, cov_zy=entry.cov_zy * scale), probe.basis, units)
    bound = math.floor(entry.clip_norm * 2.0**plan.exponent)
    layers = len(probe.encoders)
    error, variance = torch.zeros(layers, dtype=torch.float64), torch.zeros(layers, dtype=torch.float64)
    means = [torch.stack([o[j] for o in held_out.outputs]).mean(0) for j in range(layers)]
    rows = units if config.unit == "row" and config.neighboring == "replace_one" else None
    for i in range(count):
        y = (
            clip_sketch(held_out.sketches[i], plan.weight, plan.center, plan.exponent, bound).sum(0)
            * 2.0**-plan.exponent
        )
        y = y + sigma * torch.randn(y.shape, generator=gen, dtype=torch.float64)
        for j, sums in enumerate(plan.reconstruct(y, units, sigma)):
            structure = layer_structure(probe.encoders[j], sums, rows, config.normalizer_floor)
            out = structure.attend(probe.queries[j].float().unsqueeze(0))[0]
            gain = probe.gains[j].double()
            exact = held_out.outputs[i][j]
            error[j] += ((out - exact).double().square().sum((1, 2)) * gain).sum()
            variance[j] += ((exact - means[j]).double().square().sum((1, 2)) * gain).sum()
    return float((error / variance.clamp_min(1e-30)).mean()) * (1 - 1 / max(2, count))


def _noise(config: DPXAttnConfig, epsilon: float) -> float:
    """sigma for C = 1."""
    one = 1 << 20
    factor = sensitivity_factor(NeighboringRelation(config.neighboring))
    return math.sqrt(gaussian_sigma_squared(epsilon, config.delta, factor * one)) / one


def _search(config: DPXAttnConfig, epsilon: float, held_out: HeldOut) -> PlanEntry:
    """Grid search over the number of directions, the noise allocation and the clipping bound; a candidate's linear FVU is
    cross-validated, so that directions and decoder coefficients that the public data cannot support lose."""
    sketches = held_out.sketches
    _, units, rank = sketches.shape
    noise = _noise(config, epsilon)
    center = sketches.flatten(0, 1).mean(0)
    centred = sketches - center
    energy = centred.square().flatten(0, 1).mean(0).clamp_min(1e-30)
    z = sketches.sum(1)
    outside = (held_out.total.sum() - (z - z.mean(0)).square().sum()).clamp_min(0.0)
    best: PlanEntry | None = None
    for k in sorted({min(rank, k) for k in (2, 4, 8, 16, 32, 64, 128, 256, rank)}):
        for gamma in (0.0, 0.5):
            weight = energy[:k] ** (-gamma / 2)
            weighted = centred[..., :k] * weight
            norms = weighted.norm(dim=-1, keepdim=True)
            flat = norms.flatten()
            for quantile in (0.3, 0.6, 0.8, 0.95, 1.0):
                clip = (
                    float(torch.quantile(flat[:: max(1, flat.numel() // 100_000)], quantile)) * 1.0001 + 1e-12
                )
                y = (weighted * (clip / norms.clamp_min(1e-30)).clamp_max(1.0)).sum(1)
                error = sum(_validate(z, y, noise * clip, fold) for fold in range(_FOLDS))
                fvu = float((error + outside) / held_out.total.sum())
                if best is None or fvu < best.predicted_fvu:
                    mean_y, _, cov_y, cov_zy = _regression(z, y)
                    best = PlanEntry(
                        epsilon=epsilon,
                        delta=config.delta,
                        clip_norm=clip,
                        weight=weight,
                        center=center[:k].contiguous(),
                        mean_a=mean_y / units,
                        cov_y=cov_y,
                        cov_zy=cov_zy,
                        predicted_fvu=fvu,
                    )
    assert best is not None
    return best


def _regression(
    z: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means and second moments of the decoder; a ridge of 1/N of the mean variance stands for the few contexts."""
    n, k = y.shape
    dy, dz = y - y.mean(0), z - z.mean(0)
    cov_y = dy.mT @ dy / n
    ridge = cov_y.diagonal().mean() / n
    return y.mean(0), z.mean(0), cov_y + ridge * torch.eye(k, dtype=torch.float64), dz.mT @ dy / n


def _validate(z: torch.Tensor, y: torch.Tensor, sigma: float, fold: int) -> torch.Tensor:
    """Squared error on one fold of a decoder fitted on the others, the noise's share in expectation."""
    test = torch.arange(z.shape[0]) % _FOLDS == fold
    mean_y, mean_z, cov_y, cov_zy = _regression(z[~test], y[~test])
    noisy = cov_y + sigma**2 * torch.eye(y.shape[1], dtype=torch.float64)
    gain = torch.linalg.solve(noisy, cov_zy.mT).mT
    residual = z[test] - mean_z - (y[test] - mean_y) @ gain.mT
    error: torch.Tensor = residual.square().sum() + test.sum() * sigma**2 * gain.square().sum()
    return error
