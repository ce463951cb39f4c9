"""Public images of one number of tiles, for a Mllama."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ....calibration.calibration_options import CalibrationOptions
from ....calibration.public_data import PublicData, choose_contexts
from ....config import DPXAttnConfig
from ....errors import ConfigError
from ..encoder_decoder.public_documents import rows_data, starts_of
from .image_contexts import RATIO_MASK, STATES, gather
from .mllama_probing import context_channels, find_layers, run_text
from .vision import VisionSide

ENCODER_BATCH = 4
NEEDS = (
    "public_contexts of a Mllama are what its image processor gives, images of one number of tiles in one batch (as many as the private "
    "ones have; calibrate for each number), or rows of its projected vision output [N, n, C]."
)


@contextmanager
def public_images(
    model: Any, public: Any, config: DPXAttnConfig, options: CalibrationOptions
) -> Iterator[PublicData]:
    """What public images give. See `hosts.calibrate.calibrate`; queries are those of texts that are sampled about some of them."""
    if config.unit == "group":
        raise ConfigError("A calibration of a Mllama is for unit='row' or 'context'.")
    with torch.no_grad():
        layers = find_layers(model)
        starts = starts_of(model, options.questions)
        data = rows_data(model, layers, _encode(model, public, options), starts, config, options, run_text)
    yield data


def _encode(model: Any, public: Any, options: CalibrationOptions) -> torch.Tensor:
    """[N, n, C] float16: rows of public images without padding tiles, encoded in batches (their rounding may depend on each other: they
    are public)."""
    vision = VisionSide(model)
    inputs = gather(public)
    vision.check(inputs)
    if STATES in inputs:
        rows = inputs[STATES]
        if rows.ndim != 3 or not bool(torch.isfinite(rows).all()):
            raise ConfigError(NEEDS)
        chosen = choose_contexts(rows, 2 * rows[0].numel(), options.memory_mb, options.seed)
        return torch.stack(chosen).to("cpu", torch.float16)
    shown = inputs[RATIO_MASK].flatten(1).to("cpu", torch.bool)
    tiles = set(shown.sum(1).tolist())
    if len(tiles) != 1:
        raise ConfigError(NEEDS)
    each = 2 * tiles.pop() * vision.patches * context_channels(model)
    order = torch.stack(choose_contexts(torch.arange(len(shown)), each, options.memory_mb, options.seed))

    def encode(index: torch.Tensor) -> torch.Tensor:
        states = vision.encode_batch({name: value[index.to(value.device)] for name, value in inputs.items()})
        kept = shown[index].repeat_interleave(vision.patches, dim=1).to(states.device)
        return states[kept].view(len(index), -1, states.shape[-1]).to("cpu", torch.float16)

    return torch.cat(
        list(options.kept.each(order.split(ENCODER_BATCH), "encoding", encode, options.progress))
    )
