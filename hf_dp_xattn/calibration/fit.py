"""`fit`: from what any host makes of public contexts to a calibration, whatever the mechanism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..ranks import Ranks
from .anchors.anchors_calibration import AnchorCalibration
from .anchors.anchors_fit import candidates, fit_anchors
from .anchors.slot_schedule import slot_schedule, slots_for
from .calibration import AnyCalibration
from .calibration_options import CalibrationOptions
from .kernel_fit import fit_kernel_sums
from .library.encoding import ALONE
from .library.library_fit import LibraryOptions, build_library
from .library.text_library import TextLibrary
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
    if config.mechanism == "anchors":
        candidates(config, options.anchor_settings(), 1 if documents else 0)
    elif options.replies:
        raise ConfigError("replies train the decoder of `anchors`; kernel_sum has none.")


def fit(config: DPXAttnConfig, data: PublicData | PublicTexts, options: CalibrationOptions) -> AnyCalibration:
    """The calibration of config.mechanism, such as a file of it would be accepted.

    Args:
        config: mechanism, unit, relation and delta to fit for.
        data: public contexts, as the host gives them for this mechanism.
        options: what `calibrate` was asked for.

    Raises:
        ConfigError: too few contexts, or too few distinct rows, documents or texts.
    """
    fitted = _FITS.get(config.mechanism, fit_kernel_sums)(config, data, options)
    fitted.verify()
    return fitted


def _anchors(config: DPXAttnConfig, data: Any, options: CalibrationOptions) -> AnchorCalibration:
    assert data.contexts is not None
    layers = len(data.objective.layers)
    slots = slot_schedule(data.contexts, layers, data.row_flops, options.steps, options.seed)
    if data.documents is not None:
        slots = slots_for(slots, data.contexts.units.shape[1])
    with torch.enable_grad():
        return fit_anchors(config, data, options.anchor_settings(validation=data.validation, slots=slots))


def _library(config: DPXAttnConfig, data: Any, options: CalibrationOptions) -> TextLibrary:
    names = ("epsilons", "expand", "seed", "kept", "responses")
    settings = LibraryOptions(
        grouping=data.grouping,
        encoder=data.encoder,
        flatten=data.flatten,
        progress=options.shown,
        ranks=Ranks.current() if options.processes else ALONE,
        **{name: getattr(options, name) for name in names},
    )
    return build_library(data.units, data.encode, config, settings)


# by mechanism; those that sum over layers share one
_FITS: dict[str, Callable[[DPXAttnConfig, Any, CalibrationOptions], AnyCalibration]] = {
    "anchors": _anchors,
    "library": _library,
}
