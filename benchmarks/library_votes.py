"""From how many units on votes beat answers: `python benchmarks/library_votes.py --codes FOLDER --out docs/library`.

Lists of n held-out segments of the shipped prompts (whole prompts one after the other), released once as answers and once as votes; the
library is made of the other prompts. A list is judged by the best matching between its segments and the released texts: mean
1 - cosine in the library's own metric, 0 where all stand in it word for word. *Prior*: the votes' public shares alone, nothing private.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from library_parts.vote_lists import EPSILONS, curves
from prompts.public import prompts
from transformers import AutoModel, AutoTokenizer

from hf_dp_xattn.hosts.text.unit_encoders import unit_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a sentence encoder")
    parser.add_argument("--out", type=Path, required=True, help="folder for votes.json and votes.md")
    parser.add_argument("--codes", type=Path, help="folder that keeps codes")
    parser.add_argument("--lists", type=int, default=5, help="held-out lists of a size, at most")
    args = parser.parse_args()
    parts = AutoModel.from_pretrained(args.encoder).eval(), AutoTokenizer.from_pretrained(args.encoder)
    encode = unit_encoder(parts[0], parts[1], encoder=parts)
    public = [list(p.segments) for p in prompts(held_out=False)]
    private = [list(p.segments) for p in prompts(held_out=True)]
    results = curves(public, private, encode, args.codes, args.lists)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "votes.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "votes.md").write_text(page(results))
    print(page(results))


def page(results: dict[str, Any]) -> str:
    lines = [
        "# Votes and answers",
        "",
        "Written by `python benchmarks/library_votes.py`; the numbers are in `votes.json`. The order of a list is not judged: votes lose "
        "it, answers keep it. *Prior*: what the votes' public shares alone would release.",
        "",
        f"Lists of n held-out segments (of {results['segments']}, of {results['prompts']} prompts), {results['lists']} lists of a size at "
        "most: mean 1 - cosine under the best matching.",
        "",
        "| epsilon | n | prior | answers | votes | texts voted for | votes, no noise |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def cell(found: list[float]) -> str:
        return f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"

    for row in results["rows"]:
        lines.append(
            f"| {row['epsilon']:g} | {row['n']} | {row['prior'][0]:.3f} | {cell(row['answers'])} | {cell(row['votes'])} | {row['texts']} | "
            f"{row['exact'][0]:.3f} |"
        )
    firsts = []
    for epsilon in EPSILONS:
        better = [
            r["n"] for r in results["rows"] if r["epsilon"] == epsilon and r["votes"][0] < r["answers"][0]
        ]
        firsts.append(f"epsilon {epsilon:g}: " + (f"n = {min(better)}" if better else "none of these n"))
    lines += ["", "Votes are better from there on: " + "; ".join(firsts) + "."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
