"""Changes of weights that torch does not count: a fused optimiser's step, and what is written to a parameter's `.data` (an EMA put in).

Both leave `_version` and the address as they were, so no stamp shows them. Steps of torch's optimisers are counted here, which is cheap and
shows at the next forward; whatever else was written shows in the weights themselves, which are summed at each release and call of a host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

COLUMNS = 1021  # a prime, so that rows of a weight that change places fall into other columns
_steps: Any = WeakIdKeyDictionary()


@lru_cache(maxsize=1)
def _count_steps() -> None:
    """From now on, in this process."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def count(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    _steps[weight] = _steps.get(weight, 0) + 1

    register_optimizer_step_post_hook(count)


def steps_of(weight: torch.Tensor) -> int:
    """How many steps of optimisers this weight has been in since the first question."""
    _count_steps()
    return int(_steps.get(weight, 0)) if len(_steps) else 0


def is_away(roots: Iterable[nn.Module]) -> bool:
    """Whether weights are offloaded (on meta), where neither a stamp nor a sum shows them."""
    return any(w.device.type == "meta" for root in roots for w in root.parameters())


@torch.no_grad()
def checksum(roots: Iterable[nn.Module]) -> bytes:
    """Of all weights of these modules, bit by bit: exact integer sums, without a call of any of them. Reads each weight once, in place."""
    parts: dict[torch.device, list[torch.Tensor]] = {}
    for root in roots:
        for weight in root.parameters():
            for plain in _plain(weight.detach()):
                parts.setdefault(plain.device, []).extend(_sums(plain))
    digest = hashlib.blake2b(digest_size=16)
    for device in sorted(parts, key=str):
        digest.update(torch.cat(parts[device]).cpu().numpy().tobytes())
    return digest.digest()


def _plain(weight: Any) -> Iterator[torch.Tensor]:
    """What a weight is made of, where it is a tensor of tensors (quantised, sharded); nothing of what is empty or offloaded."""
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _plain(getattr(weight, name))
    elif weight.numel() and weight.device.type != "meta":
        yield weight


def _sums(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = weight.contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()  # eight bytes are read as one number
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(torch.int64)
    full = len(words) // COLUMNS * COLUMNS
    if full:
        yield words[:full].view(-1, COLUMNS).sum(0)
    yield words[full:]
    yield flat[whole:].to(torch.int64)


class WeightWatch:
    """Counts the changes of some modules' weights between one look and the next."""

    def __init__(self) -> None:
        self.changes = 0
        self._known: bytes | None = None

    def look(self, roots: Iterable[nn.Module]) -> None:
        now = checksum(roots)
        if now != self._known:
            self.changes, self._known = self.changes + 1, now
