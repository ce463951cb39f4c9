"""`library` beside other ways at the same epsilon: `python benchmarks/library_neighbours.py --chat MODEL.gguf --out docs/library`.

Private are held-out prompts of 4 to 10 segments. For each way the model reads (or draws from) what that way releases, and its next-token
distributions along the exact replies to the two questions about the role are compared with those under the exact prompt: the share of the
KL of "no system prompt" that is left, 95 % bootstrap interval over prompts. The ways are described in `library_parts/text_neighbours.py`;
`library` itself is measured by `benchmarks/library.py` and `benchmarks/library_shapes.py`, and its numbers of the same prompts and
captions are taken from there; the other ways to captions of `shapes` are in `library_parts/shape_neighbours.py`. What is written is the
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from library_parts import shape_neighbours
from library_parts.replies import QUESTIONS, TOKENS, Replies, divergence
from library_parts.text_neighbours import (
    DELTA,
    PARAPHRASE,
    REDACTED,
    fused,
    paraphrased,
    per_token,
    public_tokens,
    summed,
    top_logit,
)
from prompts.public import prompts
from tqdm.auto import tqdm

ANSWERS = (1, 10, 100)
ASKED = QUESTIONS["about the role"]
NONE, EXACT, LIBRARY = "no system prompt", "exact captions, not private", "library (this package)"
INTRODUCTION = f"""# Other ways at the same epsilon

Written by `python benchmarks/library_neighbours.py`; the numbers are in `neighbours.json`. A segment of a private system prompt is worth
the same epsilon in all of them, but what a guarantee is of differs, and so do its terms:

* *Per-token response* (in the style of SanText): each token of a segment is replaced by one of the public prompts' tokens, near ones in the
  model's embeddings more often, with epsilon / t for each of its t tokens. A phrase of a picture likewise.
* *Paraphrase, clipped logits* (in the style of DP-Prompt): the model paraphrases each segment in {PARAPHRASE} tokens, drawn from clipped
  logits, with epsilon / {PARAPHRASE} for each.
* *DP-Fusion* (`dp-fusion-lib`, run by the benchmark alone; its license is non-commercial): each token of each answer is drawn from a
  mixture of what the model says with and without the private prompt, so that every answer spends. Its unit is the whole prompt, which is
  stronger: for that unit the others spend epsilon for each of the prompt's segments. Its (epsilon, {DELTA:g}) is by its own formula, for
  answers of {TOKENS} tokens.
* *kernel_sum*: this package's; of SmolLM2 without a calibration. *anchors*: this package's, with the calibration that `shapes` ships
  with. It has no number on SmolLM2: it needs a decoder that is trained for the model, and none has been.
* *library*: pure epsilon, one release, any number of answers; measured by `benchmarks/library.py` on the same prompts and questions.

The first two release a text, which may be read any number of times, as `library` does. In `shapes` no language model takes part: there is
nothing to paraphrase with, and no next token to mix.

![share of the KL that is left](neighbours.png)
"""
DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--chat", type=Path, required=True, help="GGUF file or folder of a chat model with ChatML"
    )
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts")
    parser.add_argument("--captions", type=int, default=300, help="held-out captions of shapes")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--out", type=Path, required=True, help="folder for neighbours.json, .md and .png")
    args = parser.parse_args()
    replies = Replies(args.chat)
    path = args.out / "neighbours.json"
    about = {"epsilon": args.epsilon, "delta": DELTA, "questions": list(ASKED)}
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if results.get("setting") != about:
        results = {"setting": about, "kl": {}}
    public = [segment for p in prompts(held_out=False) for segment in p.segments]
    vocabulary, top = public_tokens(replies, public), top_logit(replies, public[:8])
    private = [p for p in prompts(held_out=True) if 4 <= len(p.segments) <= 10][: args.prompts]
    args.out.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(tqdm(private, desc="prompts")):
        if prompt.id not in results["kl"]:
            torch.manual_seed(i)
            results["kl"][prompt.id] = one(replies, list(prompt.segments), args.epsilon, vocabulary, top)
            path.write_text(json.dumps(results, indent=1) + "\n")
            write(results, args.out)
    pictures = results.setdefault("pictures", {}).setdefault(str(args.captions), {})
    for name, measured in shape_neighbours.ways(args.epsilon, args.captions).items():
        if name not in pictures:
            pictures[name] = measured()
            path.write_text(json.dumps(results, indent=1) + "\n")
            write(results, args.out)


def write(results: dict[str, Any], out: Path) -> None:
    shares = summary(with_library(results["kl"], results["setting"]["epsilon"]))
    (out / "neighbours.md").write_text(page(results, shares))
    plot(results, shares, out / "neighbours.png")


def one(
    replies: Replies, segments: list[str], epsilon: float, vocabulary: torch.Tensor, top: float
) -> dict[str, float]:
    """The KL of each way, for one prompt."""
    own = replies.head(" ".join(segments))
    redacted, none = replies.head(REDACTED), replies.head(None)
    responded = replies.head(" ".join(per_token(replies, segments, epsilon, vocabulary)))
    rewritten = replies.head(" ".join(paraphrased(replies, segments, epsilon, top)))
    rows = []
    for question in ASKED:
        said = replies.reply(own, question)
        exact, public = (replies.log_probabilities(head, question, said) for head in (own, redacted))
        found: dict[str, torch.Tensor | None] = {
            NONE: replies.log_probabilities(none, question, said),
            "per-token response": replies.log_probabilities(responded, question, said),
            "paraphrase, clipped logits": replies.log_probabilities(rewritten, question, said),
            "kernel_sum, no calibration": summed(replies, segments, question, said, epsilon),
        }
        for answers in ANSWERS:
            name = f"DP-Fusion, {answers} answer{'s' if answers > 1 else ''}"
            found[name] = fused(exact, public, epsilon, answers)
        rows.append({name: divergence(exact, log)[0] for name, log in found.items() if log is not None})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def summary(kl: dict[str, dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Share of the KL without a system prompt, with its interval, of each way."""
    names = list(next(iter(kl.values())))
    table = np.array([[row[name] for name in names] for row in kl.values()])
    draws = np.random.default_rng(0).integers(len(table), size=(4000, len(table)))
    base = table[:, names.index(NONE)]
    found = {}
    for j, name in enumerate(names):
        shares = table[:, j][draws].mean(1) / base[draws].mean(1)
        low, high = np.percentile(shares, [2.5, 97.5])
        found[name] = (float(table[:, j].mean() / base.mean()), float(low), float(high))
    return found


def with_library(kl: dict[str, dict[str, float]], epsilon: float) -> dict[str, dict[str, float]]:
    """Beside each prompt's ways what `benchmarks/library.py` measured of it, where it did of all of them."""
    rows = json.loads((DOCS / "library" / "replies.json").read_text()).get("rows", {})
    name = f"epsilon {epsilon:g}"
    if not all(name in rows.get(prompt, {}).get("about the role", {}) for prompt in kl):
        return kl
    return {p: {**ways, LIBRARY: rows[p]["about the role"][name][0]} for p, ways in kl.items()}


def against(kl: dict[str, dict[str, float]]) -> list[str]:
    """How far `library` is from the best other way, prompt by prompt."""
    others = {name for row in kl.values() for name in row} - {NONE, LIBRARY}
    if not all(LIBRARY in row for row in kl.values()):
        return []
    table = {n: np.array([row[n] for row in kl.values()]) for n in (NONE, LIBRARY, *others)}
    best = min(others, key=lambda n: table[n].mean())
    draws = np.random.default_rng(0).integers(len(kl), size=(4000, len(kl)))
    found = (table[LIBRARY] - table[best])[draws].mean(1) / table[NONE][draws].mean(1)
    low, high = np.percentile(found, [2.5, 97.5])
    mean = (table[LIBRARY] - table[best]).mean() / table[NONE].mean()
    return [f"On the same prompts `library` less *{best}*: {mean:+.2f} ({low:+.2f} to {high:+.2f})."]


def drawn(results: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Attributes right of `shapes`, each way and what `benchmarks/library_shapes.py` measured of as many captions."""
    measured = json.loads((DOCS / "library" / "shapes.json").read_text())
    captions, epsilon = str(measured["captions"]), results["setting"]["epsilon"]
    ways = dict(results.get("pictures", {}).get(captions, {}))
    for name, key in ((LIBRARY, f"phrases, epsilon {epsilon:g}"), (EXACT, "exact")):
        if ways and key in measured["conditions"]:
            ways[name] = measured["conditions"][key]
    return {name: (w["accuracy"], w["low"], w["high"]) for name, w in ways.items()}


def page(results: dict[str, Any], shares: dict[str, tuple[float, float, float]]) -> str:
    epsilon = results["setting"]["epsilon"]
    lines = [
        INTRODUCTION,
        f"Epsilon {epsilon:g} for each segment, {len(results['kl'])} held-out prompts, two questions about the role; how much of the KL "
        "without a system prompt is left (0: as with the exact prompt, 1: as without any):",
        "",
        "| way | unit | answers | share of the KL left (95 %) |",
        "| --- | --- | --- | --- |",
    ]
    for name, (mean, low, high) in shares.items():
        fusion = name.startswith("DP-Fusion")
        answers = name.split(", ")[1].split()[0] if fusion else "any number"
        unit = "the prompt" if fusion else "-" if name == NONE else "a segment"
        lines.append(
            f"| {name.split(', 1')[0] if fusion else name} | {unit} | {answers} | {mean:.2f} ({low:.2f} to {high:.2f}) |"
        )
    lines += ["", *against(with_library(results["kl"], epsilon))]
    lines += [
        "",
        f"`shapes`, epsilon {epsilon:g} for each phrase, the same held-out captions for all:",
        "",
        "| way | attributes right (95 %) |",
        "| --- | --- |",
    ]
    for name, (mean, low, high) in drawn(results).items():
        lines.append(f"| {name} | {100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f}) |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], shares: dict[str, tuple[float, float, float]], path: Path) -> None:
    epsilon, pictures = results["setting"]["epsilon"], drawn(results)
    rows = max(len(shares), len(pictures))
    figure, axes = plt.subplots(
        1, 2 if pictures else 1, figsize=(13 if pictures else 8, 0.45 * rows + 1.4), squeeze=False
    )
    left = axes[0, 0]
    dots(left, shares)
    left.set_xscale("log")  # noise in keys and values is far worse than nothing
    left.xaxis.set_major_formatter("{x:g}")
    left.axvline(1, color="black", lw=0.8, ls=":")
    left.set_title(f"SmolLM2, system prompts, epsilon {epsilon:g} a segment", size=10)
    left.set_xlabel("share of the KL without a system prompt that is left (less is better)")
    if pictures:
        right = axes[0, 1]
        dots(right, {name: tuple(100 * x for x in found) for name, found in pictures.items()})
        right.set_xlim(0, 105)
        right.set_title(f"shapes, captions, epsilon {epsilon:g} a phrase", size=10)
        right.set_xlabel("attributes right, % (more is better)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def dots(axis: Any, found: dict[str, tuple[float, ...]]) -> None:
    """A row for each way, with its interval."""
    names = list(found)[::-1]
    means = np.array([found[n][0] for n in names])
    reach = np.array([[found[n][0] - found[n][1], found[n][2] - found[n][0]] for n in names]).T
    colours = ["#009E73" if n == LIBRARY else "#999999" if n in (NONE, EXACT) else "#0072B2" for n in names]
    axis.errorbar(means, names, xerr=reach.clip(0), fmt="none", ecolor="black", capsize=3, lw=1)
    axis.scatter(means, names, c=colours, s=60, zorder=3)
    for name, mean in zip(names, means, strict=True):
        axis.annotate(
            f"{mean:.3g}", (mean, name), xytext=(0, 7), textcoords="offset points", ha="center", size=8
        )
    axis.set_ylim(-0.6, len(names) - 0.3)
    axis.grid(axis="x", which="both", alpha=0.3)


if __name__ == "__main__":
    main()
