"""A recording (trace, export, captured graph) of a protected host would keep what its gates decided and drop them: it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import hf_dp_xattn as dpx

from ..hosts_tiny import CHANNELS, latents, tiny_sd
from .kinds import CONFIG
from .transformers.decoder_only import tiny as decoder
from .transformers.encoder_decoder import tiny as seq2seq
from .transformers.mllama import tiny as image_text

STATES = torch.zeros(1, 16, CHANNELS)


class Plain(nn.Module):
    """Tensors in and out, as exporters ask for."""

    def __init__(self, host: nn.Module, *names: str, **options: Any) -> None:
        super().__init__()
        self.host, self.names, self.options = host, names, options

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        out = self.host(**dict(zip(self.names, tensors, strict=True)), **self.options)
        return out if isinstance(out, torch.Tensor) else out[0]


Part = tuple[Any, nn.Module, tuple[torch.Tensor, ...]]


def _unet() -> Part:
    pipe = tiny_sd()
    plain = Plain(pipe.unet, "sample", "timestep", "encoder_hidden_states", return_dict=False)
    return pipe, plain, (latents(), torch.tensor(5), STATES)


def _layer() -> Part:
    pipe = tiny_sd()
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    plain = Plain(layer, "hidden_states", "encoder_hidden_states")
    return pipe, plain, (torch.zeros(1, 4, layer.query_dim), STATES)


def _text() -> Part:
    pipe = tiny_sd()
    return pipe, Plain(pipe.text_encoder, "input_ids", return_dict=False), (torch.full((1, 16), 5),)


def _seq2seq() -> Part:
    model = seq2seq.tiny("bart")
    plain = Plain(model, "input_ids", "decoder_input_ids", use_cache=False, return_dict=False)
    return model, plain, (torch.arange(10, 19).unsqueeze(0), torch.tensor([[2, 5, 6]]))


def _decoder() -> Part:
    model = decoder.tiny("llama")
    plain = Plain(model, "input_ids", use_cache=False, return_dict=False)
    return model, plain, (decoder.tokens(5, 1).unsqueeze(0),)


def _mllama() -> Part:
    model = image_text.tiny()
    given = {**image_text.images(1, 1), **image_text.texts(1)}
    return model, Plain(model, *given, use_cache=False, return_dict=False), tuple(given.values())


PARTS = {
    "unet": _unet,
    "layer of unet": _layer,
    "text encoder": _text,
    "encoder-decoder": _seq2seq,
    "decoder-only": _decoder,
    "image-text": _mllama,
}


def _export(plain: nn.Module, given: tuple[torch.Tensor, ...]) -> object:
    return torch.export.export(plain, given, strict=False)


def _trace(plain: nn.Module, given: tuple[torch.Tensor, ...]) -> object:
    return torch.jit.trace(plain, given, check_trace=False)


def _make_fx(plain: nn.Module, given: tuple[torch.Tensor, ...]) -> object:
    return make_fx(plain)(*given)


@pytest.fixture(params=PARTS)
def part(request: pytest.FixtureRequest) -> Any:
    host, plain, given = PARTS[request.param]()
    protected = dpx.protect(host, CONFIG, ledger=dpx.Ledger())
    with torch.no_grad():
        yield protected, plain, given
    dpx.unprotect(host)


@pytest.mark.parametrize("record", [_trace, _export, _make_fx])
def test_no_recording_of_what_public_opens(part: Any, record: Callable[..., object]) -> None:
    protected, plain, given = part
    with protected.public():
        plain(*given)  # as a run it passes
        with pytest.raises(dpx.ProtectionLostError, match=r"before dpx\.protect"):
            record(plain, given)


def test_no_captured_graph(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    protected, plain, given = part
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with protected.public(), pytest.raises(dpx.ProtectionLostError, match="a CUDA graph"):
        plain(*given)


def test_no_trace_of_a_release() -> None:
    """It would serve that release to every later placeholder."""
    pipe = tiny_sd()
    with torch.no_grad(), dpx.protect(pipe, CONFIG, ledger=dpx.Ledger()) as protected:
        states = protected.release("a cat").inputs()["prompt_embeds"]
        plain = Plain(pipe.unet, "sample", "timestep", "encoder_hidden_states", return_dict=False)
        with pytest.raises(dpx.ProtectionLostError, match=r"torch\.jit\.trace"):
            _trace(plain, (latents(), torch.tensor(5), states))
