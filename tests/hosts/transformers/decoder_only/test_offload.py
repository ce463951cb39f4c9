"""Weights that accelerate offloads, before or after the protection; and weights that are nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx

from .calibrations import calibration_for, protect
from .tiny import generate, questions, tiny, tokens

accelerate = pytest.importorskip("accelerate")


def offload(model: Any) -> Any:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    return model


@pytest.mark.parametrize("mechanism", ["none", "kernel_sum", "anchors"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_offloaded_after_the_protection(name: str, mechanism: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    handle = protect(model, private.replace(mechanism=mechanism))
    release = handle.release(tokens(9))
    before = generate(model, release.inputs(**questions()))
    offload(model)
    after = generate(model, release.inputs(**questions()))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    other = handle.release(tokens(9, 1))
    generate(model, other.inputs(**questions()))
    model(**other.inputs(input_ids=tokens(3).unsqueeze(0)))
    assert [r["charges"] for r in handle.report().releases] == ([0, 0] if mechanism == "none" else [1, 1])
    dpx.unprotect(model)
    model(input_ids=tokens(3).unsqueeze(0))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_offloaded_before_the_protection(name: str, exact: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    want = generate(model, dpx.protect(model, exact).release(tokens(9)).inputs(**questions()))
    dpx.unprotect(model)
    offload(model)
    got = generate(model, dpx.protect(model, exact).release(tokens(9)).inputs(**questions()))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_a_release_serves_the_offloaded_model_of_the_same_weights_only(private: dpx.DPXAttnConfig) -> None:
    model = tiny("llama")
    release = protect(model, private).release(tokens(9))
    accelerate.cpu_offload(
        model,
        execution_device=torch.device("cpu"),
        state_dict={n: 1.1 * p for n, p in tiny("llama").state_dict().items()},
    )
    with pytest.raises(dpx.ReleaseError, match="weights"):
        release.inputs(**questions())


def test_weights_that_are_nowhere(private: dpx.DPXAttnConfig) -> None:
    with pytest.raises(dpx.UnsupportedModelError, match="meta device"):
        dpx.protect(tiny("llama").to("meta"), private)
    model = tiny("llama")
    handle = protect(model, private)
    model.to("meta")
    with pytest.raises(dpx.ConfigError, match="meta device"):
        handle.release(tokens(9))
    assert not handle.releases.spent and not handle.ledger.charges(handle.ledger.digest([b"any"]))


def test_a_calibration_needs_its_weights() -> None:
    model = offload(tiny("llama"))
    config = dpx.DPXAttnConfig(unit="row", mechanism="kernel_sum", epsilon=8.0, delta=1e-5)
    with pytest.raises(dpx.ConfigError, match="offload"):
        dpx.calibrate(model, [tokens(9, i) for i in range(8)], config)
    calibrated = calibration_for(
        tiny("llama"), "row"
    )  # of the model as it is loaded; it serves the offloaded one
    dpx.protect(model, config.replace(mechanism="anchors"), calibration=calibrated)
