"""DPTreeDistance and DPTreeHighDim against naive loops; every moment noised and counted."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.mechanisms.dptree import DPTreeDistance, DPTreeHighDim
from hf_dp_xattn.mechanisms.dptree.distance import bin_of
from hf_dp_xattn.mechanisms.dptree.tree import build_levels
from hf_dp_xattn.privacy.bits import SeededEntropy

from ...privacy.test_truncated_laplace import hockey_stick, joint_laws
from .naive_dptree import naive_distance
from .test_tree import captured, check_noise, check_sensitivity

LOUD = {"epsilon": 1e7, "delta": 1e-5}
RANGE = {"low": -1.0, "high": 2.0, "weight_bound": 1.5}


def data(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return (
        torch.rand(n, d, generator=gen) * 3 - 1,
        torch.rand(n, generator=gen) * 3 - 1.5,
        torch.rand(7, d, generator=gen) * 3 - 1,
    )


def naive(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, power: int) -> torch.Tensor:
    answers = [naive_distance(x.tolist(), w.tolist(), q, power) for q in y.tolist()]
    return torch.tensor(answers, dtype=torch.float64)


@pytest.mark.parametrize("power", [1, 2], ids="power{}".format)
@pytest.mark.parametrize(("n", "d", "bins"), [(1, 1, 1), (5, 1, 8), (40, 3, 64), (77, 6, 50)], ids=str)
def test_answers_are_within_noise_and_bins(n: int, d: int, bins: int, power: int) -> None:
    x, w, y = data(n, d)
    tree = DPTreeHighDim.init(x, w, power=power, bins=bins, **RANGE, **LOUD)
    error = (tree.query(y) - naive(x, w, y, power)).abs()
    leaves = tree.distance.levels["weights"][0].shape[-1]
    misplaced = 0.0 if power == 2 else d * 3.0 / leaves * float(w.abs().sum())
    assert float(error.max()) <= tree.error_bound(1e-9) + misplaced + 2e-4 * n * d
    if power == 1:  # exact where no point shares the query's bin
        y = torch.full((1, d), 5.0)
        far = x.amax() < 2.0 - 3.0 / leaves
        assert not far or float((tree.query(y) - naive(x, w, y.clamp(-1, 2), 1)).abs()) <= 2e-3 * n * d


@pytest.mark.parametrize("power", [1, 2], ids="power{}".format)
def test_one_dimension_and_channels(power: int) -> None:
    x, w, y = data(30, 1)
    one = DPTreeDistance.init(x[:, 0], w, power=power, bins=512, **RANGE, **LOUD)
    assert one.query(y[:, 0]).shape == (7,)
    slack = 0.0 if power == 2 else 3.0 / 512 * float(w.abs().sum())
    assert float((one.query(y[:, 0]) - naive(x, w, y, power)).abs().max()) <= slack + 2e-2
    both = DPTreeHighDim.init(x, torch.stack([w, -w], 1), power=power, bins=512, **RANGE, **LOUD)
    answers = both.query(y)
    assert answers.shape == (2, 7)
    assert float((answers[0] + answers[1]).abs().max()) <= 1e-2


def test_entries_are_clipped() -> None:
    x, w = torch.tensor([[-9.0], [9.0]]), torch.tensor([99.0, 1.0])
    tree = DPTreeHighDim.init(x, w, power=2, **RANGE, **LOUD)
    expected = naive(torch.tensor([[-1.0], [2.0]]), torch.tensor([1.5, 1.0]), torch.tensor([[0.5]]), 2)
    torch.testing.assert_close(tree.query(torch.tensor([[0.5]])), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("power", [1, 2], ids="power{}".format)
def test_noise_is_within_the_bound_and_shrinks_with_epsilon(power: int) -> None:
    x, w, y = torch.zeros(3, 2), torch.zeros(3), torch.tensor([[-1.0, 2.0], [0.0, 0.7]])
    errors, bounds = [], []
    for epsilon in (0.5, 5.0):
        errors_here = []
        for seed in range(40):
            arguments: dict[str, Any] = {**RANGE, "epsilon": epsilon, "delta": 1e-5}
            tree = DPTreeHighDim.init(x, w, power=power, bins=16, entropy=SeededEntropy(seed), **arguments)
            errors_here.append(float(tree.query(y).abs().max()))
        bounds.append(tree.error_bound(0.01))
        assert max(errors_here) <= tree.error_bound(1e-4)
        errors.append(sum(errors_here) / 40)
    assert 7 < errors[0] / errors[1] < 13 and 8 < bounds[0] / bounds[1] < 12
    assert errors[0] > bounds[0] / 30


def row_released(x: torch.Tensor, w: torch.Tensor, neighboring: str, power: int) -> Any:
    with captured() as seen:
        arguments: dict[str, Any] = {**RANGE, "epsilon": 1.0, "delta": 1e-5}
        DPTreeHighDim.init(x, w, power=power, bins=8, neighboring=neighboring, **arguments)
    return seen[0]


@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from((1, 2)), st.integers(0, 10**6), st.booleans())
@settings(max_examples=25, deadline=None)
def test_sensitivity_of_a_replaced_or_removed_row(
    n: int, d: int, power: int, seed: int, remove: bool
) -> None:
    x, w, _ = data(n, d, seed)
    other_x, other_w = x.clone(), w.clone()
    i = seed % n
    other_x[i], other_w[i] = 4 * torch.randn(d), 0.0 if remove else 4 * torch.randn(())
    relation = "add_or_remove_one" if remove else "replace_one"
    pair = [row_released(a, b, relation, power) for a, b in ((x, w), (other_x, other_w))]
    check_sensitivity(*pair)


def test_the_extreme_row_meets_the_sensitivity() -> None:
    """From one corner to the other, with opposite weights: all of what the split charges, so less noise would be too little."""
    x = torch.full((3, 2), -1.0)
    other, w, opposite = x.clone(), torch.full((3,), 1.5), torch.tensor([-1.5, 1.5, 1.5])
    a, b = row_released(x, w, "replace_one", 2), row_released(other, opposite, "replace_one", 2)
    change = torch.cat(
        [(u - v).flatten() for name in a[1] for u, v in zip(a[1][name], b[1][name], strict=True)]
    )
    assert int(change.abs().sum()) >= 0.999 * a[0].event.shape[0]
    assert sum(int(v) ** 2 for v in change) >= 0.999 * a[0].event.shape[2]


def test_privacy_of_a_distance_by_enumeration() -> None:
    """Two rows on a coarse lattice (x, w in {-1, 0, 1}, two bins): every neighbour, all nodes of both moments together."""
    from hf_dp_xattn.mechanisms.dptree import BudgetSplit, Part

    epsilon, delta = 6.0, 0.1
    parts = [Part(f"{m}, level {v}", 1, 1, 1.0) for m in ("weights", "first") for v in range(2)]
    split = BudgetSplit.fit(parts, epsilon, delta, "add_or_remove_one")
    scale, bound = Fraction(split.event.scale), split.event.bound

    def nodes(rows: tuple[tuple[int, int], ...]) -> torch.Tensor:
        leaves = torch.zeros(2, 2, dtype=torch.int64)  # moment, bin
        for x, w in rows:
            b = int(bin_of(torch.tensor(float(x)), -1.0, 1.0, 2))
            leaves[0, b] += w
            leaves[1, b] += w * x
        return torch.cat([v.flatten() for v in build_levels(leaves)])

    worst = 0.0
    rows = list(itertools.product((-1, 0, 1), repeat=2))
    for first, second in itertools.product(rows, repeat=2):
        shift = tuple(int(v) for v in nodes((first, second)) - nodes((first,)) if v)
        if shift:
            assert sum(map(abs, shift)) <= split.event.sensitivity
            worst = max(worst, hockey_stick(*joint_laws(scale, bound, shift), epsilon))
    assert 0 < worst <= delta


@pytest.mark.parametrize("power", [1, 2], ids="power{}".format)
def test_every_moment_and_level_is_noised(power: int) -> None:
    x, w, _ = data(20, 60)
    with captured() as seen:
        arguments: dict[str, Any] = {**RANGE, "epsilon": 1.0, "delta": 1e-5}
        tree = DPTreeHighDim.init(x, w, power=power, bins=4, entropy=SeededEntropy(1), **arguments)
    names = [p.name for p in tree.split.parts]
    assert len(names) == (power + 1) * 3
    released = {n: [tree.distance.levels[n.split(",")[0]][int(n[-1])]] for n in names}
    squeezed = {n: [v[0].squeeze(0)] for n, v in seen[0][1].items()}
    check_noise(seen[0][0], squeezed, released)
    step = next(p.step for p in tree.split.parts if p.name == "first, level 2")
    released["first, level 2"] = [squeezed["first, level 2"][0] * step]
    with pytest.raises(AssertionError):  # planted: one level leaves as it is
        check_noise(seen[0][0], squeezed, released)


@pytest.mark.parametrize(
    "change",
    [
        {"points": torch.zeros(4, 1)},
        {"weights": torch.zeros(3, 1, 1)},
        {"points": torch.full((3, 1), math.nan)},
        {"low": 2.0},
        {"weight_bound": 0.0},
        {"power": 3},
        {"bins": 0},
    ],
    ids=["n differs", "rank", "nan", "low > high", "weight_bound", "power", "bins"],
)
def test_bad_arguments(change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"points": torch.zeros(3, 1), "weights": torch.zeros(3), **RANGE, **LOUD}
    with pytest.raises(ConfigError):
        DPTreeHighDim.init(**{**arguments, **change})


def test_so_many_trees_that_the_noise_drowns_the_lattice_are_refused() -> None:
    x, w, _ = data(3, 200)
    with pytest.raises(ConfigError, match="fewer trees"):
        DPTreeHighDim.init(x, w, bins=2, **RANGE, epsilon=1e-9, delta=1e-12)
    coarse = DPTreeHighDim.init(x, w, bins=2, **RANGE, epsilon=1e-3, delta=1e-5)  # a coarser lattice does it
    assert coarse.split.event.scale < 2**40


def test_every_number_has_a_bin() -> None:
    """NaN as well: a row that public numbers turn into one must not fail the release."""
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e300], dtype=torch.float64)
    assert bin_of(x, -1.0, 0.5, 4).tolist() == [0, 3, 0, 2, 3]
    assert bin_of(x, -1.0, 0.0, 4).tolist() == [0, 3, 0, 3, 3]
