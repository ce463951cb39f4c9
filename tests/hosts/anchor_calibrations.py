"""Calibrations of `anchors` for the tiny pipelines, without a fit: random public encoders, codebooks and decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.calibration.anchors.slots_fit import PublicContexts, SlotSettings, SlotTrainer
from hf_dp_xattn.hosts.diffusers.architectures import find_layers
from hf_dp_xattn.hosts.diffusers.text_side import TextSide
from hf_dp_xattn.hosts.identity import host_identity
from hf_dp_xattn.hosts.protect import handle_of
from hf_dp_xattn.mechanisms.anchors.cells import CellDecoder
from hf_dp_xattn.mechanisms.anchors.plan import AnchorPlan, Decoders, Quality

STAGES = {"sum": 0, "response": 2, "histogram": 1}  # codebooks
RELEASES = tuple(STAGES)
CELLS = 24
SIZES = SlotSettings(code=4, slots=10, hidden=8, directions=4)
BOTH = pytest.mark.parametrize(
    "private", ["kernel_sum", "anchors"], indirect=True
)  # releases per layer, and in context space
CONFIG = dpx.DPXAttnConfig(unit="row", mechanism="anchors", epsilon=8.0, delta=1e-5)


def detached(part: Any) -> Any:
    return type(part)(*(getattr(part, name).detach() for name in part.TENSORS))


def calibration_for(host: Any, release: str = "sum", **changes: Any) -> AnchorCalibration:
    """A calibration with one plan, for epsilon 8. changes: fields of it."""
    gen = torch.Generator().manual_seed(11)
    unet = getattr(host, "unet", host)
    channels = unet.config.cross_attention_dim

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    whole = draw(6, 15, channels)
    trainer = SlotTrainer(PublicContexts(whole, torch.ones(6, 15, dtype=torch.bool), whole), 1, SIZES, gen)
    with torch.no_grad():
        trainer.log_weights += draw(SIZES.slots)
        trainer.coefficients *= 10.0
    counts = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    cells = CellDecoder(
        draw(CELLS, 1, channels),
        torch.arange(CELLS) % 3,
        torch.arange(5.0),
        counts.log().repeat(CELLS, 1),
        rows=8,
    )
    by_cells = release == "histogram"
    plan = AnchorPlan(
        epsilon=8.0,
        release=release,
        center=torch.zeros(channels),
        reach=torch.full((channels,), 4.0),
        matrix=draw(SIZES.code, channels) * 0.2,
        bias=torch.zeros(SIZES.code),
        codes=draw(STAGES[release], CELLS, SIZES.code),
        bound=1.0,
        share_plus=0.75 if by_cells else 0.5,
        noise=0.5,
        head=None if by_cells else detached(trainer.head_of(0)),
        tilt=None,
        quality=Quality(0.5, 0.4, 0.6, 10),
    )
    text = TextSide(host) if hasattr(host, "unet") else None
    fields: dict[str, Any] = {
        "unit": "row",
        "neighboring": "replace_one",
        "grouping": "rows",
        "channels": channels,
        "contexts": 100,
        "units": 15,
        "settings": {},
        "host": host_identity(find_layers(unet).values(), unet.dtype, text),
        "plans": (plan,),
        "decoders": Decoders(None, cells) if by_cells else Decoders(detached(trainer.decoder()), None),
    }
    return AnchorCalibration(**{**fields, **changes})


def protect(host: Any, config: dpx.DPXAttnConfig, **arguments: Any) -> Any:
    """`dpx.protect`, with a calibration where the mechanism needs one."""
    handle = handle_of(host)
    if handle is not None:
        arguments.setdefault("calibration", handle.calibration)
    elif config.mechanism == "anchors" and "calibration" not in arguments:
        grouping = {"row": "rows", "group": "phrases", "context": "context"}[config.unit]
        arguments["calibration"] = calibration_for(
            host, unit=config.unit, neighboring=config.neighboring, grouping=grouping
        )
    return dpx.protect(host, config, **arguments)
