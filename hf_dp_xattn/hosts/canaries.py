"""Texts that stand in for private ones: random words of the tokenizer's own vocabulary, public by construction."""

from __future__ import annotations

import random
from typing import Any

import torch

from ..errors import ConfigError

WORDS = 4  # of a canary
_LONG = 3  # letters of a word that is preferred


def vocabulary(tokenizer: Any) -> list[str]:
    """Words that are one token each, in a fixed order; letters where a vocabulary has no words."""
    special = set(tokenizer.all_special_tokens)
    marks = str.maketrans("", "", "\u0120\u2581")  # what BPE and SentencePiece write for a space
    plain = {t.translate(marks).removesuffix("</w>") for t in tokenizer.get_vocab() if t not in special}
    letters = sorted(t for t in plain if t.isascii() and t.isalpha() and t.islower())
    words = [t for t in letters if len(t) >= _LONG]
    usable = words if len(words) >= 4 * WORDS else letters
    if len(usable) < 2:
        raise ConfigError("No canaries can be made of this tokenizer's vocabulary; give texts of your own.")
    return usable


def texts(tokenizer: Any, count: int, seed: int = 0) -> list[str]:
    """`count` texts of different token ids, of words that repeat in none of them where there are enough.

    Raises:
        ConfigError: the vocabulary does not give so many.
    """
    words, draw = vocabulary(tokenizer), random.Random(seed)
    draw.shuffle(words)
    distinct: dict[tuple[int, ...], str] = {}
    for i in range(20 * count):
        start = i * WORDS
        fresh = start + WORDS <= len(words)
        text = " ".join(words[start : start + WORDS] if fresh else draw.choices(words, k=WORDS))
        distinct.setdefault(tuple(tokenizer(text, add_special_tokens=False).input_ids), text)
        if len(distinct) == count:
            return list(distinct.values())
    raise ConfigError("This tokenizer's vocabulary gives too few different canaries; give texts of your own.")


def random_ids(model: Any, count: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    """`count` sequences [length] of token ids of a model without a tokenizer, no token twice where there are enough."""
    size = int(model.get_input_embeddings().num_embeddings)
    low = min(16, size // 4)  # special tokens mostly come first
    generator = torch.Generator().manual_seed(seed)
    order = low + torch.randperm(size - low, generator=generator)
    while len(order) < count * length:
        order = torch.cat([order, low + torch.randperm(size - low, generator=generator)])
    return list(order[: count * length].view(count, length))
