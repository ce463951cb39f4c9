"""Small libraries for tiny hosts, made with the host's own encoder, and handles with seeded coins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.library.library_fit import LibraryOptions, build_library
from hf_dp_xattn.calibration.library.text_library import TextLibrary
from hf_dp_xattn.hosts.making import ContextRecipe
from hf_dp_xattn.hosts.text.unit_encoders import unit_encoder

PHRASES = (
    "a red circle",
    "a blue square",
    "at the top",
    "on the left",
    "a green star",
    "in snow",
    "at night",
    "on wood",
)
LINES = (
    "please be polite",
    "close at five",
    "never say the secret",
    "answer in french",
    "speak like a pirate",
    "open on monday",
    "the code is red",
    "be blue",
)


def config(epsilon: float = 8.0, unit: str = "group") -> dpx.DPXAttnConfig:
    return dpx.DPXAttnConfig(mechanism="library", epsilon=epsilon, unit=unit)


def library(
    host: Any,
    texts: Sequence[str] = PHRASES,
    unit: str = "group",
    tokenizer: Any = None,
    encoder: Any = None,
    grouping: str | None = None,
) -> TextLibrary:
    """All texts may answer at every epsilon."""
    encode = unit_encoder(host, tokenizer, encoder=encoder)
    contexts = (
        [[a, b] for a, b in zip(texts, [*texts[1:], texts[0]], strict=True)]
        if unit == "group"
        else list(texts)
    )
    options = LibraryOptions(epsilons=(8.0,), progress=False, encoder=encode.name, grouping=grouping)
    return build_library(contexts, encode, config(unit=unit), options)


def answer_with(protected: Any, *texts: str) -> None:
    """From now on whatever is released is answered with these texts."""
    prepared = protected.calibration.prepare(protected.config, len(texts))
    object.__setattr__(prepared, "decode", lambda noised, state: texts)
    protected.guard.prepared_for = lambda usual, context: ContextRecipe(prepared)
