"""Train the chat model from scratch: `python examples/chat/train.py --out DIR`.

A quarter of an hour of one free core; a later call goes on from the last checkpoint.

Every step encodes a few system prompts segment by segment and answers a share of the conversations against each, with short prompts
and many questions for secrets at first (to copy a code out of one segment is what takes longest to learn), long prompts later.
Only behaviours that are not held out are ever seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chat.language import SystemPrompt, Turn, behaviour_turn, draw_prompt, secret_turns
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
    """Ids, targets (the next token where it is a reply's, else -100) and kinds (0 behaviour, 1 secret) of a conversation."""
    words: list[int] = []
    own: list[int] = []
    for question, answer in turns:
        asked = ids(f"<|user|> {question} <|assistant|>")
        said = ids(f"{answer} </s>")
        kind = 0 if "--" in answer else 1
        words += asked + said
        own += [-1] * len(asked) + [kind] * len(said)
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


def train(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    ids, head = Ids(tokenizer), head_ids(tokenizer)
    model = build_model(len(tokenizer)).train()
    optimisers = Optimisers(model, args.lr)
    path, step = args.out / "checkpoint.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        step = state["step"]
        model.load_state_dict(state["model"])
        for part, saved in zip(optimisers.parts, state["optimisers"], strict=True):
            part.load_state_dict(saved)
    begun, smooth = time.time(), np.zeros(4)
    while step < args.steps:
        stage = next(s for s in STAGES if step < s.until * args.steps)
        rng = np.random.default_rng((args.seed, step))
        segments, turns, targets, kinds = batch(stage, ids, rng)
        prefix, mask = encode(model, head, segments)
        losses, right = turn_loss(model, prefix, mask, turns, targets, len(head) + BUCKET)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimisers.step(args.lr * lr_factor(step / args.steps))
        found = [float(x[kinds == k].float().mean()) for k in (0, 1) for x in (losses.detach(), right)]
        smooth = np.array(found) if not smooth.any() else 0.95 * smooth + 0.05 * np.nan_to_num(found)
        step += 1
        if step % args.every == 0 or step == args.steps:
            told = "behaviour {:.4f} {:.3f}, secrets {:.4f} {:.3f}".format(*smooth)
            print(f"{step} {time.time() - begun:.0f} s, loss and right: {told}", flush=True)
            state = {
                "step": step,
                "model": model.state_dict(),
                "optimisers": [o.state_dict() for o in optimisers.parts],
            }
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/chat"))
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50, help="steps between log lines and checkpoints")
    parser.add_argument("--model", type=Path, default=MODEL, help="where the trained model goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model = train(args)
    model.half().save_pretrained(args.model)
    build_tokenizer().save_pretrained(args.model)
    told = {"steps": args.steps, "minutes": round(time.process_time() / 60)}
    (args.model / "training.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
