"""`fit`: from what any host makes of public contexts to a calibration, whatever the mechanism."""

from __future__ import annotations

from typing import Any

from ..config import DPXAttnConfig
from .calibration_options import CalibrationOptions
from .kinds import kind_for
from .public_data import PublicData, PublicTexts


def check(config: DPXAttnConfig, options: CalibrationOptions, *, documents: bool = False) -> None:
    """Refuses what cannot be before minutes are spent on it.

    Args:
        config: what a release will promise.
        options: what `calibrate` was asked for.
        documents: the host's units are documents.

    Raises:
        ConfigError: no release that is asked for can give this; replies without a decoder to train.
    """
    kind_for(config.mechanism).check(config, options, documents)


def fit(config: DPXAttnConfig, data: PublicData | PublicTexts, options: CalibrationOptions) -> Any:
    """The calibration of config.mechanism, such as a file of it would be accepted.

    Args:
        config: mechanism, unit, relation and delta to fit for.
        data: public contexts, as the host gives them for this mechanism.
        options: what `calibrate` was asked for.

    Raises:
        ConfigError: too few contexts, or too few distinct rows, documents or texts.
    """
    fitted = kind_for(config.mechanism).fit(config, data, options)
    fitted.verify()
    return fitted
