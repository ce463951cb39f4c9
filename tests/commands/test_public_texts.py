"""Tokenizers that put an end token behind every text, and public texts that spell one."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.transformers import model_texts as texts

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *["a", "the", "code", "of", "one", "two", "what"]]


@pytest.fixture(params=["<s> $A </s>", "<s> $A", "$A </s>", "$A"])
def tokenizer(request: Any) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single=request.param, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def test_no_end_token_behind_a_question_or_a_prefix(tokenizer: PreTrainedTokenizerFast) -> None:
    assert texts.read_question(tokenizer, "what the code", chat=False).tolist() == [[10, 5, 6]]
    whole = texts.read_prefix(tokenizer, "the code", chat=False)
    (apart,) = texts.read_prefix(tokenizer, ["the code"], chat=False).context
    assert isinstance(whole.context, type(apart)) and whole.context.tolist() == apart.tolist() == [5, 6]
    assert set(whole.head.tolist()) <= {1}


def test_an_end_token_of_the_text_itself_stays_private(tokenizer: PreTrainedTokenizerFast) -> None:
    found = texts.read_prefix(tokenizer, "the </s>", chat=False).context
    assert not isinstance(found, list) and found.tolist() == [5, 2]


@pytest.mark.parametrize("chat", [False, True])
def test_a_question_that_spells_an_end_token_is_refused(
    tokenizer: PreTrainedTokenizerFast, chat: bool
) -> None:
    with pytest.raises(dpx.ConfigError, match="</s>"):
        texts.read_question(tokenizer, "the </s> code", chat=chat)
