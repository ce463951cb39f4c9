"""Which host a calibration was made for: its projections, and what its text encoder makes of a fixed public text.

Nothing about privacy rests on it: a release for another host is as private, and its pictures mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from ..calibration.anchors.anchors_calibration import AnchorCalibration, HostIdentity
from ..errors import ConfigError
from .fingerprint import FAR, Fingerprint, Sketching, fingerprint


class ReadsText(Protocol):
    """What makes rows of a text (`diffusers.text_side.TextSide`)."""

    @property
    def available(self) -> bool: ...
    def tokenize(self, text: str) -> tuple[Any, ...]: ...
    def encode(self, *tokens: Any) -> torch.Tensor:
        """Rows [n, C] of what `tokenize` gives."""
        ...


PROBE_TEXT = "a photograph of a red apple on a wooden table, and a window behind it"  # never change it: it is in saved calibrations
TEXT_TOLERANCE = 0.05  # rounding to half precision stays far below, another encoder far above
OTHER_PROJECTIONS = (
    "the calibration's decoder was fitted to other projections (an adapter was loaded, removed or fused since, the weights were tuned, or "
    "the model was cast to a dtype that rounds them further away than usual); quality, not privacy, is affected: calibrate again with the "
    "weights as they are"
)


@torch.no_grad()
def text_probe(text: ReadsText) -> torch.Tensor:
    """[n, C] float32 CPU: the rows of a fixed public text."""
    return text.encode(*text.tokenize(PROBE_TEXT)).to("cpu", torch.float32)


def host_identity(layers: Iterable[Sketching], dtype: torch.dtype, text: ReadsText | None) -> HostIdentity:
    """What a calibration keeps of the host that it is made for."""
    now = fingerprint(layers, dtype)
    has_text = text is not None and text.available
    probe = text_probe(text) if text is not None and has_text else torch.zeros(0, now.layers[0][2])
    return HostIdentity(now.layers, now.sketch, now.dtype, probe)


def fingerprint_of(host: HostIdentity) -> Fingerprint:
    return Fingerprint(host.layers, host.sketch, host.dtype)


def check_layers(calibration: AnchorCalibration, current: Fingerprint) -> None:
    """Raises ConfigError unless the calibration is for these layers, or for ones that a fine-tuning or adapter may have made of them."""
    reason = fingerprint_of(calibration.host).difference(current, FAR)
    if reason is not None:
        raise ConfigError(
            f"The calibration is for another model: {reason}. Calibrate this one (dpx.calibrate). Nothing was patched."
        )


def check_text(calibration: AnchorCalibration, text: ReadsText) -> None:
    """Raises ConfigError where the calibration's rows came from another text encoder or tokenizer."""
    expected = calibration.host.probe
    if not text.available or expected.numel() == 0:
        return
    probe = text_probe(text)
    same = probe.shape == expected.shape
    if not same or not float((probe - expected).norm()) <= TEXT_TOLERANCE * float(expected.norm()):
        raise ConfigError(
            "The calibration was made with another text encoder or tokenizer (or another adapter on it): its codebook does not fit this "
            "pipeline's rows. Calibrate this pipeline (dpx.calibrate). Nothing was patched."
        )
