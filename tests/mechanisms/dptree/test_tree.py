"""DPTree and the split of its budget: answers, laws by enumeration, sensitivity, planted bugs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError, DPXAttnError
from hf_dp_xattn.mechanisms.dptree import BudgetSplit, DPTree, Part
from hf_dp_xattn.mechanisms.dptree.budget import noise_error
from hf_dp_xattn.mechanisms.dptree.dptree import PreparedDPTree
from hf_dp_xattn.mechanisms.dptree.tree import build_levels, range_sums
from hf_dp_xattn.privacy import additive
from hf_dp_xattn.privacy.accountant import epsilon_of
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.truncated_laplace import off_support

from ...privacy.test_truncated_laplace import hockey_stick, joint_laws
from .naive_dptree import NaiveTree

SHAPES = [(1,), (2,), (13,), (3, 8), (2, 3, 5)]


def numbers_of(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(
        -3, 3
    )


@contextmanager
def captured() -> Iterator[list[tuple[BudgetSplit, dict[str, list[torch.Tensor]]]]]:
    """Every (split, exact integer sums) that is about to be noised."""
    seen: list[Any] = []
    original = BudgetSplit.noised

    def spy(self: BudgetSplit, sums: Any, entropy: Any) -> Any:
        seen.append((self, {k: [t.clone() for t in v] for k, v in sums.items()}))
        return original(self, sums, entropy)

    def spy_mechanism(self: PreparedDPTree, exact: Any, entropy: Any) -> Any:
        names, layers = [p.name for p in self.split.parts], len(self.encoders)
        assert len(exact) == len(names) * layers
        tensors = [t.clone() for t in exact]
        seen.append((self.split, {n: tensors[i * layers : (i + 1) * layers] for i, n in enumerate(names)}))
        return noise(self, exact, entropy)

    noise = PreparedDPTree.noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BudgetSplit, "noised", spy)
        patch.setattr(PreparedDPTree, "noise", spy_mechanism)
        yield seen


def check_sensitivity(before: Any, after: Any) -> None:
    """The change of every part, and of the concatenation, against what is charged."""
    split, factor = before[0], before[0].factor
    change = {
        name: torch.cat([(a - b).flatten() for a, b in zip(before[1][name], after[1][name], strict=True)])
        for name in before[1]
    }
    for part in split.parts:
        d = [int(v) for v in change[part.name][change[part.name] != 0]]
        assert sum(map(abs, d)) <= factor * part.l1 and sum(v * v for v in d) <= (factor * part.bound) ** 2
    every = [int(v) for c in change.values() for v in c[c != 0]]
    l1, largest, squared = split.event.shape
    assert sum(map(abs, every)) <= l1 and sum(v * v for v in every) <= squared
    assert max(map(abs, every), default=0) <= largest


def check_noise(split: BudgetSplit, sums: Any, released: dict[str, list[torch.Tensor]]) -> None:
    """Every number that leaves carries noise of the stated size: a part without it, or with less, is caught."""
    deviation = math.sqrt(2) * float(split.event.scale)
    for part in split.parts:
        noise = torch.cat(
            [(r / part.step - s).flatten() for r, s in zip(released[part.name], sums[part.name], strict=True)]
        )
        assert bool((noise.abs() <= split.event.bound).all())
        tolerance = 8 / math.sqrt(noise.numel())  # kurtosis 6: sd of the variance's estimate is sqrt(5/n)
        assert abs(float(noise.square().mean()) / deviation**2 - 1) < max(tolerance * math.sqrt(5), 0.5), (
            part.name
        )
        assert float((noise == 0).double().mean()) < 0.01


# --- answers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_range_sums_equal_the_naive_tree_and_read_its_nodes(shape: tuple[int, ...]) -> None:
    x = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(1))
    n = shape[-1]
    leaves = torch.zeros(*shape[:-1], 1 << (n - 1).bit_length(), dtype=torch.int64)
    leaves[..., :n] = x
    levels = build_levels(leaves)
    pairs = list(itertools.combinations_with_replacement(range(leaves.shape[-1] + 1), 2))
    low, high = (torch.tensor(v) for v in zip(*pairs, strict=True))
    got = range_sums(levels, low, high)
    read = range_sums([torch.ones_like(v) for v in levels], low, high)
    for flat, answers in zip(x.reshape(-1, n), got.reshape(-1, len(pairs)), strict=True):
        naive = NaiveTree(flat.tolist())
        assert answers.tolist() == [naive.query(a, b) for a, b in pairs]
        covers = [len(naive.cover(a, b)) for a, b in pairs]
    assert read.reshape(-1, len(pairs))[0].tolist() == covers
    assert max(covers) <= max(1, 2 * (len(levels) - 1)) and covers[pairs.index((0, leaves.shape[-1]))] == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_are_within_the_bound(shape: tuple[int, ...]) -> None:
    x = numbers_of(shape)
    tree = DPTree.init(x, epsilon=2.0, delta=1e-5, bound=3.0, entropy=SeededEntropy(1))
    low, high = torch.tensor([0, 0, 1]), torch.tensor([shape[-1], 1, shape[-1]])
    exact = torch.stack(
        [x[..., a:b].sum(-1) for a, b in zip(low.tolist(), high.tolist(), strict=True)], dim=-1
    )
    error = (tree.query(low, high) - exact).abs()
    assert float(error.max()) <= tree.error_bound(1e-9) + 1e-6
    assert tree.error_bound(1e-2) < tree.error_bound(1e-9) <= 14 * tree.split.limit("numbers, level 0")


def test_error_bound_holds_and_is_not_idle() -> None:
    """20 000 range sums: fewer than beta of them exceed the bound, and a tenth of it is exceeded often."""
    x = torch.zeros(20_000, 8, dtype=torch.float64)
    one = DPTree.init(x[:1], epsilon=1.0, delta=1e-5, bound=1.0)
    tree = DPTree.init(x, epsilon=1.0, delta=1e-5, bound=1.0, entropy=SeededEntropy(2))
    error = tree.query(torch.tensor([1]), torch.tensor([7])).abs().squeeze(-1)
    for beta in (0.3, 0.05, 0.01):
        assert float((error > tree.error_bound(beta)).double().mean()) <= beta
    assert float((error > tree.error_bound(0.05) / 10).double().mean()) > 0.05
    assert tree.split.scale("numbers, level 0") > 50 * one.split.scale("numbers, level 0")


def test_noise_error_against_simulated_sums() -> None:
    rng = np.random.default_rng(0)
    for scales in ([1.0], [1.0] * 12, [5.0, *[0.1] * 50]):
        z = (rng.laplace(size=(100_000, len(scales))) * scales).sum(1)
        for beta in (0.5, 0.1, 0.001):
            assert (np.abs(z) > noise_error(scales, beta, math.inf)).mean() <= beta
    assert noise_error([1.0], 1e-9, 3.0) == 3.0


# --- the release, point by point


@pytest.mark.parametrize("n", [1, 2], ids="n{}".format)
@pytest.mark.parametrize("neighboring", ["replace_one", "add_or_remove_one"])
def test_privacy_of_a_whole_tree_by_enumeration(n: int, neighboring: str) -> None:
    """Numbers in {-1, 0, 1}, every neighbour, all nodes together: the two laws summed against (epsilon, delta)."""
    depth = n.bit_length() if n > 1 else 1
    epsilon, delta = 3.0, 0.05
    split = BudgetSplit.fit(
        [Part(f"level {i}", 1, 1, 1.0) for i in range(depth)], epsilon, delta, neighboring
    )
    split.check(epsilon, delta)
    scale, bound = Fraction(split.event.scale), split.event.bound
    values, worst = (-1, 0, 1), 0.0
    for array in itertools.product(values, repeat=n):
        for i, new in itertools.product(range(n), values):
            if new == array[i] or (neighboring == "add_or_remove_one" and 0 not in (new, array[i])):
                continue
            other = [new if j == i else v for j, v in enumerate(array)]
            nodes = [torch.cat(build_levels(torch.tensor(a))) for a in (list(array), other)]
            shift = tuple(int(v) for v in nodes[0] - nodes[1] if v)
            worst = max(worst, hockey_stick(*joint_laws(scale, bound, shift), epsilon))
    assert 0 < worst <= delta


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("neighboring", ["replace_one", "add_or_remove_one"])
def test_a_changed_number_changes_what_is_charged(shape: tuple[int, ...], neighboring: str) -> None:
    """The worst change (all trees, from one end of the range to the other, clipped) meets the sensitivity."""
    x, other = numbers_of(shape) * 0, numbers_of(shape) * 0
    x[..., -1], other[..., -1] = 9.0, -9.0 if neighboring == "replace_one" else 0.0
    with captured() as seen:
        for numbers in (x, other):
            DPTree.init(numbers, epsilon=1.0, delta=1e-5, bound=2.0, neighboring=neighboring)
    check_sensitivity(*seen)
    change = torch.cat(
        [(a[0] - b[0]).flatten() for a, b in zip(seen[0][1].values(), seen[1][1].values(), strict=True)]
    )
    l1, _, squared = seen[0][0].event.shape
    assert int(change.abs().sum()) >= l1 * 0.999 and sum(int(v) ** 2 for v in change) >= 0.999 * squared
    doubled = [t * 2 for t in seen[0][1]["numbers, level 0"]]  # power: a part that changes twice as much
    with pytest.raises(AssertionError):
        check_sensitivity((seen[0][0], {**seen[0][1], "numbers, level 0": doubled}), seen[1])


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_sensitivity_of_random_changes(n: int, trees: int, seed: int) -> None:
    x, other = numbers_of((trees, n), seed), numbers_of((trees, n), seed)
    other[:, seed % n] = numbers_of((trees,), seed + 1) * 3
    with captured() as seen:
        for numbers in (x, other):
            DPTree.init(numbers, epsilon=1.0, delta=1e-5, bound=2.0)
    check_sensitivity(*seen)


# --- every number is noised; the split adds up; planted bugs


def release_and_check(entropy: SeededEntropy) -> None:
    x = numbers_of((400, 4))
    with captured() as seen:
        tree = DPTree.init(x, epsilon=1.0, delta=1e-5, bound=3.0, entropy=entropy)
    names = list(seen[0][1])
    check_noise(*seen[0], {name: [level] for name, level in zip(names, tree.levels, strict=True)})


def test_every_node_is_noised() -> None:
    release_and_check(SeededEntropy(3))


@pytest.mark.parametrize("factor", [0.0, 0.5], ids=["no noise", "half the noise"])
def test_a_level_without_its_noise_is_caught(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = additive.truncated_laplace, []

    def planted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        noise = original(*args, **kwargs)
        return (noise * factor).astype(np.int64) if len(calls) == 2 else noise

    monkeypatch.setattr(additive, "truncated_laplace", planted)
    with pytest.raises(AssertionError, match="level 1"):
        release_and_check(SeededEntropy(3))


def split_of(depth: int = 3) -> BudgetSplit:
    parts = [Part(f"numbers, level {i}", 1, 100, 0.01) for i in range(depth)]
    return BudgetSplit.fit(parts, 1.0, 1e-5, "replace_one")


def test_a_level_that_the_split_forgets_is_refused() -> None:
    split = split_of(2)
    sums = {f"numbers, level {i}": [torch.zeros(4 >> i, dtype=torch.int64)] for i in range(3)}
    with pytest.raises(DPXAttnError, match="not what the budget split counts"):
        split.noised(sums, SeededEntropy(0))
    with pytest.raises(DPXAttnError):  # and a part whose tensors are missing
        split_of(3).noised({k: sums[k] for k in list(sums)[:2]}, SeededEntropy(0))


def test_a_split_that_does_not_add_up_is_refused() -> None:
    split = split_of(3)
    split.check(1.0, 1e-5)
    forgotten = dataclasses.replace(split, event=split_of(2).event)
    cheap = dataclasses.replace(split, parts=split.parts[:2])
    for bad, budget in (
        (forgotten, (1.0, 1e-5)),
        (cheap, (1.0, 1e-5)),
        (split, (0.9, 1e-5)),
        (split, (1.0, 1e-9)),
    ):
        with pytest.raises(DPXAttnError):
            bad.check(*budget)


def test_the_table_adds_up() -> None:
    for split in (
        split_of(3),
        BudgetSplit.fit([Part("a", 50, 999, 1.0), Part("b", 7, 10, 1.0)], 4.0, 1e-6, "replace_one"),
    ):
        rows = split.table()
        l1, _, squared = split.event.shape
        assert [r["part"] for r in rows] == [p.name for p in split.parts]
        assert sum(r["l1"] for r in rows) == l1
        assert math.isclose(sum(r["epsilon"] for r in rows), float(l1 / Fraction(split.event.scale)))
        assert math.isclose(sum(r["delta"] for r in rows), float(off_support(split.event)))
        assert (
            math.isclose(sum(r["share"] for r in rows), 1.0, rel_tol=1e-2)
            or squared == l1 * split.event.shape[1]
        )
    one = DPTree.init(numbers_of((8,)), epsilon=1.0, delta=1e-5, bound=3.0).split
    assert all(0.2499 <= r["epsilon"] < 0.3 for r in one.table())  # the paper's epsilon / L, or a little more
    assert 0.999 < epsilon_of([one.event], 1e-5) <= 1.0


def test_seeded_is_bitwise_reproducible_and_unseeded_is_not() -> None:
    x = numbers_of((2, 9))
    a, b = (DPTree.init(x, epsilon=1.0, delta=1e-5, bound=3.0, entropy=SeededEntropy(4)) for _ in range(2))
    assert all(torch.equal(u, v) for u, v in zip(a.levels, b.levels, strict=True))
    c = DPTree.init(x, epsilon=1.0, delta=1e-5, bound=3.0)
    assert not torch.equal(a.levels[0], c.levels[0])


@pytest.mark.parametrize(
    "change",
    [
        {"numbers": torch.zeros(0)},
        {"numbers": torch.tensor([math.nan])},
        {"bound": 0.0},
        {"bound": math.inf},
        {"epsilon": -1.0},
        {"delta": 0.0},
    ],
    ids=["empty", "nan", "bound 0", "bound inf", "epsilon", "delta"],
)
def test_bad_arguments(change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"numbers": torch.ones(3), "epsilon": 1.0, "delta": 1e-5, "bound": 1.0}
    with pytest.raises(ConfigError):
        DPTree.init(**{**arguments, **change})
