"""One small host of each kind, to try on all of them what must not depend on the kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import hf_dp_xattn as dpx

from ..hosts_tiny import close, picture, tiny_sd
from .transformers.decoder_only import tiny as decoder
from .transformers.encoder_decoder import tiny as seq2seq
from .transformers.mllama import tiny as image_text

CONFIG = dpx.DPXAttnConfig(
    unit="row", mechanism="kernel_sum", epsilon=8.0, delta=1e-5, degree=1, projection_dim=4
)


@dataclass(frozen=True)
class Kind:
    """make: a fresh host. plain: a call of it with private input (and a seed that chooses it), as of an unprotected host. release: the
    same private input, by a handle. read: a call with a release."""

    make: Callable[[], Any]
    plain: Callable[[Any, int], torch.Tensor]
    release: Callable[[Any, int], dpx.Release]
    read: Callable[[Any, dpx.Release], torch.Tensor]

    def leaks(self, host: Any, want: torch.Tensor, seed: int = 1) -> bool:
        """Whether the host answers a private input as if it were not protected. want: as it does when it is not."""
        try:
            return close(self.plain(host, seed), want)
        except dpx.DPXAttnError:
            return False


def _prompt(seed: int) -> str:
    return "a secret " + "abcdefghij"[seed]


def _scores(model: Any, generate: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    return torch.nan_to_num(generate(model, inputs, max_new_tokens=3)[1], neginf=0.0)


def _decode(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    return torch.nan_to_num(decoder.generate(model, inputs, **options)[1], neginf=0.0)


def _own() -> dict[str, torch.Tensor]:
    ids = decoder.tokens(4, 50).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _after_prefix(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.cat([decoder.tokens(9, seed), decoder.tokens(4, 50)]).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


KINDS = {
    "diffusers": Kind(
        tiny_sd,
        lambda pipe, seed: picture(pipe, _prompt(seed)),
        lambda handle, seed: handle.release(_prompt(seed)),
        lambda pipe, release: picture(pipe, **release.inputs()),
    ),
    "encoder-decoder": Kind(
        lambda: seq2seq.tiny("bart"),
        lambda model, seed: _scores(model, seq2seq.generate, seq2seq.one("bart", seed)),
        lambda handle, seed: handle.release(**seq2seq.one("bart", seed)),
        lambda model, release: _scores(model, seq2seq.generate, release.inputs()),
    ),
    "decoder-only": Kind(
        lambda: decoder.tiny("llama"),
        lambda model, seed: _decode(model, _after_prefix(seed)),
        lambda handle, seed: handle.release(decoder.tokens(9, seed)),
        lambda model, release: _decode(model, release.inputs(**_own())),
    ),
    "image-text": Kind(
        image_text.tiny,
        lambda model, seed: _scores(
            model, image_text.generate, {**image_text.images(1, seed), **image_text.texts(1)}
        ),
        lambda handle, seed: handle.release(**image_text.images(1, seed)),
        lambda model, release: _scores(model, image_text.generate, release.inputs(**image_text.texts(1))),
    ),
}
