"""What a pipeline reads of a prompt: without the marks of special tokens, cleaned, and as each of its encoders takes it.

*Conservative*, as `content_names` is: two prompts that are read alike are one account, and two may be taken for one that are not. How many
names a prompt has does not depend on it: a ledger's reader sees how many there are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..content_names import folded_part
from ..context import Part, plain_bytes
from ..private_run import private_run
from ..text.unit_encoders import token_limit
from .architectures import unwrap
from .text_side import all_ids

_STEPS = b"plain", b"cleaned"


def tokenizers_of(pipe: Any) -> dict[str, Any]:
    """By the names of its components."""
    return {n: t for n, t in pipe.components.items() if n.startswith("tokenizer") and callable(t)}


def read_parts(
    pipe: Any, units: Sequence[str], whole: str, *, apart: bool, longest: int | None = None
) -> list[Part]:
    """The names of a prompt, and of what its pipeline reads of it: as many for each.

    Args:
        pipe: the pipeline.
        units: what it consists of, where these are encoded apart. whole: all of it.
        apart: whether they are.
        longest: how many tokens are read at most, where that is known.
    """
    with private_run():
        texts = [_steps(pipe, text) for text in (whole, *units)]
        read = [_read(pipe, steps[-1], longest) for steps in texts]
    parts = [folded_part(whole, units if apart else None)]
    for i, step in enumerate(_STEPS):
        folded, *each = (folded_part(steps[i], None).name for steps in texts)
        parts.append(_part(step, folded, each if apart else None))
    for name, ids in read[0].items():  # where units are encoded apart, the whole is not read
        known = tuple(other[name] for other in read[1:]) if apart else (ids,)
        parts.append(_part(b"ids of " + name.encode(), known, [known] if apart else None))
    return parts


def _part(kind: bytes, name: tuple[bytes, ...], units: Sequence[tuple[bytes, ...]] | None) -> Part:
    grouping = (
        None if units is None else (b"phrases of a " + kind, *(inner for unit in units for inner in unit))
    )
    return Part((kind, *name), grouping)


def _steps(pipe: Any, text: str) -> tuple[str, str]:
    """A text without special tokens; and cleaned."""
    plain = text
    for tokenizer in tokenizers_of(pipe).values():
        for token in getattr(tokenizer, "all_special_tokens", ()):
            plain = plain.replace(token, " ")
    return plain, _cleaner(pipe)(plain)


def _read(pipe: Any, text: str, longest: int | None) -> dict[str, bytes]:
    """The ids of a text under each tokenizer, as far as its encoder reads, but for a last one, which may be the end's."""
    found = {}
    for name, tokenizer in tokenizers_of(pipe).items():
        encoder = unwrap(getattr(pipe, name.replace("tokenizer", "text_encoder"), None))
        limit = token_limit(encoder, tokenizer, longest)
        try:
            ids = all_ids(pipe, tokenizer, text)
            special = frozenset(getattr(tokenizer, "all_special_ids", ()))
            while ids and ids[-1] in special:
                ids.pop()
            found[name] = plain_bytes(torch.tensor(ids[: limit - 1], dtype=torch.int64))
        except Exception:  # a processor, or one of chats; its words may quote the text
            found[name] = text.encode("utf-8", "surrogatepass")
    return found


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
