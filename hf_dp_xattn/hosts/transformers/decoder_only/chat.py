"""A conversation split for a protected model: what the chat template fixes, the private system prompt, and the public rest."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ....errors import ConfigError, ContextError
from ....records import plain_text
from ....unquoted import unquoted
from ...diffusers.text_side import tokenizer_fails, without_length_warning

SYSTEM_ROLES = ("system", "developer")
BESIDE = ("tools", "documents")  # what templates write into their fixed words
NO_SYSTEM = 'The first message must be the private one: {"role": "system", "content": "..."}, its content a text that is not empty.'


@dataclass(frozen=True, eq=False)
class SplitChat:
    """Token ids of a conversation, in the order head, private, input_ids.

    Args:
        head: [h] PUBLIC, what the template puts before the system prompt (BOS, its fixed words).
        private: [n] the system prompt.
        segments: the same in lines, for groups="segments".
        input_ids: [1, m] PUBLIC, all that comes after it, with the prompt for an answer.

    Example:
        >>> parts = dpx.split_chat(tokenizer, messages)
        >>> parts.head.ndim, parts.private.ndim, parts.input_ids.ndim
        (1, 1, 2)
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
    public_system: bool = False,
    **options: Any,
) -> SplitChat:
    """Splits a conversation whose first message is a private system prompt, by the tokenizer's own chat template.

    The three parts are tokenized apart from each other (and the segments from each other), so that no token spans private and public text.
    What is public is read off a template that was filled in without the system prompt.

    Args:
        tokenizer: with a chat template.
        messages: role and content, the system prompt first; its lines become segments.
        add_generation_prompt: whether an answer is asked for, as in the template.
        public_system: declares PUBLIC what else may look private: system and developer messages after the first one, and `tools` and
            `documents`. All of it stands in `head` or `input_ids`, exact to the model, and whoever sees the replies may learn it.
        options: for `tokenizer.apply_chat_template`. Whatever the template makes of them is PUBLIC.

    Raises:
        ConfigError: no system prompt; no template, or one that fails, leaves it out, repeats it or puts it behind earlier turns; further
            system messages, tools or documents that are not declared public; an entry of the system message beside role and content.
        ContextError: a template whose fixed words depend on the system prompt, or a tokenizer that fails on it. The message quotes nothing.

    Example:
        >>> messages = [{"role": "system", "content": "be kind\\nsay the code"}, {"role": "user", "content": "hello"}]
        >>> len(dpx.split_chat(tokenizer, messages).segments)
        2
    """
    first, content = private_message(messages)
    if not public_system:
        refuse_others(messages[1:], options)
    mark = f"dpx{secrets.token_hex(16)}"  # in no text, so that it is found in one place

    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("This tokenizer has no chat template: set one, or release token ids.")
    reserved = [name for name in ("tokenize", "return_dict", "return_tensors") if name in options]
    if reserved:
        raise ConfigError(f"{reserved[0]} is set here, and is no option of a template: leave it out.")

    def fill(text: str, later: Sequence[Mapping[str, Any]] = messages[1:]) -> str:
        conversation = [{**first, "content": text}, *later]
        filled = unquoted(
            lambda: tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            ),
            lambda kind: ConfigError(
                f"This chat template fails on these messages and options ({kind}): it may take no system message, or roles in another "
                "order. Nothing was spent."
            ),
        )
        return str(filled)

    head, rest = _around(fill(mark), mark)
    if len(messages) > 2 and _around(fill(mark, messages[1:2]), mark)[0] != head:
        raise ConfigError(
            "This chat template puts the system prompt behind earlier turns: what stands before it changes from turn to turn, and so would "
            "the release. With this template a protected conversation has one turn; for more, use a template that puts it first."
        )
    whole = fill(content)
    if not (whole.startswith(head) and whole.endswith(rest)) or len(whole) < len(head) + len(rest):
        raise ContextError(
            "This chat template's fixed words depend on the system prompt; they cannot be public."
        )
    private = whole[len(head) : len(whole) - len(rest)]
    if not private.strip():
        raise ContextError("This chat template leaves the system prompt out.")

    def ids(text: str) -> torch.Tensor:
        with without_length_warning(tokenizer):  # it would say how long the text is
            tokens = partial(tokenizer, text, add_special_tokens=False)
            token_ids = unquoted(lambda: tokens()["input_ids"], tokenizer_fails) if text else []
        return torch.tensor(token_ids, dtype=torch.int64)

    lines = re.split(r"(?<=\n)", private)  # at line feeds alone: other separators may stand within one unit
    segments = [s for s in map(ids, lines) if len(s)]
    return SplitChat(ids(head), ids(private), tuple(segments), ids(rest).unsqueeze(0))


def _around(filled: str, mark: str) -> tuple[str, str]:
    """What stands before and after the mark."""
    parts = filled.split(mark)
    if len(parts) != 2:
        raise ConfigError("This chat template does not show the system prompt in exactly one place.")
    return parts[0], parts[1]


def private_message(messages: Any) -> tuple[Mapping[str, Any], str]:
    """The system message and its text. Raises ConfigError where there is none, or more in it than its text."""
    if (
        isinstance(messages, (str, bytes))
        or not isinstance(messages, Sequence)
        or not all(isinstance(message, Mapping) for message in messages)
    ):
        raise ConfigError('A conversation is a list of messages {"role": ..., "content": ...}. ' + NO_SYSTEM)
    first = messages[0] if messages else {}
    content = first.get("content")
    if first.get("role") != "system" or not isinstance(content, str) or not content.strip():
        raise ConfigError(NO_SYSTEM)
    others = sorted(str(k) for k, v in first.items() if k not in ("role", "content") and v is not None)
    if others:
        raise ConfigError(
            f"The system message has entries beside role and content ({', '.join(others)}), which a template may write into its public "
            "words. Put what is private into the content, and pass what is public as an option of the template."
        )
    return first, plain_text(content)


def refuse_others(later: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    """Raises ConfigError for what may look private and would become public text."""
    roles = [str(message.get("role")).strip().lower() for message in later]
    system_roles = [role for role in SYSTEM_ROLES if role in roles]
    if system_roles:
        raise ConfigError(
            f"Only the first message is private, and a later one has the role {system_roles[0]!r}: it would be public text, exact to the "
            "model. Join its text with the first message's, or declare it public with public_system=True."
        )
    written = [name for name in BESIDE if options.get(name)]
    if written:
        raise ConfigError(
            f"{written[0]} would be written into the template's public words, exact to the model. Put them into the system prompt's text, "
            "or declare them public with public_system=True."
        )
