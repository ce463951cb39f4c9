"""`dpx.calibrate` on public prefixes: what is fitted serves private ones, for every unit."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.hosts.transformers.decoder_only import public_prefixes
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_layers import run_recorded
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_probing import find_layers
from hf_dp_xattn.hosts.transformers.decoder_only.public_prefixes import SoftmaxProbe

from .tiny import generate, questions, segments, tiny, tokens

HEAD = [1, 4]
OPTIONS: dict[str, Any] = {
    "epsilons": (8.0,),
    "public_head": HEAD,
    "questions": [[5, 6], [7, 8, 9]],
    "progress": False,
    "query_prompts": 3,
    "query_steps": 2,
}


def public(unit: str, count: int, *, ragged: bool) -> list[Any]:
    lengths = [
        [2 + (i + j) % 3 if ragged else 2 for j in range(4 + (i % 3 if ragged else 0))] for i in range(count)
    ]
    made = [segments(each, i) for i, each in enumerate(lengths)]
    return made if unit == "group" else [[*chain(*parts)] for parts in made]


@pytest.mark.parametrize("unit", ["row", "group", "context"])
def test_anchors(unit: str, tmp_path: Path) -> None:
    model = tiny("llama")
    config = dpx.DPXAttnConfig(mechanism="anchors", unit=unit)
    releases = ("histogram",) if unit == "row" else ("sum",)
    calibration = dpx.calibrate(
        model, public(unit, 66, ragged=True), config, anchors=16, steps=10, releases=releases, **OPTIONS
    )
    assert dpx.handle_of(model) is None and math.isfinite(calibration.plans[0].quality.fvu)
    calibration.save_pretrained(tmp_path)
    loaded = AnchorCalibration.from_pretrained(tmp_path)
    with dpx.protect(model, config, calibration=loaded, allow_useless=True) as handle:
        context: Any = segments((3, 2, 4), 99) if unit == "group" else tokens(9, 99)
        release = handle.release(context, groups="segments" if unit == "group" else None, public_head=HEAD)
        assert not bool(generate(model, release.inputs(**questions()))[1].isnan().any())
    with pytest.raises(dpx.ConfigError, match="another model"):
        dpx.protect(tiny("qwen2"), config, calibration=loaded, allow_useless=True)


@pytest.mark.parametrize("unit", ["row", "group", "context"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_kernel_sum(name: str, unit: str) -> None:
    model = tiny(name)
    config = dpx.DPXAttnConfig(mechanism="kernel_sum", unit=unit, degree=1, projection_dim=4)
    contexts = public(unit, 24, ragged=False)
    calibration = dpx.calibrate(model, contexts, config, rank=4, **OPTIONS)
    with dpx.protect(model, config, calibration=calibration) as handle:
        release = handle.release(
            contexts[0], groups="segments" if unit == "group" else None, public_head=HEAD
        )
        assert release.guarantees[0].calibrated
        assert not bool(generate(model, release.inputs(**questions()))[1].isnan().any())


def test_what_cannot_be_calibrated() -> None:
    model = tiny("llama")
    config = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="group", degree=1, projection_dim=4)
    for contexts in (public("group", 24, ragged=True), [], "a text"):
        with pytest.raises(dpx.ConfigError):
            dpx.calibrate(model, contexts, config, rank=0, **OPTIONS)
    with pytest.raises(dpx.ConfigError, match="questions"):
        dpx.calibrate(model, public("group", 24, ragged=False), config, **{**OPTIONS, "questions": []})


def test_a_probe_attends_as_the_model_does() -> None:
    """Capped logits, padding rows of zeros, log weights."""
    torch.manual_seed(0)
    rows = torch.randn(2, 5, 8)
    rows[1, 3:] = 0
    queries, bias = torch.randn(2, 3, 2), torch.randn(2, 5)

    def project(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = x.split(4, dim=-1)
        return key.unflatten(-1, (2, 2)).transpose(1, 2), value.unflatten(-1, (2, 2)).transpose(1, 2)

    probe = SoftmaxProbe(project, 0.7, queries, torch.ones(2), 1.5)
    got = probe.attend(rows, queries, bias)
    for b, n in ((0, 5), (1, 3)):
        key, value = project(rows[b : b + 1, :n])
        logits = 1.5 * torch.tanh(queries @ key[0].mT * 0.7 / 1.5) + bias[b, :n]
        assert torch.allclose(got[b], logits.softmax(-1) @ value[0], atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "opt", "gpt_neox"])
def test_gains_are_those_of_the_output_projection(name: str) -> None:
    """Squared change of the module's output for random signs in one key head, against its expectation."""
    layer = next(iter(find_layers(tiny(name)).values()))
    names = ("o_proj", "out_proj", "dense", "c_proj")
    module = next(m for n in names if (m := getattr(layer.module, n, None)) is not None)
    width = layer.query_heads * layer.value_dim
    basis = module(torch.eye(width)) - module(torch.zeros(1, width))
    want = basis.double().square().sum(1).view(layer.heads, -1).mean(1)
    assert torch.allclose(layer.output_gain(), want, rtol=1e-4)


@pytest.mark.parametrize("mechanism", ["anchors", "kernel_sum"])
def test_every_public_segment_is_encoded_once(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[tuple[int, ...]] = []

    def recorded(model: Any, layers: Any, ids: torch.Tensor, **arguments: Any) -> Any:
        encoded.extend(tuple(row.tolist()) for row in ids)
        return run_recorded(model, layers, ids, **arguments)

    monkeypatch.setattr(public_prefixes, "run_recorded", recorded)
    config = dpx.DPXAttnConfig(mechanism=mechanism, unit="group", degree=1, projection_dim=4)
    contexts = public("group", 66, ragged=False)
    contexts[40] = contexts[0]  # in another chunk of prefixes
    options = {**OPTIONS, "steps": 2, "rank": 0, "releases": ("sum",)}
    dpx.calibrate(tiny("llama"), contexts, config, **options)
    segments_seen = {tuple(HEAD + list(map(int, s))) for c in contexts for s in c}
    assert sorted(encoded) == sorted([tuple(HEAD), *segments_seen])
