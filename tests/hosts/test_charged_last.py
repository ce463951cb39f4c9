"""Everything public is checked before a charge: a call that the host refuses costs nothing, and its prompt can be released afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts import bindings, promised

from ..hosts_tiny import CHANNELS, LENGTH, latents, picture, tiny_sd, tiny_unet
from .transformers.encoder_decoder.tiny import documents, tiny
from .transformers.mllama import tiny as image_text

PROMPTS = ["a red circle", "a blue square"]


def rows(n: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, n, CHANNELS, generator=torch.Generator().manual_seed(1))


def image(size: int = 16, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, 3, size, size)


TEXT: dict[str, dict[str, Any]] = {
    "too few generators": {"generator": [torch.Generator()]},
    "no generator": {"generator": 5},
    "no generator for the steps": {"generator": 5, "latents": latents(2)},
    "timesteps that the scheduler does not take": {"timesteps": [1, 2]},
    "sigmas that the scheduler does not take": {"sigmas": [0.5, 0.1]},
    "no steps": {"num_inference_steps": 0},
    "steps as text": {"num_inference_steps": "2"},
    "latents of other channels": {"latents": latents(2)[:, :3]},
    "latents of another batch": {"latents": latents(3)},
    "latents of rank 3": {"latents": latents(2)[0]},
    "latents in half precision": {"latents": latents(2).half()},
    "latents as text": {"latents": "noise"},
    "a height that 8 does not divide": {"height": 13, "width": 16},
    "a negative height": {"height": -8, "width": 16},
    "a width as text": {"height": 16, "width": "16"},
    "guidance as text": {"guidance_scale": "strong"},
    "guidance as a vector": {"guidance_scale": torch.ones(3) * 7},
    "guidance that is no number": {"guidance_scale": float("nan")},
    "rescaling as text": {"guidance_rescale": "much"},
    "no pictures per prompt": {"num_images_per_prompt": 0},
    "half a picture per prompt": {"num_images_per_prompt": 1.5},
    "eta as text": {"eta": "some"},
    "unknown callback tensors": {"callback_on_step_end_tensor_inputs": ["secrets"]},
    "a callback of former versions that is none": {"callback": 5, "callback_steps": 1},
    "a callback of former versions without arguments": {"callback": lambda: None, "callback_steps": 1},
    "attention arguments as a list": {"cross_attention_kwargs": ["scale"]},
    "a LoRA scale that is no number": {"cross_attention_kwargs": {"scale": float("nan")}},
    "clip_skip": {"clip_skip": 1},
    "an IP-Adapter image": {"ip_adapter_image": image()},
    "three negative prompts": {"negative_prompt": ["a", "b", "c"]},
    "a negative prompt of another type": {"negative_prompt": 3},
    "both negative prompts": {"negative_prompt": "a", "negative_prompt_embeds": rows(LENGTH, 2)},
    "negative embeddings of 32 rows": {"negative_prompt_embeds": rows(32, 2)},
    "negative embeddings of other channels": {"negative_prompt_embeds": rows(LENGTH, 2)[..., :5]},
    "negative embeddings of another batch": {"negative_prompt_embeds": rows(LENGTH, 3)},
    "negative embeddings as text": {"negative_prompt_embeds": "ugly"},
}
IMG2IMG: dict[str, dict[str, Any]] = {
    "no image": {"image": None},
    "an image as text": {"image": "a.png"},
    "an image of rank 5": {"image": torch.zeros(1, 1, 3, 16, 16)},
    "three images for two prompts": {"image": image(batch=3)},
    "a strength of 3": {"strength": 3},
    "a strength as text": {"strength": "much"},
    "a strength that leaves no steps": {"strength": 0.1, "num_inference_steps": 2},
    "latents of another size": {"image": torch.zeros(1, 2, 8, 8)},
}
INPAINT: dict[str, dict[str, Any]] = {
    "no mask": {"mask_image": None},
    "a mask of rank 5": {"mask_image": torch.zeros(1, 1, 1, 16, 16)},
    "a mask of another size": {"mask_image": torch.zeros(1, 1, 24, 16), "padding_mask_crop": 4},
}
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "longer embeddings, no negative": {},
    "longer embeddings, a negative text": {"negative_prompt": "ugly"},
}


def check_free(handle: Any, call: Callable[[], Any], good: Callable[[], Any]) -> None:
    """The call raises and costs nothing; then what was good all along still runs, at the price of a release."""
    with pytest.raises(Exception):  # noqa: B017  # the host's own errors too
        call()
    assert handle.ledger.entries() == () and handle.report().releases == ()
    assert bool(torch.as_tensor(good()).isfinite().all()) and handle.ledger.entries()


@pytest.mark.parametrize("name", TEXT)
def test_text_to_image(name: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    check_free(handle, lambda: picture(pipe, PROMPTS, **TEXT[name]), lambda: picture(pipe, PROMPTS))


@pytest.mark.parametrize("name", IMG2IMG)
def test_image_to_image(name: str, private: Any) -> None:
    pipe = tiny_sd(cls=StableDiffusionImg2ImgPipeline)
    handle = dpx.protect(pipe, private)
    good = {"image": image(), "strength": 1.0}
    check_free(
        handle,
        lambda: picture(pipe, PROMPTS, **{**good, **IMG2IMG[name]}),
        lambda: picture(pipe, PROMPTS, **good),
    )


@pytest.mark.parametrize("name", INPAINT)
def test_inpainting(name: str, private: Any) -> None:
    pipe = tiny_sd(cls=StableDiffusionInpaintPipeline)
    handle = dpx.protect(pipe, private)
    good = {"image": image(), "mask_image": torch.ones(1, 1, 16, 16), "strength": 1.0}
    check_free(
        handle,
        lambda: picture(pipe, PROMPTS, **{**good, **INPAINT[name]}),
        lambda: picture(pipe, PROMPTS, **good),
    )


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_and_negatives_of_other_lengths(name: str, pipe: Any, private: Any) -> None:
    """An error of the package's own: diffusers' would come from a concatenation."""
    handle = dpx.protect(pipe, private)
    with pytest.raises(dpx.ConfigError, match="negative_prompt_embeds"):
        picture(pipe, prompt_embeds=rows(32), **EMBEDDINGS[name])
    assert handle.ledger.entries() == ()
    picture(pipe, prompt_embeds=rows(32), negative_prompt_embeds=rows(32))
    assert len(handle.report().releases) == 1


def test_a_bare_unet_with_another_sample(private: Any) -> None:
    """Placeholders of the pipeline in a loop of the caller's own."""
    pipe = tiny_sd()
    handle = dpx.protect(pipe, private)
    marks, _ = pipe.encode_prompt(PROMPTS[0], "cpu", 1, False)
    for sample in (latents(2), latents()[:, :3], latents()[0], latents().double()):
        with pytest.raises(dpx.ConfigError, match="sample"):
            pipe.unet(sample, 5, marks)
    assert handle.ledger.entries() == ()
    assert bool(pipe.unet(latents(), 5, marks).sample.isfinite().all())
    assert {c.number_of_releases for c in handle.ledger.entries()} == {1}


def test_a_batch_is_refused_as_a_whole(pipe: Any, private: Any) -> None:
    """By the ledger, before the host starts."""
    handle = dpx.protect(pipe, private)
    handle.release(PROMPTS[1])
    handle.releases.cache.clear()  # so that the second would have to be made again
    before, started = handle.ledger.entries(), []
    pipe.unet.register_forward_pre_hook(lambda *a: started.append(1))
    with pytest.raises(dpx.BudgetExceededError):
        picture(pipe, PROMPTS)
    assert handle.ledger.entries() == before
    assert len(handle.report().releases) == 1 and not started


def test_a_call_that_fails_later_has_made_its_release(pipe: Any, private: Any) -> None:
    """In the caller's own code: then the prompt is served by that release, at no further charge."""
    handle = dpx.protect(pipe, private)
    with pytest.raises(ZeroDivisionError):
        picture(pipe, PROMPTS[0], callback_on_step_end=lambda *a: 1 / 0)
    assert bool(picture(pipe, PROMPTS[0]).isfinite().all())
    assert {c.number_of_releases for c in handle.ledger.entries()} == {1}


def test_what_was_named_is_what_is_released(private: Any) -> None:
    """The caller's tensor may change until the first step."""
    pictures = []
    for change in (False, True):
        pipe = tiny_sd()
        handle = dpx.protect(pipe, private.replace(mechanism="none"))
        embeds = rows(LENGTH)
        marks, _ = pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=embeds)
        if change:
            embeds.zero_()
        pictures.append(picture(pipe, prompt_embeds=marks, guidance_scale=1.0))
        assert len(handle.report().releases) == 1
    assert torch.equal(*pictures)


# ---- encoders ------------------------------------------------------------------------------------------------------------------


def test_the_stand_in_is_the_same_for_all_prompts(pipe: Any, private: Any) -> None:
    """What runs before the charge knows nothing of the prompt."""
    handle = dpx.protect(pipe, private)
    seen: list[torch.Tensor] = []
    pipe.text_encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    before = []
    charge = handle.ledger.charge_all
    handle.ledger.charge_all = lambda *a, **k: (before.append(list(seen)), charge(*a, **k))[1]  # type: ignore[method-assign]
    for prompt in PROMPTS:
        seen.clear()
        handle.release(prompt)
    (first,), (second,) = before
    assert torch.equal(first, second)


def test_an_encoder_that_fails_costs_nothing(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)

    def fail(*args: Any) -> None:
        raise RuntimeError("no memory")

    hook = pipe.text_encoder.register_forward_hook(fail)
    with pytest.raises(dpx.ContextError, match=r"no memory.*Nothing was spent"):
        picture(pipe, PROMPTS[0], guidance_scale=1.0)
    with pytest.raises(dpx.ContextError, match="Nothing was spent"):
        handle.release(PROMPTS[0], horizon=2)
    hook.remove()
    assert handle.ledger.entries() == ()
    picture(pipe, PROMPTS[0])


def test_a_text_encoder_of_another_model_costs_nothing(private: Any) -> None:
    pipe = tiny_sd(unet=tiny_unet(cross_attention_dim=48))
    handle = dpx.protect(pipe, private)
    with pytest.raises(dpx.ContextError, match="48"):
        handle.release(PROMPTS[0])
    assert handle.ledger.entries() == ()


GENERATE: dict[str, dict[str, Any]] = {
    "a misspelt argument": {"max_new_token": 3},
    "more returns than beams": {"num_beams": 2, "num_return_sequences": 3},
    "no tokens": {"max_new_tokens": 0},
    "a negative length": {"max_new_tokens": -3},
    "a temperature of 0": {"do_sample": True, "temperature": 0.0},
    "decoder ids of another batch": {"decoder_input_ids": torch.zeros(5, 1, dtype=torch.long)},
    "a streamer for beams": {"num_beams": 2, "streamer": object()},
    "a stopping rule of another type": {"stopping_criteria": 3},
    "an unknown cache": {"cache_implementation": "paged"},
}


def check_generate(model: Any, handle: Any, inputs: dict[str, Any], wrong: dict[str, Any]) -> None:
    def good() -> Any:
        return model.generate(**inputs, max_new_tokens=2, do_sample=False)

    check_free(
        handle,
        lambda: model.generate(**inputs, **{"max_new_tokens": 2, "do_sample": False, **wrong}),
        lambda: good().float(),
    )


FINE_FOR_WHISPER = (
    "more returns than beams",
    "a temperature of 0",
)  # its own generate makes something of them
ON_HOSTS = [
    (host, name)
    for host in ("bart", "t5", "whisper")
    for name in GENERATE
    if host != "whisper" or name not in FINE_FOR_WHISPER
]


@pytest.mark.parametrize(("host", "name"), ON_HOSTS)
def test_generate(host: str, name: str, private: Any) -> None:
    model = tiny(host)
    check_generate(model, dpx.protect(model, private), documents(host), GENERATE[name])


@pytest.mark.parametrize("host", ["bart", "bert2gpt2"])
def test_a_text_that_the_decoder_has_no_positions_for(host: str, private: Any) -> None:
    """64 learned ones: the model would fail at the last of them, behind the charge."""
    model = tiny(host)
    handle, inputs = dpx.protect(model, private, ledger=dpx.Ledger()), documents(host, batch=1)
    length = {"min_new_tokens": 64, "max_new_tokens": 64, "do_sample": False}  # the last is not read again
    with pytest.raises(dpx.ConfigError, match="64 positions"):
        model.generate(**inputs, **{**length, "min_new_tokens": 65, "max_new_tokens": 100})
    assert handle.ledger.entries() == ()
    assert model.generate(**inputs, **length).shape[-1] == 65
    with pytest.warns(UserWarning, match="64 positions"):
        model.generate(**inputs, max_new_tokens=65, max_time=0.0)


@pytest.mark.parametrize("name", [n for n in GENERATE if not n.startswith("decoder")])
def test_generate_from_an_image(name: str, private: Any) -> None:
    model = image_text.tiny()
    inputs = {**image_text.images(), **image_text.texts()}
    check_generate(model, dpx.protect(model, private), inputs, GENERATE[name])


def test_an_image_of_another_size(private: Any) -> None:
    """It fails in the encoder, whatever it shows."""
    model = tiny("vit2gpt2")
    handle = dpx.protect(model, private)
    size = model.config.encoder.image_size
    large = torch.randn(1, 3, 2 * size, 2 * size)
    for call in (
        lambda: model.generate(pixel_values=large, max_new_tokens=2),
        lambda: handle.release(pixel_values=large),
    ):
        with pytest.raises(dpx.ContextError, match=r"size.*Nothing was spent"):
            call()
    assert handle.ledger.entries() == ()
    handle.release(pixel_values=large[..., :size, :size])


@pytest.mark.parametrize("known", [0, 1], ids=["all new", "one known"])
def test_one_call_with_more_contexts_than_are_kept(
    known: int, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was charged for it is served, whatever the number; placeholders of earlier calls make room."""
    for module in (bindings, promised):
        monkeypatch.setattr(module, "MAX_BINDINGS", 2)
    pipe, texts = tiny_sd(), ["one", "two", "three", "four"]
    with dpx.protect(pipe, private, ledger=dpx.Ledger()) as handle:
        for text in texts[:known]:
            handle.release(text)
        drawn = picture(pipe, texts, guidance_scale=1.0)
        read = picture(pipe, **handle.release(texts).inputs(), guidance_scale=1.0)
        assert drawn.isfinite().all() and torch.equal(drawn, read)
        picture(pipe, **handle.release(texts).inputs("public words"), guidance_scale=1.0)
        assert len(handle.report().releases) == len(texts)
    model, given = tiny("bart"), {"input_ids": torch.arange(10, 34).reshape(4, 6)}
    with dpx.protect(model, private, ledger=dpx.Ledger()) as handle:
        for ids in given["input_ids"][:known]:
            handle.release(ids)
        options = {"max_new_tokens": 2, "do_sample": False}
        reply = model.generate(**given, **options)
        assert torch.equal(reply, model.generate(**handle.release(**given).inputs(), **options))
