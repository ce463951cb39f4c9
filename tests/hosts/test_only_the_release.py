"""Invariant 1: with the release held fixed, nothing else of a private context reaches the host. Each check catches a planted leak."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts import releases as releases_module
from hf_dp_xattn.hosts.diffusers.processor import DPAttnProcessor
from hf_dp_xattn.hosts.placeholder import CODE_CHANNELS

from ..hosts_tiny import CHANNELS, latents, picture, tiny_img2img, tiny_inpaint, tiny_sd
from .anchor_calibrations import BOTH, protect

PROMPTS = ("a red circle", "sixteen green stars")
HOSTS = {
    "text2img": tiny_sd,
    "img2img": tiny_img2img,
    "inpaint": tiny_inpaint,
    "unet": lambda: tiny_sd().unet,
}


def draw(host: Any, handle: Any, context: Any) -> torch.Tensor:
    """The host's output for a private context, by the ordinary way of using it."""
    image = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    extra: dict[str, Any] = {}
    if not hasattr(host, "unet"):
        return host(latents(), 5, **handle.release(context).inputs()).sample
    if "Img2Img" in type(host).__name__ or "Inpaint" in type(host).__name__:
        extra = {"image": image, "strength": 1.0}
    if "Inpaint" in type(host).__name__:
        extra |= {"mask_image": torch.ones(1, 1, 16, 16), "height": 16, "width": 16}
    return picture(host, context, negative_prompt="ugly", **extra)


def contexts_of(host: Any) -> tuple[Any, Any]:
    if hasattr(host, "unet"):
        return PROMPTS
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, CHANNELS, generator=generator), torch.randn(16, CHANNELS, generator=generator)


def hold_the_release_fixed(handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every context gets what the first one released: what differs afterwards did not come through the release."""
    original, first = releases_module.Releases.run, []

    def fixed(self: Any, *args: Any) -> Any:
        result = original(self, *args)  # so that any way past the release would run
        first.append(result)
        return dataclasses.replace(result, structures=first[0].structures, context=first[0].context)

    monkeypatch.setattr(releases_module.Releases, "run", fixed)


def check_equal_outputs(host: Any, handle: Any) -> None:
    a, b = (draw(host, handle, c) for c in contexts_of(host))
    assert bool(a.isfinite().all())
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("mechanism", ["none", "kernel_sum", "dptree", "anchors"])
def test_outputs_depend_on_the_release_alone(
    kind: str, mechanism: str, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = HOSTS[kind]()
    handle = protect(host, private.replace(mechanism=mechanism))
    hold_the_release_fixed(handle, monkeypatch)
    check_equal_outputs(host, handle)


def plant_raw_rows(host: Any, handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last context's rows are kept aside and one layer reads them."""
    kept: list[torch.Tensor] = []
    recipe = type(handle.guard.prepare(handle.guard.fingerprint()))
    run = recipe.run

    def keep(self: Any, rows: torch.Tensor, *rest: Any) -> Any:
        kept.append(rows)
        return run(self, rows, *rest)

    original = DPAttnProcessor._attend

    def leaky(self: Any, *given: Any) -> torch.Tensor:
        out = original(self, *given)
        return out + 1e-3 * kept[-1][:, 0].mean().to(out.dtype)

    monkeypatch.setattr(recipe, "run", keep)
    monkeypatch.setattr(DPAttnProcessor, "_attend", leaky)


def plant_private_first_row(host: Any, handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row that passes as public is taken from the private encoding (a row that does depend on the prompt)."""
    text = handle.host._patches[0].text

    def leaky(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        rows = text.encode(ids, mask)
        return rows[1:], rows[-1:]

    monkeypatch.setattr(text, "private_rows", leaky)


@BOTH
@pytest.mark.parametrize("plant", [plant_raw_rows, plant_private_first_row])
def test_a_planted_leak_is_caught(
    plant: Any, pipe: Any, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = protect(pipe, private)
    hold_the_release_fixed(handle, monkeypatch)
    plant(pipe, handle, monkeypatch)
    with pytest.raises(AssertionError):
        check_equal_outputs(pipe, handle)


class Spy:
    """Records every tensor that enters any module of the UNet, or leaves one."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.tensors: list[torch.Tensor] = []
        for module in unet.modules():
            module.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        for item in [*args, *kwargs.values(), output]:
            if isinstance(item, torch.Tensor):
                self.tensors.append(item.detach().clone())


def check_no_row_enters(tensors: list[torch.Tensor], rows: torch.Tensor) -> None:
    """No recorded tensor contains a private row (or its key or value: a linear image has the same shape)."""
    for tensor in tensors:
        if tensor.ndim == 3 and tensor.shape[-1] == rows.shape[-1]:
            same = (tensor.reshape(-1, 1, rows.shape[-1]) - rows).abs().amax(-1) < 1e-4
            assert not bool(same.any())


def private_rows(pipe: Any, prompt: str) -> torch.Tensor:
    """All rows of the prompt but the first, which is the same for all prompts."""
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0][0, 1:]


@BOTH
def test_the_unet_never_receives_a_private_row(pipe: Any, private: dpx.DPXAttnConfig) -> None:
    rows = private_rows(pipe, PROMPTS[0])
    handle = protect(pipe, private)
    release = handle.release(PROMPTS[0])
    spy = Spy(pipe.unet)
    picture(pipe, PROMPTS[0], negative_prompt="ugly")
    picture(pipe, **release.inputs(prompt="wash"), num_images_per_prompt=2)
    assert len(spy.tensors) > 100
    check_no_row_enters(spy.tensors, rows)
    for tensor in spy.tensors:  # the placeholder: NaN but for its marker
        if tensor.ndim == 3 and tensor.shape[-1] == CHANNELS:
            marked = tensor[tensor.isnan().any(-1).any(-1)]
            assert bool(marked[:, 1:].isnan().all()) and bool(marked[:, 0, CODE_CHANNELS:].isnan().all())


def test_the_spy_has_power(pipe: Any, private: dpx.DPXAttnConfig) -> None:
    rows = private_rows(pipe, PROMPTS[0])
    handle = protect(pipe, private)
    spy = Spy(pipe.unet)
    with handle.public():
        picture(pipe, PROMPTS[0])
    with pytest.raises(AssertionError):
        check_no_row_enters(spy.tensors, rows)


def test_what_callbacks_see_is_the_placeholder(pipe: Any, private: dpx.DPXAttnConfig) -> None:
    seen = []

    def callback(pipe: Any, step: int, time: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(values["prompt_embeds"])
        return values

    protect(pipe, private)
    picture(
        pipe,
        PROMPTS[0],
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        guidance_scale=1.0,
    )
    assert seen and all(bool(s[:, 1:].isnan().all()) for s in seen)


@BOTH
def test_every_cross_attention_layer_is_reached(
    pipe: Any, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = DPAttnProcessor._attend

    def counted(self: Any, attn: Any, table: Any, *rest: Any) -> torch.Tensor:
        calls.append(id(table))
        return original(self, attn, table, *rest)

    monkeypatch.setattr(DPAttnProcessor, "_attend", counted)
    handle = protect(pipe, private)
    picture(pipe, PROMPTS[0], num_inference_steps=1)
    cross = [n for n, m in pipe.unet.named_modules() if getattr(m, "is_cross_attention", False)]
    assert sorted(handle.layers) == sorted(cross)
    assert len(set(calls)) == len(calls) == len(cross)


@BOTH
def test_a_layer_that_lost_its_processor_gives_nan_not_a_leak(pipe: Any, private: dpx.DPXAttnConfig) -> None:
    handle = protect(pipe, private)
    inputs = handle.release(PROMPTS[0]).inputs()
    name, attn = next(iter(handle.layers.items()))
    attn.module.set_processor(handle.host.originals[name])
    with pytest.raises(dpx.ProtectionLostError):
        picture(pipe, **inputs)
    handle.host.gate.remove()  # and with the gate gone as well
    assert bool(pipe.unet(latents(), 5, inputs["prompt_embeds"]).sample.isnan().all())
