r"""Truncated Laplace noise on the integers: sampler, and how far a shift leaves its support.

TLap(t, B): P(z) = exp(-|z|/t) / c for integers |z| <= B. It is the noise of the paper (arXiv 2407.14717, section 3.2; Geng, Ding, Guo,
Kumar, "Tight Analysis of Privacy and Utility Tradeoff in Approximate Differential Privacy", AISTATS 2020), whose B = (Delta/eps)
ln(1 + (e^eps - 1)/(2 delta)) is for real numbers. On a lattice, with T(u) the sum of the u outermost masses P(B) + ... + P(B - u + 1),

    T(u) = exp(-B/t) (exp(u/t) - 1) / (exp(1/t) - 1 + 2 (1 - exp(-B/t)))          (two geometric series)

tends to (e^eps - 1) / (2 (exp(B/t) - 1)) as u = Delta = eps t grows, which is the paper's delta.

*Joint release.* y = x + Z, x in Z^d, Z_j independent TLap(t, B). Let x - x' = s with |s|_1 <= D1, |s_j| <= c, |s|_2^2 <= D2, c <= B, let
P and Q be the laws of y from x and x', and E the intersection of their supports (boxes).

1. P(E) = Q(E) >= 1 - sum_j T(|s_j|): y_j leaves the other box only through |s_j| outermost points of its own, and the noise is symmetric.
   T is convex on 0..B + 1 (the masses grow inwards) and T(0) = 0, so the sum is largest at an extreme point of its constraints,

       off_support = floor(D1/c) T(c) + T(D1 mod c).

   With c = D1 this is T(D1): a vector costs what one coordinate costs that takes the whole shift.
2. On E the coordinates are independent, and P/Q = prod_j exp((|y_j - x'_j| - |y_j - x_j|)/t) <= exp(|s|_1/t), so for every event S

       P(S) <= P(S - E) + P(S and E) <= off_support + exp(D1/t) Q(S):     (D1/t, off_support)-DP.

   For d = 1 this is tight: the hockey-stick divergence at D1/t is T(D1), and it is smaller for every smaller shift.
3. Given E, coordinate j is (|s_j|/t)-DP, hence dominated by randomised response with that epsilon; its Renyi divergence at order a is
   r(e) = (L((2a - 1) e) - L(e)) / (a - 1), e = |s_j|/t, L(x) = log cosh(x/2). r(e)/e does not decrease: e r'(e) - r(e) has the sign of
   g((2a - 1) e) - g(e) for g(x) = x L'(x) - L(x), and g' = x L'' >= 0. And r(e) <= a e^2 / 2. So

       D_a(P|E, Q|E) <= min( (D1/c) r(c/t),  a D2 / (2 t^2) ).

4. P(E) = Q(E), so a composition (adaptive, too) is, outside of an event of probability at most the sum of the off_supports, one of
   mechanisms with these curves: if they give (e, d), the composition is (e, d + sum off_support)-DP.

**Exactness.** The sampler rejects from the exact discrete Laplace, so its law is exactly TLap(t, B); every number that decides a
guarantee is a rational from outward rounded integer bounds on exp.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DPXAttnError
from .bernoulli import exp_neg_bounds
from .bits import Entropy
from .events import TruncatedLaplaceEvent, require_integer, require_rational
from .noise import discrete_laplace

__all__ = ["off_support", "tail_mass", "truncated_laplace", "truncation_bound"]

_BITS = 256
_MAX_ROUNDS = 1000
_SMALLEST = Fraction(1, 16)  # of the scale: a smaller bound would reject nearly every candidate


def truncated_laplace(
    shape: int | tuple[int, ...],
    scale: int | Fraction,
    bound: int,
    *,
    entropy: Entropy | None = None,
) -> npt.NDArray[np.int64]:
    """Independent samples with P(z) ~ exp(-|z|/scale) on the integers |z| <= bound, zero outside.

    Source: arXiv 2407.14717 (its noise, on a lattice). Rejection from `discrete_laplace`, each element on its own, is exact: conditioned
    on acceptance a candidate has the truncated law.

    *Formal guarantee.* See the module's docstring. Arguments, result and errors are those of `discrete_laplace`; `bound` is an integer of
    at least scale / 16.
    """
    bound = require_integer(bound, "bound")
    if bound < _SMALLEST * Fraction(scale):
        raise ConfigError("bound must be at least scale / 16: a tighter one is nearly uniform noise.")
    out = discrete_laplace(shape, scale, entropy=entropy)
    flat = out.reshape(-1)
    left = np.flatnonzero(np.abs(flat) > bound)
    for _ in range(_MAX_ROUNDS):
        if left.size == 0:
            return out
        flat[left] = discrete_laplace(left.size, scale, entropy=entropy)
        left = left[np.abs(flat[left]) > bound]
    raise DPXAttnError("The entropy source does not look random: rejection did not end.")


@lru_cache(maxsize=1024)
def tail_mass(scale: Fraction, bound: int, shift: int) -> Fraction:
    """T(shift): the sum of the `shift` outermost masses on one side of TLap(scale, bound), rounded up.

    *Formal guarantee.* Equal to the hockey-stick divergence at epsilon = shift / scale between TLap and its translate by `shift`, and an
    upper bound of it for every smaller translate (module's docstring, step 2). Needs 0 <= shift <= bound.
    """
    if not 0 <= shift <= bound:
        raise ConfigError(f"A shift of {shift} leaves a noise of bound {bound} altogether; raise the bound.")
    if shift == 0:
        return Fraction(0)
    one = 1 << _BITS
    _, outer = exp_neg_bounds(Fraction(bound - shift) / scale, _BITS)
    within, _ = exp_neg_bounds(Fraction(shift) / scale, _BITS)
    _, step = exp_neg_bounds(1 / scale, _BITS)
    _, edge = exp_neg_bounds(Fraction(bound) / scale, _BITS)
    total = Fraction(one - step, step) + Fraction(2 * (one - edge), one)
    return Fraction(outer * (one - within), one * one) / total


def off_support(event: TruncatedLaplaceEvent) -> Fraction:
    """Probability (rounded up) of the outcomes that only one of two neighbours can give: step 1 of the module's docstring."""
    l1, largest, _ = event.shape
    return _off_support(Fraction(event.scale), event.bound, l1, largest)


def _off_support(scale: Fraction, bound: int, l1: int, largest: int) -> Fraction:
    whole, rest = divmod(l1, largest)
    return whole * tail_mass(scale, bound, largest) + tail_mass(scale, bound, rest)


def truncation_bound(
    scale: Fraction | int, sensitivity: int, delta: float, largest: int | None = None
) -> int:
    """The smallest bound B >= max(scale, largest) with off_support <= delta, for that l1 sensitivity and largest coordinate.

    Found by bisection on the summed distributions, not on the formula for real numbers. Raises `ConfigError` unless the arguments are
    positive and exact and 0 < delta < 1.
    """
    scale, l1 = require_rational(scale, "scale"), require_integer(sensitivity, "sensitivity")
    largest = l1 if largest is None else min(l1, require_integer(largest, "largest"))
    if not 0 < delta < 1:
        raise ConfigError(f"delta must lie in (0, 1): truncation needs it, got {delta!r}.")
    limit = Fraction(delta)

    def fits(bound: int) -> bool:
        return _off_support(scale, bound, l1, largest) <= limit

    low = max(math.ceil(scale), largest)  # from the scale up, 6 candidates of 10 are accepted
    if fits(low):
        return low
    high = 2 * low
    while not fits(high):
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
