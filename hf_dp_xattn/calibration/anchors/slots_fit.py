"""Training of the slot decoder and of the learned sums, jointly over all plans, on public contexts with fresh noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ...mechanisms.anchors.slots import SlotDecoder, SlotHead
from .objective import Objective
from .reply_divergence import Replies

_SAMPLE = 150_000_000


@dataclass(frozen=True, eq=False)
class PublicContexts:
    """Public contexts: units [N, U, C] (rows, or one mean row per group or context), their mask [N, U], and the rows [N, n, C] whose
    attention a decoder must reproduce. Stored in half precision where the host's rows are.

    outputs: for contexts of too many rows, the attention itself: one [N, H, m, dv] per layer for its public queries; `whole` is then a
    sample of the rows, of a longest context of `length`. replies: of the host to public questions, where they count as well.
    """

    units: torch.Tensor
    mask: torch.Tensor
    whole: torch.Tensor
    outputs: tuple[torch.Tensor, ...] | None = None
    length: int | None = None
    replies: Replies | None = None

    def __len__(self) -> int:
        return self.whole.shape[0]

    def part(self, index: torch.Tensor) -> PublicContexts:
        outputs = None if self.outputs is None else tuple(o[index] for o in self.outputs)
        replies = None if self.replies is None else self.replies[index]
        return PublicContexts(
            self.units[index], self.mask[index], self.whole[index], outputs, self.length, replies
        )

    def sample(self, count: int) -> PublicContexts:
        """The first `count` contexts or fewer, as many as `_SAMPLE` numbers hold: in float32, with some copies, more would not fit."""
        fits = max(64, _SAMPLE // self.units[0].numel())
        return self.part(torch.arange(min(count, fits, len(self)))).float()

    def float(self) -> PublicContexts:
        return dataclasses.replace(self, units=self.units.float(), whole=self.whole.float())


@dataclass(frozen=True)
class SlotSettings:
    """Sizes and schedule. steps counts batches; each batch spreads over all plans."""

    code: int = 64
    slots: int = 32
    hidden: int = 256
    directions: int = 64
    steps: int = 3000
    batch: int = 48
    queries: int = 24
    layers: int = 8
    learning_rate: float = 2e-3
    seed: int = 0


def clip_unit(x: torch.Tensor) -> torch.Tensor:
    """x / max(1, |x|) along the last axis."""
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(1.0)


class SlotTrainer(nn.Module):
    """All plans' encoders and heads and the shared decoder.

    Encoders and heads are a common part plus one deviation per plan (stacked along the first axis): plans of neighbouring epsilons are
    alike, and the common part learns from all batches.
    """

    def __init__(
        self, contexts: PublicContexts, plans: int, settings: SlotSettings, generator: torch.Generator
    ) -> None:
        super().__init__()
        c, k, h = contexts.whole.shape[-1], settings.code, settings.hidden
        sample = contexts.sample(512)
        units = sample.units[sample.mask]
        self.center = nn.Parameter(units.mean(0), requires_grad=False)
        spread = float((units - self.center).square().sum(-1).mean().sqrt().clamp_min(1e-6))

        def normal(*shape: int, scale: float) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * scale

        basis = torch.linalg.qr(normal(c, min(c, k), scale=1.0))[0].mT
        basis = torch.cat([basis, normal(k - basis.shape[0], c, scale=c**-0.5)]) if k > c else basis
        first = basis * (1.2 / spread)
        self.common_matrix = nn.Parameter(first)
        self.matrix = nn.Parameter(torch.zeros(plans, k, c))
        self.bias = nn.Parameter(torch.zeros(plans, k))
        self.common_head = nn.Parameter(normal(h, k, scale=k**-0.5))
        self.head = nn.Parameter(torch.zeros(plans, h, k))
        self.head_bias = nn.Parameter(torch.zeros(plans, h))
        self.second_bias = nn.Parameter(torch.zeros(plans, h))
        self.gain = nn.Parameter(torch.ones(plans, k))
        self.code_center = nn.Parameter(torch.zeros(plans, k), requires_grad=False)
        self.code_scale = nn.Parameter(torch.ones(plans), requires_grad=False)
        self.hidden = nn.Parameter(normal(h, h, scale=h**-0.5))
        rows = sample.whole.mean(0)
        if (
            contexts.outputs is not None
        ):  # a sample's places mean nothing: single public rows, not the mean of all
            drawn = torch.randint(0, len(sample), (rows.shape[0],), generator=generator)
            rows = sample.whole[drawn, torch.arange(rows.shape[0])]
        position = torch.linspace(0, rows.shape[0] - 1, settings.slots).round().long()
        noise = normal(settings.slots, c, scale=0.1 * float(sample.whole.std()))
        self.slots = nn.Parameter(rows[position] + noise)
        self.log_weights = nn.Parameter(
            torch.full((settings.slots,), math.log((contexts.length or rows.shape[0]) / settings.slots))
        )
        self.coefficients = nn.Parameter(
            normal(settings.slots, settings.directions, h + k, scale=0.1 * h**-0.5)
        )
        self.directions = nn.Parameter(normal(settings.directions, c, scale=float(sample.whole.std()) * 0.3))
        self.weight_map = nn.Parameter(torch.zeros(settings.slots, h + k))

    def decoder(self) -> SlotDecoder:
        """The shared decoder; it reads the parameters themselves, so gradients flow."""
        return SlotDecoder(
            self.hidden, self.coefficients, self.directions, self.slots, self.weight_map, self.log_weights
        )

    def head_of(self, plan: int) -> SlotHead:
        return SlotHead(
            self.common_head + self.head[plan],
            self.head_bias[plan],
            self.second_bias[plan],
            self.gain[plan],
            self.code_center[plan],
            self.code_scale[plan],
        )

    def matrix_of(self, plan: int) -> torch.Tensor:
        return self.common_matrix + self.matrix[plan]

    def clipped(self, units: torch.Tensor, plan: int) -> torch.Tensor:
        """[..., C] -> codes in the unit ball [..., K]."""
        return clip_unit((units - self.center) @ self.matrix_of(plan).mT + self.bias[plan])


@torch.no_grad()
def set_code_scale(trainer: SlotTrainer, plan: int, codes: torch.Tensor) -> None:
    """Fixes a head's input normalisation from codes [N, K] (with their noise)."""
    trainer.code_center[plan] = codes.mean(0)
    trainer.code_scale[plan] = (codes - codes.mean(0)).square().mean().sqrt().clamp_min(1e-6)


Codes = Callable[[PublicContexts, int], torch.Tensor]  # (contexts, plan) -> simulated noised codes [B, K]


def train(
    trainer: SlotTrainer,
    contexts: PublicContexts,
    objective: Objective,
    plans: Sequence[int],
    codes: Codes,
    settings: SlotSettings,
    *,
    parameters: Sequence[nn.Parameter],
    label: str,
    generator: torch.Generator,
    progress: bool,
) -> None:
    """Adam with a cosine schedule; every batch is shared by a few plans, whose losses count in proportion to what is attainable."""
    optimiser = torch.optim.Adam(parameters, lr=settings.learning_rate)
    level = dict.fromkeys(plans, 1.0)
    share = min(len(plans), 4)
    bar = tqdm(range(settings.steps), desc=label, disable=not progress, leave=False)
    for step in bar:
        warm = min(1.0, (step + 1) / 100)
        cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * warm * cosine + 1e-5
        order = torch.randperm(len(plans), generator=generator)[:share].tolist()
        index = torch.randint(0, len(contexts), (settings.batch,), generator=generator)
        batch = contexts.part(index).float()
        decoded_rows, decoded_weights, counts = [], [], []
        for part, position in zip(torch.arange(settings.batch).chunk(share), order, strict=False):
            plan = plans[position]
            rows, weights = trainer.decoder().decode_batch(
                codes(batch.part(part), plan), trainer.head_of(plan)
            )
            decoded_rows.append(rows)
            decoded_weights.append(weights)
            counts.append((plan, len(part)))
        losses = objective.losses(
            batch.whole,
            torch.cat(decoded_rows),
            torch.cat(decoded_weights),
            queries=settings.queries,
            layers=settings.layers,
            generator=generator,
            outputs=batch.outputs,
            replies=batch.replies,
        )
        total = losses.new_zeros(())
        start = 0
        for plan, count in counts:
            own = losses[start : start + count].mean()
            level[plan] = 0.95 * level[plan] + 0.05 * max(float(own.detach()), 1e-3)
            total = total + own / level[plan] / len(counts)
            start += count
        optimiser.zero_grad(set_to_none=True)
        total.backward(inputs=list(parameters))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if step % 50 == 0:
            bar.set_postfix(
                {"loss" if contexts.replies else "FVU": f"{sum(level.values()) / len(level):.3f}"},
                refresh=False,
            )


def fit_blind_head(
    decoder: SlotDecoder,
    contexts: PublicContexts,
    objective: Objective,
    settings: SlotSettings,
    *,
    steps: int = 200,
    progress: bool = False,
) -> SlotHead:
    """A head that does not look at the code: the decoder then gives the rows that stand for the public mean (FVU 1, or close to it)."""
    generator = torch.Generator().manual_seed(settings.seed)
    width, code = decoder.hidden.shape[0], decoder.weight_map.shape[1] - decoder.hidden.shape[0]
    bias, second = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
    zero = torch.zeros(code)
    head = SlotHead(torch.zeros(width, code), bias, second, zero, zero, torch.tensor(1.0))
    optimiser = torch.optim.Adam([bias, second], lr=2e-2)
    for step in tqdm(range(steps), desc="public mean", disable=not progress, leave=False):
        for group in optimiser.param_groups:
            group["lr"] = 2e-2 * 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-5
        index = torch.randint(0, len(contexts), (settings.batch,), generator=generator)
        batch = contexts.part(index)
        rows, weights = decoder.decode_batch(zero.expand(len(index), -1), head)
        loss = objective.losses(
            batch.whole.float(),
            rows,
            weights,
            queries=settings.queries,
            layers=settings.layers,
            generator=generator,
            outputs=batch.outputs,
        ).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward(inputs=[bias, second])
        optimiser.step()
    return SlotHead(*(getattr(head, n).detach().clone() for n in SlotHead.TENSORS))
