"""`mechanism="none"`: the protected pipeline draws what the unprotected one draws, by the path that a release takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

import hf_dp_xattn as dpx

from ..hosts_tiny import CHANNELS, LENGTH, latents, picture, tiny_img2img, tiny_inpaint, tiny_sd, tiny_unet

TOLERANCE = 1e-4


def embeddings(batch: int, rows: int = LENGTH) -> torch.Tensor:
    return torch.randn(batch, rows, CHANNELS, generator=torch.Generator().manual_seed(3))


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "guidance": ("a red circle", {}),
    "no guidance": ("a red circle", {"guidance_scale": 1.0}),
    "negative prompt": ("a red circle", {"negative_prompt": "ugly"}),
    "two images": ("a red circle", {"num_images_per_prompt": 2, "negative_prompt": "ugly"}),
    "batch of two": (["a red circle", "a blue star"], {"negative_prompt": ["ugly", "bad"]}),
    "batch of two, two images": (["a red", "a blue star"], {"num_images_per_prompt": 2}),
    "same prompt twice": (["a red circle", "a red circle"], {}),
    "longer than the tokenizer": ("a very long prompt that will be cut off somewhere", {}),
    "empty prompt": ("", {}),
    "rescaled guidance": ("a red circle", {"guidance_rescale": 0.7}),
    "prompt_embeds [1,16,32]": (None, {"prompt_embeds": embeddings(1)}),
    "prompt_embeds [2,16,32]": (None, {"prompt_embeds": embeddings(2), "num_images_per_prompt": 2}),
    "prompt_embeds [1,9,32]": (None, {"prompt_embeds": embeddings(1, 9)}),
    "prompt_embeds [1,9,32] beside a negative text": (
        None,
        {"prompt_embeds": embeddings(1, 9), "negative_prompt": "ugly"},
    ),
    "both embeds": (None, {"prompt_embeds": embeddings(1), "negative_prompt_embeds": embeddings(1) * 0.5}),
    "negative embeds": ("a red circle", {"negative_prompt_embeds": embeddings(1)}),
    "decoded": ("a red circle", {"output_type": "pt"}),
}


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= TOLERANCE


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    plain, protected = tiny_sd(), tiny_sd()
    dpx.protect(protected, dpx.DPXAttnConfig(unit="row", mechanism="none"))
    return plain, protected


@pytest.mark.parametrize("name", CALLS)
def test_text_to_image(pair: tuple[Any, Any], name: str) -> None:
    prompt, arguments = CALLS[name]
    plain, protected = pair
    assert_same(picture(plain, prompt, **arguments), picture(protected, prompt, **arguments))


def test_the_comparison_has_power(pair: tuple[Any, Any]) -> None:
    plain, protected = pair
    with pytest.raises(AssertionError):
        assert_same(picture(plain, "a red circle"), picture(protected, "a blue star"))


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, UniPCMultistepScheduler])
def test_schedulers(pipe: Any, exact: dpx.DPXAttnConfig, scheduler: Any) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    before = picture(pipe, "a red circle", num_inference_steps=3)
    dpx.protect(pipe, exact)
    assert_same(before, picture(pipe, "a red circle", num_inference_steps=3))


VARIANTS: dict[str, dict[str, Any]] = {
    "2.x": {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True},
    "deeper": {"transformer_layers_per_block": 2, "layers_per_block": 2},
    "without a middle": {"mid_block_type": None},
    "one more level": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_of_unet(name: str, exact: dpx.DPXAttnConfig) -> None:
    pipe = tiny_sd(unet=tiny_unet(**VARIANTS[name]))
    before = picture(pipe, "a red circle")
    dpx.protect(pipe, exact)
    assert_same(before, picture(pipe, "a red circle"))


@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
@pytest.mark.parametrize("images", [1, 2])
def test_image_to_image(kind: str, images: int, exact: dpx.DPXAttnConfig) -> None:
    image = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    arguments: dict[str, Any] = {
        "image": image,
        "strength": 0.9,
        "num_images_per_prompt": images,
        "num_inference_steps": 3,
    }
    if kind == "inpaint":
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[:8] = 255
        arguments |= {"mask_image": Image.fromarray(mask), "height": 16, "width": 16}
    pipe = tiny_img2img() if kind == "img2img" else tiny_inpaint()
    before = picture(pipe, "a red circle", **arguments)
    handle = dpx.protect(pipe, exact)
    assert_same(before, picture(pipe, "a red circle", **arguments))
    release = handle.release("a red circle")
    assert_same(before, picture(pipe, **release.inputs(), **arguments))


def test_bare_unet(exact: dpx.DPXAttnConfig) -> None:
    unet, context = tiny_sd().unet, embeddings(2)
    before = unet(latents(2), 5, context).sample
    handle = dpx.protect(unet, exact)
    inputs = handle.release(context).inputs()
    assert_same(before, unet(latents(2), 5, **inputs).sample)
    assert_same(before, unet(latents(2), 5, inputs["encoder_hidden_states"]).sample)


def test_mixed_batch_on_a_bare_unet(exact: dpx.DPXAttnConfig) -> None:
    """Private and plain rows in any order: [public, private b, private a, private b]."""
    unet, context = tiny_sd().unet, embeddings(3)
    order = [2, 1, 0, 1]
    before = unet(latents(4), 5, context[order]).sample
    handle = dpx.protect(unet, exact)
    marks = handle.release(context[:2]).inputs()["encoder_hidden_states"]
    mixed = torch.stack([context[2], marks[1], marks[0], marks[1]])
    assert_same(before, unet(latents(4), 5, mixed).sample)


def test_public_prompt_beside_a_private_one(pipe: Any, exact: dpx.DPXAttnConfig) -> None:
    """The union of both texts' rows under one softmax, as if the text encoder's outputs were concatenated."""
    with torch.no_grad():
        encode = lambda text: pipe.encode_prompt(text, "cpu", 1, False)[0]  # noqa: E731
        private, public = encode("red"), encode("a wash")
        words = len(pipe.tokenizer.tokenize("a wash"))
        rows = torch.cat([private, public[:, 1 : words + 2]], dim=1)  # its words and its end
    before = picture(pipe, prompt_embeds=rows, guidance_scale=1.0)
    release = dpx.protect(pipe, exact).release("red")
    assert_same(before, picture(pipe, **release.inputs(prompt="a wash"), guidance_scale=1.0))
    with pytest.raises(AssertionError):
        assert_same(before, picture(pipe, **release.inputs(), guidance_scale=1.0))


def test_public_prompts_of_unlike_length_in_one_batch(pipe: Any, exact: dpx.DPXAttnConfig) -> None:
    release = dpx.protect(pipe, exact).release(["red", "blue"])
    noise = latents(1).repeat(2, 1, 1, 1)
    both = picture(pipe, **release.inputs(prompt=["a wash", "ink"]), latents=noise)
    for i, (private, public) in enumerate([("red", "a wash"), ("blue", "ink")]):
        one = dpx.protect(pipe, exact).release(private).inputs(prompt=public)
        assert_same(both[i : i + 1], picture(pipe, **one, latents=noise[:1]))


def test_private_negative_prompt(pipe: Any, exact: dpx.DPXAttnConfig) -> None:
    before = picture(pipe, "a red circle", negative_prompt="ugly")
    handle = dpx.protect(pipe, exact)
    negative = handle.release("ugly").inputs()["prompt_embeds"]
    assert_same(before, picture(pipe, "a red circle", negative_prompt_embeds=negative))


def test_public_baseline(pipe: Any, private: dpx.DPXAttnConfig) -> None:
    before = picture(pipe, "a red circle")
    handle = dpx.protect(pipe, private)
    with handle.public():
        assert torch.equal(before, picture(pipe, "a red circle"))
    assert handle.report().releases == ()
