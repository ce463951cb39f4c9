"""Pictures of released phrases: `python benchmarks/library_shapes.py --out docs/library`.

Private are held-out captions of `examples/shapes`, no (colour, shape, place) of which is public; the library is made of public captions'
phrases and of what recombination adds, with the pipeline's own text encoder. Each phrase is released once, the plain pipeline draws the
released text, and the attributes that the private caption names are read off the picture. Intervals: 95 %, bootstrap over captions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
import torch
from shapes.evaluate import generate, load_pipeline
from shapes.reader import load_reader, score
from shapes.scenes import heldout_examples, phrases, train_examples

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.text.unit_encoders import unit_encoder
from hf_dp_xattn.privacy.bits import SeededEntropy

EPSILONS = (2.0, 4.0, 8.0, 16.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for shapes.json and shapes.md")
    parser.add_argument("-n", type=int, default=300, help="held-out captions")
    parser.add_argument("--public", type=int, default=2000, help="public captions")
    parser.add_argument("--expand", type=int, default=50_000, help="new texts by recombination, at most")
    parser.add_argument(
        "--codes", type=Path, help="folder that keeps codes, so that a run that was broken off goes on"
    )
    args = parser.parse_args()
    pipeline, rng = load_pipeline(), np.random.default_rng(0)
    public = [phrases(e.scene, rng) for e in train_examples(args.public, 1)]
    private = heldout_examples(args.n, 7)
    units = [phrases(e.scene, rng) for e in private]
    config = dpx.DPXAttnConfig(mechanism="library", unit="group")
    begun = time.time()
    library = dpx.calibrate(
        pipeline, public, config, epsilons=EPSILONS, grouping="phrases", expand=args.expand, folder=args.codes
    )
    assert isinstance(library, dpx.TextLibrary)
    seconds, encode = time.time() - begun, unit_encoder(pipeline)
    held = {phrase for unit in units for phrase in unit}
    known = {phrase for context in public for phrase in context}
    codes = [encode(unit) for unit in units]
    texts = {"exact": units}
    for epsilon in EPSILONS:
        prepared = library.prepare(config.replace(epsilon=epsilon))
        texts[f"epsilon {epsilon:g}"] = [
            list(prepared.run(c, groups=torch.arange(len(c)), entropy=SeededEntropy(i)).texts)
            for i, c in enumerate(codes)
        ]
    results: dict[str, Any] = {
        "captions": args.n,
        "texts": len(library.texts),
        "library_seconds": round(seconds),
        "held_out_phrases": len(held),
        "of_them_public": len(held & known),
        "of_them_in_the_library": len(held & set(library.texts)),
        "plans": {
            f"{p.epsilon:g}": [*p.entries.shape, p.near, round(p.quality.distortion, 3)]
            for p in library.plans
        },
        "conditions": {},
    }
    reader = load_reader()
    for name, own in texts.items():
        images = generate(pipeline, [", ".join(t) for t in own], seed=7)
        found = score(images, [e.scene for e in private], reader)
        results["conditions"][name] = interval(found.per_image, found.accuracy)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "shapes.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "shapes.md").write_text(page(results))
    print(page(results))


def interval(per_image: np.ndarray, accuracy: float) -> dict[str, float]:
    draws = np.random.default_rng(0).integers(len(per_image), size=(4000, len(per_image)))
    low, high = np.percentile(per_image[draws].mean(1), [2.5, 97.5])
    return {"accuracy": round(accuracy, 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def page(results: dict[str, Any]) -> str:
    lines = [
        f"Attributes right in pictures of {results['captions']} held-out captions, released phrase by phrase. Of their "
        f"{results['held_out_phrases']} phrases {results['of_them_public']} are public and {results['of_them_in_the_library']} are in the "
        f"library of {results['texts']} texts, which took {results['library_seconds']} s.",
        "",
        "| the pipeline reads | attributes right (95 %) |",
        "| --- | --- |",
    ]
    for name, c in results["conditions"].items():
        lines.append(f"| {name} | {c['accuracy']:.1%} ({c['low']:.1%} to {c['high']:.1%}) |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
