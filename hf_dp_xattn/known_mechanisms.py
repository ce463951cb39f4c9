"""What mechanisms there are, for all that must not import them (the config). How each one is made: `mechanisms/registry.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class KnownMechanism:
    """One value of `config.mechanism`.

    releases: what leaves: keys and values of every layer, rows of context space for all layers, or public texts.
    needs_calibration: without one it cannot release. private: it promises something. units: what it can protect, of
    `privacy/units.py`.
    """

    name: str
    releases: Literal["layers", "rows", "texts"]
    help: str
    needs_calibration: bool = False
    private: bool = True
    units: tuple[str, ...] = ("row", "group", "context")


KNOWN = {
    m.name: m
    for m in (
        KnownMechanism("kernel_sum", "layers", "one joint Gaussian release over all layers"),
        KnownMechanism(
            "anchors",
            "rows",
            "one release of the context's rows for all layers, decoded to a few rows (needs a calibration)",
            needs_calibration=True,
        ),
        KnownMechanism(
            "library",
            "texts",
            "each text of the context is answered by a text of a public library, or many vote for some (unit group or context; needs a "
            "library)",
            needs_calibration=True,
            units=("group", "context"),
        ),
        KnownMechanism("dptree", "layers", "the paper's own structures, the baseline"),
        KnownMechanism("none", "layers", "exact attention, NOT private", private=False),
    )
}
