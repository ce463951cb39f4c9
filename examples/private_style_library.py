"""A private style library next to public prompts: what a house's look adds to everybody's words, and what is told about it.

    python examples/private_style_library.py            # under a minute; pictures and report in out/style_library

A studio has a *look*: phrases that no customer may read ("blue background", "a small yellow star at the bottom"). Customers bring prompts
of their own, which are PUBLIC here. The look is encoded phrase by phrase and released once, unit = group: one phrase of it is what a
guarantee covers. Then `pipe(**release.inputs(prompt="a large red circle on the left"))` lets every cross-attention layer attend to the
released rows and to the exact rows of the customer's words under one softmax. The exact phrases never reach the UNet, however many
pictures are drawn.

The look also GROWS: `protected.release(first, horizon=8)` opens a release that takes up to seven more appends. Each phrase is charged once,
when it enters: its answer is its own, and nothing is added to what the others have spent.

What this does not cover: the customer's words; that the phrases stand together, how many there are and when each came; and what the
guarantee's epsilon allows to be told. The pictures SHOW the look, which is what they are for: at epsilon = 16 an observer may well name
the background. To hide a phrase that few could guess, ask the planner for the bound first, and take a smaller epsilon.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import numpy as np
import torch
from shapes.evaluate import GUIDANCE, STEPS, load_pipeline
from shapes.private import DELTA, config, load_calibration
from shapes.reader import describe, load_reader
from shapes.scenes import IMAGE_SIZE
from shapes.tables import draw_strip

import hf_dp_xattn as dpx
from hf_dp_xattn.records import decode_text, records_of

LOOK = ("blue background", "a small yellow star at the bottom")
PUBLIC = (
    "a large red circle on the left",
    "a large green square at the top",
    "a small white cross in the centre",
)
HORIZON = 8  # appends, the first one included; fixed at the start, for what a release costs must not depend on what comes


def draw(pipe: Any, prompts: Sequence[str | None], release: dpx.Release | None = None) -> np.ndarray:
    """One picture [32, 32, 3] for each prompt, always from the same noise: of its words alone, or beside the release (None: no words)."""
    pictures = []
    for prompt in prompts:
        inputs = {"prompt": prompt} if release is None else release.inputs(prompt=prompt)
        result = pipe(
            **inputs,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
        )
        pictures.append(result.images[0])
    return np.stack(pictures)


def with_look(pipe: Any, public: Sequence[str], release: dpx.Release) -> np.ndarray:
    """The customers' pictures with the look, and the look without words."""
    return draw(pipe, [*public, None], release)


def seen(pictures: np.ndarray, reader: Any) -> list[str]:
    """What an attribute reader sees, in words."""
    return [
        f"{scene.background} background; "
        + (", ".join(f"{o.size} {o.colour} {o.shape} {o.place}" for o in scene.objects) or "nothing on it")
        for scene in describe(pictures, reader)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/style_library"))
    parser.add_argument("--epsilon", type=float, default=16.0, help="of one phrase of the look (default 16)")
    parser.add_argument(
        "--look",
        type=Path,
        help=f"file with one private phrase a line, at most {HORIZON}, in the words of shapes; a file, since "
        "shells and process tables keep arguments",
    )
    parser.add_argument(
        "--public", action="append", help="a customer's prompt; may be repeated (default: three of them)"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    look = list(LOOK) if args.look is None else records_of(decode_text(args.look.read_bytes()))
    public = args.public or list(PUBLIC)

    pipe, reader, calibration = load_pipeline(), load_reader(), load_calibration("group")
    plan = dpx.plan(calibration, epsilon=args.epsilon, delta=DELTA, measure=False)
    [point] = plan.points
    print(f"Before anything is spent, at epsilon = {args.epsilon:g} for one phrase:")
    print(f"  what leaves: {point.meaning}")
    for prior, bound in point.guesses:
        print(
            f"  who guesses a phrase with probability {prior:g} before does with at most {math.ceil(1000 * bound) / 1000:g} after"
        )

    rows = [("words alone\n(public)", draw(pipe, public))]
    with dpx.protect(pipe, config(args.epsilon, unit="group"), calibration=calibration) as protected:
        release = protected.release(look[:1], groups="phrases", horizon=HORIZON)  # charged to this phrase
        rows.append(("+ look,\n1 phrase", with_look(pipe, public, release)))
        for phrase in look[1:]:
            release.append([phrase], groups="phrases")  # charged to that one
        if len(look) > 1:
            rows.append((f"+ look,\n{len(look)} phrases", with_look(pipe, public, release)))
        report = protected.report()
    exact = [f"{prompt}, {', '.join(look)}" for prompt in public]
    rows.append(("exact look\n(not private)", draw(pipe, exact)))

    print("\nWhat an attribute reader sees in the pictures:")
    for i, prompt in enumerate(public):
        print(f'  customer: "{prompt}"')
        for title, pictures in rows:
            print(f"    {title.replace(chr(10), ' '):<26} {seen(pictures[i : i + 1], reader)[0]}")

    words = [textwrap.fill(prompt, 18) for prompt in public]
    strips = [(rows[0][0], list(zip(words, rows[0][1], strict=True)))]
    for title, pictures in rows[1:]:
        labels = [*("" for _ in public), "the look alone"]
        strips.append((title, list(zip(labels, pictures, strict=False))))
    draw_strip(strips, "; ".join(look), args.out / "style_library.png")
    (args.out / "report.txt").write_text(f"{report}\n")
    print(f"\n{report}\n\nPictures and report: {args.out.resolve()}")


if __name__ == "__main__":
    main()
