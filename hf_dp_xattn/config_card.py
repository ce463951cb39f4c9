"""The card of a config. Nothing here is said that the config does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .artefacts import CardOptions
from .artefacts.card import Parts, render, table
from .artefacts.words import code, config_guarantee, name_of
from .known_mechanisms import KNOWN
from .not_covered import CONFIG

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


def config_card(config: Mapping[str, Any], meanings: Mapping[str, str], options: CardOptions) -> ModelCard:
    """The card: what a release under the config promises.

    Args:
        config: the fields by name.
        meanings: what each field is.
        options: what only the publisher knows.
    """
    known = KNOWN[config["mechanism"]]
    calibration = ", calibration=calibration" if known.needs_calibration else ""
    return render(
        Parts(
            title="Config for differentially private attention",
            summary="Settings of `hf_dp_xattn`: what is released of a private context, and at which price. It holds no data.",
            code=code(
                f'config = dpx.DPXAttnConfig.from_pretrained("{name_of(options)}")',
                f"protected = dpx.protect(pipe, config{calibration})",
            ),
            guarantee=config_guarantee(config, "A release under this config is"),
            public=_public(config),
            not_covered=CONFIG,
            details=table(
                ("setting", "value", "meaning"),
                [(f"`{name}`", value, meanings[name]) for name, value in config.items()],
            ),
            tags=("config",),
        ),
        options,
    )


def _public(config: Mapping[str, Any]) -> list[str]:
    items = ["the model's weights, the calibration, and this config"]
    counted = config["neighboring"] == "replace_one"
    if counted:
        items.append("how many units a context has (or its padded number)")
    if config["unit"] == "group":
        items.append("which rows form a group" + (", and how many groups there are" if counted else ""))
    return [*items, "negative and public prompts, attention masks, guidance, steps and seeds"]
