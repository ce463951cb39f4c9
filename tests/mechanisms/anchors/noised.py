"""Releases of one part of `anchors` by itself, and codes of a whole one."""

from __future__ import annotations

import torch

from hf_dp_xattn.mechanisms.anchors.histogram import PreparedHistogram
from hf_dp_xattn.mechanisms.anchors.row_sum import PreparedRowSum
from hf_dp_xattn.mechanisms.anchors.sources import PreparedAnchors
from hf_dp_xattn.privacy.additive import GaussianNoise
from hf_dp_xattn.privacy.bits import Entropy, SystemEntropy


def release(
    prepared: PreparedHistogram | PreparedRowSum,
    data: torch.Tensor,
    *,
    groups: torch.Tensor | None = None,
    entropy: Entropy | None = None,
) -> torch.Tensor:
    """Noised counts int64 [m], or a noised sum float64 [K]."""
    source = SystemEntropy() if entropy is None else entropy
    if isinstance(prepared, PreparedHistogram):
        return prepared.noise.perturb(prepared.exact_sums(data, groups), source)
    total = prepared.exact_sums(data)
    return prepared.real(GaussianNoise(prepared.sigma_squared).perturb(total, source))


def code_of(prepared: PreparedAnchors, rows: torch.Tensor, entropy: Entropy) -> torch.Tensor:
    """The released code of rows [n, C]."""
    return prepared.code(prepared.noise(prepared.exact(rows, None), entropy), len(rows))
