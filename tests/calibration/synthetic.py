"""Synthetic public contexts: rows from a few topics, two layers that read the same rows, queries that read the keys."""

from __future__ import annotations

from typing import Any

import torch

from hf_dp_xattn.calibration.anchors.objective import LayerProbe, Objective
from hf_dp_xattn.calibration.calibration import Calibration
from hf_dp_xattn.calibration.calibration_options import CalibrationOptions
from hf_dp_xattn.calibration.kernel_fit import fit_kernel_sums
from hf_dp_xattn.calibration.public_data import PublicData
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.mechanisms.base import LayerSpec

CHANNELS, HEADS, ROWS = 12, 2, 20
DIMS = (4, 6)


class SyntheticModel:
    """Two cross-attention layers over rows in R^12; contexts are drawn around one of a few topic directions."""

    def __init__(self, seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.wk = [torch.randn(CHANNELS, HEADS * d, generator=gen) / CHANNELS**0.5 for d in DIMS]
        self.wv = [torch.randn(CHANNELS, HEADS * d, generator=gen) / CHANNELS**0.5 for d in DIMS]
        self.topics = torch.randn(5, CHANNELS, generator=gen)
        self.queries = [torch.randn(HEADS, 64, d, generator=gen) + 0.5 for d in DIMS]
        self.specs = [LayerSpec(f"layer{i}", HEADS, d, d, d**-0.5) for i, d in enumerate(DIMS)]

    def contexts(self, count: int, seed: int, rows: int = ROWS) -> list[torch.Tensor]:
        gen = torch.Generator().manual_seed(seed)
        mix = torch.softmax(3 * torch.randn(count, 5, generator=gen), -1)
        noise = 0.3 * torch.randn(count, rows, CHANNELS, generator=gen)
        return list((mix @ self.topics).unsqueeze(1) + noise)

    def rows(self, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        def heads(w: torch.Tensor) -> torch.Tensor:
            return (x @ w).reshape(x.shape[0], HEADS, -1).transpose(0, 1)

        return [heads(w) for w in self.wk], [heads(w) for w in self.wv]

    def calibrate(self, config: DPXAttnConfig, count: int = 160, **kwargs: Any) -> Calibration:
        public = self.contexts(count, seed=1)
        options = {"epsilons": (1.0, 8.0, 1000.0), "rank": 32, **kwargs}
        own = {name: options.pop(name) for name in ("groups", "row_weight_spread") if name in options}
        groups = own.pop("groups", None)

        def layer(i: int) -> LayerProbe:
            def project(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                keys, values = self.rows(x[0])
                return keys[i].unsqueeze(0), values[i].unsqueeze(0)

            return LayerProbe(project, self.specs[i].scale, self.queries[i], torch.ones(HEADS))

        data = PublicData(
            Objective([layer(i) for i in range(len(DIMS))], torch.zeros(0, CHANNELS)),
            "rows",
            specs=self.specs,
            rows=lambda: public,
            count=count,
            groups=groups,
        )
        return fit_kernel_sums(config, data, CalibrationOptions(**options), **own)
