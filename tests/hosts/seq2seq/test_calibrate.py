"""`calibrate` for encoder-decoder models: public documents in, calibrations of both kinds out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.seq2seq.probing import find_layers

from .tiny import VOCABULARY, documents, generate, tiny

EPSILONS = (4.0, 8.0)


def public_ids(count: int = 80) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (count, 7), generator=torch.Generator().manual_seed(1))


def calibrate(model: Any, config: dpx.DPXAttnConfig, public: Any = None, **options: Any) -> Any:
    public = public_ids() if public is None else public
    options = {"anchors": 16, "steps": 6, "rank": 8, "query_prompts": 4, "query_steps": 4, **options}
    return dpx.calibrate(model, public, config, epsilons=EPSILONS, progress=False, **options)


@pytest.mark.parametrize(("name", "mechanism"), [("t5gemma", "kernel_sum"), ("t5", "anchors")])
def test_from_public_documents_to_a_text(name: str, mechanism: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    config = private.replace(mechanism=mechanism, projection_dim=16)
    random = torch.get_rng_state()
    calibration = calibrate(model, config, releases=("sum", "histogram"))
    assert torch.equal(random, torch.get_rng_state())
    handle = dpx.protect(model, config, calibration=calibration)
    assert bool(generate(model, documents(name))[1].isfinite().any())
    assert all(r["guarantee"]["calibrated"] for r in handle.report().releases)


@pytest.mark.parametrize("name", ["bart", "t5", "t5gemma"])
def test_the_gain_of_a_head_is_that_of_the_output_projection(name: str) -> None:
    for layer in find_layers(tiny(name)).values():
        module: Any = layer.module
        linear = next(getattr(module, n) for n in ("out_proj", "o_proj", "o") if hasattr(module, n))
        want = linear.weight.double().square().sum(0).reshape(layer.heads, -1).mean(1)
        assert torch.allclose(layer.output_gain(), want, rtol=0.5)


def test_what_cannot_be_calibrated(private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart")
    padded = documents("bart")
    with pytest.raises(dpx.ConfigError, match="padding"):
        calibrate(model, private, padded)
    with pytest.raises(dpx.ConfigError, match="unit"):
        calibrate(model, private.replace(unit="group"))
    dpx.protect(model, private)
    with pytest.raises(dpx.ConfigError, match="before"):
        calibrate(model, private)
