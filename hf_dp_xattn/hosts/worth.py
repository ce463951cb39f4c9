"""What `protect` refuses unless it is told to go on: settings that would spend budget and give nothing for it. Public data decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import DPXAttnConfig
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..calibration.calibration import AnyCalibration


def require_worth(config: DPXAttnConfig, calibration: AnyCalibration | None, *, allow_useless: bool) -> None:
    """Refuses releases that are not known to be better than none.

    Args:
        config: what is released.
        calibration: what predicts how good it is.
        allow_useless: the user goes on.

    Raises:
        ConfigError: the plan for this epsilon is no better than no release, with 95 % confidence.
    """
    if allow_useless or calibration is None or calibration.mechanism != config.mechanism:
        return
    why = calibration.useless(config)
    if why is not None:
        raise ConfigError(
            f"At epsilon = {config.epsilon:g} this calibration is not known to be better than no release at all: {why}. Nothing was "
            "patched or spent. Choose a larger epsilon (dpx.plan says from which on it is), calibrate with more public contexts or "
            "for longer, or pass allow_useless=True."
        )
