"""The planner against what is then measured on the shapes pipeline, with its shipped calibrations."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_fit import simulate
from hf_dp_xattn.calibration.anchors.objective import Objective, fvu
from hf_dp_xattn.calibration.calibration_options import CalibrationOptions
from hf_dp_xattn.hosts.diffusers.architectures import find_layers
from hf_dp_xattn.hosts.diffusers.public_prompts import gather_contexts, public_queries
from hf_dp_xattn.hosts.diffusers.text_side import TextSide
from hf_dp_xattn.hosts.layer import layer_probes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from shapes.calibrate import SCORE_NAME, SCORE_OF_SEEN
from shapes.evaluate import load_pipeline
from shapes.private import UNITS, config, generate_private, load_calibration, prompts
from shapes.reader import load_reader, score
from shapes.scenes import heldout_examples, train_examples

TOLERANCE = 0.15


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline()


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_predicted_fvu_is_what_fresh_public_contexts_give(pipeline: Any, unit: str) -> None:
    calibration = load_calibration(unit)
    layers, text = find_layers(pipeline.unet), TextSide(pipeline)
    public = prompts(train_examples(150, 777), unit, 777)
    options = CalibrationOptions(memory_mb=512, query_steps=6)
    contexts, rows = gather_contexts(text, public, unit, calibration.grouping, options)
    options = dataclasses.replace(options, seed=5)
    queries = public_queries(pipeline, layers, text, contexts.whole[:8].float(), options)
    objective = Objective(layer_probes(layers.values(), queries), rows)
    plan = dpx.plan(calibration, epsilons=(4.0, 8.0), measure=False)
    for point in plan.points:
        own = next(p for p in calibration.plans if p.epsilon == point.epsilon)
        decoded = simulate(own, config(8.0, unit=unit), calibration.decoders, contexts, seed=3)
        measured = fvu(*objective.measure(contexts.whole.float(), [(c.rows, c.log_weights) for c in decoded]))
        assert measured == pytest.approx(point.fvu.value, rel=TOLERANCE), (unit, point.epsilon)


@pytest.mark.slow
@pytest.mark.parametrize("heldout", [False, True], ids=["public", "held-out"])
@pytest.mark.parametrize("unit", UNITS)
def test_predicted_score_is_what_pictures_give(pipeline: Any, unit: str, heldout: bool) -> None:
    """Held-out captions name combinations that no public one has: the rehearsal's score, the default, is for them."""
    calibration = load_calibration(unit)
    examples = (heldout_examples if heldout else train_examples)(120, 5)
    name = SCORE_NAME if heldout or unit == "row" else SCORE_OF_SEEN
    plan = dpx.plan(calibration, epsilons=(4.0, 8.0, 16.0), score=name, measure=False)
    for point in plan.points:
        settings = config(point.epsilon, unit=unit)
        images, _ = generate_private(
            pipeline, prompts(examples, unit, 5), settings, calibration, seed=5, ledger=dpx.Ledger()
        )
        measured = score(images, [e.scene for e in examples], load_reader()).accuracy
        assert point.score is not None
        assert measured == pytest.approx(point.score.value, rel=TOLERANCE), (unit, point.epsilon)


@pytest.mark.parametrize("unit", UNITS)
def test_shipped_calibrations_fit_the_pipeline_and_improve_with_epsilon(pipeline: Any, unit: str) -> None:
    calibration = load_calibration(unit)
    quality = np.array([p.quality.fvu for p in calibration.plans])
    assert (np.diff(quality) < 0.02).all() and quality[0] < 1.02
    with dpx.protect(pipeline, config(8.0, unit=unit), calibration=calibration) as protected:
        release = protected.release(prompts(heldout_examples(1, 3), unit)[0])
        context = release.contexts[0].context
        assert context is not None and context.rows.shape[0] < 77 and bool(torch.isfinite(context.rows).all())
