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
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.evaluate import generate, load_pipeline
from shapes.private import DELTA, PUBLIC_CAPTIONS, RANK, calibrate, generate_private
from shapes.reader import load_reader, score
from shapes.scenes import heldout_examples

EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, float("inf"))
CONTEXT_EPSILONS = (8.0, 64.0)
KINDS = ("place", "shape", "colour", "size", "background")


def name(epsilon: float) -> str:
    return "none (not private)" if np.isinf(epsilon) else f"{epsilon:g}"


def interval(per_image: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval over captions (each with its own release noise)."""
    rng = np.random.default_rng(0)
    means = per_image[rng.integers(0, len(per_image), (draws, len(per_image)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def row(label: str, result: object, scenes: int) -> dict[str, object]:
    low, high = interval(result.per_image)  # type: ignore[attr-defined]
    return {
        "epsilon": label,
        "accuracy": result.accuracy,  # type: ignore[attr-defined]
        "low": low,
        "high": high,
        "captions": scenes,
        **{k: result.by_kind[k] for k in KINDS},  # type: ignore[attr-defined]
    }


def measure(n: int, epsilons: tuple[float, ...], seed: int = 7, rank: int = RANK) -> list[dict[str, object]]:
    """One row per epsilon and unit, one for the public prompt alone (the empty one), one for the unprotected pipeline."""
    warnings.filterwarnings("ignore", category=UserWarning)
    pipeline, reader = load_pipeline(), load_reader()
    examples = heldout_examples(n, seed)
    captions, scenes = [e.caption for e in examples], [e.scene for e in examples]
    rows = [row("public prompt only", score(generate(pipeline, [""] * n, seed=seed), scenes, reader), n)]
    for unit, wanted in (("row", epsilons), ("context", CONTEXT_EPSILONS)):
        calibration = calibrate(pipeline, wanted, rank=rank, unit=unit)
        for epsilon in tqdm(wanted, desc=f"unit = {unit}"):
            images, _ = generate_private(pipeline, captions, epsilon, calibration, seed=seed, unit=unit)
            label = name(epsilon) if unit == "row" else f"{name(epsilon)}, unit = context"
            rows.append(row(label, score(images, scenes, reader), n))
    unprotected = score(generate(pipeline, captions, seed=seed), scenes, reader)
    rows.append(row("unprotected pipeline", unprotected, n))
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    lines = [
        "| epsilon | attributes right | 95 % interval | " + " | ".join(KINDS) + " |",
        "|---" * (3 + len(KINDS)) + "|",
    ]
    for r in rows:
        values = " | ".join(f"{100 * r[k]:.0f}" for k in KINDS)  # type: ignore[operator]
        lines.append(
            f"| {r['epsilon']} | {100 * r['accuracy']:.1f} % | {100 * r['low']:.1f} to {100 * r['high']:.1f} | {values} |"  # type: ignore[operator]
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, object]], path: Path) -> None:
    finite = [r for r in rows if str(r["epsilon"]).replace(".", "").isdigit()]
    x = np.array([float(str(r["epsilon"])) for r in finite])
    y, low, high = (100 * np.array([r[k] for r in finite], dtype=float) for k in ("accuracy", "low", "high"))
    figure, axes = plt.subplots(figsize=(6.4, 3.8), constrained_layout=True)
    axes.errorbar(x, y, yerr=[y - low, high - y], marker="o", capsize=3, label="kernel_sum, private prompt")
    for label, style in (("unprotected pipeline", "--"), ("public prompt only", ":")):
        value = next(100 * float(r["accuracy"]) for r in rows if r["epsilon"] == label)  # type: ignore[arg-type]
        axes.axhline(value, linestyle=style, color="gray", label=f"{label} ({value:.1f} %)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{v:g}" for v in x])
    axes.set_ylim(0, 102)
    axes.set_xlabel(f"epsilon of one release (delta = {DELTA:g}, replace one row of 77)")
    axes.set_ylabel("attributes right, %")
    axes.legend(loc="lower right", frameon=False)
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
    rows = measure(args.n, EPSILONS, args.seed, args.rank)
    args.out.mkdir(parents=True, exist_ok=True)
    summary = {"rows": rows, "delta": DELTA, "public_captions": PUBLIC_CAPTIONS, "seed": args.seed}
    (args.out / "accuracy.json").write_text(json.dumps(summary, indent=2) + "\n")
    (args.out / "accuracy.md").write_text(markdown(rows))
    plot(rows, args.out / "accuracy.png")
    print(json.dumps(summary) if args.json else markdown(rows))
    if not args.json:
        print(f"{time.perf_counter() - start:.0f} s; files in {args.out.resolve()}")


if __name__ == "__main__":
    main()
