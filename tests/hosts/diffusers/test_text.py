"""Tokenizers and text encoders that are not CLIP's, or not set up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

import hf_dp_xattn as dpx

from ...hosts_tiny import CHANNELS, LENGTH, picture, tiny_sd, tiny_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
WORDS += ["##" + c for c in "abcdefghijklmnopqrstuvwxyz"]


def bert_pipeline() -> Any:
    """As Taiyi: a BERT text encoder, whose tokenizer has no end-of-sequence token but a separator."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=CHANNELS,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=LENGTH,
    )
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(WORDS)}, model_max_length=LENGTH)
    return tiny_sd(text_encoder=BertModel(config).eval(), tokenizer=tokenizer)


def test_public_words_of_a_bert_text_encoder(private: Any) -> None:
    pipe = bert_pipeline()
    handle = dpx.protect(pipe, private)
    release = handle.release("a cat")
    assert bool(picture(pipe, **release.inputs(prompt="big dog")).isfinite().all())
    first = int(handle.text.first_row_is_public)
    # [CLS] b ##i ##g d ##o ##g [SEP], and none of the padding
    assert handle.text.public_rows("big dog").shape == (8 - first, CHANNELS)


def test_a_bert_text_encoder_draws_as_before(exact: Any) -> None:
    want = picture(bert_pipeline(), "a cat")
    pipe = bert_pipeline()
    dpx.protect(pipe, exact)
    assert torch.allclose(want, picture(pipe, "a cat"), atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"model_max_length": int(1e30)}, "model_max_length"),
        ({"model_max_length": LENGTH + 1}, f"takes {LENGTH} tokens"),
        ({"pad_token": None}, "pad token"),
    ],
    ids=["no length", "longer than the encoder", "no padding"],
)
def test_tokenizers_that_cannot_pad_to_one_length(setting: dict[str, Any], says: str, private: Any) -> None:
    tokenizer = tiny_tokenizer()
    for name, value in setting.items():
        setattr(tokenizer, name, value)
    pipe = tiny_sd(tokenizer=tokenizer)
    with pytest.raises(dpx.ConfigError, match=says):
        dpx.protect(pipe, private)
    assert dpx.handle_of(pipe) is None and "encode_prompt" not in vars(pipe)
