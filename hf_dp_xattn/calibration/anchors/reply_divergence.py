"""Replies of the host itself to public questions, as a second thing that a decoder is trained for and judged by.

Attention outputs weigh every direction of a head alike; a reply turns on few of them. *Divergence* of decoded rows: the mean over the
tokens of the exact host's replies of KL(exact || decoded), in nats, of the next token's distribution. Public data only: how the host
replies to a private context is asked nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

KEPT = (
    16  # likeliest next tokens that are told apart; all others count as one, so a divergence is a lower bound
)


@dataclass(frozen=True, eq=False)
class Replies:
    """N public contexts, r texts each: a question and the host's reply to it, padded on the right to T tokens.

    ids [N, r, T]; weight [N, r, T]: 1 where the next token is the reply's; top [N, r, T, KEPT] token ids and their log-probabilities
    logs [N, r, T, KEPT], of the host with the exact context.
    """

    ids: torch.Tensor
    weight: torch.Tensor
    top: torch.Tensor
    logs: torch.Tensor

    TENSORS = ("ids", "weight", "top", "logs")

    def __getitem__(self, index: torch.Tensor) -> Replies:
        return Replies(*(getattr(self, n)[index] for n in self.TENSORS))

    def one_each(self, pick: torch.Tensor) -> Replies:
        """pick [N]: the text of each context that stays; r is 1 then."""
        each = torch.arange(len(pick))
        return Replies(*(getattr(self, n)[each, pick].unsqueeze(1) for n in self.TENSORS))

    @staticmethod
    def cat(parts: Sequence[Replies]) -> Replies:
        return Replies(*(torch.cat([getattr(p, n) for p in parts]) for n in Replies.TENSORS))


Logits = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(ids [B, T], rows [B, R, C], log weights [B, R]) -> the host's logits [B, T, V]; differentiable in rows and weights."""


def keep_likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., V] -> ids (int32) and log-probabilities (float32) [..., KEPT]; a vocabulary of fewer words is padded by -inf."""
    logs, top = logits.float().log_softmax(-1).topk(min(KEPT, logits.shape[-1]))
    missing = KEPT - logs.shape[-1]
    return F.pad(top, (0, missing)).int(), F.pad(logs, (0, missing), value=-torch.inf)


def divergence(
    replies: Replies, rows: torch.Tensor, log_weights: torch.Tensor, logits: Logits
) -> torch.Tensor:
    """[B]: KL(exact || decoded) in nats a token, of replies [B, 1, T] behind decoded rows [B, R, C] and log weights [B, R]."""
    ids, weight, top, logs = (getattr(replies, n)[:, 0] for n in Replies.TENSORS)
    row, place = weight.nonzero(as_tuple=True)
    said = logits(ids.long(), rows, log_weights)[row, place].float().log_softmax(-1)
    wanted, known = logs[row, place], logs[row, place].isfinite()
    chosen = said.gather(-1, top[row, place].long()).masked_fill(~known, 0.0)
    exact = wanted.exp()
    listed = torch.zeros_like(said, dtype=torch.bool).scatter(-1, top[row, place].long(), True)
    others = said.masked_fill(listed, -torch.inf)
    rest = (1.0 - exact.sum(-1)).clamp_min(0.0)
    kl = (exact * (wanted.masked_fill(~known, 0.0) - chosen)).sum(-1)
    counts = rest > 1e-4
    left = others.logsumexp(-1).masked_fill(~counts, 0.0)
    kl = kl + torch.where(counts, rest * (rest.clamp_min(1e-12).log() - left), 0.0)
    total = torch.zeros(len(ids), dtype=kl.dtype).index_add(0, row, kl)
    mean: torch.Tensor = total / weight.sum(-1).clamp_min(1.0)
    return mean
