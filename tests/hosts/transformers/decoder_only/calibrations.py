"""Calibrations of `anchors` for the tiny models, without a fit: random public codebooks, maps and slots."""

from __future__ import annotations

from typing import Any

import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration, HostIdentity
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_layers import prefix_fingerprint
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_probing import find_layers
from hf_dp_xattn.mechanisms.anchors.plan import AnchorPlan, Decoders, Quality
from hf_dp_xattn.mechanisms.anchors.slots import SlotDecoder, SlotHead

CODE, HIDDEN, SLOTS, DIRECTIONS = 4, 6, 5, 3
GROUPING = {"row": "rows", "group": "segments", "context": "context"}


def calibration_for(model: Any, unit: str) -> AnchorCalibration:
    gen = torch.Generator().manual_seed(11)
    layers = find_layers(model)
    channels = next(iter(layers.values())).channels
    sketch = prefix_fingerprint(model, layers)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    head = SlotHead(draw(HIDDEN, CODE), draw(HIDDEN), draw(HIDDEN), draw(CODE), draw(CODE), torch.tensor(2.0))
    slots = SlotDecoder(
        draw(HIDDEN, HIDDEN),
        draw(SLOTS, DIRECTIONS, HIDDEN + CODE),
        draw(DIRECTIONS, channels),
        draw(SLOTS, channels),
        draw(SLOTS, HIDDEN + CODE) * 0.1,
        draw(SLOTS),
    )
    plan = AnchorPlan(
        epsilon=8.0,
        release="sum",
        center=torch.zeros(channels),
        reach=torch.full((channels,), 8.0),
        matrix=draw(CODE, channels) * 0.2,
        bias=torch.zeros(CODE),
        codes=torch.zeros(0, 0, CODE),
        bound=1.0,
        share_plus=0.5,
        noise=0.5,
        head=head,
        tilt=None,
        quality=Quality(0.5, 0.4, 0.6, 10),
    )
    calibration = AnchorCalibration(
        unit=unit,
        neighboring="replace_one",
        grouping=GROUPING[unit],
        channels=channels,
        contexts=100,
        units=15,
        settings={},
        host=HostIdentity(sketch.layers, sketch.sketch, sketch.dtype, torch.zeros(0, channels)),
        plans=(plan,),
        decoders=Decoders(slots, None),
    )
    calibration.verify()
    return calibration


def protect(model: Any, config: dpx.DPXAttnConfig, **arguments: Any) -> Any:
    """`dpx.protect`, with a calibration where the mechanism needs one."""
    if config.mechanism == "anchors":
        arguments.setdefault("calibration", calibration_for(model, config.unit))
    return dpx.protect(model, config, **arguments)
