"""A caller's callback within a call of a pipeline: it may do no more than outside of one, and puts no other embeddings into the call."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from ...errors import ConfigError

_EMBEDDED = re.compile(
    r"(?!neg|image|ip_adapter|w_emb).*(embed|hidden_states|pooled|text_mask|attention_mask).*"
)
"""What a callback may be given, and give back, that was made of a prompt."""
RETURNED = (
    "The callback put other values in `{name}` than the pipeline gave it. They may hold private text, which would be read exactly: a "
    "callback may hand back whole batch elements of what it was given, and nothing else. Only if they are public, call the pipeline inside "
    "`with protected.public():`."
)


def close_callbacks(
    arguments: dict[str, Any], more: str | None, apart: Callable[[], AbstractContextManager[None]]
) -> None:
    """In place, in the arguments of a call, and in those that it takes as `**kwargs` (the old `callback` is one).

    Args:
        arguments: by name.
        more: the name under which further ones stand.
        apart: what a callback runs within.
    """
    for name, value in arguments.items():
        if isinstance(value, dict) and name == more:
            arguments[name] = {**value}
            close_callbacks(arguments[name], more, apart)
        elif "callback" in name and callable(value):
            arguments[name] = closed(value, apart)


def closed(
    callback: Callable[..., Any], apart: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    """A callback that runs within `apart`.

    Raises:
        ConfigError: at its call, where it changed what was made of a prompt.
    """
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    def run(*args: Any, **kwargs: Any) -> Any:
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, dict)), None)
        if given is None:  # the old kind, of whose result nothing is read
            with apart():
                callback(*args, **kwargs)
            return None
        kept = {n: t for n, t in given.items() if _EMBEDDED.fullmatch(n) and isinstance(t, torch.Tensor)}
        shown = {n: t.clone() for n, t in kept.items()}  # who holds them may change them when he likes
        given.update(shown)
        with apart():
            result = callback(*args, **kwargs)
        _chosen(kept, shown)
        if not isinstance(result, Mapping):
            raise ConfigError(f"A callback must give back a dict, got {type(result).__name__}.")
        return {**result, **_chosen(kept, result)}

    if not isinstance(callback, (MultiPipelineCallbacks, PipelineCallback)):
        return run
    kind = type(callback)  # diffusers asks for the class of its own kinds, and reads their attributes
    made = copy.copy(callback)
    made.__class__ = type(
        kind.__name__, (kind,), {"__call__": lambda _, *args, **kwargs: run(*args, **kwargs)}
    )
    return made


def _chosen(kept: Mapping[str, torch.Tensor], now: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """The tensors that were kept, or of each those batch elements that a callback chose. Raises ConfigError where it put in others."""
    chosen = {}
    for name, value in now.items():
        if value is None or not _EMBEDDED.fullmatch(str(name)):
            continue
        known = kept.get(name)
        order = None if known is None or type(value) is not torch.Tensor else _order(value, known)
        if known is None or order is None:
            raise ConfigError(RETURNED.format(name=name))
        chosen[name] = known if order == list(range(len(known))) else known[order]
    return chosen


def _order(value: torch.Tensor, known: torch.Tensor) -> list[int] | None:
    """Which batch element of another tensor each one is, bit for bit; None where one is of none."""
    if value.dtype != known.dtype or value.shape[1:] != known.shape[1:] or value.device != known.device:
        return None
    found = [
        next((i for i, other in enumerate(known) if _same(one, other)), None)
        if at >= len(known) or not _same(one, known[at])
        else at
        for at, one in enumerate(value)
    ]
    return None if None in found else [i for i in found if i is not None]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: a placeholder holds NaN."""
    return torch.equal(*(t.detach().contiguous().view(torch.uint8) for t in (one, other)))
