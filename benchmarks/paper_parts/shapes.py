"""The mechanisms on a trained pipeline's cross-attention, `anchors` too: it needs rows of a context space and a calibration for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import hf_dp_xattn as dpx

from .common import KERNEL, TREE, Sizes

SEED = 555


def shapes(sizes: Sizes) -> dict[str, Any]:
    """Fraction of unexplained variance of every layer's and head's output over PUBLIC captions (n = 76 private rows), queries of others."""
    from shapes.private import (
        CALIBRATIONS,
        TREE_SETTINGS,
        calibrate_dptree,
        calibrate_kernel_sum,
        config,
    )
    from shapes.scenes import train_examples
    from shapes_utility.fvu import Judge, MeanOutput
    from shapes_utility.methods import Mechanism
    from shapes_utility.setting import QUICK, Setting
    from shapes_utility.setting import Sizes as UtilitySizes

    if not (CALIBRATIONS / "row").is_dir():
        return {
            "missing": "examples/shapes/calibrations/row is not there: `anchors` releases rows of a context space and needs it."
        }
    quick = sizes.captions < 10
    small = QUICK if quick else UtilitySizes()
    setting = Setting(
        dataclasses.replace(small, public=max(100, sizes.captions), query_contexts=min(16, sizes.captions))
    )
    captions = [e.caption for e in train_examples(sizes.captions, SEED)]
    judge = Judge(setting.public_objective.layers, setting.encode(captions))
    public, rank = (60, 16) if quick else (400, 192)
    moments = calibrate_kernel_sum(
        setting.pipeline, sizes.shapes_epsilons, captions=public, rank=rank, progress=False
    )

    class Small(Mechanism):
        """A mechanism with the tree's settings and geometry, without a sketch."""

        def _protect(self, epsilon: float, seed: int) -> Any:
            settings = config(epsilon, mechanism=self.mechanism, **TREE_SETTINGS)
            ledger = dpx.Ledger()  # public captions, released again and again
            return dpx.protect(self.setting.pipeline, settings, calibration=self.calibration, ledger=ledger)

    geometry = calibrate_dptree(setting.pipeline, captions=public)
    methods = {
        "anchors": Mechanism(setting, "anchors", dpx.Calibration.from_pretrained(CALIBRATIONS / "row")),
        KERNEL: Mechanism(setting, KERNEL, moments),
        "kernel_sum_small": Small(setting, KERNEL, geometry),
        TREE: Small(setting, TREE, geometry),
    }
    points = []
    for epsilon in sizes.shapes_epsilons:
        point: dict[str, Any] = {"x": epsilon}
        for name, method in methods.items():
            summary = judge.summary([judge.errors(method.released(captions, epsilon, SEED))])["other"]
            point[name] = {k: summary[k] for k in ("fvu", "low", "high")}
        points.append(point)
    mean = MeanOutput(setting, setting.public[:64])
    baseline = judge.summary([judge.errors([mean] * len(captions))])["other"]["fvu"]
    return {
        "points": points,
        "public_mean": baseline,
        "captions": len(captions),
        "tree_settings": TREE_SETTINGS,
    }
