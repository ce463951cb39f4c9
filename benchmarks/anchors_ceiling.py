"""What stands between `anchors` and the exact prompt at large epsilon: `python benchmarks/anchors_ceiling.py`.

The shipped calibrations of `examples/shapes` for phrases and prompts. FVU of public captions of another seed (combinations that were
fitted to) and of held-out ones (new combinations), when the decoder reads: the exact codes of the units; the codes of their cells, told
right; real releases. The first is the decoder's own limit, the second adds the codebooks', the third the noise's.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from shapes.evaluate import load_pipeline
from shapes.private import CALIBRATIONS, config, prompts
from shapes.scenes import heldout_examples, train_examples

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.objective import Objective, fvu
from hf_dp_xattn.calibration.anchors.simulated import simulate
from hf_dp_xattn.calibration.anchors.slots_fit import PublicContexts
from hf_dp_xattn.calibration.calibration_options import CalibrationOptions
from hf_dp_xattn.hosts.host_registry import kind_of
from hf_dp_xattn.mechanisms.anchors.anchors import prepare_anchors
from hf_dp_xattn.mechanisms.anchors.plan import AnchorPlan, Decoders
from hf_dp_xattn.mechanisms.anchors.sources import AnchorResponse

EPSILONS = (8.0, 16.0, 32.0, 64.0)
OPTIONS = CalibrationOptions(query_prompts=4, query_steps=4)


def codes(
    plan: AnchorPlan, unit: str, decoders: Decoders, contexts: PublicContexts
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each context the exact code and that of the true cells."""
    prepared = prepare_anchors(config(plan.epsilon, unit=unit).replace(unit="row"), [plan], decoders)
    assert isinstance(prepared, AnchorResponse)
    exact, told = [], []
    for units, mask in zip(contexts.units, contexts.mask, strict=True):
        rows = units[mask].float()
        exact.append(prepared.encoder.features(rows).sum(0).float())
        told.append(prepared.code(prepared.exact(rows, None), None).float())
    return exact, told


def measured(
    plan: AnchorPlan, unit: str, decoders: Decoders, contexts: PublicContexts, objective: Objective
) -> dict[str, float]:
    outputs = objective.exact(contexts.whole)
    assert decoders.slots is not None and plan.head is not None

    def of(decoded: Any) -> float:
        return round(fvu(objective.errors(outputs, decoded), outputs.variances), 3)

    exact, told = codes(plan, unit, decoders, contexts)
    found = {}
    for name, read in (("exact codes", exact), ("true cells", told)):
        rows = [decoders.slots.decode(code, plan.head) for code in read]
        found[name] = of([(r.rows, r.log_weights) for r in rows])
    released = simulate(plan, config(plan.epsilon, unit=unit), decoders, contexts, seed=3)
    found["released"] = of([(r.rows, r.log_weights) for r in released])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=150, help="captions of each kind")
    parser.add_argument("--out", type=Path, default=Path("docs/shapes/ceiling.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    pipeline = load_pipeline()
    lines = []
    for unit in ("group", "context"):
        calibration = dpx.Calibration.from_pretrained(CALIBRATIONS / unit)
        known, new = train_examples(args.n, 999), heldout_examples(args.n, 5)
        texts = prompts([*known, *new], unit, 999)
        with kind_of(pipeline).public_data(pipeline, texts, config(8.0, unit=unit), OPTIONS) as data:
            contexts, objective = data.contexts, data.objective
            assert contexts is not None
            for plan in calibration.plans:
                if plan.epsilon in EPSILONS:
                    for name, part in (("known", range(args.n)), ("new", range(args.n, 2 * args.n))):
                        own = contexts.part(torch.tensor(list(part)))
                        found = measured(plan, unit, calibration.decoders, own, objective)
                        lines.append(
                            {
                                "unit": unit,
                                "epsilon": plan.epsilon,
                                "codebooks": list(plan.codes.shape[:2]),
                                "truth": round(plan.noise, 4),
                                "combinations": name,
                                **found,
                            }
                        )
                        print(lines[-1], flush=True)
    args.out.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
