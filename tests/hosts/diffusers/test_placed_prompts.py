"""Pipelines whose denoiser is given a public stand-in, and reads a release in its place: the SDXL family, ControlNets, DiTs, videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    DDPMScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts import releases as releases_module
from hf_dp_xattn.hosts.diffusers.denoiser_gate import DenoiserGate
from hf_dp_xattn.hosts.diffusers.prompt_encoder import STAND_IN
from hf_dp_xattn.hosts.diffusers.text_layers import TextLayer

from ...hosts_tiny import picture, quiet, tiny_sd, tiny_sdxl, tiny_unet
from ..text.pipelines import ADA_NORM, call, tiny_flux, tiny_pixart, tiny_sd3, tiny_wan

PROMPTS = "red box", "blue dogs"  # of different lengths
KERNEL = {"degree": 1, "projection_dim": 4}


def _control(unet: Any, pipe: Any, cls: Any, **more: Any) -> Any:
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).eval()
    with torch.no_grad():
        for p in net.controlnet_down_blocks.parameters():
            p.normal_(
                generator=torch.Generator().manual_seed(0)
            )  # else it has no effect in an untrained model
    return quiet(cls.from_pipe(pipe, controlnet=net, **more))


def tiny_controlnet() -> Any:
    pipe = tiny_sd()
    return _control(pipe.unet, pipe, StableDiffusionControlNetPipeline)


def tiny_controlnet_xl() -> Any:
    pipe = tiny_sdxl()
    return _control(pipe.unet, pipe, StableDiffusionXLControlNetPipeline, add_watermarker=False)


def tiny_animatediff() -> Any:
    pipe = tiny_sd(unet=tiny_unet(block_out_channels=(8, 8)))
    motion = MotionAdapter(
        block_out_channels=(8, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    parts = {n: getattr(pipe, n) for n in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return quiet(AnimateDiffPipeline(**parts, motion_adapter=motion.eval()))


def tiny_refiner() -> Any:
    """Of one text encoder, with a score beside the sizes."""
    pipe = tiny_sdxl()
    unet = tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 32,
    )
    parts = {n: getattr(pipe, n) for n in ("vae", "text_encoder_2", "tokenizer_2", "scheduler")}
    none = {"text_encoder": None, "tokenizer": None}
    options = {"requires_aesthetics_score": True, "add_watermarker": False}
    return quiet(StableDiffusionXLImg2ImgPipeline(**parts, **none, unet=unet, **options))


def tiny_upscaler() -> Any:
    pipe = tiny_sd(unet=tiny_unet(in_channels=7, num_class_embeds=1000))
    parts = {n: getattr(pipe, n) for n in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return quiet(
        StableDiffusionUpscalePipeline(**parts, low_res_scheduler=DDPMScheduler(), max_noise_level=350)
    )


def tiny_latte() -> Any:
    """Of prompts that have as many rows as tokens."""
    torch.manual_seed(0)
    parts = {n: getattr(tiny_pixart(), n) for n in ("tokenizer", "text_encoder", "vae", "scheduler")}
    transformer = LatteTransformer3DModel(num_layers=1, **ADA_NORM)
    return quiet(LattePipeline(**parts, transformer=transformer.eval()))


def _draw(pipe: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    image = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    name, more = type(pipe).__name__, {"height": 16, "width": 16}
    if "ControlNet" in name:
        more = {"image": image}
    elif "Img2Img" in name:
        more = {"image": image, "strength": 1.0}
    elif "Upscale" in name:
        more = {"image": image}
    elif "Inpaint" in name:
        more |= {"image": image, "strength": 1.0, "mask_image": torch.ones(1, 1, 16, 16)}
    elif "Animate" in name:
        more |= {"num_frames": 2, "decode_chunk_size": 2}
    elif "Latte" in name:
        more = {"height": 8, "width": 8, "video_length": 1}
    if "StableDiffusion" in name:
        return picture(pipe, *args, **more, **kwargs)
    if "Animate" in name or "Latte" in name:
        given = {
            "num_inference_steps": 2,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(7),
        }
        return pipe(*args, **given, **more, **kwargs).frames
    if "Wan" in name:
        kwargs["max_sequence_length"] = 512
    return call(pipe, *args, **kwargs)


def _sibling(cls: Any) -> Callable[[], Any]:
    return lambda: quiet(cls.from_pipe(tiny_sdxl(), add_watermarker=False))


HOSTS: dict[str, Callable[[], Any]] = {
    "sdxl": tiny_sdxl,
    "sdxl img2img": _sibling(StableDiffusionXLImg2ImgPipeline),
    "sdxl inpaint": _sibling(StableDiffusionXLInpaintPipeline),
    "sdxl refiner": tiny_refiner,
    "x4 upscaler": tiny_upscaler,
    "sd controlnet": tiny_controlnet,
    "sdxl controlnet": tiny_controlnet_xl,
    "animatediff": tiny_animatediff,
    "pixart": tiny_pixart,
    "latte": tiny_latte,
    "wan": tiny_wan,
}
FEW = "sdxl", "sd controlnet", "pixart"


def protect(pipe: Any, mechanism: str = "none", **options: Any) -> Any:
    given = {
        **(KERNEL if mechanism == "kernel_sum" else {}),
        "unit": "row",
        "mechanism": mechanism,
        **options,
    }
    return dpx.protect(pipe, dpx.DPXAttnConfig(**given), allow_uncalibrated=True, ledger=dpx.Ledger())


def hold_the_release_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    original, first = releases_module.Releases.run, []

    def fixed(self: Any, *args: Any) -> Any:
        first.append(original(self, *args))  # so that any way past the release would run
        return dataclasses.replace(first[-1], structures=first[0].structures, context=first[0].context)

    monkeypatch.setattr(releases_module.Releases, "run", fixed)


def check_equal(pipe: Any) -> None:
    one, other = (_draw(pipe, prompt) for prompt in PROMPTS)
    assert bool(one.isfinite().all()) and torch.equal(one, other)


@pytest.mark.parametrize("kind", HOSTS)
def test_pictures_depend_on_the_release_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = HOSTS[kind]()
    plain = [_draw(pipe, prompt) for prompt in PROMPTS]
    assert not torch.equal(*plain)
    protect(pipe, "kernel_sum")
    with monkeypatch.context() as patch:
        hold_the_release_fixed(patch)
        check_equal(pipe)
    dpx.unprotect(pipe)
    protect(pipe)
    assert not torch.equal(_draw(pipe, PROMPTS[0]), _draw(pipe, PROMPTS[1]))  # the release has an effect
    dpx.unprotect(pipe)
    assert torch.equal(_draw(pipe, PROMPTS[0]), plain[0])


@pytest.mark.parametrize("kind", FEW)
def test_a_planted_leak_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kept = HOSTS[kind](), []
    handle = protect(pipe)
    hold_the_release_fixed(monkeypatch)
    recipe = type(handle.guard.prepare(handle.guard.fingerprint()))
    run, private = recipe.run, DenoiserGate._private

    def keep(self: Any, rows: torch.Tensor, *rest: Any) -> Any:
        kept.append(rows)
        return run(self, rows, *rest)

    monkeypatch.setattr(recipe, "run", keep)
    leaky = lambda *given: private(*given) + (1e-3 * kept[-1][:, 0].mean() if kept else 0.0)  # noqa: E731
    monkeypatch.setattr(DenoiserGate, "_private", staticmethod(leaky))
    with pytest.raises(AssertionError):
        check_equal(pipe)


def _with_pooled_of_the_stand_in(pipe: Any, prompt: str) -> torch.Tensor:
    """Unprotected: rows of the prompt, and the pooled vector of the public text."""
    with torch.no_grad():
        rows, none, _, zeros = pipe.encode_prompt(prompt)
        pooled = pipe.encode_prompt(STAND_IN)[2]
    given = {"prompt_embeds": rows, "pooled_prompt_embeds": pooled}
    return _draw(pipe, **given, negative_prompt_embeds=none, negative_pooled_prompt_embeds=zeros)


@pytest.mark.parametrize("kind", HOSTS)
def test_exact_attention_draws_what_the_pipeline_draws(kind: str) -> None:
    """Of its rows; pooled vectors are the stand-in's."""
    pipe = HOSTS[kind]()
    pooled = "sdxl" in kind
    before = [_with_pooled_of_the_stand_in(pipe, p) if pooled else _draw(pipe, p) for p in PROMPTS]
    handle = protect(pipe)
    for want, prompt in zip(before, PROMPTS, strict=True):
        assert torch.allclose(_draw(pipe, prompt), want, atol=1e-4, rtol=1e-3)
        assert torch.allclose(_draw(pipe, **handle.release(prompt).inputs()), want, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(*before, atol=1e-4, rtol=1e-3)
    assert len(handle.report().releases) == 2


@pytest.mark.parametrize("kind", FEW)
def test_batches_share_no_release(kind: str) -> None:
    pipe = HOSTS[kind]()
    protect(pipe)
    noise = {"num_images_per_prompt": 2, "guidance_scale": 3.0}
    both = _draw(pipe, list(PROMPTS), **noise)
    assert len(both) == 4 and not torch.equal(both[0], both[2])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    if kind == "pixart":
        return
    alone = [_draw(pipe, p, latents=latents) for p in PROMPTS]
    both = _draw(pipe, list(PROMPTS), latents=latents.repeat(2, 1, 1, 1))
    assert torch.allclose(both, torch.cat(alone), atol=1e-4)


def test_private_embeddings_are_released_and_their_pooled_vector_is_not_read() -> None:
    pipe = tiny_sdxl()
    handle = protect(pipe)
    with handle.encoding(), torch.no_grad():
        rows, _, pooled, _ = pipe.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False)
    one = _draw(pipe, prompt_embeds=rows, pooled_prompt_embeds=pooled)
    other = _draw(pipe, prompt_embeds=rows, pooled_prompt_embeds=-pooled)
    assert torch.equal(one, other) and len(handle.report().releases) == 1
    assert torch.allclose(one, _draw(pipe, PROMPTS[0]), atol=1e-4)


LOST: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "slicing": ("sdxl", lambda p: p.enable_attention_slicing(1)),
    "a bare call": ("sdxl", lambda p: p.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 16, 64))),
    "encode_prompt": ("sdxl", lambda p: p.encode_prompt("a red circle")),
    "another layer": ("pixart", lambda p: _replace(p.transformer.transformer_blocks[0], "attn2")),
    "another ControlNet": (
        "sd controlnet",
        lambda p: p.register_modules(controlnet=tiny_controlnet().controlnet),
    ),
    "another UNet": ("sdxl", lambda p: p.register_modules(unet=tiny_sdxl().unet)),
    "prompt_2": ("sdxl", lambda p: _draw(p, "red", prompt_2="secret")),
    "pooled alone": ("sdxl", lambda p: _draw(p, "red", pooled_prompt_embeds=torch.zeros(1, 32))),
}


def _replace(block: Any, name: str) -> None:
    setattr(block, name, getattr(tiny_pixart().transformer.transformer_blocks[0], name))


@pytest.mark.parametrize("what", LOST)
def test_what_replaces_a_part_fails_closed(what: str) -> None:
    kind, change = LOST[what]
    pipe = HOSTS[kind]()
    handle = protect(pipe)
    with pytest.raises(dpx.DPXAttnError):
        change(pipe)
        _draw(pipe, "a red circle")
    assert not handle.report().releases


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_joint_attention_is_refused_by_name(make: Callable[[], Any]) -> None:
    with pytest.raises(dpx.UnsupportedModelError, match="joint attention"):
        protect(make(), "kernel_sum")


def test_layers_that_read_otherwise_are_refused_before_a_charge(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sdxl()
    handle = protect(pipe, "kernel_sum")
    project = TextLayer.project
    monkeypatch.setattr(TextLayer, "project", lambda self, rows: tuple(2 * x for x in project(self, rows)))
    with pytest.raises(dpx.UnsupportedModelError, match="another way"):
        _draw(pipe, "a red circle")
    assert not handle.report().releases


def test_two_pipelines_share_a_handle_and_a_release() -> None:
    pipe = tiny_sdxl()
    handle = protect(pipe, "kernel_sum")
    again = quiet(StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, add_watermarker=False))
    with pytest.raises(dpx.DPXAttnError):
        _draw(again, "a red circle")
    assert protect_same(again, handle) is handle
    _draw(pipe, "a red circle")
    _draw(again, "a red circle")
    assert len(handle.report().releases) == 1
    dpx.unprotect(again)
    assert "forward" not in vars(pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2)


def protect_same(pipe: Any, handle: Any) -> Any:
    return dpx.protect(pipe, handle.config, allow_uncalibrated=True)


def test_a_release_goes_to_disk_and_back(tmp_path: Any) -> None:
    pipe = tiny_pixart()
    handle = protect(pipe, "kernel_sum")
    release = handle.release("a red circle")
    want = _draw(pipe, **release.inputs())
    folder = release.save_pretrained(tmp_path / "release")
    dpx.unprotect(pipe)
    again = dpx.Release.from_pretrained(folder, host=pipe)
    assert torch.equal(want, _draw(pipe, **again.inputs()))


PUBLIC = [
    f"{a} {b} {c}"
    for a in ("please", "never")
    for b in ("speak", "close", "open")
    for c in ("red", "blue", "code", "monday")
]


@pytest.mark.parametrize("kind", ["sdxl", pytest.param("pixart", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mechanism", ["anchors", "kernel_sum"])
def test_a_calibration_of_public_prompts(kind: str, mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = HOSTS[kind]()
    config = dpx.DPXAttnConfig(
        **{"unit": "row", "mechanism": mechanism, **(KERNEL if mechanism == "kernel_sum" else {})}
    )
    few = {"anchors": 8, "steps": 2} if mechanism == "anchors" else {"rank": 4}
    before = _draw(pipe, PROMPTS[0])
    made = dpx.calibrate(
        pipe, PUBLIC * 3, config, epsilons=(8.0,), query_prompts=1, query_steps=1, progress=False, **few
    )
    assert torch.equal(before, _draw(pipe, PROMPTS[0]))  # as it was
    dpx.protect(pipe, config, calibration=made, allow_useless=True, ledger=dpx.Ledger())
    hold_the_release_fixed(monkeypatch)
    check_equal(pipe)
    other = HOSTS["wan"]()
    with pytest.raises(dpx.ConfigError):
        dpx.protect(other, config, calibration=made, allow_useless=True, ledger=dpx.Ledger())
