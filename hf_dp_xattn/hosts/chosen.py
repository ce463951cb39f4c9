"""The config of a protection, from what was said and what the calibration was made for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..calibration.anchors.anchors_calibration import AnchorCalibration
from ..calibration.calibration import Calibration
from ..calibration.library.text_library import TextLibrary
from ..config import DPXAttnConfig
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..calibration.calibration import AnyCalibration


def chosen_config(config: Any, epsilon: float | None, calibration: AnyCalibration | None) -> DPXAttnConfig:
    """The config of a protection.

    Args:
        config: a config or None. epsilon: in place of a config. calibration: decides what nobody named.

    Raises:
        ConfigError: both were given, or something else than a config.
    """
    if config is None:
        values: dict[str, Any] = {} if calibration is None else settings_of(calibration)
        return DPXAttnConfig(**values if epsilon is None else {**values, "epsilon": epsilon})
    if not isinstance(config, DPXAttnConfig):
        raise ConfigError(f"config must be a DPXAttnConfig, got {type(config).__name__}.")
    if epsilon is not None:
        raise ConfigError("Give epsilon or a config (which has one), not both: config.replace(epsilon=...).")
    return config.made_for(calibration)


def settings_of(calibration: AnyCalibration) -> dict[str, Any]:
    """What a config must say to go with a calibration."""
    if isinstance(calibration, Calibration):  # it serves both relations
        return {"mechanism": calibration.mechanism, **calibration.settings}
    return {name: getattr(calibration, name) for name in ("mechanism", "unit", "neighboring")}


def read_calibration(calibration: Any) -> AnyCalibration | None:
    """A calibration, or the one in a folder or Hub repository. Raises ConfigError."""
    if isinstance(calibration, (str, os.PathLike)):
        return Calibration.from_pretrained(calibration)
    if calibration is not None and not isinstance(calibration, (Calibration, AnchorCalibration, TextLibrary)):
        raise ConfigError(
            f"`calibration` is a {type(calibration).__name__}: pass what dpx.calibrate returned, or its folder or Hub id. Nothing was "
            "patched."
        )
    return calibration
