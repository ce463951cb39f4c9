"""Gradients behind a release: never NaN without a word, whichever way a layer is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.diffusers.processor import DPAttnProcessor

from ...hosts_tiny import LENGTH, latents, tiny_sd

TEXTS = ("a cat", "a dog under the moon")


@pytest.fixture
def pipe(private: dpx.DPXAttnConfig) -> Any:
    pipe = tiny_sd()
    yield pipe, dpx.protect(pipe, private, ledger=dpx.Ledger())
    dpx.unprotect(pipe)


def _layer(unet: Any) -> Any:
    return next(m for m in unet.modules() if isinstance(getattr(m, "processor", None), DPAttnProcessor))


def _gradient(run: Any, layer: Any, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the image's hidden states and of `to_q`."""
    torch.manual_seed(0)
    x = torch.randn(len(states), 6, layer.query_dim, requires_grad=True)
    run(x, encoder_hidden_states=states).square().sum().backward()
    assert x.grad is not None and layer.to_q.weight.grad is not None
    found = x.grad, layer.to_q.weight.grad.clone()
    layer.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True], ids=["private", "private and public"])
def test_of_a_compiled_layer(guided: bool, pipe: Any) -> None:
    """They are those of the gate's way, in which no NaN takes part."""
    pipe, handle = pipe
    states = handle.release(TEXTS[0]).inputs()["prompt_embeds"]
    if guided:
        states = torch.cat([torch.randn(states.shape), states])
    layer = _layer(pipe.unet)
    forward = handle.host.gate.read((latents(len(states)), torch.tensor(5), states), {})
    handle.host.gate.forwards.current = forward
    want = _gradient(layer, layer, states)
    handle.host.gate.forwards.current = None
    compiled = torch.compile(layer, backend="aot_eager")
    for run in (layer, compiled):
        for found, right in zip(_gradient(run, layer, states), want, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)  # sums in another order


def test_of_a_layer_that_is_run_again(pipe: Any) -> None:
    """Checkpoints of the user's own: with the release that was read last, and not with another one."""
    pipe, handle = pipe
    one, two = (handle.release(text).inputs()["prompt_embeds"] for text in TEXTS)
    block = pipe.unet.mid_block.attentions[0]
    plain = block.forward

    def again(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda h: plain(h, *args, **kwargs), hidden_states, use_reentrant=True)

    def loss(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = latents().requires_grad_()
        return x, pipe.unet(x, torch.tensor(5), states, return_dict=False)[0].square().mean()

    x, value = loss(one)
    value.backward()
    block.forward = again
    y, value = loss(one)
    value.backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-3, atol=1e-3)
    _, value = loss(one)
    with torch.no_grad():
        pipe.unet(latents(), torch.tensor(5), two)
    with pytest.raises(dpx.ProtectionLostError, match="from forward to backward"):
        value.backward()


def test_forward_runs_no_gate_and_answers_nothing(pipe: Any) -> None:
    """Hooks are not run by `.forward`: it raises, where it answered NaN."""
    unet = pipe[0].unet
    with torch.no_grad(), pytest.raises(dpx.ProtectionLostError, match=r"unet\.forward"):
        unet.forward(latents(), torch.tensor(5), torch.randn(1, LENGTH, 32))
