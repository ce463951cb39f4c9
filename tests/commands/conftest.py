"""Models on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_dp_xattn as dpx

from ..hosts.anchor_calibrations import CONFIG, protect
from ..hosts.transformers.decoder_only.tiny import tiny as decoder_tiny
from ..hosts.transformers.encoder_decoder.tiny import tiny as seq2seq_tiny
from ..hosts.transformers.mllama.tiny import tiny as image_tiny
from ..hosts_tiny import tiny_sd
from ..hub.conftest import hub  # noqa: F401 (a fixture)

WORDS = ["zebra", "quartz", "jukebox", "wyvern", "obelisk", "marzipan"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=16,
    )


TEMPLATE = "{% for m in messages %}{{ 'obelisk ' if m['role'] == 'system' else ' marzipan ' }}{{ m['content'] }}{% endfor %}"


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template of one fixed word before the system prompt and one before a user's turn."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain, protected (anchors), bart, llama, chat (a llama with a chat template), mllama: each a folder."""
    root = tmp_path_factory.mktemp("models")
    pipe = tiny_sd()
    pipe.save_pretrained(root / "plain")
    with protect(pipe, CONFIG) as handle:
        pipe.save_pretrained(root / "protected")
        handle.calibration.save_pretrained(root / "calibration")
    hosts: dict[str, Any] = {"bart": seq2seq_tiny("bart"), "llama": decoder_tiny("llama")}
    for name, model in hosts.items():
        model.save_pretrained(root / name)
        word_tokenizer().save_pretrained(root / name)
    decoder_tiny("llama").save_pretrained(root / "chat")
    chat_tokenizer().save_pretrained(root / "chat")
    image_tiny().save_pretrained(root / "mllama")
    dpx.DPXAttnConfig(
        mechanism="kernel_sum", unit="row", epsilon=2.0, degree=1, projection_dim=4
    ).save_pretrained(root / "config")
    return root
