"""Score the shapes pipeline on held-out captions: `python examples/shapes/evaluate.py --json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.reader import Reader, Score, load_reader, score
from shapes.scenes import IMAGE_SIZE, Example, heldout_examples, train_examples

PIPELINE_PATH = Path(__file__).parent / "pipeline"
STEPS = 16
GUIDANCE = 3.0


def load_pipeline(path: str | Path = PIPELINE_PATH) -> StableDiffusionPipeline:
    """The trained pipeline in float32 (it is stored in half precision); loads and draws without progress bars."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(str(path), local_files_only=True)
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: StableDiffusionPipeline,
    captions: list[str],
    *,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 50,
    numbers: Sequence[int] | None = None,
) -> np.ndarray:
    """Pictures of the captions, float [n, 32, 32, 3] in 0..1; the i-th always has the same noise (of its number, where there are some)."""
    images: list[np.ndarray] = []
    numbers = range(len(captions)) if numbers is None else numbers
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        generators = [
            torch.Generator().manual_seed(seed * 1_000_003 + i) for i in numbers[start : start + batch]
        ]
        result = pipeline(
            part,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        )
        images.append(result.images)
    return np.concatenate(images) if images else np.zeros((0, IMAGE_SIZE, IMAGE_SIZE, 3))


def evaluate_pipeline(
    path: str | Path = PIPELINE_PATH,
    *,
    n: int = 300,
    seed: int = 7,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    heldout: bool = True,
    reader: Reader | None = None,
) -> Score:
    """The score of ``n`` generated pictures, held-out captions unless told otherwise."""
    examples: list[Example] = (heldout_examples if heldout else train_examples)(n, seed)
    pipeline = load_pipeline(path)
    images = generate(pipeline, [e.caption for e in examples], seed=seed, steps=steps, guidance=guidance)
    return score(images, [e.scene for e in examples], reader or load_reader())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE_PATH)
    parser.add_argument("-n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--train", action="store_true", help="captions of training combinations instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result = evaluate_pipeline(
        args.pipeline,
        n=args.n,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        heldout=not args.train,
    )
    summary = {
        "captions": args.n,
        "heldout": not args.train,
        "steps": args.steps,
        "guidance": args.guidance,
        "accuracy": result.accuracy,
        **result.by_kind,
        "exact": result.exact,
        "extra": result.extra,
    }
    if args.json:
        print(json.dumps(summary))
    else:
        for key, value in summary.items():
            print(f"{key:>12}  {value:.4f}" if isinstance(value, float) else f"{key:>12}  {value}")


if __name__ == "__main__":
    main()
