"""LoRA through PEFT: before a release it takes part, after it the release no longer fits, unloading restores the fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import ReleaseError

from ..hosts_tiny import CHANNELS, latents, picture, tiny_sd, tiny_unet

peft = pytest.importorskip("peft")
PROMPT = "a red circle"


def add_lora(
    unet: Any,
    name: str = "style",
    seed: int = 0,
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0"),
    dropout: float = 0.0,
) -> None:
    """An adapter with an effect (PEFT starts B at zero)."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), lora_dropout=dropout)
    unet.add_adapter(config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in unet.named_parameters():
            if f".{name}." in path and ".lora_" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    unet.eval()


def test_lora_before_the_release_takes_part(pipe: Any, exact: Any) -> None:
    without = picture(pipe, PROMPT)
    add_lora(pipe.unet)
    before = picture(pipe, PROMPT)
    assert float((before - without).abs().max()) > 1e-2
    dpx.protect(pipe, exact)
    assert torch.allclose(before, picture(pipe, PROMPT), atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_scale_of_one_call(scale: float, pipe: Any, exact: Any) -> None:
    """The picture of the unprotected pipeline at this scale; behind the call the weights are as before it."""
    add_lora(pipe.unet)
    full = picture(pipe, PROMPT)
    before = picture(pipe, PROMPT, cross_attention_kwargs={"scale": scale})
    assert float((before - full).abs().max()) > 1e-2
    dpx.protect(pipe, exact, budget=dpx.Budget(100.0, 1e-3))
    assert torch.allclose(full, picture(pipe, PROMPT), atol=1e-4)
    assert torch.allclose(before, picture(pipe, PROMPT, cross_attention_kwargs={"scale": scale}), atol=1e-4)
    assert torch.allclose(full, picture(pipe, PROMPT), atol=1e-4)


def test_a_release_serves_calls_of_its_scale_alone(pipe: Any, private: Any) -> None:
    add_lora(pipe.unet)
    inputs = dpx.protect(pipe, private).release(PROMPT).inputs()
    first = picture(pipe, **inputs)
    with pytest.raises(ReleaseError, match="LoRA"):
        picture(pipe, **inputs, cross_attention_kwargs={"scale": 0.3})
    assert torch.equal(first, picture(pipe, **inputs, cross_attention_kwargs={"scale": 1.0}))


@pytest.mark.parametrize("how", ["load", "fuse", "another", "scale", "delete"])
def test_lora_after_the_release_is_noticed(how: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    if how != "load":
        add_lora(pipe.unet)
    release = handle.release(PROMPT)
    inputs = release.inputs()
    if how == "load":
        add_lora(pipe.unet)
    elif how == "fuse":
        pipe.unet.fuse_lora(lora_scale=0.5)
    elif how == "another":
        add_lora(pipe.unet, "second", seed=1)
        pipe.unet.set_adapters(["second"])
    elif how == "scale":
        pipe.unet.set_adapters(["style"], weights=[0.3])
    else:
        pipe.unet.delete_adapters("style")
    for call in (lambda: picture(pipe, **inputs), release.inputs):
        with pytest.raises(ReleaseError, match="LoRA"):
            call()
    with pytest.raises(dpx.BudgetExceededError):  # a new release would be a second one
        picture(pipe, PROMPT)


def test_a_new_release_under_a_larger_budget_fits_again(pipe: Any, exact: Any) -> None:
    handle = dpx.protect(pipe, exact, budget=dpx.Budget(100.0, 1e-3))
    handle.release(PROMPT)
    add_lora(pipe.unet)
    with handle.public():
        before = picture(pipe, PROMPT)
    assert torch.allclose(before, picture(pipe, PROMPT), atol=1e-4)


@pytest.mark.parametrize("way", ["unload", "disable", "fuse and unfuse"])
def test_taking_the_lora_away_restores_the_fit(way: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    release = handle.release(PROMPT)
    before = picture(pipe, PROMPT)
    add_lora(pipe.unet)
    if way == "unload":
        pipe.unload_lora_weights()
    elif way == "disable":
        pipe.unet.disable_adapters()
    else:
        pipe.unet.fuse_lora()
        pipe.unet.unfuse_lora()
        pipe.unet.delete_adapters("style")
    assert torch.allclose(before, picture(pipe, **release.inputs()), atol=1e-3)
    assert torch.allclose(before, picture(pipe, PROMPT), atol=1e-3)
    assert len(handle.report().releases) == 1


def test_a_fused_adapter_is_the_same_model(pipe: Any, private: Any) -> None:
    """The fingerprint is of the effective weights, so fusing what was active changes nothing."""
    add_lora(pipe.unet)
    handle = dpx.protect(pipe, private)
    before = picture(pipe, PROMPT)
    pipe.unet.fuse_lora()
    assert torch.allclose(before, picture(pipe, PROMPT), atol=1e-3)
    assert len(handle.report().releases) == 1


def test_lora_on_other_layers_needs_no_new_release(pipe: Any, private: Any) -> None:
    """Queries and outputs are read afterwards: only to_k and to_v are part of a release."""
    handle = dpx.protect(pipe, private)
    before = picture(pipe, PROMPT)
    add_lora(pipe.unet, targets=("to_q", "to_out.0"))
    after = picture(pipe, PROMPT)
    assert bool(after.isfinite().all()) and not torch.allclose(before, after, atol=1e-3)
    assert len(handle.report().releases) == 1


def test_lora_files(private: Any, tmp_path: Any) -> None:
    """`load_lora_weights`, `fuse_lora`, `unload_lora_weights` of a pipeline."""
    donor = tiny_sd()
    add_lora(donor.unet)
    from peft.utils import get_peft_model_state_dict

    donor.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(donor.unet, adapter_name="style")
    )
    pipe = tiny_sd()
    handle = dpx.protect(pipe, private)
    first = handle.release(PROMPT)
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(ReleaseError):
        first.inputs()
    second = handle.release("another")
    picture(pipe, **second.inputs())
    pipe.fuse_lora()
    picture(pipe, **second.inputs())
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    picture(pipe, **first.inputs())
    with pytest.raises(ReleaseError):
        second.inputs()


def test_unprotect_with_a_lora_that_was_loaded_meanwhile(pipe: Any, private: Any) -> None:
    reference = tiny_sd()
    add_lora(reference.unet)
    dpx.protect(pipe, private)
    add_lora(pipe.unet)
    dpx.unprotect(pipe)
    assert torch.equal(picture(reference, PROMPT), picture(pipe, PROMPT))


@pytest.mark.parametrize("kind", ["LoHa", "IA3"])
def test_adapters_that_are_not_in_the_table_are_refused(kind: str, private: Any) -> None:
    """They are not proven to act on each row alone."""
    unet = tiny_unet()
    handle = dpx.protect(unet, private)
    config = {
        "LoHa": peft.LoHaConfig(r=2, target_modules=["to_k"]),
        "IA3": peft.IA3Config(target_modules=["to_k"], feedforward_modules=[]),
    }
    peft.inject_adapter_in_model(config[kind], unet)
    with pytest.raises(dpx.ProtectionLostError, match="LoRA"):
        handle.release(torch.randn(16, CHANNELS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_cast_is_the_same_model(dtype: torch.dtype, private: Any, tmp_path: Any) -> None:
    """A release that was made in single precision serves a host in another one; a host of another seed is refused."""
    unet = tiny_unet()
    dpx.protect(unet, private).release(torch.randn(16, CHANNELS)).save_pretrained(tmp_path)
    cast = tiny_unet().to(dtype)
    release = dpx.Release.from_pretrained(tmp_path, host=cast)
    assert bool(cast(latents(1, dtype), 5, **release.inputs()).sample.isfinite().all())
    with pytest.raises(ReleaseError, match="weights"):
        dpx.Release.from_pretrained(tmp_path, host=tiny_unet(1).to(dtype))


@pytest.mark.parametrize("size", [0.002, 0.02, 0.2])
def test_how_small_a_change_is_noticed(size: float, private: Any) -> None:
    """A relative change of the keys' weights by 0.2 % is."""
    unet = tiny_unet()
    handle = dpx.protect(unet, private)
    release = handle.release(torch.randn(16, CHANNELS))
    weight = next(iter(handle.layers.values())).module.to_k.weight
    with torch.no_grad():
        noise = torch.randn(weight.shape)
        weight += noise * (size * weight.norm() / noise.norm())
    with pytest.raises(ReleaseError):
        release.inputs()
