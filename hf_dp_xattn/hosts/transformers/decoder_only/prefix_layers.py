"""Layers of a decoder-only model, and their context space.

*Context space.* A row is one position's keys and values of ALL layers side by side, as the layers' attention sees them: after rotary
embedding. A layer "projects" a row by taking its own part. Keys are taken after the rotation, because a prefix has few, bounded and
public positions (they start at the head's length and end before the padded length), and because only then is a decoded row read by
ordinary dot products, in every architecture: learned positions, partial and scaled rotations alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ....mechanisms.base import LayerSpec
from ...fingerprint import SIZE, Fingerprint, signs
from ...layer import Layer
from ..routing import routed
from .prefix_attention import NAME, Recording, Seen, recording

_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
PROBE_STEP = 7  # of the token ids that a fingerprint is made of; never change it: it is in saved releases


@dataclass(frozen=True, eq=False)
class PrefixLayer(Layer):
    """An attention module and its part of a row. heads: of keys and values; key_dim, value_dim: of one head; start: where its part begins.

    config: the module's own, which names the host's own attention. channels: of a whole row.
    """

    name: str
    module: nn.Module
    config: Any
    heads: int
    query_heads: int
    key_dim: int
    value_dim: int
    scale: float
    softcap: float | None
    start: int
    channels: int
    computes: ClassVar[bool] = False  # it cuts rows, without arithmetic

    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, H, n, d] and values [B, H, n, dv] of rows [B, n, C]."""
        batch, n, _ = rows.shape
        middle = self.start + self.inner_dim
        key = rows[..., self.start : middle].reshape(batch, n, self.heads, self.key_dim)
        value = rows[..., middle : middle + self.heads * self.value_dim]
        return key.transpose(1, 2), value.reshape(batch, n, self.heads, self.value_dim).transpose(1, 2)

    def spec(self, dtype: torch.dtype) -> LayerSpec:
        """Its public shape. The weights are left out: rotated keys are no linear map of a row that one matrix describes."""
        return LayerSpec(self.name, self.heads, self.key_dim, self.value_dim, self.scale)

    @torch.no_grad()
    def output_gain(self) -> torch.Tensor:
        """[H] mean squared gain from a key head's output channel to the module's output; ones where its last projection is not known."""
        width = self.query_heads * self.value_dim
        for name in _OUTPUTS:
            module: Any = getattr(self.module, name, None)
            module = getattr(module, "base_layer", module)
            if type(module) is nn.Linear and module.in_features == width:
                weight = module.weight
            elif type(module) is Conv1D and module.weight.shape[0] == width:
                weight = module.weight.mT
            else:
                continue
            squares = weight.detach().to("cpu", torch.float64).square().sum(0)
            return squares.reshape(self.heads, -1).mean(1)
        return torch.ones(self.heads, dtype=torch.float64)


def make_layers(modules: Sequence[tuple[str, nn.Module, Any, Seen]]) -> dict[str, PrefixLayer]:
    """The layers of (name, module, its own config, what it was seen to hand over), in this order."""
    channels = sum(s.key.shape[1] * (s.key.shape[-1] + s.value.shape[-1]) for *_, s in modules)
    layers, start = {}, 0
    for name, module, config, seen in modules:
        heads, key_dim, value_dim = seen.key.shape[1], seen.key.shape[-1], seen.value.shape[-1]
        layers[name] = PrefixLayer(
            name,
            module,
            config,
            heads,
            seen.query.shape[1],
            key_dim,
            value_dim,
            seen.scale,
            seen.softcap,
            start,
            channels,
        )
        start += heads * (key_dim + value_dim)
    return layers


def device_of(model: Any) -> torch.device:
    """Where the model computes. Of weights that accelerate offloads nothing but their hooks tells it; "meta": nothing does."""
    device = torch.device(model.device)
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = module.__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            where = getattr(one, "execution_device", None)
            if where is not None and torch.device(where).type != "meta":
                return torch.device(where)
    return device


def run_recorded(
    model: Any, layers: dict[str, PrefixLayer], ids: torch.Tensor, **arguments: Any
) -> list[Seen]:
    """What each layer handed to its attention, in a run of the model's body over token ids [B, n] with the host's own attention."""
    state = Recording({layer.module: layer.config for layer in layers.values()})
    with routed(state.configs, NAME), recording(state):
        ids = ids.to(device_of(model))
        # else some models warn, once, of a text that begins or ends with padding
        model.base_model(
            input_ids=ids, use_cache=False, **{"attention_mask": torch.ones_like(ids), **arguments}
        )
    return [state.seen[module] for module in state.configs]


def rows_of(seen: Sequence[Seen]) -> torch.Tensor:
    """[B, n, C]: the rows of context space."""
    parts = [t.transpose(1, 2).flatten(2) for s in seen for t in (s.key, s.value)]
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def prefix_fingerprint(model: Any, layers: dict[str, PrefixLayer]) -> Fingerprint:
    """Sketches of each layer's keys and values of fixed public tokens: they show a change of any weight below, adapters included.

    They carry the rounding of all layers below as well, which `Fingerprint.difference` allows for.
    """
    size = model.get_input_embeddings().num_embeddings
    ids = (1 + PROBE_STEP * torch.arange(SIZE)) % size
    sketches = []
    for seen in run_recorded(model, layers, ids.unsqueeze(0)):
        flat = [t[0].transpose(0, 1).flatten(1).to("cpu", torch.float32) for t in (seen.key, seen.value)]
        sketches.append(torch.stack([f @ signs("out", f.shape[1]).mT / f.shape[1] ** 0.5 for f in flat]))
    return Fingerprint(
        tuple(layer.shape for layer in layers.values()),
        torch.stack(sketches),
        str(model.dtype).removeprefix("torch."),
        running=True,
    )
