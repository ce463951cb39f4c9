"""A host in training mode: its encoder is run without dropout, and the process's random numbers stay where they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hf_dp_xattn as dpx
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
