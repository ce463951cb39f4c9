"""Pictures of released phrases: `python benchmarks/library_shapes.py --out docs/library`.

Private are held-out captions of `examples/shapes`, no (colour, shape, place) of which is public; the library is made of public captions'
phrases and of what recombination adds, with the pipeline's own text encoder. Each phrase is released once (or all of a caption together),
the plain pipeline draws the released text, and the attributes that the private caption names are read off the picture. The mean of several
releases of a caption counts, each with its own coins: at epsilon 8 the coins of 300 captions alone move a result by 2 points. Intervals:
95 %, bootstrap over captions. What is done is written after each condition. Beside phrases stands what is possible at all: `ceiling`.
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
from shapes.phrase_library import EXPAND, begun_pictures
from shapes.reader import Score, load_reader, score
from shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    heldout_examples,
    phrases,
    train_examples,
)
from shapes.tables import interval

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.text.unit_encoders import unit_encoder
from hf_dp_xattn.privacy.bits import SeededEntropy

PHRASES = (8.0, 4.0, 16.0)
WHOLE = (8.0, 16.0, 32.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for shapes.json and shapes.md")
    parser.add_argument("-n", type=int, default=300, help="held-out captions")
    parser.add_argument("--draws", type=int, default=3, help="releases of each caption")
    parser.add_argument("--public", type=int, default=2000, help="public captions")
    parser.add_argument("--expand", type=int, default=EXPAND, help="new texts by recombination, at most")
    parser.add_argument(
        "--codes", type=Path, help="folder that keeps codes, so that a run that was broken off goes on"
    )
    parser.add_argument(
        "--units",
        nargs="*",
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
    responses = begun_pictures(pipeline)
    libraries = {
        unit: calibrated(pipeline, public, unit, epsilons, responses, args)
        for unit, epsilons in (("group", PHRASES), ("context", WHOLE))
        if unit in args.units
    }
    seconds, encode = time.time() - start, unit_encoder(pipeline)
    held = {phrase for unit in units for phrase in unit}
    known = {phrase for context in public for phrase in context}
    codes = [encode(unit) for unit in units]
    texts = {"exact": [units]} if "group" in args.units else {}
    for unit, library in libraries.items():
        for plan in library.plans:
            config = dpx.DPXAttnConfig(mechanism="library", unit=unit, epsilon=plan.epsilon)
            name = f"{'phrases' if unit == 'group' else 'whole prompt'}, epsilon {plan.epsilon:g}"
            seeds = (range(d * args.n, (d + 1) * args.n) for d in range(args.draws))
            texts[name] = [
                [released(library, config, c, s) for c, s in zip(codes, own, strict=True)] for own in seeds
            ]
    results = earlier(args.out / "shapes.json", args.n, args.draws)
    results |= {
        "captions": args.n,
        "draws": args.draws,
        "held_out_phrases": len(held),
        "of_them_public": len(held & known),
    }
    for unit, library in libraries.items():
        results["library_seconds"] = round(seconds)
        results |= {"texts": len(library.texts), "of_them_in_the_library": len(held & set(library.texts))}
        for p in library.plans:
            results["plans"][f"{unit} {p.epsilon:g}"] = [*p.described(), round(p.quality.distortion, 3)]
    objects = sum(len(e.scene.objects) for e in private)
    results["ceilings"] = {f"{e:g}": round(ceiling(e, objects / args.n), 4) for e in PHRASES}
    write(args.out, results)
    reader = load_reader()
    drawn: dict[tuple[int, str], np.ndarray] = {}
    scenes = [e.scene for e in private]
    for name, draws in texts.items():
        found = []
        for own in draws:
            captions = [", ".join(t) for t in own]
            new = [i for i, caption in enumerate(captions) if (i, caption) not in drawn]
            images = generate(pipeline, [captions[i] for i in new], seed=7, numbers=new)
            drawn |= {(i, captions[i]): image for i, image in zip(new, images, strict=True)}
            found.append(score(np.stack([drawn[i, c] for i, c in enumerate(captions)]), scenes, reader))
        results["conditions"] |= earlier(args.out / "shapes.json", args.n, args.draws)["conditions"]
        results["conditions"][name] = measured(found, scenes)
        write(args.out, results)
    print(page(results))


def write(out: Path, results: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "shapes.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "shapes.md").write_text(page(results))


def ceiling(epsilon: float, objects: float) -> float:
    """The share of attributes that no epsilon-DP answer of each phrase by one phrase can exceed, on average over all phrases there are.

    Let a(x, y) be the share of attributes of phrase x that a picture of phrase y has (none where the object is elsewhere), of K phrases.
    For any law P(y | x) of ratio e^epsilon and least value m(y), the mean of a is at most a sum over y of
    m(y) (e^epsilon A_t + A - A_t) / K, A_t the sum of the t largest a(., y) and A that of all, while m(y) (e^epsilon t + K - t) / K sums
    to 1: it is at most the largest ratio.

    Args:
        objects: of a caption, beside its background.
    """
    others = np.indices([len(values) for values in (SHAPES, COLOURS, SIZES)])
    named = 1.0 + (others == 0).sum(
        0
    )  # of four attributes of an object at the same place, for each shape, colour and size
    elsewhere = np.zeros(named.size * (len(PLACES) - 1))
    backgrounds = np.arange(len(BACKGROUNDS)) == 0
    parts = ((np.concatenate([named.ravel() / 4, elsewhere]), 4 * objects), (backgrounds.astype(float), 1.0))
    best = []
    for values, weight in parts:
        top, t = np.cumsum(np.sort(values)[::-1]), np.arange(1, len(values) + 1)
        odds = np.exp(epsilon)
        ratio = (odds * top + values.sum() - top) / (odds * t + len(values) - t)
        best.append(weight * float(ratio.max()))
    return sum(best) / sum(weight for _, weight in parts)


def earlier(path: Path, captions: int, draws: int) -> dict[str, Any]:
    """What an earlier run with as many captions and draws wrote."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return (
        found
        if (found.get("captions"), found.get("draws")) == (captions, draws)
        else {"plans": {}, "conditions": {}}
    )


def calibrated(
    pipeline: Any,
    public: list[list[str]],
    unit: str,
    epsilons: tuple[float, ...],
    responses: Any,
    args: argparse.Namespace,
) -> dpx.TextLibrary:
    """A library in whose metric phrases are near that the pipeline begins to draw alike, from the same noise."""
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


def measured(found: Sequence[Score], scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of all attributes, the mean over draws, and its interval."""
    per_image = np.mean([f.per_image for f in found], axis=0)
    low, high = interval(per_image, np.array([scene.n_attributes for scene in scenes]))
    accuracy = float(np.mean([f.accuracy for f in found]))
    return {"accuracy": round(accuracy, 4), "low": round(low, 4), "high": round(high, 4)}


def page(results: dict[str, Any]) -> str:
    """The table of the documents."""
    lines = [
        f"{results['captions']} held-out captions, each released {results['draws']} time(s); of their {results['held_out_phrases']} "
        f"phrases {results['of_them_public']} are public as they are, and {results['of_them_in_the_library']} stand in the closed library "
        f"of {results['texts']:,} texts:",
        "",
        "| the pipeline reads | attributes right (95 %) | at most |",
        "| --- | --- | --- |",
    ]
    order = [
        "exact",
        *(f"phrases, epsilon {e:g}" for e in sorted(PHRASES)),
        *(f"whole prompt, epsilon {e:g}" for e in WHOLE),
    ]
    for name, c in ((name, results["conditions"][name]) for name in order if name in results["conditions"]):
        most = results["ceilings"].get(name.removeprefix("phrases, epsilon "))
        limit = "" if most is None else f"{most * results['conditions']['exact']['accuracy']:.1%}"
        lines.append(f"| {name} | {c['accuracy']:.1%} ({c['low']:.1%} to {c['high']:.1%}) | {limit} |")
    lines += [
        "",
        "*At most*: what an epsilon-DP answer of each phrase by one phrase can reach, on average over all phrases that there are "
        "(`ceiling` in the benchmark), times what the pipeline has of exact captions.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
