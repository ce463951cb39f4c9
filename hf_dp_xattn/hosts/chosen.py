"""The config of a protection, from what was said and what the calibration was made for."""

from __future__ import annotations

import os
from typing import Any

from ..calibration.calibration import Calibration
from ..calibration.stored import Stored
from ..config import DPXAttnConfig
from ..errors import ConfigError


def chosen_config(config: Any, epsilon: float | None, calibration: Stored | None) -> DPXAttnConfig:
    """The config of a protection.

    Args:
        config: a config or None. epsilon: in place of a config. calibration: decides what nobody named.

    Raises:
        ConfigError: both were given, or something else than a config.
    """
    if config is None:
        values: dict[str, Any] = {} if calibration is None else calibration.config_fields()
        return DPXAttnConfig(**values if epsilon is None else {**values, "epsilon": epsilon})
    if not isinstance(config, DPXAttnConfig):
        raise ConfigError(f"config must be a DPXAttnConfig, got {type(config).__name__}.")
    if epsilon is not None:
        raise ConfigError("Give epsilon or a config (which has one), not both: config.replace(epsilon=...).")
    return config.made_for(calibration)


def read_calibration(calibration: Any) -> Stored | None:
    """A calibration, or the one in a folder or Hub repository. Raises ConfigError."""
    if isinstance(calibration, (str, os.PathLike)):
        return Calibration.from_pretrained(calibration)
    if calibration is not None and not isinstance(calibration, Stored):
        raise ConfigError(
            f"`calibration` is a {type(calibration).__name__}: pass what dpx.calibrate returned, or its folder or Hub id. Nothing was "
            "patched."
        )
    return calibration
