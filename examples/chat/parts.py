"""The chat model's configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention

from chat.language import HEAD, vocabulary

MODEL = Path(__file__).parent / "model"
BUCKET = 64  # the user's first position is the head's length plus this, whatever the segments' lengths
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ '<s> ' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ '<|system|> " + HEAD + " ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ '<|user|> ' + m['content'] + ' ' }}"
    "{% else %}{{ '<|assistant|> ' + m['content'] + ' </s> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; digits stand alone. Special tokens first, then the words in alphabetical order."""
    vocab = {w: i for i, w in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        padding_side="left",
        model_max_length=1024,
    )
    fast.chat_template = TEMPLATE
    return fast


def build_model(vocab_size: int, *, width: int = 128, layers: int = 4) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=width**-0.5)
    for layer in model.model.layers:
        start_by_copying(layer.self_attn)
    return model


@torch.no_grad()
def start_by_copying(attention: LlamaAttention, share: float = 0.06) -> None:
    """At first a head looks at tokens like its own and adds what it finds there.

    W_q = W_k and W_o = share * W_v^T, rows orthonormal: the "mimetic" initialisation of Trockman and Kolter, arXiv 2305.09828. With a
    tied embedding what is seen is also what is said, from which copying is soon learnt.
    """
    groups, size = attention.num_key_value_groups, attention.head_dim
    key = torch.linalg.qr(torch.randn_like(attention.k_proj.weight).mT)[0].mT
    value = torch.linalg.qr(torch.randn_like(attention.v_proj.weight).mT)[0].mT
    attention.k_proj.weight.copy_(key)
    attention.v_proj.weight.copy_(value)
    attention.q_proj.weight.copy_(key.view(-1, size, key.shape[1]).repeat_interleave(groups, 0).flatten(0, 1))
    each = value.view(-1, size, value.shape[1]).repeat_interleave(groups, 0).flatten(0, 1)
    attention.o_proj.weight.copy_(share * each.mT)


def head_ids(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Ids [h] of the public head: beginning of text, the system role's mark, fixed words."""
    ids: list[int] = tokenizer("<s> <|system|> " + HEAD, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids)
