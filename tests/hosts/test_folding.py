"""Rows that are folded into a layer's projections give what the layer gives with them, and only where nothing else stands between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.folding import fold
from hf_dp_xattn.hosts.processor import DPAttnProcessor
from hf_dp_xattn.hosts.rows import split_heads
from hf_dp_xattn.mechanisms.rows_structure import RowsStructure

from ..hosts_tiny import CHANNELS, tiny_unet
from .anchor_calibrations import CONFIG, calibration_for

MANY = 10_000  # queries: any folding has paid by then


def layer(channels: int = 96, heads: int = 4, dim: int = 24, bias: bool = False, **options: Any) -> Attention:
    torch.manual_seed(0)
    attn = Attention(channels, CHANNELS, heads=heads, dim_head=dim, bias=bias, **options)
    return attn.eval().requires_grad_(False)


def rows(
    batch: int, count: int, heads: int = 4, dim: int = 24, dtype: torch.dtype = torch.float32
) -> RowsStructure:
    """The last element of the batch is padded by half."""
    gen = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, batch, heads, count, dim, generator=gen).to(dtype)
    bias = torch.randn(batch, 1, 1, count, generator=gen).to(dtype)
    bias[-1, ..., count - count // 2 :] = -torch.inf
    return RowsStructure(key, value, bias, dim**-0.5)


def naive(attn: Attention, structure: RowsStructure, hidden: torch.Tensor) -> torch.Tensor:
    read = structure.attend(split_heads(attn.to_q(hidden), attn.heads))
    return attn.to_out[0](read.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("batch", "count", "queries"), [(1, 8, 5), (2, 16, 64), (3, 8, 1)], ids=str)
def test_it_is_the_layer_with_these_rows(batch: int, count: int, queries: int, bias: bool) -> None:
    attn, structure = layer(bias=bias), rows(batch, count)
    hidden = torch.randn(batch, queries, 96, generator=torch.Generator().manual_seed(2))
    folded = fold(attn, structure, MANY)
    assert folded is not None
    torch.testing.assert_close(folded.attend(hidden), naive(attn, structure, hidden), rtol=1e-5, atol=1e-5)


def hooked(attn: Attention) -> Attention:
    attn.to_q.register_forward_hook(lambda *a: None)
    return attn


def replaced(attn: Attention) -> Attention:
    """As accelerate does: the instance has a forward of its own."""
    attn.to_out[0].forward = attn.to_out[0].forward
    return attn


def adapted(attn: Attention) -> Attention:
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), attn)


REFUSED: dict[str, Callable[[], tuple[Attention, RowsStructure, int]]] = {
    "more rows than it is wide": lambda: (layer(), rows(2, 32), MANY),
    "few queries": lambda: (layer(), rows(2, 16), 1),
    "half precision": lambda: (layer().half(), rows(2, 8, dtype=torch.float16), MANY),
    "other precision than the rows": lambda: (layer().double(), rows(2, 8), MANY),
    "a norm of queries": lambda: (layer(qk_norm="layer_norm"), rows(2, 8), MANY),
    "a hook": lambda: (hooked(layer()), rows(2, 8), MANY),
    "a forward of its own": lambda: (replaced(layer()), rows(2, 8), MANY),
    "an adapter": lambda: (adapted(layer()), rows(2, 8), MANY),
}


@pytest.mark.parametrize("why", REFUSED)
def test_else_it_is_left_alone(why: str) -> None:
    assert fold(*REFUSED[why]()) is None


WIDE = {
    "block_out_channels": (8, 640),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "cross_attention_dim": CHANNELS,
}


def draw(unet: Any, states: torch.Tensor, size: int = 16) -> torch.Tensor:
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return unet(torch.randn(2, 4, size, size, generator=gen), 5, encoder_hidden_states=states).sample


def test_a_host_folds_at_the_first_step_and_again_when_weights_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unet = tiny_unet(**WIDE)
    public = torch.randn(1, 16, CHANNELS, generator=torch.Generator().manual_seed(4))
    with dpx.protect(unet, CONFIG, calibration=calibration_for(unet)) as handle:
        release = handle.release(torch.randn(16, CHANNELS, generator=torch.Generator().manual_seed(5)))
        states = torch.cat([public, release.inputs()["encoder_hidden_states"]])

        def both() -> tuple[torch.Tensor, torch.Tensor]:
            """With folding and without."""
            with monkeypatch.context() as patch:
                patch.setattr("hf_dp_xattn.hosts.processor.fold", lambda *a: None)
                apart = draw(unet, states.clone())
            return draw(unet, states), apart

        first, apart = both()
        processors = [p for p in unet.attn_processors.values() if isinstance(p, DPAttnProcessor)]
        assert any(p.folded is not None for p in processors)
        torch.testing.assert_close(first, apart, rtol=1e-4, atol=1e-5)
        assert torch.equal(draw(unet, states), first)
        with torch.no_grad():
            for attn in handle.layers.values():
                attn.to_q.weight.mul_(3.0)
        later, apart = both()
        torch.testing.assert_close(later, apart, rtol=1e-4, atol=1e-5)
        assert float((later - first).abs().max()) > 1e-3
        with torch.no_grad():
            for attn in handle.layers.values():
                attn.to_out[0].weight.mul_(0.5)
        last, apart = both()
        torch.testing.assert_close(last, apart, rtol=1e-4, atol=1e-5)
        assert float((last - later).abs().max()) > 1e-3


def folding_host() -> tuple[Any, Any, torch.Tensor]:
    """(UNet, handle, states) after a first step that folded."""
    unet = tiny_unet(**WIDE)
    handle = dpx.protect(unet, CONFIG, calibration=calibration_for(unet))
    release = handle.release(torch.randn(16, CHANNELS, generator=torch.Generator().manual_seed(5)))
    public = torch.randn(1, 16, CHANNELS, generator=torch.Generator().manual_seed(4))
    states = torch.cat([public, release.inputs()["encoder_hidden_states"]])
    draw(unet, states)
    return unet, handle, states


def test_a_hook_that_comes_later_is_called() -> None:
    unet, handle, states = folding_host()
    called: list[str] = []
    for name, attn in handle.layers.items():
        attn.to_q.register_forward_hook(lambda *a, name=name: called.append(name))
    draw(unet, states)
    assert sorted(called) == sorted(handle.layers)


@pytest.mark.parametrize("begin", ["inside", "outside"])
def test_autocast_is_not_folded(begin: str) -> None:
    unet, _, states = folding_host()
    processors = [p for p in unet.attn_processors.values() if isinstance(p, DPAttnProcessor)]
    exact = draw(unet, states)
    assert any(p.folded is not None for p in processors)
    if begin == "inside":
        states = states.clone()
    with torch.autocast("cpu", torch.bfloat16):
        inside = draw(unet, states)
    assert all(p.folded is None for p in processors)
    assert bool(inside.isfinite().all()) and not torch.equal(inside.float(), exact)
    torch.testing.assert_close(draw(unet, states), exact, rtol=1e-4, atol=1e-5)


def test_a_picture_of_few_queries_does_not_decide_for_a_larger_one() -> None:
    unet, _, states = folding_host()
    processors = [p for p in unet.attn_processors.values() if isinstance(p, DPAttnProcessor)]
    twin = states.clone()
    draw(unet, twin, size=2)
    assert all(p.folded is None for p in processors)
    draw(unet, twin)
    assert any(p.folded is not None for p in processors)


def test_inference_mode_and_gradients_are_not_folded() -> None:
    unet, _, states = folding_host()
    processors = [p for p in unet.attn_processors.values() if isinstance(p, DPAttnProcessor)]
    with torch.inference_mode():
        twin = states.clone()
        first = draw(unet, twin)
    assert all(p.folded is None for p in processors)
    torch.testing.assert_close(first, draw(unet, states), rtol=1e-4, atol=1e-5)
    sample = torch.zeros(2, 4, 16, 16, requires_grad=True)
    unet(sample, 5, encoder_hidden_states=states.clone()).sample.sum().backward()
    assert bool(sample.grad.isfinite().all()) and all(p.folded is None for p in processors)
