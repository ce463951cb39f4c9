"""Sizes, rows within the declared bounds, releases of both mechanisms, and slopes on log-log axes with intervals."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_dp_xattn import DPXAttnConfig
from hf_dp_xattn.mechanisms.base import LayerSpec
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.mechanisms.structure import KernelSumStructure
from hf_dp_xattn.privacy.bits import SeededEntropy

DELTA = 1e-5
TREE, KERNEL = "dptree", "kernel_sum"
MECHANISMS = (TREE, KERNEL)
TITLES = {TREE: "dptree (the paper's trees)", KERNEL: "kernel_sum (one joint Gaussian)"}
NOISELESS = 1e9  # an epsilon at which the noise cannot be seen


@dataclass(frozen=True)
class Sizes:
    """How much is measured. rows: powers of two; draws: of the noise, at each point; repeats: of each time."""

    rows: tuple[int, ...] = tuple(2**k for k in range(12, 18))
    epsilons: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    epsilon_rows: int = 2**16
    dims: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 16)
    bins: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    init_rows: tuple[int, ...] = (256, 1024, 4096, 16384)
    draws: int = 8
    noise_draws: int = 12
    repeats: int = 7
    adversary: tuple[int, int] = (100, 100)
    adversary_seeds: int = 2
    horizons: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    stream: int = 64
    captions: int = 30
    shapes_epsilons: tuple[float, ...] = (1.0, 8.0, 64.0)


QUICK = Sizes(
    rows=(2**13, 2**15),
    epsilons=(1.0, 4.0),
    epsilon_rows=2**14,
    dims=(2, 4),
    bins=(1, 16),
    init_rows=(128, 512),
    draws=2,
    noise_draws=3,
    repeats=2,
    adversary=(10, 10),
    adversary_seeds=1,
    horizons=(1, 16, 64),
    stream=4,
    captions=3,
    shapes_epsilons=(8.0,),
)


def config(mechanism: str, epsilon: float, **changes: Any) -> DPXAttnConfig:
    """Equal privacy for both: delta, unit = row, replace_one."""
    fixed = {
        "mechanism": mechanism,
        "epsilon": epsilon,
        "delta": DELTA,
        "unit": "row",
        "neighboring": "replace_one",
    }
    return DPXAttnConfig(**{**fixed, "degree": 2, "logit_bound": 1.0, "tree_bins": 64, **changes})


@dataclass(frozen=True)
class Rows:
    """Keys [H, n, d], values [H, n, dv] in [0, 1], queries [1, H, m, d]; scale |k|^2 <= logit_bound, likewise for queries."""

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor

    @property
    def scale(self) -> float:
        return float(self.key.shape[-1] ** -0.5)

    @property
    def spec(self) -> LayerSpec:
        heads, _, d = self.key.shape
        return LayerSpec("attention", heads, d, self.value.shape[-1], self.scale)

    def exact(self) -> torch.Tensor:
        """Exact attention, float64 [1, H, m, dv]."""
        logits = self.query.double() @ self.key.double().mT * self.scale
        return torch.softmax(logits, -1) @ self.value.double()


def rows(
    n: int, d: int, dv: int, *, heads: int = 1, queries: int = 64, bound: float = 1.0, seed: int = 0
) -> Rows:
    """Random directions, lengths up to the declared bound: nothing is clipped."""
    gen = torch.Generator().manual_seed(seed)

    def ball(m: int) -> torch.Tensor:
        x = torch.randn(heads, m, d, generator=gen)
        length = 0.2 + 0.79 * torch.rand(heads, m, 1, generator=gen)
        return x / x.norm(dim=-1, keepdim=True) * length * (bound * d**0.5) ** 0.5

    return Rows(ball(n), torch.rand(heads, n, dv, generator=gen), ball(queries).unsqueeze(0))


def prepare(data: Rows, settings: DPXAttnConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_release(settings, [data.spec])


def release(data: Rows, settings: DPXAttnConfig, seed: int | None = None) -> KernelSumStructure:
    """A release; with a seed, repeatable (and not private)."""
    entropy = None if seed is None else SeededEntropy(seed)
    structure = (
        prepare(data, settings).run(LayerRows([data.key], [data.value]), entropy=entropy).structures[0]
    )
    assert isinstance(structure, KernelSumStructure)
    return structure


def attention_relative_error(eps_s: float) -> float:
    """2 eps_s / (1 - eps_s), the paper's bound on the relative error of the ratio (infinite from eps_s = 1 on).

    Numerator and normaliser lie within factors 1 +- eps_s of the exact ones (for values of one sign), so
    their ratio lies within (1 + eps_s)/(1 - eps_s) = 1 + 2 eps_s/(1 - eps_s).
    """
    return math.inf if eps_s >= 1.0 else 2.0 * eps_s / (1.0 - eps_s)


def check_answers(data: Rows, degree: int = 2) -> dict[str, float]:
    """Relative error of both mechanisms without visible noise. Raises SystemExit above the bound: then nothing is printed."""
    from hf_dp_xattn.mechanisms.kernel_sum.features import taylor_relative_error

    bound = attention_relative_error(taylor_relative_error(1.0, degree)) * 1.01 + 5e-3
    found = {}
    for mechanism in MECHANISMS:
        out = release(data, config(mechanism, NOISELESS, degree=degree, tree_bins=8)).attend(data.query)
        found[mechanism] = float(((out - data.exact()).abs() / data.exact()).max())
        if not found[mechanism] <= bound:
            raise SystemExit(
                f"{mechanism} is wrong (relative error {found[mechanism]:.3g} > {bound:.3g}): nothing is printed."
            )
    return found


def seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """CPU seconds of one call each, in one thread: what else the machine does hardly shows. The first call is not counted."""
    function()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return found


def root_mean_square(samples: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(samples))))


def fit(
    x: Sequence[float],
    samples: Sequence[Sequence[float]],
    statistic: Callable[[Sequence[float]], float] = root_mean_square,
    resamples: int = 2000,
) -> dict[str, float]:
    """Slope of log(statistic) against log x by least squares; 95 % interval by resampling each point's draws."""
    rng = np.random.default_rng(0)
    logs = np.log(np.asarray(x, dtype=float))

    def slope(points: Sequence[Sequence[float]]) -> float:
        return float(np.polyfit(logs, np.log([statistic(p) for p in points]), 1)[0])

    arrays = [np.asarray(s, dtype=float) for s in samples]
    drawn = [slope([a[rng.integers(0, len(a), len(a))] for a in arrays]) for _ in range(resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"slope": slope(arrays), "low": float(low), "high": float(high)}


def median(samples: Sequence[float]) -> float:
    return float(np.median(samples))
