"""How a library is built of the texts that a host takes from public contexts."""

from __future__ import annotations

from ...config import DPXAttnConfig
from ...ranks import Ranks
from ..calibration_options import CalibrationOptions
from ..kinds import CalibrationKind
from ..public_data import PublicTexts
from .encoding import ALONE
from .library_fit import LibraryOptions, build_library
from .text_library import TextLibrary


def _fit(config: DPXAttnConfig, data: PublicTexts, options: CalibrationOptions) -> TextLibrary:
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


KIND = CalibrationKind(TextLibrary, _fit)
