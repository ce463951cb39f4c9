"""How long a library and a release take: `python benchmarks/library_times.py --chat MODEL.gguf --out docs/library`.

A library of --sentences public sentences for a chat model, with codes by the model's own states, and releases of prompts of 20 sentences
that no earlier release holds (the first one sets up what is set up once). Wall time on as many threads as torch takes, and CPU time of
the process: on a machine that does nothing else the first is the second over the threads, at best.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
import torch
from library_parts.replies import Replies
from prompts.public import prompts
from transformers import pipeline

import hf_dp_xattn as dpx

T = TypeVar("T")
LENGTH, EPSILONS = 20, (4.0, 8.0, 16.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--chat", type=Path, required=True, help="GGUF file or folder of a chat model with ChatML"
    )
    parser.add_argument("--sentences", type=int, default=10_000, help="public sentences")
    parser.add_argument("--releases", type=int, default=20, help="prompts of 20 sentences that are timed")
    parser.add_argument("--out", type=Path, required=True, help="folder for times.json and times.md")
    args = parser.parse_args()
    replies = Replies(args.chat)
    chat = pipeline("text-generation", model=replies.model, tokenizer=replies.tokenizer)
    public = sentences(args.sentences)
    config = dpx.DPXAttnConfig(mechanism="library", epsilon=8.0, unit="group")

    def library() -> Any:
        return dpx.calibrate(chat, public, config, epsilons=EPSILONS, grouping="sentences", progress=False)

    load, (made, seconds, cpu) = os.getloadavg()[0], timed(library)
    protected = dpx.protect(chat, config, calibration=made, ledger=dpx.Ledger())
    found = [
        timed(lambda i=i: protected.release("\n".join(private(i))))[1:]  # type: ignore[misc]
        for i in range(args.releases + 1)
    ]
    walls = [wall for wall, _ in found[1:]]
    results = {
        "threads": torch.get_num_threads(),
        "load_at_start": round(load, 1),
        "sentences": len(made.texts),
        "epsilons": list(EPSILONS),
        "library_seconds": round(seconds),
        "library_cpu_seconds": round(cpu),
        "releases": args.releases,
        "first_release_seconds": round(found[0][0], 2),
        "release_seconds": [round(float(q), 2) for q in np.quantile(walls, (0.5, 0.9, 1.0))],
        "release_cpu_seconds": round(float(np.median([c for _, c in found[1:]])), 2),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "times.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "times.md").write_text(page(results))
    print(page(results))


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    """What it gives, and its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    return made, time.perf_counter() - wall, time.process_time() - cpu


def sentences(count: int) -> list[list[str]]:
    """The shipped prompts, up to so many distinct sentences."""
    found: list[list[str]] = []
    seen: set[str] = set()
    for held_out in (False, True):
        for prompt in prompts(held_out=held_out):
            if len(seen | set(prompt.segments)) <= count:
                found.append(list(prompt.segments))
                seen |= set(prompt.segments)
    return found


def private(number: int) -> list[str]:
    return [
        f"Rule {number}.{i}: answer questions of kind {number + i} in {i + 3} short lines."
        for i in range(LENGTH)
    ]


def page(results: dict[str, Any]) -> str:
    median, tenth, most = results["release_seconds"]
    return (
        "| what | seconds | of CPU |\n| --- | --- | --- |\n"
        f"| a library of {results['sentences']:,} sentences, by SmolLM2's own states, with {len(results['epsilons'])} plans | "
        f"{results['library_seconds']} | {results['library_cpu_seconds']} |\n"
        f"| the first release of a prompt of {LENGTH} sentences | {results['first_release_seconds']} | |\n"
        f"| a later one, median of {results['releases']} (90 %: {tenth}, longest: {most}) | {median} | "
        f"{results['release_cpu_seconds']} |\n\n"
        f"{results['threads']} thread(s); load of the machine at the start: {results['load_at_start']}.\n"
    )


if __name__ == "__main__":
    main()
