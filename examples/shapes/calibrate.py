"""Builds the calibrations that the shapes pipeline ships with: `python examples/shapes/calibrate.py` (about two hours on two cores).

Public data only: training captions, which share no (colour, shape, place) with the held-out ones. For the planner it also measures the
attribute accuracy of PUBLIC captions of another seed at every epsilon; for phrases and prompts also in a *rehearsal*: of public captions
whose every object is a combination that the calibration has not seen, with ones that were fitted in the same way without 25 of the public
combinations, others in each fold. The rehearsal is what the planner promises for prompts that say something new.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration, ScorePoint
from shapes.evaluate import load_pipeline
from shapes.private import CALIBRATIONS, PUBLIC_SEED, UNITS, config, generate_private, prompts
from shapes.reader import load_reader, score
from shapes.scenes import REHEARSALS, Scene, train_examples
from shapes.tables import line

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
SCORE_SEED = 999
SCORE_NAME = "attributes right"
SCORE_OF_SEEN = "attributes right, combinations that public prompts name"


def fit(
    pipeline: Any, unit: str, args: argparse.Namespace, *, without: int | None = None
) -> AnchorCalibration:
    """A calibration from public captions; `without`: from those without the combinations of this fold of the rehearsal."""
    rehearsal, fold = (None, 0) if without is None else (False, without)
    examples = train_examples(args.captions, PUBLIC_SEED, rehearsal=rehearsal, fold=fold)
    calibration = dpx.calibrate(
        pipeline,
        prompts(examples, unit, PUBLIC_SEED),
        config(8.0, unit=unit),
        epsilons=EPSILONS,
        anchors=args.anchors,
        # a few phrases or one prompt drown in the noise of a sum at every epsilon: all training goes to responses
        releases=("sum", "histogram") if unit == "row" else ("response",),
        steps=args.steps if without is None or args.rehearsal_steps is None else args.rehearsal_steps,
        query_prompts=32,
    )
    assert isinstance(calibration, AnchorCalibration)
    return calibration


Pictures = dict[float, np.ndarray]  # epsilon -> [n, 32, 32, 3]


def pictures(
    pipeline: Any, calibration: AnchorCalibration, n: int, *, fold: int | None = None
) -> tuple[Pictures, list[Scene]]:
    """n public captions at every plan's epsilon, and their scenes; fold: of this fold's combinations only."""
    rehearsal, seed = (None, SCORE_SEED) if fold is None else (True, SCORE_SEED + fold)
    examples = train_examples(n, seed, rehearsal=rehearsal, fold=fold or 0)
    captions = prompts(examples, calibration.unit, seed)
    drawn = {}
    for plan in tqdm(calibration.plans, desc=f"scores, unit = {calibration.unit}"):
        settings = config(plan.epsilon, unit=calibration.unit)
        drawn[plan.epsilon] = generate_private(
            pipeline, captions, settings, calibration, seed=seed, ledger=dpx.Ledger()
        )[0]
    return drawn, [e.scene for e in examples]


def scores(name: str, parts: Sequence[tuple[Pictures, list[Scene]]]) -> tuple[ScorePoint, ...]:
    """Share of the attributes that a reader finds right in the pictures of all parts together."""
    reader, scenes = load_reader(), [s for _, own in parts for s in own]
    points = []
    for epsilon in parts[0][0]:
        images = np.concatenate([drawn[epsilon] for drawn, _ in parts])
        found = line(name, f"{epsilon:g}", score(images, scenes, reader), scenes)
        points.append(ScorePoint(name, epsilon, found["accuracy"], found["low"], found["high"], len(scenes)))
    return tuple(points)


def all_scores(
    pipeline: Any, calibration: AnchorCalibration, args: argparse.Namespace
) -> tuple[ScorePoint, ...]:
    """The rehearsal's scores first: the planner takes the first by default.

    unit = row needs none: the decoder of a sum follows new combinations (the slow tests compare its score with held-out ones).
    """
    if calibration.unit == "row":
        return scores(SCORE_NAME, [pictures(pipeline, calibration, args.scores)])
    tried = []
    for fold in range(len(REHEARSALS)):
        kept = args.work / f"{calibration.unit}-{fold}"
        if not kept.exists():  # else an earlier run was cut off behind it
            fit(pipeline, calibration.unit, args, without=fold).save_pretrained(kept)
        trial = AnchorCalibration.from_pretrained(kept)
        tried.append(pictures(pipeline, trial, args.scores, fold=fold))
        print(f"rehearsal, fold {fold}:", told(scores(SCORE_NAME, tried[-1:])), flush=True)
    seen = [pictures(pipeline, calibration, args.scores)]
    return scores(SCORE_NAME, tried) + scores(SCORE_OF_SEEN, seen)


def told(points: Sequence[ScorePoint]) -> str:
    return ", ".join(f"{p.epsilon:g}: {p.score:.3f}" for p in points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unit", choices=UNITS, action="append", help="default: all three")
    parser.add_argument("--captions", type=int, default=12_000, help="public captions")
    parser.add_argument("--steps", type=int, default=12_000, help="training steps of the decoder")
    parser.add_argument(
        "--rehearsal-steps",
        type=int,
        help="of the rehearsal's decoders (default: as many as of the calibration)",
    )
    parser.add_argument("--anchors", type=int, default=4096)
    parser.add_argument(
        "--scores",
        type=int,
        default=200,
        help="public captions drawn for the planner, and in each fold; 0: none",
    )
    parser.add_argument(
        "--scores-only",
        action="store_true",
        help="keep the calibrations that are there, measure their scores",
    )
    parser.add_argument("--out", type=Path, default=CALIBRATIONS)
    parser.add_argument(
        "--work", type=Path, default=Path("out/rehearsal"), help="where the rehearsals' calibrations are kept"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    pipeline = load_pipeline()
    for unit in args.unit or UNITS:
        if args.scores_only:
            calibration = dpx.Calibration.from_pretrained(args.out / unit)
        else:
            calibration = fit(pipeline, unit, args)
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
