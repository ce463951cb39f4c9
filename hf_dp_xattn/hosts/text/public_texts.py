"""Public contexts of any host as lists of public units, and the library that is made of them with the host's own encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...calibration.calibration_options import CalibrationOptions
from ...calibration.library.text_library import GROUPINGS
from ...calibration.public_data import PublicTexts
from ...config import DPXAttnConfig
from ...errors import ConfigError, ContextError
from .text_contexts import MOST, Cut
from .unit_encoders import parts_of, tokenizer_beside, unit_encoder

NOT_TEXTS = (
    "Public contexts of a library are strings, lists of strings (the units of a context), or token ids, with the tokenizer that decodes "
    "them."
)


def public_texts(
    host: Any, public_contexts: Iterable[Any], config: DPXAttnConfig, options: CalibrationOptions
) -> PublicTexts:
    """What public contexts of any host are to a library; see `calibrate`. By default phrases of a pipeline's prompt, documents of an
    encoder-decoder model, sentences of other texts; or all of it where the unit is the context.

    Raises:
        ConfigError: no texts, or no tokenizer or encoder.
    """
    encode = unit_encoder(host, options.tokenizer, encoder=options.encoder)
    grouping = options.grouping or ("context" if config.unit == "context" else _default(host))
    if grouping not in GROUPINGS.get(config.unit, ()):
        known = ", ".join(GROUPINGS.get(config.unit, ()))
        raise ConfigError(
            f"Contexts with unit={config.unit!r} are cut in {known or 'no units'}, got {grouping!r}."
        )
    if isinstance(public_contexts, (str, bytes, Mapping)):
        raise ConfigError(NOT_TEXTS)
    cut = Cut(grouping)
    units = [_cut(cut, _decoded(c, host, options.tokenizer), i) for i, c in enumerate(public_contexts)]
    # directions of a host's own states that say little of a text are large; a sentence encoder has none
    flatten = 0.5 if options.encoder is None else 0.0
    return PublicTexts(units, grouping, encode.public, encode.name, flatten)


def _cut(cut: Cut, context: Any, number: int) -> list[str]:
    try:
        return cut(context)[0]
    except ContextError:
        raise ConfigError(
            f"Public context {number} (counted from 0) has no units, an empty one, or more than {MOST}. {NOT_TEXTS}"
        ) from None


def _default(host: Any) -> str:
    from diffusers import DiffusionPipeline

    if isinstance(host, DiffusionPipeline):
        return "phrases"
    model = parts_of(host)[0]
    return (
        "documents" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "sentences"
    )


def _decoded(context: Any, host: Any, tokenizer: Any) -> Any:
    """A string, or a list of strings."""
    value = context.tolist() if hasattr(context, "tolist") else context
    if (
        isinstance(value, str)
        or not isinstance(value, (list, tuple))
        or all(isinstance(p, str) for p in value)
    ):
        return value
    model, host_tokenizer = parts_of(host)
    words = tokenizer or host_tokenizer or tokenizer_beside(model)

    def text(ids: Any) -> str:
        return str(words.decode(list(ids), skip_special_tokens=True))

    if all(isinstance(part, int) for part in value):
        return text(value)
    parts = [part.tolist() if hasattr(part, "tolist") else part for part in value]
    if not all(isinstance(p, (str, list, tuple)) for p in parts):
        raise ConfigError(NOT_TEXTS)
    return [p if isinstance(p, str) else text(p) for p in parts]
