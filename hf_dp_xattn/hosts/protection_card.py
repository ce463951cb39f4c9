"""The card beside a protected pipeline or model. Nothing here is said that its files and its report do not say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..artefacts import CardOptions
from ..artefacts.card import Parts, render, table
from ..artefacts.words import code, config_guarantee, name_of
from ..calibration.calibration_card import Described
from ..config import DPXAttnConfig
from ..privacy.ledger import Budget

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


def protection_card(
    config: DPXAttnConfig,
    budget: Budget,
    calibration: Described | None,
    public: Sequence[str],
    not_covered: Sequence[str],
    options: CardOptions,
) -> ModelCard:
    """The card.

    Args:
        config: of the protection.
        budget: of each context.
        calibration: what the calibration says of itself, if there is one.
        public: of the host's report.
        not_covered: of the host's report.
        options: what only the publisher knows.
    """
    of_anchors = calibration is not None and calibration.mechanism == "anchors"
    rows = [
        ("budget of each context", f"epsilon {budget.epsilon:g} at delta {budget.delta:g}"),
        ("calibration", "none" if calibration is None else "in this folder"),
        ("releases", "none: a release is saved or pushed by itself"),
        ("ledger", "not in here: pass the same one when you load, or what was spent is forgotten"),
    ]
    settings = config.to_dict()
    as_json = json.dumps(settings, indent=2, sort_keys=True)
    return render(
        Parts(
            title="Protection of this model",
            summary=(
                "The model in the folder above was saved while `hf_dp_xattn` protected it. Other libraries load it as an ordinary model, "
                "without protection."
            ),
            code=code(
                f'pipe = dpx.from_pretrained("{name_of(options)}")  # the folder above this one',
                "print(dpx.handle_of(pipe).report())",
            ),
            guarantee=config_guarantee(settings, "A release is"),
            public=public,
            not_covered=not_covered,
            utility=calibration.utility if calibration is not None and of_anchors else None,
            details=f"{table(('', ''), rows)}\n\n```json\n{as_json}\n```",
            tags=("protection",),
        ),
        options,
    )
