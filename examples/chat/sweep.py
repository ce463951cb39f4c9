"""Behaviour and extraction against epsilon and n: `python examples/chat/sweep.py --out docs/chat`.

System prompts of held-out behaviours, each released once per epsilon, unit and size; every release answers honest questions, and those
of the first prompts stand every attack on each of their four codes. Writes the numbers (results.json), the tables of docs/chat.md and two
plots.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_dp_xattn as dpx
from chat.attacks import ATTACKS, Tally, attack
from chat.evaluate import behaviour, test_prompts
from chat.language import SystemPrompt
from chat.private import CALIBRATIONS, DELTA, EXACT, UNITS, PromptResponder, config, load_model
from chat.tables import write_page

EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0)
SIZES = (12, 40, 150)
TEST_SEED = 11


def keep_rows(protected: Any, known: dict[bytes, torch.Tensor]) -> None:
    """Segments are encoded once for all epsilons: what is released does not change, only the time it takes."""
    run = protected.host.encoder.run

    def kept(ids: torch.Tensor) -> torch.Tensor:
        key = ids.numpy().tobytes()
        if key not in known:
            known[key] = run(ids)
        return known[key]

    protected.host.encoder.run = kept


def measure(
    model: Any,
    tokenizer: Any,
    prompts: list[SystemPrompt],
    unit: str,
    epsilon: float,
    known: dict[bytes, torch.Tensor],
    attacked: int,
) -> dict[str, Any]:
    """One line of the results: all prompts, one release each; the first `attacked` of them stand the attacks."""
    calibration = None if epsilon == EXACT else dpx.Calibration.from_pretrained(CALIBRATIONS / unit)
    tallies = {name: Tally() for name in ATTACKS}
    whole, parts = [], []
    torch.manual_seed(TEST_SEED)  # of sampled replies; releases draw their noise from the system
    # the prompts are drawn at random and public, and released at each epsilon: no account of the process's is due
    with dpx.protect(
        model,
        config(epsilon, unit),
        calibration=calibration,
        ledger=dpx.Ledger(),
        allow_useless=True,  # a study shows what is not worth it too
    ) as protected:
        keep_rows(protected, known)
        for i, prompt in enumerate(prompts):
            responder = PromptResponder.of(protected, tokenizer, prompt)
            rng = np.random.default_rng((TEST_SEED, i))
            found = behaviour(responder, prompt, rng)
            whole.append(found.whole)
            parts.append(found.factors)
            for name in ATTACKS if i < attacked else ():
                tallies[name] += attack(name, responder, prompt, rng)
    return {
        "unit": "none" if epsilon == EXACT else unit,
        "epsilon": None if epsilon == EXACT else epsilon,
        "segments": len(prompts[0].segments),
        "rows": round(float(np.mean([p.rows for p in prompts]))),
        "prompts": len(prompts),
        "replies_right": whole,
        "parts_right": parts,
        "extraction": {name: [t.hits, t.trials] for name, t in tallies.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=24, help="system prompts of every size")
    parser.add_argument("--attacked", type=int, default=8, help="how many of them stand the attacks")
    parser.add_argument("--out", type=Path, default=Path("docs/chat"))
    parser.add_argument(
        "--tables-only", action="store_true", help="write pages from the numbers that are there"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.json"
    if not args.tables_only:
        model, tokenizer = load_model()
        units = [u for u in UNITS if (CALIBRATIONS / u).exists()]
        lines = []
        for size in sorted(SIZES, reverse=True):
            prompts, known = test_prompts(args.n, size, TEST_SEED), {}
            cells = [("group", EXACT), *((u, e) for u in units for e in EPSILONS)]
            for unit, epsilon in tqdm(cells, desc=f"{size} segments"):
                lines.append(measure(model, tokenizer, prompts, unit, epsilon, known, args.attacked))
                results.write_text(json.dumps({"delta": DELTA, "lines": lines}, indent=1) + "\n")
    write_page(json.loads(results.read_text()), args.out)


if __name__ == "__main__":
    main()
