"""Which models are supported is found out by a probe; what it cannot prove is refused, and left as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.transformers.encoder_decoder.cross_probing import find_layers

from .table import table
from .tiny import BUILDERS, REFUSED, tiny


@pytest.mark.parametrize("name", BUILDERS)
def test_all_cross_attention_layers_are_found_and_nothing_changes(name: str) -> None:
    model = tiny(name).train()
    before = {n: (id(m), id(getattr(m, "config", None)), m.training) for n, m in model.named_modules()}
    random = torch.get_rng_state()
    layers = find_layers(model)
    assert before == {
        n: (id(m), id(getattr(m, "config", None)), m.training) for n, m in model.named_modules()
    }
    assert torch.equal(random, torch.get_rng_state())
    assert len(layers) == (1 if name == "bert2bert_wider" else 2)
    for layer in layers.values():
        rows = torch.randn(1, 5, layer.channels)
        key, value = layer.project(rows)
        assert key.shape == value.shape == (1, layer.heads, 5, layer.inner_dim // layer.heads)
        assert bool(key.abs().amax(dim=(0, 1, 2)).gt(0).all())  # padding is cut off


@pytest.mark.parametrize("name", REFUSED)
def test_hard_coded_attention_is_refused_by_name(name: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    with pytest.raises(dpx.UnsupportedModelError, match=rf"{type(model).__name__} cannot be protected"):
        dpx.protect(model, private)


class Reader(nn.Module):
    """A layer's feed-forward part that also looks at the document, past cross-attention."""

    def __init__(self, inner: nn.Module, model: Any, strength: float) -> None:
        super().__init__()
        self.inner, self.strength, self.seen = inner, strength, [0.0]
        model.get_decoder().register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: Any) -> None:
        self.seen[0] = kwargs["encoder_hidden_states"].mean()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.strength * self.seen[0]


def test_a_way_around_cross_attention_is_found(private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart")
    layer = model.model.decoder.layers[0]
    layer.fc1 = Reader(layer.fc1, model, 1e-6)
    with pytest.raises(dpx.UnsupportedModelError, match="past the attention interface"):
        dpx.protect(model, private)


def test_a_layer_with_code_of_its_own_is_found(private: dpx.DPXAttnConfig, monkeypatch: Any) -> None:
    from transformers.models.bart.modeling_bart import BartAttention, eager_attention_forward

    model = tiny("bart")
    layer = model.model.decoder.layers[1].encoder_attn

    class Own(BartAttention):
        def forward(self, hidden_states: Any, key_value_states: Any = None, **kwargs: Any) -> Any:
            q, k, v = (
                f(x).unflatten(-1, (2, 8)).transpose(1, 2)
                for f, x in (
                    (self.q_proj, hidden_states),
                    (self.k_proj, key_value_states),
                    (self.v_proj, key_value_states),
                )
            )
            out = eager_attention_forward(self, q, k, v, None, scaling=self.scaling)[0]
            return self.out_proj(out.flatten(2)), None

    layer.__class__ = Own
    with pytest.raises(dpx.UnsupportedModelError):
        dpx.protect(model, private)


class Mixing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.mean(dim=1, keepdim=True)


def test_projections_that_mix_rows_are_refused(private: dpx.DPXAttnConfig) -> None:
    model = tiny("t5")
    attention = model.decoder.block[0].layer[1].EncDecAttention
    attention.k = copy.deepcopy(attention.k)
    attention.k.__class__ = Mixing
    with pytest.raises(dpx.UnsupportedModelError, match="mix"):
        dpx.protect(model, private)


def test_decoders_and_encoders_alone_are_refused(private: dpx.DPXAttnConfig) -> None:
    for part in (tiny("bart").model, tiny("bart").get_encoder()):
        with pytest.raises(dpx.UnsupportedModelError):
            dpx.protect(part, private)


def test_the_page_says_what_the_probe_finds() -> None:
    page = Path(__file__).parents[4] / "docs" / "hosts.md"
    assert page.read_text() == table(), (
        "run python -m tests.hosts.transformers.encoder_decoder.table > docs/hosts.md"
    )
