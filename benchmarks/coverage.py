"""How often the intervals that calibrations of `anchors` predict hold what is then measured: `python benchmarks/coverage.py --out FILE`.

Five settings on the hosts that ship: `shapes` by row, phrase and prompt, system prompts of `chat` in segments, corpora of `rag` in
documents. For each split some whole kinds of public contexts (clusters) are put away, a calibration is fitted to the rest, and its releases
of what was put away are measured, of contexts of known kinds and of those of unseen ones apart. Nominal: 95 %. Fits are short (`--steps`):
intervals are asked for here, not quality. A run that was broken off is taken up again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_fit import AnchorSettings, fit_anchors, simulate
from hf_dp_xattn.calibration.anchors.held_out import HeldOut, hold_out
from hf_dp_xattn.calibration.anchors.objective import fvu
from hf_dp_xattn.calibration.anchors.slots_fit import SlotSettings
from hf_dp_xattn.calibration.calibration_options import CalibrationOptions
from hf_dp_xattn.calibration.public_data import PublicData
from hf_dp_xattn.hosts.host_registry import kind_of

EPSILONS = (2.0, 8.0, 32.0)
SETTINGS = ("shapes-row", "shapes-group", "shapes-context", "chat-group", "rag-group")
OPTIONS = CalibrationOptions(query_prompts=4, query_steps=4)


@contextlib.contextmanager
def public_data(name: str, count: int) -> Iterator[tuple[PublicData, dpx.DPXAttnConfig]]:
    """The public contexts of a setting, as its host gives them.

    Args:
        name: of `SETTINGS`.
        count: public contexts.
    """
    example, unit = name.split("-")
    config = dpx.DPXAttnConfig(mechanism="anchors", unit=unit)
    options = OPTIONS
    if example == "shapes":
        from shapes.evaluate import load_pipeline
        from shapes.private import prompts
        from shapes.scenes import train_examples

        host, public = load_pipeline(), prompts(train_examples(count, 1), unit, 1)
    elif example == "chat":
        from chat.calibrate import public_prompts, questions
        from chat.parts import BUCKET, head_ids
        from chat.private import load_model, segment_ids

        host, tokenizer = load_model()
        made = public_prompts(count)
        asked = [tokenizer(q, add_special_tokens=False)["input_ids"] for q in questions(made)]
        options = dataclasses.replace(
            options, public_head=head_ids(tokenizer), prefix_bucket=BUCKET, questions=asked
        )
        public = [segment_ids(p, tokenizer) for p in made]
    else:
        from rag.calibrate import public_corpora
        from rag.calibrate import questions as rag_questions
        from rag.model import load_model as load_reader

        host, _ = load_reader()
        documents = [torch.from_numpy(c.documents) for c in public_corpora(64, count)]
        public = [{"input_ids": d, "attention_mask": (d != 0).long()} for d in documents]
        options = dataclasses.replace(options, questions=rag_questions(), query_steps=1)
    with kind_of(host).public_data(host, public, config, options) as data:
        yield data, config


def covered(
    data: PublicData, config: dpx.DPXAttnConfig, apart: HeldOut, steps: int, seed: int
) -> list[dict[str, Any]]:
    """One split: what each plan predicted, and what was measured on the contexts that were put away."""
    slots = SlotSettings(steps=steps, batch=24, seed=seed)
    settings = AnchorSettings(epsilons=EPSILONS, anchors=256, tilt_steps=50, slots=slots, seed=seed)
    releases = ("histogram",) if data.documents is not None else ("sum", "response")
    known = dataclasses.replace(data, contexts=apart.training)
    with torch.enable_grad():
        calibration = fit_anchors(config, known, dataclasses.replace(settings, releases=releases))
    fresh = apart.validation
    # variances about the mean of contexts like the public ones, as in the prediction
    exact = data.objective.exact(fresh.whole, outputs=fresh.outputs, usual=~apart.unlike)
    found = []
    for plan in calibration.plans:
        decoded = simulate(plan, config, calibration.decoders, fresh, seed=seed + 7)
        errors = data.objective.errors(exact, [(c.rows, c.log_weights) for c in decoded])
        quality = plan.quality
        for unlike in (False, True):
            own = apart.unlike == unlike
            measured = fvu(errors[own], exact.variances[own])
            found.append(
                {
                    "epsilon": plan.epsilon,
                    "unseen kinds": unlike,
                    "contexts": int(own.sum()),
                    "predicted": quality.fvu,
                    "low": quality.low,
                    "high": quality.high,
                    "measured": measured,
                    "held": quality.low <= measured <= quality.high,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SETTINGS, action="append", help="default: all")
    parser.add_argument("--contexts", type=int, default=600, help="public contexts of each setting")
    parser.add_argument("--splits", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each decoder")
    parser.add_argument("--out", type=Path, default=Path("out/coverage.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    lines: list[dict[str, Any]] = json.loads(args.out.read_text())["lines"] if args.out.exists() else []
    done = {(x["setting"], x["split"]) for x in lines}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only or SETTINGS:
        with public_data(name, args.contexts) as (data, config):
            assert data.contexts is not None
            for split in range(args.splits):
                if (name, split) in done:
                    continue
                apart = hold_out(data.contexts, 100, seed=1000 + split)
                own = covered(data, config, apart, args.steps, split)
                lines += [{"setting": name, "split": split, **x} for x in own]
                args.out.write_text(json.dumps({"lines": lines, "coverage": coverage(lines)}, indent=2))
                print(name, split, [x["held"] for x in own], flush=True)
    print(json.dumps(coverage(lines), indent=2))


def coverage(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the intervals that held, by setting and by whether the kinds were seen, and of all."""
    groups: dict[str, list[bool]] = {"all": []}
    for x in lines:
        kinds = "unseen kinds" if x["unseen kinds"] else "known kinds"
        for key in (x["setting"], kinds, "all"):
            groups.setdefault(key, []).append(x["held"])
    return {key: sum(held) / len(held) for key, held in groups.items() if held}


if __name__ == "__main__":
    main()
