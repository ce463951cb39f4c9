r"""A learned sum of the context's rows: K numbers, noised and released once for all layers and heads.

**Contribution.** f(x) = clip(M (x - center) + b, 1), in the unit ball of R^K, with M, center and b public (trained on public contexts).
The affine map is exact on integers (`quantizer.ExactAffine`: coordinates of x - center are first clamped to a public reach), then y =
round(2^F (M (x - center) + b)) and f(x) = trunc(t y), |f(x)|_2 <= 2^F by privacy/clipping.py. A row's integers depend on that row alone.
A group or a context enters as one row, its mean (`sources.pool`). B = 2^F.

**Release.** sum_u a(u) + N_Z(0, sigma^2 I_K), an exact integer sum; replace_one: |a(u) - a(u')|_2 <= 2 B, add_or_remove_one: B.
The contributions have both signs, so that the sqrt(2) of nonnegative histograms is not available here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from ...errors import ConfigError
from ...privacy.accountant import Event, GaussianEvent
from ...privacy.additive import GaussianNoise
from ...privacy.clipping import clip_factor, verify_clipped
from ...privacy.lattice import lattice_exponent, quantize, sequential_sum
from ...privacy.split import gaussian_sigma_squared_beside
from ...privacy.units import NeighboringRelation, Unit, sensitivity_factor, unit_and_relation
from ..base import NoisePart
from ..inputs import check_context, row_chunks
from .quantizer import ExactAffine

_UNCLIPPED_BITS = 11  # coordinates before clipping: up to 2^11 times the unit ball


@dataclass(frozen=True, eq=False)
class RowSum:
    """The public map of a learned sum."""

    affine: ExactAffine

    @classmethod
    def from_tensors(
        cls,
        center: torch.Tensor,
        matrix: torch.Tensor,
        bias: torch.Tensor,
        *,
        reach: float | torch.Tensor,
    ) -> RowSum:
        """Rounds public float parameters to integers, once.

        Args:
            center [C], matrix [K, C], bias [K]. reach: public range of each coordinate of x - center, a number or [C].

        Raises:
            ConfigError: shapes do not fit, NaN or Inf.
        """
        if matrix.ndim != 2:
            raise ConfigError(f"matrix must be [K, C], got {list(matrix.shape)}.")
        return cls(ExactAffine.from_tensors(center, matrix.mT, reach=reach, bias=bias))

    @property
    def size(self) -> int:
        """Number of released coordinates K."""
        return self.affine.width

    def features(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, C] -> f(x) float64 [n, K], as a release of single rows sums them; for public rows (calibration, decoders)."""
        n = check_context(rows, self.affine.channels, may_be_empty=True)
        exponent = lattice_exponent(1.0)
        parts = [rows.new_empty(0, self.size, dtype=torch.float64)]
        for part in row_chunks(n, max(self.affine.channels, self.size)):
            parts.append(clipped_rows(self.affine, rows[part], exponent) * 2.0**-exponent)
        return torch.cat(parts)

    def prepare(
        self, epsilon: float, delta: float, *, neighboring: str, beside: Sequence[Event] = ()
    ) -> PreparedRowSum:
        """Fixes lattice and noise from public data. `beside`: events that share epsilon and delta with this release.

        Raises:
            ConfigError: a parameter is out of range, or `beside` leaves nothing of epsilon.
        """
        relation = unit_and_relation(Unit.ROW, neighboring)[1]
        # at small epsilon the noise is so wide that a coarser lattice loses nothing, and the sampler's range is finite
        coarser = max(0, math.ceil(math.log2(1.0 / epsilon))) if 2.0**-24 < epsilon < 1.0 else 0
        exponent = lattice_exponent(1.0) - coarser
        bound = math.floor(2.0**exponent)
        sensitivity = sensitivity_factor(relation) * bound
        sigma_squared = gaussian_sigma_squared_beside(epsilon, delta, sensitivity, beside)
        event = GaussianEvent(sensitivity, sigma_squared)
        return PreparedRowSum(self, relation, exponent, bound, sigma_squared, (event,))


@dataclass(frozen=True, eq=False)
class PreparedRowSum:
    """A learned sum of which everything public is fixed. `events` must be charged before `exact_sums` get noise and leave.

    exponent: the released numbers live on the lattice 2^-exponent. bound: B, in lattice steps.
    """

    row_sum: RowSum
    neighboring: NeighboringRelation
    exponent: int
    bound: int
    sigma_squared: int | Fraction
    events: tuple[Event, ...]

    @property
    def part(self) -> NoisePart:
        """The noise of the sum."""
        return NoisePart(GaussianNoise(self.sigma_squared), self.events, 1)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise of each released coordinate."""
        return math.sqrt(self.sigma_squared) * 2.0**-self.exponent

    def real(self, released: torch.Tensor) -> torch.Tensor:
        """Post-processing: released integers as float64 numbers."""
        return released.to(torch.float64) * 2.0**-self.exponent

    def exact_sums(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum of the rows' contributions, int64 [K]. Private: without noise it must not leave."""
        affine = self.row_sum.affine
        # Under add_or_remove_one the number of rows is private: an empty context must give a release, not an error.
        private_count = self.neighboring is NeighboringRelation.ADD_OR_REMOVE_ONE
        n = check_context(rows, affine.channels, may_be_empty=private_count)
        total = torch.zeros(affine.width, dtype=torch.int64, device=rows.device)
        for part in row_chunks(n, max(affine.channels, affine.width)):
            total += clipped_rows(affine, rows[part], self.exponent).to(torch.int64).sum(0)
        return total


def clipped_rows(affine: ExactAffine, rows: torch.Tensor, exponent: int) -> torch.Tensor:
    """[n, C] -> integer-valued float64 [n, K]: 2^exponent f(x), of norm <= 2^exponent; row by row."""
    shift = 2.0 ** (exponent - affine.exponent)
    vectors, bound = quantize(affine(rows), shift, 2 ** (exponent + _UNCLIPPED_BITS)), 2**exponent
    factor = clip_factor(sequential_sum(vectors.square()), bound)
    clipped = torch.trunc(vectors * factor.unsqueeze(-1))
    verify_clipped(sequential_sum(clipped.square()), bound)
    return clipped
