"""`dpx.protect` of the tiny Mllama, with a calibration where the mechanism needs one."""

from __future__ import annotations

from typing import Any

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.hosts.transformers.mllama.mllama_probing import find_layers

from ..encoder_decoder.calibrations import calibration_for

MECHANISMS = ("none", "kernel_sum", "dptree", "anchors")


def anchors_for(model: Any) -> AnchorCalibration:
    return calibration_for(model, dict(find_layers(model)))


def protect(model: Any, config: dpx.DPXAttnConfig, **arguments: Any) -> Any:
    if config.mechanism == "anchors":
        arguments.setdefault("calibration", anchors_for(model))
    return dpx.protect(model, config, **arguments)


def charges(handle: Any) -> list[int]:
    return [r["charges"] for r in handle.report().releases]
