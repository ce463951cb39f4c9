"""Attribute accuracy of private prompts against epsilon: `python examples/shapes/sweep.py -n 300 --out docs/shapes`.

For each epsilon every held-out caption is released once (its own budget) and drawn once, from the same noise as at the other
epsilons, with unit = row; and with unit = context, which protects the whole prompt at once. Writes a table (Markdown), the
numbers (JSON) and a plot.
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

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.evaluate import generate, load_pipeline
from shapes.private import DELTA, PUBLIC_CAPTIONS, RANK, calibrate, generate_private
from shapes.reader import Score, load_reader, score
from shapes.scenes import Scene, heldout_examples

EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, float("inf"))
CONTEXT_EPSILONS = (8.0, 64.0)
STRIP_EPSILONS = (1.0, 4.0, 16.0, 64.0, float("inf"))
PROMPT_SEED = 11
KINDS = ("place", "shape", "colour", "size", "background")


def name(epsilon: float) -> str:
    return "none (not private)" if np.isinf(epsilon) else f"{epsilon:g}"


def interval(per_image: np.ndarray, attributes: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval over captions (each with its own release noise) of the share of all attributes."""
    rng = np.random.default_rng(0)
    pick = rng.integers(0, len(per_image), (draws, len(per_image)))
    shares = (per_image * attributes)[pick].sum(1) / attributes[pick].sum(1)
    return float(np.quantile(shares, 0.025)), float(np.quantile(shares, 0.975))


def row(label: str, result: Score, scenes: Sequence[Scene]) -> dict[str, Any]:
    """One line of the table."""
    attributes = np.array([4 * len(s.objects) + 1 for s in scenes])
    low, high = interval(result.per_image, attributes)
    return {
        "epsilon": label,
        "accuracy": result.accuracy,
        "low": low,
        "high": high,
        "captions": len(scenes),
        **{k: result.by_kind[k] for k in KINDS},
    }


def strip_prompt() -> str:
    """The private prompt of the strip: the first held-out caption of a fixed seed that names two objects."""
    return next(e.caption for e in heldout_examples(50, PROMPT_SEED) if len(e.scene.objects) == 2)


def draw_strip(pictures: Sequence[tuple[str, np.ndarray]], prompt: str, path: Path) -> None:
    """One row of labelled pictures."""
    figure, axes = plt.subplots(
        1, len(pictures), figsize=(1.75 * len(pictures), 2.45), constrained_layout=True
    )
    for axis, (label, picture) in zip(axes, pictures, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(label, fontsize=9)
        axis.set_axis_off()
    figure.suptitle(f'private prompt: "{prompt}"', fontsize=9)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def strip_label(epsilon: float) -> str:
    return "none\n(not private)" if np.isinf(epsilon) else f"eps = {epsilon:g}"


def measure(
    n: int, epsilons: Sequence[float], strip: Path, seed: int = 7, rank: int = RANK
) -> list[dict[str, Any]]:
    """One row per epsilon and unit, one for the public prompt alone (the empty one), one for the unprotected pipeline.

    Draws the strip of one private prompt on the way.
    """
    warnings.filterwarnings("ignore", category=UserWarning)
    pipeline, reader = load_pipeline(), load_reader()
    examples = heldout_examples(n, seed)
    captions, scenes = [e.caption for e in examples], [e.scene for e in examples]
    rows = [row("public prompt only", score(generate(pipeline, [""] * n, seed=seed), scenes, reader), scenes)]
    pictures = [("public prompt only", generate(pipeline, [""], seed=0)[0])]
    for unit, wanted in (("row", epsilons), ("context", CONTEXT_EPSILONS)):
        calibration = calibrate(pipeline, wanted, rank=rank, unit=unit)
        for epsilon in tqdm(wanted, desc=f"unit = {unit}"):
            images, _ = generate_private(pipeline, captions, epsilon, calibration, seed=seed, unit=unit)
            label = name(epsilon) if unit == "row" else f"{name(epsilon)}, unit = context"
            rows.append(row(label, score(images, scenes, reader), scenes))
            if unit == "row" and epsilon in STRIP_EPSILONS:
                picture, _ = generate_private(pipeline, [strip_prompt()], epsilon, calibration)
                pictures.append((strip_label(epsilon), picture[0]))
    draw_strip(pictures, strip_prompt(), strip)
    unprotected = score(generate(pipeline, captions, seed=seed), scenes, reader)
    rows.append(row("unprotected pipeline", unprotected, scenes))
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| epsilon | attributes right | 95 % interval | " + " | ".join(KINDS) + " |",
        "|---" * (3 + len(KINDS)) + "|",
    ]
    for r in rows:
        values = " | ".join(f"{100 * r[k]:.0f}" for k in KINDS)
        lines.append(
            f"| {r['epsilon']} | {100 * r['accuracy']:.1f} % | {100 * r['low']:.1f} to {100 * r['high']:.1f} | {values} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.8, 4.0), constrained_layout=True)
    for unit, suffix, marker in (("row", "", "o"), ("context", ", unit = context", "s")):
        named = [(r["epsilon"].removesuffix(suffix), r) for r in rows if r["epsilon"].endswith(suffix)]
        chosen = [(float(e), r) for e, r in named if e.replace(".", "").isdigit()]
        if not chosen:
            continue
        x = np.array([e for e, _ in chosen])
        y, low, high = (100 * np.array([r[k] for _, r in chosen]) for k in ("accuracy", "low", "high"))
        axes.errorbar(
            x, y, yerr=[y - low, high - y], marker=marker, capsize=3, label=f"kernel_sum, unit = {unit}"
        )
        if unit == "row":
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{v:g}" for v in x])
    for label, style in (("unprotected pipeline", "--"), ("public prompt only", ":")):
        value = next(100 * r["accuracy"] for r in rows if r["epsilon"] == label)
        axes.axhline(value, linestyle=style, color="gray", label=f"{label} ({value:.1f} %)")
    axes.set_ylim(0, 102)
    axes.set_xlabel(f"epsilon of one release (delta = {DELTA:g}, replace_one, n = 77)")
    axes.set_ylabel("attributes right, %")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=300, help="held-out captions")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rank", type=int, default=RANK, help="directions of the sketch")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"))
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of the table")
    args = parser.parse_args()
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = measure(args.n, EPSILONS, args.out / "strip.png", args.seed, args.rank)
    summary = {"rows": rows, "delta": DELTA, "public_captions": PUBLIC_CAPTIONS, "seed": args.seed}
    (args.out / "accuracy.json").write_text(json.dumps(summary, indent=2) + "\n")
    (args.out / "accuracy.md").write_text(markdown(rows))
    plot(rows, args.out / "accuracy.png")
    print(json.dumps(summary) if args.json else markdown(rows))
    if not args.json:
        print(f"{time.perf_counter() - start:.0f} s; files in {args.out.resolve()}")


if __name__ == "__main__":
    main()
