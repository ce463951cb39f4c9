"""The card of a calibration, of any kind. Nothing here is said that the calibration does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..artefacts import CardOptions
from ..artefacts.card import Parts, render, table
from ..artefacts.words import code, name_of, unit_rows
from ..not_covered import CALIBRATION

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_PUBLIC = (
    "Made from PUBLIC contexts only: it is neither noised nor counted, and the package cannot check that its publisher kept to it. It "
    "spends no budget."
)


@dataclass(frozen=True)
class Described:
    """What a calibration says of itself. layers: how many; settings: how it was made; utility: what it predicts, in Markdown."""

    mechanism: str
    unit: str
    neighboring: str
    contexts: int
    units: int
    layers: int
    settings: Mapping[str, Any]
    utility: str | None


def calibration_card(described: Described, options: CardOptions) -> ModelCard:
    """The card. options: what only the publisher knows."""
    of = f'unit="{described.unit}", neighboring="{described.neighboring}")'
    rows = [
        ("public contexts", described.contexts),
        ("units in the largest", described.units),
        ("cross-attention layers", described.layers),
        *((f"`{k}`", v) for k, v in described.settings.items() if isinstance(v, (str, int, float))),
    ]
    return render(
        Parts(
            title=f"Calibration for differentially private attention: {described.mechanism}, unit = {described.unit}",
            summary=f"Public statistics that `hf_dp_xattn` needs to release private contexts well. {_PUBLIC}",
            code=code(
                f'calibration = dpx.Calibration.from_pretrained("{name_of(options)}")',
                f'config = dpx.DPXAttnConfig(mechanism="{described.mechanism}", epsilon=8.0, delta=1e-5, {of}',
                "protected = dpx.protect(pipe, config, calibration=calibration)",
            ),
            guarantee=(
                "None by itself: it holds no private data. A release made with it is (epsilon, delta)-differentially private as its config "
                "says, whatever this calibration holds; what it holds decides how useful the release is.\n\n"
                + table(
                    ("", ""),
                    [
                        ("mechanism", f"`{described.mechanism}`"),
                        *unit_rows(described.unit, described.neighboring),
                    ],
                )
            ),
            public=["everything in it"],
            not_covered=CALIBRATION,
            utility=described.utility,
            details=table(("", ""), rows),
            tags=("calibration", described.mechanism),
        ),
        options,
    )
