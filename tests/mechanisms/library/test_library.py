"""`library`: exact order of the entries, its law by enumeration of all coins, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.mechanisms.anchors.quantizer import ExactAffine
from hf_dp_xattn.mechanisms.base import perturb
from hf_dp_xattn.mechanisms.library import entry_lattice
from hf_dp_xattn.mechanisms.library.entry_lattice import EntryLattice, lattice_codes, unit_codes
from hf_dp_xattn.mechanisms.library.library import PreparedLibrary, Shelf
from hf_dp_xattn.mechanisms.library.places import Places
from hf_dp_xattn.privacy import joint_response, rank_response
from hf_dp_xattn.privacy.accountant import epsilon_of
from hf_dp_xattn.privacy.bernoulli import exp_neg_bounds
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.joint_response import ProductResponse
from hf_dp_xattn.privacy.rank_response import RankResponse

from .worlds import CHANNELS, encode, library


def lattice(entries: int, width: int = CHANNELS, seed: int = 0) -> EntryLattice:
    generator = torch.Generator().manual_seed(seed)
    center, projection = torch.zeros(width), torch.eye(width)
    codes = lattice_codes(unit_codes(torch.randn(entries, width, generator=generator), center, projection))
    return EntryLattice(ExactAffine.from_tensors(center, projection, reach=8.0), codes)


def naive_nearest(own: EntryLattice, row: torch.Tensor, count: int) -> list[int]:
    """The twin: Python's integers, one entry at a time."""
    z = [int(v) for v in own.integers(row[None])[0].tolist()]
    scores = [sum(a * int(b) for a, b in zip(z, code, strict=True)) for code in own.codes.tolist()]
    return sorted(range(own.size), key=lambda j: (-scores[j], j))[:count]


@pytest.mark.parametrize("entries", [1, 2, 17, 64], ids=lambda n: f"K={n}")
def test_nearest_is_the_naive_order(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_lattice, "_ENTRIES", 5)  # several blocks, and a rest
    monkeypatch.setattr(entry_lattice, "_UNITS", 3)
    own = lattice(entries)
    rows = torch.randn(8, CHANNELS, generator=torch.Generator().manual_seed(1))
    rows[3] = 0.0  # all scores tie
    rows[4] = 1e30  # clamped to the public box
    for count in {1, min(3, entries), entries}:
        found = own.nearest(rows, count)
        assert found.tolist() == [naive_nearest(own, row, count) for row in rows]


@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(1e-3, 4.0))
def test_an_order_is_of_its_row_alone(seed: int, others: int, length: float) -> None:
    """Whatever stands beside it, before it or after it; and the length of a code does not matter."""
    own, generator = lattice(200, width=48), torch.Generator().manual_seed(seed)
    row = torch.randn(1, 48, generator=generator) * length
    beside = torch.randn(others, 48, generator=generator)
    at = seed % (others + 1)
    batch = torch.cat([beside[:at], row, beside[at:]])
    assert own.nearest(batch, 7)[at].tolist() == own.nearest(row, 7)[0].tolist()


def test_nearest_is_nearest_by_cosine() -> None:
    own = lattice(500, width=32)
    rows = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    cosine = (
        torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(own.codes.float(), dim=1).T
    )
    loss = cosine.amax(1) - cosine.gather(1, own.nearest(rows, 1))[:, 0]
    assert float(loss.max()) < 0.01  # of int8 codes


def prepared(
    response: RankResponse, entries: int = 5, unit: str = "group", answers: int = 1
) -> PreparedLibrary:
    config = DPXAttnConfig(mechanism="library", unit=unit, epsilon=float(response.epsilon * answers))
    shelf = Shelf(tuple("abcdefgh"[:entries]), lattice(entries), response)
    return PreparedLibrary(config, (shelf,), answers=answers)


def law(own: PreparedLibrary, row: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Fraction]:
    """P(text), by running the release on every value that the exact uniform integer can take."""
    total = own.shelves[0].response.total
    with monkeypatch.context() as patch:
        patch.setattr(rank_response, "uniform_below", lambda e, n, bound: np.arange(bound, dtype=np.int64))
        released = own.run(row.expand(total, -1), groups=torch.arange(total), entropy=SeededEntropy(0))
    return {text: Fraction(n, total) for text, n in Counter(released.texts).items()}


@pytest.mark.parametrize("counts, weights", [((1, 4), (7, 2)), ((2, 3), (5, 1)), ((1, 2, 2), (9, 4, 1))])
def test_law_by_enumeration(
    counts: tuple[int, ...], weights: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = prepared(RankResponse(counts, weights, Fraction(64)))
    rows = torch.randn(12, CHANNELS, generator=torch.Generator().manual_seed(3))
    laws = [law(own, row, monkeypatch) for row in rows]
    for row, found in zip(rows, laws, strict=True):
        order = naive_nearest(own.shelves[0].lattice, row, 5)
        by_rank = [w for c, w in zip(counts, weights, strict=True) for _ in range(c)]
        if len(counts) == 2:  # in the last level ranks are by index, which is the same for two levels only
            wanted = {
                own.shelves[0].texts[j]: Fraction(w, own.shelves[0].response.total)
                for j, w in zip(order, by_rank, strict=True)
            }
            assert found == wanted
        assert sum(found.values()) == 1
    worst = max(a[t] / b[t] for a in laws for b in laws for t in own.shelves[0].texts)
    assert worst == Fraction(weights[0], weights[-1])  # attained, and never more


def test_odds_three_percent_too_large_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: weights above what epsilon allows, which the class refuses and the law shows."""
    epsilon = Fraction(3, 2)
    bound = 1 / exp_neg_bounds(epsilon, 200)[0] * (1 << 200)
    for odds, sound in ((448, True), (462, False)):  # e^1.5 = 4.4817 hundred
        own = prepared(RankResponse((1, 4), (odds, 100), Fraction(64)))
        laws = [law(own, row, monkeypatch) for row in torch.eye(CHANNELS)]
        worst = max(a[t] / b[t] for a in laws for b in laws for t in own.shelves[0].texts)
        assert (worst <= bound) is sound
    with pytest.raises(ConfigError, match="more would be told"):
        RankResponse((1, 4), (462, 100), epsilon)


def test_each_unit_has_coins_of_its_own_and_all_are_charged_once() -> None:
    own = library().prepare(DPXAttnConfig(mechanism="library", unit="group", epsilon=4.0))
    rows = encode(["a new rule of tax"]).expand(400, -1)
    released = own.run(rows, groups=torch.arange(400), entropy=SeededEntropy(5))
    assert len(set(released.texts)) > 1
    assert epsilon_of(own.events, 0.0) <= 4.0 * (1 + 1e-9)
    g = released.guarantee
    assert (g.units, g.rows, g.epsilon, g.mechanism) == (400, 400, 4.0, "library")


def test_a_context_in_parts_is_charged_for_all_of_them() -> None:
    own = prepared(RankResponse.of(Fraction(2), 5), unit="context", answers=3)
    assert len(own.events) == 3 and epsilon_of(own.events, 0.0) <= 6.0 * (1 + 1e-9)
    assert len(own.run(torch.eye(CHANNELS)[:3], entropy=SeededEntropy(0)).texts) == 3
    with pytest.raises(ContextError, match=r"3 part.*nothing was spent"):
        own.run(torch.eye(CHANNELS)[:2])


def test_the_config_refuses_rows_by_name() -> None:
    with pytest.raises(ConfigError, match="once for each text"):
        DPXAttnConfig(mechanism="library", unit="row")


def test_answers_need_a_public_number_of_units() -> None:
    config = DPXAttnConfig(mechanism="library", unit="group", neighboring="add_or_remove_one")
    with pytest.raises(ConfigError, match="how many there are is public"):
        library().prepare_list(config, None)


def test_bad_input_spends_nothing() -> None:
    own = prepared(RankResponse.of(2.0, 5, 2))
    for rows, groups, message in (
        (torch.eye(CHANNELS), None, "needs `groups`"),
        (torch.eye(CHANNELS)[:2], torch.tensor([0, 0]), "ONE code"),
        (torch.eye(CHANNELS - 1), torch.arange(CHANNELS - 1), "float tensor"),
        (torch.full((1, CHANNELS), math.nan), torch.arange(1), "NaN"),
        (torch.zeros(0, CHANNELS), torch.arange(0), "no rows"),
    ):
        with pytest.raises((ConfigError, ContextError), match=message):
            own.run(rows, groups=groups)


def test_it_grows_by_its_own_units() -> None:
    own = prepared(RankResponse.of(16.0, 5))
    answers = own.growing(None)
    total: tuple[torch.Tensor, ...] = ()
    for row in torch.eye(CHANNELS)[:3]:
        total = answers.join(total, perturb(answers.exact(row[None], None), answers.parts, SeededEntropy(0)))  # type: ignore[union-attr]
    assert len(total[0]) == 3
    with pytest.raises(ConfigError, match="unit='group'"):
        prepared(RankResponse.of(2.0, 5), unit="context").growing(None)


def joint(epsilon: Fraction, sizes: tuple[int, ...], wrong: int) -> PreparedLibrary:
    response = ProductResponse(sizes, wrong, 8, 1, epsilon)
    shelves = tuple(
        Shelf(tuple("abcdefgh"[:k]), lattice(k, seed=i), RankResponse((k,), (1,), epsilon))
        for i, k in enumerate(sizes)
    )
    config = DPXAttnConfig(mechanism="library", unit="context", epsilon=float(epsilon))
    return PreparedLibrary(config, shelves, answers=len(sizes), joint=response)


@pytest.mark.parametrize(("sizes", "wrong"), [((3, 2), 0), ((2, 4, 3), 1), ((1, 5), 0)])
def test_parts_are_answered_together(
    sizes: tuple[int, ...], wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One charge for all parts; the law of the combinations of any two contexts differs by the odds at most, and attains them."""
    own = joint(Fraction(21, 10), sizes, wrong)
    assert len(own.events) == 1 and epsilon_of(own.events, 0.0) <= 2.1 * (1 + 1e-9)
    assert own.joint is not None
    total, generator = own.joint.total, torch.Generator().manual_seed(4)
    monkeypatch.setattr(joint_response, "uniform_below", lambda e, n, bound: np.arange(bound)[:n])
    laws = []
    for _ in range(12):
        near = own.exact(torch.randn(len(sizes), CHANNELS, generator=generator), None)[0]
        answers = own.joint.perturb(near.repeat(total, 1), SeededEntropy(0)).view(total, -1)
        laws.append(Counter(map(tuple, answers.tolist())))
    every = list(itertools.product(*map(range, sizes)))
    assert all(set(found) == set(every) for found in laws)
    assert max(Fraction(a[t], b[t]) for a in laws for b in laws for t in every) == 8
    released = own.run(torch.randn(len(sizes), CHANNELS), entropy=SeededEntropy(1))
    assert len(released.texts) == len(sizes)


def test_each_place_answers_from_a_list_of_its_own_length() -> None:
    places = Places()
    sizes = (2, 3, 5, 8)
    shelves = tuple(
        Shelf(tuple(f"{i}{j}" for j in range(k)), lattice(k, seed=i), RankResponse.of(2.0, k))
        for i, k in enumerate(sizes)
    )
    own = PreparedLibrary(DPXAttnConfig(mechanism="library", unit="group", epsilon=2.0), shelves, places)
    for count in (1, 2, 3, 6):
        rows = torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(count))
        texts = own.run(rows, groups=torch.arange(count), entropy=SeededEntropy(count)).texts
        assert [int(t[0]) for t in texts] == places.shelves(count)
        exact = own.exact(rows, torch.arange(count))[0]
        for i, row in enumerate(rows):
            shelf = places.shelves(count)[i]
            assert exact[i, 1:].tolist() == own.shelves[shelf].lattice.nearest(row[None], 1)[0].tolist()


def test_at_keeps_the_lists_at_another_epsilon() -> None:
    own = prepared(RankResponse.of(2.0, 5, 2))
    other = own.at(dataclasses.replace(own.config, epsilon=1.0))
    assert other.shelves[0].response.near == 2 and float(other.shelves[0].response.epsilon) == 1.0
    together = joint(Fraction(21, 10), (3, 4), 1)
    at = together.at(dataclasses.replace(together.config, epsilon=4.0)).joint
    assert at is not None and at.sizes == (3, 4) and at.wrong == 1 and float(at.epsilon) == 4.0
