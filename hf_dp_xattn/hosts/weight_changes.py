"""Changes of weights that torch does not count: a fused optimiser's step, and what is written to a parameter's `.data` (an EMA put in).

Both leave `_version` and the address as they were, so no stamp shows them. Steps of torch's optimisers are counted here, which is cheap and
shows at the next forward; whatever else was written shows in the weights themselves, which are summed at each release and call of a host.

Buffers are public weights too: those that are saved, and the frequencies of rotary positions. Not what a forward itself changes with the
length of a text (tables of positions that grow, rotations by length): whether that has changed would tell of the text.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ProtectionLostError

COLUMNS = 1021  # a prime, so that rows of a weight that change places fall into other columns
_BY_LENGTH = ("dynamic", "longrope")  # kinds of rotation whose frequencies each forward sets
_steps: Any = WeakIdKeyDictionary()
_OF_A_CALL = {"adapter_names", "alora_offsets"}  # what PEFT's hooks are partial functions of
OTHER_ADAPTERS = (
    "Adapters that are chosen for one call (PEFT's adapter_names, aLoRA) are not supported beside a release, which is made with the "
    "weights of all calls. Set the adapter before (model.set_adapter), and call once for each adapter with a release of its own. Nothing "
    "was run."
)


@lru_cache(maxsize=1)
def _count_steps() -> None:
    """From now on, in this process."""

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


def by_length(module: nn.Module) -> bool:
    """Whether each forward sets this module's rotary frequencies."""
    return any(kind in str(module.__dict__.get("rope_type", "")) for kind in _BY_LENGTH)


def fixed_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Its own buffers that are public weights, see above."""

    def rotary(name: str) -> bool:
        return name.endswith("inv_freq") and (name.endswith("original_inv_freq") or not by_length(module))

    passing = module._non_persistent_buffers_set
    return [(n, b) for n, b in module._buffers.items() if b is not None and (n not in passing or rotary(n))]


def own_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Its own parameters and fixed buffers, but for empty ones."""
    named = (*module._parameters.items(), *fixed_buffers(module))
    return {name: tensor for name, tensor in named if tensor is not None and tensor.numel()}


def leaves(root: nn.Module) -> list[tuple[str, nn.Module, dict[str, torch.Tensor]]]:
    """The modules with weights of their own, by name; a linear layer with its adapters is one."""
    modules, inside = [], None
    for name, module in root.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        weights = own_weights(module)
        linear = isinstance(getattr(module, "base_layer", module), nn.Linear)
        inside = f"{name}." if linear else None
        if linear or weights or hasattr(module, "base_layer"):
            modules.append((name, module, weights))
    return modules


def refuse_call_adapters(roots: Iterable[nn.Module]) -> None:
    """Raises ProtectionLostError where hooks of PEFT choose other adapters for the call that is running.

    They are removed, as PEFT does only where a call succeeds: the next call would run with them too.
    """
    adapters = [
        (module, key)
        for root in roots
        for module in root.modules()
        for key, hook in module._forward_pre_hooks.items()
        if getattr(hook, "keywords", {}).keys() & _OF_A_CALL
    ]
    for module, key in adapters:
        module._forward_pre_hooks.pop(key, None)
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    if adapters:
        raise ProtectionLostError(OTHER_ADAPTERS)


def is_away(roots: Iterable[nn.Module]) -> bool:
    """Whether weights are offloaded (on meta), where neither a stamp nor a sum shows them."""
    return any(w.device.type == "meta" for root in roots for w in root.parameters())


@torch.no_grad()
def checksum(roots: Iterable[nn.Module]) -> bytes:
    """Of all weights and fixed buffers of these modules, bit by bit: exact integer sums, without a call of any of them. Reads each once, in
    place."""
    parts: dict[torch.device, list[torch.Tensor]] = {}
    for root in roots:
        for weight in _weights(root):
            for plain in _plain(weight.detach()):
                parts.setdefault(plain.device, []).extend(_sums(plain))
    digest = hashlib.blake2b(digest_size=16)
    for device in sorted(parts, key=str):
        digest.update(torch.cat(parts[device]).cpu().numpy().tobytes())
    return digest.digest()


def _weights(root: nn.Module) -> Iterator[torch.Tensor]:
    yield from root.parameters()
    for module in root.modules():
        yield from (buffer for _, buffer in fixed_buffers(module))


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


def written(roots: Sequence[nn.Module]) -> object:
    """Equal as long as nothing was written to these modules' weights.

    Counted writes too: between two looks one may take back what the last look saw, and an uncounted one bring it again.
    """
    return checksum(roots), [(id(w), w._version) for root in roots for w in _weights(root)]


class Stamp:
    """things: living objects. values: of them. Equal to one of the same objects with equal values; an address would say less: the next
    object may be put where the last one was."""

    __slots__ = ("_things", "_values")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, things: Iterable[object], values: tuple[object, ...]) -> None:
        self._things, self._values = [weakref.ref(thing) for thing in things], values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stamp) or self._values != other._values:
            return False
        pairs = [(a(), b()) for a, b in zip(self._things, other._things, strict=False)]
        return len(self._things) == len(other._things) and all(a is not None and a is b for a, b in pairs)


def stamp(roots: Iterable[nn.Module]) -> Stamp:
    """Changes whenever these modules' weights do by ordinary means: another parameter or fixed buffer, a write to one, an optimiser's
    step, an adapter's scale, switch or merge, another rotation. (A write to a parameter's `.data` in place is not seen:
    `checksum` shows it.)

    Without arithmetic or synchronisation, so that it can be taken at every step, where `fingerprint` cannot.
    """
    modules = [m for root in roots for m in root.modules()]
    weights = [w for m in modules for w in m._parameters.values() if w is not None]
    buffers = [b for m in modules if m._buffers for _, b in fixed_buffers(m)]
    rotations = [m for m in modules if "rope_type" in m.__dict__]
    adapters = [m.__dict__ for m in modules if isinstance(m.__dict__.get("scaling"), dict)]
    values = (
        *((w.data_ptr(), w._version, steps_of(w)) for w in weights),
        *((b.data_ptr(), b._version) for b in buffers),
        *((str(m.rope_type), _scaling(m)) for m in rotations),
        *(
            (
                tuple(a["scaling"].items()),
                str(a.get("_active_adapter")),
                a.get("_disable_adapters"),
                str(a.get("merged_adapters")),
            )
            for a in adapters
        ),
    )
    return Stamp((*weights, *buffers, *rotations), values)


def _scaling(rotation: nn.Module) -> object:
    """The factors of a rotation, for all layers or for each type of layer."""
    state = rotation.__dict__
    return () if by_length(rotation) else [(k, state[k]) for k in state if k.endswith("attention_scaling")]
