"""Diffusers pipelines that read released text: SD and SDXL, by the same code."""

from __future__ import annotations

import inspect
import random
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.diffusers.text_arguments import OTHERS, PRIVATE
from hf_dp_xattn.hosts.text.prompt_swap import PromptSwap, takes_prompt
from hf_dp_xattn.hosts.text.released_texts import ReleasedPrompt

from ...hosts_tiny import picture, tiny_sd, tiny_sdxl
from .libraries import PHRASES, answer_with, config, library
from .pipelines import PIPELINES, call

SECRET = "a purple cross, under water"


def protect(pipe: Any, epsilon: float = 8.0, **options: Any) -> Any:
    return dpx.protect(pipe, config(epsilon), calibration=library(pipe), **options)


class Spy:
    """All token ids that the text encoders are given."""

    def __init__(self, pipe: Any) -> None:
        self.ids: list[list[int]] = []
        for name, part in pipe.components.items():
            if "text_encoder" in name:
                part.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.ids += ids.tolist()


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_call_is_one_on_the_released_text(kind: str) -> None:
    pipe = PIPELINES[kind]()
    before = call(pipe, "a red circle, in snow", negative_prompt="on wood")
    protected = protect(pipe)
    found = call(pipe, SECRET, negative_prompt="on wood")
    text = protected.release(SECRET).text
    assert len(text) == 2 and set(text) <= set(PHRASES)
    with protected.public():
        assert torch.equal(found, call(pipe, str(text), negative_prompt="on wood"))
        assert torch.equal(before, call(pipe, "a red circle, in snow", negative_prompt="on wood"))
    assert torch.equal(found, call(pipe, **protected.release(SECRET).inputs(), negative_prompt="on wood"))
    report = protected.report()
    assert [entry["charges"] for entry in report.releases] == [1]
    assert list(text) == report.releases[0]["text"] and text[0] in str(report) and "cross" not in str(report)
    dpx.unprotect(pipe)
    assert torch.equal(before, call(pipe, "a red circle, in snow", negative_prompt="on wood"))
    assert type(pipe) is type(PIPELINES[kind]()) and "_dp_xattn_handle" not in vars(pipe)
    assert not any(
        m._forward_pre_hooks for p in pipe.components.values() if hasattr(p, "modules") for m in p.modules()
    )


@pytest.mark.parametrize("kind", PIPELINES)
def test_no_private_token_reaches_an_encoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = PIPELINES[kind]()
    protected = protect(pipe)
    monkeypatch.setattr(type(protected.guard.encode), "__call__", _stand_in_codes)
    spy = Spy(pipe)
    outputs, seen = [], []
    for secret in (SECRET, "the code is 123456, at midnight"):
        answer_with(protected, "at night", "on wood")
        spy.ids.clear()
        outputs.append(call(pipe, secret))
        seen.append([list(ids) for ids in spy.ids])
    assert torch.equal(*outputs) and seen[0] == seen[1] != []


def _stand_in_codes(self: Any, texts: Any) -> torch.Tensor:
    """Of no text: so the encoder is seen in the pipeline's own calls only."""
    return torch.zeros(len(texts), 32)


def test_batches_pictures_and_units() -> None:
    pipe = tiny_sd()
    protected = protect(pipe)
    both = picture(pipe, [SECRET, "a dog"], latents=torch.ones(2, 4, 8, 8))
    assert len(both) == 2 and len(protected.report().releases) == 2
    assert len(picture(pipe, SECRET, num_images_per_prompt=3)) == 3
    release = protected.release(["a cat", "on a mat"], groups="phrases")
    assert len(release) == 1 and len(release.text) == 2
    several = protected.release(["a cat", "on a mat"])
    assert [len(t) for t in several.texts] == [1, 1]
    with pytest.raises(dpx.ReleaseError, match=r"release\.texts"):
        _ = several.text
    beside = release.inputs(prompt="an oil painting")
    assert beside["prompt"] == f"an oil painting, {release.text}" and isinstance(
        beside["prompt"], ReleasedPrompt
    )
    assert len(picture(pipe, **several.inputs(), latents=torch.ones(2, 4, 8, 8))) == 2
    with pytest.raises(dpx.ConfigError, match="public"):
        release.inputs(input_ids=1)
    picture(pipe, **beside)
    assert len(protected.report().releases) == 5


def test_whole_prompts_are_one_unit() -> None:
    pipe = tiny_sd()
    protected = dpx.protect(pipe, config(unit="context"), calibration=library(pipe, unit="context"))
    picture(pipe, SECRET)
    assert len(protected.release(SECRET).text) == 1 and len(protected.report().releases) == 1
    assert len(protected.release(["a", "b"], groups="phrases").text) == 1


def test_which_pipelines_are_taken() -> None:
    """By their signature alone; the others have no private text."""
    classes = [
        c
        for name in dir(diffusers)
        if name.endswith("Pipeline") and isinstance(c := getattr(diffusers, name), type)
        if issubclass(c, diffusers.DiffusionPipeline)
    ]
    taken = [c.__name__ for c in classes if takes_prompt(c)]
    assert len(taken) >= 250 and len(classes) - len(taken) <= 40
    some = "StableDiffusion3 Flux Flux2 QwenImage PixArtAlpha Kandinsky3 Wan HunyuanVideo LTX StableCascadeCombined AudioLDM2 IF CogVideoX"
    assert {f"{name}Pipeline" for name in some.split()} <= set(taken)
    assert not {"DDPMPipeline", "StableVideoDiffusionPipeline", "KandinskyV22Pipeline"} & set(taken)
    private = {n for c in classes for n in inspect.signature(c.__call__).parameters if PRIVATE.fullmatch(n)}
    assert private == {
        "prompt",
        "prompt_2",
        "prompt_3",
        "prompt_4",
        "source_prompt",
        "editing_prompt",
        "lyrics",
        "transcription",
        "instruction",
        "task_prompt",
        "content_prompt",
        "source_subject_category",
        "target_subject_category",
    }
    refused = {n for c in classes for n in inspect.signature(c.__call__).parameters if OTHERS.fullmatch(n)}
    assert {
        "text_attention_mask",
        "text_model_output",
        "prompt_embeds",
        "pooled_prompt_embeds",
        "prompt_attention_mask",
        "prompt_embeds_t5",
        "messages",
        "input_ids",
        "prior_token_ids",
        "editing_prompt_embeddings",
    } <= refused
    assert not any("neg" in name or name.startswith(("num_", "callback")) for name in refused)


def test_a_second_prompt_is_private_too() -> None:
    pipe = tiny_sdxl()
    protected = protect(pipe)
    picture(pipe, SECRET, prompt_2="a hidden dog")
    assert len(protected.report().releases) == 2
    spied = Spy(pipe)
    answer_with(protected, "at night", "on wood")
    picture(pipe, "one, two", prompt_2="three, four")
    picture(pipe, "one, two")
    assert len(protected.report().releases) == 4 and spied.ids


def test_bad_input_spends_nothing() -> None:
    pipe = tiny_sd()
    protected = protect(pipe)
    for error, bad in (
        (ValueError, lambda: picture(pipe, SECRET, height=13, width=13)),
        (TypeError, lambda: picture(pipe, SECRET, negative_prompt=["a", "b", "c"])),
        (Exception, lambda: picture(pipe, SECRET, latents=torch.zeros(3, 3))),
        (Exception, lambda: picture(pipe, SECRET, timesteps="often")),
        (dpx.ConfigError, lambda: picture(pipe, 5)),
        (dpx.ConfigError, lambda: picture(pipe, [SECRET, 5])),
        (dpx.ConfigError, lambda: picture(pipe, prompt_embeds=torch.zeros(1, 16, 32))),
        (dpx.ContextError, lambda: picture(pipe, "")),
        (dpx.ContextError, lambda: picture(pipe, " , ; ")),
        (dpx.ContextError, lambda: protected.release(torch.zeros(2, 3))),
        (dpx.ContextError, lambda: protected.release([])),
        (dpx.ConfigError, lambda: protected.release(SECRET, groups=torch.zeros(2))),
        (dpx.ConfigError, lambda: protected.release([SECRET, SECRET], horizon=3)),
        (dpx.ConfigError, lambda: protected.release(SECRET, horizon=0)),
    ):
        with pytest.raises(error) as caught:
            bad()
        assert "purple" not in str(caught.value)
    assert not protected.report().releases and not protected.ledger.entries()


def test_a_rehearsal_takes_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    protected = protect(pipe)
    rehearsed = []
    real = PromptSwap._rehearse
    monkeypatch.setattr(PromptSwap, "_rehearse", lambda self, *args: rehearsed.append(1) or real(self, *args))

    class Draws(type(pipe.scheduler)):  # type: ignore[misc]
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            random.random(), np.random.rand()
            super().set_timesteps(*args, **kwargs)

    pipe.scheduler = Draws.from_config(pipe.scheduler.config)
    state = torch.get_rng_state()
    random.seed(0), np.random.seed(0)
    found = picture(pipe, SECRET, generator=[torch.Generator().manual_seed(3)])  # charged in this call
    assert torch.equal(torch.get_rng_state(), state) and rehearsed == [1]
    drawn = random.random(), np.random.rand()
    random.seed(0), np.random.seed(0)
    assert torch.equal(found, picture(pipe, SECRET, generator=[torch.Generator().manual_seed(3)]))
    assert drawn == (random.random(), np.random.rand())
    assert rehearsed == [1] and len(protected.report().releases) == 1
    assert not pipe.unet._forward_hooks and vars(pipe)["_progress_bar_config"] == {"disable": True}


def test_the_text_encoders_are_closed_but_in_calls() -> None:
    pipe = tiny_sdxl()
    protected = protect(pipe)
    for run in (
        lambda: pipe.encode_prompt(SECRET, device="cpu"),
        lambda: pipe.text_encoder(torch.zeros(1, 16, dtype=torch.long)),
        lambda: pipe.text_encoder_2.text_model(torch.zeros(1, 16, dtype=torch.long)),
    ):
        with pytest.raises((dpx.ProtectionLostError, AttributeError)):
            run()
    with protected.public():
        pipe.encode_prompt("a public text", device="cpu")

    def peek(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.encode_prompt(SECRET, device="cpu")
        return kwargs

    with pytest.raises(dpx.ProtectionLostError, match="text encoder"):
        picture(pipe, "a dog", callback_on_step_end=peek)
    with protected.public():
        picture(pipe, "a dog", callback_on_step_end=peek)


def test_pipelines_that_share_an_encoder() -> None:
    pipe = tiny_sd()
    protected = protect(pipe)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(dpx.ProtectionLostError, match="other_pipe"):
        other(SECRET, image=torch.zeros(1, 3, 16, 16), num_inference_steps=2, strength=1.0)
    assert dpx.protect(other, config(), calibration=protected.calibration) is protected
    image = other(SECRET, image=torch.zeros(1, 3, 16, 16), num_inference_steps=2, strength=1.0).images
    assert len(image) == 1 and len(protected.report().releases) == 1
    with pytest.raises(dpx.ConfigError, match="other settings"):
        dpx.protect(other, config(4.0), calibration=protected.calibration)
    third = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(dpx.ConfigError, match="other settings"):
        dpx.protect(third, config(4.0), calibration=protected.calibration)
    with pytest.raises(dpx.ConfigError, match="other settings"):
        dpx.protect(pipe, dpx.DPXAttnConfig(unit="row", mechanism="kernel_sum"))
    dpx.unprotect(pipe)
    assert picture(third, "a dog") is not None and not pipe.text_encoder._forward_pre_hooks


def test_what_was_replaced_is_noticed() -> None:
    pipe = tiny_sd()
    protected = protect(pipe)
    pipe.text_encoder._forward_pre_hooks.clear()
    with pytest.raises(dpx.ProtectionLostError, match="gate"):
        picture(pipe, SECRET)
    dpx.unprotect(pipe)
    with pytest.raises(dpx.ProtectionLostError, match="unprotected"):
        protected.release(SECRET)
    assert not protected.ledger.entries()


def test_one_text_has_one_budget_on_all_hosts() -> None:
    ledger = dpx.Ledger()
    pipe, other = tiny_sd(), tiny_sd()
    protected = protect(pipe, ledger=ledger)
    protected.release(SECRET)
    with pytest.raises(dpx.BudgetExceededError):
        protect(other, ledger=ledger).release(SECRET + " ")
    with pytest.raises(dpx.BudgetExceededError):
        protected.release(SECRET, fresh=True)
    kernel = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="group", degree=1, projection_dim=4)
    third = dpx.protect(tiny_sd(), kernel, ledger=ledger)
    with pytest.raises(dpx.BudgetExceededError):
        third.release(SECRET, groups="phrases")
    # as its units, as a text, by its letters; without special tokens, cleaned, and by what the encoder reads
    assert len({entry.digest for entry in ledger.entries()}) == 6
