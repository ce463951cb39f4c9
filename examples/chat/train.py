"""Train the chat model from scratch: `python examples/chat/train.py --out DIR`.

Three quarters of an hour of one free core; a later call goes on from the last checkpoint.

Every step encodes a few system prompts segment by segment and answers a share of the conversations against each, with short prompts
and many questions for secrets at first (to copy a code out of one segment is what takes longest to learn), long prompts later. A second
part, with a fresh optimiser, teaches which of several codes is asked for: the first digit of a reply decides, so its loss weighs more.
Only behaviours that are not held out are ever seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import _muon
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chat.language import SYLLABLES, SystemPrompt, Turn, behaviour_turn, draw_prompt, secret_turns
from chat.parts import BUCKET, MODEL, build_model, build_tokenizer, head_ids
from chat.windows import Packed, encode, turn_loss


@dataclass(frozen=True)
class Stage:
    """until: step at which it ends. segments: least and most of a prompt, log-uniform. secrets: share of turns that ask for one."""

    until: float
    segments: tuple[int, int]
    secrets: float
    tokens: int  # of all system prompts of a step, about
    conversations: int
    codes: int  # most of a prompt
    names: int
    turns: int  # of a conversation, at least


STAGES = (
    Stage(0.35, (3, 4), 0.6, 350, 32, 1, 1, 1),
    Stage(0.60, (3, 16), 0.6, 350, 32, 3, 2, 1),
    Stage(0.80, (4, 60), 0.6, 600, 24, 4, 2, 2),
    Stage(1.00, (6, 200), 0.6, 800, 20, 4, 2, 2),
)
MORE = (
    Stage(0.70, (8, 12), 0.8, 350, 32, 4, 2, 1),
    Stage(1.00, (8, 200), 0.7, 800, 20, 4, 2, 2),
)
DECISIVE = 6.0  # weight of the loss of the first word of a secret's value, in the second part
KINDS = ("behaviour", "secrets", "first word of a value")


@dataclass(frozen=True)
class Part:
    steps: int
    lr: float
    stages: tuple[Stage, ...]
    decisive: float


class Ids:
    """Words to ids without the tokenizer's overhead: one token a word."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.of = tokenizer.get_vocab()

    def __call__(self, text: str) -> list[int]:
        return [self.of[w] for w in text.split()]


def conversation(prompt: SystemPrompt, rng: np.random.Generator, stage: Stage) -> list[Turn]:
    turns: list[Turn] = []
    while len(turns) < stage.turns:
        turns += secret_turns(prompt, rng) if rng.random() < stage.secrets else [behaviour_turn(prompt, rng)]
    return turns


def tokens_of(turns: list[Turn], ids: Ids) -> tuple[list[int], list[int], list[int]]:
    """Ids, targets (the next token where it is a reply's, else -100) and kinds (indices of `KINDS`) of a conversation."""
    words: list[int] = []
    own: list[int] = []
    for question, answer in turns:
        asked = ids(f"<|user|> {question} <|assistant|>")
        said = ids(f"{answer} </s>")
        kinds = [0 if "--" in answer else 1] * len(said)
        value = next((i for i, w in enumerate(answer.split()) if w.isdigit() or w in SYLLABLES), None)
        if kinds[0] == 1 and value is not None:
            kinds[value] = 2
        words += asked + said
        own += [-1] * len(asked) + kinds
    targets = [w if k >= 0 else -100 for w, k in zip(words[1:], own[1:], strict=True)]
    return words[:-1], targets, [k for k in own[1:] if k >= 0]


def batch(
    stage: Stage, ids: Ids, rng: np.random.Generator
) -> tuple[list[list[list[int]]], Packed, Tensor, Tensor]:
    """Segments of some prompts, the conversations (the same number for each), their targets, the kinds of the targets."""
    low, high = stage.segments
    size = round(np.exp(rng.uniform(np.log(low), np.log(high))))
    many = max(1, min(16, stage.tokens // (15 * size)))
    prompts = []
    for _ in range(many):
        codes, names = int(rng.integers(1, stage.codes + 1)), int(rng.integers(1, stage.names + 1))
        if codes + names >= size:
            codes = names = 1
        prompts.append(draw_prompt(rng, size, codes=codes, names=names))
    made = [
        tokens_of(conversation(p, rng, stage), ids)
        for p in prompts
        for _ in range(stage.conversations // many)
    ]
    turns = Packed.of([m[0] for m in made])
    targets = torch.full_like(turns.ids, -100)
    for row, (_, wanted, _) in zip(targets, made, strict=True):
        row[: len(wanted)] = torch.tensor(wanted)
    kinds = torch.tensor([k for m in made for k in m[2]])
    return [[ids(s) for s in p.segments] for p in prompts], turns, targets, kinds


def orthogonal(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's Newton-Schulz iteration, in float32: PyTorch's own in bfloat16 takes 80 % of a step on CPUs without such arithmetic."""
    a, b, c = coefficients
    x = grad.mT if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if grad.shape[0] > grad.shape[1] else x


_muon._zeropower_via_newtonschulz = orthogonal


class Optimisers:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""

    def __init__(self, model: LlamaForCausalLM, lr: float) -> None:
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if all(p is not m for m in matrices)]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)


def lr_factor(done: float) -> float:
    """Warm-up over the first 2 %, flat, then linearly down to 3 % from half way on."""
    return min(1.0, done / 0.02 + 0.01, 0.03 + 0.97 * (1 - done) / 0.5)


def train_part(
    model: LlamaForCausalLM, ids: Ids, head: Tensor, part: Part, seed: tuple[int, int], saved: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Steps of a part from `saved` on; after each, what a checkpoint needs and what was measured."""
    optimisers = Optimisers(model, part.lr)
    step = saved.get("step", 0)
    for optimiser, state in zip(optimisers.parts, saved.get("optimisers", ()), strict=False):
        optimiser.load_state_dict(state)
    weight = torch.tensor([1.0, 1.0, part.decisive])
    while step < part.steps:
        stage = next(s for s in part.stages if step < s.until * part.steps)
        rng = np.random.default_rng((*seed, step))
        segments, turns, targets, kinds = batch(stage, ids, rng)
        prefix, mask = encode(model, head, segments)
        losses, right = turn_loss(model, prefix, mask, turns, targets, len(head) + BUCKET)
        ((losses * weight[kinds]).sum() / weight[kinds].sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimisers.step(part.lr * lr_factor(step / part.steps))
        step += 1
        yield {
            "step": step,
            "found": [float(right[kinds == k].float().mean()) for k in range(len(KINDS))],
            "optimisers": [o.state_dict() for o in optimisers.parts],
        }


def train(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    ids, head = Ids(tokenizer), head_ids(tokenizer)
    model = build_model(len(tokenizer)).train()
    path, first, saved = args.out / "checkpoint.pt", 0, {}
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first = saved["part"]
        model.load_state_dict(saved["model"])
    parts = (Part(args.steps, args.lr, STAGES, 1.0), Part(args.more, args.more_lr, MORE, DECISIVE))
    begun, smooth = time.time(), np.full(len(KINDS), np.nan)
    for i, part in list(enumerate(parts))[first:]:
        for state in train_part(model, ids, head, part, (args.seed, i), saved if i == first else {}):
            smooth = np.where(
                np.isnan(smooth),
                state["found"],
                0.95 * smooth + 0.05 * np.nan_to_num(state["found"], nan=smooth),
            )
            if state["step"] % args.every == 0 or state["step"] == part.steps:
                told = ", ".join(f"{k} {v:.3f}" for k, v in zip(KINDS, smooth, strict=True))
                print(
                    f"part {i + 1}, {state['step']} of {part.steps}, {time.time() - begun:.0f} s, right: {told}",
                    flush=True,
                )
                kept = {
                    "part": i,
                    "step": state["step"],
                    "optimisers": state["optimisers"],
                    "model": model.state_dict(),
                }
                torch.save(kept, path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/chat"))
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--more", type=int, default=4000, help="steps of the second part")
    parser.add_argument("--more-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50, help="steps between log lines and checkpoints")
    parser.add_argument("--model", type=Path, default=MODEL, help="where the trained model goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model = train(args)
    model.half().save_pretrained(args.model)
    build_tokenizer().save_pretrained(args.model)
    told = {"steps": args.steps, "more": args.more}
    (args.model / "training.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
