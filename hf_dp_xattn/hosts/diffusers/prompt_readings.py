"""What a pipeline reads of a prompt: without the marks of special tokens, cleaned, and cut off where its encoders stop.

*Conservative*, as `content_names` is: two prompts that are read alike are one account, and two may be taken for one that are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..content_names import folded_part
from ..context import Part
from ..private_run import private_run
from .text_side import all_ids, without_length_warning


def tokenizers_of(pipe: Any) -> list[Any]:
    """In the order in which the pipeline names them."""
    return [t for n, t in pipe.components.items() if n.startswith("tokenizer") and callable(t)]


def read_parts(pipe: Any, units: Sequence[str], whole: str, *, apart: bool) -> list[Part]:
    """The names of a prompt, and of what its pipeline reads of it.

    Args:
        pipe: the pipeline.
        units: what it consists of, where these are encoded apart. whole: all of it.
        apart: whether they are.
    """
    readings = _readings(pipe, whole)
    each = (
        list(zip(*(_readings(pipe, unit) for unit in units), strict=True))
        if apart
        else [None] * len(readings)
    )
    return list(dict.fromkeys(folded_part(text, parts) for text, parts in zip(readings, each, strict=True)))


def _readings(pipe: Any, text: str) -> list[str]:
    """As many for each text: as it is, without special tokens, cleaned; and what each tokenizer leaves of that."""
    tokenizers = tokenizers_of(pipe)
    plain = text
    for tokenizer in tokenizers:
        for token in getattr(tokenizer, "all_special_tokens", ()):
            plain = plain.replace(token, " ")
    with private_run():
        cleaned = _cleaner(pipe)(plain)
        return [text, plain, cleaned, *(_cut(pipe, tokenizer, cleaned) for tokenizer in tokenizers)]


def _cut(pipe: Any, tokenizer: Any, text: str) -> str:
    """What of it the tokenizer's longest text holds."""
    limit = getattr(tokenizer, "model_max_length", None)
    try:
        if not isinstance(limit, int) or len(all_ids(pipe, tokenizer, text)) <= limit:
            return text
        with without_length_warning(tokenizer):
            ids = tokenizer([text], truncation=True, max_length=limit).input_ids[0]
            return str(tokenizer.decode(ids, skip_special_tokens=True))
    except Exception:  # a processor, or one of chats; its words may quote the text
        return text


def _cleaner(pipe: Any) -> Callable[[str], str]:
    """The pipeline's own: a method of DeepFloyd IF's kin, or a function of its module."""
    method = getattr(pipe, "_text_preprocessing", None)
    function = getattr(sys.modules.get(type(pipe).__module__), "prompt_clean", None)

    def clean(text: str) -> str:
        try:
            if method is not None:
                return str(method(text, clean_caption=True)[0])
            return text if function is None else str(function(text))
        except Exception:  # as above
            return text

    return clean
