"""One of each kind that can be shared, small."""

from __future__ import annotations

import functools
from typing import Any

import torch

import hf_dp_xattn as dpx

from ..calibration.anchor_calibrations import calibration
from ..calibration.synthetic import SyntheticModel
from ..hosts.anchor_calibrations import protect
from ..hosts.text.libraries import library
from ..hosts_tiny import picture, tiny_sd

CONFIG = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", epsilon=2.0, degree=1, projection_dim=4)
KINDS = ("config", "calibration", "anchors calibration", "library", "release")


@functools.cache
def _fitted() -> dpx.Calibration:
    return SyntheticModel(0).calibrate(CONFIG, count=24, rank=4, epsilons=(1.0,))


def make(kind: str) -> Any:
    if kind == "config":
        return CONFIG
    if kind == "calibration":
        return _fitted()
    if kind == "anchors calibration":
        return calibration()
    if kind == "library":
        return library(tiny_sd())
    return protect(tiny_sd(), CONFIG, ledger=dpx.Ledger()).release("a red circle")  # made as if elsewhere


def load(kind: str, name: Any, **options: Any) -> Any:
    if kind == "config":
        return dpx.DPXAttnConfig.from_pretrained(name, **options)
    if kind == "release":
        return dpx.Release.from_pretrained(name, host=tiny_sd(), **options)
    return dpx.Calibration.from_pretrained(name, **options)


def files(kind: str) -> set[str]:
    stem = {"config": "config", "release": "release"}.get(kind, "calibration")
    tensors = set() if kind == "config" else {f"dp_xattn_{stem}.safetensors"}
    return {f"dp_xattn_{stem}.json", "README.md", *tensors}


def content(kind: str, thing: Any) -> Any:
    """Something to compare."""
    if kind == "config":
        return thing
    if kind == "calibration":
        return thing.settings, thing.clip_norm, [p.predicted_fvu for p in thing.plans]
    if kind == "anchors calibration":
        return thing.plans[0].quality, thing.scores, thing.host.layers
    if kind == "library":
        return thing.texts, thing.plans[0].quality, thing.codes.tolist()
    return thing.guarantees, thing.terms, thing.contexts[0].structures[0].sums.tolist()


def drawn(release: Any, pipe: Any) -> torch.Tensor:
    return picture(pipe, **release.inputs())
