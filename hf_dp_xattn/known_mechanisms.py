"""What mechanisms there are: the one place in which a mechanism is registered. Nothing of them is imported here (the config must not)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class KnownMechanism:
    """One value of `config.mechanism`.

    releases: what leaves: keys and values of every layer, rows of context space for all layers, or public texts. module: below
    `mechanisms/`, what holds its `prepare` and, by the names in files, its STRUCTURES and FEATURES. needs_calibration: without one it
    cannot release. private: it promises something. units: what it can protect, of `privacy/units.py`. calibration: the module
    below `calibration/` that holds the `KIND` of its calibrations.
    """

    name: str
    releases: Literal["layers", "rows", "texts"]
    module: str
    help: str
    needs_calibration: bool = False
    private: bool = True
    units: tuple[str, ...] = ("row", "group", "context")
    calibration: str = "kernel_fit"


KNOWN = {
    m.name: m
    for m in (
        KnownMechanism(
            "kernel_sum", "layers", "kernel_sum.kernel_sum", "one joint Gaussian release over all layers"
        ),
        KnownMechanism(
            "anchors",
            "rows",
            "anchors.anchors",
            "one release of the context's rows for all layers, decoded to a few rows (needs a calibration)",
            needs_calibration=True,
            calibration="anchors.anchors_kind",
        ),
        KnownMechanism(
            "library",
            "texts",
            "library.library",
            "each text of the context is answered by a text of a public library, or many vote for some (unit group or context; needs a "
            "library)",
            needs_calibration=True,
            units=("group", "context"),
            calibration="library.library_kind",
        ),
        KnownMechanism("dptree", "layers", "dptree.dptree", "the paper's own structures, the baseline"),
        KnownMechanism("none", "layers", "exact", "exact attention, NOT private", private=False),
    )
}
