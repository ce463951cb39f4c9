"""Says of the calibrations of `anchors` that the examples ship what they are worth: `python examples/shipped_worth.py` (some minutes).

They were made before calibrations said so, and hours went into some. Fresh public contexts, of a seed that nothing was fitted to, are
released and compared with the public mean (`calibration/anchors/appraise.py`); what a release is decoded to stays as it is, bit for bit.
Made again, the files are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.calibration.anchors.appraise import appraise
from hf_dp_xattn.calibration.calibration_options import CalibrationOptions
from hf_dp_xattn.hosts.host_registry import kind_of

EXAMPLES = Path(__file__).resolve().parent
CARD = "README.md"
SEED = 4242
OPTIONS = CalibrationOptions(query_prompts=8, query_steps=4, memory_mb=4096)


def shapes(unit: str) -> tuple[Any, Any, CalibrationOptions]:
    """Host, fresh public contexts, and how they are read."""
    from shapes.evaluate import load_pipeline
    from shapes.private import prompts
    from shapes.scenes import train_examples

    return load_pipeline(), prompts(train_examples(300, SEED), unit, SEED), OPTIONS


def chat(unit: str) -> tuple[Any, Any, CalibrationOptions]:
    from chat.calibrate import public_prompts, questions
    from chat.parts import BUCKET, head_ids
    from chat.private import load_model, segment_ids

    model, tokenizer = load_model()
    made = public_prompts(120, SEED)
    options = dataclasses.replace(
        OPTIONS,
        query_steps=16,
        public_head=head_ids(tokenizer),
        prefix_bucket=BUCKET,
        questions=[tokenizer(q, add_special_tokens=False)["input_ids"] for q in questions(made, SEED)],
        replies=2,
    )
    return model, [segment_ids(p, tokenizer) for p in made], options


def rag(documents: int) -> tuple[Any, Any, CalibrationOptions]:
    from rag.calibrate import public_corpora, questions
    from rag.model import load_model

    corpora = [torch.from_numpy(c.documents) for c in public_corpora(documents, 80, SEED)]
    public = [{"input_ids": d, "attention_mask": (d != 0).long()} for d in corpora]
    options = dataclasses.replace(
        OPTIONS, questions=questions(), query_prompts=24, query_steps=1, queries_per_step=64
    )
    return load_model()[0], public, options


SHIPPED = {
    **{f"shapes/calibrations/{u}": (shapes, u) for u in ("row", "group", "context")},
    **{f"chat/calibrations/{u}": (chat, u) for u in ("row", "group")},
    **{f"rag/calibrations/anchors-group-{n}": (rag, n) for n in (64, 256, 1024)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SHIPPED, action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=EXAMPLES, help="folder of the examples")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in args.only or SHIPPED:
        make, what = SHIPPED[name]
        carded = (EXAMPLES / name / CARD).exists()
        calibration = dpx.Calibration.from_pretrained(EXAMPLES / name)
        assert isinstance(calibration, AnchorCalibration)
        plans = tuple(dataclasses.replace(p, worth=None) for p in calibration.plans)
        decoders = dataclasses.replace(calibration.decoders, fallback=None)
        plain = dataclasses.replace(calibration, plans=plans, decoders=decoders)
        config = dpx.DPXAttnConfig(
            mechanism="anchors", unit=plain.unit, neighboring=plain.neighboring, epsilon=8.0
        )
        host, public, options = make(what)  # type: ignore[operator]
        with (
            torch.no_grad(),
            kind_of(host).public_data(host, public, config, options) as data,
            torch.enable_grad(),
        ):
            found = appraise(plain, config, data)
        found.save_pretrained(args.out / name)
        if not carded:  # its card is elsewhere, in model_cards/
            (args.out / name / CARD).unlink()
        told = ", ".join(
            f"{p.epsilon:g}: {p.worth.ratio:.3f} (<= {p.worth.high:.3f})" for p in found.plans if p.worth
        )
        print(f"{name}: {found.plans[0].worth.measure} beside the fall-back {told}", flush=True)  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
