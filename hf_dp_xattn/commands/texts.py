"""Texts for models of transformers, by the tokenizer beside the model; private and public ones are read alike."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import ConfigError, ContextError
from ..records import records_of
from .models import load_tokenizer

if TYPE_CHECKING:
    import torch

    from ..hosts.transformers.decoder_only.chat import SplitChat

LINES = """\
With --unit group a text for a transformers model has one segment (decoder-only) or document (encoder-decoder) on each line; empty lines are
left out. A line ends at a line feed (LF, or CR LF) and at nothing else. Each is encoded apart from the others, so that the promise for one
of them holds end to end.
"""


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what a text is to a decoder-only model."""
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="decoder-only models: the private text is the content of the system message, and what the tokenizer's chat template puts "
        "before it is public; a release that was made so is also read so (default: with --mechanism library, where there is a template)",
    )
    parser.add_argument(
        "--prefix-bucket",
        type=int,
        metavar="N",
        help="decoder-only models: positions that the private text (with --unit group: each segment) takes, public (default: the next "
        "multiple of 64)",
    )


lines_of = records_of  # the segments or documents of a text


def tokenize(name: str, text: str) -> tuple[torch.Tensor, int]:
    """ids [1, n], and how many of them at the start the tokenizer puts before every text (BOS), told by a public text: a private one may
    begin with the same token.

    Raises:
        ContextError: more tokens than the model takes.
    """
    from ..hosts.diffusers.text_side import without_length_warning

    tokenizer = load_tokenizer(name)
    with without_length_warning(tokenizer):
        ids = tokenizer([text], return_tensors="pt").input_ids
    if ids.shape[1] > tokenizer.model_max_length:
        raise ContextError("A text has more tokens than the model takes; nothing was spent.")
    return ids, _public_start(name)


@functools.lru_cache(maxsize=1)
def _public_start(name: str) -> int:
    tokenizer = load_tokenizer(name)
    return int(
        tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    )


@functools.lru_cache(maxsize=1)
def _public_end(name: str) -> int:
    """How many tokens the tokenizer puts behind every text."""
    tokenizer = load_tokenizer(name)
    bare = len(tokenizer("a", add_special_tokens=False).input_ids)
    return max(0, len(tokenizer("a").input_ids) - bare - _public_start(name))


def _open_ended(name: str, text: str) -> tuple[torch.Tensor, int]:
    """As `tokenize`, without what is put behind every text: an end token there would end the conversation."""
    ids, start = tokenize(name, text)
    return ids[:, : ids.shape[1] - _public_end(name)], start


def _refuse_end(name: str, text: str) -> None:
    """Raises ConfigError where a PUBLIC text spells the end token: the model would take the words behind it for another text."""
    end = load_tokenizer(name).eos_token
    if end and end in text:
        raise ConfigError(f"The public text holds {end!r}, which ends a text for this model: leave it out.")


def plain_ids(name: str, text: str) -> torch.Tensor:
    """ids [n] without special tokens."""
    import torch

    from ..hosts.diffusers.text_side import without_length_warning

    tokenizer = load_tokenizer(name)
    with without_length_warning(tokenizer):
        ids = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class PrefixText:
    """head [h]: PUBLIC ids. context: private ids [n], or those of each segment."""

    head: torch.Tensor = field(repr=False)
    context: torch.Tensor | list[torch.Tensor] = field(repr=False)


def read_prefix(name: str, text: str | Sequence[str], *, chat: bool) -> PrefixText:
    """A decoder-only model's prefix: of one text, or of segments that are encoded apart.

    Raises:
        ConfigError: no chat template, or one that cannot be split. ContextError: a text that does not fit. Neither quotes the text.
    """
    apart = not isinstance(text, str)
    if chat:
        split = _split(name, "\n".join(text) if apart else str(text), "-")
        return PrefixText(split.head, list(split.segments) if apart else split.private)
    if apart:
        ids, start = _open_ended(name, text[0])
        return PrefixText(ids[0, :start], [plain_ids(name, segment) for segment in text])
    ids, start = _open_ended(name, str(text))
    return PrefixText(ids[0, :start], ids[0, start:])


def has_template(name: str) -> bool:
    """Whether the tokenizer beside a model has a chat template."""
    return bool(getattr(load_tokenizer(name), "chat_template", None))


def without_system(name: str, text: str, *, chat: bool) -> torch.Tensor:
    """ids [n] of a PUBLIC user's turn with nothing before it but what the model has by itself."""
    import torch

    if not chat:
        return torch.cat([plain_head(name), read_question(name, text, chat=False)[0]])
    filled = load_tokenizer(name).apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return plain_ids(name, filled)


def plain_head(name: str) -> torch.Tensor:
    """ids [h] that stand before a prefix without a chat template, PUBLIC: BOS, or none."""
    return read_prefix(name, "a", chat=False).head


def chat_head(name: str) -> torch.Tensor:
    """ids [h] that the chat template puts before a system prompt, PUBLIC. Raises as `read_prefix` does."""
    return read_prefix(name, "a", chat=True).head


def read_question(name: str, text: str, *, chat: bool) -> torch.Tensor:
    """A PUBLIC user's turn as it stands after the prefix, ids [1, m]; with chat, in the template's words.

    Raises:
        ConfigError: it spells the end token; or as `read_prefix` does.
    """
    _refuse_end(name, text)
    if chat:
        return _split(name, "-", text).input_ids
    ids, start = _open_ended(name, text)
    return ids[:, start:]  # BOS stands before the prefix


def _split(name: str, system: str, user: str) -> SplitChat:
    from ..hosts.diffusers.text_side import without_length_warning
    from ..hosts.transformers.decoder_only.chat import split_chat

    tokenizer = load_tokenizer(name)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            "--chat needs a tokenizer with a chat template, and the one beside the model has none."
        )
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        with without_length_warning(tokenizer):
            return split_chat(tokenizer, messages)
    except (ConfigError, ContextError):
        raise
    except Exception as error:  # of the template; its message may quote the text
        raise ContextError(
            f"The chat template fails on a system and a user's message ({type(error).__name__}); nothing was spent."
        ) from None


def read_documents(name: str, documents: Sequence[str]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [d, L] of an encoder's documents.

    Raises:
        ContextError: a document of more tokens than the model takes.
    """
    import torch

    rows = [tokenize(name, document)[0][0] for document in documents]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()}
