"""Builds the library of phrases that the shapes pipeline ships with: `python examples/shapes/phrase_library.py` (minutes on two cores).

Public data only: the phrases of training captions, which share no (colour, shape, place) with the held-out ones, and new phrases in which
words that stand in the same public phrases take each other's place. It answers phrase by phrase (unit = group). Nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from shapes.evaluate import load_pipeline
from shapes.private import PUBLIC_SEED, config
from shapes.scenes import phrases, train_examples

LIBRARY = Path(__file__).with_name("library")
EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=LIBRARY)
    parser.add_argument("--captions", type=int, default=2000, help="public captions")
    parser.add_argument("--expand", type=int, default=6000, help="new phrases by recombination, at most")
    parser.add_argument(
        "--codes", type=Path, help="folder that keeps codes: a run that was broken off goes on"
    )
    args = parser.parse_args()
    pipeline, rng = load_pipeline(), np.random.default_rng(0)
    public = [phrases(e.scene, rng) for e in train_examples(args.captions, PUBLIC_SEED)]
    library = dpx.calibrate(
        pipeline,
        public,
        config(8.0, unit="group", mechanism="library"),
        epsilons=EPSILONS,
        grouping="phrases",
        expand=args.expand,
        folder=args.codes,
    )
    library.save_pretrained(args.out)
    print(f"{len(library.texts)} phrases in {args.out}")


if __name__ == "__main__":
    main()
