"""Histograms: privacy by enumeration with exact rationals, sensitivity, clipping.

The enumerations know the mechanism from outside: pre-noise sums from `exact_sums`, and the law that the text states, -log P(z) = r+ z or
r- |z| up to a constant, whose sampler `test_histogram_law.py` compares with it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.mechanisms.anchors.histogram import PreparedHistogram, prepare_gaussian, prepare_geometric
from hf_dp_xattn.privacy.accountant import GaussianEvent, epsilon_of, gaussian_sigma_squared
from hf_dp_xattn.privacy.additive import GeometricNoise

from .noised import release

RELATIONS = ["replace_one", "add_or_remove_one"]
M = 3  # cells in the enumerations

# --- privacy by enumeration -----------------------------------------------------------------------


def worst_loss(noise: GeometricNoise, a: tuple[int, ...], b: tuple[int, ...]) -> Fraction:
    """max over all outputs y in a window of log P(y | a) / P(y | b), exactly; beyond the window the ratio is constant."""
    unit = math.lcm(noise.rate_plus.denominator, noise.rate_minus.denominator)
    plus, minus = int(noise.rate_plus * unit), int(noise.rate_minus * unit)

    def phi(z: np.ndarray) -> np.ndarray:
        return np.where(z >= 0, plus * z, minus * -z)

    y = np.arange(min(*a, *b) - 2, max(*a, *b) + 3)
    total = np.zeros((), dtype=np.int64)
    for one, other in zip(a, b, strict=True):
        total = np.add.outer(total, phi(y - other) - phi(y - one))
    return Fraction(int(total.max()), unit)


def sums(
    prepared: PreparedHistogram, cells: tuple[int, ...], groups: tuple[int, ...] | None
) -> tuple[int, ...]:
    ids = None if groups is None else torch.tensor(groups, dtype=torch.int64)
    return tuple(prepared.exact_sums(torch.tensor(cells, dtype=torch.int64), ids).tolist())


def neighbours(unit: str, relation: str):  # type: ignore[no-untyped-def]
    """Pairs of contexts (cells, groups) over M cells that differ in one unit; group 0 is the one that changes."""
    if unit == "row":
        contexts = [c for n in range(4) for c in itertools.product(range(M), repeat=n)]
        for c in contexts:
            for i in range(len(c)):
                if relation == "replace_one":
                    yield from (((c, None), ((*c[:i], v, *c[i + 1 :]), None)) for v in range(M) if v != c[i])
                else:
                    yield (c, None), ((*c[:i], *c[i + 1 :]), None)
        return
    units = [u for n in range(1, 4) for u in itertools.combinations_with_replacement(range(M), n)]
    rest = ((0, 2), (1, 1)) if unit == "group" else ((), ())

    def context(u: tuple[int, ...]):  # type: ignore[no-untyped-def]
        return u + rest[0], (0,) * len(u) + rest[1] if unit == "group" else None

    for u in units:
        if relation == "replace_one":
            yield from ((context(u), context(v)) for v in units if v != u)
        else:
            yield context(u), context(())


def largest_loss(prepared: PreparedHistogram, unit: str, relation: str, contribution=sums) -> Fraction:  # type: ignore[no-untyped-def]
    worst = Fraction(0)
    for first, second in neighbours(unit, relation):
        a, b = contribution(prepared, *first), contribution(prepared, *second)
        worst = max(worst, worst_loss(prepared.noise, a, b), worst_loss(prepared.noise, b, a))
    return worst


def tiny(
    epsilon: float,
    unit: str,
    relation: str,
    bound: float = 1,
    share: Fraction = Fraction(1, 2),
    exponent: int = 2,
) -> PreparedHistogram:
    """The prepared release on a lattice coarse enough to enumerate; rates per step follow the bound."""
    p = prepare_geometric(
        epsilon, cells=M, unit=unit, neighboring=relation, group_bound=bound, share_plus=share
    )
    if unit == "row":
        return p
    coarse = math.floor(bound * 2**exponent)
    factor = Fraction(p.bound, coarse)
    noise = GeometricNoise(p.noise.rate_plus * factor, p.noise.rate_minus * factor)  # type: ignore[union-attr]
    return dataclasses.replace(p, exponent=exponent, bound=coarse, noise=noise)


@pytest.mark.parametrize("epsilon", [0.5, 8.0])
@pytest.mark.parametrize("share", [Fraction(1, 2), Fraction(3, 4)], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("unit", ["row", "group", "context"])
def test_replace_one_costs_epsilon_and_no_more(unit: str, share: Fraction, epsilon: float) -> None:
    for bound in (1,) if unit == "row" else (1, 2):
        p = tiny(epsilon, unit, "replace_one", bound, share)
        assert largest_loss(p, unit, "replace_one") == Fraction(epsilon)
        assert epsilon_of(p.events, 0.0) == epsilon


@pytest.mark.parametrize("epsilon", [0.5, 8.0])
@pytest.mark.parametrize("unit", ["row", "group", "context"])
def test_add_or_remove_costs_epsilon_and_no_more(unit: str, epsilon: float) -> None:
    for bound in (1,) if unit == "row" else (1, 2):
        p = tiny(epsilon, unit, "add_or_remove_one", bound)
        assert largest_loss(p, unit, "add_or_remove_one") == Fraction(epsilon)
        assert epsilon_of(p.events, 0.0) == epsilon


def with_rates(p: PreparedHistogram, plus: Fraction, minus: Fraction) -> PreparedHistogram:
    return dataclasses.replace(p, noise=GeometricNoise(plus, minus))


def test_the_enumeration_catches_a_forgotten_second_cell() -> None:
    """Power: rates of epsilon each, as if replacing a row changed one count only."""
    for unit in ("row", "group"):
        p = tiny(1.0, unit, "replace_one")
        wrong = with_rates(p, Fraction(1, p.bound), Fraction(1, p.bound))
        assert largest_loss(wrong, unit, "replace_one") == 2


def test_the_enumeration_catches_asymmetric_rates_under_add_or_remove() -> None:
    """Power: rates 2 s epsilon and 2 (1 - s) epsilon cost the larger of the two; prepare refuses them."""
    p = tiny(1.0, "row", "add_or_remove_one")
    wrong = with_rates(p, Fraction(3, 2), Fraction(1, 2))
    assert largest_loss(wrong, "row", "add_or_remove_one") == Fraction(3, 2)
    with pytest.raises(ConfigError, match="share_plus"):
        prepare_geometric(1.0, cells=M, unit="row", neighboring="add_or_remove_one", share_plus=0.75)


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_enumeration_catches_clipping_bugs(relation: str) -> None:
    """Power: no clipping, each cell clipped by itself, and rounding up instead of down."""
    p = tiny(1.0, "group", relation)

    def counted(cells, groups, clip):  # type: ignore[no-untyped-def]
        total = [0] * M
        for g in {*groups}:
            held = Counter(c for c, h in zip(cells, groups, strict=True) if h == g)
            for c, k in held.items():
                total[c] += clip(k, sum(held.values()))
        return tuple(total)

    def buggy(clip):  # type: ignore[no-untyped-def]
        return lambda _, cells, groups: counted(cells, groups, clip)

    def correct(k: int, size: int) -> int:
        return math.floor(k * min(Fraction(4), Fraction(p.bound, size)))

    bugs = {
        "unclipped": lambda k, size: 4 * k,
        "per cell": lambda k, size: min(4 * k, p.bound),
        "rounded up": lambda k, size: math.ceil(k * min(Fraction(4), Fraction(p.bound, size))),
    }
    assert largest_loss(p, "group", relation, buggy(correct)) == 1
    for name, clip in bugs.items():
        assert largest_loss(p, "group", relation, buggy(clip)) > 1, name


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_loss_on_the_real_lattice(data: st.DataObject) -> None:
    """B has 26 bits here: the loss is piecewise linear in y, so its breakpoints are enough."""
    relation = data.draw(st.sampled_from(RELATIONS))
    share = data.draw(st.sampled_from([0.5, 0.65, 0.8])) if relation == "replace_one" else 0.5
    bound = data.draw(st.sampled_from([0.3, 1, 2.5, Fraction(7, 3)]))
    p = prepare_geometric(
        3.0, cells=9, unit="group", neighboring=relation, group_bound=bound, share_plus=share
    )
    cells = st.lists(st.integers(0, 8), min_size=1, max_size=12)
    u, v = data.draw(cells), data.draw(cells) if relation == "replace_one" else []
    a = sums(p, (*u, 1, 1), (5,) * len(u) + (9, 9))
    b = sums(p, (*v, 1, 1), (5,) * len(v) + (9, 9))
    noise = p.noise
    assert isinstance(noise, GeometricNoise)

    def phi(z: int) -> Fraction:
        return noise.rate_plus * z if z >= 0 else noise.rate_minus * -z

    for one, other in ((a, b), (b, a)):
        loss = sum(
            max(phi(y - d) - phi(y - c) for y in (min(c, d) - 1, c, d, max(c, d) + 1))
            for c, d in zip(one, other, strict=True)
        )
        assert loss <= 3


def hockey_stick(sigma_squared: Fraction | int, shift: tuple[int, int], epsilon: float) -> float:
    """delta(epsilon) between N_Z(0, s2)^2 and its shift, summed over the plane."""
    s2 = float(sigma_squared)
    z = np.arange(-math.ceil(12 * math.sqrt(s2)), math.ceil(12 * math.sqrt(s2)) + 1)
    law = np.exp(-(z**2) / (2 * s2))
    law /= law.sum()
    loss = sum(
        np.reshape(((z - d) ** 2 - z**2) / (2 * s2), (-1, 1) if axis == 0 else (1, -1))
        for axis, d in enumerate(shift)
    )
    return float((np.outer(law, law) * -np.expm1(np.minimum(epsilon - loss, 0.0))).sum())


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_gaussian_delta_by_enumeration(epsilon: float) -> None:
    """Two cells, one count each, on a lattice of 4 steps: delta(epsilon) over all outputs stays below delta; bugs do not."""
    delta, bound = 1e-5, 4
    sensitivity = math.isqrt(2 * bound**2 - 1) + 1
    assert sensitivity == 6
    s2 = gaussian_sigma_squared(epsilon, delta, sensitivity)
    assert hockey_stick(s2, (bound, -bound), epsilon) <= delta
    assert hockey_stick(gaussian_sigma_squared(epsilon, delta, bound), (bound, 0), epsilon) <= delta
    # Power: one changed cell forgotten (bound instead of sqrt(2) bound).
    assert hockey_stick(gaussian_sigma_squared(epsilon, delta, bound), (bound, -bound), epsilon) > delta


# --- sensitivity ----------------------------------------------------------------------------------

rows_of_cells = st.lists(st.integers(0, 6), max_size=40)


def prepare(kind: str, unit: str, relation: str, bound: float = 1) -> PreparedHistogram:
    if kind == "geometric":
        return prepare_geometric(2.0, cells=7, unit=unit, neighboring=relation, group_bound=bound)
    return prepare_gaussian(2.0, 1e-6, cells=7, unit=unit, neighboring=relation, group_bound=bound)


@given(
    rows_of_cells.filter(bool),
    rows_of_cells.filter(bool),
    rows_of_cells,
    st.sampled_from([0.25, 1, 1.7, 30]),
    st.sampled_from(["geometric", "gaussian"]),
)
@settings(max_examples=200, deadline=None)
def test_sensitivity_of_groups(u: list[int], v: list[int], rest: list[int], bound: float, kind: str) -> None:
    """Unequal sizes, an empty group (removed), any content: positive and negative parts within B, or the l2 distance within Delta."""
    groups = [i % 3 + 10 for i in range(len(rest))]
    for relation in RELATIONS:
        p = prepare(kind, "group", relation, bound)
        other = v if relation == "replace_one" else []
        if not (other or rest) and relation == "replace_one":
            continue
        a = np.array(sums(p, (*u, *rest), (-4,) * len(u) + tuple(groups)), dtype=object)
        b = np.array(sums(p, (*rest, *other), (*groups, *((-4,) * len(other)))), dtype=object)
        d = a - b
        if kind == "geometric":
            assert sum(x for x in d if x > 0) <= p.bound and -sum(x for x in d if x < 0) <= p.bound
        else:
            event = p.events[0]
            assert isinstance(event, GaussianEvent)
            assert sum(x * x for x in d) <= (2 if relation == "replace_one" else 1) * p.bound**2
            assert sum(x * x for x in d) <= event.sensitivity**2


def test_gaussian_sensitivity_is_attained_and_needs_nonnegativity() -> None:
    p = prepare("gaussian", "row", "replace_one")
    d = np.array(sums(p, (0, 1), None)) - np.array(sums(p, (0, 2), None))
    assert math.isclose(math.sqrt(int((d**2).sum())), p.events[0].sensitivity, rel_tol=1e-7)  # type: ignore[union-attr]
    # Power: were contributions signed (centred counts, say), the same two norms would allow 2 B.
    assert (p.bound + p.bound) ** 2 > p.events[0].sensitivity ** 2  # type: ignore[union-attr]
    removed = prepare("gaussian", "row", "add_or_remove_one")
    assert removed.events[0].sensitivity == removed.bound == 2**removed.exponent  # type: ignore[union-attr]


@given(
    rows_of_cells,
    st.integers(0, 10**6),
    st.sampled_from(["geometric", "gaussian"]),
    st.sampled_from([0.5, 1, 3]),
)
@settings(max_examples=100, deadline=None)
def test_sums_are_those_of_the_units_alone(cells: list[int], seed: int, kind: str, bound: float) -> None:
    """In any order; equal to the sum of releases of single units; near the naive twin in float."""
    groups = [(seed >> (i % 16)) % 4 for i in range(len(cells))]
    p = prepare(kind, "group", "add_or_remove_one", bound)
    whole = sums(p, tuple(cells), tuple(groups))
    order = np.random.default_rng(seed).permutation(len(cells))
    assert whole == sums(p, tuple(cells[i] for i in order), tuple(groups[i] for i in order))
    parts, naive = np.zeros(7, dtype=np.int64), np.zeros(7)
    for g in set(groups):
        mine = tuple(c for c, h in zip(cells, groups, strict=True) if h == g)
        parts += np.array(sums(p, mine, (g,) * len(mine)))
        counts = np.bincount(mine, minlength=7)
        norm = counts.sum() if kind == "geometric" else np.linalg.norm(counts)
        naive += counts * min(1.0, bound / norm)
    assert whole == tuple(parts)
    values = p.counts(torch.tensor(whole)).numpy()
    assert np.abs(values - naive).max() < 1e-4


@pytest.mark.parametrize("kind", ["geometric", "gaussian"])
def test_clipping_does_not_round_a_large_unit_to_nothing(kind: str) -> None:
    m = 65_536
    cells = torch.cat([torch.arange(60_000), torch.arange(500)])
    make = {
        "geometric": lambda: prepare_geometric(1.0, cells=m, unit="context", neighboring="replace_one"),
        "gaussian": lambda: prepare_gaussian(1.0, 1e-5, cells=m, unit="context", neighboring="replace_one"),
    }
    p = make[kind]()
    values = p.counts(p.exact_sums(cells))
    norm = float(values.sum() if kind == "geometric" else values.square().sum().sqrt())
    assert 0.997 < norm <= 1.0


def test_rows_are_counted_exactly() -> None:
    cells = torch.randint(0, 50, (2000,), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(cells, minlength=50)
    for relation in RELATIONS:
        p = prepare_geometric(1.0, cells=50, unit="row", neighboring=relation)
        assert torch.equal(p.exact_sums(cells), counts)
        g = prepare_gaussian(1.0, 1e-5, cells=50, unit="row", neighboring=relation)
        assert torch.equal(g.counts(g.exact_sums(cells)), counts.double())


@pytest.mark.parametrize("relation", RELATIONS)
def test_an_empty_context(relation: str) -> None:
    """The number of rows is private under add_or_remove_one: no rows must look like few rows."""
    p = prepare_geometric(1.0, cells=5, unit="row", neighboring=relation)
    none = torch.zeros(0, dtype=torch.int64)
    if relation == "replace_one":
        with pytest.raises(ContextError, match="no rows"):
            release(p, none)
    else:
        assert release(p, none).shape == (5,)
        for kind in ("geometric", "gaussian"):
            g = prepare(kind, "group", relation)
            assert sums(g, (), ()) == (0,) * 7
