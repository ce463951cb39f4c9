"""Everything of a host that a protection could touch, so that what is left behind afterwards can be named."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def snapshot(host: Any, modules: dict[str, torch.nn.Module]) -> dict[str, Any]:
    """Weights by digest, attributes and hooks by identity; compare with `differences` while the host is alive."""
    state: dict[str, Any] = {}
    if not isinstance(host, torch.nn.Module):
        state |= {f"attribute {k}": v for k, v in vars(host).items()}
    for name, model in modules.items():
        for path, tensor in model.state_dict().items():
            state[f"weight {name}.{path}"] = _digest(tensor)
        for path, module in model.named_modules():
            where = f"{name}.{path}"
            for key, value in vars(module).items():
                if key.endswith(("_hooks", "_with_kwargs")) or key in ("_parameters", "_buffers", "_modules"):
                    state[f"{where} {key}"] = tuple((k, id(v)) for k, v in value.items())
                elif not key.startswith("_") or key == "_forward_hooks":
                    state[f"{where} {key}"] = value
            state[f"{where} names"] = frozenset(vars(module))
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What changed, by name."""
    changed = [k for k, v in before.items() if k not in after or not _same(v, after[k])]
    return changed + [k for k in after if k not in before]


def _digest(tensor: torch.Tensor) -> str:
    if tensor.device.type == "meta":
        return "meta"
    raw = (
        tensor.detach().cpu().contiguous().view(torch.uint8)
        if tensor.ndim
        else tensor.detach().cpu().reshape(1)
    )
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.blake2b(raw.numpy().tobytes()).hexdigest()}"


def _same(a: Any, b: Any) -> bool:
    plain = (str, int, float, bool, tuple, frozenset, set, list)
    return a is b or (type(a) is type(b) and isinstance(a, plain) and a == b)
