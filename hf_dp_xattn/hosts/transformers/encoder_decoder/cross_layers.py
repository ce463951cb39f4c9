"""One cross-attention layer of an encoder-decoder model.

Keys and values are computed by running the module itself as its host does, and taking what it hands to the attention function: fused
projections, biases, norms, adapters and padding take part, whatever the architecture calls them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ....errors import UnsupportedModelError
from ....mechanisms.base import LayerSpec
from ...fingerprint import sketch_map
from ...layer import Layer, linear_map
from ..routing import routed
from .cross_attention import NAME, Capture, capturing, scale_of

_SIGNS = 16


@dataclass(frozen=True)
class Invocation:
    """How the host calls a module: its arguments, without tensors, and where hidden states and encoder states stand."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: int | str
    states: int | str
    width: int  # channels of the hidden states

    def fill(self, hidden: torch.Tensor, states: torch.Tensor) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = list(self.args)
        kwargs = dict(self.kwargs)
        for where, tensor in ((self.hidden, hidden), (self.states, states)):
            if isinstance(where, int):
                args[where] = tensor
            else:
                kwargs[where] = tensor
        return args, kwargs


class CrossLayer(Layer):
    """A cross-attention module, and how to get from rows of the encoder's output to its keys and values.

    Channels of a head are without `padding` (zero channels that a host appends). bridge: what makes its context of the encoder's output.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        invocation: Invocation,
        bridge: nn.Module | None,
        channels: int,
    ) -> None:
        self.name, self.module, self.bridge = name, module, bridge
        self.channels = channels
        self._invocation = invocation
        self.padding = int(getattr(module, "head_dim_padding", 0) or 0)
        parameter = next(module.parameters())
        seen = self._run(parameter.new_zeros(1, 1, invocation.width), parameter.new_zeros(1, 1, channels))
        assert seen.query is not None and seen.key is not None and seen.value is not None
        self.query_heads, self.heads = seen.query.shape[1], seen.key.shape[1]
        self.scale, self.softcap = scale_of(seen), seen.softcap
        width = seen.key.shape[-1] - self.padding
        if seen.value.shape[-1] - self.padding != width or self.query_heads % self.heads:
            raise UnsupportedModelError(
                f"{name} has values of another width than keys, or odd numbers of heads."
            )
        self.key_dim = self.value_dim = width

    def parts(self) -> list[nn.Module]:
        return [self.module] if self.bridge is None else [self.module, self.bridge]

    def sketch(self, dtype: torch.dtype) -> torch.Tensor:
        """See `fingerprint.Sketching`."""
        return sketch_map(
            lambda rows: [_joined(states) for states in self.project(rows)], self.module, self.channels, dtype
        )

    def spec(self, dtype: torch.dtype) -> LayerSpec:
        width = self._invocation.width * (self.query_heads // self.heads)
        key = linear_map(lambda rows: _joined(self.project(rows)[0]), self.module, self.channels, dtype)
        query = linear_map(lambda rows: _joined(self._queries(rows)), self.module, width, dtype)
        weights = (w.reshape(self.heads, -1, w.shape[-1]) for w in (query, key))
        return LayerSpec(self.name, self.heads, self.key_dim, self.value_dim, self.scale, *weights)

    def _run(self, hidden: torch.Tensor, states: torch.Tensor) -> Capture:
        return self._call(hidden, states)[0]

    def _call(
        self, hidden: torch.Tensor, states: torch.Tensor, answer: torch.Tensor | None = None
    ) -> tuple[Capture, torch.Tensor]:
        """What the module hands to its attention function, and what it makes of the answer."""
        args, kwargs = self._invocation.fill(hidden, states if self.bridge is None else self.bridge(states))
        with capturing(Capture(self.module, answer=answer)) as capture, routed([self.module], NAME):
            # its forward alone: users' hooks on it are for the host's own calls
            out = self.module.forward(*args, **kwargs)
        if capture.calls != 1:
            raise UnsupportedModelError(f"{self.name} does not call the attention interface once.")
        return capture, out[0] if isinstance(out, tuple) else out

    def _cut(self, states: torch.Tensor) -> torch.Tensor:
        return states[..., : states.shape[-1] - self.padding]

    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, n, d] of rows [B, n, C] of the encoder's output."""
        capture = self._run(rows.new_zeros(len(rows), 1, self._invocation.width), rows)
        assert capture.key is not None and capture.value is not None
        return self._cut(capture.key), self._cut(capture.value)

    @torch.no_grad()
    def output_gain(self) -> torch.Tensor:
        """[H] mean squared gain from a key head's output channel to the module's output, estimated with random signs."""
        groups, width = self.query_heads // self.heads, self.key_dim
        like = next(self.module.parameters())
        hidden = like.new_zeros(1, _SIGNS, self._invocation.width)
        states = like.new_zeros(1, 1, self.channels)
        base = self._call(hidden, states)[1]
        generator = torch.Generator().manual_seed(0)
        gains = []
        for head in range(self.heads):
            answer = torch.zeros(1, self.query_heads, _SIGNS, width + self.padding)
            signs = answer[:, head * groups : (head + 1) * groups, :, :width]
            signs.copy_(torch.randint(0, 2, signs.shape, generator=generator) * 2.0 - 1.0)
            change = (self._call(hidden, states, answer)[1] - base).double().square().sum()
            gains.append(change / (_SIGNS * groups * width))
        return torch.stack(gains).cpu()

    def _queries(self, rows: torch.Tensor) -> torch.Tensor:
        """[1, H, n, d] of inputs [1, n, g C] side by side, one block of channels for each query head that shares a key head.

        Reads as a linear map: its product with itself is the sum over those heads, which is what geometry from weights needs.
        """
        groups = self.query_heads // self.heads
        total: Any = 0
        for g, block in enumerate(rows.split(self._invocation.width, dim=-1)):
            capture = self._run(block, rows.new_zeros(1, 1, self.channels))
            assert capture.query is not None
            total = total + self._cut(capture.query)[:, g::groups]
        return total


def _joined(states: torch.Tensor) -> torch.Tensor:
    """[B, H, n, d] -> [B, n, H * d]."""
    return states.transpose(1, 2).flatten(2)


def rowwise_reason(module: nn.Module) -> str | None:
    """Why a row's key and value may depend on other rows, or None.

    Linear layers, norms over channels, and PEFT's LoRA act on each row alone; quantised ones may scale by a whole tensor's maximum.
    """
    for name, part in module.named_modules():
        if next(part.parameters(recurse=False), None) is None:
            if hasattr(part, "base_layer") and type(part).__module__ != "peft.tuners.lora.layer":
                return f"{type(part).__name__} is an adapter that is not in the table (PEFT's LoRA is)"
            continue
        if any(type(p) not in (nn.Parameter, torch.Tensor) for p in part.parameters(recurse=False)):
            return f"the weights of {name} are of a kind that may mix rows (quantised?)"
        if not (type(part) in (nn.Linear, Conv1D) or type(part).__name__.endswith("Norm")):
            return f"it holds {type(part).__name__} ({name}), which may mix rows"
    return None
