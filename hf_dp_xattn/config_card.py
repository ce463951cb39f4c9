"""The card of a config. Nothing here is said that the config does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .artefacts import CardOptions
from .artefacts.card import Parts, render, table
from .artefacts.words import ONE_RELEASE, code, config_promise, name_of, price_table
from .known_mechanisms import KNOWN

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

NOT_COVERED = (
    "words: an encoder mixes its rows, so unit='row' protects one row of its output, never a word; unit='context' protects everything at "
    "once and costs accordingly",
    "what can be learned from a release at this epsilon, by anyone who sees it or what is made from it",
    "negative prompts, public prompts, the initial image of img2img; weights and calibrations that were made from private data",
    "further releases of the same context, and the same text under another name (token ids, embeddings): each is charged on its own",
    "timing, memory, the number of requests, and what the surrounding program logs",
    "anything more that `protected.report()` lists for the host at hand",
)


def config_card(config: Mapping[str, Any], meanings: Mapping[str, str], options: CardOptions) -> ModelCard:
    """The card: what a release under the config promises.

    Args:
        config: the fields by name.
        meanings: what each field is.
        options: what only the publisher knows.
    """
    known = KNOWN[config["mechanism"]]
    calibration = ", calibration=calibration" if known.needs_calibration else ""
    price = price_table(config)
    return render(
        Parts(
            title="Config for differentially private attention",
            summary="Settings of `hf_dp_xattn`: what is released of a private context, and at which price. It holds no data.",
            code=code(
                f'config = dpx.DPXAttnConfig.from_pretrained("{name_of(options)}")',
                f"protected = dpx.protect(pipe, config{calibration})",
            ),
            guarantee=f"A release under this config is {config_promise(config)}\n\n{price}\n\n{ONE_RELEASE}"
            if known.private
            else f"**{config_promise(config)}**\n\n{price}",
            public=_public(config),
            not_covered=NOT_COVERED,
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
