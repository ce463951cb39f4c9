"""The main job on the shipped model: draw a private prompt that the UNet never receives. `make demo`.

With the shipped public calibrations: draws one private prompt at several epsilons, for three privacy units, beside the picture of the
public prompt alone; scores attributes over a test set; prints what the planner predicted, the privacy report, and where the files are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from shapes.evaluate import generate, load_pipeline
from shapes.private import DELTA, UNITS, config, generate_private, load_calibration, prompts
from shapes.reader import load_reader, score
from shapes.scenes import heldout_examples
from shapes.sweep import AXIS, STRIP_EPSILONS, TITLES, strip, strip_example
from shapes.tables import PLAIN, PUBLIC, line, markdown, name, plot

import hf_dp_xattn as dpx

EPSILONS = (1.0, 4.0, 8.0, 16.0)
SHOWN = 8.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("-n", type=int, default=60, help="held-out captions in the accuracy table")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=UserWarning)
    start = time.perf_counter()

    def say(message: str) -> None:
        if not args.json:
            print(message, flush=True)

    pipeline, reader = load_pipeline(), load_reader()
    calibrations = {unit: load_calibration(unit) for unit in UNITS}
    say("What the planner predicts from the calibration alone (nothing is spent):\n")
    plan = dpx.plan(calibrations["row"], epsilons=EPSILONS, measure=False)
    say(str(plan) + "\n")

    example = strip_example()
    ledger, budget = dpx.Ledger(), dpx.Budget(SHOWN, DELTA)
    with dpx.protect(
        pipeline, config(SHOWN), calibration=calibrations["row"], ledger=ledger, budget=budget
    ) as protected:
        generate(pipeline, [example.caption], seed=0)
        report = protected.report()
    say("Drawing one private prompt at several epsilons ...")
    strip(pipeline, calibrations, STRIP_EPSILONS, args.out / "strip.png")

    examples = heldout_examples(args.n, 7)
    scenes = [e.scene for e in examples]
    public = score(generate(pipeline, [""] * args.n, seed=7), scenes, reader)
    lines = [line(unit, PUBLIC, public, scenes) for unit in UNITS]
    jobs = [(unit, epsilon) for unit in UNITS for epsilon in EPSILONS]
    for unit, epsilon in tqdm(jobs, desc=f"drawing and scoring {args.n} private prompts", disable=args.json):
        images, _ = generate_private(
            pipeline,
            prompts(examples, unit, 7),
            config(epsilon, unit=unit),
            calibrations[unit],
            seed=7,
            ledger=dpx.Ledger(),
        )
        lines.append(line(unit, name(epsilon), score(images, scenes, reader), scenes))
    for unit in UNITS:
        images = generate(pipeline, prompts(examples, unit, 7), seed=7)
        lines.append(line(unit, PLAIN, score(images, scenes, reader), scenes))

    titles = {unit: TITLES[unit] for unit in UNITS}
    plot(lines, titles, args.out / "accuracy.png", AXIS)
    (args.out / "accuracy.md").write_text(markdown(lines, titles))
    (args.out / "report.txt").write_text(str(report) + "\n")
    (args.out / "report.json").write_text(report.to_json() + "\n")
    (args.out / "plan.txt").write_text(str(plan) + "\n")
    summary = {
        "prompt_is_private": True,
        "lines": lines,
        "out": str(args.out),
        "seconds": time.perf_counter() - start,
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if args.json:
        print(json.dumps(summary))
        return
    print(
        "\nAttributes right on held-out captions (95 % interval), for each privacy unit:\n\n"
        + markdown(lines, titles)
    )
    print(f"The privacy report of one prompt at epsilon = {SHOWN:g}, unit = row:\n")
    print(report)
    print(f"\nDone in {summary['seconds']:.0f} s. Files in {args.out.resolve()}:")
    for file in ("strip.png", "accuracy.png", "accuracy.md", "report.txt", "report.json", "plan.txt"):
        print(f"  {args.out / file}")


if __name__ == "__main__":
    main()
