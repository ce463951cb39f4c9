"""A context that grows: error of the running sum against the number of appends."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from hf_dp_xattn.privacy.accountant import GaussianEvent, epsilon_of, gaussian_sigma_squared
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.continual import (
    ContinualPlan,
    Factors,
    RunningSum,
    candidates,
    choose_factors,
    largest_error,
)
from hf_dp_xattn.privacy.noise import discrete_gaussian

from .common import DELTA, Sizes

EPSILON, SENSITIVITY = 1.0, 2**30


def mean_error(factors: Factors) -> float:
    """Root of the mean variance over the T prefixes, in units of the noise that ONE release of the sum would take."""
    return math.sqrt(factors.column_norm_squared * float(np.square(factors.row_norms).mean()))


def growth(sizes: Sizes) -> dict[str, Any]:
    """Standard deviations in units of ONE release's noise. Naive: the whole context released anew at every append, composed; or each append
    by itself, added up. The two have the same error after T appends, sqrt(T)."""
    one = math.sqrt(gaussian_sigma_squared(EPSILON, DELTA, SENSITIVITY))
    points = []
    for horizon in sizes.horizons:
        point: dict[str, Any] = {"x": horizon, "chosen": choose_factors(horizon, sizes.stream).name}
        for factors in candidates(horizon):
            plan = ContinualPlan.prepare(
                size=sizes.stream,
                sensitivity=SENSITIVITY,
                horizon=horizon,
                epsilon=EPSILON,
                delta=DELTA,
                factors=factors,
            )
            start = time.perf_counter()
            worst, squares = _run(plan, sizes.stream)
            point[factors.name] = {
                "worst_predicted": largest_error(factors),
                "mean_predicted": mean_error(factors),
                "mean_measured": math.sqrt(squares) / one,
                "largest_measured": worst / one,
                "largest_bound": plan.error_bound(1e-6) / one,
                "seconds_per_append": (time.perf_counter() - start) / horizon,
            }
        point["naive"] = _naive(horizon, sizes.stream, one)
        points.append(point)
    return {"points": points, "epsilon": EPSILON, "stream": sizes.stream}


def _run(plan: ContinualPlan, size: int) -> tuple[float, float]:
    """(largest error of all prefixes, mean square)."""
    running, gen = RunningSum(plan, SeededEntropy(1)), torch.Generator().manual_seed(0)
    total, worst, squares = torch.zeros(size, dtype=torch.int64), 0.0, 0.0
    for _ in range(plan.horizon):
        x = torch.randint(-(2**34), 2**34, (size,), generator=gen)
        total += x
        error = running.add(x) - total
        worst, squares = max(worst, float(error.abs().max())), squares + float(error.square().mean())
    if worst > plan.error_bound(1e-6):
        raise SystemExit("A running sum errs beyond its bound: nothing is printed.")
    return worst, squares / plan.horizon


def _naive(horizon: int, size: int, one: float) -> dict[str, float]:
    """The whole context again at each append: T events, each with T times the variance, measured."""
    variance = math.ceil(one**2 * horizon)
    spent = epsilon_of([GaussianEvent(SENSITIVITY, variance)] * horizon, DELTA)
    assert 0.99 * EPSILON < spent <= EPSILON * (1 + 1e-6)
    noise = discrete_gaussian((min(horizon, 256), size), variance, entropy=SeededEntropy(2))
    return {
        "worst_predicted": math.sqrt(horizon),
        "mean_measured": float((noise.astype(float) ** 2).mean() ** 0.5 / one),
    }
