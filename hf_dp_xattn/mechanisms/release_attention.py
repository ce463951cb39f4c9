"""One joint release over all layers and heads: prepare (public), charge (ledger), run (private), attend (public)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError, ContextError
from ..privacy.accountant import Event
from ..privacy.bits import Entropy
from ..report import Guarantee
from .base import LayerRelease, LayerSpec, PreparedRelease, PublicCalibration
from .dptree.dptree import prepare_dptree
from .groups import NO_GROUPS, as_groups
from .kernel_sum.kernel_sum import prepare_kernel_sum
from .structure import AttentionStructure, ExactStructure, stack


@dataclass(frozen=True)
class PreparedExact:
    """`mechanism="none"`: the same path, without a release. NOT private."""

    config: DPXAttnConfig
    specs: tuple[LayerSpec, ...]
    events: tuple[Event, ...] = ()
    warnings: tuple[str, ...] = ("mechanism='none' is exact attention: NOT private.",)

    def run(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        groups: torch.Tensor | None = None,
        entropy: Entropy | None = None,
    ) -> LayerRelease:
        n = keys[0].shape[-2] if keys else 0
        if n == 0:
            raise ContextError("The context has no rows (n = 0).")
        if not all(bool(torch.isfinite(t).all()) for t in (*keys, *values)):
            raise ContextError("The context's keys or values hold NaN or Inf.")
        structures = tuple(
            ExactStructure(k.unsqueeze(0), v.unsqueeze(0), spec.scale)
            for k, v, spec in zip(keys, values, self.specs, strict=True)
        )
        guarantee = Guarantee(
            mechanism="none",
            epsilon=math.inf,
            delta=self.config.delta,
            unit=self.config.unit,
            neighboring=self.config.neighboring,
            rows=n,
            units=n,
            clip_norm=math.inf,
            sensitivity=math.inf,
            sigma=0.0,
            sampling_distance=0.0,
            private_noise=False,
            calibrated=False,
        )
        return LayerRelease(structures, guarantee)


def prepare_exact(
    config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: PublicCalibration | None
) -> PreparedExact:
    """`mechanism="none"` needs nothing of a calibration."""
    return PreparedExact(config, tuple(specs))


PREPARE: dict[
    str, Callable[[DPXAttnConfig, Sequence[LayerSpec], PublicCalibration | None], PreparedRelease]
] = {
    "dptree": prepare_dptree,
    "kernel_sum": prepare_kernel_sum,
    "none": prepare_exact,
}


def prepare_release(
    config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: PublicCalibration | None = None
) -> PreparedRelease:
    """Decides everything public about a joint release over the layers `specs`.

    Raises:
        ConfigError: the calibration does not fit the layers, unit or features.
    """
    if not specs:
        raise ConfigError("A release needs at least one layer.")
    if config.mechanism not in PREPARE:
        raise ConfigError(
            f"mechanism={config.mechanism!r} does not release keys and values; choose one of {', '.join(PREPARE)}."
        )
    return PREPARE[config.mechanism](config, specs, calibration)


@dataclass(frozen=True)
class ReleasedAttention:
    """Result of `release_attention`: the structure that all queries read, and its guarantees (one per context)."""

    structure: AttentionStructure
    guarantees: tuple[Guarantee, ...]

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """[B, H, m, d] -> [B, H, m, dv]; post-processing, any number of (adaptive) queries."""
        return self.structure.attend(query)

    def partial(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, log-sum-exp) for merging with exact public rows."""
        return self.structure.partial(query)


def _check_inputs(key: torch.Tensor, value: torch.Tensor) -> None:
    for name, tensor in (("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ContextError(f"{name} must be a floating-point tensor.")
        if tensor.ndim != 4 or 0 in (tensor.shape[0], tensor.shape[1], tensor.shape[3]):
            raise ContextError(f"{name} must be [B, H, n, channels], got {tensor.ndim} dimensions.")
    if key.shape[:3] != value.shape[:3]:
        raise ContextError("key and value must share B, H and n.")
    if key.shape[2] == 0:
        raise ContextError("The context has no rows (n = 0): there is nothing to release.")


def release_attention(
    key: torch.Tensor,
    value: torch.Tensor,
    config: DPXAttnConfig,
    groups: Any = None,
    scale: float | None = None,
    calibration: PublicCalibration | None = None,
    *,
    entropy: Entropy | None = None,
) -> ReleasedAttention:
    """Releases one attention layer's private keys and values; one budget per batch element over all its heads.

    Formal guarantee: for each batch element, the returned structure is (config.epsilon, config.delta)-DP with respect to
    `config.unit` and `config.neighboring`; see `kernel_sum/kernel_sum.py` and `dptree/dptree.py` for what is released
    and the theorem.
    The caller accounts for repeated releases of the same context (`privacy/ledger.py`; `protect` does it).

    Args:
        key: [B, H, n, d] private keys. value: [B, H, n, dv] private values.
        groups: [n] or [B, n] (a list, array or tensor) integer group of each row, for `unit="group"`; public.
        scale: logit scale, default 1/sqrt(d) (the paper scales by 1/d: pass it).
        calibration: public statistics from `dpx.calibrate`.
        entropy: noise source; the operating system's by default. A seeded one makes the result NOT private.

    Raises:
        ContextError, ConfigError: bad shapes, NaN, no rows, unfit calibration. Nothing is released.
    """
    _check_inputs(key, value)
    batch, heads, n, d = key.shape
    if scale is None:
        scale = 1.0 / math.sqrt(d)
    if not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"scale must be positive and finite, got {scale!r}.")
    groups = as_groups(groups)
    if groups is not None and not isinstance(groups, torch.Tensor):
        raise ConfigError(NO_GROUPS)
    if groups is not None and groups.ndim == 1:
        groups = groups.unsqueeze(0).expand(batch, -1)
    if groups is not None and list(groups.shape) != [batch, n]:
        raise ConfigError("groups must be [n] or [B, n], a number for each row.")
    spec = LayerSpec("attention", heads, d, value.shape[-1], scale)
    prepared = prepare_release(config, [spec], calibration)
    for message in prepared.warnings:
        warnings.warn(message, stacklevel=2)
    releases = [
        prepared.run([key[b]], [value[b]], groups=None if groups is None else groups[b], entropy=entropy)
        for b in range(batch)
    ]
    return ReleasedAttention(stack([r.structures[0] for r in releases]), tuple(r.guarantee for r in releases))
