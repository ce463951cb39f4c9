"""A tiny Mllama from configs, and inputs as its processor gives them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers as tf

VOCABULARY, TILES, PATCHES = 60, 2, 5
RATIOS = [[1, 1], [1, 2], [2, 1]]


@functools.cache
def _built() -> Any:
    vision = tf.models.mllama.MllamaVisionConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=16,
        vision_output_dim=24,
        image_size=8,
        patch_size=4,
        max_num_tiles=TILES,
        intermediate_layers_indices=[0, 1],
        supported_aspect_ratios=RATIOS,
    )
    text = tf.models.mllama.MllamaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        cross_attention_layers=[1, 3],
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )
    config = tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY)
    torch.manual_seed(0)
    model = tf.MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            elif "gate" in name:
                parameter.fill_(0.7)  # untrained gates are shut: the image would have no effect
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 2, 3
    model.generation_config.pad_token_id = 1
    return model


def tiny() -> Any:
    """A fresh copy of the tiny model."""
    return copy.deepcopy(_built())


def images(batch: int = 2, seed: int = 3) -> dict[str, torch.Tensor]:
    """The first image fills both tiles, the second one: its other tile is padding, of zeros."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[2], [1]])[:batch]
    mask = torch.tensor([[[1, 1]], [[1, 0]]])[:batch]
    pixels = torch.randn(batch, 1, TILES, 3, 8, 8, generator=g) * mask[..., None, None, None]
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def texts(batch: int = 2, *, mask: bool = True, seed: int = 5) -> dict[str, torch.Tensor]:
    """Left-padded questions; the token that stands for the image comes second, and those before it see no tile."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (batch, 6), generator=g)
    attention = torch.ones(batch, 6, dtype=torch.int64)
    start = torch.zeros(batch, dtype=torch.int64)
    start[1:] = 2
    for i, s in enumerate(start.tolist()):
        attention[i, :s] = 0
        ids[i, :s] = 1
        ids[i, s], ids[i, s + 1] = 2, VOCABULARY
    if not mask:
        return {"input_ids": ids, "attention_mask": attention}
    seen = torch.zeros(batch, 6, 1, TILES, dtype=torch.int64)
    for i, s in enumerate(start.tolist()):
        seen[i, s + 1 :, 0, : images(batch)["aspect_ratio_mask"][i].sum()] = 1
    return {"input_ids": ids, "attention_mask": attention, "cross_attention_mask": seen}


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, scores of all steps); sampling starts from one seed."""
    torch.manual_seed(0)
    out: Any = model.generate(
        **inputs,
        **{"max_new_tokens": 4, **options},
        output_scores=True,
        return_dict_in_generate=True,
    )
    return out["sequences"], torch.stack(tuple(out["scores"]))
