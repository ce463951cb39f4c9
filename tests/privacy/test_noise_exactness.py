"""Every decision of the samplers is exact; entropy and interface of the samplers."""

from __future__ import annotations

import math
import os
import random
import tracemalloc
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError, DPXAttnError
from hf_dp_xattn.privacy import bernoulli, bits, noise
from hf_dp_xattn.privacy.noise import (
    SeededEntropy,
    SystemEntropy,
    discrete_gaussian,
    discrete_geometric,
    discrete_laplace,
)

from .laws import (
    ALPHA,
    Law,
    N,
    accepted,
    chi_square,
    p_values,
)

# --- exactness of every decision ------------------------------------------------------------------


def exp_neg(x: Fraction, digits: int) -> Fraction:
    """exp(-x) with a relative error below 10^-digits, by the decimal module (an independent route)."""
    with localcontext() as ctx:
        ctx.prec = digits + 20
        ctx.Emin, ctx.Emax = -(10**12), 10**12
        return Fraction((-Decimal(x.numerator) / Decimal(x.denominator)).exp())


rationals = st.one_of(
    st.fractions(0, 70),
    st.builds(lambda a, b: Fraction(a, b), st.integers(0, 2**90), st.integers(2**84, 2**90)),
    st.builds(lambda a, b: Fraction(a, 1 << b), st.integers(1, 50), st.integers(0, 200)),
)


@given(rationals, st.sampled_from([8, 32, 53, 96, 200]))
@settings(max_examples=300, deadline=None)
def test_exp_bounds_contain_the_value(x, precision):
    lo, hi = bernoulli.exp_neg_bounds(x, precision)
    true = exp_neg(x, 120)
    assert 0 <= lo <= hi <= lo + 2
    slack = Fraction(1, 10**100) if x else 0
    assert lo <= true * 2**precision * (1 + slack)
    assert hi >= true * 2**precision * (1 - slack)


def test_exp_bounds_of_zero_large_and_negative():
    assert bernoulli.exp_neg_bounds(Fraction(0), 32) == (2**32, 2**32)
    lo, hi = bernoulli.exp_neg_bounds(Fraction(2**100, 3), 64)
    assert lo == 0 and 1 <= hi <= 2
    with pytest.raises(ValueError):
        bernoulli.exp_neg_bounds(Fraction(-1, 2), 32)


def test_exp_of_numpy_is_far_within_the_assumed_error():
    """Assumed: 2^-48 relative. Found everywhere: under 2^-50, at every array length, remainder and stride."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.uniform(0, 64, 6000), rng.exponential(1, 6000), 2.0 ** -rng.uniform(0, 60, 2000)])
    whole = np.exp(-x)
    for got, at in zip(whole.tolist(), x.tolist(), strict=True):
        true = exp_neg(Fraction(at), 30)
        assert abs(Fraction(got) - true) <= true * Fraction(1, 2**50)
    for n in range(1, 40):
        assert np.all(np.abs(np.exp(-x[:n]) - whole[:n]) <= 2.0**-50 * whole[:n])
        assert np.all(np.abs(np.exp(-x[: 5 * n : 5]) - whole[: 5 * n : 5]) <= 2.0**-50 * whole[: 5 * n : 5])


class Checked(bernoulli.BernoulliExp):
    """Checks the promise that callers of `draw` make, and that the estimate s is within GUARD / 3."""

    checked = 0

    def draw(self, x, exact):
        for i in range(0, x.size, max(1, x.size // 12)):
            self.checked += 1
            true, stand_in = exact(i), Fraction(float(x[i]))
            if true <= 64:
                assert abs(stand_in - true) <= Fraction(1, 2**42)
            else:
                assert stand_in > 63
            s = Fraction(float(np.exp(-x)[i])) * 2**32
            ideal = exp_neg(true, 40) * 2**32 if true <= 100 else 0  # 2^32 exp(-100) < 2^-112
            assert abs(s - ideal) <= Fraction(bernoulli.GUARD) / 3
        return super().draw(x, exact)


fraction_of_size = st.builds(
    lambda a, b, e: min(max(Fraction(a, b) * Fraction(2) ** e, Fraction(1, 16)), Fraction(2**80)),
    st.integers(1, 2**70),
    st.integers(1, 2**70),
    st.integers(-10, 85),
)


@given(fraction_of_size, st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_float_estimates_keep_their_error_bound(value, seed):
    draws = Checked(SeededEntropy(seed))
    assert noise.gaussian_block(draws, 20, value).size == 20
    assert draws.checked
    tau = min(max(value, noise.MIN_SCALE), noise.MAX_SCALE)
    assert noise.laplace_block(draws, 20, tau).size == 20


def test_float_estimates_in_the_far_tail():
    """Candidates that the sampler itself would hardly ever draw, up to the largest possible."""
    for s2 in (Fraction(1, 16), Fraction(10, 3), Fraction(10**9, 7), Fraction(2**80)):
        t = math.isqrt(math.floor(s2)) + 1
        centre_f, weight_f = float(s2 / t), float(1 / (2 * s2))
        for k in [*range(40), 200, 2000]:
            y = k * t + k % 3
            a = np.abs(np.array([y])) - centre_f
            true = (y - s2 / t) ** 2 / (2 * s2)
            Checked(SeededEntropy(1)).draw(a * a * weight_f, lambda i, true=true: true)
    assert (2900 * (2**40 + 1)) < 2**52


class Script:
    """An entropy source that plays given bytes, and fails when they are used up."""

    private = False

    def __init__(self, data: bytes) -> None:
        self.data, self.used = data, 0

    def random_bytes(self, n: int) -> bytes:
        assert self.used + n <= len(self.data), "more bits than expected"
        self.used += n
        return self.data[self.used - n : self.used]


def word(value: int) -> bytes:
    return value.to_bytes(4, "little")


@given(rationals, st.integers(-2, 2), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
@settings(max_examples=300, deadline=None)
def test_draws_next_to_the_threshold_are_decided_exactly(x, offset, more, last):
    """u's first 32 bits at the threshold and up to 2 units off it: the outcome is that of real numbers."""
    threshold = math.floor(exp_neg(x, 60) * 2**32)
    first = min(max(threshold + offset, 0), 2**32 - 1)
    source = Script(word(first) + more.to_bytes(8, "little") + last.to_bytes(8, "little"))
    draws = bernoulli.BernoulliExp(source)
    got = bool(draws.draw(np.array([float(x)]), lambda i: x)[0])
    u = Fraction((first << 128) | (more << 64) | last, 1 << 160)
    assert got == (u < exp_neg(x, 120))
    if offset == 0 and x > 0:
        assert draws.settled == 1
    if abs(offset) == 2 and x > 0 and 4 < threshold < 2**32 - 4:
        assert draws.settled == 0 and source.used == 4


@given(st.fractions(1, 8), st.integers(1, 12), st.integers(-2, 2), st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_geometric_next_to_its_thresholds_is_decided_exactly(rate, k, offset, more):
    first = min(max(math.floor(exp_neg(k * rate, 60) * 2**32) + offset, 0), 2**32 - 1)
    source = Script(word(first) + (more | 1 << 40).to_bytes(8, "little") + b"\1" * 32)
    draws = bernoulli.BernoulliExp(source)
    got = int(draws.geometric(1, rate)[0])
    u = Fraction((first << 64) | (more | 1 << 40), 1 << 96)
    expected = 0
    while u < exp_neg((expected + 1) * rate, 120):
        expected += 1
    assert got == expected
    assert draws.settled == (1 if offset == 0 or first == 0 else draws.settled)


def test_geometric_thresholds_are_floors():
    for rate in (Fraction(1), Fraction(8), Fraction(9, 7), Fraction(1, 4), 1 + Fraction(1, 2**60)):
        thresholds = bernoulli.geometric_thresholds(rate)
        assert thresholds[-1] == 0 and 0 not in thresholds[:-1] and len(thresholds) < 200
        for k, threshold in enumerate(thresholds, start=1):
            assert threshold == math.floor(exp_neg(k * rate, 60) * 2**32)
    with pytest.raises(ValueError):
        bernoulli.geometric_thresholds(Fraction(1, 5))


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("parameter", [Fraction(10, 3), 2**30], ids=str)
def test_exact_path_has_the_same_law(kind, parameter):
    """With the undecided band widened to 2^-5 of the range, some 5 % of all draws go the exact way."""
    draws = bernoulli.BernoulliExp(SeededEntropy(41), guard=2.0**26)
    block = noise.gaussian_block if kind == "gaussian" else noise.laplace_block
    n = 30_000
    z = block(draws, n, Fraction(parameter))
    assert draws.settled > 0.02 * n
    p = p_values(z, Law(kind, parameter))
    assert min(p.values()) >= ALPHA, p


@pytest.mark.parametrize("wrong", ["always", "never"])
def test_a_wrong_exact_path_is_caught(monkeypatch, wrong):
    """The exact path carries enough of the draws above for its errors to show."""

    def below(self, x):
        return wrong == "always" and x < 20

    monkeypatch.setattr(bernoulli.LazyUniform, "below_exp_neg", below)
    draws = bernoulli.BernoulliExp(SeededEntropy(42), guard=2.0**26)
    assert not accepted(
        noise.gaussian_block(draws, 30_000, Fraction(10, 3)), Law("gaussian", Fraction(10, 3))
    )


def test_the_guard_cannot_be_narrowed():
    for guard in (0.0, bernoulli.GUARD / 2, math.nan):
        with pytest.raises(ValueError):
            bernoulli.BernoulliExp(SeededEntropy(0), guard=guard)


@pytest.mark.parametrize("bound", [2, 3, 12, 1000, 2**16, 2**16 + 1, 3 * 2**40, 2**48])
def test_uniform_integers(bound):
    u = bits.uniform_below(SeededEntropy(51), N, bound)
    assert u.min() >= 0 and u.max() < bound and u.dtype == np.int64
    bins = min(bound, 48)
    edges = [-(-bound * k // bins) for k in range(bins + 1)]
    seen = np.histogram(u, bins=[e - 0.5 for e in edges])[0]
    assert chi_square(seen, np.diff(edges) / bound) >= ALPHA
    for modulus in (2, 3):
        if bound % modulus == 0:
            assert chi_square(np.bincount(u % modulus), np.full(modulus, 1 / modulus)) >= ALPHA


@pytest.mark.parametrize(("bound", "size"), [(3, 4), (1000, 4), (2**16 + 1, 8), (3 * 2**40, 8)])
def test_uniform_integers_reject_the_incomplete_last_run(bound, size):
    full = (2 ** (8 * size) // bound) * bound
    assert full < 2 ** (8 * size)  # so modulo without rejection would be biased
    for rejected in (full, 2 ** (8 * size) - 1):
        source = Script(rejected.to_bytes(size, "little") + (full - 1).to_bytes(size, "little"))
        assert bits.uniform_below(source, 1, bound).tolist() == [bound - 1]
        assert source.used == 2 * size
    source = Script(b"".join(v.to_bytes(size, "little") for v in (bound, full, bound + 1, full - bound)))
    assert bits.uniform_below(source, 3, bound).tolist() == [0, 1, 0]


def test_uniform_integers_refuse_bad_bounds():
    assert bits.uniform_below(Script(b""), 3, 1).tolist() == [0, 0, 0]
    for bound in (0, -1, 2**48 + 1):
        with pytest.raises(ConfigError):
            bits.uniform_below(SeededEntropy(0), 1, bound)


def test_sampling_distance_is_zero():
    assert noise.sampling_distance() == noise.SAMPLING_DISTANCE == 0.0


# --- entropy --------------------------------------------------------------------------------------


def test_system_entropy_is_the_only_randomness(monkeypatch):
    """The output is a function of the bytes of os.urandom, and of nothing else."""
    asked = []

    def fake(seed):
        source = SeededEntropy(seed)

        def urandom(n):
            asked.append(n)
            return source.random_bytes(n)

        return urandom

    results = []
    for seed, global_seed in ((61, 1), (61, 2), (62, 1)):
        np.random.seed(global_seed)
        random.seed(global_seed)
        monkeypatch.setattr(os, "urandom", fake(seed))
        results.append(np.stack([discrete_gaussian(5000, 2**40), discrete_laplace(5000, 2**20)]))
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    # At scale 2^20 and with i.i.d. samples, fewer bytes than this could not carry the entropy of the output.
    assert sum(asked) / 3 > 2 * 5000 * 21 / 8


@pytest.mark.parametrize("error", [OSError("no entropy"), NotImplementedError("no entropy")])
def test_failing_system_entropy_fails_the_sampler(monkeypatch, error):
    def urandom(n):
        raise error

    monkeypatch.setattr(os, "urandom", urandom)
    with pytest.raises(type(error)):
        discrete_gaussian(10, 100)
    with pytest.raises(type(error)):
        discrete_laplace(10, Fraction(1, 2))


def test_short_reads_fail(monkeypatch):
    class Short:
        private = True

        def random_bytes(self, n):
            return bytes(max(n - 1, 0))

    with pytest.raises(DPXAttnError, match="bytes"):
        discrete_gaussian(10, 100, entropy=Short())
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n - 1))
    with pytest.raises(DPXAttnError, match="bytes"):
        discrete_gaussian(10, 100)


@pytest.mark.slow
@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
@pytest.mark.parametrize("scale", [Fraction(1, 2), 5, 8])
def test_stuck_sources_fail_rather_than_give_no_noise(byte, scale):
    class Stuck:
        private = True

        def random_bytes(self, n):
            return byte * n

    with pytest.raises(DPXAttnError, match="random"):
        discrete_laplace(3, scale, entropy=Stuck())


def test_large_reads_come_in_parts(monkeypatch):
    sizes = []
    real = os.urandom

    def urandom(n):
        sizes.append(n)
        return real(n)

    monkeypatch.setattr(os, "urandom", urandom)
    assert len(SystemEntropy().random_bytes((1 << 24) + 5)) == (1 << 24) + 5
    assert sizes == [1 << 24, 5]
    assert SystemEntropy().random_bytes(0) == b""


def test_private_flags_and_repr():
    assert SystemEntropy().private is True
    assert SeededEntropy(123456).private is False
    assert "123456" not in repr(SeededEntropy(123456))
    with pytest.raises(AttributeError):
        SeededEntropy(1).private = True
    for seed in (-1, 1.5, True, "1", None):
        with pytest.raises(ConfigError):
            SeededEntropy(seed)


def test_seeded_is_reproducible_and_system_is_not():
    a, b = (discrete_gaussian((7, 50), 2**50, entropy=SeededEntropy(5)) for _ in range(2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, discrete_gaussian((7, 50), 2**50, entropy=SeededEntropy(6)))
    source = SeededEntropy(5)
    first, second = (discrete_gaussian((7, 50), 2**50, entropy=source) for _ in range(2))
    assert np.array_equal(first, a) and not np.array_equal(first, second)
    assert not np.array_equal(discrete_gaussian(350, 2**50), discrete_gaussian(350, 2**50))
    assert SeededEntropy(7).random_bytes(3) == SeededEntropy(7).random_bytes(11)[:3]


# --- the interface --------------------------------------------------------------------------------

SAMPLERS = [discrete_gaussian, discrete_laplace, discrete_geometric]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_shapes_and_types(sampler):
    for shape, expected in [
        (5, (5,)),
        ((), ()),
        ((0,), (0,)),
        (0, (0,)),
        ((3, 4), (3, 4)),
        (np.int64(2), (2,)),
    ]:
        z = sampler(shape, 4, entropy=SeededEntropy(1))
        assert isinstance(z, np.ndarray) and z.shape == expected and z.dtype == np.int64
        assert z.flags.writeable
    for parameter in (4, np.int32(4), Fraction(4), 4.0, np.float64(4.0)):
        z = sampler(1000, parameter, entropy=SeededEntropy(1))
        assert np.array_equal(z, sampler(1000, 4, entropy=SeededEntropy(1)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [-1, (3, -1), 2.0, (2.0,), True, (True,), "3", None, [3]])
def test_bad_shapes(sampler, shape):
    with pytest.raises(ConfigError, match="shape"):
        sampler(shape, 4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 0.0, -0.0, Fraction(-1, 3), 1e-300, 5e-324, Fraction(1, 10**400), -(10**400)),
        *(math.nan, math.inf, -math.inf, 2**81, 1e300, 10**400, Fraction(10**500, 7)),
        *(True, np.bool_(True), "1", None, Decimal(4), np.float32(4), 4 + 0j, np.array(4)),
    ],
    ids=lambda v: f"{type(v).__name__}-{str(v)[:12]}",
)
def test_bad_parameters(monkeypatch, sampler, value):
    monkeypatch.setattr(os, "urandom", lambda n: pytest.fail("drew before it checked"))
    with pytest.raises(ConfigError, match=r"sigma_squared|scale") as caught:
        sampler(4, value)
    assert len(str(caught.value)) < 300


def test_limits_are_inclusive():
    assert discrete_gaussian(1000, noise.MAX_SIGMA_SQUARED).std() > 2**39
    assert np.abs(discrete_gaussian(100_000, noise.MIN_SIGMA_SQUARED, entropy=SeededEntropy(2))).max() == 1
    assert discrete_laplace(1000, noise.MAX_SCALE).std() > 2**39
    assert np.abs(discrete_laplace(100_000, noise.MIN_SCALE, entropy=SeededEntropy(2))).max() == 1
    for sampler, low, high in [
        (discrete_gaussian, noise.MIN_SIGMA_SQUARED, noise.MAX_SIGMA_SQUARED),
        (discrete_laplace, noise.MIN_SCALE, noise.MAX_SCALE),
    ]:
        with pytest.raises(ConfigError, match="finer"):
            sampler(1, low - Fraction(1, 10**30))
        with pytest.raises(ConfigError, match="coarser"):
            sampler(1, high + Fraction(1, 10**30))


@pytest.mark.parametrize("entropy", [SystemEntropy, 5, b"123", np.random.default_rng(0), random.Random(0)])
def test_bad_entropy(entropy):
    with pytest.raises(ConfigError, match="entropy"):
        discrete_gaussian(4, 4, entropy=entropy)


def test_long_fractions_are_exact_not_rounded_to_float():
    """A float keeps 53 bits; parameters of any length are used as they are."""
    s2 = Fraction(10**60 + 1, 3 * 10**59)
    z = discrete_gaussian(N, s2, entropy=SeededEntropy(71))
    assert accepted(z, Law("gaussian", s2))
    tau = Fraction(7 * 10**60 + 1, 3 * 10**60)
    assert accepted(discrete_laplace(N, tau, entropy=SeededEntropy(72)), Law("laplace", tau))


def test_memory_is_bounded():
    n = 2_000_000
    discrete_gaussian(10, 2**60)
    tracemalloc.start()
    try:
        z = discrete_gaussian(n, 2**60)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - z.nbytes < 16 * 2**20
