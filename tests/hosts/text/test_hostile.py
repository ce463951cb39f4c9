"""Other doors to a host that reads released text: threads, tasks, copies, callbacks, shared parts, calls past the swapped one."""

from __future__ import annotations

import asyncio
import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.callbacks import PipelineCallback
from transformers import TextGenerationPipeline, TextIteratorStreamer

import hf_dp_xattn as dpx

from ...hosts_tiny import picture, tiny_sd
from ..transformers.decoder_only import tiny as decoder
from .libraries import LINES, answer_with, config, library
from .test_language_models import QUESTION, WORDS, chat, chat_pipe, ids, protect_chats
from .words import tokenizer

SECRET = "a purple cross, under water"


@pytest.fixture
def pipe() -> Any:
    return tiny_sd()


@pytest.fixture
def protected(pipe: Any) -> Any:
    return dpx.protect(pipe, config(), calibration=library(pipe))


def test_calls_past_the_swapped_one_are_closed(pipe: Any, protected: Any) -> None:
    with pytest.raises(dpx.ProtectionLostError):
        StableDiffusionPipeline.__call__(pipe, SECRET, num_inference_steps=1)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image = torch.zeros(1, 3, 16, 16)
    for made in (other, AutoPipelineForImage2Image.from_pipe(pipe)):
        with pytest.raises(dpx.ProtectionLostError):
            made(SECRET, image=image, num_inference_steps=2, strength=1.0)
    assert "_dp_xattn_handle" not in vars(other)
    assert dpx.protect(other, config()) is protected
    other(SECRET, image=image, num_inference_steps=2, strength=1.0)
    chats = chat_pipe()
    protect_chats(chats)
    with pytest.raises(dpx.ProtectionLostError):
        TextGenerationPipeline.__call__(chats, chat(), **WORDS)
    with pytest.raises(dpx.ProtectionLostError):
        chats.model.generate(**chats.preprocess("be polite"), **WORDS)


def test_embeddings_of_a_public_block_do_not_come_out(pipe: Any, protected: Any) -> None:
    with protected.public():
        embeds, negative = pipe.encode_prompt(SECRET, "cpu", 1, True)
    for given in ({"prompt_embeds": embeds}, {"prompt_embeds": embeds, "negative_prompt_embeds": negative}):
        with pytest.raises(dpx.ConfigError, match="prompt_embeds"):
            picture(pipe, **given)
    assert picture(pipe, "a dog", negative_prompt_embeds=negative) is not None  # public


def test_no_copies(pipe: Any, protected: Any) -> None:
    model = decoder.tiny("llama")
    handle = dpx.protect(
        model, config(), calibration=library(model, LINES, tokenizer=tokenizer()), tokenizer=tokenizer()
    )
    for host in (pipe, pipe.text_encoder, protected, model, handle, protected.release(SECRET)):
        for make in (copy.deepcopy, pickle.dumps):
            with pytest.raises(dpx.DPXAttnError):
                make(host)


def test_threads_share_releases(pipe: Any, protected: Any) -> None:
    def run(i: int) -> torch.Tensor:
        return picture(pipe, f"secret number {i % 2}, a dog")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(8)))
    assert all(torch.equal(f, found[i % 2]) for i, f in enumerate(found))
    assert len(protected.report().releases) == 2


def test_a_permission_is_of_its_own_thread_and_task(pipe: Any, protected: Any) -> None:
    def closed() -> None:
        with pytest.raises(dpx.ProtectionLostError):
            pipe.encode_prompt(SECRET, "cpu", 1, False)

    with protected.public(), ThreadPoolExecutor(1) as pool:
        pool.submit(closed).result()

    async def other(opened: asyncio.Event, done: asyncio.Event) -> None:
        await opened.wait()
        closed()
        done.set()

    async def opens(opened: asyncio.Event, done: asyncio.Event) -> None:
        with protected.public():
            opened.set()
            await done.wait()

    async def both() -> None:
        opened, done = asyncio.Event(), asyncio.Event()
        await asyncio.gather(other(opened, done), opens(opened, done))

    asyncio.run(both())

    def suspended() -> Any:
        with protected.guard.serving():
            yield

    generator = suspended()
    next(generator)
    closed()


class Shorten(PipelineCallback):
    tensor_inputs = ["prompt_embeds"]  # noqa: RUF012 (diffusers reads it so)

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Any) -> Any:
        assert "prompt_embeds" in callback_kwargs
        return callback_kwargs


class Encodes(PipelineCallback):
    """diffusers' own kind, which reads a text by hand."""

    @property
    def tensor_inputs(self) -> list[str]:
        return ["prompt_embeds"]

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Any) -> Any:
        pipeline.encode_prompt(SECRET, "cpu", 1, False)
        return callback_kwargs


class Called:
    def __call__(self, pipeline: Any, step: int, time: Any, kwargs: Any) -> Any:
        pipeline.encode_prompt(SECRET, "cpu", 1, False)
        return kwargs


@pytest.mark.parametrize("kind", ("function", "partial", "object", "diffusers"))
def test_no_callback_runs_with_the_encoders_open(pipe: Any, protected: Any, kind: str) -> None:
    callback: Any = {
        "function": lambda *args: Called()(*args),
        "partial": functools.partial(Called()),
        "object": Called(),
        "diffusers": Encodes(cutoff_step_ratio=1.0),
    }[kind]
    picture(pipe, SECRET)
    with pytest.raises(dpx.ProtectionLostError):
        picture(pipe, SECRET, callback_on_step_end=callback)


def test_callbacks_of_diffusers_work(pipe: Any, protected: Any) -> None:
    seen = []
    assert picture(pipe, SECRET, callback_on_step_end=Shorten(cutoff_step_ratio=1.0)) is not None
    picture(pipe, SECRET, callback_on_step_end=lambda pipe, step, time, kwargs: seen.append(step) or kwargs)
    assert seen == [0, 1]


def test_chats_stream_are_prefilled_and_keep_their_history() -> None:
    pipe = chat_pipe()
    protected = protect_chats(pipe)
    answer_with(protected, "close at five", "be blue")
    history = [QUESTION, {"role": "assistant", "content": "be"}, QUESTION]
    found = pipe(chat("a secret\nof two lines", *history), **WORDS)[0]["generated_text"]
    assert found[0]["content"] == "close at five\nbe blue" and found[1:4] == history and len(found) == 5
    prefilled = pipe(
        chat("a secret\nof two lines", QUESTION, {"role": "assistant", "content": "be"}), **WORDS
    )
    assert len(prefilled[0]["generated_text"]) == 3 and prefilled[0]["generated_text"][2][
        "content"
    ].startswith("be")
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True)
    pipe(chat("a secret\nof two lines"), streamer=streamer, **WORDS)
    assert "".join(streamer).strip() and len(protected.report().releases) == 1
    inputs = protected.release("a secret\nof two lines").inputs(input_ids=ids("be open"))
    pipe.model.generate(**inputs, streamer=streamer, **WORDS)


def test_a_context_of_too_many_parts_spends_nothing(pipe: Any) -> None:
    made = library(pipe, unit="context")
    object.__setattr__(made, "grouping", "phrases")  # a plan that answers a whole, cut in parts all the same
    protected = dpx.protect(pipe, config(unit="context"), calibration=made)
    with pytest.raises((dpx.ConfigError, dpx.ContextError)):
        protected.release(SECRET)
    assert not protected.ledger.entries() and len(protected.release("a dog").text) == 1


def test_an_encoder_that_fails_on_all_texts_costs_nothing(pipe: Any, protected: Any) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError(f"cannot read {args}")

    pipe.text_encoder.register_forward_pre_hook(fail)
    with pytest.raises(dpx.ContextError) as caught:
        protected.release(SECRET)
    assert "purple" not in str(caught.value) and not protected.ledger.entries()


def test_a_model_that_is_unprotected_meanwhile_says_so(pipe: Any, protected: Any) -> None:
    def stop(pipe: Any, step: int, time: Any, kwargs: Any) -> Any:
        protected.unprotect()
        return kwargs

    with pytest.raises(dpx.ProtectionLostError, match="unprotected"):
        picture(pipe, SECRET, callback_on_step_end=stop)
