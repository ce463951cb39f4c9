"""Groups as lists, arrays and tensors: one release, whatever they come in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.mechanisms.groups import as_groups
from hf_dp_xattn.privacy.bits import SeededEntropy

from ..hosts.transformers.decoder_only.tiny import tiny as decoder_tiny
from ..hosts.transformers.encoder_decoder.tiny import tiny
from ..hosts.transformers.mllama.tiny import tiny as image_tiny
from ..hosts_tiny import CHANNELS, tiny_sd

NUMBERS = [4, 4, 0, 0, 0, 9]
WAYS = {
    "list": NUMBERS,
    "tuple": tuple(NUMBERS),
    "numpy": np.array(NUMBERS),
    "numpy int32": np.array(NUMBERS, dtype=np.int32),
    "tensor": torch.tensor(NUMBERS),
}
HOSTS = {
    "diffusers": (tiny_sd, torch.randn(6, CHANNELS)),
    "encoder-decoder": (lambda: tiny("bart"), torch.randn(6, 16)),
    "image-text": (image_tiny, torch.randn(6, 32)),
    "decoder-only": (lambda: decoder_tiny("llama"), torch.arange(5, 11)),
}
CONFIG = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="group", degree=1, projection_dim=2)
BAD: list[Any] = [[0.5] * 6, ["secret"] * 6, [[0, 1], [2]], [True] * 6, {"a": 1}, [2**70] * 6, object()]


@pytest.mark.parametrize("way", WAYS)
def test_each_is_the_same_tensor(way: str) -> None:
    assert as_groups(WAYS[way]).tolist() == NUMBERS


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_take_them_all(host: str) -> None:
    make, context = HOSTS[host]
    ledger = dpx.Ledger()
    with dpx.protect(make(), CONFIG, ledger=ledger) as handle:
        releases = [handle.release(context, groups=groups) for groups in WAYS.values()]
        charged = ledger.entries()
        assert releases[0].guarantees[0].units == 3 and len({c.digest for c in charged}) == len(charged)
        assert len({id(r.contexts[0]) for r in releases}) == 1
        for bad in BAD:
            with pytest.raises((dpx.ConfigError, dpx.ContextError)) as caught:
                handle.release(context, groups=bad)
            assert "secret" not in str(caught.value)
        assert ledger.entries() == charged


def test_attention_takes_them_all() -> None:
    key = torch.randn(1, 2, 6, 4)
    sums = [
        dpx.release_attention(
            key, key, CONFIG, groups=groups, entropy=SeededEntropy(1), allow_useless=True
        ).structure.tensors()["sums"]
        for groups in WAYS.values()
    ]
    assert all(torch.equal(sums[0], other) for other in sums)
    for bad in (*BAD, "phrases"):
        with pytest.raises((dpx.ConfigError, dpx.ContextError)):
            dpx.release_attention(key, key, CONFIG, groups=bad, allow_useless=True)
