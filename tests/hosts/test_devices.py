"""Half precision, CPU offload, torch.compile."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
import torch._dynamo.testing
from diffusers.models.attention_processor import AttnProcessor2_0

import hf_dp_xattn as dpx

from ..hosts_tiny import CHANNELS, latents, picture, tiny_sd, tiny_unet
from .anchor_calibrations import BOTH, protect
from .transformers.decoder_only.tiny import tiny as decoder_tiny
from .transformers.encoder_decoder.tiny import tiny as seq2seq_tiny

PROMPT = "a red circle"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mechanism", ["none", "kernel_sum", "dptree", "anchors"])
def test_dtypes(dtype: torch.dtype, mechanism: str, private: Any) -> None:
    pipe = tiny_sd().to(dtype)
    before = picture(pipe, PROMPT, latents=latents(1, dtype))
    handle = protect(pipe, private.replace(mechanism=mechanism))
    after = picture(pipe, PROMPT, latents=latents(1, dtype))
    assert after.dtype == dtype and bool(after.isfinite().all())
    assert handle.release(PROMPT).inputs()["prompt_embeds"].dtype == dtype
    if mechanism == "none":
        tolerance = {torch.float16: 0.02, torch.bfloat16: 0.2}.get(dtype, 1e-4)
        assert float((before - after).abs().max()) <= tolerance * float(before.abs().max())


@BOTH
def test_the_host_may_change_its_dtype(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    release = handle.release(PROMPT)
    pipe.to(torch.bfloat16)
    assert bool(picture(pipe, **release.inputs(prompt="ink")).isfinite().all())
    assert len(handle.report().releases) == 1


@BOTH
@pytest.mark.parametrize("begin", ["inside", "outside"])
def test_autocast_leaves_nothing_behind(private: Any, begin: str) -> None:
    """Keys and values that were made inside it do not serve outside: the same tensor draws what it drew, or would have drawn."""
    unet = tiny_unet()
    handle = protect(unet, private)
    gen = torch.Generator().manual_seed(4)
    public, context = torch.randn(2, 16, CHANNELS, generator=gen)
    placeholder = handle.release(context).inputs()["encoder_hidden_states"]
    states = torch.cat([public.unsqueeze(0), placeholder])

    def draw(given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return unet(latents().repeat(2, 1, 1, 1), 5, encoder_hidden_states=given).sample

    exact = draw(states)
    if begin == "inside":
        handle.unprotect()
        handle = protect(unet, private, ledger=handle.ledger, budget=dpx.Budget(100.0, 1e-3))
        with torch.autocast("cpu", torch.bfloat16):
            states = torch.cat(
                [public.unsqueeze(0), handle.release(context).inputs()["encoder_hidden_states"]]
            )
            draw(states)
        exact = draw(states.clone())
    with torch.autocast("cpu", torch.bfloat16):
        inside = draw(states)
    assert bool(inside.isfinite().all()) and not torch.equal(inside.float(), exact)
    torch.testing.assert_close(draw(states), exact, rtol=1e-5, atol=1e-6)


@BOTH
def test_mixed_text_encoder_and_unet_dtypes(private: Any) -> None:
    pipe = tiny_sd()
    pipe.unet.to(torch.bfloat16)
    handle = protect(pipe, private)
    marks = handle.release(PROMPT).inputs()["prompt_embeds"]
    assert marks.dtype == torch.bfloat16


def offload(pipe: Any, kind: str) -> None:
    """accelerate's hooks by hand: diffusers refuses without an accelerator."""
    device = torch.device("cpu")
    draws = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    for model in (pipe.text_encoder, draws, pipe.vae):
        if kind == "model":
            accelerate.cpu_offload_with_hook(model, device)
        else:
            accelerate.cpu_offload(model, device)


@pytest.mark.parametrize("kind", ["model", "sequential"])
@pytest.mark.parametrize("first", ["offload", "protect"])
def test_cpu_offload(kind: str, first: str, pipe: Any, exact: Any) -> None:
    before = picture(pipe, PROMPT, negative_prompt="ugly")
    if first == "offload":
        offload(pipe, kind)
        handle = protect(pipe, exact)
    else:
        handle = protect(pipe, exact)
        offload(pipe, kind)
    if kind == "sequential":
        assert next(pipe.unet.parameters()).device.type == "meta"
    after = picture(pipe, PROMPT, negative_prompt="ugly")
    assert torch.allclose(before, after, atol=1e-4)
    assert bool(picture(pipe, **handle.release("another").inputs(prompt="ink")).isfinite().all())
    dpx.unprotect(pipe)
    assert torch.allclose(before, picture(pipe, PROMPT, negative_prompt="ugly"), atol=1e-4)


@BOTH
def test_layerwise_casting(private: Any) -> None:
    """Weights stored in float8, computed in bfloat16."""
    unet = tiny_unet()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    handle = protect(unet, private)
    inputs = handle.release(torch.randn(16, CHANNELS)).inputs()
    assert bool(unet(latents(1, torch.bfloat16), 5, **inputs).sample.isfinite().all())


# ---- torch.compile -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counter() -> Any:
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("mechanism", [pytest.param("none", marks=pytest.mark.slow), "kernel_sum", "anchors"])
def test_compile_without_recompiling(mechanism: str, pipe: Any, private: Any, counter: Any) -> None:
    """One graph for all steps, prompts and releases of a shape; the same pictures as in eager mode."""
    handle = protect(pipe, private.replace(mechanism=mechanism))
    prompts = (PROMPT, "a blue star")
    eager = [picture(pipe, p, negative_prompt="ugly", num_inference_steps=3) for p in prompts]
    pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    for prompt, image in zip(prompts, eager, strict=True):
        assert torch.allclose(
            image, picture(pipe, prompt, negative_prompt="ugly", num_inference_steps=3), atol=1e-4
        )
    inputs = handle.release("a third").inputs()
    assert bool(picture(pipe, **inputs, num_inference_steps=4).isfinite().all())
    assert counter.frame_count == 1
    dpx.unprotect(pipe)


@BOTH
@pytest.mark.slow
def test_compiled_and_replaced_processors(pipe: Any, private: Any, counter: Any) -> None:
    """encode_prompt still checks; a compiled UNet that no pipeline holds gives NaN for what its gate would refuse."""
    handle = protect(pipe, private)
    inputs = handle.release(PROMPT).inputs()
    pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    picture(pipe, **inputs)
    stale = handle.guard.placeholder([tuple([1] * 9)], 16, "cpu")
    undeclared = torch.randn(1, 16, CHANNELS)
    for states in (stale, undeclared):
        with pytest.raises(dpx.DPXAttnError):  # the pipeline's own gate, before what is traced
            pipe.unet(latents(), 5, states)
        bare = torch.compile(handle.model, backend=counter, fullgraph=True)
        assert bool(bare(latents(), 5, states).sample.isnan().all())
    with handle.public():
        assert bool(pipe.unet(latents(), 5, torch.randn(1, 16, CHANNELS)).sample.isfinite().all())
    handle.model.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(dpx.ProtectionLostError):
        picture(pipe, **inputs)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_pipeline_makes_its_release(in_place: bool, pipe: Any, private: Any, counter: Any) -> None:
    """The first call of all is compiled: its gate is not traced, and bad public arguments cost nothing."""
    handle = protect(pipe, private)
    if in_place:
        pipe.unet.compile(backend=counter)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
        with pytest.raises(ValueError, match="generator"):
            picture(pipe, PROMPT, generator=[torch.Generator()] * 3)
        assert handle.ledger.entries() == ()
    for _ in range(2):
        assert bool(picture(pipe, PROMPT).isfinite().all())
        assert {c.number_of_releases for c in handle.ledger.entries()} == {1}
    dpx.unprotect(pipe)


@BOTH
@pytest.mark.slow
def test_a_compiled_bare_unet(private: Any, counter: Any) -> None:
    unet = tiny_unet()
    handle = protect(unet, private)
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    inputs = handle.release(torch.randn(2, 16, CHANNELS)).inputs()
    with torch.no_grad():
        expected = unet(latents(2), 5, **inputs).sample
        assert torch.allclose(expected, compiled(latents(2), 5, **inputs).sample, atol=1e-4)


@BOTH
@pytest.mark.slow
def test_inductor(pipe: Any, private: Any) -> None:
    torch._dynamo.reset()
    protect(pipe, private)
    eager = picture(pipe, PROMPT)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True)
    assert torch.allclose(eager, picture(pipe, PROMPT), atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_language_model_is_protected_under_autocast(name: str, private: Any) -> None:
    """What is supported does not depend on the caller's precision; a model that rounds by itself is refused with the reason."""
    model = decoder_tiny(name) if name == "llama" else seq2seq_tiny(name)
    with torch.autocast("cpu", torch.bfloat16):
        dpx.protect(model, private, ledger=dpx.Ledger()).unprotect()
    model._original_forward = model.forward  # as Accelerator.prepare does
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with pytest.raises(dpx.UnsupportedModelError, match=r"before accelerator\.prepare"):
        dpx.protect(model, private)
