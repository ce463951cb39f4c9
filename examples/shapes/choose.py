"""`library` or `anchors`, phrase by phrase? `python examples/shapes/choose.py --out docs/library` asks PUBLIC captions new to both.

Both shipped calibrations protect the pipeline in turn, and a reader counts the attributes that the pictures have right. What it finds says
which one to take at each epsilon; no private caption takes part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from shapes.evaluate import generate, load_pipeline
from shapes.phrase_library import LIBRARY
from shapes.private import CALIBRATIONS, DELTA, prompts
from shapes.reader import load_reader, score
from shapes.scenes import train_examples

EPSILONS = (1.0, 2.0, 4.0, 8.0)
SEED = 2024  # captions of which neither calibration was made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for choice.json and choice.md")
    parser.add_argument("-n", type=int, default=60, help="public captions")
    args = parser.parse_args()
    examples, reader = train_examples(args.n, SEED), load_reader()
    scenes = [e.scene for e in examples]

    def attributes(pipeline: Any, contexts: Sequence[str]) -> list[float]:
        images = generate(pipeline, list(contexts), seed=7)
        return [float(x) for x in score(images, scenes, reader).per_image]

    found = dpx.compare(
        load_pipeline(),
        {"anchors": CALIBRATIONS / "group", "library": LIBRARY},
        prompts(examples, "group"),
        attributes,
        epsilons=EPSILONS,
        delta=DELTA,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [
        {"epsilon": p.epsilon, "calibration": p.name, "mean": round(p.mean, 4), "half": round(p.half, 4)}
        for p in found.points
    ]
    (args.out / "choice.json").write_text(json.dumps({"captions": args.n, "lines": lines}, indent=1) + "\n")
    head = f"Mean share of attributes right, {args.n} public captions, phrases, +- 95 % over captions:"
    (args.out / "choice.md").write_text(f"{head}\n\n{found}\n")
    print(found)


if __name__ == "__main__":
    main()
