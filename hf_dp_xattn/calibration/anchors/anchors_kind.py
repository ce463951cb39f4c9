"""How a calibration of `anchors` is fitted to what a host makes of public contexts."""

from __future__ import annotations

import torch

from ...config import DPXAttnConfig
from ..calibration_options import CalibrationOptions
from ..kinds import CalibrationKind
from ..public_data import PublicData
from .anchors_calibration import AnchorCalibration
from .anchors_fit import MINIMUM_CONTEXTS, candidates, fit_anchors
from .slot_schedule import slot_schedule, slots_for


def _check(config: DPXAttnConfig, options: CalibrationOptions, documents: bool) -> None:
    candidates(config, options.anchor_settings(), 1 if documents else 0)


def _fit(config: DPXAttnConfig, data: PublicData, options: CalibrationOptions) -> AnchorCalibration:
    assert data.contexts is not None
    slots = slot_schedule(data.contexts, data.row_flops, options.steps, options.seed)
    if data.documents is not None:
        slots = slots_for(slots, data.contexts.units.shape[1])
    with torch.enable_grad():
        return fit_anchors(config, data, options.anchor_settings(validation=data.validation, slots=slots))


KIND = CalibrationKind(AnchorCalibration, _fit, _check, MINIMUM_CONTEXTS)
