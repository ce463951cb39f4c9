"""LoRA through PEFT: an adapter takes part in what is released; one that changes later is noticed, and taking it away restores the fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx

from .calibrations import protect
from .tiny import generate, questions, tiny, tokens

peft = pytest.importorskip("peft")
HEAD = [1, 4]
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def add_lora(model: Any, name: str, adapter: str = "style") -> None:
    """An adapter with an effect (PEFT starts B at zero)."""
    settings = peft.LoraConfig(r=2, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2")
    model.add_adapter(settings, adapter_name=adapter)
    generator = torch.Generator().manual_seed(len(adapter))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{adapter}." in path and ".lora_" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.eval()


@pytest.mark.parametrize("name", list(TARGETS))
def test_an_adapter_before_the_release_takes_part(name: str, exact: dpx.DPXAttnConfig) -> None:
    """prefix [6], own tokens [2, 6]: with exact attention the answers are those of the plain model with the adapter, not without."""
    model, private = tiny(name), tokens(6)
    asked = questions()
    text = torch.cat([torch.tensor(HEAD), private]).expand(2, -1)
    whole = {
        "input_ids": torch.cat([text, asked["input_ids"][:1].expand(2, -1)], 1),
        "attention_mask": torch.ones(2, 14, dtype=torch.int64),
    }
    own = {"input_ids": asked["input_ids"][:1].expand(2, -1)}
    without = generate(model, whole, min_new_tokens=1)[1]
    add_lora(model, name)
    want = generate(model, whole, min_new_tokens=1)
    assert float((want[1][0] - without[0]).nan_to_num().abs().max()) > 1e-2
    handle = dpx.protect(model, exact)
    got = generate(
        model, handle.release(private, public_head=HEAD, prefix_bucket=6).inputs(**own), min_new_tokens=1
    )
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["load", "another", "disable"])
@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
def test_a_change_after_the_release_is_noticed(mechanism: str, how: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny("llama")
    if how != "load":
        add_lora(model, "llama")
    handle = protect(model, private.replace(mechanism=mechanism, unit="row"))
    release = handle.release(tokens(6), public_head=HEAD)
    inputs = release.inputs(**questions())
    if how == "load":
        add_lora(model, "llama")
    elif how == "another":
        add_lora(model, "llama", "second")
    else:
        model.disable_adapters()
    for call in (lambda: generate(model, inputs), lambda: release.inputs(**questions())):
        with pytest.raises(dpx.ReleaseError):
            call()
    with pytest.raises(dpx.BudgetExceededError):  # a new release would be a second one
        handle.release(tokens(6), public_head=HEAD)


def test_taking_the_adapter_away_restores_the_fit(private: dpx.DPXAttnConfig) -> None:
    model = tiny("llama")
    handle = protect(model, private.replace(mechanism="kernel_sum", unit="row"))
    release = handle.release(tokens(6), public_head=HEAD)
    before = generate(model, release.inputs(**questions()))[1]
    add_lora(model, "llama")
    model.disable_adapters()
    torch.testing.assert_close(
        generate(model, release.inputs(**questions()))[1], before, atol=1e-4, rtol=1e-4
    )
    assert [r["charges"] for r in handle.report().releases] == [1]
