"""Texts for models of transformers, by their tokenizers; private and public ones are read alike."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import ConfigError, ContextError
from ..diffusers.text_side import without_length_warning
from .decoder_only.chat import SplitChat, split_chat


def tokenize(tokenizer: Any, text: str) -> tuple[torch.Tensor, int]:
    """ids [1, n], and how many of them at the start the tokenizer puts before every text (BOS), told by a public text: a private one may
    begin with the same token.

    Raises:
        ContextError: more tokens than the model takes.
    """
    with without_length_warning(tokenizer):
        ids = tokenizer([text], return_tensors="pt").input_ids
    if ids.shape[1] > tokenizer.model_max_length:
        raise ContextError("A text has more tokens than the model takes; nothing was spent.")
    return ids, _public_start(tokenizer)


@functools.lru_cache(maxsize=1)
def _public_start(tokenizer: Any) -> int:
    return int(
        tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    )


@functools.lru_cache(maxsize=1)
def _public_end(tokenizer: Any) -> int:
    """How many tokens the tokenizer puts behind every text."""
    bare = len(tokenizer("a", add_special_tokens=False).input_ids)
    return max(0, len(tokenizer("a").input_ids) - bare - _public_start(tokenizer))


def _open_ended(tokenizer: Any, text: str) -> tuple[torch.Tensor, int]:
    """As `tokenize`, without what is put behind every text: an end token there would end the conversation."""
    ids, start = tokenize(tokenizer, text)
    return ids[:, : ids.shape[1] - _public_end(tokenizer)], start


def plain_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """ids [n] without special tokens."""
    with without_length_warning(tokenizer):
        ids = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class PrefixText:
    """head [h]: PUBLIC ids. context: private ids [n], or those of each segment."""

    head: torch.Tensor = field(repr=False)
    context: torch.Tensor | list[torch.Tensor] = field(repr=False)


def read_prefix(tokenizer: Any, text: str | Sequence[str], *, chat: bool) -> PrefixText:
    """A decoder-only model's prefix: of one text, or of segments that are encoded apart.

    Raises:
        ConfigError: no chat template, or one that cannot be split. ContextError: a text that does not fit. Neither quotes the text.
    """
    apart = not isinstance(text, str)
    if chat:
        split = _split(tokenizer, "\n".join(text) if apart else str(text), "-")
        return PrefixText(split.head, list(split.segments) if apart else split.private)
    if apart:
        ids, start = _open_ended(tokenizer, text[0])
        return PrefixText(ids[0, :start], [plain_ids(tokenizer, segment) for segment in text])
    ids, start = _open_ended(tokenizer, str(text))
    return PrefixText(ids[0, :start], ids[0, start:])


def without_system(tokenizer: Any, text: str, *, chat: bool) -> torch.Tensor:
    """ids [n] of a PUBLIC user's turn with nothing before it but what the model has by itself."""
    if not chat:
        return torch.cat([plain_head(tokenizer), read_question(tokenizer, text, chat=False)[0]])
    filled = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return plain_ids(tokenizer, filled)


def plain_head(tokenizer: Any) -> torch.Tensor:
    """ids [h] that stand before a prefix without a chat template, PUBLIC: BOS, or none."""
    return read_prefix(tokenizer, "a", chat=False).head


def chat_head(tokenizer: Any) -> torch.Tensor:
    """ids [h] that the chat template puts before a system prompt, PUBLIC. Raises as `read_prefix` does."""
    return read_prefix(tokenizer, "a", chat=True).head


def read_question(tokenizer: Any, text: str, *, chat: bool) -> torch.Tensor:
    """A PUBLIC user's turn as it stands after the prefix, ids [1, m]; with chat, in the template's words.

    Raises:
        ConfigError: it spells the end token; or as `read_prefix` does.
    """
    end = tokenizer.eos_token
    if end and end in text:  # the model would take the words behind it for another text
        raise ConfigError(f"The public text holds {end!r}, which ends a text for this model: leave it out.")
    if chat:
        return _split(tokenizer, "-", text).input_ids
    ids, start = _open_ended(tokenizer, text)
    return ids[:, start:]  # BOS stands before the prefix


def _split(tokenizer: Any, system: str, user: str) -> SplitChat:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            "--chat needs a tokenizer with a chat template, and the one beside the model has none."
        )
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return split_chat(tokenizer, messages)


def read_documents(tokenizer: Any, documents: Sequence[str]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [d, L] of an encoder's documents.

    Raises:
        ContextError: a document of more tokens than the model takes.
    """
    rows = [tokenize(tokenizer, document)[0][0] for document in documents]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()}
