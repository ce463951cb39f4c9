"""Small hand-made calibrations of `anchors`: random encoders and decoders, chosen qualities and scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration, HostIdentity, ScorePoint
from hf_dp_xattn.mechanisms.anchors.plan import Quality

from ..mechanisms.anchors.naive_anchors import CHANNELS, decoders, plan

# epsilon -> (release, FVU, low, high)
QUALITIES: dict[float, tuple[str, float, float, float]] = {
    1.0: ("sum", 0.9, 0.85, 0.95),
    4.0: ("response", 0.6, 0.55, 0.65),
    16.0: ("histogram", 0.2, 0.15, 0.25),
}
SCORES: dict[float, tuple[float, float, float]] = {
    1.0: (0.3, 0.25, 0.35),
    4.0: (0.7, 0.65, 0.75),
    16.0: (0.9, 0.85, 0.95),
}
LAYERS = (("down.0", 2, CHANNELS, 16), ("up.0", 4, CHANNELS, 32))


def calibration(
    *,
    unit: str = "row",
    neighboring: str = "replace_one",
    units: int = 9,
    qualities: dict[float, tuple[str, float, float, float]] | None = None,
    scores: dict[float, tuple[float, float, float]] | None = None,
    layers: Sequence[tuple[str, int, int, int]] = LAYERS,
) -> AnchorCalibration:
    """One plan per entry of `qualities`; scores={} for a publisher who measured none."""
    plans = []
    for epsilon, (release, fvu, low, high) in (QUALITIES if qualities is None else qualities).items():
        p = plan(release, epsilon=epsilon)
        plans.append(
            dataclasses.replace(
                p,
                quality=Quality(fvu, low, high, 60),
                share_plus=0.5 if neighboring == "add_or_remove_one" else p.share_plus,
            )
        )
    measured = SCORES if scores is None else scores
    return AnchorCalibration(
        unit=unit,
        neighboring=neighboring,
        grouping={"row": "rows", "group": "phrases", "context": "context"}[unit],
        channels=CHANNELS,
        contexts=400,
        units=units,
        settings={"delta": 1e-5},
        host=HostIdentity(
            tuple(layers), torch.zeros(len(layers), 2, 4, 4), "float16", torch.zeros(0, CHANNELS)
        ),
        plans=tuple(plans),
        decoders=decoders("mixed" if any(p.release == "mixed" for p in plans) else ""),
        scores=tuple(ScorePoint("accuracy", e, s, lo, hi, 50) for e, (s, lo, hi) in measured.items()),
    )
