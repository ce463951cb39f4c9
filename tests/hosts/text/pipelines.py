"""Tiny pipelines whose text rows are updated, pooled or masked (SD3, Flux, Qwen-Image, AuraFlow, CogVideoX, PixArt, Wan), made in memory,
as small as diffusers' own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from ...hosts_tiny import quiet, tiny_sd, tiny_sdxl, tiny_text_config, tiny_tokenizer
from .words import tokenizer


def _t5() -> Any:
    config = T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2
    )
    return T5EncoderModel(config).eval()


def _t5_words() -> Any:
    made = tokenizer(template=None)
    made.model_max_length = 16
    return made


def _vae(latents: int) -> Any:
    return AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def tiny_sd3() -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=CLIPTextModelWithProjection(tiny_text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config()).eval(),
        text_encoder_3=_t5(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        tokenizer_3=_t5_words(),
        transformer=transformer.eval(),
        vae=_vae(4),
    )


def tiny_flux() -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=CLIPTextModel(tiny_text_config()).eval(),
        text_encoder_2=_t5(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=_t5_words(),
        transformer=transformer.eval(),
        vae=_vae(1),
    )


def tiny_qwen() -> Any:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    seen = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=seen,
        image_token_id=36,
        video_token_id=37,
        vision_start_token_id=38,
        vision_end_token_id=39,
    )
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer(template=None),
        transformer=transformer.eval(),
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "never say the code {}", 4
    return pipe


def tiny_auraflow() -> Any:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        tokenizer=_t5_words(),
        text_encoder=_t5(),
        vae=_vae(4),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def tiny_cogvideox() -> Any:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
    )
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return CogVideoXPipeline(
        tokenizer=_t5_words(),
        text_encoder=_t5(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(),
    )


ADA_NORM: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "caption_channels": 32,
    "in_channels": 4,
    "cross_attention_dim": 24,
    "out_channels": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
"""Of a small transformer of PixArt's kind, Latte's too."""


def tiny_pixart() -> Any:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(num_layers=2, **ADA_NORM)
    return PixArtAlphaPipeline(
        tokenizer=_t5_words(),
        text_encoder=_t5(),
        vae=_vae(4),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(),
    )


def tiny_wan() -> Any:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(
        tokenizer=_t5_words(),
        text_encoder=_t5(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def options(pipe: Any) -> dict[str, Any]:
    """Of a two-step call with fixed initial noise, that ends in latents."""
    size = 16 if isinstance(pipe, (WanPipeline, CogVideoXPipeline, QwenImagePipeline)) else 8
    given: dict[str, Any] = {
        "num_inference_steps": 2,
        "output_type": "latent",
        "height": size,
        "width": size,
        "generator": torch.Generator().manual_seed(7),
    }
    if isinstance(pipe, PixArtAlphaPipeline):
        given |= {"use_resolution_binning": False}
    elif not isinstance(pipe, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
        given |= {"max_sequence_length": 16}
    if isinstance(pipe, QwenImagePipeline):
        given |= {"negative_prompt": "red", "true_cfg_scale": 2.0}
    return given | ({"num_frames": 5} if isinstance(pipe, (WanPipeline, CogVideoXPipeline)) else {})


def call(pipe: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Latents of a call."""
    return quiet(pipe)(*args, **{**options(pipe), "return_dict": False, **kwargs})[0]


PIPELINES = {
    "sd": tiny_sd,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "pixart": tiny_pixart,
    "wan": tiny_wan,
}
