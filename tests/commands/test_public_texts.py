"""Tokenizers that put an end token behind every text, and public texts that spell one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import hf_dp_xattn as dpx
from hf_dp_xattn.commands import texts
from hf_dp_xattn.commands.models import load_tokenizer

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *["a", "the", "code", "of", "one", "two", "what"]]


@pytest.fixture(params=["<s> $A </s>", "<s> $A", "$A </s>", "$A"])
def folder(request: Any, tmp_path: Path) -> str:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single=request.param, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(tmp_path)
    for cached in (load_tokenizer, texts._public_start, texts._public_end):
        cached.cache_clear()
    return str(tmp_path)


def test_no_end_token_behind_a_question_or_a_prefix(folder: str) -> None:
    assert texts.read_question(folder, "what the code", chat=False).tolist() == [[10, 5, 6]]
    whole = texts.read_prefix(folder, "the code", chat=False)
    (apart,) = texts.read_prefix(folder, ["the code"], chat=False).context
    assert isinstance(whole.context, type(apart)) and whole.context.tolist() == apart.tolist() == [5, 6]
    assert set(whole.head.tolist()) <= {1}


def test_an_end_token_of_the_text_itself_stays_private(folder: str) -> None:
    found = texts.read_prefix(folder, "the </s>", chat=False).context
    assert not isinstance(found, list) and found.tolist() == [5, 2]


@pytest.mark.parametrize("chat", [False, True])
def test_a_question_that_spells_an_end_token_is_refused(folder: str, chat: bool) -> None:
    with pytest.raises(dpx.ConfigError, match="</s>"):
        texts.read_question(folder, "the </s> code", chat=chat)
