"""What the probe finds, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_probing import find_layers, position_limit

from .tiny import BUILDERS, REFUSED, tiny


@pytest.mark.parametrize("name", BUILDERS)
def test_layers_are_found_in_order(name: str) -> None:
    model = tiny(name)
    layers = list(find_layers(model).values())
    assert len(layers) == 2
    channels = sum(a.heads * (a.key_dim + a.value_dim) for a in layers)
    assert all(a.channels == channels for a in layers)
    rows = torch.arange(3.0 * channels).view(1, 3, channels)
    parts = [t.transpose(1, 2).flatten(2) for a in layers for t in a.project(rows)]
    assert torch.equal(torch.cat(parts, dim=-1), rows)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_left_alone(name: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    before = {n: (m.training, m.__dict__.get("config")) for n, m in model.named_modules()}
    with pytest.raises(dpx.UnsupportedModelError, match=f"{type(model).__name__} cannot be protected"):
        dpx.protect(model, private)
    assert dpx.handle_of(model) is None and "generate" not in model.__dict__
    assert before == {n: (m.training, m.__dict__.get("config")) for n, m in model.named_modules()}


class Carrying(nn.Module):
    """A layer that carries earlier tokens on past the attention."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out + 0.1 * x.cumsum(dim=1)


def test_a_way_around_attention_is_found(private: dpx.DPXAttnConfig) -> None:
    model = tiny("llama")
    model.model.layers[0].mlp = Carrying(model.model.layers[0].mlp)
    with pytest.raises(dpx.UnsupportedModelError, match="something else carries them on"):
        dpx.protect(model, private)


def test_a_layer_with_code_of_its_own_is_found(private: dpx.DPXAttnConfig) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Own(LlamaAttention):
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            value = self.v_proj(hidden_states).repeat(1, 1, 2)
            return self.o_proj(value), None

    model = tiny("llama")
    model.model.layers[1].self_attn.__class__ = Own
    with pytest.raises(dpx.UnsupportedModelError, match="no attention layers"):
        dpx.protect(model, private)


def test_bodies_without_a_head_are_refused(private: dpx.DPXAttnConfig) -> None:
    with pytest.raises(dpx.UnsupportedModelError):
        dpx.protect(tiny("llama").model, private)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("llama", None), ("mistral_window", 256), ("gemma3", 256), ("gpt2", 512), ("qwen2", None)],
)
def test_how_many_positions_there_are(name: str, limit: int | None) -> None:
    assert position_limit(tiny(name)) == limit
