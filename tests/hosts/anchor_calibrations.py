"""Calibrations of `anchors` for the tiny pipelines, made by hand: random public encoders, codebooks and decoders."""

from __future__ import annotations

from typing import Any

import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.calibration import AnchorCalibration
from hf_dp_xattn.hosts.access import Access
from hf_dp_xattn.hosts.architectures import find_layers
from hf_dp_xattn.hosts.identity import host_identity
from hf_dp_xattn.hosts.text import TextSide
from hf_dp_xattn.mechanisms.anchors.cells import CellDecoder
from hf_dp_xattn.mechanisms.anchors.plan import AnchorPlan, Decoders, Quality
from hf_dp_xattn.mechanisms.anchors.slots import SlotDecoder, SlotHead

RELEASES = ("sum", "response", "histogram")
CODE, HIDDEN, SLOTS, CELLS = 4, 8, 10, 24
CONFIG = dpx.DPXAttnConfig(mechanism="anchors", epsilon=8.0, delta=1e-5)


def calibration_for(host: Any, release: str = "sum", **changes: Any) -> AnchorCalibration:
    """A calibration with one plan (epsilon 8). changes: fields of it."""
    gen = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    unet = getattr(host, "unet", host)
    text = TextSide(host, Access()) if hasattr(host, "unet") else None
    channels = unet.config.cross_attention_dim
    cells = release == "histogram"
    plan = AnchorPlan(
        epsilon=8.0,
        release=release,
        center=torch.zeros(channels),
        reach=torch.full((channels,), 4.0),
        matrix=draw(CODE, channels) * 0.2,
        bias=torch.zeros(CODE),
        codes=draw(0 if release == "sum" else CELLS, CODE),
        bound=1.0,
        share_plus=0.75 if cells else 0.5,
        noise=0.5,
        head=None
        if cells
        else SlotHead(draw(HIDDEN, CODE), draw(HIDDEN), draw(HIDDEN), torch.zeros(CODE), torch.tensor(2.0)),
        tilt=None,
        quality=Quality(0.5, 0.4, 0.6, 10),
    )
    decoders = Decoders(
        slots=None
        if cells
        else SlotDecoder(
            draw(HIDDEN, HIDDEN) * 0.3,
            draw(SLOTS, CODE, HIDDEN) * 0.3,
            draw(CODE, channels),
            draw(SLOTS, channels),
            draw(SLOTS, HIDDEN) * 0.1,
            draw(SLOTS) + 1.0,
        ),
        cells=CellDecoder(
            draw(CELLS, 1, channels),
            torch.arange(CELLS) % 3,
            torch.arange(5.0),
            torch.log(torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])).repeat(CELLS, 1),
            rows=8,
        )
        if cells
        else None,
    )
    fields: dict[str, Any] = {
        "unit": "row",
        "neighboring": "replace_one",
        "grouping": "rows",
        "channels": channels,
        "contexts": 100,
        "units": 15,
        "settings": {},
        "host": host_identity(find_layers(unet), unet.dtype, text),
        "plans": (plan,),
        "decoders": decoders,
    }
    return AnchorCalibration(**{**fields, **changes})
