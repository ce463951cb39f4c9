"""A public sketch of the projections that a release was made with, to tell whether a host still fits it.

Each layer's `to_k` and `to_v` are applied to fixed random signs and the result is projected to 16 x 16 numbers (Johnson-Lindenstrauss):
the relative distance of two sketches is that of the effective weights, LoRA included. (A decoder-only model's sketches are of the keys and
values of fixed tokens, `prefix_layers.prefix_fingerprint`.) Unlike a hash, this forgives what does not matter
(the rounding of a cast to float16, an adapter that was fused or fused and unfused) and sees what does (another adapter, another model).
Nothing about privacy rests on it: a release is post-processed by whatever reads it. It prevents pictures that mean nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import ConfigError
from .private_run import private_run

SIZE = 16
# relative distance that rounding alone may cause in one projection, by the coarser of the two dtypes
TOLERANCE = {"bfloat16": 8e-3}
DEFAULT_TOLERANCE = 1.5e-3
# Activations (a prefix's keys and values) carry the rounding of all layers below, which adds up like a random walk: layer l, counted from
# 1, is forgiven DEPTH * roundoff * sqrt(l). Measured against float32, in units of roundoff * sqrt(l), the worst layer is at 1.8 in bfloat16
# and 1.2 in float16 for the trained chat example (4 layers), at up to 1.4 for random Llamas of 16 to 64 layers, and at up to 2.4 for the
# tiny models of the tests, whose weights are six times too large; 32 such layers are at 3.1 and 3.8. So the margin is 2.2 for a trained
# model. Single precision counts as float16: its products may be computed in TF32, which rounds as float16 does.
DEPTH = 4.0
ROUNDOFF = {"bfloat16": 2**-8}
DEFAULT_ROUNDOFF = 2**-11
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
    """layers: (name, heads, channels in, channels out). sketch: [L, 2, SIZE, SIZE] float32. dtype: of the weights.

    running: the sketches are of activations, in the order in which the layers run, and not of each projection by itself. Not saved: the
    host that a saved fingerprint is compared with knows it.
    """

    layers: tuple[tuple[str, int, int, int], ...]
    sketch: torch.Tensor
    dtype: str
    running: bool = False

    def difference(self, other: Fingerprint, tolerance: float | None = None) -> str | None:
        """What differs from `other`, the host as it is now, in words; or None when both fit one release.

        tolerance: relative distance that is forgiven in each layer; by default what rounding alone may cause.
        """
        if self.layers != other.layers:
            return "its cross-attention layers have other names or shapes"
        norm = self.sketch.double().square().sum((-1, -2)).sqrt().clamp_min(1e-12)
        distance = (self.sketch.double() - other.sketch.double()).square().sum((-1, -2)).sqrt() / norm
        worst = distance.amax(-1)
        allowed = self._rounding(other) if tolerance is None else torch.full_like(worst, tolerance)
        if bool((worst.isfinite() & (worst <= allowed)).all()):
            return None
        where = int((worst / allowed).nan_to_num(nan=math.inf).argmax())
        reason, others = f"the weights of {self.layers[where][0]} differ", "it is another model"
        if tolerance is None and self.dtype != other.dtype:
            return (
                f"{reason} by {float(worst[where]):.2%}, more than the {float(allowed[where]):.2%} that is put down to rounding (made in "
                f"{self.dtype}, this model is {other.dtype}: cast it back; or an adapter was loaded, removed or scaled, or {others})"
            )
        return f"{reason} (an adapter was loaded, removed or scaled, or {others})"

    def _rounding(self, other: Fingerprint) -> torch.Tensor:
        """[L] float64: the relative distance of each layer that the coarser of both dtypes may cause."""
        dtypes, count = (self.dtype, other.dtype), len(self.layers)
        if not (self.running or other.running):
            flat = max(TOLERANCE.get(d, DEFAULT_TOLERANCE) for d in dtypes)
            return torch.full((count,), flat, dtype=torch.float64)
        roundoff = max(ROUNDOFF.get(d, DEFAULT_ROUNDOFF) for d in dtypes)
        return DEPTH * roundoff * torch.arange(1, count + 1, dtype=torch.float64).sqrt()

    def same(self, other: Fingerprint) -> bool:
        """Nothing has changed since: not the weights, by as little as their sketch shows, nor their dtype."""
        return (self.layers, self.dtype) == (other.layers, other.dtype) and torch.equal(
            self.sketch, other.sketch
        )


def sketch_map(
    apply: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    module: nn.Module,
    channels: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[k, SIZE, SIZE] float32 CPU: k linear maps of rows [1, n, channels] to [1, n, ...], made by `apply` where `module` is."""
    device = next(module.parameters()).device
    if device.type == "meta" and not any(hasattr(part, "_hf_hook") for part in module.modules()):
        raise ConfigError("The host's weights are gone (on meta). Load them again; nothing was spent.")
    probe = signs("in", channels).to(torch.device("cpu") if device.type == "meta" else device, dtype)
    with torch.autocast(probe.device.type, enabled=False):
        outs = [out[0] for out in apply(probe.unsqueeze(0))]
    with torch.autocast("cpu", enabled=False):
        return torch.stack(
            [
                out.to("cpu", torch.float32) @ signs("out", out.shape[-1]).mT / out.shape[-1] ** 0.5
                for out in outs
            ]
        )


def sketch_of(modules: Sequence[nn.Module], dtype: torch.dtype) -> torch.Tensor:
    """[k, SIZE, SIZE] float32 CPU: k linear layers as they act, their adapters included."""

    def sketched(module: nn.Module) -> torch.Tensor:
        base: Any = getattr(module, "base_layer", module)
        # without the module's own hooks: users watch their model by them, and this is no call of it
        return sketch_map(lambda rows: [module.forward(rows)], module, base.in_features, dtype)

    return torch.cat([sketched(module) for module in modules])


class Sketching(Protocol):
    """A layer whose keys and values are linear maps of a row."""

    @property
    def shape(self) -> tuple[str, int, int, int]: ...
    def parts(self) -> list[nn.Module]: ...
    def sketch(self, dtype: torch.dtype) -> torch.Tensor:
        """[2, SIZE, SIZE]: of keys and of values, as the layer is now."""
        ...


@torch.no_grad()
def fingerprint(layers: Iterable[Sketching], dtype: torch.dtype) -> Fingerprint:
    """The sketch of the layers as they are now. Costs sixteen rows through each projection."""
    layers = list(layers)
    with private_run(*(part for layer in layers for part in layer.parts())):
        # dropout of an adapter is no change of it
        sketches = [layer.sketch(dtype) for layer in layers]
    return Fingerprint(
        layers=tuple(layer.shape for layer in layers),
        sketch=torch.stack(sketches),
        dtype=str(dtype).removeprefix("torch."),
    )
