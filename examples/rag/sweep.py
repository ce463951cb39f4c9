"""Answers and extraction against epsilon, size, unit and mechanism: `python examples/rag/sweep.py --out docs/rag` (about 15 minutes).

Lines without a calibration at hand stay as they are: `python examples/rag/calibrate.py` makes those that are not shipped. Every
private corpus is released once for each line; then all facts are asked for in all forms, and some of its records are attacked.
Writes results.json, and from it the tables, plots and docs/rag.md (`--page-only` for these alone).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from hf_dp_xattn.privacy.guessing import guess_bound
from rag.attacks import ATTACKS, RELEASE_ATTACKS, ReleaseAttacker, ask_records, run_attacks
from rag.calibrate import EPSILONS, folder_of
from rag.corpus import Corpus, draw_corpus
from rag.model import load_model
from rag.page import write_page
from rag.private import CALIBRATIONS, DELTA, Reader, config, fact_accuracy, released

SEED = 2024
# (mechanism, unit, documents): private corpora, records attacked in each
JOBS: dict[tuple[str, str, int], tuple[int, int]] = {
    ("anchors", "group", 64): (10, 8),
    ("anchors", "group", 256): (6, 16),
    ("anchors", "group", 1024): (3, 32),
    ("anchors", "row", 256): (4, 16),
    ("kernel_sum", "group", 256): (2, 16),
    ("kernel_sum", "row", 256): (2, 16),
}


def corpora_of(n: int, count: int) -> list[Corpus]:
    """Private corpora; the same ones for all mechanisms and epsilons."""
    rng = np.random.default_rng((SEED, n))
    return [draw_corpus(n, rng, public=False) for _ in range(count)]


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over corpora [N, ...]."""
    rng = np.random.default_rng(0)
    means = values.reshape(len(values), -1).mean(1)
    picked = means[rng.integers(0, len(means), (draws, len(means)))].mean(1)
    return float(np.quantile(picked, 0.025)), float(np.quantile(picked, 0.975))


def line(
    mechanism: str, unit: str, epsilon: float, corpora: Sequence[Corpus], k: int, model: Any, calibration: Any
) -> dict[str, Any]:
    """One release of each corpus; epsilon = inf: the unprotected model."""
    facts: list[np.ndarray] = []
    won: dict[str, list[np.ndarray]] = {}
    for i, corpus in enumerate(corpora):
        rng = np.random.default_rng((SEED, len(corpus), i))
        asked = ask_records(corpus, k, rng)
        if np.isinf(epsilon):
            reader = Reader(model, documents=torch.from_numpy(corpus.documents))
            facts.append(fact_accuracy(reader, corpus))
            found = run_attacks(reader, corpus, asked, rng)
        else:
            settings = config(epsilon, unit=unit, mechanism=mechanism)
            with released(model, corpus, settings, calibration) as behind:
                facts.append(fact_accuracy(behind.reader, corpus))
                found = run_attacks(behind.reader, corpus, asked, rng)
            if mechanism == "anchors":
                attacker = ReleaseAttacker(model, corpus, settings, calibration)
                found |= {name: attacker.run(asked, count, rng) for name, count in RELEASE_ATTACKS}
        for name, successes in found.items():
            won.setdefault(name, []).append(successes)
    values = np.stack(facts)
    low, high = interval(values)
    return {
        "mechanism": mechanism,
        "unit": unit,
        "documents": len(corpora[0]),
        "rows": round(float(np.mean([(c.documents != 0).sum() for c in corpora]))),
        "epsilon": None if np.isinf(epsilon) else epsilon,
        "accuracy": float(values.mean()),
        "low": low,
        "high": high,
        "corpora": len(corpora),
        "trials": int(sum(len(w) for w in next(iter(won.values())))),
        "extraction": {name: float(np.concatenate(w).mean()) for name, w in won.items()},
    }


def bounds(epsilon: float | None) -> dict[str, float]:
    """What (epsilon, delta) allows each attack on one unit."""
    priors = {a.name: a.prior for a in ATTACKS} | {name: 1 / count for name, count in RELEASE_ATTACKS}
    return {n: 1.0 if epsilon is None else guess_bound(epsilon, DELTA, p) for n, p in priors.items()}


def measure(model: Any, only: Sequence[str] | None, path: Path) -> dict[str, Any]:
    """All lines; written after each job, so that an interrupted run keeps what it has."""
    kept = json.loads(path.read_text())["lines"] if path.exists() else []
    lines: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for (mechanism, unit, n), (count, k) in JOBS.items():
        name = folder_of(mechanism, unit, n)
        if (only and name not in only) or not (CALIBRATIONS / name).exists():
            continue
        calibration = dpx.Calibration.from_pretrained(CALIBRATIONS / name)
        corpora = corpora_of(n, count)
        start = time.perf_counter()
        for epsilon in tqdm((*EPSILONS, np.inf), desc=name, disable=None):
            lines.append(line(mechanism, unit, epsilon, corpora, k, model, calibration))
        new = {(x["mechanism"], x["unit"], x["documents"]) for x in lines}
        old = [x for x in kept if (x["mechanism"], x["unit"], x["documents"]) not in new]
        order = list(JOBS)
        everything = sorted(
            old + lines, key=lambda x: order.index((x["mechanism"], x["unit"], x["documents"]))
        )
        summary = {
            "delta": DELTA,
            "seed": SEED,
            "bounds": [{"epsilon": e, **bounds(e)} for e in EPSILONS],
            "lines": everything,
        }
        path.write_text(json.dumps(summary, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/rag"))
    parser.add_argument(
        "--only", action="append", help="MECHANISM-UNIT-DOCUMENTS; other lines of --out are kept"
    )
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page anew")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    if not args.page_only:
        measure(load_model()[0], args.only, path)
    write_page(json.loads(path.read_text()), args.out)


if __name__ == "__main__":
    main()
