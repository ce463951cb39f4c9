"""A call inside `protected.public()` that is interrupted (Ctrl-C) leaves no permission behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx

from .decoder_only import tiny as decoders
from .encoder_decoder import tiny as encoder_decoders


def _interrupt(layer: Any, handle: Any, call: Callable[[], Any]) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = layer.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt), handle.public():
        call()
    hook.remove()


def test_a_decoders_body(exact: dpx.DPXAttnConfig) -> None:
    model = decoders.tiny("llama")
    handle = dpx.protect(model, exact)
    ids = decoders.tokens(4)[None]
    _interrupt(model.model.layers[1], handle, lambda: model.generate(ids, max_new_tokens=2))
    with pytest.raises(dpx.ProtectionLostError):
        model.model(input_ids=ids)
    with handle.public():
        model(input_ids=ids)


def test_the_decoder_of_an_encoder_decoder_model(private: dpx.DPXAttnConfig) -> None:
    model = encoder_decoders.tiny("bart")
    handle = dpx.protect(model, private)
    given = encoder_decoders.one("bart")
    _interrupt(model.model.decoder.layers[1], handle, lambda: model.generate(**given, max_new_tokens=2))
    with pytest.raises(dpx.ProtectionLostError):
        model.get_decoder()(input_ids=torch.tensor([[2]]), encoder_hidden_states=torch.randn(1, 7, 16))
    with handle.public():
        model.generate(**given, max_new_tokens=2)
