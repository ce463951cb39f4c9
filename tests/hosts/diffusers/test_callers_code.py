"""What a caller's own code and spelling can do around a protected pipeline: callbacks, siblings, other spellings, long prompts."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.diffusers import prompt_encoder

from ...hosts_tiny import picture, quiet, tiny_sd, tiny_sdxl
from ..text.libraries import config, library
from ..text.pipelines import call, tiny_flux, tiny_pixart, tiny_sd3
from .test_placed_prompts import protect

SPELLINGS = "red box", "Red box", "red  box", "red\tbox", "RED &#98;ox", "red, box.", "Red box\u200b"
LONG = "red box blue dogs " * 300


def protected_by(mechanism: str, pipe: Any, **options: Any) -> Any:
    if mechanism != "library":
        return protect(pipe, mechanism, **options)
    return dpx.protect(pipe, config(**options), calibration=library(pipe, **options), ledger=dpx.Ledger())


@pytest.mark.parametrize("name", ["callback", "callback_on_step_end"])
@pytest.mark.parametrize("mechanism", ["library", "kernel_sum"])
def test_no_callback_runs_the_encoders(mechanism: str, name: str) -> None:
    pipe, seen = tiny_sdxl(), []
    protected_by(mechanism, pipe)

    def reads(*args: Any) -> Any:
        seen.append(pipe.encode_prompt("a secret", device="cpu"))
        return {}

    steps = {"callback_steps": 1} if name == "callback" else {}
    with pytest.raises(dpx.ProtectionLostError):
        picture(pipe, "red box", **{name: reads}, **steps)
    assert not seen


@pytest.mark.parametrize("name", ["callback", "callback_on_step_end"])
def test_no_callback_runs_a_denoiser_of_attention(name: str) -> None:
    pipe = tiny_sdxl()
    protect(pipe, "kernel_sum")
    sibling = quiet(StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, add_watermarker=False))
    steps = {"callback_steps": 1} if name == "callback" else {}
    rows, pooled = torch.zeros(1, 77, pipe.unet.config.cross_attention_dim), torch.zeros(1, 32)

    def draws(*args: Any) -> Any:
        sibling(prompt_embeds=rows, pooled_prompt_embeds=pooled, image=torch.zeros(1, 3, 64, 64))
        return {}

    with pytest.raises(dpx.DPXAttnError):
        picture(pipe, "red box", **{name: draws}, **steps)


def test_released_rows_are_all_that_a_denoiser_is_given() -> None:
    pipe = tiny_flux()
    handle = protect(pipe)
    with handle.encoding(), torch.no_grad():
        rows, pooled, _ = pipe.encode_prompt("a secret", None)
    sibling = quiet(FluxImg2ImgPipeline.from_pipe(pipe))
    picture_given = {"image": torch.zeros(1, 3, 16, 16), "height": 16, "width": 16, "strength": 1.0}
    given = {"prompt_embeds": rows, "pooled_prompt_embeds": pooled, **picture_given}
    with pytest.raises(dpx.ProtectionLostError, match="outside of a call"):
        sibling(**given, num_inference_steps=1)
    call(pipe, prompt_embeds=rows, pooled_prompt_embeds=pooled)
    dpx.unprotect(pipe)
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("mechanism", ["library", "kernel_sum"])
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_spellings_that_a_pipeline_reads_alike_are_one_account(make: Any, mechanism: str) -> None:
    pipe = make()
    handle = protected_by(mechanism, pipe, unit="context")
    handle.release(SPELLINGS[0])
    for other in SPELLINGS[1:]:
        try:
            handle.release(other)  # the same release, where the ids are the same
        except dpx.BudgetExceededError:
            continue
        assert make is tiny_sd and mechanism == "kernel_sum"
    assert len(handle.report().releases) == 1
    handle.release("blue box")


def test_a_prompt_that_is_cut_off_is_said_to_be() -> None:
    handle = protect(tiny_sdxl(), "kernel_sum")
    with pytest.warns(dpx.TruncatedPromptWarning):
        handle.release(LONG)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dpx.TruncatedPromptWarning)
        handle.release("a red box")


def test_no_flag_of_a_tokenizer_tells_how_long_a_prompt_was() -> None:
    left = []
    for prompt in ("red box", LONG):
        pipe = tiny_sdxl()
        handle = protect(pipe, "kernel_sum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle.release(prompt)
        left.append([dict(t.deprecation_warnings) for t in (pipe.tokenizer, pipe.tokenizer_2)])
    assert left[0] == left[1]


def test_callbacks_that_are_no_functions_spend_nothing() -> None:
    pipe = tiny_sdxl()
    handle = protect(pipe, "kernel_sum")
    with pytest.raises(dpx.ConfigError, match="callback_on_step_end"):
        picture(pipe, "red box", callback_on_step_end=3)
    assert not handle.report().releases


@pytest.mark.parametrize(
    "weight", [1e308, 10**400, float("nan"), float("inf")], ids=["1e308", "10^400", "nan", "inf"]
)
def test_weights_out_of_range_are_refused(weight: float) -> None:
    handle = protect(tiny_sdxl(), "kernel_sum")
    with pytest.raises(dpx.ConfigError, match="weight"):
        handle.private_encode(["a", ("red", weight)])


def test_a_private_encoding_of_nobody_is_refused() -> None:
    handle = protect(tiny_sdxl(), "kernel_sum")
    encoding = handle.private_encode(["a", ("red", 1.3)])
    with pytest.raises(dpx.ContextError, match="another protected host"):
        handle.release(type(encoding)())


@pytest.mark.parametrize("make", [tiny_sdxl])
def test_what_is_cut_off_opens_no_second_account(make: Any) -> None:
    handle = protect(make(), "kernel_sum", unit="context")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle.release(LONG + "one")
        with pytest.raises(dpx.BudgetExceededError):
            handle.release(LONG + "another")
    assert len(handle.report().releases) == 1


@pytest.mark.parametrize("what", ["clip_skip", "negative_prompt"])
def test_what_would_be_ignored_is_refused(what: str) -> None:
    pipe = tiny_sdxl()
    handle = protect(pipe, "kernel_sum")
    release = handle.release("a red box")
    given = {"clip_skip": 1} if what == "clip_skip" else {"negative_prompt": release.inputs()["prompt"]}
    with pytest.raises(dpx.ConfigError, match="Nothing was spent"):
        picture(pipe, "a blue box", **given)
    assert len(handle.report().releases) == 1


@pytest.mark.parametrize(
    "make, given", [(tiny_pixart, {"clean_caption": False}), (tiny_sd3, {"clip_skip": 1})]
)
def test_other_encodings_of_a_prompt_are_refused(
    make: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("is_bs4_available", "is_ftfy_available"):  # what diffusers cleans with
        monkeypatch.setattr(prompt_encoder, name, lambda: True)
    pipe = make()
    handle = protect(pipe)
    with pytest.raises(dpx.ConfigError, match=f"`{next(iter(given))}` changes how"):
        call(pipe, "red box", **given)
    assert not handle.report().releases


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_flux])
def test_no_unprotected_pipeline_takes_a_release_for_a_prompt(make: Any) -> None:
    pipe = make()
    handle = protect(pipe)
    inputs = handle.release("red box").inputs()
    run = picture if make is tiny_sdxl else call
    run(pipe, **inputs)
    run(pipe, prompt=[inputs["prompt"], "blue dogs"])
    dpx.unprotect(pipe)
    with pytest.raises((TypeError, ValueError)):
        run(pipe, **inputs)
