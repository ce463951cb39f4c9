"""Builds the libraries of phrases that the shapes pipeline ships with: `python examples/shapes/phrase_library.py` (minutes on two cores).

Public data only: the phrases of training captions, which share no (colour, shape, place) with the held-out ones, and new phrases in which
words that stand in the same public phrases take each other's place. One library answers phrase by phrase (unit = group), one all phrases
of a prompt together (unit = context). Nothing is trained; phrases that the pipeline begins to draw alike count as near.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from shapes.evaluate import load_pipeline
from shapes.private import PUBLIC_SEED, config
from shapes.scenes import IMAGE_SIZE, phrases, train_examples

LIBRARY = Path(__file__).with_name("library")
LIBRARIES = {"group": LIBRARY, "context": LIBRARY.with_name("library_prompt")}
EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
EXPAND = 12_000
_STEPS, _BATCH = 2, 100


def begun_pictures(pipeline: Any) -> Callable[[Sequence[str]], torch.Tensor]:
    """For `dpx.calibrate(responses=...)`: what is begun to be drawn of each of n public texts, all from the same noise; latents [n, d]."""
    kept: dict[tuple[str, ...], torch.Tensor] = {}

    def responses(texts: Sequence[str]) -> torch.Tensor:
        if tuple(texts) not in kept:
            kept[tuple(texts)] = torch.cat(
                [draw(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]
            )
        return kept[tuple(texts)]

    def draw(texts: Sequence[str]) -> torch.Tensor:
        latents: torch.Tensor = pipeline(
            list(texts),
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=_STEPS,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(0) for _ in texts],
            output_type="latent",
        ).images
        return latents.flatten(1)

    return responses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", nargs="+", choices=tuple(LIBRARIES), default=tuple(LIBRARIES))
    parser.add_argument("--out", type=Path, default=LIBRARY.parent, help="folder of both")
    parser.add_argument("--captions", type=int, default=2000, help="public captions")
    parser.add_argument("--expand", type=int, default=EXPAND, help="new phrases by recombination, at most")
    parser.add_argument(
        "--codes", type=Path, help="folder that keeps codes: a run that was broken off goes on"
    )
    args = parser.parse_args()
    pipeline, rng = load_pipeline(), np.random.default_rng(0)
    public = [phrases(e.scene, rng) for e in train_examples(args.captions, PUBLIC_SEED)]
    responses = begun_pictures(pipeline)
    for unit in args.units:
        start, out = time.time(), args.out / LIBRARIES[unit].name
        library = dpx.calibrate(
            pipeline,
            public,
            config(8.0, unit=unit, mechanism="library"),
            epsilons=EPSILONS,
            grouping="phrases",
            expand=args.expand,
            folder=args.codes,
            responses=responses,
        )
        library.save_pretrained(out)
        print(f"{len(library.texts)} phrases in {out}, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
