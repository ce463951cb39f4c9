"""A calibration of `anchors` that was not fitted: random maps and slots of the usual sizes. What it decodes means nothing.

How long a release and a token take does not depend on what the rows say.
"""

from __future__ import annotations

import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration, HostIdentity
from hf_dp_xattn.calibration.anchors.slots_fit import SlotSettings
from hf_dp_xattn.hosts.fingerprint import Fingerprint
from hf_dp_xattn.mechanisms.anchors.plan import AnchorPlan, Decoders, Quality
from hf_dp_xattn.mechanisms.anchors.slots import SlotDecoder, SlotHead

CONFIG = dpx.DPXAttnConfig(unit="row", mechanism="anchors", epsilon=8.0)
SLOTS = 48  # the most that a calibration serves by default


def unfitted(now: Fingerprint, channels: int) -> AnchorCalibration:
    """For the host with this fingerprint and context space of `channels`, unit="row"."""
    generator = torch.Generator().manual_seed(5)
    sizes = SlotSettings()
    code, hidden, directions = sizes.code, sizes.hidden, sizes.directions

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    head = SlotHead(
        draw(hidden, code),
        torch.zeros(hidden),
        torch.zeros(hidden),
        torch.ones(code),
        torch.zeros(code),
        torch.tensor(1.0),
    )
    decoder = SlotDecoder(
        draw(hidden, hidden),
        draw(SLOTS, directions, hidden + code),
        draw(directions, channels),
        torch.randn(SLOTS, channels, generator=generator),
        torch.zeros(SLOTS, hidden + code),
        torch.zeros(SLOTS),
    )
    plan = AnchorPlan(
        epsilon=CONFIG.epsilon,
        release="sum",
        center=torch.zeros(channels),
        reach=torch.full((channels,), 8.0),
        matrix=draw(code, channels),
        bias=torch.zeros(code),
        codes=torch.zeros(0, 0, code),
        bound=1.0,
        share_plus=0.5,
        noise=1.0,
        head=head,
        tilt=None,
        quality=Quality(1.0, 1.0, 1.0, 1),
    )
    calibration = AnchorCalibration(
        unit=CONFIG.unit,
        neighboring=CONFIG.neighboring,
        grouping="rows",
        channels=channels,
        contexts=1,
        units=1,
        settings={},
        host=HostIdentity(now.layers, now.sketch, now.dtype, torch.zeros(0, channels)),
        plans=(plan,),
        decoders=Decoders(decoder, None),
    )
    calibration.verify()
    return calibration
