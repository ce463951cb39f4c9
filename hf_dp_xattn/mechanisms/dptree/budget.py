r"""`BudgetSplit`: every tensor that leaves, what a unit can change in it, and its share of (epsilon, delta).

All parts live on one integer lattice, on which a part with a small share is stretched less; so one noise scale t and one bound B serve
all of them, and the whole release is ONE event on the concatenated vector (privacy/truncated_laplace.py). Sensitivities of parts add:
l1 norms, and squared l2 norms. Within a part, coordinates and channels share by norm: each bears the same noise, whichever of them a unit
uses. That is never worse than a fixed share for each of them.

The paper splits by basic composition over levels (eps/L, delta/L) and by advanced composition over coordinates. Here the accountant
takes the better of the plain sum (the column `epsilon`, which adds up to it) and the joint Renyi curve (the column `share`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from ...errors import ConfigError, DPXAttnError
from ...privacy.accountant import TruncatedLaplaceEvent, epsilon_of
from ...privacy.additive import TruncatedLaplaceNoise
from ...privacy.bits import Entropy
from ...privacy.noise import MAX_SCALE
from ...privacy.parameters import truncated_laplace_event
from ...privacy.truncated_laplace import off_support
from ...privacy.units import NeighboringRelation, sensitivity_factor

_COARSEST = 2**10  # lattice units of a contribution


@dataclass(frozen=True)
class Part:
    """One kind of tensor that leaves.

    touched: how many of its coordinates a row changes. bound: l2 norm of a unit's clipped contribution, an integer of lattice units.
    step: what one lattice unit is worth in real numbers.
    """

    name: str
    touched: int
    bound: int
    step: float

    @property
    def l1(self) -> int:
        """l1 norm of a contribution: sqrt(touched) * bound (Cauchy-Schwarz), rounded up."""
        return math.isqrt(self.touched * self.bound**2 - 1) + 1


@dataclass(frozen=True)
class BudgetSplit:
    """The parts of one release, the neighbouring factor (2 for replace_one), and the joint event that is charged."""

    parts: tuple[Part, ...]
    factor: int
    event: TruncatedLaplaceEvent

    @classmethod
    def fit(cls, parts: Sequence[Part], epsilon: float, delta: float, neighboring: str) -> BudgetSplit:
        """Least noise for these parts at (epsilon, delta).

        *Formal guarantee.* A unit's contribution to part p has l2 norm <= bound_p and l1 norm <= l1_p, so the concatenation changes by
        at most factor * sum l1_p in l1, factor^2 * sum bound_p^2 in squared l2 and factor * max bound_p in one coordinate.
        """
        factor = sensitivity_factor(NeighboringRelation(neighboring))
        l1, largest, squared = _sensitivity(parts, factor)
        event = truncated_laplace_event(epsilon, delta, l1, largest=largest, squared=squared)
        return cls(tuple(parts), factor, event)

    @classmethod
    def fit_lattice(
        cls,
        parts_at: Callable[[int], Sequence[Part]],
        bits: int,
        *,
        epsilon: float,
        delta: float,
        neighboring: str,
    ) -> tuple[int, BudgetSplit]:
        """(bits, split): `fit` on the finest lattice, from `bits` down, whose noise the sampler can make; and checks it.

        Raises:
            ConfigError: so much noise that the lattice would hold nothing else.
        """
        split = cls.fit(parts_at(bits), epsilon, delta, neighboring)
        surplus = max(0, math.ceil(math.log2(Fraction(split.event.scale) / MAX_SCALE)) + 1)
        if surplus:
            bits -= surplus
            if min(p.bound for p in parts_at(bits)) < _COARSEST:
                raise ConfigError(
                    f"At epsilon = {epsilon:g} the noise would be {2**surplus:,} times what the sampler makes at this precision. Release "
                    "fewer trees (coordinates, channels, heads), or raise epsilon."
                )
            split = cls.fit(parts_at(bits), epsilon, delta, neighboring)
        split.check(epsilon, delta)
        return bits, split

    def check(self, epsilon: float, delta: float) -> None:
        """Raises `DPXAttnError` unless the parts add up to the event, and the event costs no more than (epsilon, delta)."""
        if self.event.shape != _sensitivity(self.parts, self.factor):
            raise DPXAttnError("The budget split does not add up to the event that is charged: refusing.")
        if not epsilon_of([self.event], delta) <= epsilon:
            raise DPXAttnError("The budget split costs more than the budget: refusing.")

    def deviation(self, name: str) -> float:
        """Standard deviation of one noise in part `name`, in real units: at most sqrt(2) * scale."""
        return math.sqrt(2.0) * self.scale(name)

    def scale(self, name: str) -> float:
        """Scale of the noise of part `name` in real units."""
        return float(self.event.scale) * self._part(name).step

    def limit(self, name: str) -> float:
        """What no noise of part `name` exceeds, in real units."""
        return self.event.bound * self._part(name).step

    def table(self) -> list[dict[str, Any]]:
        """One row a part. `epsilon` adds up to the plain (basic) composition, `share` to 1, `delta` to what truncation takes."""
        l1, _, squared = self.event.shape
        off = off_support(self.event)
        rows = []
        for part in self.parts:
            sensitivity = self.factor * part.l1
            rows.append(
                {
                    "part": part.name,
                    "coordinates": part.touched,
                    "l1": sensitivity,
                    "epsilon": float(Fraction(sensitivity) / self.event.scale),
                    "share": float((self.factor * part.bound) ** 2 / squared),
                    "delta": float(off * sensitivity / l1),
                }
            )
        return rows

    def noised(
        self, sums: Mapping[str, Sequence[torch.Tensor]], entropy: Entropy
    ) -> dict[str, list[torch.Tensor]]:
        """int64 sums of every part (a list of tensors each) -> float64 in real units, each number with its own noise.

        Raises:
            DPXAttnError: a tensor that is in no part, or a part without tensors: nothing leaves uncounted, nothing is drawn.
        """
        if list(sums) != [p.name for p in self.parts]:
            raise DPXAttnError("What would leave is not what the budget split counts: refusing to release.")
        return {
            part.name: [self.noise.perturb(t, entropy).to(torch.float64) * part.step for t in sums[part.name]]
            for part in self.parts
        }

    @property
    def noise(self) -> TruncatedLaplaceNoise:
        """Of every number that leaves, in lattice units."""
        return TruncatedLaplaceNoise(self.event.scale, self.event.bound)

    def _part(self, name: str) -> Part:
        return next(p for p in self.parts if p.name == name)


def _sensitivity(parts: Sequence[Part], factor: int) -> tuple[int, int, Fraction]:
    """(l1, largest, squared l2) of the concatenation; the last never above l1 * largest, as for every vector."""
    l1 = factor * sum(p.l1 for p in parts)
    largest = factor * max(p.bound for p in parts)
    return l1, largest, Fraction(min(factor**2 * sum(p.bound**2 for p in parts), l1 * largest))


def noise_error(scales: Sequence[float], beta: float, limit: float, *, largest: float | None = None) -> float:
    r"""With probability 1 - beta, |sum_i c_i Z_i| is at most this, for the products `scales` of |c_i| and the scale t_i of Z_i.

    2 sqrt(2) max(|v|_2 sqrt(ln(2/beta)), |v|_inf ln(2/beta)), v the scales (`largest` stands for |v|_inf where that is known otherwise);
    and at most `limit` with probability 1.

    *Proof.* Z_i has E exp(s Z_i) <= 1/(1 - s^2 t^2) <= exp(2 s^2 t^2) for |s| t <= 1/sqrt(2): for the discrete Laplace the first
    inequality reads (cosh s - 1)/s^2 <= (cosh(1/t) - 1) t^2, which grows in s; truncation makes |Z| smaller, hence E cosh(s Z) too.
    Chernoff's bound with s = lambda/(4 |v|_2^2), or with 1/(sqrt(2) |v|_inf) where that is smaller.
    """
    log = math.log(2.0 / beta)
    norm = math.sqrt(sum(s * s for s in scales))
    largest = max(scales) if largest is None else largest
    return min(limit, 2.0 * math.sqrt(2.0) * max(norm * math.sqrt(log), largest * log))
