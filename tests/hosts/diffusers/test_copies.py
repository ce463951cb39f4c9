"""Ways in which diffusers shares or copies the parts of a protected pipeline: protected, or refused before anything private runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from diffusers.training_utils import EMAModel

import hf_dp_xattn as dpx

from ...hosts_tiny import CHANNELS, LENGTH, latents, picture, quiet, tiny_unet

PROMPT = "a red circle"
PLAIN = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def adapter() -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )


def controlnet() -> ControlNetModel:
    return ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=CHANNELS,
        norm_num_groups=2,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(16, 32),
    )


def animate(pipe: Any, unet: Any = None) -> Any:
    return AnimateDiffPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=pipe.unet if unet is None else unet,
        motion_adapter=adapter(),
        scheduler=pipe.scheduler,
    )


class Prompts:
    """What UNets of every kind are given while it is open: exact rows of a private prompt must not be among it."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        with torch.no_grad():
            self._rows = pipe.text_encoder(ids)[0][0, 1:]
        self.leaked = 0
        for cls in (diffusers.UNet2DConditionModel, UNetMotionModel, ControlNetModel, UNetControlNetXSModel):
            forward = cls.forward

            def watched(module: Any, *args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
                states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
                self._look(states)
                return _forward(module, *args, **kwargs)

            monkeypatch.setattr(cls, "forward", watched)

    def _look(self, states: Any) -> None:
        if isinstance(states, torch.Tensor) and states.shape[1] == LENGTH:
            self.leaked += int(any(torch.allclose(s[1:], self._rows, atol=1e-4) for s in states.float()))


COPIES: dict[str, Callable[[Any], Any]] = {
    "UNetMotionModel.from_unet2d": lambda p: UNetMotionModel.from_unet2d(p.unet, adapter()),
    "AnimateDiffPipeline": animate,
    "AnimateDiffPipeline.from_pipe": lambda p: AnimateDiffPipeline.from_pipe(p, motion_adapter=adapter()),
    "ControlNetModel.from_unet": lambda p: ControlNetModel.from_unet(
        p.unet, conditioning_channels=3, controlnet_conditioning_channel_order="rgb"
    ),
    "a block": lambda p: tiny_unet().mid_block.load_state_dict(p.unet.mid_block.state_dict()),
    "a layer": lambda p: p.unet.mid_block.attentions[0].transformer_blocks[0].attn2.state_dict(),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_parts_are_refused(name: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    with pytest.raises(dpx.ProtectionLostError, match="Nothing was copied"):
        COPIES[name](pipe)
    assert bool(picture(pipe, PROMPT).isfinite().all())
    assert handle.ledger.entries()
    dpx.unprotect(pipe)
    COPIES[name](pipe)


def test_copies_of_the_whole_are_the_callers(pipe: Any, private: Any, tmp_path: Any) -> None:
    """Weights are public, and saving and averaging need them."""
    dpx.protect(pipe, private)
    EMAModel(pipe.unet.parameters(), model_cls=type(pipe.unet), model_config=pipe.unet.config)
    holder = torch.nn.ModuleDict({"unet": pipe.unet})
    assert len(holder.state_dict()) == len(pipe.unet.state_dict())
    tiny_unet().load_state_dict(pipe.unet.state_dict())
    pipe.unet.save_pretrained(tmp_path)


SIBLINGS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "img2img from_pipe": (
        StableDiffusionImg2ImgPipeline.from_pipe,
        {"image": torch.zeros(1, 3, 16, 16), "strength": 1.0},
    ),
    "auto img2img": (
        AutoPipelineForImage2Image.from_pipe,
        {"image": torch.zeros(1, 3, 16, 16), "strength": 1.0},
    ),
    "auto inpainting": (
        AutoPipelineForInpainting.from_pipe,
        {"image": torch.zeros(1, 3, 16, 16), "mask_image": torch.ones(1, 1, 16, 16), "strength": 1.0},
    ),
    "inpainting of components": (
        lambda p: StableDiffusionInpaintPipeline(**p.components, requires_safety_checker=False),
        {"image": torch.zeros(1, 3, 16, 16), "mask_image": torch.ones(1, 1, 16, 16), "strength": 1.0},
    ),
    "auto text to image": (AutoPipelineForText2Image.from_pipe, {}),
    "a ControlNet pipeline": (
        lambda p: StableDiffusionControlNetPipeline.from_pipe(p, controlnet=controlnet().eval()),
        {"image": torch.zeros(1, 3, 16, 16)},
    ),
    "the text encoder with another UNet": (
        lambda p: StableDiffusionPipeline(
            **{**p.components, "unet": tiny_unet(1)}, requires_safety_checker=False
        ),
        {},
    ),
    "a motion UNet made before": (lambda p: animate(p, p.motion), {"num_frames": 2}),
}


def draw(sibling: Any, **arguments: Any) -> Any:
    return sibling(
        num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(7), **arguments
    )


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_are_closed_to_the_prompt(
    name: str, pipe: Any, private: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, public = SIBLINGS[name]
    watch = Prompts(pipe, monkeypatch)
    pipe.motion = UNetMotionModel.from_unet2d(pipe.unet, adapter())
    dpx.protect(pipe, private)
    sibling = quiet(make(pipe))
    with pytest.raises(dpx.ProtectionLostError, match="encoding"):
        draw(sibling, prompt=PROMPT, **public)
    assert watch.leaked == 0
    try:
        dpx.protect(sibling, private)
    except dpx.DPXAttnError:
        return  # a kind that is not supported
    drawn = draw(sibling, prompt=PROMPT, **public, return_dict=False)[0]
    assert bool(drawn.isfinite().all())
    assert watch.leaked == 0


def test_the_watch_has_eyes(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Prompts(pipe, monkeypatch)
    picture(pipe, PROMPT)
    assert watch.leaked


def test_residuals_of_a_controlnet_that_read_a_placeholder(pipe: Any, private: Any) -> None:
    """Pictures of NaN without a word, before."""
    release = dpx.protect(pipe, private).release(PROMPT)
    sibling = quiet(StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=controlnet().eval()))
    with pytest.raises(dpx.ProtectionLostError, match=r"residuals to the protected UNet\. Nothing was run"):
        draw(sibling, **release.inputs(), image=torch.zeros(1, 3, 16, 16), guidance_scale=1.0)


def test_residuals_of_a_public_text_stand_beside_a_placeholder(pipe: Any, private: Any) -> None:
    marks = dpx.protect(pipe, private).release(PROMPT).inputs()["prompt_embeds"]
    with torch.no_grad():
        down, mid = controlnet().eval()(
            latents(), 5, torch.zeros(1, LENGTH, CHANNELS), torch.zeros(1, 3, 16, 16), return_dict=False
        )
        drawn = pipe.unet(
            latents(), 5, marks, down_block_additional_residuals=down, mid_block_additional_residual=mid
        )
    assert bool(drawn.sample.isfinite().all())


def test_parts_of_the_text_encoder_are_closed(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    ids = pipe.tokenizer(PROMPT, return_tensors="pt").input_ids
    for part in pipe.text_encoder.children():
        with pytest.raises(dpx.ProtectionLostError):
            part(ids)
    with handle.public():
        pipe.text_encoder(ids)
