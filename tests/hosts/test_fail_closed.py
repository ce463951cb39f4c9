"""Invariant 3: whatever replaces, fuses or goes around what `protect` installed raises before the forward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import DPXAttnError, ReleaseError
from hf_dp_xattn.hosts.placeholder import new_tag

from ..hosts_tiny import CHANNELS, latents, picture, quiet, tiny_sd, tiny_sdxl, tiny_unet
from .anchor_calibrations import BOTH, protect

PROMPT = "a red circle"


def load_ip_adapter(pipe: Any) -> None:
    """A tiny IP-Adapter, loaded by diffusers itself."""
    channels = pipe.unet.config.cross_attention_dim
    sizes = [a.to_k.out_features for n, a in pipe.unet.named_modules() if n.endswith(".attn2")]
    weights = {}
    for i, size in enumerate(sizes):
        weights |= {
            f"{2 * i + 1}.to_k_ip.weight": torch.ones(size, channels),
            f"{2 * i + 1}.to_v_ip.weight": torch.ones(size, channels),
        }
    image = {
        "proj.weight": torch.ones(4 * channels, 8),
        "proj.bias": torch.zeros(4 * channels),
        "norm.weight": torch.ones(channels),
        "norm.bias": torch.zeros(channels),
    }
    pipe.load_ip_adapter({"image_proj": image, "ip_adapter": weights}, "", "", image_encoder_folder=None)


def load_and_unload_ip_adapter(pipe: Any) -> None:
    load_ip_adapter(pipe)
    pipe.unload_ip_adapter()


def set_one_processor(pipe: Any) -> None:
    """What xformers, LEDITS++ and many notebooks do."""
    name = next(n for n in pipe.unet.attn_processors if ".attn2." in n)
    pipe.unet.set_attn_processor({**pipe.unet.attn_processors, name: AttnProcessor2_0()})


def replace_unet(pipe: Any) -> None:
    pipe.unet = tiny_unet(1)


def replace_text_encoder(pipe: Any) -> None:
    pipe.text_encoder = copy.deepcopy(tiny_sd(1).text_encoder)


def replace_a_layer(pipe: Any) -> None:
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn2 = tiny_unet(1).mid_block.attentions[0].transformer_blocks[0].attn2


def quantize_a_projection(pipe: Any) -> None:
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2

    class Quantised(torch.nn.Linear):
        """Scales by the largest entry of all rows, as dynamic quantisation does."""

    attn.to_k.__class__ = Quantised


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load_ip_adapter": load_ip_adapter,
    "unload_ip_adapter": load_and_unload_ip_adapter,
    "fuse_qkv_projections": lambda p: p.unet.fuse_qkv_projections(),
    "set_attn_processor(one)": lambda p: p.unet.set_attn_processor(AttnProcessor2_0()),
    "set_attn_processor(dict)": set_one_processor,
    "attn.processor = ...": lambda p: setattr(
        p.unet.mid_block.attentions[0].transformer_blocks[0].attn2, "processor", AttnProcessor()
    ),
    "another UNet": replace_unet,
    "another text encoder": replace_text_encoder,
    "another tokenizer": lambda p: setattr(p, "tokenizer", copy.deepcopy(p.tokenizer)),
    "another layer": replace_a_layer,
    "a class embedding": lambda p: setattr(p.unet, "class_embedding", torch.nn.Identity()),
    "quantised projections": quantize_a_projection,
    "encode_prompt restored": lambda p: vars(p).pop("encode_prompt"),
    "encode_prompt wrapped": lambda p: setattr(p, "encode_prompt", lambda *a, **k: None),
    "the UNet's hooks removed": lambda p: p.unet._forward_pre_hooks.clear(),
    "the text encoder's hooks removed": lambda p: p.text_encoder._forward_pre_hooks.clear(),
}
# Here the call does not pass through our encode_prompt, but for what is left of the gates.
BY_ANOTHER_GATE = {"encode_prompt wrapped": (TypeError, dpx.ProtectionLostError)}


class Forwards:
    """Counts what the UNet computes."""

    def __init__(self, unet: Any) -> None:
        self.count = 0
        unet.conv_in.register_forward_hook(self._tick)

    def _tick(self, *args: Any) -> None:
        self.count += 1


@BOTH
@pytest.mark.parametrize("name", CHANGES)
def test_a_replaced_part_is_noticed_before_the_forward(name: str, pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    inputs = handle.release(PROMPT).inputs()
    ran = Forwards(pipe.unet)
    CHANGES[name](pipe)
    ran_other = Forwards(pipe.unet)
    expected = BY_ANOTHER_GATE.get(name, dpx.ProtectionLostError)
    for call in (
        lambda: picture(pipe, PROMPT),
        lambda: picture(pipe, **inputs),
        lambda: picture(pipe, "another prompt"),
    ):
        with pytest.raises(expected):
            call()
    assert ran.count == ran_other.count == 0
    assert len(handle.report().releases) == 1  # nothing was spent on the other prompt


# Parts that unprotect cannot bring back: the caller replaced them.
REPLACED = (
    "another UNet",
    "another text encoder",
    "another tokenizer",
    "a class embedding",
    "the UNet's hooks removed",
)
REPLACED += ("the text encoder's hooks removed",)


@pytest.mark.parametrize("name", [n for n in CHANGES if n not in REPLACED])
def test_unprotect_and_protect_again_after_a_loss(name: str, pipe: Any, private: Any) -> None:
    """The way out that the message names."""
    protect(pipe, private)
    CHANGES[name](pipe)
    if name == "load_ip_adapter":
        pipe.unload_ip_adapter()
    if "fuse" in name:
        pipe.unet.unfuse_qkv_projections()
    dpx.unprotect(pipe)
    vars(pipe).pop("encode_prompt", None)
    if name == "quantised projections":
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.__class__ = torch.nn.Linear
    protect(pipe, private)
    assert bool(picture(pipe, PROMPT).isfinite().all())


@BOTH
def test_without_the_checks_a_replaced_processor_draws_nan(
    pipe: Any, private: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power of the test above: without `check` the forward runs. And the placeholder is the second line of defence."""
    handle = protect(pipe, private)
    monkeypatch.setattr(type(handle.guard), "check", lambda self: None)
    set_one_processor(pipe)
    with pytest.raises(dpx.ProtectionLostError, match="NaN"):
        picture(pipe, PROMPT)


def test_fuse_and_unfuse_restores_the_protection(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    before = picture(pipe, PROMPT)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(dpx.ProtectionLostError):
        picture(pipe, PROMPT)
    pipe.unet.unfuse_qkv_projections()
    handle.check()
    assert torch.equal(before, picture(pipe, PROMPT))


def test_self_attention_processors_may_change(pipe: Any, private: Any) -> None:
    protect(pipe, private)
    before = picture(pipe, PROMPT)
    changed = {n: AttnProcessor() if ".attn1." in n else p for n, p in pipe.unet.attn_processors.items()}
    pipe.unet.set_attn_processor(changed)
    assert torch.allclose(before, picture(pipe, PROMPT), atol=1e-3)


# ---- ways around ---------------------------------------------------------------------------------------------------------------


def test_a_sibling_pipeline_cannot_send_a_private_prompt(pipe: Any, private: Any) -> None:
    protect(pipe, private)
    sibling = quiet(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    image = torch.zeros(1, 3, 16, 16)
    with pytest.raises(dpx.ProtectionLostError):
        picture(sibling, PROMPT, image=image)
    with pytest.raises(dpx.ProtectionLostError):  # raw embeddings past the gate of the text encoder
        picture(
            sibling,
            image=image,
            prompt_embeds=torch.randn(1, 16, CHANNELS),
            negative_prompt_embeds=torch.zeros(1, 16, CHANNELS),
        )


def test_the_text_encoder_is_closed(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    ids = pipe.tokenizer(PROMPT, return_tensors="pt").input_ids
    with pytest.raises(dpx.ProtectionLostError):
        pipe.text_encoder(ids)
    with handle.public():
        pipe.text_encoder(ids)
    with pytest.raises(dpx.ProtectionLostError):
        pipe.text_encoder(ids)


def test_public_holds_for_one_thread(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    ids = pipe.tokenizer(PROMPT, return_tensors="pt").input_ids
    with handle.public(), ThreadPoolExecutor(1) as pool, pytest.raises(dpx.ProtectionLostError):
        pool.submit(pipe.text_encoder, ids).result()


def test_public_is_left_when_it_fails(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    with pytest.raises(ZeroDivisionError), handle.public():
        1 / 0  # noqa: B018
    with pytest.raises(dpx.ProtectionLostError):
        pipe.unet(latents(), 5, torch.randn(1, 16, CHANNELS))


def test_plain_embeddings_need_a_declaration(private: Any) -> None:
    unet = tiny_unet()
    rows = torch.randn(1, 16, CHANNELS)
    before = unet(latents(), 5, rows).sample
    handle = protect(unet, private)
    with pytest.raises(dpx.ProtectionLostError, match="public"):
        unet(latents(), 5, rows)
    with handle.public():
        assert torch.equal(before, unet(latents(), 5, rows).sample)


def test_images_beside_the_text_are_refused(private: Any) -> None:
    unet = tiny_unet()
    marks = protect(unet, private).release(torch.randn(1, 16, CHANNELS)).inputs()["encoder_hidden_states"]
    with pytest.raises(dpx.ProtectionLostError):
        unet(latents(), 5, (marks, torch.zeros(1, 4, CHANNELS)))


@BOTH
def test_masks_are_refused_beside_a_private_context(private: Any) -> None:
    unet = tiny_unet()
    inputs = protect(unet, private).release(torch.randn(1, 16, CHANNELS)).inputs()
    with pytest.raises(dpx.ConfigError, match="encoder_attention_mask"):
        unet(latents(), 5, **inputs, encoder_attention_mask=torch.ones(1, 16))


@BOTH
@pytest.mark.parametrize("change", ["scaled", "averaged", "unknown", "other host", "after unprotect"])
def test_spoilt_and_stale_placeholders(change: str, pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    release = handle.release(["a", "b"])
    marks = release.inputs()["prompt_embeds"]
    if change == "scaled":
        marks = marks[:1] * 1.1
    elif change == "averaged":
        marks = (marks[:1] + marks[1:]) / 2
    elif change == "unknown":
        marks = handle.guard.placeholder([new_tag()], 16, "cpu")
    elif change == "other host":
        pipe = tiny_sd(1)
        protect(pipe, private)
    else:
        dpx.unprotect(pipe)
        with pytest.raises(ReleaseError):
            release.inputs()
        protect(pipe, private)
    with pytest.raises(DPXAttnError):
        picture(pipe, prompt_embeds=marks)


def test_a_lora_scale_per_call_of_a_unet_is_refused(pipe: Any, private: Any) -> None:
    inputs = protect(pipe.unet, private).release(torch.randn(16, CHANNELS)).inputs()
    with pytest.raises(dpx.ConfigError, match="set_adapters"):
        pipe.unet(latents(1), 5, **inputs, cross_attention_kwargs={"scale": 0.5})


def test_clip_skip_is_refused(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    with pytest.raises(dpx.ConfigError, match="clip_skip"):
        picture(pipe, PROMPT, clip_skip=1)
    assert handle.report().releases == ()


def test_a_processor_set_by_hand_refuses_to_run(pipe: Any) -> None:
    cross = {n: dpx.DPAttnProcessor() if ".attn2." in n else p for n, p in pipe.unet.attn_processors.items()}
    pipe.unet.set_attn_processor(cross)
    with pytest.raises(dpx.ProtectionLostError, match=r"dpx\.protect"):
        picture(pipe, PROMPT)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps], ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", ["handle", "release", "processor", "unet", "pipeline"])
def test_copies_are_refused(what: str, duplicate: Any, pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    release = handle.release(PROMPT)
    target = {
        "handle": handle,
        "release": release,
        "processor": next(iter(handle.host._processors.values())),
        "unet": pipe.unet,
        "pipeline": pipe,
    }[what]
    if what == "unet" and duplicate is copy.copy:
        return  # a shallow copy of a module shares its layers, gates and handle
    with pytest.raises(DPXAttnError):
        duplicate(target)


# ---- hosts that are refused ----------------------------------------------------------------------------------------------------


class OwnCall(StableDiffusionPipeline):
    """A community pipeline with a prompt path of its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Inherits(StableDiffusionPipeline):
    """A subclass that leaves the prompt's path alone."""


def unet_with_ip_adapter() -> Any:
    pipe = tiny_sd()
    load_ip_adapter(pipe)
    return pipe


def unet_with_foreign_processor() -> Any:
    unet = tiny_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor = lambda *a, **k: None
    return unet


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a UNet of SDXL": (lambda: tiny_sdxl().unet, "addition_embed_type"),
    "own __call__": (lambda: tiny_sd(cls=OwnCall), "__call__"),
    "IP-Adapter": (unet_with_ip_adapter, "IP-Adapter"),
    "text projection": (lambda: tiny_unet(encoder_hid_dim=24), "encoder_hid_proj"),
    "pooled text": (
        lambda: tiny_unet(addition_embed_type="text", addition_embed_type_num_heads=2),
        "addition_embed_type",
    ),
    "class labels": (lambda: tiny_unet(num_class_embeds=4), "class embedding"),
    "cross-attention only": (lambda: tiny_unet(only_cross_attention=True), "self-attention"),
    "two contexts": (lambda: tiny_unet(dual_cross_attention=True), "dual_cross_attention"),
    "GLIGEN": (lambda: tiny_unet(attention_type="gated"), "GLIGEN"),
    "simple cross-attention": (
        lambda: tiny_unet(
            down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        ),
        "not in the table",
    ),
    "foreign processor": (unet_with_foreign_processor, "processor"),
    "no cross-attention": (
        lambda: tiny_unet(
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None
        ),
        "no cross-attention",
    ),
    "a VAE": (lambda: tiny_sd().vae, "AutoencoderKL"),
    "a text encoder": (lambda: tiny_sd().text_encoder, "CLIPTextModel"),
    "no UNet": (lambda: tiny_sd(unet=None), r"has no UNet \(unet=None\)"),
    "components": (lambda: tiny_sd().components, "pass the pipeline itself"),
    "nothing": (lambda: None, "NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_hosts_are_refused_untouched(name: str, private: Any) -> None:
    build, reason = REFUSED[name]
    host = build()
    unet = getattr(host, "unet", host)
    before = dict(unet.attn_processors) if hasattr(unet, "attn_processors") else {}
    attributes = set(vars(host)) if hasattr(host, "__dict__") else set()
    with pytest.raises(dpx.UnsupportedModelError, match=reason):
        protect(host, private)
    if before:
        assert all(unet.attn_processors[n] is p for n, p in before.items())
    assert not hasattr(host, "__dict__") or set(vars(host)) == attributes


def test_a_subclass_that_inherits_the_prompt_path_is_fine(private: Any) -> None:
    pipe = tiny_sd(cls=Inherits)
    protect(pipe, private)
    assert bool(picture(pipe, PROMPT).isfinite().all())


def test_a_pipeline_is_unprotected_whatever_became_of_its_unet() -> None:
    """The error advises `dpx.unprotect(pipe)`: it must find the handle by the pipeline."""
    pipe = tiny_sd()
    before = dict(vars(pipe))
    dpx.protect(pipe, dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row"))
    pipe.unet = tiny_unet(1)
    with pytest.raises(dpx.ProtectionLostError, match="unprotect"):
        pipe("a red circle", num_inference_steps=1)
    dpx.unprotect(pipe)
    own = {
        "_guidance_scale",
        "_guidance_rescale",
        "_clip_skip",
        "_cross_attention_kwargs",
        "_interrupt",
    }  # diffusers'
    assert set(vars(pipe)) - own == set(before)
    assert dpx.protect(pipe, dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row")).active
