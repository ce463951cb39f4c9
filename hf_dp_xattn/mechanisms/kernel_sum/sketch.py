r"""Public linear sketch: release K numbers that carry what varies between contexts, for all layers and heads at once.

All layers' keys and values are functions of the same rows, so their kernel sums vary together. A calibration on public
contexts gives K directions e_k in the space of the joint contributions (principal directions of the sums, in the metric of
the attention's output error over public queries). A unit then contributes only

    a(u) = clip(w * (E^T c(u) - m), C)  in R^K,

and the release is sum_u a(u) + N_Z(0, sigma^2 I_K). E, w, m and C are
public, so the sensitivity argument of privacy/clipping.py holds word for word with K coordinates in place of D; directions that
queries never look at, or that do not vary, cost no noise.
The decoder (post-processing) is the linear posterior mean under the public prior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...privacy.clipping import clip_factor, verify_clipped
from ...privacy.lattice import exact_matmul, power_of_two, quantize, sequential_sum
from .contributions import LayerEncoder, unit_contribution

_UNIT_BITS = 22  # a unit's coordinates before the sketch
_DROPPED_BITS = 16


@dataclass(frozen=True)
class SketchBasis:
    """analysis, synthesis: per layer [H, r, dv + 1, K]; mean_sums: per layer [H, r, dv + 1], the public mean for one unit."""

    analysis: tuple[torch.Tensor, ...]
    synthesis: tuple[torch.Tensor, ...]
    mean_sums: tuple[torch.Tensor, ...]

    @property
    def rank(self) -> int:
        return self.analysis[0].shape[-1]


@dataclass(frozen=True)
class SketchPlan:
    """What is released for one unit and epsilon, and how it is decoded. All public.

    center, mean_a [K]: the public mean of a unit's sketch before and after clipping. weight [K]: noise allocation.
    cov_y [K, K] and cov_zy [R, K]: over public contexts of `units` units; z is the context in all R directions.
    """

    basis: SketchBasis
    exponent: int
    clip_norm: float
    weight: torch.Tensor
    center: torch.Tensor
    mean_a: torch.Tensor
    cov_y: torch.Tensor
    cov_zy: torch.Tensor
    units: int
    _matrices: list[tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=list, repr=False, compare=False
    )

    @property
    def rank(self) -> int:
        return self.weight.shape[0]

    def matrices(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer: the analysis matrix as integers [D, K], and each column's inverse scale [K]; made once."""
        if not self._matrices:
            self._matrices.extend(integer_analysis(a[..., : self.rank]) for a in self.basis.analysis)
        return self._matrices

    def reconstruct(self, y: torch.Tensor, units: int, sigma: float) -> list[torch.Tensor]:
        """Posterior means of the sums, per layer [H, r, dv + 1] float64, from the noised sketch y [K]."""
        ratio = (units / self.units) ** 2
        device = y.device
        cov_y = self.cov_y.to(device) * ratio
        # solve_ex: a singular system is no error now that the release is charged; without a gain, the public mean is left
        gain = torch.linalg.solve_ex(
            cov_y + sigma**2 * torch.eye(self.rank, dtype=torch.float64, device=device),
            self.cov_zy.to(device).mT * ratio,
        )[0].mT
        if not bool(gain.isfinite().all()):
            gain = torch.zeros_like(gain)
        shift = (gain @ (y - units * self.mean_a.to(device))).to(torch.float32)
        return [
            (mean.to(device) * units + synthesis.to(device) @ shift).to(torch.float64)
            for mean, synthesis in zip(self.basis.mean_sums, self.basis.synthesis, strict=True)
        ]


def integer_analysis(analysis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[H, r, dv + 1, K] -> (integers [D, K], inverse scales [K]), small enough for an exact product with a unit."""
    matrix = analysis.reshape(-1, analysis.shape[-1]).to(torch.float64)
    bits = 52 - _UNIT_BITS - math.ceil(math.log2(matrix.shape[0]) / 2)
    norms = matrix.norm(dim=0).clamp_min(1e-30)
    exponents = [bits - 1 - math.ceil(math.log2(float(v))) for v in norms]
    scale = power_of_two(exponents, matrix.device)
    return quantize(matrix, scale, 2**bits), 1.0 / scale


def sketch_units(
    encoders: Sequence[LayerEncoder],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    units: Sequence[torch.Tensor],
    matrices: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """[U, K] float64 sketch E^T c(u) of each unit; a function of the unit's rows alone, bit for bit.

    The products are exact: |unit| <= sqrt(D) 2^22 and each column's norm is below 2^(52 - 22) / sqrt(D), so by Cauchy-Schwarz
    no partial sum reaches 2^53.
    """
    if all(u.numel() == 1 for u in units):
        order = torch.cat([u.reshape(1) for u in units])
        return torch.cat([_sketch_rows(encoders, keys, values, part, matrices) for part in order.split(16)])
    rows = []
    for unit in units:
        parts = unit_contribution(encoders, keys, values, unit)
        rows.append(_apply([p.reshape(1, -1) for p in parts], encoders, matrices))
    return torch.cat(rows)


def _sketch_rows(
    encoders: Sequence[LayerEncoder],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    rows: torch.Tensor,
    matrices: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    flat = []
    for encoder, key, value in zip(encoders, keys, values, strict=True):
        index = rows.to(key.device)
        phi, u = encoder.factors(key[:, index], value[:, index])
        flat.append(
            (phi.transpose(0, 1).unsqueeze(-1) * u.transpose(0, 1).unsqueeze(-2)).reshape(len(rows), -1)
        )
    return _apply(flat, encoders, matrices)


def _apply(
    flat: Sequence[torch.Tensor],
    encoders: Sequence[LayerEncoder],
    matrices: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    total: torch.Tensor | None = None
    for unit, encoder, (matrix, inverse) in zip(flat, encoders, matrices, strict=True):
        integers = quantize(unit, 2.0**-_DROPPED_BITS, 2**_UNIT_BITS)
        product = exact_matmul(integers, matrix.to(unit.device), 2.0**52)
        part = product * (inverse.to(unit.device) * 2.0 ** (_DROPPED_BITS - encoder.exponent))
        total = part if total is None else total + part
    assert total is not None
    return total


def sum_sketch(
    encoders: Sequence[LayerEncoder],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    bound: int,
    units: Sequence[torch.Tensor],
    plan: SketchPlan,
) -> torch.Tensor:
    """int64 [K]: the sum over units of clipped sketches, on the lattice 2^-plan.exponent."""
    sketched = sketch_units(encoders, keys, values, units, plan.matrices())
    return clip_sketch(sketched, plan.weight, plan.center, plan.exponent, bound).to(torch.int64).sum(0)


def clip_sketch(
    sketched: torch.Tensor, weight: torch.Tensor, center: torch.Tensor, exponent: int, bound: int
) -> torch.Tensor:
    """[U, K] integers a(u) = trunc(t round(2^F w (E^T c(u) - m))), |a(u)| <= bound."""
    k = weight.shape[0]
    device = sketched.device
    centred = (sketched[:, :k] - center[:k].to(device)) * weight.to(device)
    integers = quantize(centred, 2.0**exponent, 2**44)
    factor = clip_factor(sequential_sum(integers.square()), bound).unsqueeze(-1)
    clipped = torch.trunc(integers * factor)
    verify_clipped(sequential_sum(clipped.square()), bound)
    return clipped
