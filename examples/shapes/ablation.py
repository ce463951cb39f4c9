"""What limits kernel_sum at large epsilon: `python examples/shapes/ablation.py --out docs/shapes` (training captions only).

Draws the same public captions with the noise, the sketch and the feature map taken away one after the other. An epsilon
of 1e9 leaves next to no noise and protects nothing: it is there to see the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from shapes.evaluate import generate, load_pipeline
from shapes.private import KERNEL_SUM_CAPTIONS, KERNEL_SUM_RANK, PUBLIC_SEED, config
from shapes.reader import load_reader, score
from shapes.scenes import train_examples
from shapes.tables import line

NO_NOISE = 1e9
SEED = 999


def measure(n: int) -> list[tuple[str, float, float, float]]:
    """(what is left, attributes right, low, high) for each variant."""
    warnings.filterwarnings("ignore", category=UserWarning)
    pipeline, reader = load_pipeline(), load_reader()
    examples = train_examples(n, SEED)
    captions, scenes = [e.caption for e in examples], [e.scene for e in examples]
    public = [e.caption for e in train_examples(KERNEL_SUM_CAPTIONS, PUBLIC_SEED)]

    def fit(settings: dpx.DPXAttnConfig, rank: int) -> dpx.Calibration:
        return dpx.calibrate(pipeline, public, settings, epsilons=[64.0, NO_NOISE], rank=rank, progress=False)

    def loose(calibration: dpx.Calibration) -> dpx.Calibration:
        """No sketch, and a clipping bound that public rows do not reach."""
        return dataclasses.replace(calibration, basis=None, clip_norm=4 * calibration.clip_norm)

    usual = config(64.0, mechanism="kernel_sum")
    sketch = fit(usual, KERNEL_SUM_RANK)
    wide = usual.replace(degree=4, logit_bound=4.0)
    variants = [
        ("as in the table, epsilon = 64", usual, sketch),
        ("next to no noise", usual.replace(epsilon=NO_NOISE), sketch),
        ("next to no noise, no sketch", usual.replace(epsilon=NO_NOISE), loose(sketch)),
        (
            "next to no noise, no sketch, degree 4, logits clipped to 4",
            wide.replace(epsilon=NO_NOISE),
            loose(fit(wide, 0)),
        ),
        ("exact attention", config(np.inf), None),
    ]
    results = []
    for label, settings, calibration in tqdm(variants, desc="variants"):
        with dpx.protect(pipeline, settings, calibration=calibration):
            images = generate(pipeline, captions, seed=7)
        found = line("kernel_sum", label, score(images, scenes, reader), scenes)
        results.append((label, found["accuracy"], found["low"], found["high"]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=100, help="training captions")
    parser.add_argument("--out", type=Path, default=Path("out/ablation"))
    args = parser.parse_args()
    lines = [f"| {args.n} training captions | attributes right | 95 % interval |", "|---|---|---|"]
    lines += [
        f"| {label} | {100 * a:.1f} % | {100 * low:.1f} to {100 * high:.1f} |"
        for label, a, low, high in measure(args.n)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
