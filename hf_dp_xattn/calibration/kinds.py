"""The kinds of calibration: each mechanism's entry in `known_mechanisms.py` names the module below here that holds its `KIND`.

Modules are imported by name, when a calibration is made or read: `Calibration.from_pretrained` reads every kind, and its module is below
those that fit one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..known_mechanisms import KNOWN
from .stored import CODEC, Stored


def _no_replies(config: DPXAttnConfig, options: Any, documents: bool) -> None:
    if options.replies:
        raise ConfigError(f"replies train the decoder of `anchors`; {config.mechanism} has none.")


@dataclass(frozen=True)
class CalibrationKind:
    """What the releases of a mechanism, or of several alike, are calibrated with.

    stored: the class; its KIND is what a file of it says. fit: from (config, what a host makes of public contexts, `CalibrationOptions`).
    check: of (config, options, whether the host's units are documents); it raises ConfigError for what cannot be. fewest: public contexts.
    """

    stored: type[Stored]
    fit: Callable[[DPXAttnConfig, Any, Any], Stored]
    check: Callable[[DPXAttnConfig, Any, bool], None] = _no_replies
    fewest: int = 1


def kind_for(mechanism: str) -> CalibrationKind:
    """The kind that serves a value of `config.mechanism`."""
    kind = import_module(f".{KNOWN[mechanism].calibration}", __package__).KIND
    assert isinstance(kind, CalibrationKind)
    return kind


def load_calibration(folder: Path) -> Any:
    """Reads and checks the files in a local folder, of whichever kind; raises ConfigError."""
    written = CODEC.read_document(folder).get("kind")
    stored = [kind_for(mechanism).stored for mechanism in KNOWN]
    # what says no kind, or one that nobody knows, is read as sums over layers, which never said theirs
    plain = next(cls for cls in stored if cls.KIND is None)
    return next((cls for cls in stored if cls.KIND is not None and written == cls.KIND), plain).load(folder)
