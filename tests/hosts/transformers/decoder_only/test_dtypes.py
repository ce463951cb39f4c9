"""A cast is the same model: releases and calibrations of single precision serve half precision; an adapter is noticed all the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.kinds import load_calibration
from hf_dp_xattn.hosts.fingerprint import DEPTH, Fingerprint
from hf_dp_xattn.hosts.identity import OTHER_PROJECTIONS
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_layers import prefix_fingerprint
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_probing import find_layers

from .calibrations import calibration_for, protect
from .tiny import BUILDERS, generate, questions, tiny, tokens

CHAT = Path(__file__).parents[4] / "examples" / "chat"
HALF = (torch.bfloat16, torch.float16)
ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def chat(dtype: torch.dtype = torch.float32) -> Any:
    return LlamaForCausalLM.from_pretrained(CHAT / "model", dtype=dtype).eval()


def add_lora(model: Any, size: float) -> None:
    """Rank 4, on queries, keys, values and the feed-forward part."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    model.add_adapter(peft.LoraConfig(r=4, target_modules=targets), adapter_name="style")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".style." in path and ".lora_B" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    model.eval()


def sketches(model: Any, dtype: torch.dtype) -> tuple[Fingerprint, Fingerprint]:
    """In single precision, and after a cast."""
    layers = find_layers(model)
    before = prefix_fingerprint(model, layers)
    return before, prefix_fingerprint(model.to(dtype), layers)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", [*BUILDERS, "chat"])
def test_rounding_stays_within_what_is_forgiven(name: str, dtype: torch.dtype) -> None:
    before, after = sketches(chat() if name == "chat" else tiny(name), dtype)
    assert before.difference(after) is None and after.difference(before) is None
    away = (before.sketch - after.sketch).square().sum((-1, -2)).sqrt()
    worst = (away / before.sketch.square().sum((-1, -2)).sqrt()).amax(-1) / ROUNDOFF[dtype]
    worst = float((worst / torch.arange(1, len(worst) + 1).sqrt()).max())
    assert worst <= DEPTH / (2 if name == "chat" else 1.6)  # the margin that stands in fingerprint.py


def test_it_grows_with_depth_and_stays_within() -> None:
    torch.manual_seed(3)
    config = tiny("llama").config
    config.update({"hidden_size": 64, "num_hidden_layers": 24})
    for dtype in HALF:
        before, after = sketches(LlamaForCausalLM(config).eval(), dtype)
        assert before.difference(after) is None


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("unit", ["group", "row"])
def test_the_shipped_calibration_serves_the_cast_model_without_a_warning(
    unit: str, dtype: torch.dtype
) -> None:
    calibration = load_calibration(CHAT / "calibrations" / unit)
    config = dpx.DPXAttnConfig(mechanism="anchors", epsilon=8.0, delta=1e-5, unit=unit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "unit='row'")
        handle = dpx.protect(chat(dtype), config, calibration=calibration)
    assert OTHER_PROJECTIONS not in handle.report().warnings


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_an_adapter_is_warned_of_in_every_dtype(dtype: torch.dtype) -> None:
    """One that changes every tenth token of the chat model's replies."""
    calibration = load_calibration(CHAT / "calibrations" / "group")
    model = chat(dtype)
    add_lora(model, 0.1)
    config = dpx.DPXAttnConfig(mechanism="anchors", epsilon=8.0, delta=1e-5, unit="group")
    with pytest.warns(UserWarning, match="adapter"):
        dpx.protect(model, config, calibration=calibration)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_release_serves_the_cast_model(
    name: str, mechanism: str, dtype: torch.dtype, private: dpx.DPXAttnConfig, tmp_path: Path
) -> None:
    """Cast in place after the release, and loaded by a model of another dtype; and back."""
    model = tiny(name)
    handle = protect(model, private.replace(mechanism=mechanism))
    release = handle.release(tokens(9), public_head=[1, 4])
    inputs = release.inputs(**questions())
    want = model(**release.inputs(**questions())).logits
    release.save_pretrained(tmp_path)
    model.to(dtype)
    assert model(**inputs).logits.dtype == dtype  # inputs that were made before the cast
    other = tiny(name).to(dtype)  # kept here: a release does not keep its host
    for served in (release, dpx.Release.from_pretrained(tmp_path, host=other)):
        host = model if served is release else served._active_handle().model
        got = host(**served.inputs(**questions())).logits
        assert got.dtype == dtype
        assert float((got.float() - want).abs().max()) <= 0.08 * float(want.abs().max())
        generate(host, served.inputs(**questions()))
    assert [r["charges"] for r in handle.report().releases] == [1]
    assert handle.release(tokens(9), public_head=[1, 4]).contexts[0] is release.contexts[0]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_an_adapter_after_the_release_is_noticed_beside_a_cast(
    dtype: torch.dtype, private: dpx.DPXAttnConfig
) -> None:
    model = chat()
    release = protect(model, private.replace(mechanism="kernel_sum")).release(torch.arange(5, 60))
    model.to(dtype)
    own = {"input_ids": torch.arange(20, 30).unsqueeze(0)}
    inputs = release.inputs(**own)
    model(**release.inputs(**own))
    add_lora(model, 0.1)
    for call in (lambda: release.inputs(**own), lambda: model(**inputs), lambda: model.generate(**inputs)):
        with pytest.raises(dpx.ReleaseError, match="adapter") as raised:
            call()
        named = f"made in float32, this model is {str(dtype).removeprefix('torch.')}"
        assert (named in str(raised.value)) == (dtype != torch.float32)


def test_another_dtype_is_named_where_it_may_be_the_cause() -> None:
    """A model that rounds further away than any that was measured."""
    before, after = sketches(tiny("llama"), torch.bfloat16)
    after.sketch[1] += 0.1 * before.sketch[1]
    reason = before.difference(after)
    assert reason is not None and "made in float32, this model is bfloat16" in reason and "adapter" in reason
    assert before.difference(after, 0.5) is None
    after.sketch[0, 0, 0, 0] = torch.nan
    assert before.difference(after, float("inf")) is not None


def test_a_calibration_of_half_precision_serves_single_precision(private: dpx.DPXAttnConfig) -> None:
    calibration = calibration_for(tiny("llama").to(torch.bfloat16), "row")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "unit='row'")
        dpx.protect(tiny("llama"), private.replace(mechanism="anchors"), calibration=calibration)
