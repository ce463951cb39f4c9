"""Continual sums: exact factorisations, the joint law by enumeration (adaptive streams too), sensitivity, error growth, planted bugs."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import BudgetExceededError, ConfigError, DPXAttnError
from hf_dp_xattn.privacy import continual
from hf_dp_xattn.privacy.accountant import PureEvent, epsilon_of, gaussian_sigma_squared
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.continual import (
    ContinualPlan,
    Factors,
    RunningSum,
    SquareRootFactors,
    TreeFactors,
    candidates,
    choose_factors,
    joint_sensitivity,
    largest_error,
    prefix_inverse,
    square_root_coefficients,
)

from .deltas import delta_of
from .laws import Law, accepted

HORIZONS = [1, 2, 3, 5, 8, 13, 64]
KINDS: list[Callable[[int], Factors]] = [SquareRootFactors.of, TreeFactors]


def dense(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """L (exact) and R of a factorisation, column by column, by what its stream does to unit vectors."""
    t = factors.horizon
    left, right = np.zeros((t, t), dtype=np.int64), np.zeros((t, t))
    stream = factors.stream()
    for step in range(t):
        unit = torch.zeros(t, dtype=torch.int64)
        unit[step] = 1
        left[step] = stream.encode(step, unit).numpy()
        right[step] = stream.decode(step, unit).numpy()
    return left, right


@contextmanager
def captured() -> Iterator[list[torch.Tensor]]:
    """Every vector y_t that leaves, whatever the factorisation."""
    seen: list[torch.Tensor] = []
    classes = continual._SquareRootStream, continual._TreeStream
    originals = [c.decode for c in classes]
    for c, original in zip(classes, originals, strict=True):

        def spy(self: object, step: int, y: torch.Tensor, original: object = original) -> torch.Tensor:
            seen.append(y.clone())
            return original(self, step, y)  # type: ignore[operator]

        c.decode = spy  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for c, original in zip(classes, originals, strict=True):
            c.decode = original  # type: ignore[method-assign]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise: what leaves is what the noise would have been added to."""
    monkeypatch.setattr(continual, "discrete_gaussian", lambda n, *_, **__: np.zeros(n, dtype=np.int64))


def released(plan: ContinualPlan, stream: list[torch.Tensor]) -> list[int]:
    with captured() as seen:
        running = RunningSum(plan)
        for x in stream:
            running.add(x)
    return torch.cat(seen).tolist()


def squared_distance(a: list[int], b: list[int]) -> int:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


# --- the factorisations


def mean_error(factors: Factors) -> float:
    """Root of the mean variance over the prefixes, in units of the noise of one release."""
    return math.sqrt(factors.column_norm_squared * float(np.square(factors.row_norms).mean()))


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("kind", KINDS, ids=["square_root", "tree"])
def test_factors_are_exact(kind: Callable[[int], Factors], horizon: int) -> None:
    factors = kind(horizon)
    left, right = dense(factors)
    assert np.allclose(right @ left, np.tril(np.ones((horizon, horizon))), atol=1e-12)
    assert not np.triu(left, 1).any() and np.diag(left).all()  # each y_t depends on x_1, ..., x_t
    assert (left**2).sum(0).max() == factors.column_norm_squared
    assert np.allclose(np.sqrt((right**2).sum(1)), factors.row_norms, rtol=1e-12)
    assert math.isclose(largest_error(factors), np.sqrt((left**2).sum(0).max() * (right**2).sum(1).max()))
    assert math.isclose(mean_error(factors), np.sqrt((left**2).sum(0).max() * (right**2).sum() / horizon))


def test_square_root_is_that_of_the_matrix() -> None:
    m = square_root_coefficients(6)
    toeplitz = np.array([[m[i - j] if i >= j else 0.0 for j in range(6)] for i in range(6)])
    assert np.allclose(toeplitz @ toeplitz, np.tril(np.ones((6, 6))))
    assert np.allclose(prefix_inverse([1, 0, 0]), 1.0)  # the identity's counterpart: sums


@pytest.mark.parametrize("horizon", [2, 10, 100, 1000, 4000])
def test_rounding_costs_a_thousandth_and_no_bias(horizon: int) -> None:
    factors = SquareRootFactors.of(horizon)
    ideal = float(np.square(square_root_coefficients(horizon)).sum())
    assert largest_error(factors) <= 1.001 * ideal
    coarse = SquareRootFactors.of(horizon, bits=0)
    assert largest_error(coarse) > 1.1 * ideal  # power: without bits it does cost
    product = np.convolve(np.array(factors.left, dtype=np.float64), factors.right)[:horizon]
    assert np.allclose(product, 1.0, atol=1e-9)


def test_the_better_factorisation_is_chosen() -> None:
    """Computed, not guessed: the square root for every horizon from 2 on, and by which factor."""
    for horizon in (2, 3, 10, 64, 1000, 4096):
        best, other = candidates(horizon)
        assert choose_factors(horizon, 1) is best and best.name == "square_root"
        assert mean_error(best) < mean_error(other)
    ratio = largest_error(TreeFactors(1000)) / largest_error(SquareRootFactors.of(1000))
    assert 2.8 < ratio < 3.0
    assert largest_error(SquareRootFactors.of(1000)) < 3.3 < math.sqrt(1000) / 9
    log = math.log(1000) / math.pi + (np.euler_gamma + math.log(16)) / math.pi
    assert math.isclose(largest_error(SquareRootFactors.of(1000)), log, rel_tol=2e-3)


def test_memory_decides_where_it_must() -> None:
    assert choose_factors(1000, 2**17).name == "square_root"
    assert choose_factors(1000, 2**18).name == "tree"
    with pytest.raises(ConfigError, match="does not fit"):
        choose_factors(1000, 2**24)
    for horizon in (0, -1, 2**14 + 1, 1.5, True, "8", None):
        with pytest.raises(ConfigError, match="horizon"):
            choose_factors(horizon, 1)  # type: ignore[arg-type]


# --- privacy


def gaussian_law(sigma_squared: Fraction, reach: int) -> np.ndarray:
    z = np.arange(-reach, reach + 1)
    p = np.exp(-(z**2) / (2 * float(sigma_squared)))
    return p / p.sum()


def joint_law(left: np.ndarray, adversary: Callable[[tuple[int, ...]], int], sigma_squared: Fraction) -> dict:
    """P(y_1, ..., y_T) for a stream whose t-th element is a function of y_1, ..., y_{t-1}."""
    law = gaussian_law(sigma_squared, 12)
    laws: dict[tuple[int, ...], tuple[float, list[int]]] = {(): (1.0, [])}
    for t in range(len(left)):
        following = {}
        for past, (p, xs) in laws.items():
            x = [*xs, adversary(past)]
            centre = int(left[t, : t + 1] @ np.array(x))
            for z, q in zip(range(-12, 13), law, strict=True):
                following[(*past, centre + z)] = (p * q, x)
        laws = following
    return {y: p for y, (p, _) in laws.items()}


def adaptive(challenge_at: int, change: int) -> Callable[[tuple[int, ...]], int]:
    """Reacts to what it sees, and plants its unit at one step; the size of its other elements depends on the noise so far."""

    def adversary(past: tuple[int, ...]) -> int:
        x = 0 if not past else (3 if past[-1] > 0 else -2) * (1 + past[0] % 2)
        return x + (change if len(past) == challenge_at else 0)

    return adversary


@pytest.mark.parametrize("kind", KINDS, ids=["square_root", "tree"])
@pytest.mark.parametrize("challenge", [0, 1, 2])
def test_joint_law_against_an_adaptive_adversary(kind: Callable[[int], Factors], challenge: int) -> None:
    """T = 3, sensitivity 1: the two laws, summed, against the Renyi bound and against (epsilon, delta) of the event."""
    factors = SquareRootFactors.of(3, bits=1) if kind is not TreeFactors else kind(3)
    left, _ = dense(factors)
    joint = joint_sensitivity(factors, 1, 1, 0)
    sigma_squared = Fraction(3)
    p, q = (joint_law(left, adaptive(challenge, change), sigma_squared) for change in (0, 1))
    for a in (1.5, 2.0, 4.0):
        both = [(p[y], q[y]) for y in p.keys() & q.keys()]
        divergence = math.log(sum(x**a * z ** (1 - a) for x, z in both)) / (a - 1)
        assert divergence <= a * joint**2 / (2 * float(sigma_squared)) + 1e-9
    event = continual.GaussianEvent(joint, sigma_squared)
    for epsilon in (0.25, 0.5, 1.0, 2.0):
        stick = sum(max(0.0, v - math.exp(epsilon) * q.get(y, 0.0)) for y, v in p.items())
        assert stick <= delta_of([event], epsilon) + 1e-6  # the law is cut off at 12, seven deviations


def test_a_unit_that_enters_twice_breaks_the_bound() -> None:
    """Power of the test above: the same change at two steps."""
    factors = TreeFactors(3)
    left, _ = dense(factors)
    joint, sigma_squared = joint_sensitivity(factors, 1, 1, 0), Fraction(3)

    def twice(past: tuple[int, ...]) -> int:
        return int(len(past) < 2)

    p, q = (joint_law(left, f, sigma_squared) for f in (lambda past: 0, twice))
    both = [(p[y], q[y]) for y in p.keys() & q.keys()]
    divergence = math.log(sum(x**2 / z for x, z in both))
    assert divergence > 2 * joint**2 / (2 * float(sigma_squared)) * 1.2


@given(
    st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([1, 3, 50]), st.integers(0, 20), st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_sensitivity_in_exact_integers(seed: int, horizon: int, size: int, shift: int, tree: bool) -> None:
    """One changed element of any direction, of norm up to Delta, at any step; the lattice made coarser or not."""
    rng = np.random.default_rng(seed)
    delta = int(rng.integers(1, 2**30))
    factors: Factors = TreeFactors(horizon) if tree else SquareRootFactors.of(horizon)
    joint = joint_sensitivity(factors, delta, size, shift)
    plan = ContinualPlan(factors, size, shift, 1, continual.GaussianEvent(joint, 1))
    stream = [torch.from_numpy(rng.integers(-(2**40), 2**40, size)) for _ in range(horizon)]
    direction = rng.normal(size=size)
    d = np.trunc(direction / np.linalg.norm(direction) * delta * (1 - 1e-12)).astype(np.int64)
    if seed % 2:
        d = np.zeros(size, dtype=np.int64)
        d[int(rng.integers(size))] = delta
    assert sum(int(v) ** 2 for v in d) <= delta**2
    other = [x.clone() for x in stream]
    other[int(rng.integers(horizon))] += torch.from_numpy(d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "discrete_gaussian", lambda n, *_, **__: np.zeros(n, dtype=np.int64))
        distance = squared_distance(released(plan, stream), released(plan, other))
    assert distance <= joint**2


@pytest.mark.parametrize("kind", KINDS, ids=["square_root", "tree"])
@pytest.mark.usefixtures("silent")
def test_the_bound_is_attained_and_a_second_entry_exceeds_it(kind: Callable[[int], Factors]) -> None:
    plan = ContinualPlan.prepare(
        size=1, sensitivity=1000, horizon=20, epsilon=1.0, delta=1e-5, factors=kind(20)
    )
    assert plan.shift == 0
    quiet = [torch.zeros(1, dtype=torch.int64) for _ in range(20)]
    once = [x.clone() for x in quiet]
    once[0] += 1000
    base = released(plan, quiet)
    assert plan.event.sensitivity - 2 < math.sqrt(squared_distance(base, released(plan, once)))
    assert squared_distance(base, released(plan, once)) <= plan.event.sensitivity**2
    twice = [x.clone() for x in once]
    twice[1] += 1000
    assert squared_distance(base, released(plan, twice)) > plan.event.sensitivity**2


@pytest.mark.usefixtures("silent")
def test_rounding_to_the_coarser_lattice_is_counted() -> None:
    """A change of one in every coordinate may move every rounded number by one."""
    size, shift = 400, 6
    x = torch.full((size,), (1 << shift - 1) - 1)
    factors = TreeFactors(1)
    joint = joint_sensitivity(factors, 20, size, shift)  # |(1, ..., 1)| = 20
    plan = ContinualPlan(factors, size, shift, 1, continual.GaussianEvent(joint, 1))
    distance = squared_distance(released(plan, [x]), released(plan, [x + 1]))
    assert distance == size and joint**2 >= size
    assert distance > (20 / 2**shift) ** 2  # Delta / 2^shift alone would not do


@pytest.mark.parametrize("epsilon", [0.02, 0.5, 8.0, 100.0])
@pytest.mark.parametrize("sensitivity", [30, 10**4, 2**35])
def test_plans_cost_epsilon_and_fit_the_sampler(epsilon: float, sensitivity: int) -> None:
    for horizon, size in ((1, 1), (64, 1000), (2000, 5)):
        plan = ContinualPlan.prepare(
            size=size, sensitivity=sensitivity, horizon=horizon, epsilon=epsilon, delta=1e-6
        )
        assert 0.99 * epsilon < epsilon_of([plan.event], 1e-6) <= epsilon
        assert plan.event.sensitivity == joint_sensitivity(plan.factors, sensitivity, size, plan.shift)
        assert plan.event.sigma_squared == plan.sigma_squared <= 2**80
        RunningSum(plan, SeededEntropy(0)).add(torch.zeros(size, dtype=torch.int64))
        # one release of the same sum would have a largest_error-th of the noise
        alone = math.sqrt(gaussian_sigma_squared(epsilon, 1e-6, 2**30)) / 2**30 * sensitivity
        expected = alone * largest_error(plan.factors)
        assert math.isclose(plan.deviation(horizon), expected, rel_tol=0.02) or sensitivity == 30


def test_a_plan_beside_other_events() -> None:
    plan = ContinualPlan.prepare(
        size=2, sensitivity=100, horizon=5, epsilon=2.0, delta=1e-6, beside=[PureEvent(Fraction(1, 2))]
    )
    assert 1.98 < epsilon_of([plan.event, PureEvent(Fraction(1, 2))], 1e-6) <= 2.0


def test_bad_parameters_are_refused() -> None:
    good = {"size": 2, "sensitivity": 100, "horizon": 5, "epsilon": 1.0, "delta": 1e-5}
    for name, value in (
        ("horizon", 0),
        ("epsilon", 0.0),
        ("epsilon", math.nan),
        ("delta", 0.0),
        ("sensitivity", 0),
    ):
        with pytest.raises(ConfigError):
            ContinualPlan.prepare(**{**good, name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="precision"):
        ContinualPlan.prepare(size=2**20, sensitivity=2**35, horizon=5, epsilon=1e-7, delta=1e-9)


# --- the noise and the error


@pytest.mark.parametrize("kind", KINDS, ids=["square_root", "tree"])
def test_noise_has_its_law_and_is_fresh(kind: Callable[[int], Factors]) -> None:
    """100,000 numbers over five steps; false alarms below 1e-6 (laws.ALPHA = 1e-8 a statistic)."""
    size = 20_000
    plan = ContinualPlan.prepare(
        size=size, sensitivity=1000, horizon=5, epsilon=1.0, delta=1e-5, factors=kind(5)
    )
    stream = [torch.full((size,), 7 * t) for t in range(5)]
    left, _ = dense(plan.factors)
    with captured() as seen:
        running = RunningSum(plan, SeededEntropy(3))
        for x in stream:
            running.add(x)
    exact = torch.from_numpy(left) @ torch.stack(stream)
    noise = torch.stack(seen) - exact
    assert accepted(noise.flatten().numpy(), Law("gaussian", plan.sigma_squared))
    assert not accepted(
        noise.flatten().numpy(), Law("gaussian", plan.sigma_squared * Fraction(11, 10))
    )  # power
    correlations = np.corrcoef(noise.numpy())[np.triu_indices(5, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(size)  # ten pairs, six deviations


@pytest.mark.parametrize("kind", KINDS, ids=["square_root", "tree"])
def test_error_growth_over_a_thousand_appends(kind: Callable[[int], Factors]) -> None:
    """Within the stated bound at every prefix (false alarm below 1e-6), of the predicted size, and far below a release per append."""
    horizon, size, sensitivity = 1000, 16, 2**30
    plan = ContinualPlan.prepare(
        size=size, sensitivity=sensitivity, horizon=horizon, epsilon=1.0, delta=1e-5, factors=kind(horizon)
    )
    running = RunningSum(plan, SeededEntropy(5))
    gen = torch.Generator().manual_seed(1)
    total = torch.zeros(size, dtype=torch.int64)
    errors = np.empty((horizon, size))
    for t in range(horizon):
        x = torch.randint(-(2**33), 2**33, (size,), generator=gen)
        total += x
        errors[t] = (running.add(x) - total).numpy()
    bound = plan.error_bound(1e-6)
    worst = np.abs(errors).max()
    assert worst <= bound
    assert worst >= 0.3 * bound  # the bound is not idle
    predicted = np.array([plan.deviation(t + 1) for t in range(horizon)])
    scaled = np.square(errors / predicted[:, None]).mean()
    assert 0.7 < scaled < 1.4
    # polylog growth: the last hundred prefixes err less than twice as much as the first hundred
    assert predicted[-100:].mean() < 2.5 * predicted[:100].mean()
    # a release of the whole context at every append, composed: sqrt(T) times the noise of one release
    one = math.sqrt(gaussian_sigma_squared(1.0, 1e-5, sensitivity))
    again = math.sqrt(horizon) * one
    assert np.sqrt(np.square(errors).mean()) < again / (9 if kind is not TreeFactors else 4)
    assert worst < again * (0.6 if kind is not TreeFactors else 1.2)


@pytest.mark.usefixtures("silent")
def test_sums_without_noise_are_exact_to_the_lattice() -> None:
    for factors in candidates(300):
        plan = ContinualPlan.prepare(
            size=3, sensitivity=2**35, horizon=300, epsilon=1.0, delta=1e-5, factors=factors
        )
        running, total = RunningSum(plan), torch.zeros(3, dtype=torch.int64)
        for t in range(300):
            x = torch.tensor([2**40 + t, -(2**35) * t, 17])
            total += x
            prefix = running.add(x)
            assert float((prefix - total).abs().max()) <= (t + 1) * 2.0**plan.shift


# --- one run


def running(horizon: int = 3) -> RunningSum:
    return RunningSum(
        ContinualPlan.prepare(size=2, sensitivity=100, horizon=horizon, epsilon=1.0, delta=1e-5)
    )


def test_the_horizon_and_closing_end_it() -> None:
    x = torch.ones(2, dtype=torch.int64)
    run = running(2)
    run.add(x)
    run.add(x)
    assert run._stream._private._rows is None  # nothing private is kept beyond the last step
    with pytest.raises(BudgetExceededError, match="all 2 appends"):
        run.add(x)
    closed = running()
    closed.add(x)
    closed.close()
    with pytest.raises(BudgetExceededError, match="closed"):
        closed.add(x)
    tree = RunningSum(
        ContinualPlan.prepare(
            size=2, sensitivity=100, horizon=3, epsilon=1.0, delta=1e-5, factors=TreeFactors(3)
        )
    )
    tree.add(x)
    tree.close()
    assert tree._stream._private == {}


def test_it_is_not_copied_and_not_continued_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    run = running()
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(DPXAttnError, match="private sums"):
            copied(run)  # type: ignore[operator]
    assert "tensor" not in repr(run)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(DPXAttnError, match="another process"):
        run.add(torch.ones(2, dtype=torch.int64))


def test_failures_release_nothing_and_nothing_enters_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    run = running()
    for bad in (torch.ones(3, dtype=torch.int64), torch.ones(2), torch.ones(1, 2, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="int64"):
            run.add(bad)
    with monkeypatch.context() as patch:

        def broken(*_: object, **__: object) -> np.ndarray:
            raise OSError("no entropy")

        patch.setattr(continual, "discrete_gaussian", broken)
        with pytest.raises(OSError):
            run.add(torch.ones(2, dtype=torch.int64))
    assert run.steps == 0  # drawn before the vector enters: it may be added again
    run.add(torch.ones(2, dtype=torch.int64))

    def full(*_: object, **__: object) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(run._stream, "decode", full)
    with pytest.raises(MemoryError):
        run.add(torch.ones(2, dtype=torch.int64))
    with pytest.raises(BudgetExceededError, match="closed"):
        run.add(torch.ones(2, dtype=torch.int64))


def test_long_streams_of_large_vectors_do_not_overflow() -> None:
    """2^24 units at the largest joint sensitivity stay below 2^62."""
    for horizon, epsilon in itertools.product((1, 1000), (0.1, 8.0)):
        for factors in candidates(horizon):
            plan = ContinualPlan.prepare(
                size=1, sensitivity=2**35, horizon=horizon, epsilon=epsilon, delta=1e-5, factors=factors
            )
            largest = max(plan.factors.left) if isinstance(factors, SquareRootFactors) else 1
            assert 2**24 * (2**35 >> plan.shift) * largest < 2**62
