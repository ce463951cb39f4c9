"""Attribute accuracy of private prompts against epsilon: `python examples/shapes/sweep.py -n 300 --out docs/shapes`.

Every held-out caption is released once (its own budget) and drawn once, from the same image noise at every epsilon, for each privacy
unit: one row, one phrase (group), the whole prompt (context), all by `anchors`; and for one row by `kernel_sum` and by the paper's own
`dptree`. Writes tables (Markdown), the numbers (JSON), a plot and a strip of pictures. Baselines: benchmarks/utility.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from shapes.evaluate import generate, load_pipeline
from shapes.private import (
    DELTA,
    TREE_SETTINGS,
    UNITS,
    calibrate_dptree,
    calibrate_kernel_sum,
    config,
    generate_private,
    load_calibration,
    prompts,
)
from shapes.reader import load_reader, score
from shapes.scenes import heldout_examples
from shapes.strip import strip
from shapes.tables import PLAIN, PUBLIC, kinds_markdown, line, markdown, name, plot

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, float("inf"))
TITLES = {
    "row": "unit = row",
    "group": "unit = group (phrase)",
    "context": "unit = context (prompt)",
    "kernel_sum": "row, kernel_sum",
    "dptree": "row, dptree (the paper's)",
}
TREE_EPSILONS = (1.0, 8.0, 64.0)  # its releases are slow
AXIS = f"epsilon of one release (delta = {DELTA:g}, replace_one)"


def measure(
    n: int, epsilons: Sequence[float], seed: int = 7, series: Sequence[str] = UNITS
) -> list[dict[str, Any]]:
    """All lines of these privacy units (by `anchors`) and other mechanisms (unit = row)."""
    pipeline, reader = load_pipeline(), load_reader()
    examples = heldout_examples(n, seed)
    scenes = [e.scene for e in examples]
    public = score(generate(pipeline, [""] * n, seed=seed), scenes, reader)
    units = [s for s in series if s in UNITS]
    lines = [line(unit, PUBLIC, public, scenes) for unit in units]
    jobs = [(s, e) for s in series for e in _epsilons(s, epsilons)]
    calibrations = {s: _calibration(s, pipeline, epsilons) for s in series}
    for what, epsilon in tqdm(jobs, desc="releases and pictures"):
        unit = what if what in UNITS else "row"
        changes = TREE_SETTINGS if what == "dptree" else {}
        settings = config(epsilon, unit=unit, mechanism="anchors" if what in UNITS else what, **changes)
        captions = prompts(examples, unit, seed)
        images, _ = generate_private(
            pipeline, captions, settings, calibrations[what], seed=seed, ledger=dpx.Ledger()
        )
        lines.append(line(what, name(epsilon), score(images, scenes, reader), scenes))
    for unit in units:
        images = generate(pipeline, prompts(examples, unit, seed), seed=seed)
        lines.append(line(unit, PLAIN, score(images, scenes, reader), scenes))
    return lines


def _epsilons(series: str, epsilons: Sequence[float]) -> list[float]:
    if series == "dptree":
        return [e for e in epsilons if e in TREE_EPSILONS]
    return [e for e in epsilons if np.isfinite(e) or series in ("row", "context")]


def _calibration(series: str, pipeline: Any, epsilons: Sequence[float]) -> Any:
    if series == "dptree":
        return calibrate_dptree(pipeline)
    if series == "kernel_sum":
        return calibrate_kernel_sum(pipeline, epsilons)
    return load_calibration(series)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=300, help="held-out captions")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/sweep"))
    parser.add_argument(
        "--series",
        choices=tuple(TITLES),
        action="append",
        help="measure only these and keep the other lines of --out",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of the table")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    strip(load_pipeline(), args.out / "strip.png")
    wanted = args.series or list(TITLES)
    path = args.out / "accuracy.json"
    old = json.loads(path.read_text())["lines"] if args.series else []
    kept = [x for x in old if x["series"] not in wanted]
    lines = kept + measure(args.n, EPSILONS, args.seed, wanted)
    lines.sort(key=lambda x: list(TITLES).index(x["series"]))
    summary = {"lines": lines, "delta": DELTA, "seed": args.seed}
    path.write_text(json.dumps(summary, indent=2) + "\n")
    (args.out / "accuracy.md").write_text(markdown(lines, TITLES))
    (args.out / "kinds.md").write_text(kinds_markdown(lines, TITLES))
    plot(lines, TITLES, args.out / "accuracy.png", AXIS)
    print(json.dumps(summary) if args.json else markdown(lines, TITLES))
    if not args.json:
        print(f"{time.perf_counter() - start:.0f} s; files in {args.out.resolve()}")


if __name__ == "__main__":
    main()
