"""Builds the calibrations that the shapes pipeline ships with: `python examples/shapes/calibrate.py` (about two hours on two cores).

Public data only: training captions, which share no (colour, shape, place) with the held-out ones. For the planner it also measures the
attribute accuracy of PUBLIC captions of another seed at every epsilon; for phrases and prompts also in a *rehearsal*: of public captions
whose every object is a combination that the calibration has not seen, with one that was fitted without 25 of the public combinations.
The rehearsal is what the planner promises for prompts that say something new.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.calibration import AnchorCalibration, ScorePoint
from shapes.evaluate import load_pipeline
from shapes.private import CALIBRATIONS, PUBLIC_SEED, UNITS, config, generate_private, prompts
from shapes.reader import load_reader, score
from shapes.scenes import train_examples
from shapes.tables import line

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
SCORE_SEED = 999
SCORE_NAME = "attributes right"
SCORE_OF_SEEN = "attributes right, combinations that public prompts name"


def fit(pipeline: Any, unit: str, args: argparse.Namespace, *, rehearsal: bool) -> AnchorCalibration:
    """A calibration from public captions; for the rehearsal from those without the rehearsal's combinations."""
    examples = train_examples(args.captions, PUBLIC_SEED, rehearsal=False if rehearsal else None)
    calibration = dpx.calibrate(
        pipeline,
        prompts(examples, unit, PUBLIC_SEED),
        config(8.0, unit=unit),
        epsilons=EPSILONS,
        anchors=args.anchors,
        # a few phrases or one prompt drown in the noise of a sum at every epsilon: all training goes to responses
        releases=("sum", "histogram") if unit == "row" else ("response",),
        steps=args.rehearsal_steps if rehearsal else args.steps,
        query_prompts=32,
    )
    assert isinstance(calibration, AnchorCalibration)
    return calibration


def scores(
    pipeline: Any, calibration: AnchorCalibration, n: int, name: str, *, rehearsal: bool
) -> tuple[ScorePoint, ...]:
    """Attribute accuracy of n public captions at every plan's epsilon; rehearsal: of the rehearsal's combinations only."""
    reader, examples = load_reader(), train_examples(n, SCORE_SEED, rehearsal=True if rehearsal else None)
    captions, scenes = prompts(examples, calibration.unit, SCORE_SEED), [e.scene for e in examples]
    points = []
    for plan in tqdm(calibration.plans, desc=f"scores, unit = {calibration.unit}"):
        settings = config(plan.epsilon, unit=calibration.unit)
        images, _ = generate_private(pipeline, captions, settings, calibration, seed=SCORE_SEED)
        found = line(calibration.unit, f"{plan.epsilon:g}", score(images, scenes, reader), scenes)
        points.append(ScorePoint(name, plan.epsilon, found["accuracy"], found["low"], found["high"], n))
    return tuple(points)


def all_scores(
    pipeline: Any, calibration: AnchorCalibration, args: argparse.Namespace
) -> tuple[ScorePoint, ...]:
    """The rehearsal's scores first: the planner takes the first by default.

    unit = row needs none: the decoder of a sum follows new combinations (the slow tests compare its score with held-out ones).
    """
    if calibration.unit == "row":
        return scores(pipeline, calibration, args.scores, SCORE_NAME, rehearsal=False)
    trial = fit(pipeline, calibration.unit, args, rehearsal=True)
    new = scores(pipeline, trial, args.scores, SCORE_NAME, rehearsal=True)
    return new + scores(pipeline, calibration, args.scores, SCORE_OF_SEEN, rehearsal=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unit", choices=UNITS, action="append", help="default: all three")
    parser.add_argument("--captions", type=int, default=12_000, help="public captions")
    parser.add_argument("--steps", type=int, default=12_000, help="training steps of the decoder")
    parser.add_argument(
        "--rehearsal-steps", type=int, default=4_000, help="of the rehearsal's decoder, which is thrown away"
    )
    parser.add_argument("--anchors", type=int, default=4096)
    parser.add_argument(
        "--scores", type=int, default=200, help="public captions that are drawn for the planner; 0 for none"
    )
    parser.add_argument(
        "--scores-only",
        action="store_true",
        help="keep the calibrations that are there, measure their scores",
    )
    parser.add_argument("--out", type=Path, default=CALIBRATIONS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    pipeline = load_pipeline()
    for unit in args.unit or UNITS:
        if args.scores_only:
            calibration = dpx.Calibration.from_pretrained(args.out / unit)
        else:
            calibration = fit(pipeline, unit, args, rehearsal=False)
            calibration.save_pretrained(args.out / unit)
        assert isinstance(calibration, AnchorCalibration)
        if args.scores:
            calibration = dataclasses.replace(calibration, scores=all_scores(pipeline, calibration, args))
            calibration.save_pretrained(args.out / unit)
        print(
            f"unit = {unit}: "
            + ", ".join(f"{p.epsilon:g}: {p.release} {p.quality.fvu:.3f}" for p in calibration.plans)
        )


if __name__ == "__main__":
    main()
