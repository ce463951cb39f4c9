"""Tiny hosts of every kind, with a config and a calibration to audit them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hf_dp_xattn as dpx
from hf_dp_xattn.audit.subjects import subject_of
from hf_dp_xattn.hosts.driver import Driver

from ..hosts import anchor_calibrations
from ..hosts.transformers.decoder_only import calibrations as decoder_calibrations
from ..hosts.transformers.decoder_only.tiny import tiny as decoder
from ..hosts.transformers.encoder_decoder.calibrations import calibration_for
from ..hosts.transformers.encoder_decoder.tiny import one
from ..hosts.transformers.encoder_decoder.tiny import tiny as seq2seq
from ..hosts.transformers.mllama.protecting import anchors_for
from ..hosts.transformers.mllama.tiny import tiny as image_text
from ..hosts_tiny import tiny_img2img, tiny_inpaint, tiny_sd

KERNEL = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", projection_dim=4, degree=1)
ANCHORS = dpx.DPXAttnConfig(unit="row", mechanism="anchors")
Case = tuple[Any, dpx.DPXAttnConfig, Any]


def _anchored(host: Any, calibrate: Callable[[Any], Any]) -> Case:
    return host, ANCHORS, calibrate(host)


CASES: dict[str, Callable[[], Case]] = {
    "pipeline anchors": lambda: _anchored(tiny_sd(), anchor_calibrations.calibration_for),
    "pipeline kernel_sum group": lambda: (tiny_sd(), KERNEL.replace(unit="group"), None),
    "img2img kernel_sum": lambda: (tiny_img2img(), KERNEL, None),
    "inpaint dptree": lambda: (tiny_inpaint(), KERNEL.replace(mechanism="dptree"), None),
    "unet kernel_sum": lambda: (tiny_sd().unet, KERNEL, None),
    "unet kernel_sum group": lambda: (tiny_sd().unet, KERNEL.replace(unit="group"), None),
    "bart anchors": lambda: _anchored(seq2seq("bart"), calibration_for),
    "t5 kernel_sum group": lambda: (seq2seq("t5"), KERNEL.replace(unit="group"), None),
    "bert2gpt2 kernel_sum": lambda: (seq2seq("bert2gpt2"), KERNEL, None),
    "llama anchors": lambda: _anchored(
        decoder("llama"), lambda m: decoder_calibrations.calibration_for(m, "row")
    ),
    "llama kernel_sum group": lambda: (decoder("llama"), KERNEL.replace(unit="group"), None),
    "gpt2 kernel_sum context": lambda: (decoder("gpt2"), KERNEL.replace(unit="context"), None),
    "mllama anchors": lambda: _anchored(image_text(), anchors_for),
}


def case(name: str) -> Driver:
    host, config, calibration = CASES[name]()
    return subject_of(host, config, calibration)


def recordings(count: int) -> list[dict[str, Any]]:
    """What whisper's encoder takes."""
    return [one("whisper", seed) for seed in range(count)]
