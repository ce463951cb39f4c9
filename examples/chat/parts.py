"""The chat model's configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    return LlamaForCausalLM(config)


def head_ids(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Ids [h] of the public head: beginning of text, the system role's mark, fixed words."""
    ids: list[int] = tokenizer("<s> <|system|> " + HEAD, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids)
