"""Pictures of released phrases: `python benchmarks/library_shapes.py --out docs/library`.

Private are held-out captions of `examples/shapes`, no (colour, shape, place) of which is public; the library is made of public captions'
phrases and of what recombination adds, with the pipeline's own text encoder. Each phrase is released once (or all of a caption together),
the plain pipeline draws the released text, and the attributes that the private caption names are read off the picture. Intervals: 95 %,
bootstrap over captions. What is done is written after each condition.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
import torch
from shapes.evaluate import generate, load_pipeline
from shapes.reader import Score, load_reader, score
from shapes.scenes import Scene, heldout_examples, phrases, train_examples
from shapes.tables import interval

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.text.unit_encoders import unit_encoder
from hf_dp_xattn.privacy.bits import SeededEntropy

PHRASES = (8.0, 4.0, 16.0)
WHOLE = (8.0, 16.0, 32.0)
RESPONSES = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "output_type": "latent",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for shapes.json and shapes.md")
    parser.add_argument("-n", type=int, default=300, help="held-out captions")
    parser.add_argument("--public", type=int, default=2000, help="public captions")
    parser.add_argument("--expand", type=int, default=12_000, help="new texts by recombination, at most")
    parser.add_argument(
        "--codes", type=Path, help="folder that keeps codes, so that a run that was broken off goes on"
    )
    parser.add_argument(
        "--units",
        nargs="+",
        choices=("group", "context"),
        default=("group", "context"),
        help="what a unit is: phrases (and the captions themselves), whole prompts; what an earlier run wrote of others stays",
    )
    args = parser.parse_args()
    pipeline, rng = load_pipeline(), np.random.default_rng(0)
    public = [phrases(e.scene, rng) for e in train_examples(args.public, 1)]
    private = heldout_examples(args.n, 7)
    units = [phrases(e.scene, rng) for e in private]
    start = time.time()
    libraries = {
        unit: calibrated(pipeline, public, unit, epsilons, args)
        for unit, epsilons in (("group", PHRASES), ("context", WHOLE))
        if unit in args.units
    }
    seconds, encode = time.time() - start, unit_encoder(pipeline)
    held = {phrase for unit in units for phrase in unit}
    known = {phrase for context in public for phrase in context}
    codes = [encode(unit) for unit in units]
    texts = {"exact": units} if "group" in args.units else {}
    for unit, library in libraries.items():
        for plan in library.plans:
            config = dpx.DPXAttnConfig(mechanism="library", unit=unit, epsilon=plan.epsilon)
            name = f"{'phrases' if unit == 'group' else 'whole prompt'}, epsilon {plan.epsilon:g}"
            texts[name] = [released(library, config, c, i) for i, c in enumerate(codes)]
    results = earlier(args.out / "shapes.json", args.n)
    results |= {
        "captions": args.n,
        "library_seconds": round(seconds),
        "held_out_phrases": len(held),
        "of_them_public": len(held & known),
    }
    for unit, library in libraries.items():
        results |= {"texts": len(library.texts), "of_them_in_the_library": len(held & set(library.texts))}
        for p in library.plans:
            results["plans"][f"{unit} {p.epsilon:g}"] = [*p.described(), round(p.quality.distortion, 3)]
    reader = load_reader()
    drawn: dict[tuple[int, str], np.ndarray] = {}
    scenes = [e.scene for e in private]
    for name, own in texts.items():
        captions = [", ".join(t) for t in own]
        new = [i for i, caption in enumerate(captions) if (i, caption) not in drawn]
        images = generate(pipeline, [captions[i] for i in new], seed=7, numbers=new)
        drawn |= {(i, captions[i]): image for i, image in zip(new, images, strict=True)}
        found = score(np.stack([drawn[i, c] for i, c in enumerate(captions)]), scenes, reader)
        results["conditions"] |= earlier(args.out / "shapes.json", args.n)["conditions"]
        results["conditions"][name] = measured(found, scenes)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "shapes.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "shapes.md").write_text(page(results))
    print(page(results))


def earlier(path: Path, captions: int) -> dict[str, Any]:
    """What an earlier run with as many captions wrote."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("captions") == captions else {"plans": {}, "conditions": {}}


begun: dict[tuple[str, ...], torch.Tensor] = {}  # pictures that both libraries look at


def calibrated(
    pipeline: Any, public: list[list[str]], unit: str, epsilons: tuple[float, ...], args: argparse.Namespace
) -> dpx.TextLibrary:
    """A library in whose metric phrases are near that the pipeline begins to draw alike, from the same noise."""

    def responses(texts: list[str]) -> torch.Tensor:
        if tuple(texts) in begun:
            return begun[tuple(texts)]
        parts = []
        for start in range(0, len(texts), 100):
            own = texts[start : start + 100]
            same = [torch.Generator().manual_seed(0) for _ in own]
            parts.append(pipeline(own, generator=same, **RESPONSES).images.flatten(1))
        begun[tuple(texts)] = torch.cat(parts)
        return begun[tuple(texts)]

    library = dpx.calibrate(
        pipeline,
        public,
        dpx.DPXAttnConfig(mechanism="library", unit=unit),
        epsilons=epsilons,
        grouping="phrases",
        expand=args.expand,
        folder=args.codes,
        responses=responses,
    )
    assert isinstance(library, dpx.TextLibrary)
    return library


def released(
    library: dpx.TextLibrary, config: dpx.DPXAttnConfig, codes: torch.Tensor, seed: int
) -> list[str]:
    """Seeded, so that a run can be repeated."""
    whole = config.unit == "context"
    prepared = library.prepare(config, units=len(codes) if whole else None)
    groups = None if whole else torch.arange(len(codes))
    return list(prepared.run(codes, groups=groups, entropy=SeededEntropy(seed)).texts)


def measured(found: Score, scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of all attributes, and its interval."""
    low, high = interval(found.per_image, np.array([scene.n_attributes for scene in scenes]))
    return {"accuracy": round(found.accuracy, 4), "low": round(low, 4), "high": round(high, 4)}


def page(results: dict[str, Any]) -> str:
    """The table of the documents."""
    lines = [
        f"{results['captions']} held-out captions; of their {results['held_out_phrases']} phrases {results['of_them_public']} are public "
        f"as they are, and {results['of_them_in_the_library']} stand in the closed library of {results['texts']:,} texts:",
        "",
        "| the pipeline reads | attributes right (95 %) |",
        "| --- | --- |",
    ]
    order = [
        "exact",
        *(f"phrases, epsilon {e:g}" for e in sorted(PHRASES)),
        *(f"whole prompt, epsilon {e:g}" for e in WHOLE),
    ]
    for name, c in ((name, results["conditions"][name]) for name in order if name in results["conditions"]):
        lines.append(f"| {name} | {c['accuracy']:.1%} ({c['low']:.1%} to {c['high']:.1%}) |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
