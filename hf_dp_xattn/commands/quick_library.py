"""A small library of the shipped prompts, for whoever has no calibration yet; made once for a model and kept in the cache folder."""

from __future__ import annotations

import argparse
import hashlib
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from ..errors import DPXAttnError
from .models import tokenizer_of

if TYPE_CHECKING:
    from ..calibration.library.text_library import TextLibrary

UNITS = 2000  # public texts
EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def few(contexts: list[Any], units: int = UNITS) -> list[Any]:
    """Public contexts with so many units together, spread evenly over the list."""
    sizes = [len(c) if isinstance(c, list) else 1 + c.count(",") + c.count(". ") for c in contexts]
    step = max(1, -(-sum(sizes) // units))
    return list(islice(contexts, 0, None, step))


def quick_library(host: Any, args: argparse.Namespace) -> TextLibrary:
    """The library of a model, args.model; with bars unless args.json.

    Raises:
        ConfigError: the shipped prompts do not suit the model.
    """
    from ..calibration.calibration import Calibration
    from ..config import DPXAttnConfig
    from ..hosts.calibrate import calibrate, shipped_contexts
    from ..privacy.default_ledger import user_folder

    digest = hashlib.sha256(f"{type(host).__name__} {args.model} {UNITS}".encode()).hexdigest()[:16]
    folder = user_folder() / "libraries" / digest
    try:
        return cast("TextLibrary", Calibration.from_pretrained(folder))
    except DPXAttnError:
        pass  # not there yet
    config = DPXAttnConfig(mechanism="library", unit="group")
    library: TextLibrary = calibrate(
        host,
        few(shipped_contexts(host)),
        config,
        epsilons=EPSILONS,
        tokenizer=tokenizer_of(host, args.model),
        progress=not args.json,
    )
    library.save_pretrained(folder)
    return library
