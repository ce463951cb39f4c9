"""The learned sum: its naive twin, sensitivity in exact integers, batch invariance, the noise's law, bad input."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.mechanisms import inputs
from hf_dp_xattn.mechanisms.anchors import row_sum
from hf_dp_xattn.mechanisms.anchors.row_sum import PreparedRowSum, RowSum, clipped_rows
from hf_dp_xattn.privacy.accountant import GaussianEvent, PureEvent, epsilon_of
from hf_dp_xattn.privacy.noise import SeededEntropy

from ...privacy.laws import Law, accepted
from .noised import release

C, K = 12, 5
RELATIONS = ["replace_one", "add_or_remove_one"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = generator(seed)
    return (
        torch.randn(C, generator=gen),
        torch.randn(K, C, generator=gen) / C**0.5 / 2,
        torch.randn(K, generator=gen) / 10,
    )


def make(
    unit: str = "row", relation: str = "replace_one", bound: float = 1.0, seed: int = 0
) -> PreparedRowSum:
    r = RowSum.from_tensors(*parameters(seed), reach=32.0, group_bound=bound)
    return r.prepare(2.0, 1e-6, unit=unit, neighboring=relation)


def naive_sum(
    center: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor,
    rows: torch.Tensor,
    groups: list[int],
    bound: float,
) -> torch.Tensor:
    """The float64 twin, unit by unit."""

    def clip(v: torch.Tensor, limit: float) -> torch.Tensor:
        return v * min(1.0, limit / max(float(v.norm()), 1e-300))

    total = torch.zeros(K, dtype=torch.float64)
    for g in sorted(set(groups)):
        unit = torch.zeros(K, dtype=torch.float64)
        for row, h in zip(rows.double(), groups, strict=True):
            if h == g:
                unit += clip(matrix.double() @ (row - center.double()) + bias.double(), 1.0)
        total += clip(unit, bound)
    return total


@pytest.mark.parametrize("bound", [0.5, 1.0, 3.3])
@pytest.mark.parametrize("unit", ["row", "group", "context"])
def test_sums_equal_the_naive_twin(unit: str, bound: float) -> None:
    rows = torch.randn(40, C, generator=generator(1)) * 3
    ids = [(7 * i) % 11 for i in range(40)]
    groups = {"row": list(range(40)), "group": ids, "context": [0] * 40}[unit]
    p = make(unit, bound=bound)
    got = p.exact_sums(rows, torch.tensor(ids) if unit == "group" else None).double() * 2.0**-p.exponent
    expected = naive_sum(*parameters(), rows, groups, 1.0 if unit == "row" else bound)
    # coordinates are read to 2^-14 (reach 32 in 19 bits), and a clipped vector gives up 2^-20 of its norm
    assert float((got - expected).abs().max()) < 1e-3


def test_features_are_what_rows_contribute() -> None:
    p = make()
    rows = torch.randn(30, C, generator=generator(2)) * 2
    f = p.row_sum.features(rows)
    assert f.shape == (30, K) and float(f.norm(dim=-1).max()) <= 1.0
    assert torch.equal(f.sum(0), p.exact_sums(rows).double() * 2.0**-p.exponent)
    assert p.row_sum.features(rows[:0]).shape == (0, K)


@given(
    st.integers(0, 10**6),
    st.floats(1e-3, 1e30),
    st.integers(1, 9),
    st.sampled_from(["row", "group", "context"]),
    st.sampled_from(RELATIONS),
    st.sampled_from([0.1, 1.0, 2.7, 100.0]),
)
@settings(max_examples=150, deadline=None)
def test_sensitivity_in_exact_integers(
    seed: int, size: float, count: int, unit: str, relation: str, bound: float
) -> None:
    """The changed unit may be of any magnitude and, for groups, of another size or gone."""
    gen = generator(seed)
    p = make(unit, relation, bound, seed % 5)
    rest = torch.randn(6, C, generator=gen) if unit != "context" else torch.zeros(0, C)
    before = torch.randn(1 if unit == "row" else count, C, generator=gen) * size
    if relation == "add_or_remove_one":
        after = before[:0]
    else:
        after = -before if seed % 2 else torch.randn(1 if unit == "row" else 3, C, generator=gen) * size

    def total(changed: torch.Tensor) -> list[int]:
        rows = torch.cat([rest, changed])
        ids = torch.tensor([1, 1, 2, 3, 3, 3] + [9] * len(changed)) if unit == "group" else None
        return p.exact_sums(rows, ids).tolist()

    distance = sum((a - b) ** 2 for a, b in zip(total(before), total(after), strict=True))
    event = p.events[0]
    assert isinstance(event, GaussianEvent)
    factor = 2 if relation == "replace_one" else 1
    assert event.sensitivity == factor * p.bound
    assert distance <= event.sensitivity**2
    assert p.bound == math.floor(Fraction(1.0 if unit == "row" else bound) * 2**p.exponent)


@pytest.mark.parametrize("unit", ["row", "group"])
def test_the_bounds_are_attained(unit: str) -> None:
    """Power: opposite rows move the sum by more than 1.99 B, so neither B nor the histogram's sqrt(2) B would do."""
    affine = (torch.zeros(1), torch.ones(1, 1), torch.zeros(1))
    p = RowSum.from_tensors(*affine, reach=8.0, group_bound=1.0).prepare(
        1.0, 1e-5, unit=unit, neighboring="replace_one"
    )
    ids = torch.zeros(2, dtype=torch.int64) if unit == "group" else None
    rows = torch.full((2 if unit == "group" else 1, 1), 5.0)
    moved = int((p.exact_sums(rows, ids) - p.exact_sums(-rows, ids)).abs())
    assert 1.99 * p.bound < moved <= 2 * p.bound


def test_groups_are_clipped_as_wholes() -> None:
    """Power: rows clipped one by one, without the group's own bound, add up beyond it."""
    p = make("group", bound=1.0)
    rows = torch.full((20, C), 3.0)
    ids = torch.zeros(20, dtype=torch.int64)
    unclipped = clipped_rows(p.row_sum.affine, rows, p.exponent).sum(0)
    assert float(unclipped.norm()) > 10 * p.bound
    assert sum(v * v for v in p.exact_sums(rows, ids).tolist()) <= p.bound**2


@given(
    st.integers(0, 10**6),
    st.integers(1, 50),
    st.sampled_from(["row", "group"]),
    st.sampled_from([2**24, 40, 1]),
    st.sampled_from([4096, 3, 1]),
)
@settings(max_examples=60, deadline=None)
def test_sums_are_those_of_the_units_alone_bit_for_bit(
    seed: int, n: int, unit: str, chunk: int, units: int
) -> None:
    gen = generator(seed)
    p = make(unit, bound=1.5, relation="add_or_remove_one")
    rows = torch.randn(n, C, generator=gen) * 10.0 ** (seed % 5 - 2)
    ids = torch.randint(-3, 4, (n,), generator=gen)
    groups = ids if unit == "group" else None
    whole = p.exact_sums(rows, groups)
    order = torch.randperm(n, generator=gen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "_CHUNK_ENTRIES", chunk)
        patch.setattr(row_sum, "_UNITS_PER_CHUNK", units)
        assert torch.equal(p.exact_sums(rows[order], None if groups is None else groups[order]), whole)
    if groups is None:
        parts = [p.exact_sums(row[None]) for row in rows]
    else:
        parts = [p.exact_sums(rows[ids == g], ids[ids == g]) for g in ids.unique()]
    assert torch.equal(torch.stack(parts).sum(0), whole)


@pytest.mark.parametrize("relation", RELATIONS)
def test_noise_has_its_law(relation: str) -> None:
    """A release of 100,000 coordinates; false alarms below 1e-6 (laws.ALPHA = 1e-8 per statistic)."""
    k = 100_000
    r = RowSum.from_tensors(torch.zeros(1), torch.ones(k, 1) / k**0.5, torch.zeros(k), reach=4.0)
    p = r.prepare(2.0, 1e-5, unit="row", neighboring=relation)
    rows = torch.tensor([[0.5], [3.0]])
    y = release(p, rows, entropy=SeededEntropy(11))
    z = (y * 2.0**p.exponent).to(torch.int64) - p.exact_sums(rows)
    assert accepted(z.numpy(), Law("gaussian", p.sigma_squared))
    assert not accepted(z.numpy(), Law("gaussian", p.sigma_squared * Fraction(11, 10)))  # power
    assert math.isclose(float(z.double().std()) * 2.0**-p.exponent, p.sigma, rel_tol=0.02)


def test_release_is_seeded_only_on_request() -> None:
    p = make()
    rows = torch.randn(7, C)
    assert torch.equal(release(p, rows, entropy=SeededEntropy(1)), release(p, rows, entropy=SeededEntropy(1)))
    y = release(p, rows)
    assert not torch.equal(y, release(p, rows)) and y.dtype == torch.float64 and y.shape == (K,)


@pytest.mark.parametrize("relation", RELATIONS)
def test_events_cost_epsilon(relation: str) -> None:
    r = RowSum.from_tensors(*parameters(), reach=32.0)
    for epsilon in (0.1, 1.0, 16.0):
        p = r.prepare(epsilon, 1e-6, unit="row", neighboring=relation)
        assert 0.999 * epsilon <= epsilon_of(p.events, 1e-6) <= epsilon
    other = PureEvent(Fraction(1, 2))
    p = r.prepare(2.0, 1e-6, unit="row", neighboring=relation, beside=(other,))
    assert 1.99 <= epsilon_of([other, *p.events], 1e-6) <= 2.0


@pytest.mark.parametrize("unit", ["row", "group"])
def test_an_empty_context(unit: str) -> None:
    groups = torch.zeros(0, dtype=torch.int64) if unit == "group" else None
    empty = torch.zeros(0, C)
    with pytest.raises(ContextError, match="no rows"):
        release(make(unit), empty, groups=groups)
    # the number of rows is private here: no rows must look like few rows
    assert release(make(unit, "add_or_remove_one"), empty, groups=groups).shape == (K,)


def test_bad_rows_are_refused() -> None:
    p = make()
    for bad in (float("nan"), float("inf"), float("-inf")):
        rows = torch.zeros(4, C)
        rows[1, 3] = bad
        for call in (lambda rows: release(p, rows), p.row_sum.features):
            with pytest.raises(ContextError, match="NaN or Inf"):
                call(rows)
    for rows in (torch.zeros(C), torch.zeros(2, C + 1), torch.zeros(2, C, dtype=torch.long)):
        with pytest.raises(ConfigError, match="float tensor"):
            release(p, rows)


def test_bad_groups_are_refused() -> None:
    rows = torch.zeros(3, C)
    with pytest.raises(ConfigError, match="groups"):
        release(make("row"), rows, groups=torch.zeros(3, dtype=torch.int64))
    for groups in (None, torch.zeros(3), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="groups"):
            release(make("group"), rows, groups=groups)


def test_bad_parameters_are_refused() -> None:
    center, matrix, bias = parameters()
    for bad in (
        (center[:3], matrix, bias),
        (center, matrix[0], bias),
        (center, matrix, bias[:2]),
        (center, matrix * math.nan, bias),
    ):
        with pytest.raises(ConfigError):
            RowSum.from_tensors(*bad, reach=1.0)
    for bound in (0.0, -1.0, math.nan, math.inf, True):
        with pytest.raises(ConfigError, match="group_bound"):
            RowSum.from_tensors(center, matrix, bias, reach=1.0, group_bound=bound)
    r = RowSum.from_tensors(center, matrix, bias, reach=1.0)
    for epsilon, delta in ((0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0), (1e-9, 1e-5)):
        with pytest.raises(ConfigError):
            r.prepare(epsilon, delta, unit="row", neighboring="replace_one")
    with pytest.raises(ConfigError, match="Unknown unit"):
        r.prepare(1.0, 1e-5, unit="word", neighboring="replace_one")
    with pytest.raises(ConfigError, match="nothing is left"):
        r.prepare(1.0, 1e-5, unit="row", neighboring="replace_one", beside=(PureEvent(1),))
