"""Calibrations of `anchors` for the tiny models, without a fit: random public codebooks and counts."""

from __future__ import annotations

from typing import Any

import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.hosts.identity import host_identity
from hf_dp_xattn.hosts.transformers.encoder_decoder.cross_probing import find_layers
from hf_dp_xattn.mechanisms.anchors.cells import CellDecoder
from hf_dp_xattn.mechanisms.anchors.plan import AnchorPlan, Decoders, Quality

CELLS, CODE = 24, 4


def calibration_for(model: Any, layers: dict[str, Any] | None = None) -> AnchorCalibration:
    """layers: as the host's own probe finds them, where it is no encoder-decoder model."""
    gen = torch.Generator().manual_seed(11)
    layers = dict(find_layers(model)) if layers is None else layers
    channels = next(iter(layers.values())).channels

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    prior = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log().repeat(CELLS, 1)
    cells = CellDecoder(draw(CELLS, 1, channels), torch.arange(CELLS) % 3, torch.arange(5.0), prior, rows=8)
    plan = AnchorPlan(
        epsilon=8.0,
        release="histogram",
        center=torch.zeros(channels),
        reach=torch.full((channels,), 4.0),
        matrix=draw(CODE, channels) * 0.2,
        bias=torch.zeros(CODE),
        codes=draw(1, CELLS, CODE),
        bound=1.0,
        share_plus=0.75,
        noise=0.5,
        head=None,
        tilt=None,
        quality=Quality(0.5, 0.4, 0.6, 10),
    )
    return AnchorCalibration(
        unit="row",
        neighboring="replace_one",
        grouping="rows",
        channels=channels,
        contexts=100,
        units=15,
        settings={},
        host=host_identity(layers.values(), model.dtype, None),
        plans=(plan,),
        decoders=Decoders(None, cells),
    )


def protect(model: Any, config: dpx.DPXAttnConfig, **arguments: Any) -> Any:
    """`dpx.protect`, with a calibration where the mechanism needs one."""
    if config.mechanism == "anchors":
        arguments.setdefault("calibration", calibration_for(model))
    return dpx.protect(model, config, **arguments)
