"""Exact discrete noise on the integers: Gaussian, Laplace and one-sided geometric.

Source: C. Canonne, G. Kamath, T. Steinke, "The Discrete Gaussian for Differential Privacy" (NeurIPS 2020,
arXiv 2004.00010), algorithms 1 to 3, run on whole numpy batches. Two steps are generalised:

* Algorithm 2 (discrete Laplace, scale tau) draws U uniform on {0, ..., m - 1}, D ~ Bernoulli(exp(-U/tau))
  until D = 1, and V geometric with P(V >= k) = exp(-k m / tau); then X = U + m V has P(X = x) proportional
  to exp(-x/tau), because x = u + m v splits exp(-x/tau) into exp(-u/tau) exp(-m/tau)^v. Any integer m >= 1
  is right. We take m = ceil(tau), which for an integer tau is the paper's algorithm word for word; for a
  fraction s/t the paper reaches the same law by m = s and a division by t, which overflows for long
  fractions.
* V comes from one uniform by inversion rather than from a loop of Bernoulli(exp(-1)) draws; same law.

**Exactness.** Every random decision is either an unbiased integer from the entropy source or a Bernoulli
with success probability exp(-x), x rational, decided exactly (`hf_dp_xattn.privacy.bernoulli`: float64
settles only what its error bound proves; the rest is integer arithmetic). No float64 result ever becomes
part of an output. Rejection keeps the first accepted candidates of an i.i.d. sequence, in order, and both
signs of zero are handled by rejecting (sign = 1, magnitude = 0).

**Timing.** J. Jin, E. McMurtry, B. Rubinstein, O. Ohrimenko, "Are We There Yet? Timing and Floating-Point
Attacks on Differential Privacy Systems" (IEEE S&P 2022) recover discrete noise from the running time of
one-at-a-time samplers, whose loops run longer for larger values. Here every element of a batch goes through
the same vector instructions whatever its value; what depends on the random draws is how many candidates a
block rejects (a number shared by up to 65536 outputs) and the rare exact settlements (about one in 10^9
draws, some tens of microseconds each). That is NOT constant time. A release must draw its noise as a whole,
off the query path, and must not report how long the drawing took.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from fractions import Fraction
from typing import Final

import numpy as np
import numpy.typing as npt

from hf_dp_xattn.errors import ConfigError, DPXAttnError
from hf_dp_xattn.privacy.bernoulli import GUARD, BernoulliExp
from hf_dp_xattn.privacy.bits import Entropy, SeededEntropy, SystemEntropy, coin_flips, uniform_below

__all__ = [
    "MAX_SCALE",
    "MAX_SIGMA_SQUARED",
    "MIN_SCALE",
    "MIN_SIGMA_SQUARED",
    "SAMPLING_DISTANCE",
    "Entropy",
    "SeededEntropy",
    "SystemEntropy",
    "discrete_gaussian",
    "discrete_geometric",
    "discrete_laplace",
    "sampling_distance",
]

MIN_SIGMA_SQUARED: Final = Fraction(1, 16)
MAX_SIGMA_SQUARED: Final = Fraction(1 << 80)
MIN_SCALE: Final = Fraction(1, 8)
MAX_SCALE: Final = Fraction(1 << 40)

SAMPLING_DISTANCE: Final = 0.0
"""Total variation distance between the noise that is returned and the distribution that is named: zero.

It rests on three assumptions: (1) the entropy source gives independent uniform bytes; (2) float64 +, -, * and
conversions err by at most 2^-52 relative; (3) numpy's float64 exp errs by at most 2^-48 relative (16 ulp) on
[-64, 0]. A uniform that 2048 bits do not settle (probability below 2^-2000 per draw) and a source so biased
that rejection does not end raise `DPXAttnError` and return nothing. Counted as a distance, those events add
less than 2^-2000 per draw, which as a float64 is 0.0; they also bound every magnitude by 2^52.
"""

_BLOCK = 1 << 16  # outputs made at a time: bounds memory, and keeps the temporaries in cache
_MAX_ROUNDS = 1000

_Ints = npt.NDArray[np.int64]


def sampling_distance() -> float:
    """Statistical distance eta per sample to add to a privacy proof: `SAMPLING_DISTANCE`, which is 0.0.

    An approximate sampler would have to pay (1 + exp(epsilon)) * eta in delta for each sample; an exact
    one pays nothing. The assumptions are those that `SAMPLING_DISTANCE` lists.
    """
    return SAMPLING_DISTANCE


def discrete_gaussian(
    shape: int | tuple[int, ...],
    sigma_squared: int | Fraction,
    *,
    entropy: Entropy | None = None,
) -> npt.NDArray[np.int64]:
    """Independent samples of the discrete Gaussian N_Z(0, sigma^2): P(z) ~ exp(-z^2/(2 sigma^2)), z integer.

    Source: Canonne, Kamath, Steinke 2020 (arXiv 2004.00010), algorithm 3: a discrete Laplace candidate Y of
    scale t = floor(sigma) + 1 is kept with probability exp(-(|Y| - sigma^2/t)^2 / (2 sigma^2)).

    *Formal guarantee.* If two neighbouring contexts change an integer vector q by at most Delta in L2 norm,
    the release q + discrete_gaussian(q.shape, sigma_squared) is (Delta^2 / (2 sigma^2))-zCDP (theorem 4 of
    the paper for one coordinate, and its multivariate form), because the samples have exactly this
    distribution (`SAMPLING_DISTANCE` is 0.0; see its assumptions). sigma^2 is the parameter of the density;
    the variance of the samples is at most that, and equal to it for practical purposes from sigma = 1 up.

    Arguments: `shape`, an int or a tuple; `sigma_squared`, an exact rational in units of the lattice,
    between `MIN_SIGMA_SQUARED` and `MAX_SIGMA_SQUARED` (a finite float stands for the rational that it
    is exactly); `entropy`, `SystemEntropy()` unless given (`SeededEntropy` is for tests and not private).

    Returns an int64 array; magnitudes stay below 2^52. Memory beyond the result is a few MiB.

    Errors: `ConfigError` for a bad shape or parameter, before anything is drawn; `OSError` when the
    operating system has no entropy; `DPXAttnError` when the entropy source is broken.
    """
    dims = _check_shape(shape)
    s2 = _check_parameter("sigma_squared", sigma_squared, MIN_SIGMA_SQUARED, MAX_SIGMA_SQUARED)
    draws = BernoulliExp(_check_entropy(entropy), GUARD)
    return _in_blocks(dims, lambda n: gaussian_block(draws, n, s2))


def discrete_laplace(
    shape: int | tuple[int, ...],
    scale: int | Fraction,
    *,
    entropy: Entropy | None = None,
) -> npt.NDArray[np.int64]:
    """Independent samples of the discrete Laplace (two-sided geometric): P(z) ~ exp(-|z|/scale), z integer.

    Source: Canonne, Kamath, Steinke 2020 (arXiv 2004.00010), algorithm 2, with the step for fractions that
    the module's docstring describes.

    *Formal guarantee.* If two neighbouring contexts change an integer vector q by at most Delta in L1 norm,
    the release q + discrete_laplace(q.shape, scale) is (Delta / scale)-DP, pure, because the samples have
    exactly this distribution (`SAMPLING_DISTANCE` is 0.0; see its assumptions).

    Arguments, result and errors are those of `discrete_gaussian`, with `scale` an exact rational between
    `MIN_SCALE` and `MAX_SCALE`.
    """
    dims = _check_shape(shape)
    tau = _check_parameter("scale", scale, MIN_SCALE, MAX_SCALE)
    draws = BernoulliExp(_check_entropy(entropy), GUARD)
    return _in_blocks(dims, lambda n: laplace_block(draws, n, tau))


def discrete_geometric(
    shape: int | tuple[int, ...],
    scale: int | Fraction,
    *,
    entropy: Entropy | None = None,
) -> npt.NDArray[np.int64]:
    """Independent samples of the one-sided geometric: P(k) ~ exp(-k/scale) for k = 0, 1, 2, ...

    Source: the magnitude step of algorithm 2 of Canonne, Kamath, Steinke 2020 (arXiv 2004.00010).

    One-sided noise protects nothing by itself. It is the part from which an asymmetric two-sided geometric
    is made: the difference of two independent samples of scales a and b has P(z) proportional to exp(-z/a)
    for z >= 0 and to exp(z/b) for z <= 0.

    Arguments, result and errors are those of `discrete_laplace`.
    """
    dims = _check_shape(shape)
    tau = _check_parameter("scale", scale, MIN_SCALE, MAX_SCALE)
    draws = BernoulliExp(_check_entropy(entropy), GUARD)
    return _in_blocks(dims, lambda n: geometric_block(draws, n, tau))


def geometric_block(draws: BernoulliExp, n: int, tau: Fraction) -> _Ints:
    """`n` samples with P(x) proportional to exp(-x/tau), x >= 0, for a checked tau."""
    m = math.ceil(tau)
    rate = m / tau  # a Fraction in [1, 8]
    if m == 1:
        return draws.geometric(n, rate)
    inverse = float(1 / tau)
    # Share of the uniforms that D keeps: (1/m) sum exp(-u/tau), at least this much.
    kept = (1.0 - math.exp(-float(rate))) / float(rate)

    def uniforms(k: int) -> _Ints:
        u = uniform_below(draws.entropy, k, m)
        # x = U/tau < 1: U is exact in float64, the inverse and the product round once each (2^-51).
        keep = draws.draw(np.multiply(u, inverse), lambda i: Fraction(int(u[i])) / tau)
        return u.take(np.flatnonzero(keep))

    out = _rejection(draws.entropy, n, kept, uniforms)
    out += draws.geometric(n, rate) * np.int64(m)
    return out


def laplace_block(draws: BernoulliExp, n: int, tau: Fraction) -> _Ints:
    """`n` samples with P(z) proportional to exp(-|z|/tau), for a checked tau."""
    q = math.exp(-1.0 / float(tau))
    return _rejection(draws.entropy, n, (1.0 + q) / 2.0, lambda k: _signed(draws, k, tau))


def _signed(draws: BernoulliExp, k: int, tau: Fraction) -> _Ints:
    magnitude = geometric_block(draws, k, tau)
    negative = coin_flips(draws.entropy, k)
    # -0 must go, or zero would come twice as often as it should.
    keep = np.flatnonzero((magnitude != 0) | (negative == 0))
    return (magnitude * (1 - 2 * negative.astype(np.int64))).take(keep)


def gaussian_block(draws: BernoulliExp, n: int, s2: Fraction) -> _Ints:
    """`n` samples with P(z) proportional to exp(-z^2/(2 s2)), for a checked s2.

    Error of the exponent x = (|Y| - c)^2 w, with c = sigma^2/t and w = 1/(2 sigma^2) each rounded once to
    float64 and |Y| < 2^52 exact. With u = 2^-52, the difference errs by at most u (c + |a|), and c <= sigma
    because t > sigma, so that |x' - x| <= u (sqrt(2 x) + 7 x) to first order: below 2^-43 for x <= 64.
    """
    t = math.isqrt(s2.numerator // s2.denominator) + 1
    tau = Fraction(t)
    centre = s2 / t
    centre_f, weight_f = float(centre), float(1 / (2 * s2))

    def candidates(k: int) -> _Ints:
        y = _signed(draws, k, tau)
        a = np.abs(y) - centre_f
        keep = draws.draw(a * a * weight_f, lambda i: (abs(int(y[i])) - centre) ** 2 / (2 * s2))
        return y.take(np.flatnonzero(keep))

    return _rejection(draws.entropy, n, _gaussian_acceptance(s2, t), candidates)


def _gaussian_acceptance(s2: Fraction, t: int) -> float:
    """Estimate of the share of signed candidates that algorithm 3 keeps. Sizes the batches, no more."""
    sigma = math.sqrt(s2)
    one_minus_q = -math.expm1(-1.0 / t)
    if sigma < 8:
        mass = sum(math.exp(-(z * z) / (2 * float(s2))) for z in range(-80, 81))
    else:
        mass = sigma * math.sqrt(2 * math.pi)
    # Sum over y of (1-q)/2 q^|y| exp(-(|y| - s2/t)^2 / (2 s2)), with q = exp(-1/t).
    return one_minus_q / 2 * math.exp(-float(s2) / (2 * t * t)) * mass


def _rejection(entropy: Entropy, n: int, acceptance: float, candidates: Callable[[int], _Ints]) -> _Ints:
    """The first `n` accepted of an i.i.d. sequence of candidates; `candidates(k)` tries k of them.

    `acceptance` only sizes the batches. How many candidates a round tries depends on how many are still
    missing, never on their values, so that keeping the first `n` in order leaves them i.i.d.
    """
    out = np.empty(n, dtype=np.int64)
    filled = 0
    for _ in range(_MAX_ROUNDS):
        if filled == n:
            return out
        expected = (n - filled) / acceptance
        accepted = candidates(int(expected + 4.0 * math.sqrt(expected)) + 16)
        take = min(accepted.size, n - filled)
        out[filled : filled + take] = accepted[:take]
        filled += take
    if filled == n:
        return out
    raise DPXAttnError(f"{entropy!r} does not look random: {_MAX_ROUNDS} rounds of rejection were not enough")


def _in_blocks(dims: tuple[int, ...], block: Callable[[int], _Ints]) -> _Ints:
    out = np.empty(math.prod(dims), dtype=np.int64)
    for start in range(0, out.size, _BLOCK):
        part = out[start : start + _BLOCK]
        part[:] = block(part.size)
    return out.reshape(dims)


def _check_shape(shape: int | tuple[int, ...]) -> tuple[int, ...]:
    dims = shape if isinstance(shape, tuple) else (shape,)
    for d in dims:
        if isinstance(d, (bool, np.bool_)) or not isinstance(d, numbers.Integral) or d < 0:
            raise ConfigError(f"shape must be a nonnegative int or a tuple of them, got {shape!r}")
    return tuple(int(d) for d in dims)


def _check_parameter(name: str, value: int | Fraction, low: Fraction, high: Fraction) -> Fraction:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Rational, float)):
        raise ConfigError(
            f"{name} must be an int or a fractions.Fraction (or a finite float, taken at its exact value), "
            f"got {type(value).__name__}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value}")
    exact = Fraction(int(value)) if isinstance(value, numbers.Integral) else Fraction(value)
    if exact <= 0:
        raise ConfigError(f"{name} must be positive: {name} = {_short(exact)} would add no noise")
    if exact < low:
        raise ConfigError(
            f"{name} = {_short(exact)} is below {low}: nearly every sample would be zero. Use a finer "
            "lattice, so that the noise spans at least a few of its steps"
        )
    if exact > high:
        raise ConfigError(
            f"{name} = {_short(exact)} is above 2^{high.numerator.bit_length() - 1}: results could leave the "
            "range that int64 and the error bounds cover. Use a coarser lattice"
        )
    return exact


def _short(value: Fraction) -> str:
    if value.denominator == 1 and abs(value.numerator) < 10**12:
        return str(value.numerator)
    try:
        return f"{float(value):.6g}"
    except OverflowError:
        return "a number beyond float64"


def _check_entropy(entropy: Entropy | None) -> Entropy:
    if entropy is None:
        return SystemEntropy()
    if isinstance(entropy, type) or not isinstance(entropy, Entropy):
        raise ConfigError(
            f"entropy must have `private` and `random_bytes(n)`, such as SystemEntropy(), "
            f"got {type(entropy).__name__}"
        )
    return entropy
