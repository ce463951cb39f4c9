"""Tiny encoder-decoder models of transformers, built from configs: one entry per architecture."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

VOCABULARY = 60
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 2,  # transformers sizes the decoder's cache by it
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 3,
}


def _bart(config: str, model: str, **changes: Any) -> Any:
    return getattr(tf, model)(getattr(tf, config)(**{**_BART, **changes}))


def _t5(config: str, model: str, **changes: Any) -> Any:
    return getattr(tf, model)(getattr(tf, config)(**{**_T5, **changes}))


def _whisper() -> Any:
    changes = {"max_source_positions": 8, "max_target_positions": 32, "num_mel_bins": 4}
    quiet = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return _bart("WhisperConfig", "WhisperForConditionalGeneration", **changes, **quiet)


def _speech() -> Any:
    changes = {
        "max_source_positions": 64,
        "max_target_positions": 64,
        "input_feat_per_channel": 4,
        "input_channels": 1,
        "conv_channels": 8,
        "num_conv_layers": 2,
    }
    return _bart("Speech2TextConfig", "Speech2TextForConditionalGeneration", **changes)


def _moonshine() -> Any:
    config = tf.MoonshineConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        encoder_num_key_value_heads=4,
        decoder_num_key_value_heads=2,
        pad_head_dim_to_multiple_of=6,
        bos_token_id=1,
        eos_token_id=3,
        decoder_start_token_id=1,
    )
    return tf.MoonshineForConditionalGeneration(config)


def _t5gemma() -> Any:
    part = tf.T5GemmaModuleConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=64,
        attn_logit_softcapping=2.0,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
    )
    config = tf.T5GemmaConfig(
        encoder=part, decoder=copy.deepcopy(part), vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=2
    )
    return tf.T5GemmaForConditionalGeneration(config)


def _bert(**changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
    }
    return tf.BertConfig(**{**sizes, **changes})


def _gpt2(**changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
    }
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    return tf.GPT2Config(**{**sizes, **ends, **changes})


def _joined(cls: Any, encoder: Any, decoder: Any) -> Any:
    config = getattr(tf, cls + "Config").from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 3
    model = getattr(tf, cls + "Model")(config=config)
    return model


def _vit() -> Any:
    return tf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "bart": lambda: _bart("BartConfig", "BartForConditionalGeneration"),
    "mbart": lambda: _bart("MBartConfig", "MBartForConditionalGeneration"),
    "plbart": lambda: _bart("PLBartConfig", "PLBartForConditionalGeneration"),
    "marian": lambda: _bart("MarianConfig", "MarianMTModel"),
    "pegasus": lambda: _bart("PegasusConfig", "PegasusForConditionalGeneration"),
    "pegasus_x": lambda: _bart(
        "PegasusXConfig", "PegasusXForConditionalGeneration", block_size=4, num_global_tokens=2
    ),
    "m2m100": lambda: _bart("M2M100Config", "M2M100ForConditionalGeneration"),
    "nllb_moe": lambda: _bart(
        "NllbMoeConfig",
        "NllbMoeForConditionalGeneration",
        num_experts=2,
        encoder_sparse_step=1,
        decoder_sparse_step=2,
    ),
    "blenderbot": lambda: _bart("BlenderbotConfig", "BlenderbotForConditionalGeneration"),
    "blenderbot_small": lambda: _bart("BlenderbotSmallConfig", "BlenderbotSmallForConditionalGeneration"),
    "t5": lambda: _t5("T5Config", "T5ForConditionalGeneration"),
    "mt5": lambda: _t5("MT5Config", "MT5ForConditionalGeneration"),
    "umt5": lambda: _t5("UMT5Config", "UMT5ForConditionalGeneration"),
    "longt5": lambda: _t5("LongT5Config", "LongT5ForConditionalGeneration", local_radius=4),
    "switch": lambda: _t5(
        "SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration", num_experts=2
    ),
    "t5gemma": _t5gemma,
    "whisper": _whisper,
    "moonshine": _moonshine,
    "speech2text": _speech,
    "bert2gpt2": lambda: _joined("EncoderDecoder", _bert(), _gpt2()),
    "bert2bert_wider": lambda: _joined("EncoderDecoder", _bert(hidden_size=24), _bert()),
    "vit2gpt2": lambda: _joined("VisionEncoderDecoder", _vit(), _gpt2()),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "led": lambda: tf.LEDForConditionalGeneration(
        tf.LEDConfig(
            **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
            attention_window=4,
        )
    ),
    "mvp": lambda: _bart("MvpConfig", "MvpForConditionalGeneration"),
    "prophetnet": lambda: tf.ProphetNetForConditionalGeneration(
        tf.ProphetNetConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_encoder_layers=1,
            num_decoder_layers=1,
            num_encoder_attention_heads=2,
            num_decoder_attention_heads=2,
            max_position_embeddings=64,
        )
    ),
    "fsmt": lambda: tf.FSMTForConditionalGeneration(
        tf.FSMTConfig(
            langs=["en", "de"],
            src_vocab_size=VOCABULARY,
            tgt_vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=64,
        )
    ),
}


@functools.cache
def _built(name: str) -> Any:
    torch.manual_seed(0)
    model = {**BUILDERS, **REFUSED}[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)  # so that the document has a visible effect in an untrained model
    return model


def tiny(name: str) -> Any:
    """A fresh copy of the tiny model."""
    return copy.deepcopy(_built(name))


def documents(name: str, batch: int = 2, seed: int = 3) -> dict[str, torch.Tensor]:
    """Encoder inputs: the second of two texts is shorter, and padded."""
    g = torch.Generator().manual_seed(seed)
    if name == "whisper":
        return {"input_features": torch.randn(batch, 4, 16, generator=g)}
    if name == "speech2text":
        mask = torch.ones(batch, 24, dtype=torch.int64)
        mask[1:, 16:] = 0
        features = torch.randn(batch, 24, 4, generator=g) * mask.unsqueeze(-1)
        return {"input_features": features, "attention_mask": mask}
    if name == "moonshine":
        return {"input_values": torch.randn(batch, 4000, generator=g)}
    if name.startswith("vit"):
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=g)}
    mask = torch.ones(batch, 7, dtype=torch.int64)
    mask[1:, 4:] = 0
    ids = torch.randint(5, VOCABULARY, (batch, 7), generator=g)
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def one(name: str, seed: int = 3) -> dict[str, torch.Tensor]:
    """A single document, without padding."""
    return {k: v[:1] for k, v in documents(name, 1, seed).items()}


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, scores of all steps); sampling starts from one seed."""
    torch.manual_seed(0)
    out: Any = model.generate(
        **inputs,
        **{"max_new_tokens": 4, "encoder_no_repeat_ngram_size": 0, **options},
        output_scores=True,
        return_dict_in_generate=True,
    )
    return out["sequences"], torch.stack(tuple(out["scores"]))
