"""Behaviour accuracy: `python examples/chat/evaluate.py` measures the unprotected model on held-out behaviours."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from chat.attacks import ATTACKS, CODES, Tally, attack
from chat.card import write_card
from chat.language import ENDINGS, SystemPrompt, behaviour_turn, draw_prompt
from chat.parts import MODEL
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
    return [draw_prompt(rng, segments, codes=CODES, names=2, held_out=True) for _ in range(count)]


QUESTIONS = 8


def measure(model: Any, tokenizer: Any, prompts: list[SystemPrompt], seed: int) -> dict[str, Any]:
    """The unprotected model's numbers, and its shape."""
    found, tallies = [], {name: Tally() for name in ATTACKS}
    with dpx.protect(model, config(EXACT)) as protected:
        for i, prompt in enumerate(prompts):
            responder, rng = (
                PromptResponder.of(protected, tokenizer, prompt),
                np.random.default_rng((seed, i)),
            )
            found.append(behaviour(responder, prompt, rng, QUESTIONS))
            for name in ATTACKS:
                tallies[name] += attack(name, responder, prompt, rng)
    shape = model.config
    return {
        "prompts": len(prompts),
        "segments": len(prompts[0].segments),
        "rows": round(float(np.mean([p.rows for p in prompts]))),
        "asked": QUESTIONS,
        "whole": 100 * float(np.mean([b.whole for b in found])),
        "parts": 100 * float(np.mean([b.factors for b in found])),
        "extraction": {n: [t.hits, t.trials] for n, t in tallies.items()},
        "words": len(tokenizer),
        "parameters": model.num_parameters() / 1e6,
        "layers": shape.num_hidden_layers,
        "width": shape.hidden_size,
        "heads": shape.num_attention_heads,
        "kv": shape.num_key_value_heads,
        "size": shape.head_dim,
        "megabytes": sum(f.stat().st_size for f in MODEL.iterdir()) / 1e6,
        **json.loads((MODEL / "training.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=4, help="system prompts")
    parser.add_argument("--segments", type=int, default=150)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument(
        "--card", action="store_true", help="write docs/chat/evaluation.json and model_cards/chat.md"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model()
    numbers = measure(model, tokenizer, test_prompts(args.n, args.segments, args.seed), args.seed)
    text = json.dumps(numbers, indent=1) + "\n"
    print(text)
    if args.card:
        root = Path(__file__).resolve().parents[2]
        (root / "docs/chat").mkdir(parents=True, exist_ok=True)
        (root / "docs/chat/evaluation.json").write_text(text)
        write_card(numbers, root / "model_cards/chat.md")


if __name__ == "__main__":
    main()
