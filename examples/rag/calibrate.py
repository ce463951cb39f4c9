"""Builds the calibrations of the Fusion-in-Decoder model: `python examples/rag/calibrate.py` (about 15 minutes on one core).

Public corpora only: no pair of facts that a private corpus has, records of a public pool. Priors are counts of documents, so a
calibration serves corpora of about the size that it was made from: one for each size of the sweep.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from rag.corpus import ATTRIBUTES, FACT_QUESTIONS, Corpus, draw_corpus, fact_questions
from rag.model import encode, load_model
from rag.private import CALIBRATIONS, config

EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0)
PUBLIC_SEED = 77
POOL = 2048  # public records, which public corpora share
# (mechanism, unit, documents): (public corpora, training steps: no release here needs any)
JOBS: dict[tuple[str, str, int], tuple[int, int]] = {
    ("anchors", "group", 256): (600, 0),
    ("anchors", "group", 1024): (240, 0),
    ("anchors", "group", 64): (1200, 0),
    ("kernel_sum", "group", 256): (96, 0),
    ("kernel_sum", "row", 256): (96, 0),
    ("anchors", "row", 256): (96, 0),
}


def folder_of(mechanism: str, unit: str, documents: int) -> str:
    return f"{mechanism}-{unit}-{documents}"


def public_corpora(n: int, count: int, seed: int = PUBLIC_SEED) -> list[Corpus]:
    """Public corpora of n documents; their records come from one public pool, so that few documents are to be encoded."""
    rng = np.random.default_rng(seed)
    pool = draw_corpus(POOL, rng, fact_share=0.0)
    found = []
    for _ in range(count):
        corpus = draw_corpus(n, rng, agree=rng.uniform(0.5, 0.8))
        corpus.documents[corpus.record_rows] = pool.documents[rng.integers(0, POOL, len(corpus.record_rows))]
        found.append(corpus)
    return found


def questions() -> list[np.ndarray]:
    """What users are expected to ask: all forms, about all attributes."""
    forms, attributes = np.meshgrid(np.arange(len(FACT_QUESTIONS)), np.arange(len(ATTRIBUTES)))
    ids = fact_questions(attributes.ravel(), forms.ravel())
    return [row[row != 0] for row in ids]


@torch.no_grad()
def public_rows(model: Any, corpora: list[Corpus]) -> torch.Tensor:
    """[N, n, C] float16: for unit = row, all corpora cut to the rows of the shortest."""
    rows = []
    for corpus in tqdm(corpora, desc="encoding", disable=None, leave=False):
        states, mask = encode(model, torch.from_numpy(corpus.documents))
        rows.append(states[mask].half())
    shortest = min(len(r) for r in rows)
    return torch.stack([r[:shortest] for r in rows])


def fit(model: Any, mechanism: str, unit: str, n: int, count: int, steps: int, rank: int = 64) -> Any:
    """A calibration from `count` public corpora of n documents."""
    corpora = public_corpora(n, count)
    if unit == "group":
        documents = [torch.from_numpy(c.documents) for c in corpora]
        public: Any = [{"input_ids": d, "attention_mask": (d != 0).long()} for d in documents]
    else:
        public = public_rows(model, corpora)
    return dpx.calibrate(
        model,
        public,
        config(8.0, unit=unit, mechanism=mechanism),
        epsilons=EPSILONS,
        releases=("histogram",),
        anchors=1024,
        steps=steps,
        rank=rank,
        questions=questions(),
        query_prompts=24,
        query_steps=1,
        queries_per_step=384,
        progress=sys.stderr.isatty(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="MECHANISM-UNIT-DOCUMENTS; default: all")
    parser.add_argument("--out", type=Path, default=CALIBRATIONS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    model, _ = load_model()
    for (mechanism, unit, n), (count, steps) in JOBS.items():
        name = folder_of(mechanism, unit, n)
        if args.only and name not in args.only:
            continue
        start = time.perf_counter()
        calibration = fit(model, mechanism, unit, n, count, steps)
        calibration.save_pretrained(args.out / name)
        found = (
            [(p.epsilon, p.release, round(p.quality.fvu, 3)) for p in calibration.plans]
            if mechanism == "anchors"
            else [(p.epsilon, round(p.predicted_fvu, 3)) for p in calibration.plans]
        )
        print(f"{name}: {time.perf_counter() - start:.0f} s, FVU {found}", flush=True)


if __name__ == "__main__":
    main()
