"""Tiny Stable Diffusion pipelines, made in memory: a call takes about 0.05 s."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LENGTH = 16  # tokens
CHANNELS = 32


def tiny_tokenizer() -> CLIPTokenizer:
    chars = [chr(c) for c in range(33, 127)]
    vocab = {
        t: i for i, t in enumerate(["<|startoftext|>", "<|endoftext|>", *chars, *(c + "</w>" for c in chars)])
    }
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def tiny_text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        vocab_size=256,
        hidden_size=CHANNELS,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=LENGTH,
        projection_dim=32,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    ).eval()


def tiny_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": CHANNELS,
        "norm_num_groups": 2,
        "attention_head_dim": 2,
    }
    unet = UNet2DConditionModel(**{**arguments, **changes}).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn2.to_" in name and name.endswith("weight"):
                parameter.mul_(3.0)  # so that the text has a visible effect in an untrained model
    return unet


def tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@functools.lru_cache(maxsize=4)
def _parts(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "vae": tiny_vae(),
        "text_encoder": CLIPTextModel(tiny_text_config()).eval(),
        "tokenizer": tiny_tokenizer(),
        "unet": tiny_unet(seed),
        "scheduler": tiny_scheduler(),
    }


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd(seed: int = 0, cls: type = StableDiffusionPipeline, **changes: Any) -> Any:
    parts = copy.deepcopy(_parts(seed))
    return quiet(
        cls(
            **{**parts, **changes}, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    )


def tiny_img2img(seed: int = 0) -> StableDiffusionImg2ImgPipeline:
    return tiny_sd(seed, StableDiffusionImg2ImgPipeline)


def tiny_inpaint(seed: int = 0) -> StableDiffusionInpaintPipeline:
    return tiny_sd(seed, StableDiffusionInpaintPipeline)


def tiny_sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = tiny_unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
    )
    return quiet(
        StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(tiny_text_config()).eval(),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text_config()).eval(),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_tokenizer(),
            unet=unet,
            scheduler=tiny_scheduler(),
            add_watermarker=False,
        )
    )


def latents(batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(7)).to(dtype)


def picture(pipe: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Latents [B, 4, 8, 8] of a two-step call with fixed initial noise."""
    arguments = {"num_inference_steps": 2, "output_type": "latent", **kwargs}
    if "latents" not in arguments and "generator" not in arguments:
        arguments["generator"] = torch.Generator().manual_seed(7)
    return pipe(*args, **arguments).images


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two pictures are one but for rounding: some CPUs' kernels add up in an order that depends on where tensors lie in memory.
    Releases of one prompt with other noise, or of another prompt, differ by far more (`tests/hosts/test_saving.py`)."""
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-3 * float(b.abs().max())
