"""Code of the caller's that runs within a call of a protected pipeline, but is no callback: it may do no more than outside of one."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

import hf_dp_xattn as dpx

from ...hosts_tiny import picture, quiet, tiny_sd, tiny_sdxl
from ..text.pipelines import call, options, tiny_flux, tiny_qwen
from .test_callers_code import protected_by

HOSTS: dict[str, tuple[Callable[[], Any], str]] = {
    "SD kernel_sum": (tiny_sd, "kernel_sum"),
    "SDXL kernel_sum": (tiny_sdxl, "kernel_sum"),
    "SDXL library": (tiny_sdxl, "library"),
    "Flux rows": (tiny_flux, "none"),
    "Flux library": (tiny_flux, "library"),
}
SECRET = "a secret"
Reach = Callable[[Any], Any]


def encode(pipe: Any) -> Any:
    more = (1, False) if "StableDiffusionPipeline" in type(pipe).__name__ else ()
    return pipe.encode_prompt(SECRET, *(("cpu", *more) if more else (None,)))


def run_encoder(pipe: Any) -> Any:
    return pipe.text_encoder(pipe.tokenizer(SECRET, return_tensors="pt").input_ids)


REACHES: dict[str, Reach] = {"encode_prompt": encode, "text_encoder": run_encoder}


def by_scheduler(pipe: Any, reach: Reach) -> dict[str, Any]:
    class Own(type(pipe.scheduler)):  # type: ignore[misc]
        @functools.wraps(type(pipe.scheduler).set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            reach(pipe)
            super().set_timesteps(*args, **kwargs)

    pipe.scheduler = Own.from_config(pipe.scheduler.config)
    return {}


def by_step(pipe: Any, reach: Reach) -> dict[str, Any]:
    before = pipe.scheduler.step

    @functools.wraps(before)
    def step(*args: Any, **kwargs: Any) -> Any:
        reach(pipe)
        return before(*args, **kwargs)

    pipe.scheduler.step = step
    return {}


def by_progress(pipe: Any, reach: Reach) -> dict[str, Any]:
    class Own(io.StringIO):
        def write(self, text: str) -> int:
            reach(pipe)
            return super().write(text)

    pipe.set_progress_bar_config(disable=False, file=Own(), mininterval=0)
    return {}


def by_list(pipe: Any, reach: Reach) -> dict[str, Any]:
    class Own(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            reach(pipe)
            return super().__iter__()

    return {"callback_on_step_end_tensor_inputs": Own(["latents"])}


WAYS = {"scheduler": by_scheduler, "step": by_step, "progress": by_progress, "list": by_list}


def draw(pipe: Any, **given: Any) -> Any:
    if "Flux" not in type(pipe).__name__:
        return picture(pipe, "red box", **given)
    return pipe("red box", **{**options(pipe), **given})


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("reached", list(REACHES))
@pytest.mark.parametrize("host", list(HOSTS))
def test_no_code_of_the_callers_encodes(host: str, reached: str, way: str) -> None:
    make, mechanism = HOSTS[host]
    if host == "SD kernel_sum" and reached == "encode_prompt":
        pytest.skip("Stable Diffusion's encode_prompt releases what it is given")
    pipe = make()
    protected_by(mechanism, pipe)
    seen: list[Any] = []
    refused: list[dpx.DPXAttnError] = []

    def reach(pipe: Any) -> None:
        try:
            seen.append(REACHES[reached](pipe))
        except dpx.DPXAttnError as error:  # caught here: one that passes through tqdm leaves its lock locked
            refused.append(error)

    draw(pipe, **WAYS[way](pipe, reach))
    assert refused and not seen
    if way == "step" and host != "SD kernel_sum":  # the message says where
        assert "test_strangers.py" in str(refused[0])


def embeddings(pipe: Any, handle: Any) -> dict[str, torch.Tensor]:
    with handle.public(), torch.no_grad():
        encoded = pipe.encode_prompt(SECRET, None)
    found = [t for t in encoded if t is not None]
    return {"prompt_embeds": found[0], "pooled_prompt_embeds": found[2 if "XL" in type(pipe).__name__ else 1]}


SIBLINGS = {
    "Flux rows": (tiny_flux, "none", FluxImg2ImgPipeline),
    "Flux library": (tiny_flux, "library", FluxImg2ImgPipeline),
    "SDXL library": (tiny_sdxl, "library", StableDiffusionXLImg2ImgPipeline),
}


def sibling_of(pipe: Any, kind: Any) -> Any:
    more = {"add_watermarker": False} if "XL" in kind.__name__ else {}
    return quiet(kind.from_pipe(pipe, **more))


@pytest.mark.parametrize("host", list(SIBLINGS))
def test_no_sibling_is_given_embeddings(host: str) -> None:
    make, mechanism, kind = SIBLINGS[host]
    pipe = make()
    handle = protected_by(mechanism, pipe)
    given = embeddings(pipe, handle)
    sibling = sibling_of(pipe, kind)
    size = 64 if "XL" in kind.__name__ else 16
    arguments = {**given, "image": torch.zeros(1, 3, size, size), "strength": 1.0, "num_inference_steps": 1}
    arguments |= {"guidance_scale": 1.0} if size == 64 else {"height": size, "width": size}
    with pytest.raises(dpx.ProtectionLostError, match="outside of a call"):
        sibling(**arguments)
    with (
        handle.guard.access.enter("encoding"),
        pytest.raises(dpx.ProtectionLostError, match="outside of a call"),
    ):
        sibling(**arguments)
    with pytest.raises(
        dpx.ProtectionLostError, match="outside of a call"
    ):  # within a call of the protected one
        draw(pipe, **by_step(pipe, lambda p: sibling(**arguments)))
    del pipe.scheduler.step  # which they share
    with handle.public():
        sibling(**arguments)
    dpx.unprotect(pipe)
    sibling(**arguments)


@pytest.mark.parametrize("where", ["a wrapper", "in place"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("host", ["Flux rows", "Flux library"])
def test_compiled_denoisers_are_gated(host: str, when: str, where: str) -> None:
    make, mechanism, kind = SIBLINGS[host]
    pipe, plain = make(), make()
    torch._dynamo.reset()

    def compile_it() -> None:
        if where == "in place":
            pipe.transformer.compile(backend="eager", fullgraph=True)
        else:
            pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)

    if when != "after":
        compile_it()
    if when == "before":  # and run: a graph that is there already
        draw(pipe)
    handle = protected_by(mechanism, pipe)
    if when == "after":
        compile_it()
    other = protected_by(mechanism, plain)
    release = handle.release("red box")
    drawn = call(pipe, **release.inputs())
    assert drawn.shape == call(plain, **other.release("red box").inputs()).shape
    sibling = sibling_of(pipe, kind)
    with pytest.raises(dpx.ProtectionLostError, match="outside of a call"):
        sibling(
            **embeddings(pipe, handle),
            image=torch.zeros(1, 3, 16, 16),
            height=16,
            width=16,
            strength=1.0,
            num_inference_steps=1,
        )


RETURNS = {
    "SD kernel_sum": "",
    "SDXL kernel_sum": "",
    "SDXL library": "",
    "Flux rows": "",
    "Flux library": "",
}


@pytest.mark.parametrize("in_place", [False, True], ids=["returned", "in place"])
@pytest.mark.parametrize("host", list(RETURNS))
def test_no_callback_hands_back_other_embeddings(host: str, in_place: bool) -> None:
    make, mechanism = HOSTS[host]
    pipe = make()
    protected_by(mechanism, pipe)

    def changes(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if in_place:
            given["prompt_embeds"].data[-1] = 0.25
            return {}
        return {"prompt_embeds": given["prompt_embeds"] * 0 + 0.25}

    with pytest.raises(dpx.DPXAttnError):
        draw(
            pipe,
            callback_on_step_end=changes,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
            num_inference_steps=2,
        )


@pytest.mark.parametrize("host", list(RETURNS))
def test_a_callback_may_end_guidance(host: str) -> None:
    make, mechanism = HOSTS[host]
    pipe = make()
    protected_by(mechanism, pipe)
    seen: list[int] = []

    def keeps(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(given["prompt_embeds"]))
        return {"prompt_embeds": copy.copy(given["prompt_embeds"])}

    draw(
        pipe,
        callback_on_step_end=keeps,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        num_inference_steps=2,
    )
    assert len(seen) == 2


@pytest.mark.parametrize("host", ["Flux rows", "Flux library"])
def test_a_graph_of_ones_own_asks_too(host: str) -> None:
    make, mechanism, _ = SIBLINGS[host]
    pipe = make()
    handle = protected_by(mechanism, pipe)
    given: list[Any] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *a: given.append(a[2]), with_kwargs=True)
    draw(pipe)
    hook.remove()
    torch._dynamo.reset()
    compiled: Any = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    with handle.public():
        compiled(**given[-1])
    with pytest.raises(dpx.ProtectionLostError, match="outside of a call"):  # the graph is there already
        compiled(**given[-1])


@pytest.mark.parametrize("host", list(HOSTS))
def test_no_code_of_the_callers_draws(host: str) -> None:
    make, mechanism = HOSTS[host]
    pipe = make()
    handle = protected_by(mechanism, pipe)
    model = pipe.transformer if "Flux" in host else pipe.unet
    given: list[Any] = []
    hook = model.register_forward_pre_hook(lambda *a: given.append((a[1], a[2])), with_kwargs=True)
    with handle.public():
        draw(pipe)  # public rows, which stand for exact ones
    hook.remove()
    seen: list[Any] = []
    refused: list[dpx.DPXAttnError] = []

    def reach(pipe: Any) -> None:
        args, kwargs = given[-1]
        try:
            seen.append(model(*args, **kwargs))
        except dpx.DPXAttnError as error:
            refused.append(error)

    draw(pipe, **by_step(pipe, reach))
    assert refused and not seen


PARTS: dict[str, Callable[[Any], Any]] = {
    "decoder": lambda encoder: encoder.get_decoder(),
    "language model": lambda encoder: encoder.model.language_model,
    "tokens": lambda encoder: encoder.model.language_model.embed_tokens,
    "layer": lambda encoder: encoder.model.language_model.layers[0],
}


@pytest.mark.parametrize("part", list(PARTS))
@pytest.mark.parametrize("mechanism", ["library", "none"])
def test_no_part_of_an_encoder_runs_by_hand(mechanism: str, part: str) -> None:
    pipe = tiny_qwen()
    model = PARTS[part](pipe.text_encoder)
    ids = torch.tensor([[5, 6, 7]])
    given = (torch.zeros(1, 3, 32),) if part == "layer" else (ids,)
    handle = protected_by(mechanism, pipe)
    with pytest.raises(dpx.ProtectionLostError):
        model(*given)
    draw_it = call(pipe, "red box")
    assert bool(draw_it.isfinite().all())
    with pytest.raises(dpx.ProtectionLostError):
        model(*given)
    with handle.public():
        if part != "layer":
            model(*given)
    dpx.unprotect(pipe)
    assert not model._forward_pre_hooks


def test_no_sibling_is_protected_in_another_way() -> None:
    pipe = tiny_sdxl()
    protected_by("library", pipe)
    sibling = sibling_of(pipe, StableDiffusionXLImg2ImgPipeline)
    with pytest.raises(dpx.UnsupportedModelError, match="in another way"):
        protected_by("kernel_sum", sibling)
    assert dpx.handle_of(sibling.unet) is None
    dpx.unprotect(pipe)
    protected_by("kernel_sum", sibling)
