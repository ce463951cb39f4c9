"""Public statistics of a Mllama's cross-attention, from public images of one number of tiles."""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm

from ...calibration.anchors.anchors_calibration import AnchorCalibration
from ...calibration.anchors.anchors_fit import candidates
from ...calibration.calibration import Calibration
from ...calibration.calibration_options import CalibrationOptions
from ...config import DPXAttnConfig
from ...errors import ConfigError
from ..access import Access
from ..public_prompts import choose_contexts
from ..seq2seq.public_documents import fit_rows, sample_queries, starts_of
from .contexts import RATIO_MASK, STATES, gather
from .probing import context_channels, find_layers, run_text
from .vision import VisionSide

ENCODER_BATCH = 4
NEEDS = (
    "public_contexts of a Mllama are what its image processor gives, images of one number of tiles in one batch (as many as the private "
    "ones have; calibrate for each number), or rows of its projected vision output [N, n, C]."
)


@torch.no_grad()
def calibrate_image_text(
    model: Any, public_contexts: Any, config: DPXAttnConfig, options: CalibrationOptions
) -> Calibration | AnchorCalibration:
    """See `hosts.calibrate.calibrate`. Queries are those of public texts about `query_prompts` public images: one of `questions` (token
    ids), and `query_steps` sampled tokens after it."""
    if config.unit == "group":
        raise ConfigError("A calibration of a Mllama is for unit='row' or 'context'.")
    if config.mechanism == "anchors":
        candidates(config, options.anchor_settings())  # refuses what cannot be before minutes are spent on it
    layers = find_layers(model)
    starts = starts_of(model, options.questions)
    whole = _encode(model, public_contexts, options.memory_mb, options.seed, options.progress)
    count, sampled, wanted = options.queries_of_texts()
    shown = list(whole[:count])
    queries = sample_queries(model, layers, shown, starts, sampled, wanted, options.seed, run_text)
    return fit_rows(model, layers, whole, queries, config, options)


def _encode(model: Any, public: Any, memory_mb: int, seed: int, progress: bool) -> torch.Tensor:
    """[N, n, C] float16: rows of public images without padding tiles, encoded in batches (their rounding may depend on each other: they
    are public)."""
    vision = VisionSide(model, Access())
    inputs = gather(public)
    vision.check(inputs)
    if STATES in inputs:
        rows = inputs[STATES]
        if rows.ndim != 3 or not bool(torch.isfinite(rows).all()):
            raise ConfigError(NEEDS)
        chosen = choose_contexts(rows, 2 * rows[0].numel(), memory_mb, seed)
        return torch.stack(chosen).to("cpu", torch.float16)
    shown = inputs[RATIO_MASK].flatten(1).to("cpu", torch.bool)
    tiles = set(shown.sum(1).tolist())
    if len(tiles) != 1:
        raise ConfigError(NEEDS)
    each = 2 * tiles.pop() * vision.patches * context_channels(model)
    order = torch.stack(choose_contexts(torch.arange(len(shown)), each, memory_mb, seed))
    parts = []
    for index in tqdm(order.split(ENCODER_BATCH), desc="encoding", disable=not progress, leave=False):
        states = vision.encode_batch({name: value[index.to(value.device)] for name, value in inputs.items()})
        kept = shown[index].repeat_interleave(vision.patches, dim=1).to(states.device)
        parts.append(states[kept].view(len(index), -1, states.shape[-1]).to("cpu", torch.float16))
    return torch.cat(parts)
