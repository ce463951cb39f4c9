"""Builds the library of `assistant/library`: `python examples/assistant/make_library.py` (about 3 minutes on two quiet cores).

Public data only: sentences of those system prompts that are shipped with the package (CC0) and tell an assistant what to be. Nothing is
trained; codes are SmolLM2's own states, and which texts may answer at each epsilon is chosen by prompts that are held out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from assistant.smollm import load_chat

LIBRARY = Path(__file__).with_name("library")
EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0)
BEGINNINGS = ("i want you to act as", "act as", "you are")
LONGEST = 10  # sentences of a prompt


def public_prompts() -> list[list[str]]:
    """Prompts in sentences: short ones that begin with a role."""
    return [p for p in dpx.public_prompts() if p[0].lower().startswith(BEGINNINGS) and len(p) <= LONGEST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=LIBRARY)
    parser.add_argument("--model", help="Hub id or folder of another chat model")
    parser.add_argument(
        "--codes", type=Path, help="folder that keeps codes: a run that was broken off goes on"
    )
    args = parser.parse_args()
    config = dpx.DPXAttnConfig(mechanism="library", epsilon=8.0, unit="group")
    library = dpx.calibrate(
        load_chat(args.model),
        public_prompts(),
        config,
        epsilons=EPSILONS,
        grouping="sentences",
        folder=args.codes,
    )
    library.save_pretrained(args.out)
    print(f"{len(library.texts)} public sentences in {args.out}")
    for plan in library.plans:
        found = plan.quality
        print(
            f"epsilon {plan.epsilon:g}: distortion {found.distortion:.3f} ({found.low:.3f} to {found.high:.3f})"
        )


if __name__ == "__main__":
    main()
