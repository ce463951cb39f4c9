"""Exact Bernoulli(exp(-x)) draws, many at a time, for x a nonnegative rational.

A draw compares an ideal uniform real u in [0, 1) with exp(-x). The first 32 bits W of u settle nearly
all draws: u lies in [W, W + 1] / 2^32, and a float64 estimate s of 2^32 exp(-x), with a proven error
bound, says that W + 1 <= 2^32 exp(-x) (accept) or W >= 2^32 exp(-x) (reject). The draws that the bound
leaves open, about one in 2^32, get more bits of u and integer interval arithmetic for exp(-x) at a
growing precision, until they too are settled. The outcome is therefore that of real arithmetic, in every
case, and float64 never decides anything that it cannot prove.

**Error bound of the fast path.** Let x be the rational, x' the float64 that stands for it, and
s = fl(exp(-x')) * 2^32 (the product is exact). The caller sees to |x' - x| <= 2^-42 whenever x <= 64, and
x' > 63 whenever x > 64. With exp within a relative error of 2^-48 (16 ulp; numpy and the usual C libraries
stay below 4),

    |s - 2^32 exp(-x)| <= 2^32 exp(-x) (2^-42 + 2^-48 + second order) < 2^-9.9    for x <= 64,
    s and 2^32 exp(-x) are both below 2^-58                                       for x > 64.

The subtraction s - W adds at most 2^-20. `GUARD` = 2^-8 is more than three times the sum.

Assumed of float64: +, -, * and conversions within 2^-52 relative (so any rounding mode; flushing subnormals
does no harm), and the bound on exp, which the tests compare with 50-digit decimals.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hf_dp_xattn.errors import DPXAttnError
from hf_dp_xattn.privacy.bits import Entropy, read_exactly, words32

GUARD = 2.0**-8
"""Half-width of the undecided band, in units of the last of the 32 bits."""

WORD_BITS = 32
MAX_UNIFORM_BITS = 2048
"""A uniform that is still undecided at this many bits (probability below 2^-2000) is an error."""

_TABLE_BITS = 96


def exp_neg_bounds(x: Fraction, bits: int) -> tuple[int, int]:
    """Integers lo, hi with lo <= 2^bits exp(-x) <= hi and hi - lo <= 2, for a rational x >= 0.

    Fixed-point integers, rounded outwards at each step: exp(-x) = exp(-y)^(2^j) with y = x / 2^j < 1/2,
    and the alternating Taylor series of exp(-y), whose partial sums err by less than the first term left
    out.
    """
    if x < 0:
        raise ValueError("exp_neg_bounds needs x >= 0")
    if x == 0:
        return 1 << bits, 1 << bits
    halvings = int(x).bit_length() + 1
    # Each squaring at most doubles the width (values are at most 1) and adds 2; the series adds under
    # 4 for each of its terms, of which there are fewer than working + 2.
    working = bits + halvings + 16
    working += working.bit_length()
    numerator, denominator = x.numerator << working, x.denominator << halvings
    y_lo, y_hi = numerator // denominator, -(-numerator // denominator)
    one = 1 << working
    term_lo = term_hi = one  # y^k / k!
    sum_lo = sum_hi = one
    k = 0
    while term_hi > 1:
        k += 1
        term_lo = term_lo * y_lo // (k * one)
        term_hi = -(-(term_hi * y_hi) // (k * one))
        if k % 2:
            sum_lo, sum_hi = sum_lo - term_hi, sum_hi - term_lo
        else:
            sum_lo, sum_hi = sum_lo + term_lo, sum_hi + term_hi
    lo, hi = max(sum_lo - 1, 0), min(sum_hi + 1, one)
    for _ in range(halvings):
        lo, hi = (lo * lo) >> working, -((-hi * hi) >> working)
    shift = working - bits
    return lo >> shift, -(-hi >> shift)


class LazyUniform:
    """A uniform real in [0, 1) of which as many bits are drawn as its comparisons need.

    Errors: `DPXAttnError` past `MAX_UNIFORM_BITS` bits, which tells of a broken entropy source.
    """

    def __init__(self, entropy: Entropy, first_bits: int) -> None:
        self._entropy = entropy
        self._value = first_bits
        self._bits = WORD_BITS

    def below_exp_neg(self, x: Fraction) -> bool:
        """Whether this uniform is below exp(-x), decided exactly.

        exp(-x) is irrational for a rational x > 0, so the two differ at some bit with probability 1.
        """
        while True:
            lo, hi = exp_neg_bounds(x, self._bits)
            if self._value + 1 <= lo:
                return True
            if self._value >= hi:
                return False
            if self._bits >= MAX_UNIFORM_BITS:
                raise DPXAttnError(
                    f"{self._entropy!r} does not look random: {self._bits} bits did not settle a comparison"
                )
            more = read_exactly(self._entropy, 8)
            self._value = (self._value << 64) | int.from_bytes(more, "little")
            self._bits += 64


class BernoulliExp:
    """Exact Bernoulli(exp(-x)) and geometric draws from one entropy source.

    `guard` widens the undecided band (tests do that, to send many draws down the exact path; any value
    from `GUARD` up gives the same distribution). `settled` counts the draws that took that path.
    """

    def __init__(self, entropy: Entropy, guard: float = GUARD) -> None:
        if not guard >= GUARD:
            raise ValueError(f"the error bound needs a guard of at least {GUARD}")
        self.entropy = entropy
        self.guard = guard
        self.settled = 0

    def draw(self, x: npt.NDArray[np.float64], exact: Callable[[int], Fraction]) -> npt.NDArray[np.bool_]:
        """One Bernoulli(exp(-x_i)) for each element; True means success.

        `x` holds float64 stand-ins for the rationals `exact(i)`, within the bound of the module's
        docstring. `exact(i)` is called only for elements that the first 32 bits leave undecided.
        """
        words = words32(self.entropy, x.size)
        with np.errstate(under="ignore"):
            gap = np.exp(-x)
        gap *= 2.0**WORD_BITS
        gap -= words
        success: npt.NDArray[np.bool_] = gap > -self.guard  # cannot be ruled out ...
        certain = gap >= 1.0 + self.guard  # ... and is proven
        for i in np.flatnonzero(success != certain).tolist():
            self.settled += 1
            success[i] = LazyUniform(self.entropy, int(words[i])).below_exp_neg(exact(i))
        return success

    def geometric(self, n: int, rate: Fraction) -> npt.NDArray[np.int64]:
        """`n` independent V with P(V >= k) = exp(-k rate): the successes before the first failure of
        repeated Bernoulli(exp(-rate)) draws.

        Sampled by inversion of one uniform: V = #{k >= 1 : u < exp(-k rate)}, which has the same law as
        the repeated draws. The thresholds are floor(2^32 exp(-k rate)), exact integers; a word that
        equals one of them (or 0, where the table ends) is undecided and settled bit by bit.
        """
        words = words32(self.entropy, n)
        thresholds = geometric_thresholds(rate)
        slack = int(self.guard)  # 0 unless a test widens the band
        values = np.zeros(n, dtype=np.uint8)
        undecided = np.zeros(n, dtype=np.bool_)
        for threshold in thresholds:
            values += words < np.uint32(threshold)
            if slack:
                low = np.uint32(max(threshold - slack, 0))
                high = np.uint32(min(threshold + slack, 2**WORD_BITS - 1))
                undecided |= (words >= low) & (words <= high)
            else:
                undecided |= words == np.uint32(threshold)
        out = values.astype(np.int64)
        for i in np.flatnonzero(undecided).tolist():
            self.settled += 1
            u = LazyUniform(self.entropy, int(words[i]))
            value = 0
            while u.below_exp_neg((value + 1) * rate):
                value += 1
            out[i] = value
        return out


@lru_cache(maxsize=256)
def geometric_thresholds(rate: Fraction) -> tuple[int, ...]:
    """floor(2^32 exp(-k rate)) for k = 1, 2, ..., up to and with the first that is 0. Needs rate >= 1/4."""
    if rate < Fraction(1, 4):  # the table must stay short, and its counts within 8 bits
        raise ValueError("geometric_thresholds needs rate >= 1/4")
    thresholds: list[int] = []
    bits = _TABLE_BITS
    while not thresholds or thresholds[-1] > 0:
        lo, hi = exp_neg_bounds((len(thresholds) + 1) * rate, bits)
        if lo >> (bits - WORD_BITS) == hi >> (bits - WORD_BITS):
            thresholds.append(lo >> (bits - WORD_BITS))
            bits = _TABLE_BITS
        else:
            bits *= 2
    return tuple(thresholds)
