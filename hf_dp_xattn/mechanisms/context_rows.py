"""What a context-space release is decoded to: a few rows with log weights, read by ordinary attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NEGLIGIBLE = 14.0  # a row whose weight is below e^-14 of the largest changes no output that anyone can see


@dataclass(frozen=True, eq=False)
class ContextRows:
    """Rows [R, C] of context space and their log weights [R], float32: post-processing of a release, and nothing else.

    A layer attends to them with logits scale q.W_k x_r + log w_r and values W_v x_r.
    """

    rows: torch.Tensor
    log_weights: torch.Tensor

    def pruned(self) -> ContextRows:
        """Without the rows that no query can notice; decided from the release only."""
        keep = self.log_weights >= self.log_weights.max() - NEGLIGIBLE
        return ContextRows(self.rows[keep], self.log_weights[keep])

    def to(self, device: torch.device | str) -> ContextRows:
        return ContextRows(self.rows.to(device), self.log_weights.to(device))
