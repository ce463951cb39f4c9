r"""What a decoder is trained for and judged by: the fraction of unexplained variance (FVU) of the attention outputs.

For layer l, public queries q and contexts i, with o_l(q, i) the exact output and o'_l(q, i) that of the decoded rows,

    FVU = mean over l of  sum_{q,i} |o' - o|^2 / sum_{q,i} |o - mean_i o|^2,

heads weighted by their gain on the layer's output. 1 is the public mean's score. Exact public rows (BOS) take part in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .reply_divergence import Logits, Replies, divergence

Project = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LayerProbe:
    """One layer.

    project: rows [B, n, C] -> keys and values [B, H, n, d], where and in the dtype that the layer computes in. scale: of the logits.
    queries: public ones [H, m, d] float32. gain: of each head [H], how much its output moves the layer's.
    """

    project: Project
    scale: float
    queries: torch.Tensor
    gain: torch.Tensor

    def keys_values(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`project`, float32 on the CPU."""
        key, value = self.project(rows)
        return key.to("cpu", torch.float32), value.to("cpu", torch.float32)

    def attend(
        self, rows: torch.Tensor, queries: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """rows [B, n, C], queries [H, m, d], bias [B, n] -> outputs [B, H, m, dv]."""
        key, value = self.keys_values(rows)
        query = queries.to(key).unsqueeze(0).expand(rows.shape[0], -1, -1, -1)
        mask = None if bias is None else bias.to(key)[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)


@dataclass(frozen=True, eq=False)
class Exact:
    """outputs: of each layer, which queries [m] and their exact outputs [N, H, m, dv]; variances [N, L, H] float64 about a mean over
    contexts, gains included."""

    outputs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    variances: torch.Tensor


REPLY_WEIGHT = 3.0  # of a nat of divergence, beside an FVU of 1


@dataclass(frozen=True)
class Objective:
    """The layers, and the exact public rows [p, C] that stand beside every context. logits: the host itself, where its replies count."""

    layers: Sequence[LayerProbe]
    public_rows: torch.Tensor
    logits: Logits | None = None

    def with_public(
        self, rows: torch.Tensor, log_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decoded rows [B, R, C] and weights [B, R] with the public rows (weight 1) before them."""
        batch, p = rows.shape[0], self.public_rows.shape[0]
        public = self.public_rows.to(rows).expand(batch, -1, -1)
        bias = torch.cat([log_weights.new_zeros(batch, p), log_weights], dim=1)
        return torch.cat([public, rows], dim=1), bias

    def losses(
        self,
        whole: torch.Tensor,
        rows: torch.Tensor,
        log_weights: torch.Tensor,
        *,
        queries: int,
        layers: int,
        generator: torch.Generator,
        outputs: Sequence[torch.Tensor] | None = None,
        replies: Replies | None = None,
    ) -> torch.Tensor:
        """[B] each context's share of the FVU over a random choice of layers and queries; the variance is the batch's own. Where replies
        are given, the divergence of one of each context's on top, `REPLY_WEIGHT` times.

        whole: [B, n, C] the rows whose attention is the target; outputs: or that attention itself, for all queries of each layer.
        """
        decoded, bias = self.with_public(rows, log_weights)
        chosen = torch.randperm(len(self.layers), generator=generator)[:layers].tolist()
        parts = []
        for i in chosen:
            layer = self.layers[i]
            pick = torch.randint(0, layer.queries.shape[1], (queries,), generator=generator)
            q = layer.queries[:, pick]
            gain = layer.gain.to(whole.dtype)
            with torch.no_grad():
                exact = layer.attend(whole, q) if outputs is None else outputs[i][:, :, pick].to(whole)
                variance = ((exact - exact.mean(0)).square().sum((0, 2, 3)) * gain).sum() / len(whole)
            error = ((layer.attend(decoded, q, bias) - exact).square().sum((2, 3)) * gain).sum(1)
            parts.append(error / variance.clamp_min(1e-12))
        loss = torch.stack(parts).mean(0)
        if replies is None or self.logits is None:
            return loss
        pick = torch.randint(0, replies.ids.shape[1], (len(rows),), generator=generator)
        return loss + REPLY_WEIGHT * divergence(replies.one_each(pick), rows, log_weights, self.logits)

    @torch.no_grad()
    def divergences(
        self, replies: Replies, decoded: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """[N] mean over each context's replies; `decoded`: (rows, log weights)."""
        assert self.logits is not None
        divergences = []
        for start in range(0, len(decoded), 32):
            rows, weights = pad_decoded(decoded[start : start + 32])
            part = replies[torch.arange(start, start + len(rows))]
            asked = [torch.full((len(rows),), i) for i in range(replies.ids.shape[1])]
            each = [divergence(part.one_each(i), rows, weights, self.logits) for i in asked]
            divergences.append(torch.stack(each).mean(0))
        return torch.cat(divergences)

    @torch.no_grad()
    def exact(
        self,
        whole: torch.Tensor,
        *,
        queries: int = 64,
        seed: int = 0,
        outputs: Sequence[torch.Tensor] | None = None,
        usual: torch.Tensor | None = None,
    ) -> Exact:
        """What decoded rows are compared with: the exact outputs of some queries, for rows [N, n, C], or those of given outputs. Variances
        are about the mean over the `usual` contexts [N] bool, by default all."""
        generator = torch.Generator().manual_seed(seed)
        sampled = []
        for i, layer in enumerate(self.layers):
            pick = torch.randint(0, layer.queries.shape[1], (queries,), generator=generator)
            if outputs is None:
                q = layer.queries[:, pick]
                exact = torch.cat([layer.attend(part.float(), q) for part in whole.split(32)])
            else:
                exact = outputs[i][:, :, pick].float()
            sampled.append((pick, exact))
        among = slice(None) if usual is None else usual
        variances = [
            (exact.double() - exact[among].double().mean(0)).square().sum((2, 3)) * layer.gain.double()
            for (_, exact), layer in zip(sampled, self.layers, strict=True)
        ]
        return Exact(tuple(sampled), _stack_heads(variances))

    @torch.no_grad()
    def errors(self, exact: Exact, decoded: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Squared error of each context, layer and head [N, L, H] float64, gains included; `decoded`: (rows, log weights)."""
        padded, bias = self.with_public(*pad_decoded(decoded))
        assert bias is not None
        errors = []
        for layer, (pick, wanted) in zip(self.layers, exact.outputs, strict=True):
            q = layer.queries[:, pick]
            parts = zip(padded.split(32), bias.split(32), wanted.split(32), strict=True)
            each = [(layer.attend(p, q, b) - w).double().square().sum((2, 3)) for p, b, w in parts]
            errors.append(torch.cat(each) * layer.gain.double())
        return _stack_heads(errors)

    def measure(
        self,
        whole: torch.Tensor,
        decoded: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        queries: int = 64,
        seed: int = 0,
        outputs: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error and variance of each context, layer and head [N, L, H] float64, gains included; `decoded`: (rows, log weights)."""
        exact = self.exact(whole, queries=queries, seed=seed, outputs=outputs)
        return self.errors(exact, decoded), exact.variances


def _stack_heads(each: Sequence[torch.Tensor]) -> torch.Tensor:
    """[N, H] of each layer -> [N, L, H]; a layer of fewer heads (SDXL's, SD 2's) has zeros, which are in no sum."""
    most = max(e.shape[1] for e in each)
    return torch.stack([F.pad(e, (0, most - e.shape[1])) for e in each], 1)


def pad_decoded(decoded: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [R, C], log weights [R]) of several contexts -> [N, R, C], [N, R]; what pads has weight 0."""
    longest = max(r.shape[0] for r, _ in decoded)
    rows = torch.stack([F.pad(r, (0, 0, 0, longest - r.shape[0])) for r, _ in decoded])
    return rows, torch.stack([F.pad(w, (0, longest - w.shape[0]), value=-torch.inf) for _, w in decoded])


def fvu(errors: torch.Tensor, variances: torch.Tensor) -> float:
    """The FVU from per-context errors and variances [N, L, H], with the variance's N / (N - 1)."""
    count = errors.shape[0]
    ratio = errors.sum((0, 2)) / variances.sum((0, 2)).clamp_min(1e-30)
    return float(ratio.mean()) * (1.0 - 1.0 / max(2, count))
