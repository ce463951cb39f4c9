"""Train the Fusion-in-Decoder model from scratch: `python examples/rag/train.py --out DIR` (about half an hour on one core).

Public corpora only. They start with 4 documents and double whenever the model answers 9 of 10 questions about records; the last ones
have 2,048. A run is resumed from DIR/state.pt; at the end (or with --export) DIR/model is the model in half precision with its tokenizer.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rag.corpus import (
    CODE_GROUPS,
    FACT_QUESTIONS,
    FACT_SHARE,
    NUMBER_IDS,
    RECORD_QUESTIONS,
    VALUE_IDS,
    Corpus,
    draw_corpus,
    fact_questions,
    record_questions,
)
from rag.model import build_model, build_tokenizer, decode_shared, encode

SMALLEST, LARGEST = 4, 2048
DOCUMENTS = 128  # encoded with gradients in each step; the others of a large corpus are encoded without
QUESTIONS = 64
ADVANCE = 0.9
WORDS_LOSS = 0.3


def questions(corpus: Corpus, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """k questions, one half about facts: decoder inputs and targets [k, m], -100 where nothing is asked, and the records asked for."""
    asked = rng.integers(0, len(corpus.records), k - k // 2)
    attributes = rng.choice(np.flatnonzero(corpus.counts), k // 2)
    record_ids = record_questions(corpus.records[asked], rng.integers(0, len(RECORD_QUESTIONS), len(asked)))
    fact_ids = fact_questions(attributes, rng.integers(0, len(FACT_QUESTIONS), len(attributes)))
    ids = np.concatenate([record_ids, fact_ids])
    room = CODE_GROUPS + 2
    inputs = np.zeros((k, ids.shape[1] + room), dtype=np.int64)
    inputs[:, 1 : ids.shape[1] + 1] = ids  # after the start token, which is the padding token
    targets = np.full_like(inputs, -100)
    start = (ids != 0).sum(1)
    answers = np.full((k, CODE_GROUPS), -100)
    answers[: len(asked)] = NUMBER_IDS[np.arange(CODE_GROUPS), corpus.records[asked][:, 2:]]
    answers[len(asked) :, 0] = VALUE_IDS[attributes, corpus.facts[attributes]]
    for j in range(CODE_GROUPS):
        rows = np.flatnonzero(answers[:, j] != -100)
        targets[rows, start[rows] + j] = answers[rows, j]
        inputs[rows, start[rows] + 1 + j] = answers[rows, j]
    length = (answers != -100).sum(1)
    targets[np.arange(k), start + length] = 1
    return inputs, targets, asked


def encode_partly(model: Any, documents: Tensor, wanted: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Rows [n, L, C]; gradients flow through the wanted documents and some others, at most `DOCUMENTS`."""
    if len(documents) <= DOCUMENTS:
        return encode(model, documents)[0]
    chosen = np.concatenate([np.unique(wanted), rng.permutation(len(documents))])
    chosen = chosen[np.sort(np.unique(chosen, return_index=True)[1])][:DOCUMENTS]
    with torch.no_grad():
        rows, _ = encode(model, documents)
    return rows.index_put((torch.from_numpy(chosen),), encode(model, documents[torch.from_numpy(chosen)])[0])


def words_loss(model: Any, rows: Tensor, documents: Tensor) -> Tensor:
    """Every row of a document is to tell all its words: what is asked (a name) and its answer stand in different rows."""
    mask = documents != 0
    logits = (rows * model.config.d_model**-0.5) @ model.shared.weight.mT
    chances = logits.log_softmax(-1).mul(mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    return -(chances.gather(1, documents) * mask).sum() / mask.sum()


def loss_of(model: Any, n: int, rng: np.random.Generator) -> tuple[Tensor, float, float]:
    """The loss of one step, and the shares of records' numbers and facts that were right."""
    batch = min(16, max(1, DOCUMENTS // n))
    share = FACT_SHARE if n >= 64 else 0.5
    corpora = [draw_corpus(n, rng, fact_share=share, agree=rng.uniform(0.55, 0.8)) for _ in range(batch)]
    each = max(4, (QUESTIONS if n < 512 else QUESTIONS // 2) // batch)
    asked = [questions(c, each, rng) for c in corpora]
    documents = torch.from_numpy(np.concatenate([c.documents for c in corpora]))
    rows = encode_partly(model, documents, corpora[0].record_rows[asked[0][2]], rng)
    words = words_loss(model, rows, documents)
    rows = rows.view(batch, -1, rows.shape[-1])
    mask = (documents != 0).view(batch, -1)
    inputs = torch.from_numpy(np.stack([a[0] for a in asked]))
    targets = torch.from_numpy(np.stack([a[1] for a in asked]))
    logits = decode_shared(model, rows, mask, inputs)
    kept = targets != -100
    loss = F.cross_entropy(logits[kept], targets[kept]) + WORDS_LOSS * words
    right = (logits.argmax(-1) == targets) & (targets > 1)
    half = each - each // 2
    records = right[:, :half].sum() / (targets[:, :half] > 1).sum()
    facts = right[:, half:].sum() / (targets[:, half:] > 1).sum()
    return loss, float(records), float(facts)


def factor(step: int, steps: int) -> float:
    """Linear warm-up, then level, then down to 2 % over the last third."""
    down = (step - 2 * steps / 3) / (steps / 3)
    return min(1.0, (step + 1) / 200) * (1.0 if down < 0 else 0.02 + 0.49 * (1 + math.cos(math.pi * down)))


@torch.no_grad()
def look_for_same_words(model: Any) -> None:
    """A start from which a word of the question attends to the same word in the documents; from chance alone it takes long to be found."""
    for block in model.decoder.block:
        attention = block.layer[1].EncDecAttention
        attention.k.weight.copy_(attention.q.weight * (attention.k.weight.std() / attention.q.weight.std()))


def save(state: object, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def export(model: Any, folder: Path) -> None:
    tokenizer = build_tokenizer()
    half = build_model()
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/rag"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", action="store_true", help="only write DIR/model from DIR/state.pt")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = build_model()
    look_for_same_words(model)
    # T5's queries start small and are not scaled: at the others' rate attention is saturated within a few dozen steps
    names = dict(model.named_parameters())
    slow = [p for n, p in names.items() if n.endswith("q.weight")]
    fast = [p for n, p in names.items() if not n.endswith("q.weight")]
    groups = [{"params": fast, "rate": args.lr}, {"params": slow, "rate": args.lr / 16}]
    optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    path = args.out / "state.pt"
    step, n, score = 0, SMALLEST, [0.0, 0.0, 0.0]
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, n, score = state["step"], state["n"], state["score"]
    began = time.perf_counter()
    while step < args.steps and not args.export:
        rng = np.random.default_rng((args.seed, step))
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * factor(step, args.steps)
        # every fourth step goes back to a smaller corpus: answers must not depend on the size
        size = n if step % 4 else max(SMALLEST, n // 4)
        loss, records, facts = loss_of(model, size, rng)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if size == n:
            now = (float(loss.detach()), records, facts)
            score = [0.93 * s + 0.07 * v for s, v in zip(score, now, strict=True)]
        if step % 50 == 0 or step == args.steps:
            print(
                f"step {step}, {time.perf_counter() - began:.0f} s, n = {n}: loss {score[0]:.3f}, "
                f"records {score[1]:.3f}, facts {score[2]:.3f}",
                flush=True,
            )
            if score[1] > ADVANCE and n < LARGEST:
                n, score[1] = 2 * n, 0.0
        if step % 250 == 0 or step == args.steps:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            save({**state, "step": step, "n": n, "score": score}, path)
    export(model, args.out / "model")


if __name__ == "__main__":
    main()
