"""Codes of texts: of each text alone, by the host's own encoder or the user's."""

from __future__ import annotations

import logging
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.hosts.text.unit_encoders import UnitEncoder, _alike, unit_encoder

from ...hosts_tiny import tiny_sd, tiny_sdxl, tiny_tokenizer
from ..test_private_run import random_states
from ..transformers.decoder_only import tiny as decoder
from ..transformers.encoder_decoder import tiny as seq2seq
from .libraries import LINES, config, library
from .words import tokenizer

TEXTS = ("please be polite", "close at five", "be")


def _bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    return BertModel(config).eval()


def _encoder(kind: str) -> UnitEncoder:
    if kind in ("llama", "gpt2", "gemma2", "opt"):
        return unit_encoder(decoder.tiny(kind), tokenizer())
    if kind in ("bart", "t5"):
        return unit_encoder(seq2seq.tiny(kind), tokenizer())
    if kind == "bert":
        return unit_encoder(None, encoder=(_bert(), tokenizer()))
    return unit_encoder({"sd": tiny_sd, "sdxl": tiny_sdxl}[kind]())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt", "bart", "t5", "bert", "sd", "sdxl"])
def test_a_code_is_of_its_text_alone(kind: str) -> None:
    encode = _encoder(kind)
    codes = encode(TEXTS)
    assert codes.dtype == torch.float32 and codes.ndim == 2 and bool(codes.isfinite().all())
    for i, text in enumerate(TEXTS):
        assert torch.equal(encode([text])[0], codes[i])
        assert torch.equal(encode(["another one, much longer than the first", text])[1], codes[i])
    assert not torch.equal(codes[0], codes[1]) and bool(codes[2].any())
    assert not encode([""])[0].isnan().any()
    batched = encode.public([*TEXTS, "", "be quite now", TEXTS[0]])  # several of one length
    assert torch.allclose(batched, encode([*TEXTS, "", "be quite now", TEXTS[0]]), atol=1e-5)


def test_the_middle_layer_is_where_it_stops() -> None:
    model, words = decoder.tiny("llama"), tokenizer()
    ran: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    encode = unit_encoder(model, words)
    ran.clear()
    code = encode(TEXTS[:1])[0]
    assert set(ran) == {0}  # of two layers
    assert all(len(layer._forward_hooks) == 1 for layer in model.model.layers)
    ids = torch.tensor([[words.bos_token_id, *words(TEXTS[0]).input_ids]])
    with torch.no_grad():
        want = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, 1:].mean(0)
    assert torch.allclose(code, want, atol=1e-6)


def test_a_first_row_is_told_but_for_rounding() -> None:
    """Texts of two lengths give rows that some CPUs round in two ways."""
    row = torch.randn(32)
    assert _alike(row, row * (1 + 1e-6)) and _alike(row.bfloat16(), (row * 1.002).bfloat16())
    assert not _alike(row, row + 0.1 * torch.randn(32))


def test_functions_pairs_and_what_is_neither() -> None:
    def lengths(texts: Any) -> Any:
        assert len(texts) == 1  # one at a time
        return np.array([[len(texts[0]), 1.0]])

    encode = unit_encoder(None, encoder=lengths)
    assert encode(TEXTS).tolist() == [[float(len(t)), 1.0] for t in TEXTS]
    assert "lengths" in encode.name and unit_encoder(None, encoder=encode) is encode
    with pytest.raises(ConfigError, match="tokenizer"):
        unit_encoder(decoder.tiny("llama"))
    with pytest.raises(ConfigError, match="MiniLM"):
        unit_encoder(torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="BertModel"):
        unit_encoder(None, encoder=_bert())
    with pytest.raises(ConfigError, match="str"):
        unit_encoder(None, encoder="all-MiniLM-L6-v2")


def test_a_failure_quotes_no_text() -> None:
    def fails(texts: Any) -> Any:
        raise ValueError(f"cannot read {texts[0]}")

    with pytest.raises(ContextError) as caught:
        unit_encoder(None, encoder=fails)(["the secret"])
    assert "secret" not in str(caught.value) + str(caught.value.__cause__)


def test_private_texts_leave_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    """Neither in logs, nor in warnings, nor in the process's random numbers; and one that fails has the code 0 as quietly."""

    def talks(texts: Any) -> Any:
        logging.getLogger("a_users_encoder").warning("read %s", texts[0])
        logging.warning("read %s", texts[0])
        warnings.warn(f"read {texts[0]}", stacklevel=1)
        torch.rand(len(texts[0])), random.random(), np.random.rand()
        if "secret" in texts[0]:
            raise ValueError(texts[0])
        return [[1.0, 2.0]]

    encode = unit_encoder(None, encoder=talks)
    with pytest.warns(UserWarning, match="read a red apple"):
        encode.trial()  # of a public text
    assert len(caplog.records) == 2
    assert encode._length == 2
    caplog.clear()
    before = random_states()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode(["a dog", "my secret"]).tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert not caplog.records and random_states() == before


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_pair_with_the_hosts_own_model_runs(part: str) -> None:
    pipe = tiny_sdxl()
    pair = getattr(pipe, part), pipe.tokenizer
    made = library(None, encoder=pair)
    handle = dpx.protect(pipe, config(), calibration=made, encoder=pair, ledger=dpx.Ledger())
    assert handle.release("a red circle").texts
    with pytest.raises(dpx.ProtectionLostError):
        pair[0](torch.zeros(1, 4, dtype=torch.int64))


def test_a_pair_with_a_language_model_itself_runs() -> None:
    model, words = decoder.tiny("llama"), tokenizer()
    made = library(None, LINES, encoder=(model, words))
    handle = dpx.protect(model, config(), calibration=made, encoder=(model, words), ledger=dpx.Ledger())
    assert handle.release("please be polite").texts


def test_a_long_text_is_cut_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    encode = unit_encoder(tiny_sd())
    long = "a very long prompt " * 20
    assert torch.equal(encode([long]), encode([long + "with a secret end"]))
    assert "longer" not in capfd.readouterr().err
    assert tiny_tokenizer().model_max_length == 16
