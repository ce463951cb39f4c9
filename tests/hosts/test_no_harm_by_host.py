"""On each kind of host a calibration does no harm: at most 1.02 times as far off as the fall-back, whether its decoder is no good or the
contexts are unlike all public ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors import slot_plans
from hf_dp_xattn.calibration.anchors.anchors_fit import AnchorSettings, fit_anchors, simulate
from hf_dp_xattn.calibration.anchors.objective import fvu
from hf_dp_xattn.calibration.anchors.slots_fit import SlotSettings, SlotTrainer
from hf_dp_xattn.calibration.anchors.unlike_contexts import unlike_contexts
from hf_dp_xattn.calibration.calibration_options import CalibrationOptions
from hf_dp_xattn.hosts.host_registry import kind_of

from ..hosts_tiny import tiny_sd
from .transformers.decoder_only.tiny import tiny as decoder_only
from .transformers.encoder_decoder.tiny import tiny as encoder_decoder
from .transformers.mllama.tiny import tiny as image_text

LIMIT = 1.02
FITTED, FRESH = 96, 40
CONFIG = dpx.DPXAttnConfig(mechanism="anchors", unit="row", epsilon=8.0)
OPTIONS = CalibrationOptions(query_prompts=2, query_steps=2)


def ids(count: int) -> list[list[int]]:
    return torch.randint(5, 40, (count, 7), generator=torch.Generator().manual_seed(1)).tolist()


def images(count: int) -> dict[str, torch.Tensor]:
    mask = torch.tensor([1, 0]).expand(count, 1, 2)
    pixels = torch.randn(count, 1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {
        "pixel_values": pixels * mask[..., None, None, None],
        "aspect_ratio_ids": torch.full((count, 1), 1),
        "aspect_ratio_mask": mask,
    }


def prompts(count: int) -> list[str]:
    words = ("red", "blue", "dark", "cat", "dog", "car", "sun", "up", "low", "in", "by", "a")
    draw = torch.randint(len(words), (count, 5), generator=torch.Generator().manual_seed(1))
    return [" ".join(words[i] for i in row) for row in draw.tolist()]


HOSTS: dict[str, tuple[Callable[[], Any], Callable[[int], Any]]] = {
    "diffusers": (tiny_sd, prompts),
    "encoder-decoder": (lambda: encoder_decoder("t5"), lambda n: torch.tensor(ids(n))),
    "decoder-only": (lambda: decoder_only("llama"), ids),
    "image-text": (image_text, images),
}


def scrambled(trainer: SlotTrainer, *_: object, **__: object) -> int:
    """A training that ends with a decoder that makes something of the code, but nothing that is true."""
    with torch.no_grad():
        trainer.coefficients *= 30.0
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_contexts_unlike_all_public_ones(name: str) -> None:
    """A decoder that was trained a little, and fresh contexts of noise and of rows of many contexts."""
    make, public = HOSTS[name]
    host = make()
    slots = SlotSettings(steps=60, slots=8, batch=16, layers=2)
    settings = AnchorSettings(releases=("sum",), slots=slots)
    with kind_of(host).public_data(host, public(200), CONFIG, OPTIONS) as data:
        assert data.contexts is not None
        with torch.enable_grad():
            calibration = fit_anchors(CONFIG, data, settings)
        (plan,) = calibration.plans
        assert plan.worth is not None and plan.worth.unlike is not None
        nothing = dataclasses.replace(plan, worth=dataclasses.replace(plan.worth, weight=0.0))
        for kind, fresh in unlike_contexts(data.contexts, data.objective.public_rows, None, seed=99):
            exact = data.objective.exact(fresh.whole)
            errors = []
            for own in (plan, nothing):
                decoded = simulate(own, CONFIG, calibration.decoders, fresh, seed=5)
                pairs = [(c.rows, c.log_weights) for c in decoded]
                errors.append(data.objective.errors(exact, pairs).sum((0, 2)))
            # every layer counts alike, as in an FVU
            assert float((errors[0] / errors[1]).mean()) <= LIMIT, (kind, plan.worth)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_a_useless_decoder_is_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, public = HOSTS[name]
    host = make()
    monkeypatch.setattr(slot_plans, "train", scrambled)
    settings = AnchorSettings(releases=("sum",), slots=SlotSettings(steps=1, slots=8))
    with kind_of(host).public_data(host, public(FITTED + FRESH), CONFIG, OPTIONS) as data:
        contexts = data.contexts
        assert contexts is not None and len(contexts) == FITTED + FRESH
        known = dataclasses.replace(data, contexts=contexts.part(torch.arange(FITTED)))
        with torch.enable_grad():
            calibration = fit_anchors(CONFIG, known, settings)
        fresh = contexts.part(torch.arange(FITTED, FITTED + FRESH))
        exact = data.objective.exact(fresh.whole, outputs=fresh.outputs)

        def measured(plan: Any) -> float:
            decoded = simulate(plan, CONFIG, calibration.decoders, fresh, seed=5)
            pairs = [(c.rows, c.log_weights) for c in decoded]
            return fvu(data.objective.errors(exact, pairs), exact.variances)

        (plan,) = calibration.plans
        assert plan.worth is not None and not plan.worth.useful and calibration.useless(CONFIG)
        nothing = measured(dataclasses.replace(plan, worth=dataclasses.replace(plan.worth, weight=0.0)))
        assert measured(dataclasses.replace(plan, worth=None)) > LIMIT * nothing
        assert measured(plan) <= LIMIT * nothing
