"""Fitting end to end on synthetic contexts: it learns, predicts what is then measured, and picks what is best."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hf_dp_xattn import Calibration, ConfigError, DPXAttnConfig
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.calibration.anchors.anchors_fit import AnchorSettings, candidates, fit_anchors, simulate
from hf_dp_xattn.calibration.anchors.objective import fvu
from hf_dp_xattn.calibration.anchors.slots_fit import PublicContexts, SlotSettings
from hf_dp_xattn.calibration.stored import JSON_NAME, TENSORS_NAME
from hf_dp_xattn.privacy.bits import SeededEntropy

from ...sealed import write_sealed
from .synthetic_contexts import CHANNELS, contexts, objective, public_data

SLOTS = SlotSettings(code=8, slots=4, hidden=32, directions=8, steps=250, batch=32, queries=16)
SETTINGS = AnchorSettings(anchors=32, rows=16, tilt_steps=40, slots=SLOTS)


def config(**changes: object) -> DPXAttnConfig:
    return DPXAttnConfig(unit="row", mechanism="anchors").replace(**changes)


@pytest.fixture(scope="module")
def by_row() -> AnchorCalibration:
    return fit_anchors(
        config(), public_data(contexts(600)), dataclasses.replace(SETTINGS, epsilons=(0.1, 2.0, 16.0))
    )


@pytest.fixture(scope="module")
def by_context() -> AnchorCalibration:
    return fit_anchors(
        config(unit="context"),
        public_data(contexts(600, pooled=True), grouping="context"),
        dataclasses.replace(SETTINGS, epsilons=(0.1, 8.0)),
    )


def measured(calibration: AnchorCalibration, index: int, *, pooled: bool = False) -> float:
    fresh = contexts(300, seed=99, pooled=pooled)
    decoded = simulate(
        calibration.plans[index], config(unit=calibration.unit), calibration.decoders, fresh, seed=5
    )
    return fvu(*objective().measure(fresh.whole.float(), [(c.rows, c.log_weights) for c in decoded]))


@pytest.mark.slow
def test_more_budget_explains_more(by_row: AnchorCalibration) -> None:
    quality = [p.quality.fvu for p in by_row.plans]
    assert quality[2] < quality[1] < quality[0]
    assert quality[2] < 0.15


def test_never_worse_than_the_public_mean(by_row: AnchorCalibration, by_context: AnchorCalibration) -> None:
    assert by_row.plans[0].quality.fvu < 1.03
    assert by_context.plans[0].quality.fvu < 1.03


@pytest.mark.parametrize("index", [1, 2], ids=["eps=2", "eps=16"])
def test_prediction_holds_on_fresh_contexts(by_row: AnchorCalibration, index: int) -> None:
    found, predicted = measured(by_row, index), by_row.plans[index].quality
    assert predicted.low <= found <= predicted.high
    assert found == pytest.approx(predicted.fvu, rel=0.15, abs=0.01)


def test_a_whole_context_is_told_by_randomised_response(by_context: AnchorCalibration) -> None:
    """One unit of norm 1 drowns in Gaussian noise at epsilon = 8, but one of a few cells can be named."""
    best = by_context.plans[1]
    assert best.release == "response"
    sums = [c for c in by_context.settings["candidates"] if c["release"] == "sum" and c["epsilon"] == 8.0]
    assert best.quality.fvu < 0.8 * sums[0]["fvu"]
    # lies are rare and cost much, so the interval is wide: a hundred validation contexts hold a handful
    assert 0.85 * best.quality.low < measured(by_context, 1, pooled=True) < 1.15 * best.quality.high


def test_add_or_remove_one_hides_the_number_of_rows() -> None:
    settings = dataclasses.replace(SETTINGS, slots=dataclasses.replace(SLOTS, steps=60))
    own = config(neighboring="add_or_remove_one")
    calibration = fit_anchors(
        own, public_data(contexts(200)), dataclasses.replace(settings, epsilons=(1.0, 8.0))
    )
    assert {c["release"] for c in calibration.settings["candidates"]} == {"sum", "histogram"}
    for plan in calibration.plans:
        prepared = calibration.prepare(own.replace(epsilon=plan.epsilon))
        rows = contexts(1, seed=8).units[0].float()
        for n in (12, 11, 3):
            guarantee = prepared.run(rows[:n], entropy=SeededEntropy(1)).guarantee
            assert guarantee.rows is None and guarantee.units is None


@pytest.mark.parametrize("releases", [("histogram",), ("sum",)], ids=lambda r: r[0])
def test_single_candidates(releases: tuple[str, ...]) -> None:
    settings = dataclasses.replace(SETTINGS, releases=releases, slots=dataclasses.replace(SLOTS, steps=20))
    calibration = fit_anchors(
        config(), public_data(contexts(200)), dataclasses.replace(settings, epsilons=(8.0,))
    )
    assert [p.release for p in calibration.plans] == list(releases)
    assert (calibration.decoders.slots is None) == (releases[0] == "histogram")


def test_files_give_back_the_same_releases(by_row: AnchorCalibration, tmp_path: Path) -> None:
    by_row.save_pretrained(tmp_path)
    loaded = AnchorCalibration.from_pretrained(tmp_path)
    assert loaded.plans[0].quality == by_row.plans[0].quality
    rows = contexts(1, seed=3).units[0].float()
    for epsilon in (0.1, 2.0, 16.0):
        a, b = (
            c.prepare(config(epsilon=epsilon)).run(rows, entropy=SeededEntropy(4)).context
            for c in (by_row, loaded)
        )
        assert torch.equal(a.rows, b.rows) and torch.equal(a.log_weights, b.log_weights)


def test_the_common_loader_knows_both_kinds(by_row: AnchorCalibration, tmp_path: Path) -> None:
    by_row.save_pretrained(tmp_path)
    assert isinstance(Calibration.from_pretrained(tmp_path), AnchorCalibration)


@pytest.mark.parametrize("damage", ["truncated", "key", "schema", "kind", "json"])
def test_damaged_files(by_row: AnchorCalibration, tmp_path: Path, damage: str) -> None:
    by_row.save_pretrained(tmp_path)
    path = tmp_path / JSON_NAME
    header = json.loads(path.read_text())
    if damage == "truncated":
        (tmp_path / TENSORS_NAME).write_bytes((tmp_path / TENSORS_NAME).read_bytes()[:-7])
    elif damage == "json":
        path.write_text(path.read_text()[:-20])
    else:
        changes = {"key": {"surprise": 1}, "schema": {"schema_version": 99}, "kind": {"kind": "other"}}[
            damage
        ]
        write_sealed(path, {**header, **changes})
    with pytest.raises(ConfigError):
        AnchorCalibration.from_pretrained(tmp_path)


def test_repeated_cells_are_refused(by_context: AnchorCalibration) -> None:
    plan = by_context.plans[1]
    codes = plan.codes.clone()
    codes[0, 1] = codes[0, 0]
    broken = dataclasses.replace(by_context, plans=(dataclasses.replace(plan, codes=codes),))
    with pytest.raises(ConfigError, match="repeated cells"):
        broken.verify()


def test_wrong_unit_relation_or_channels(by_row: AnchorCalibration) -> None:
    for changes in ({"unit": "context"}, {"neighboring": "add_or_remove_one"}):
        with pytest.raises(ConfigError, match="made with"):
            by_row.prepare(config(**changes))
    with pytest.raises(ConfigError, match="channels"):
        by_row.check(config(), CHANNELS + 1)


def test_too_few_contexts() -> None:
    with pytest.raises(ConfigError, match="at least 64"):
        fit_anchors(config(), public_data(contexts(20)), dataclasses.replace(SETTINGS, epsilons=(8.0,)))


@pytest.mark.parametrize(("asked", "cells"), [(None, 64), (1024, 207)], ids=["default", "asked"])
def test_anchors_follow_what_is_there(asked: int | None, cells: int) -> None:
    """100 contexts of 12 rows were an error for 1,024 cells."""
    settings = dataclasses.replace(SETTINGS, anchors=asked, releases=("histogram",), epsilons=(8.0,))
    calibration = fit_anchors(config(), public_data(contexts(100)), settings)
    assert calibration.decoders.cells is not None
    assert len(calibration.decoders.cells.anchors) == calibration.settings["anchors"] == cells


def test_long_contexts_may_be_read_through_reweighted_public_rows() -> None:
    """Rows spread within their cells: four public rows stand for a cell better than its mean does."""
    g = torch.Generator().manual_seed(3)
    topics = torch.rand(96, 8, generator=g) ** 3
    centers = 2 * torch.randn(8, CHANNELS, generator=g)
    which = torch.multinomial(topics, 300, replacement=True, generator=g)
    rows = (centers[which] + 1.5 * torch.randn(96, 300, CHANNELS, generator=g)).half()
    data = PublicContexts(rows, torch.ones(rows.shape[:2], dtype=torch.bool), rows)
    settings = dataclasses.replace(SETTINGS, releases=("histogram",), anchors=16, rows=None)
    calibration = fit_anchors(
        config(), public_data(data, objective(public=0)), dataclasses.replace(settings, epsilons=(2.0, 8.0))
    )
    cells = calibration.decoders.cells
    assert cells is not None
    assert cells.anchors.shape == (16, 32, CHANNELS) and cells.rows == 75
    assert calibration.plans[1].quality.fvu < 0.7


def test_channels_that_never_vary() -> None:
    """A map that counted them in deviations of 0 was Inf in half precision."""
    public = contexts(80)
    public = dataclasses.replace(public, units=public.units.clone(), whole=public.whole.clone())
    public.units[..., :12], public.whole[..., :12] = 0.25, 0.25
    settings = dataclasses.replace(SETTINGS, releases=("sum",), slots=dataclasses.replace(SLOTS, steps=5))
    fit_anchors(config(), public_data(public), dataclasses.replace(settings, epsilons=(8.0,))).verify()


def test_candidates_by_unit_and_relation() -> None:
    assert candidates(config(), SETTINGS) == ("sum", "histogram", "mixed")
    assert candidates(config(unit="context"), SETTINGS) == ("sum", "response")
    assert candidates(config(unit="group", neighboring="add_or_remove_one"), SETTINGS) == ("sum",)
    with pytest.raises(ConfigError, match="possible: sum"):
        candidates(
            config(unit="group", neighboring="add_or_remove_one"),
            dataclasses.replace(SETTINGS, releases=("response",)),
        )
