r"""Histograms of a context over m public cells: noised counts, released once for all layers and heads.

**Contribution.** g(u)_c is the number of rows of unit u in cell c, in steps of 2^-k. A row contributes one count and needs no clipping. A
larger unit (group, context) is clipped to norm L (public, in rows), B = floor(2^k L):

* l1: a(u)_c = floor(g(u)_c min(2^k, B / |g(u)|_1)) in integer arithmetic, so |a(u)|_1 <= B exactly;
* l2: a(u) = trunc(t 2^k g(u)), |a(u)|_2 <= B by privacy/clipping.py.

k leaves B about 26 bits, so that a unit spread over 65,536 cells loses less than 1 part in 500 to the floor. **a(u) >= 0 in every
cell**; both bounds below use that. N = sum_u a(u) is an exact integer sum.

**Geometric noise** (A: asymmetric, C: symmetric), pure epsilon. Z = G(r+) - G(r-), G(r) one-sided geometric with P(G = j) ~ exp(-r j), so
P(Z = z) = sum_j P(G+ = z + j) P(G- = j) ~ exp(-r+ z) for z >= 0, and likewise exp(-r- |z|) for z < 0, with one normaliser: -log P(z) is
phi(z) + const, phi(z) = r+ z for z >= 0 and r- |z| below. phi has slopes in [-r-, r+], so moving a cell's count from N' + d to N'
changes the log-likelihood by phi(z + d) - phi(z) <= r+ d if d > 0 and <= r- |d| if d < 0.
replace_one: d = a(u) - a(u'). By nonnegativity the positive parts sum to at most |a(u)|_1 <= B and the negative ones to |a(u')|_1 <= B:
epsilon = B (r+ + r-). add_or_remove_one: d = +-a(u), so epsilon = B max(r+, r-): equal rates are best. The rates are exact rationals.

**Gaussian noise**, discrete, zCDP Delta^2 / (2 sigma^2). replace_one: |a - a'|_2^2 = |a|^2 + |a'|^2 - 2 a.a' <= 2 B^2, since a.a' >= 0 for
nonnegative vectors; Delta = ceil(sqrt(2) B), not 2 B. add_or_remove_one: Delta = B. For rows B = 2^k, so the ceiling costs nothing.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from fractions import Fraction

import torch

from ...errors import ConfigError, ContextError, DPXAttnError
from ...privacy.accountant import Event, GaussianEvent, PureEvent
from ...privacy.additive import GaussianNoise, GeometricNoise
from ...privacy.clipping import clip_factor
from ...privacy.noise import MAX_SCALE
from ...privacy.split import gaussian_sigma_squared_beside
from ...privacy.units import NeighboringRelation, Unit, unit_and_relation
from ..base import NoisePart, Summed
from ..inputs import MAX_ROWS, check_groups, units_of_rows

MAX_CELLS = 2**24
_BOUND_BITS = 26
_MAX_RATE = 64  # larger rates are lowered to this (more noise than epsilon asks for): P(Z != 0) < 2^-90


@dataclass(frozen=True)
class PreparedHistogram:
    """A histogram release of which everything public is fixed. `events` must be charged before `exact_sums` get noise and leave.

    cells: m. exponent: counts live on the lattice 2^-exponent. bound: B, in lattice steps.
    """

    cells: int
    unit: Unit
    neighboring: NeighboringRelation
    exponent: int
    bound: int
    noise: GeometricNoise | GaussianNoise
    events: tuple[Event, ...]

    @property
    def part(self) -> NoisePart:
        """The noise of the counts."""
        return NoisePart(self.noise, self.events, 1)

    def summed(self, what: str) -> Summed:
        """The counts of a context that grows, with Gaussian noise."""
        (event,) = self.events
        assert isinstance(event, GaussianEvent)
        return Summed(self.cells, event.sensitivity, self.exponent, self.bound * 2.0**-self.exponent, what)

    def counts(self, released: torch.Tensor) -> torch.Tensor:
        """Post-processing: released integers as float64 numbers of rows."""
        return released.to(torch.float64) * 2.0**-self.exponent

    def exact_sums(self, cells: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of the units' contributions, int64 [m]. Private: without noise it must not leave."""
        self._check(cells, groups)
        if self.unit is Unit.ROW:
            return torch.bincount(cells, minlength=self.cells) << self.exponent
        owner = units_of_rows(self.unit.value, len(cells), groups)
        assert owner is not None  # not rows
        units = owner.to(cells.device)
        pairs, counts = torch.unique(units * self.cells + cells, return_counts=True)
        owner, cell = pairs // self.cells, pairs % self.cells
        clipped = self._clip(counts, owner)
        return torch.zeros(self.cells, dtype=torch.int64, device=cells.device).index_add_(0, cell, clipped)

    def _clip(self, counts: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Entries of the contributions a(u): `counts` of the cells that each unit `owner` fills."""
        empty = counts.new_zeros(int(owner.max()) + 1 if owner.numel() else 0)
        if isinstance(self.noise, GeometricNoise):
            size = empty.index_add(0, owner, counts)
            clipped = torch.minimum(counts << self.exponent, counts * self.bound // size[owner])
            norm, limit = empty.index_add(0, owner, clipped), self.bound
        else:
            squares = empty.index_add(0, owner, counts.square()).to(torch.float64)
            factor = clip_factor(squares * 4.0**self.exponent, self.bound)
            clipped = torch.trunc((counts << self.exponent) * factor[owner]).to(torch.int64)
            norm, limit = empty.index_add(0, owner, clipped.square()), self.bound**2
        if bool((clipped < 0).any()) or bool((norm > limit).any()):
            raise DPXAttnError(
                "A clipped contribution exceeds its bound: refusing to release. Please report this."
            )
        return clipped

    def _check(self, cells: torch.Tensor, groups: torch.Tensor | None) -> None:
        if cells.ndim != 1 or cells.dtype != torch.int64:
            raise ConfigError(f"cells must be int64 [n], got {cells.ndim} dimensions of {cells.dtype}.")
        n = cells.shape[0]
        check_groups(self.unit.value, n, groups)
        # Under add_or_remove_one the number of rows is private: an empty context must give a release, not an error.
        if n == 0 and self.neighboring is NeighboringRelation.REPLACE_ONE:
            raise ContextError("The context has no rows (n = 0): there is nothing to release.")
        if n > MAX_ROWS:
            raise ContextError(f"The context has too many rows: at most {MAX_ROWS} can be summed exactly.")
        if n and (int(cells.min()) < 0 or int(cells.max()) >= self.cells):
            raise ContextError(f"cells must lie in [0, {self.cells}), the cells of this histogram.")


def prepare_geometric(
    epsilon: float | Fraction,
    *,
    cells: int,
    unit: str,
    neighboring: str,
    group_bound: float | Fraction = 1,
    share_plus: float | Fraction = Fraction(1, 2),
) -> PreparedHistogram:
    """Releases A and C: pure epsilon, delta = 0. Public data only.

    Args:
        group_bound: L, the l1 bound of a unit's contribution in rows (1 for unit='row').
        share_plus: e_plus / epsilon, the part of the budget that keeps empty cells empty; 1/2 (symmetric) under add_or_remove_one.

    Raises:
        ConfigError: a parameter is out of range.
    """
    exact = _epsilon(epsilon)
    which, relation = unit_and_relation(unit, neighboring)
    exponent, bound = _lattice(which, group_bound, 0)
    share = _fraction("share_plus", share_plus)
    if not 0 < share < 1:
        raise ConfigError(f"share_plus must lie in (0, 1), got {share_plus!r}.")
    if relation is NeighboringRelation.REPLACE_ONE:
        rates = exact * share / bound, exact * (1 - share) / bound
    elif share == Fraction(1, 2):
        rates = exact / bound, exact / bound
    else:
        raise ConfigError(
            "share_plus must be 1/2 under add_or_remove_one: the loss is the larger rate, so unequal rates only add noise."
        )
    if min(rates) * MAX_SCALE < 1:
        raise ConfigError(
            f"epsilon = {float(epsilon)!r} is too small for this lattice (scale above 2^40); raise it."
        )
    return PreparedHistogram(
        cells=_cells(cells),
        unit=which,
        neighboring=relation,
        exponent=exponent,
        bound=bound,
        noise=GeometricNoise(*(min(r, Fraction(_MAX_RATE)) for r in rates)),
        events=(PureEvent(exact),),
    )


def prepare_gaussian(
    epsilon: float,
    delta: float,
    *,
    cells: int,
    unit: str,
    neighboring: str,
    group_bound: float | Fraction = 1,
) -> PreparedHistogram:
    """Release G: discrete Gaussian noise on the counts. Public data only.

    Args:
        group_bound: L, the l2 bound of a unit's contribution in rows (1 for unit='row').

    Raises:
        ConfigError: a parameter is out of range.
    """
    which, relation = unit_and_relation(unit, neighboring)
    exponent, bound = _lattice(which, group_bound, _BOUND_BITS - 1)
    sensitivity = bound
    if relation is NeighboringRelation.REPLACE_ONE:
        sensitivity = math.isqrt(2 * bound * bound - 1) + 1
    sigma_squared = gaussian_sigma_squared_beside(epsilon, delta, sensitivity, ())
    return PreparedHistogram(
        cells=_cells(cells),
        unit=which,
        neighboring=relation,
        exponent=exponent,
        bound=bound,
        noise=GaussianNoise(sigma_squared),
        events=(GaussianEvent(sensitivity, sigma_squared),),
    )


def _lattice(unit: Unit, group_bound: float | Fraction, row_exponent: int) -> tuple[int, int]:
    """(k, B = floor(2^k L)); for rows L = 1 and k = row_exponent."""
    limit = _fraction("group_bound", group_bound)
    if not Fraction(1, 1024) <= limit <= 2**20:
        raise ConfigError(f"group_bound must lie in [1/1024, 2^20] rows, got {group_bound!r}.")
    if unit is Unit.ROW:
        if limit != 1:
            raise ConfigError("group_bound is for unit='group' or 'context'; a row contributes one count.")
        return row_exponent, 2**row_exponent
    exponent = _BOUND_BITS - 1 - math.floor(math.log2(limit))
    return exponent, math.floor(limit * 2**exponent)


def _fraction(name: str, value: float | Fraction) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}.")
    return Fraction(value)


def _epsilon(epsilon: float | Fraction) -> Fraction:
    exact = _fraction("epsilon", epsilon)
    if exact <= 0:
        raise ConfigError(f"epsilon must be a positive finite number, got {epsilon!r}.")
    return exact


def _cells(cells: int) -> int:
    if isinstance(cells, bool) or not isinstance(cells, int) or not 1 <= cells <= MAX_CELLS:
        raise ConfigError(f"cells must be an integer from 1 to 2^24, got {cells!r}.")
    return cells
