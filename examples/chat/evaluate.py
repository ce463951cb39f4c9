"""Behaviour accuracy: `python examples/chat/evaluate.py` measures the unprotected model on held-out behaviours."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from chat.attacks import ATTACKS, Tally, attack
from chat.language import ENDINGS, FACTORS, SystemPrompt, behaviour_turn, draw_prompt
from chat.private import EXACT, Conversation, PromptResponder, Responder, config, load_model


@dataclass(frozen=True)
class Behaviour:
    """Shares of right factors (the marker words of a reply; language and style by its list of things) and of replies right in full."""

    factors: float
    whole: float


def factor_words(reply: str) -> list[str]:
    """opening, address, list, ending, signature of a reply; what does not parse is empty."""
    start, _, rest = reply.partition(" , ")
    body, _, signature = rest.partition(" -- ")
    words, listed = start.split(), body.split()
    ending = listed[-1] if listed and listed[-1] in ENDINGS.values() else ""
    opening, address = (words[0], " ".join(words[1:])) if words else ("", "")
    return [opening, address, " ".join(listed[:-1] if ending else listed), ending, signature]


def behaviour(
    responder: Responder, prompt: SystemPrompt, rng: np.random.Generator, questions: int = 8
) -> Behaviour:
    """Of one system prompt, over questions that do not tell the behaviour."""
    turns = [behaviour_turn(prompt, rng) for _ in range(questions)]
    replies = responder.reply([Conversation(q) for q, _ in turns])
    right = [
        [a == b for a, b in zip(factor_words(said), factor_words(wanted), strict=True)]
        for said, (_, wanted) in zip(replies, turns, strict=True)
    ]
    return Behaviour(float(np.mean(right)), float(np.mean([all(r) for r in right])))


def test_prompts(count: int, segments: int, seed: int) -> list[SystemPrompt]:
    """Held-out behaviours, four codes and two names each."""
    rng = np.random.default_rng(seed)
    return [draw_prompt(rng, segments, codes=4, names=2, held_out=True) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=20, help="system prompts")
    parser.add_argument("--segments", type=int, default=160)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer = load_model()
    found, tallies = [], {name: Tally() for name in ATTACKS}
    with dpx.protect(model, config(EXACT)) as protected:
        for prompt in test_prompts(args.n, args.segments, args.seed):
            responder = PromptResponder.of(protected, tokenizer, prompt)
            rng = np.random.default_rng(args.seed)
            found.append(behaviour(responder, prompt, rng))
            for name in ATTACKS:
                tallies[name] += attack(name, responder, prompt, rng)
    print(
        json.dumps(
            {
                "prompts": args.n,
                "segments": args.segments,
                "factors": [len(v) for v in FACTORS.values()],
                "parts_right": round(float(np.mean([b.factors for b in found])), 4),
                "replies_right": round(float(np.mean([b.whole for b in found])), 4),
                "extraction": {n: [t.hits, t.trials] for n, t in tallies.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
