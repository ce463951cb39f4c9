"""A conversation split for a protected model: what the chat template fixes, the private system prompt, and the public rest."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import ConfigError, ContextError

NO_SYSTEM = 'The first message must be the private one: {"role": "system", "content": "..."}, its content a text that is not empty.'


@dataclass(frozen=True, eq=False)
class SplitChat:
    """Token ids of a conversation, in the order head, private, input_ids.

    head [h]: PUBLIC, what the template puts before the system prompt (BOS, its fixed words). private [n]: the system prompt. segments: the
    same in lines, for groups="segments". input_ids [1, m]: PUBLIC, all that comes after it, with the prompt for an answer.
    """

    head: torch.Tensor = field(repr=False)
    private: torch.Tensor = field(repr=False)
    segments: tuple[torch.Tensor, ...] = field(repr=False)
    input_ids: torch.Tensor = field(repr=False)


def split_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **options: Any,
) -> SplitChat:
    """Splits a conversation whose first message is a private system prompt, by the tokenizer's own chat template.

    The three parts are tokenized apart from each other (and the segments from each other), so that no token spans private and public text.
    What is public is read off a template that was filled in without the system prompt.

    Args:
        tokenizer: with a chat template. messages: role and content, the system prompt first; its lines become segments.
        options: for `tokenizer.apply_chat_template`.

    Raises:
        ConfigError: no system prompt, or a template that leaves it out or repeats it.
        ContextError: a template whose fixed words depend on the system prompt. The message quotes nothing.
    """
    first = messages[0] if messages else {}
    content = first.get("content")
    if first.get("role") != "system" or not isinstance(content, str) or not content.strip():
        raise ConfigError(NO_SYSTEM)
    mark = f"dpx{secrets.token_hex(16)}"  # in no text, so that it is found in one place

    def fill(text: str) -> str:
        conversation = [{**first, "content": text}, *messages[1:]]
        return str(
            tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        )

    parts = fill(mark).split(mark)
    if len(parts) != 2:
        raise ConfigError("This chat template does not show the system prompt in exactly one place.")
    head, rest = parts
    whole = fill(content)
    if not (whole.startswith(head) and whole.endswith(rest)) or len(whole) < len(head) + len(rest):
        raise ContextError(
            "This chat template's fixed words depend on the system prompt; they cannot be public."
        )
    private = whole[len(head) : len(whole) - len(rest)]
    if not private.strip():
        raise ContextError("This chat template leaves the system prompt out.")

    def ids(text: str) -> torch.Tensor:
        found = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return torch.tensor(found, dtype=torch.int64)

    segments = [s for s in map(ids, private.splitlines(keepends=True)) if len(s)]
    return SplitChat(ids(head), ids(private), tuple(segments), ids(rest).unsqueeze(0))
