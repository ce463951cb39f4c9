"""Private prompts that a pipeline stumbles over, where public stand-ins are read: refused before the charge, or served."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx

from ...hosts_tiny import tiny_sd, tiny_sdxl, tiny_tokenizer
from ..text.libraries import config, library
from ..text.pipelines import call, tiny_pixart, tiny_sd3
from .test_placed_prompts import KERNEL


class Runtime:
    """Of another library: it runs, and torch cannot hook it."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.dtype = model, model.config, model.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


SECRET = "my secret <|x|> tail"


class Tokenizer(type(tiny_tokenizer())):  # type: ignore[misc]
    """Like tiktoken's: a special token's word is an error, which quotes the text."""

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        if "<|x|>" in str(text):
            raise ValueError(f"disallowed in {text}")
        return super().__call__(text, *args, **kwargs)


def _protect(pipe: Any, mechanism: str = "kernel_sum", unit: str = "row") -> Any:
    more = KERNEL if mechanism == "kernel_sum" else {}
    chosen = dpx.DPXAttnConfig(mechanism=mechanism, unit=unit, **more)
    return dpx.protect(pipe, chosen, allow_uncalibrated=True, ledger=dpx.Ledger())


@pytest.mark.parametrize(
    ("make", "mechanism"), [(tiny_sd, "kernel_sum"), (tiny_sdxl, "kernel_sum"), (tiny_sd3, "none")]
)
def test_a_tokenizer_that_fails_on_a_prompt(make: Any, mechanism: str) -> None:
    pipe = make()
    for name, part in pipe.components.items():
        if name in ("tokenizer", "tokenizer_2"):
            part.__class__ = Tokenizer
    handle = _protect(pipe, mechanism)
    for run in (handle.release, lambda text: call(pipe, text)):
        with pytest.raises(dpx.ContextError, match=r"tokenizer.*ValueError.*nothing was spent") as caught:
            run(SECRET)
        assert caught.value.__context__ is None
    assert not handle.ledger.entries() and not handle.report().releases
    assert call(pipe, "a red circle").isfinite().all()


@pytest.mark.parametrize("mechanism", ["library", "kernel_sum"])
@pytest.mark.parametrize(("make", "name"), [(tiny_sd, "text_encoder"), (tiny_sdxl, "text_encoder_2")])
def test_an_encoder_that_no_gate_closes_is_refused(make: Any, name: str, mechanism: str) -> None:
    pipe = make()
    made = library(pipe)
    setattr(pipe, name, Runtime(getattr(pipe, name)))
    before = {k: dict(vars(m)) for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    with pytest.raises(dpx.UnsupportedModelError, match=rf"{name} is a Runtime.*Nothing was patched"):
        if mechanism == "library":
            dpx.protect(pipe, config(), calibration=made, ledger=dpx.Ledger())
        else:
            _protect(pipe)
    assert dpx.handle_of(pipe) is None and type(pipe).__module__.startswith("diffusers.")
    assert before == {k: vars(m) for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


@pytest.mark.parametrize("unit", ["row", "context"])
def test_a_text_without_tokens_is_served(unit: str) -> None:
    pipe = tiny_pixart()
    assert not pipe.tokenizer([""]).input_ids[0]
    handle = _protect(pipe, unit=unit)
    handle.release("")
    assert call(pipe, "").isfinite().all() and len(handle.report().releases) == 1


@pytest.mark.parametrize("callback", [lambda pipe: {}, 5], ids=["one argument", "no function"])
def test_a_bad_callback_beside_embeddings_costs_nothing(callback: Any) -> None:
    pipe = tiny_sdxl()
    handle = _protect(pipe)
    embeds = {"prompt_embeds": torch.randn(1, 16, 64), "pooled_prompt_embeds": torch.randn(1, 32)}
    with pytest.raises(dpx.ConfigError, match="callback_on_step_end"):
        call(pipe, callback_on_step_end=callback, **embeds)
    assert not handle.ledger.entries()
