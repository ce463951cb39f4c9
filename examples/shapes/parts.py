"""The untrained parts of the small StableDiffusionPipeline: sizes, tokenizer, networks, scheduler."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shapes.scenes import IMAGE_SIZE, caption_words

CONTEXT = 77  # rows of text context, as in Stable Diffusion
TEXT_WIDTH = 128
LATENTS = 8  # latent channels
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, learned until every word is a single token ending in "</w>"."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(p for w in spelled for p in pairwise(w))
        if not pairs:
            return merges
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        for w in spelled:
            i = 0
            while i + 1 < len(w):
                if (w[i], w[i + 1]) == best:
                    w[i : i + 2] = ["".join(best)]
                i += 1


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which every caption word is one token.

    Other printable ASCII text still tokenizes, letter by letter.
    """
    merges = _merges([w for w in caption_words() if w.isalpha()])
    letters = [chr(c) for c in range(33, 127)]
    tokens = [BOS, EOS, *letters, *(c + "</w>" for c in letters)]
    tokens += [t for t in dict.fromkeys("".join(m) for m in merges) if t not in tokens]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def build_text_encoder(vocab_size: int) -> CLIPTextModel:
    """A CLIP text encoder, four layers of four heads; padding is the eos token as in CLIP."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def build_vae() -> AutoencoderKL:
    """32 x 32 pixels to 8 x 8 latents of eight channels."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENTS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """Two levels, cross-attention in every block: seven cross-attention layers.

    In this class `attention_head_dim` is the NUMBER of heads of each level.
    """
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(4, 4),
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction down to zero terminal SNR, so that flat backgrounds come out in their colour."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def build_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    """The pipeline around the given parts, without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Ids [n, 77], padded to the full length as the pipeline does."""
    batch = tokenizer(captions, padding="max_length", max_length=CONTEXT, truncation=True)
    return torch.tensor(batch["input_ids"])
