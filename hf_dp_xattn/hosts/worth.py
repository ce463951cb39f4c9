"""What `protect` refuses unless it is told to go on: settings that would spend budget and give nothing for it. Public data decides."""

from __future__ import annotations

from ..errors import ConfigError
from .accounts import Settings


def require_worth(settings: Settings) -> None:
    """Refuses releases that are not known to be better than none.

    Args:
        settings: what `protect` was told; its calibration fits its config.

    Raises:
        ConfigError: the plan for this epsilon is no better than no release, with 95 % confidence, and the user did not say to go on.
    """
    config, calibration = settings.config, settings.calibration
    if settings.allow_useless or calibration is None:
        return
    why = calibration.useless(config)
    if why is not None:
        raise ConfigError(
            f"At epsilon = {config.epsilon:g} this calibration is not known to be better than no release at all: {why}. Nothing was "
            "patched or spent. Choose a larger epsilon (dpx.plan says from which on it is), calibrate with more public contexts or "
            "for longer, or pass allow_useless=True."
        )
