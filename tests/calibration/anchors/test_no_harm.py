"""A calibration does no harm to these contexts: whatever its decoders are worth, what it gives is
at most 1.02 times as far off as the fall-back."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dp_xattn.calibration.anchors import slot_plans
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.calibration.anchors.anchors_fit import AnchorSettings, fit_anchors, simulate
from hf_dp_xattn.calibration.anchors.held_out import hold_out
from hf_dp_xattn.calibration.anchors.intervals import ratio_interval, t_quantile
from hf_dp_xattn.calibration.anchors.judge import Judged, Jury
from hf_dp_xattn.calibration.anchors.kmeans import cells_for
from hf_dp_xattn.calibration.anchors.objective import fvu
from hf_dp_xattn.calibration.anchors.plan_choice import Guard, Guarded
from hf_dp_xattn.calibration.anchors.slots_fit import (
    PublicContexts,
    SlotSettings,
    SlotTrainer,
    Watched,
    train,
)
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.mechanisms.anchors.fallback import Worth

from .synthetic_contexts import CHANNELS, ROWS, contexts, objective, public_data

LIMIT = 1.02
SLOTS = SlotSettings(code=8, slots=4, hidden=32, directions=8, steps=0, batch=32, queries=16)
SETTINGS = AnchorSettings(releases=("sum",), slots=SLOTS, epsilons=(0.5, 8.0))
CONFIG = DPXAttnConfig(mechanism="anchors", unit="row")


def fitted(public: PublicContexts, *, steps: int = 0, **changes: object) -> AnchorCalibration:
    slots = dataclasses.replace(SLOTS, steps=steps)
    return fit_anchors(CONFIG, public_data(public), dataclasses.replace(SETTINGS, slots=slots, **changes))


def beside_nothing(
    calibration: AnchorCalibration, private: PublicContexts, *, force: bool = False
) -> list[float]:
    """Of each plan: the error of its releases over that of the fall-back. force: of the decoder's rows as they are."""
    found = []
    for plan in calibration.plans:
        assert plan.worth is not None
        own = dataclasses.replace(plan, worth=None) if force else plan
        none = dataclasses.replace(plan, worth=Worth(plan.worth.against, 0.0, "fvu", 1.0, 1.0))
        exact = objective().exact(private.whole)
        each = []
        for p in (own, none):
            decoded = simulate(p, CONFIG, calibration.decoders, private, seed=5)
            each.append(
                fvu(objective().errors(exact, [(c.rows, c.log_weights) for c in decoded]), exact.variances)
            )
        found.append(each[0] / each[1])
    return found


def of_kinds(kinds: torch.Tensor) -> PublicContexts:
    """Contexts of many kinds, each with a mean of its own; one mean row is all that a release reads."""
    fixed = torch.Generator().manual_seed(78)
    means = 1.5 * torch.randn(100, 1, CHANNELS, generator=fixed)
    position = 0.3 * torch.randn(ROWS, CHANNELS, generator=fixed)
    noise = torch.randn(len(kinds), ROWS, CHANNELS, generator=torch.Generator().manual_seed(8))
    rows = means[kinds] + position + 0.1 * noise
    units = rows.mean(1, keepdim=True).half()
    return PublicContexts(units, torch.ones(units.shape[:2], dtype=torch.bool), rows.half())


def scrambled(trainer: SlotTrainer, *_: object, **__: object) -> int:
    """A training that ends with a decoder that makes something of the code, but nothing that is true."""
    with torch.no_grad():
        trainer.coefficients *= 20.0
    return 1


@pytest.fixture(scope="module")
def untrained() -> AnchorCalibration:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_plans, "train", scrambled)
        return fitted(contexts(120))


@pytest.fixture(scope="module")
def trained() -> AnchorCalibration:
    return fitted(contexts(400), steps=150)


def test_random_decoders_are_not_used(untrained: AnchorCalibration) -> None:
    assert max(beside_nothing(untrained, contexts(60, seed=4), force=True)) > 1.2  # they would do harm
    assert max(beside_nothing(untrained, contexts(60, seed=4))) <= LIMIT
    assert all(p.worth is not None and not p.worth.useful for p in untrained.plans)
    assert untrained.useless(CONFIG) is not None


def test_too_few_contexts() -> None:
    calibration = fitted(contexts(64), steps=60)
    assert max(beside_nothing(calibration, contexts(60, seed=4))) <= LIMIT
    # a single unseen kind told nothing of how much kinds vary, and its interval was all numbers
    assert all(p.quality.high < 10.0 for p in calibration.plans)


def test_what_is_better_is_used(trained: AnchorCalibration) -> None:
    low, high = trained.plans
    assert high.worth is not None and high.worth.useful and high.worth.weight == 1.0
    assert beside_nothing(trained, contexts(60, seed=4))[1] < 0.5
    assert low.worth is not None and beside_nothing(trained, contexts(60, seed=4))[0] <= LIMIT


def test_contexts_of_kinds_that_no_public_one_has() -> None:
    public = of_kinds(torch.arange(360) % 60)
    config = CONFIG.replace(unit="context")
    settings = dataclasses.replace(SETTINGS, releases=("response",), epsilons=(16.0,))
    settings = dataclasses.replace(settings, slots=dataclasses.replace(SLOTS, steps=100))
    calibration = fit_anchors(config, public_data(public, grouping="context"), settings)
    assert max(beside_nothing(calibration, of_kinds(torch.arange(60, 100)))) <= LIMIT


@pytest.mark.parametrize("kind", ["noise", "wider noise", "one row", "rows of many"])
def test_contexts_unlike_all_public_ones(trained: AnchorCalibration, kind: str) -> None:
    """Fresh ones, of kinds that the fit tried and of one that it did not."""
    public = contexts(60, seed=4)
    g = torch.Generator().manual_seed(9)
    flat = public.whole.flatten(0, 1).float()
    draw = torch.randn(60, ROWS, CHANNELS, generator=g)
    rows = {
        "noise": flat.mean(0) + flat.std(0) * draw,
        "wider noise": 3.0 * flat.std(0) * draw,
        "one row": flat[torch.randint(len(flat), (60, 1), generator=g)].expand(-1, ROWS, -1),
        "rows of many": flat[torch.randint(len(flat), (60, ROWS), generator=g)],
    }[kind].half()
    private = PublicContexts(rows, torch.ones(rows.shape[:2], dtype=torch.bool), rows)
    assert max(beside_nothing(trained, private)) <= LIMIT
    assert all(p.worth is not None and p.worth.unlike is not None for p in trained.plans)


def test_whole_kinds_are_held_out() -> None:
    held = hold_out(of_kinds(torch.arange(360) % 60), 400, seed=0)
    assert 340 <= len(held.training) + len(held.stopping) + len(held.validation) <= 360
    assert int(held.unlike.sum()) == int((~held.unlike).sum()) == 30
    everything = torch.cat([held.training.units, held.stopping.units]).flatten(1).float()
    unlike = held.validation.units[held.unlike].flatten(1).float()
    like = held.validation.units[~held.unlike].flatten(1).float()
    # noise within a kind is a tenth of what tells kinds apart
    assert float(torch.cdist(unlike, everything).min(1).values.median()) > 2.0
    assert float(torch.cdist(like, everything).min(1).values.median()) < 0.5


@pytest.mark.parametrize(("like", "unlike", "expected"), [(0.4, 0.8, 0.6), (0.4, 1.3, 1.3)])
def test_what_harms_unseen_kinds_is_not_chosen(like: float, unlike: float, expected: float) -> None:
    scores = torch.tensor([like] * 6 + [unlike] * 4)
    jury: Any = SimpleNamespace(
        held=SimpleNamespace(unlike=torch.arange(10) >= 6),
        scores=lambda measured: measured,
        nothing=torch.ones(10),
    )
    everyone = torch.ones(10, dtype=torch.bool)
    assert Jury.ratio(jury, scores, everyone) == pytest.approx(expected)  # type: ignore[arg-type]


def test_a_ruinous_learning_rate_is_lowered() -> None:
    """Adam that jumps: what is kept is at least as good as what was there before."""
    public, goal = contexts(120), objective()
    generator = torch.Generator().manual_seed(0)
    settings = dataclasses.replace(SLOTS, steps=40, learning_rate=30.0)
    trainer = SlotTrainer(public, 1, settings, generator)

    def codes(batch: PublicContexts, plan: int) -> torch.Tensor:
        return trainer.clipped(batch.units, plan).sum(1)

    def loss() -> float:
        rows, weights = trainer.decoder().decode_batch(codes(public.float(), 0), trainer.head_of(0))
        pairs = list(zip(rows.detach(), weights.detach(), strict=True))
        return fvu(*goal.measure(public.whole, pairs))

    before = loss()
    trained = [p for p in trainer.parameters() if p.requires_grad]
    made = train(
        trainer,
        public,
        goal,
        [0],
        codes,
        settings,
        parameters=trained,
        label="",
        generator=generator,
        watched=Watched(contexts(40, seed=5)),
    )
    assert made == 40 and loss() < 1.1 * before


def test_a_training_ends_in_time() -> None:
    public = contexts(120)
    settings = dataclasses.replace(SETTINGS, slots=dataclasses.replace(SLOTS, steps=10**6), seconds=1.0)
    calibration = fit_anchors(CONFIG, public_data(public), dataclasses.replace(settings, epsilons=(8.0,)))
    assert 0 < calibration.settings["steps"] < 10**5


def test_intervals() -> None:
    assert t_quantile(0.975, 4) == pytest.approx(2.776, rel=0.01)
    assert t_quantile(0.95, 1000) == pytest.approx(1.646, rel=0.002)
    generator = torch.Generator().manual_seed(1)
    missed = {True: 0, False: 0}
    for _ in range(300):  # contexts of 8 kinds, alike within each
        kinds = torch.arange(48) % 8
        under = torch.ones(48, 2)
        over = 1.0 + 0.3 * torch.randn(8, generator=generator)[kinds].unsqueeze(1).expand(-1, 2)
        for by_kind in missed:
            _, low, high = ratio_interval(over, under, kinds if by_kind else torch.arange(48))
            missed[by_kind] += not low <= 1.0 <= high
    assert (
        missed[True] < 33 < missed[False]
    )  # 5 % are expected to be missed; 33 or more have a chance of 1e-6


@pytest.mark.parametrize(("distinct", "cells"), [(40_000, 4096), (1_000, 64), (20, 2)])
def test_cells_follow_what_is_there(distinct: int, cells: int) -> None:
    points = torch.arange(distinct, dtype=torch.float32).unsqueeze(1)
    assert cells_for(points, None, 4096) == cells
    assert cells_for(points, 512, 4096) == min(512, distinct // 4)


def test_of_limits_that_do_equally_well_the_middle_one_is_taken() -> None:
    """The least that was harmless on those that were tried is not for those that come."""
    # (limits, harm, ratio on public contexts), each with a plan of its own as `Guard` makes them
    tried = [
        (None, 1.5, 0.5),
        ((0.4, 9.0), 1.2, 0.5),
        ((0.5, 9.0), 1.0, 0.5),
        ((0.6, 9.0), 1.0, 0.5),
        ((0.7, 9.0), 1.0, 0.501),
        ((0.9, 9.0), 1.0, 0.7),
        ((0.6, 3.0), 1.0, 0.6),
    ]
    rows: Any = object()
    gated: list[Any] = [
        Guarded(Judged(SimpleNamespace(), rows, []), rows, ratio, limits, harm)  # type: ignore[arg-type]
        for limits, harm, ratio in tried
    ]
    guard = Guard.__new__(Guard)
    guard._jury = SimpleNamespace(  # type: ignore[assignment]
        ratio=lambda measured, among: 0.5 if measured is rows else measured,
        replaced=lambda measured, lost: lost,
    )
    chosen = guard._least_harm(gated, gated[0].judged, torch.ones(1, dtype=torch.bool))
    assert chosen.limits == (0.6, 9.0)
