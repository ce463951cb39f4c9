"""What `protect` refuses unless it is told to go on: settings that would spend budget and give nothing for it, or that protect nothing.
Public data decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..calibration.anchors.anchors_calibration import AnchorCalibration
from ..calibration.few_units import too_few
from ..config import DPXAttnConfig
from ..errors import ConfigError, ContextError
from ..known_mechanisms import KNOWN
from .accounts import Settings

if TYPE_CHECKING:
    from ..calibration.stored import Stored


WEAK, HUGE = 16.0, 100.0  # epsilons beyond which a release is warned of, and refused
ROW = (
    "unit='row' protects one embedding row: no word, and nothing whole. An encoder spreads what it reads over many rows, which may be read "
    "off the release at any epsilon. Use unit='group' (parts that are encoded apart from each other) or unit='context' (everything)."
)
NO_FIT = (
    "mechanism={mechanism!r} without a calibration draws noise: its budget would be spent, and next to nothing of the private text would "
    "come through. Make a calibration from PUBLIC texts and pass it:\n"
    "    calibration = dpx.calibrate(host, public_texts, config)\n"
    "    hf-dp-xattn calibrate MODEL --public FILE --mechanism {mechanism} --unit {unit} --out FOLDER\n"
    "or, for text, leave the mechanism out: a library (dpx.calibrate(host)) takes minutes. allow_uncalibrated=True is for those who know. "
    "Nothing was patched or spent."
)


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


def require_calibration(
    config: DPXAttnConfig, calibration: Stored | None, *, allow_uncalibrated: bool
) -> None:
    """Raises ConfigError where a release without a calibration would spend its budget for noise."""
    draws_noise = config.is_private and calibration is None and not KNOWN[config.mechanism].needs_calibration
    if draws_noise and not allow_uncalibrated:
        raise ConfigError(NO_FIT.format(mechanism=config.mechanism, unit=config.unit))


def enough_units(settings: Settings) -> Callable[[int], None] | None:
    """A check before a charge: it raises ContextError for contexts of so few units that nothing of them would come through.

    None where that cannot be told, or where how many units there are is private.
    """
    config, fitted = settings.config, settings.calibration
    if settings.allow_useless or config.neighboring != "replace_one":
        return None
    if not isinstance(fitted, AnchorCalibration):
        return None

    def check(units: int) -> None:
        why = too_few(fitted, config.epsilon, units)
        if why is not None:
            raise ContextError(
                f"At epsilon = {config.epsilon:g}, {why}. Nothing was spent. Use mechanism='library' (dpx.calibrate(host)), which answers "
                "each unit by itself; a larger epsilon or more units (dpx.plan(calibration, n=..., epsilons=...) tells); or protect with "
                "allow_useless=True."
            )

    return check


def require_sense(config: DPXAttnConfig, *, allow_large_epsilon: bool) -> None:
    """Warns of what protects little. Raises ConfigError for an epsilon that protects nothing."""
    if not config.is_private:
        return
    if config.epsilon > HUGE and not allow_large_epsilon:
        raise ConfigError(
            f"epsilon = {config.epsilon:g} promises nothing that anyone could notice: the odds of any guess may grow by a factor of "
            f"e^{config.epsilon:g}. Use at most 16, better 8 or less; allow_large_epsilon=True is for those who know. Nothing was patched "
            "or spent."
        )
    if config.epsilon > WEAK:
        warnings.warn(
            f"epsilon = {config.epsilon:g}: the odds of any guess about one unit may grow by a factor of e^{config.epsilon:g}. Use at most "
            "16, better 8 or less.",
            stacklevel=4,
        )
    if config.unit == "row":
        warnings.warn(ROW, stacklevel=4)
