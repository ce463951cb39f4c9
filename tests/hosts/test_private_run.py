"""How private texts are encoded: without dropout, without the process's random numbers, and without a word in the logs."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.private_run import private_run
from hf_dp_xattn.privacy.bits import SeededEntropy

from ..hosts_tiny import picture, tiny_sd
from .kinds import CONFIG, KINDS
from .test_lora import add_lora


def modules_of(host: Any) -> Iterator[nn.Module]:
    for part in (host, *(vars(host).get(n) for n in ("text_encoder", "unet"))):
        if isinstance(part, nn.Module):
            yield from part.modules()


def random_states() -> tuple[bytes, Any, bytes]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]


def train(host: Any) -> None:
    for module in modules_of(host):
        module.train()
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_draws_nothing(kind: str) -> None:
    host = KINDS[kind].make()
    handle = dpx.protect(host, CONFIG)
    train(host)
    before, modes = random_states(), [m.training for m in modules_of(host)]
    KINDS[kind].release(handle, 1)
    assert random_states() == before
    assert [m.training for m in modules_of(host)] == modes


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_released_is_without_dropout(kind: str) -> None:
    found = []
    for mode in (False, True):
        host = KINDS[kind].make()
        handle = dpx.protect(host, CONFIG, entropy=SeededEntropy(0), ledger=dpx.Ledger())
        if mode:
            train(host)
        released = KINDS[kind].release(handle, 1).contexts[0]
        found.append([t for s in released.structures for t in vars(s).values() if torch.is_tensor(t)])
    assert found[0]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_of_an_adapter_is_none() -> None:
    found = []
    for mode in (False, True):
        pipe = tiny_sd()
        add_lora(pipe.unet, dropout=0.5)
        handle = dpx.protect(pipe, CONFIG, entropy=SeededEntropy(0), ledger=dpx.Ledger())
        pipe.unet.train(mode)
        before = random_states()
        release = handle.release("a red circle")
        assert random_states() == before
        assert handle.release("a red circle").contexts[0] is release.contexts[0]  # the model has not changed
        found.append(
            [t for s in release.contexts[0].structures for t in vars(s).values() if torch.is_tensor(t)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_two_unets_may_share_a_text_encoder() -> None:
    a = tiny_sd()
    b = tiny_sd(1, text_encoder=a.text_encoder, tokenizer=a.tokenizer)
    first, second = dpx.protect(a, CONFIG), dpx.protect(b, CONFIG)
    assert picture(a, "a red circle").isfinite().all() and picture(b, "a green circle").isfinite().all()
    with second.encoding():
        a.text_encoder(torch.zeros(1, 4, dtype=torch.int64))
    first.unprotect()
    with pytest.raises(dpx.ProtectionLostError):
        a.text_encoder(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(dpx.ProtectionLostError), first.public():
        a.text_encoder(torch.zeros(1, 4, dtype=torch.int64))
    second.unprotect()
    a.text_encoder(torch.zeros(1, 4, dtype=torch.int64))


def _gpt2() -> Any:
    small = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 512}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**small, bos_token_id=2, eos_token_id=3, pad_token_id=3)).eval()


def _roformer() -> Any:
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"intermediate_size": 32, "max_position_embeddings": 600}
    decoder = tf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3
    )
    encoder = tf.RoFormerConfig(**small, **sizes, pad_token_id=3)
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 3
    return tf.EncoderDecoderModel(config=config).eval()


@pytest.mark.parametrize("make", [_gpt2, _roformer], ids=["gpt2", "roformer"])
def test_nothing_is_logged_of_a_text(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """transformers warns of a text that ends with padding, once in a process: neither now nor, by its absence, later."""
    handle = dpx.protect(make(), CONFIG, ledger=dpx.Ledger())
    tf.utils.logging.get_logger("transformers").propagate = True
    logging.getLogger("transformers").warning_once.cache_clear()  # type: ignore[attr-defined]
    caplog.clear()
    seen = []
    for last in (9, 3):
        handle.release(torch.tensor([5, 6, 7, 8, last]))
        seen.append((caplog.text, logging.getLogger("transformers").warning_once.cache_info().misses))  # type: ignore[attr-defined]
    assert seen == [("", 0)] * 2


@pytest.mark.parametrize("name", ["transformers.modeling_utils", "torch._dynamo", "a_users_own", None])
def test_other_threads_log_as_ever(caplog: pytest.LogCaptureFixture, name: str | None) -> None:
    logger = logging.getLogger(name)
    with private_run(), ThreadPoolExecutor(1) as pool:
        logger.warning("private")
        pool.submit(logger.warning, "public").result()
    logger.warning("later")
    assert [r.message for r in caplog.records] == ["public", "later"]


def test_a_logger_that_is_made_inside_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with private_run():
        logger = logging.getLogger("made_inside_a_private_run")
        logger.warning("private")
    logger.warning("later")
    assert [r.message for r in caplog.records] == ["later"]
