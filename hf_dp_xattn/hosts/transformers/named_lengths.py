"""Lengths that a model's configuration names: where its attention may change, so that a probe must look beyond them.

Which number of a configuration is a window, a block or a number of kept tokens is not known for every architecture, so every number that
could be one is taken for one: a probe looks beyond all that it can afford, and what it cannot afford and whose name says that it is a
length is a limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from torch import nn

SEVERAL = 320  # positions that every probe looks at, at least
MOST = 1088  # positions that none goes beyond: attention maps grow with their square
BEYOND = 33  # positions behind a named length, so that what changes there has a weight
_WORK = 1e11  # products of a probe's forward beyond `SEVERAL` positions: about a second
_LENGTH = re.compile(
    r"window|chunk|block|keep|top_?k|_len|positions$|distance|memory|compress|segment|span|stride"
)
# what is known to be none: numbers of layers; and how long texts were in training, where positions are rotations that do not change with it
# (those that do are refused, tables of learned positions are found by their weights)
_NONE = (
    "max_window_layers",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window_pattern",
)
# what hosts know better: whether any layer uses them stands elsewhere in the configuration
_KNOWN = ("sliding_window", "attention_chunk_size")


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Every whole number in a configuration, by the name that it stands under."""

    def walk(name: str, value: Any) -> Iterator[tuple[str, int]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(str(key), inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                yield from walk(name, inner)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield name, value

    yield from walk("", config.to_dict())


def _lengths(config: Any) -> list[int]:
    """The numbers whose names say that they are lengths, and the products of two of them: so many blocks of such a size."""
    named = {(n, v) for n, v in _numbers(config) if n not in (*_NONE, *_KNOWN) and _LENGTH.search(n)}
    products = [a * b for (n, a), (m, b) in combinations(sorted(named), 2) if n != m]
    return [v for _, v in named] + products


def longest(part: nn.Module) -> int | None:
    """How many tokens an encoder or decoder with a table of positions takes; None where there is no such table."""
    named = ((n, m) for n, m in part.named_modules() if isinstance(m, nn.Embedding))
    tables = [m for n, m in named if "position" in n or n.endswith("wpe")]
    limit: int | None = getattr(getattr(part, "config", None), "max_position_embeddings", None)
    if not tables or limit is None:
        return None
    # RoBERTa's: the first token's position is the one behind the padding's
    first = max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
    return limit - first if any(m.num_embeddings == limit for m in tables) else limit


def rotations(config: Any) -> set[str]:
    """The kinds of rotary embedding that a config names, for all layers or for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    return {str(p.get("rope_type", p.get("type"))) for p in parts}


def affordable(parameters: int) -> int:
    """Positions that a probe of a model of so many parameters may run over."""
    return int(min(MOST, max(SEVERAL, _WORK / (2 * max(1, parameters)))))


def probed_length(config: Any, parameters: int) -> int:
    """How many positions a probe runs over: several hundred, and beyond every number of the configuration that it can afford."""
    most = affordable(parameters)
    named = [v + BEYOND for v in (*(v for _, v in _numbers(config)), *_lengths(config)) if v + BEYOND <= most]
    return max(SEVERAL, *named) if named else SEVERAL


def unprobed_length(config: Any, parameters: int) -> int | None:
    """The smallest length that the configuration names and a probe of `probed_length` does not go beyond; None where there is none."""
    length = probed_length(config, parameters)
    return min((v for v in _lengths(config) if v >= length), default=None)
