"""NaN shows that a placeholder was read by something that is not protected. It never leaves a protected host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.nan import main_output, refuse_nan

from ..hosts_tiny import CHANNELS, latents, picture, tiny_img2img, tiny_inpaint, tiny_sd, tiny_unet
from .kinds import CONFIG, KINDS

EACH = pytest.mark.parametrize("name", KINDS)


def spoil(host: Any) -> None:
    """As an overflow in float16 does: some layer of the host makes Inf - Inf."""
    model = getattr(host, "unet", host)
    last = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1]
    last.register_forward_hook(lambda module, args, out: out * torch.inf - out * torch.inf)


@EACH
def test_a_host_that_overflows_says_so(name: str) -> None:
    kind = KINDS[name]
    host = kind.make()
    handle = dpx.protect(host, CONFIG)
    release = kind.release(handle, 1)
    kind.read(host, release)
    spoil(host)
    with pytest.raises(dpx.ProtectionLostError, match="NaN"):
        kind.read(host, release)
    with handle.public():  # what is public is the host's own business
        if name == "diffusers":
            assert bool(picture(host, "a public text").isnan().all())
    entries = (
        handle.ledger.entries()
    )  # one for each name; older names count only where a ledger holds them already
    assert entries and {c.number_of_releases for c in entries} == {1}
    assert len({c.digest for c in entries}) == len(entries)
    assert {c.digest for c in entries} <= {str(d) for d in handle.releases.spent[0].digests}


@pytest.mark.parametrize("output", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("make", [tiny_sd, tiny_img2img, tiny_inpaint])
def test_no_black_picture_leaves(make: Any, output: str) -> None:
    """Once, at the end, whatever came before: a compiled UNet has no gate that could tell."""
    pipe = make()
    image = torch.rand(1, 3, 16, 16)
    more = {"image": image} if make is not tiny_sd else {}
    if make is tiny_inpaint:
        more["mask_image"] = (torch.rand(1, 1, 16, 16) > 0.5).float()
    handle = dpx.protect(pipe, CONFIG)
    picture(pipe, "a red circle", **more, output_type=output)
    pipe.unet.mid_block.register_forward_hook(lambda module, args, out: out * torch.nan)
    with pytest.raises(dpx.ProtectionLostError, match="NaN"):
        picture(pipe, "a red circle", **more, output_type=output)
    dpx.unprotect(pipe)
    assert not handle.active and "postprocess" not in vars(pipe.image_processor)
    picture(pipe, "a red circle", **more, output_type="latent")


def test_a_controlnet_reads_the_placeholder() -> None:
    """It sees the embeddings past the cross-attention of the UNet: NaN, which says so instead of drawing black."""
    pipe = tiny_sd()
    handle = dpx.protect(pipe, CONFIG)
    inputs = handle.release("a red circle").inputs()
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(16, 32)).eval()
    with torch.no_grad():
        for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, 0.1)
    parts = {n: getattr(pipe, n) for n in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    controlled = StableDiffusionControlNetPipeline(
        **parts,
        controlnet=control,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    controlled.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16)
    with pytest.raises(dpx.ProtectionLostError, match="ControlNet"), handle.guard.access.enter("encoding"):
        picture(controlled, image=image, **inputs, height=16, width=16)


def test_a_bare_unet_that_lost_a_layer_and_its_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet()
    handle = dpx.protect(unet, CONFIG)
    inputs = handle.release(torch.randn(1, 16, CHANNELS)).inputs()
    monkeypatch.setattr(type(handle.guard), "check", lambda self: None)
    name, attn = next(iter(handle.layers.items()))
    attn.module.set_processor(handle.host.originals[name])
    with pytest.raises(dpx.ProtectionLostError, match="NaN"):
        unet(latents(), 5, **inputs)


def test_a_unet_whose_gate_was_taken_away() -> None:
    unet = tiny_unet()
    handle = dpx.protect(unet, CONFIG)
    inputs = handle.release(torch.randn(1, 16, CHANNELS)).inputs()
    unet._forward_pre_hooks.clear()
    with pytest.raises(dpx.ProtectionLostError, match="gate"):
        unet(latents(), 5, **inputs)


def test_what_counts_as_an_answer() -> None:
    nan, one = torch.full((2, 2), torch.nan), torch.ones(2, 2)
    for fine in (one, torch.ones(2, dtype=torch.int64), torch.ones(0, 2), None, [nan], -torch.inf * one):
        refuse_nan(fine)
    spotted = torch.ones(3, 4, 5, dtype=torch.bfloat16)
    spotted[1, 2, 3] = torch.nan
    for bad in (nan, spotted, spotted.half()):
        with pytest.raises(dpx.ProtectionLostError):
            refuse_nan(bad)
    loss = torch.tensor(torch.nan)
    assert main_output((loss, one)) is one and main_output(one) is one and main_output(loss) is None
