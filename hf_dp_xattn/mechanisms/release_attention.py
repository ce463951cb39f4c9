"""One attention layer by itself: its private keys and values released once, then any number of queries."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError, ContextError
from ..privacy.bits import Entropy
from ..report import Guarantee
from .base import LayerSpec
from .groups import NO_GROUPS, as_groups
from .inputs import LayerRows
from .kernel_sum.kernel_sum import PreparedKernelSum, PublicCalibration
from .registry import prepare_release
from .structure import AttentionStructure, stack


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
    allow_useless: bool = False,
) -> ReleasedAttention:
    """Releases one attention layer's private keys and values; one budget per batch element over all its heads.

    Formal guarantee: for each batch element, the returned structure is (config.epsilon, config.delta)-DP with respect to
    `config.unit` and `config.neighboring`; see `kernel_sum/kernel_sum.py` and `dptree/dptree.py` for what is released
    and the theorem.
    This is the mechanism on tensors: unlike `protect` it asks for no calibration, since tensors of no model have none. `kernel_sum` is
    refused by public numbers alone, where the noise is more than a tenth of what all rows add up to (a context of few rows, or a
    unit that is the whole context); `dptree`, the paper's baseline, never is.

    The caller accounts for repeated releases of the same context (`privacy/ledger.py`; `protect` does it).

    Args:
        key: [B, H, n, d] private keys.
        value: [B, H, n, dv] private values.
        config: mechanism, budget, unit and relation.
        groups: [n] or [B, n] (a list, array or tensor) integer group of each row, for `unit="group"`; public.
        scale: logit scale, default 1/sqrt(d) (the paper scales by 1/d: pass it).
        calibration: public statistics from `dpx.calibrate`.
        entropy: noise source; the operating system's by default. A seeded one makes the result NOT private.
        allow_useless: release even where nothing but noise would come through.

    Raises:
        ContextError, ConfigError: bad shapes, NaN, no rows, unfit calibration, too few rows. Nothing is released.

    Example:
        >>> key, value = torch.randn(1, 2, 500, 8), torch.randn(1, 2, 500, 8)
        >>> released = dpx.release_attention(key, value, dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", epsilon=8.0))
        >>> released.attend(torch.randn(1, 2, 3, 8)).shape
        torch.Size([1, 2, 3, 8])
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
    if isinstance(prepared, PreparedKernelSum) and config.neighboring == "replace_one" and not allow_useless:
        why = prepared.drowned(n)
        if why is not None:
            raise ContextError(
                f"{why}. Nothing was released. Use a larger epsilon, a smaller unit or a context of more rows; for a model, dpx.protect "
                "with a calibration; allow_useless=True is for those who know."
            )
    for message in prepared.warnings:
        warnings.warn(message, stacklevel=2)
    releases = [
        prepared.run(
            LayerRows([key[b]], [value[b]]), groups=None if groups is None else groups[b], entropy=entropy
        )
        for b in range(batch)
    ]
    return ReleasedAttention(stack([r.structures[0] for r in releases]), tuple(r.guarantee for r in releases))
