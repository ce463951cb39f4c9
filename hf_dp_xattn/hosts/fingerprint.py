"""A public sketch of the projections that a release was made with, to tell whether a host still fits it.

Each layer's `to_k` and `to_v` are applied to fixed random signs and the result is projected to 16 x 16 numbers (Johnson-Lindenstrauss):
the relative distance of two sketches is that of the effective weights, LoRA included. Unlike a hash, this forgives what does not matter
(the rounding of a cast to float16, an adapter that was fused or fused and unfused) and sees what does (another adapter, another model).
Nothing about privacy rests on it: a release is post-processed by whatever reads it. It prevents pictures that mean nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

SIZE = 16
# relative distance that rounding alone may cause, by the coarser of the two dtypes
TOLERANCE = {"bfloat16": 8e-3}
DEFAULT_TOLERANCE = 1.5e-3
FAR = 0.5  # beyond it the weights have little in common: another model, not an adapter (unrelated weights are at about 1.4)


@lru_cache(maxsize=64)
def signs(purpose: str, length: int) -> torch.Tensor:
    """[SIZE, length] of +-1 from SHAKE-256: the same for ever, on every machine."""
    raw = hashlib.shake_256(f"hf_dp_xattn fingerprint {purpose} {length}".encode()).digest(SIZE * length)
    return (torch.frombuffer(bytearray(raw), dtype=torch.uint8) & 1).to(torch.float32).reshape(
        SIZE, length
    ) * 2 - 1


@dataclass(frozen=True)
class Fingerprint:
    """layers: (name, heads, channels in, channels out). sketch: [L, 2, SIZE, SIZE] float32. dtype: of the weights."""

    layers: tuple[tuple[str, int, int, int], ...]
    sketch: torch.Tensor
    dtype: str

    def difference(self, other: Fingerprint, tolerance: float | None = None) -> str | None:
        """What differs, in words, or None when both fit one release.

        tolerance: relative distance that is forgiven in each layer; by default what rounding alone may cause.
        """
        if self.layers != other.layers:
            return "its cross-attention layers have other names or shapes"
        if tolerance is None:
            tolerance = max(TOLERANCE.get(d, DEFAULT_TOLERANCE) for d in (self.dtype, other.dtype))
        norm = self.sketch.double().square().sum((-1, -2)).sqrt().clamp_min(1e-12)
        distance = (self.sketch.double() - other.sketch.double()).square().sum((-1, -2)).sqrt() / norm
        worst = float(distance.max())
        if not math.isfinite(worst) or worst > tolerance:
            where = int(distance.amax(-1).argmax())
            return f"the weights of {self.layers[where][0]} differ (an adapter was loaded, removed or scaled, or it is another model)"
        return None

    def same(self, other: Fingerprint) -> bool:
        """Nothing has changed since: not the weights, by as little as their sketch shows, nor their dtype."""
        return (self.layers, self.dtype) == (other.layers, other.dtype) and torch.equal(
            self.sketch, other.sketch
        )


def _sketch(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    base: Any = getattr(module, "base_layer", module)
    device = next(module.parameters()).device
    probe = signs("in", base.in_features).to(torch.device("cpu") if device.type == "meta" else device, dtype)
    out = module(probe.unsqueeze(0))[0].to("cpu", torch.float32)
    return out @ signs("out", base.out_features).mT / base.out_features**0.5


@torch.no_grad()
def fingerprint(layers: dict[str, Attention], dtype: torch.dtype) -> Fingerprint:
    """The sketch of the layers as they are now. Costs sixteen rows through each projection."""
    return Fingerprint(
        layers=tuple((n, a.heads, a.cross_attention_dim, a.inner_dim) for n, a in layers.items()),
        sketch=torch.stack(
            [torch.stack([_sketch(a.to_k, dtype), _sketch(a.to_v, dtype)]) for a in layers.values()]
        ),
        dtype=str(dtype).removeprefix("torch."),
    )


def stamp(roots: Iterable[nn.Module]) -> tuple[object, ...]:
    """Changes whenever these modules' weights do by ordinary means: another parameter, a write to one, an adapter's scale, switch or merge.

    Without arithmetic or synchronisation, so that it can be taken at every step, where `fingerprint` cannot.
    """
    modules = [m for root in roots for m in root.modules()]
    weights = [w for m in modules for w in m._parameters.values() if w is not None]
    adapters = [m.__dict__ for m in modules if isinstance(m.__dict__.get("scaling"), dict)]
    return (
        *((id(w), w.data_ptr(), w._version) for w in weights),
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
