r"""What a decoder is trained for and judged by: the fraction of unexplained variance (FVU) of the attention outputs.

For layer l, public queries q and contexts i, with o_l(q, i) the exact output and o'_l(q, i) that of the decoded rows,

    FVU = mean over l of  sum_{q,i} |o' - o|^2 / sum_{q,i} |o - mean_i o|^2,

heads weighted by their gain on the layer's output. 1 is the public mean's score. Exact public rows (BOS) take part in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

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

    @torch.no_grad()
    def is_affine(self, like: torch.Tensor) -> bool:
        """Whether keys and values of a sum are sums of keys and values, but for a constant: tried on some of the rows like [n, C].

        Args:
            like: two or more.
        """
        few = like[:8].float()
        tried = torch.cat([few, few.flip(0), few + few.flip(0), torch.zeros_like(few[:1])])
        n = len(few)
        for made in self.keys_values(tried.unsqueeze(0)):
            first, second, both, nothing = made[0].split([n, n, n, 1], dim=1)
            wrong = (first + second - nothing - both).abs().max()
            if float(wrong) > _ROUNDED * float(both.abs().max()):
                return False
        return True

    def attend(
        self, rows: torch.Tensor, queries: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """rows [B, n, C], queries [H, m, d], bias [B, n] -> outputs [B, H, m, dv]."""
        return self.attend_to(*self.keys_values(rows), queries, bias)

    def attend_to(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        queries: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `attend`, of keys and values [B, H, n, d]."""
        query = queries.to(key).unsqueeze(0).expand(len(key), -1, -1, -1)
        mask = None if bias is None else bias.to(key)[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)


@dataclass(frozen=True, eq=False)
class Moved:
    """Decoded rows slots + moves @ directions: slots [R, C], moves [B, R, L], directions [L, C].

    A projection that is affine is computed of the R slots and the L directions, not of all B R rows: on a real encoder that was most of a
    training step.
    """

    slots: torch.Tensor
    moves: torch.Tensor
    directions: torch.Tensor

    @cached_property
    def rows(self) -> torch.Tensor:
        """[B, R, C]."""
        return self.slots + self.moves @ self.directions

    def keys_values(self, layer: LayerProbe, public: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, p + R, d] of an affine layer, of the public rows [p, C] and these."""
        parts = [len(public), len(self.slots), len(self.directions), 1]
        few = torch.cat(
            [public.to(self.slots), self.slots, self.directions, self.slots.new_zeros(1, public.shape[1])]
        )
        made = []
        for each in layer.keys_values(few.unsqueeze(0)):
            before, base, along, nothing = each[0].split(parts, dim=1)
            moved = base + torch.einsum("brl,hld->bhrd", self.moves, along - nothing)
            made.append(torch.cat([before.expand(len(self.moves), -1, -1, -1), moved], dim=2))
        return made[0], made[1]


@dataclass(frozen=True, eq=False)
class Exact:
    """outputs: of each layer, which queries [m] and their exact outputs [N, H, m, dv]; variances [N, L, H] float64 about a mean over
    contexts, gains included."""

    outputs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    variances: torch.Tensor


_ROUNDED = 0.02  # of keys and values: what half precision's rounding comes to, at most
REPLY_WEIGHT = 3.0  # of a nat of divergence, beside an FVU of 1


@dataclass(frozen=True)
class Objective:
    """The layers, and the exact public rows [p, C] that stand beside every context. logits: the host itself, where its replies count."""

    layers: Sequence[LayerProbe]
    public_rows: torch.Tensor
    logits: Logits | None = None

    def with_public(self, rows: torch.Tensor, log_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoded rows [B, R, C] and weights [B, R] with the public rows (weight 1) before them."""
        return self._with_public_rows(rows), self._with_public_weights(log_weights)

    def _with_public_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.public_rows.to(rows).expand(len(rows), -1, -1), rows], dim=1)

    def _with_public_weights(self, log_weights: torch.Tensor) -> torch.Tensor:
        return torch.cat([log_weights.new_zeros(len(log_weights), len(self.public_rows)), log_weights], dim=1)

    def affine(self, like: torch.Tensor) -> bool:
        """Whether all layers' projections are: `LayerProbe.is_affine`."""
        return all(layer.is_affine(like) for layer in self.layers)

    def losses(
        self,
        whole: torch.Tensor,
        rows: torch.Tensor | Moved,
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

        whole: [B, n, C] the rows whose attention is the target; outputs: or that attention itself, for all queries of each layer. rows:
        [B, R, C], or as they were moved, where every layer's projection is affine.
        """
        bias = self._with_public_weights(log_weights)
        decoded = None if isinstance(rows, Moved) else self._with_public_rows(rows)
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
            if isinstance(rows, Moved):
                made = layer.attend_to(*rows.keys_values(layer, self.public_rows), q, bias)
            else:
                assert decoded is not None
                made = layer.attend(decoded, q, bias)
            error = ((made - exact).square().sum((2, 3)) * gain).sum(1)
            parts.append(error / variance.clamp_min(1e-12))
        loss = torch.stack(parts).mean(0)
        if replies is None or self.logits is None:
            return loss
        whole_rows = rows.rows if isinstance(rows, Moved) else rows
        pick = torch.randint(0, replies.ids.shape[1], (len(whole_rows),), generator=generator)
        return loss + REPLY_WEIGHT * divergence(replies.one_each(pick), whole_rows, log_weights, self.logits)

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
