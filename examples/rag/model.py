"""The Fusion-in-Decoder model: a small T5, documents encoded apart from each other, the question as the decoder's prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from rag.corpus import END, PAD, UNKNOWN, WORDS

MODEL = Path(__file__).parent / "model"
ENCODE_BATCH = 512


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def build_model() -> T5ForConditionalGeneration:
    """About a million parameters: two layers on each side, width 128, four heads of 32."""
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=512,
        num_layers=2,
        num_decoder_layers=2,
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=32,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def load_model(folder: Path = MODEL) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerFast]:
    """The shipped model in float32, and its tokenizer."""
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def encode(model: Any, documents: Tensor) -> tuple[Tensor, Tensor]:
    """[n, L] ids, 0 where there is none -> rows [n, L, C] and the mask [n, L]; documents do not see each other."""
    mask = documents != 0
    parts = [
        model.encoder(input_ids=ids, attention_mask=m.long()).last_hidden_state
        for ids, m in zip(documents.split(ENCODE_BATCH), mask.split(ENCODE_BATCH), strict=True)
    ]
    return torch.cat(parts), mask


def decode_shared(model: Any, rows: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
    """Logits [B, Q, m, V] of Q decoder inputs [B, Q, m] for each of B corpora of rows [B, n, C], mask [B, n].

    The model's own arithmetic, but keys and values of a corpus are computed once for all of its questions.
    """
    stack = model.decoder
    batch, questions, m = ids.shape
    hidden = stack.embed_tokens(ids.flatten(0, 1))
    bias = stack.block[0].layer[0].SelfAttention.compute_bias(m, m)
    causal = torch.full((m, m), -torch.inf).triu(1)
    bias = bias + causal
    hide = torch.zeros(batch, 1, 1, rows.shape[1]).masked_fill(~mask[:, None, None], -torch.inf)

    def heads(x: Tensor) -> Tensor:  # [B, k, inner] -> [B, H, k, d]
        return x.unflatten(-1, (model.config.num_heads, -1)).transpose(1, 2)

    for block in stack.block:
        hidden = block.layer[0](hidden, position_bias=bias)[0]
        cross = block.layer[1]
        attention = cross.EncDecAttention
        query = heads(attention.q(cross.layer_norm(hidden)).view(batch, questions * m, -1))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, heads(attention.k(rows)), heads(attention.v(rows)), attn_mask=hide, scale=1.0
        )
        out = out.transpose(1, 2).reshape(batch * questions, m, -1)
        hidden = hidden + attention.o(out)
        hidden = block.layer[2](hidden)
    hidden = stack.final_layer_norm(hidden)
    if model.config.scale_decoder_outputs:
        hidden = hidden * model.config.d_model**-0.5
    return model.lm_head(hidden).unflatten(0, (batch, questions))
