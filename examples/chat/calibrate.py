"""Builds the calibrations that the chat model ships with: `python examples/chat/calibrate.py` (half an hour for a unit on a free core).

Public data only: system prompts of behaviours that are not held out, with public secrets of their own, in sizes from a dozen segments
to the longest; questions of the kinds that users ask. unit = "group": a segment is a group; "row": its rows are units by themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from chat.language import SystemPrompt, behaviour_turn, draw_prompt, secret_turns
from chat.parts import BUCKET, head_ids
from chat.private import CALIBRATIONS, UNITS, Conversation, config, load_model, segment_ids

EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0)
LONGEST = 150  # segments; some 2,200 rows
PUBLIC_SEED = 1
# prompts, steps; a step over rows takes several times as long
EFFORT = {"group": (1500, 4000), "row": (600, 1200)}


def public_prompts(count: int, seed: int = PUBLIC_SEED) -> list[SystemPrompt]:
    """Half of them of the longest size, the others shorter (log-uniform)."""
    rng = np.random.default_rng(seed)
    prompts = []
    for i in range(count):
        size = LONGEST if i % 2 else round(np.exp(rng.uniform(np.log(12), np.log(LONGEST))))
        codes, names = int(rng.integers(1, 5)), int(rng.integers(1, 3))
        prompts.append(draw_prompt(rng, size, codes=codes, names=names))
    return prompts


def questions(prompts: list[SystemPrompt], seed: int = PUBLIC_SEED) -> list[str]:
    """One question behind each prompt; one in four asks for a secret."""
    rng = np.random.default_rng(seed)
    turns = [secret_turns(p, rng)[0] if i % 4 == 3 else behaviour_turn(p, rng) for i, p in enumerate(prompts)]
    return [Conversation(q).text() for q, _ in turns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unit", choices=UNITS, action="append", help="default: group")
    parser.add_argument("--prompts", type=int, help="public system prompts (default: 1500, or 600 for rows)")
    parser.add_argument("--steps", type=int, help="training steps of the decoder (default: 4000, or 1200)")
    parser.add_argument("--out", type=Path, default=CALIBRATIONS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    model, tokenizer = load_model()
    for unit in args.unit or ("group",):
        count, steps = EFFORT[unit]
        prompts = public_prompts(args.prompts or count)
        asked = [tokenizer(q, add_special_tokens=False)["input_ids"] for q in questions(prompts)]
        calibration = dpx.calibrate(
            model,
            [segment_ids(p, tokenizer) for p in prompts],
            config(8.0, unit),
            epsilons=EPSILONS,
            releases=("sum",),
            steps=args.steps or steps,
            memory_mb=6000,
            query_prompts=48,
            query_steps=16,
            public_head=head_ids(tokenizer),
            prefix_bucket=BUCKET,
            questions=asked,
            replies=4,
        )
        calibration.save_pretrained(args.out / unit)
        print(f"unit = {unit}: {json.dumps(calibration.settings['candidates'])}")


if __name__ == "__main__":
    main()
