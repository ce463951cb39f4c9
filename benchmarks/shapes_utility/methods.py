"""What is compared: mechanisms behind `dpx.protect`, and baselines that release rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from shapes.private import calibrate_kernel_sum, config

import hf_dp_xattn as dpx
from hf_dp_xattn.privacy.bits import SeededEntropy

from .baselines import ResponsePerRow, WienerFilter
from .fvu import MeanOutput, Released, RowsReleased, StructuresReleased
from .setting import Setting, draw

TITLES = {
    "anchors": "anchors",
    "anchors_like": "anchors, public-like contexts",
    "anchors_group": "anchors, unit = phrase",
    "anchors_context": "anchors, unit = prompt",
    "kernel_sum": "kernel_sum",
    "dptree": "dptree (the paper's trees)",
    "wiener": "noised rows, Wiener per position",
    "wiener_joint": "noised rows, Wiener over the context",
    "public_mean": "public mean only",
    "exact": "exact (not private)",
}
_MEAN_CONTEXTS = 128


def title(name: str) -> str:
    """A method's name in words; response_m answers on m anchors."""
    return f"k-ary response, {name.split('_')[1]} anchors" if name.startswith("response") else TITLES[name]


class Method(Protocol):
    """Releases every context of `captions` once, with noise that `seed` names."""

    unit: str

    def released(self, captions: Sequence[str], epsilon: float, seed: int) -> list[Released]: ...

    def pictures(self, captions: Sequence[str], epsilon: float, seed: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Mechanism:
    """One of the package's mechanisms, through `protect`. The noise is seeded, so that a run can be repeated (and is no release)."""

    setting: Setting
    mechanism: str
    calibration: Any
    unit: str = "row"

    def _protect(self, epsilon: float, seed: int) -> Any:
        settings = config(epsilon, unit=self.unit, mechanism=self.mechanism)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dpx.protect(
                self.setting.pipeline,
                settings,
                calibration=self.calibration,
                entropy=SeededEntropy(seed),
                allow_useless=True,
                allow_uncalibrated=True,
                allow_large_epsilon=True,
            )

    def released(self, captions: Sequence[str], epsilon: float, seed: int) -> list[Released]:
        with self._protect(epsilon, seed) as protected:
            contexts = protected.release(list(captions)).contexts
        return [
            StructuresReleased(self.setting, c.structures, c.public_rows)
            if c.context is None
            else RowsReleased(self.setting, c.context.rows, c.context.log_weights)
            for c in contexts
        ]

    def pictures(self, captions: Sequence[str], epsilon: float, seed: int) -> np.ndarray:
        with self._protect(epsilon, seed):
            return draw(self.setting, list(captions), seed)


@dataclass(frozen=True)
class Baseline:
    """rows(private [N, n, C], epsilon, seed) -> released rows of the same shape; the unprotected pipeline reads them."""

    setting: Setting
    rows: Callable[[torch.Tensor, float, int], torch.Tensor]
    unit: str = "row"

    def _rows(self, captions: Sequence[str], epsilon: float, seed: int) -> torch.Tensor:
        return self.rows(self.setting.private_rows(self.setting.encode(captions)), epsilon, seed)

    def released(self, captions: Sequence[str], epsilon: float, seed: int) -> list[Released]:
        return [RowsReleased(self.setting, rows) for rows in self._rows(captions, epsilon, seed)]

    def pictures(self, captions: Sequence[str], epsilon: float, seed: int) -> np.ndarray:
        return draw(self.setting, self.setting.with_public(self._rows(captions, epsilon, seed)), seed)


@dataclass(frozen=True)
class PublicMean:
    """Nothing is released. FVU: the mean of public outputs at each query; pictures: from the mean of public rows."""

    setting: Setting
    unit: str = "row"

    def released(self, captions: Sequence[str], epsilon: float, seed: int) -> list[Released]:
        return [MeanOutput(self.setting, self.setting.public[:_MEAN_CONTEXTS])] * len(captions)

    def pictures(self, captions: Sequence[str], epsilon: float, seed: int) -> np.ndarray:
        rows = self.setting.public.float().mean(0).expand(len(captions), -1, -1)
        return draw(self.setting, self.setting.with_public(rows), seed)


def _exact(private: torch.Tensor, epsilon: float, seed: int) -> torch.Tensor:
    return private


Make = Callable[[], Method]


def shipped(setting: Setting, unit: str) -> Mechanism:
    """`anchors` with the calibration that the example ships for this unit."""
    calibration = dpx.Calibration.from_pretrained(setting.calibrations / unit)
    return Mechanism(setting, "anchors", calibration, unit)


@cache
def catalogue(setting: Setting) -> dict[str, Make]:
    """Makers of all methods with unit = row, in the order of the tables; each is fitted once a run, when it is first asked for."""
    sizes = setting.sizes

    @cache
    def moments() -> Any:
        captions, rank = sizes.kernel_sum
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return calibrate_kernel_sum(
                setting.pipeline, sizes.epsilons, captions=captions, rank=rank, progress=False
            )

    def response(cells: int) -> Baseline:
        return Baseline(setting, ResponsePerRow(setting.public, setting.public_objective, cells).rows)

    makers: dict[str, Make] = {
        "exact": lambda: Baseline(setting, _exact),
        "public_mean": lambda: PublicMean(setting),
        "anchors": lambda: shipped(setting, "row"),
        "wiener": lambda: Baseline(setting, WienerFilter(setting.public, joint=False).rows),
        "wiener_joint": lambda: Baseline(setting, WienerFilter(setting.public, joint=True).rows),
        **{f"response_{m}": partial(response, m) for m in sizes.anchors},
        "kernel_sum": lambda: Mechanism(setting, "kernel_sum", moments()),
        "dptree": lambda: Mechanism(setting, "dptree", moments()),
    }
    return {name: cache(make) for name, make in makers.items()}


def needs_epsilon(name: str) -> bool:
    return name not in ("exact", "public_mean")
