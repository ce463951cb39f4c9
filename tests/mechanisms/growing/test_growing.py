"""Growing releases: sensitivity, planted bugs, noise and charges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn import BudgetExceededError
from hf_dp_xattn.mechanisms.growing_release import PreparedGrowing
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.kernel_sum import contributions, kernel_sum
from hf_dp_xattn.privacy import continual
from hf_dp_xattn.privacy.accountant import PureEvent, epsilon_of
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.ledger import Budget, Ledger

from .ways import (
    SUMS,
    batch,
    event_of,
    flat,
    joined,
    layer_rows,
    no_noise,
    prepare,
    run,
    squared,
)


@pytest.mark.parametrize("way", SUMS)
@pytest.mark.parametrize("unit", ["row", "group"])
@pytest.mark.parametrize("neighboring", ["replace_one", "add_or_remove_one"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_sensitivity_of_one_unit_at_any_append(way: str, unit: str, neighboring: str, seed: int) -> None:
    """All vectors of all appends together, against what is charged; the changed unit of any size, at any time."""
    if way == "sketch" and neighboring != "replace_one":
        return
    prepared = prepare(way, horizon=5, unit=unit, neighboring=neighboring)
    rng = np.random.default_rng(seed)
    at, members = int(rng.integers(5)), 1 if unit == "row" else 3
    sizes = [int(rng.integers(1, 4)) for _ in range(5)]
    batches = [batch(way, n, seed + i, 10.0 ** (seed % 4 - 1)) for i, n in enumerate(sizes)]
    before, after = (batch(way, members, seed + 10 + i, 10.0 ** (seed % 5 - 1)) for i in range(2))
    variants = []
    for changed in (before, after):
        parts = [joined([b, changed]) if i == at else b for i, b in enumerate(batches)]
        variants.append(parts)
    if neighboring == "add_or_remove_one":
        variants[1] = batches
    groups = []
    for parts in variants:
        counts = [p.shape[0] if isinstance(p, torch.Tensor) else p.keys[0].shape[1] for p in parts]
        mine = [torch.full((n,), 100 * i) for i, n in enumerate(sizes)]
        groups.append(
            [torch.cat([m, torch.full((n - len(m),), 77)]) for m, n in zip(mine, counts, strict=True)]
        )
    use = [g if unit == "group" else None for g in groups]
    distance = squared(run(prepared, variants[0], use[0]), run(prepared, variants[1], use[1]))
    assert distance <= event_of(prepared).sensitivity ** 2
    assert epsilon_of(prepared.events, 1e-5) <= prepared.config.epsilon * (1 + 1e-9)


def opposite(seed: int) -> tuple[LayerRows, LayerRows]:
    """Two rows of large values of opposite sign: close to the worst change."""
    a = layer_rows(1, seed)
    values = [torch.full_like(v, 1e3) for v in a.values]
    return LayerRows(a.keys, values), LayerRows(a.keys, [-v for v in values])


def worst_change(prepared: PreparedGrowing) -> float:
    """sqrt(distance) / sensitivity for a row that turns round at the first of two appends."""
    rest = layer_rows(2, 3)
    plus, minus = opposite(1)
    a, b = (run(prepared, [joined([rest, x]), rest]) for x in (plus, minus))
    return math.sqrt(squared(a, b)) / event_of(prepared).sensitivity


def test_planted_bugs_are_caught() -> None:
    prepared = prepare("kernel_sum", horizon=2)
    assert 0.6 < worst_change(prepared) <= 1.0
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # a row that enters twice: at its own append and at the next one
        original, late = continual._SquareRootStream.encode, []

        def twice(self: object, step: int, x: torch.Tensor) -> torch.Tensor:
            late.append(x)
            return original(self, step, x + late[step - 1] if step else x)  # type: ignore[arg-type]

        patch.setattr(continual._SquareRootStream, "encode", twice)
        rest, (plus, minus) = layer_rows(2, 3), opposite(1)
        runs = []
        for x in (plus, minus):
            late.clear()
            runs.append(run(prepared, [joined([rest, x]), rest]))
        assert math.sqrt(squared(*runs)) > 1.1 * event_of(prepared).sensitivity
    with pytest.MonkeyPatch.context() as patch:  # an append that is not clipped
        patch.setattr(contributions, "clip_factor", lambda n, bound: torch.ones_like(n, dtype=torch.float64))
        patch.setattr(contributions, "verify_clipped", lambda *_: None)
        assert worst_change(prepared) > 2.0
    with pytest.MonkeyPatch.context() as patch:  # each layer clipped by itself
        original_sum = kernel_sum.sum_rows

        def apart(encoders: list, keys: list, values: list, bound: int) -> list[torch.Tensor]:  # type: ignore[type-arg]
            return [
                original_sum([e], [k], [v], bound)[0] for e, k, v in zip(encoders, keys, values, strict=True)
            ]

        patch.setattr(kernel_sum, "sum_rows", apart)
        assert worst_change(prepared) > 1.05


@pytest.mark.parametrize("way", SUMS)
def test_every_number_that_leaves_is_noised(way: str) -> None:
    """The first vector of 400 openings: the noise of each coordinate has the deviation that is stated."""
    prepared = prepare(way, horizon=3)
    assert prepared.plan is not None
    b, source = batch(way, 4, 0), SeededEntropy(4)
    with no_noise():
        exact, _ = prepared.open()._add(b, None)
    drawn = []
    for _ in range(400):
        total, deviation = prepared.open(source)._add(b, None)
        drawn.append((flat(total) - flat(exact)) / deviation)
    z = torch.stack(drawn)
    # each variance of 400 draws errs by 7 %; the largest of some hundred coordinates by less than 6 times that
    assert bool(((z.square().mean(0) - 1).abs() < 0.45).all())
    assert float(z.mean(0).abs().max()) < 0.3


def test_one_charge_for_all_appends() -> None:
    ledger, prepared = Ledger(), prepare("kernel_sum", horizon=100, epsilon=1.0)
    digest = ledger.digest([b"stream"])
    ledger.charge(digest, prepared.events, Budget(1.0, 1e-5, "row", "replace_one"))
    growing = prepared.open()
    for t in range(100):
        growing.append(layer_rows(2, t))
    assert len(ledger.entries()) == 1 and ledger.spent(digest, 1e-5) <= 1.0
    with pytest.raises(BudgetExceededError):
        ledger.charge(digest, prepared.events, Budget(1.0, 1e-5, "row", "replace_one"))


def test_response_costs_no_more_for_any_horizon() -> None:
    events = {prepare("response", horizon=h).events for h in (1, 8, 1000)}
    assert len(events) == 1 and all(isinstance(e, PureEvent) for e in events.pop())


def test_responses_of_appends_are_answers_of_their_own_units() -> None:
    """Each append adds the codes of its own units' answers, and asks no earlier unit again."""
    prepared = prepare("response", horizon=4)
    growing = prepared.open(SeededEntropy(3))
    asked: list[int] = []
    original = type(prepared.mechanism).exact  # type: ignore[attr-defined]

    def spy(self: object, rows: torch.Tensor, groups: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        asked.append(rows.shape[0])
        return original(self, rows, groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(prepared.mechanism), "exact", spy)  # type: ignore[attr-defined]
        for n in (3, 1, 2):
            growing.append(batch("response", n, n))
    assert asked == [3, 1, 2] and growing.units == 6
