"""Training of the slot decoder and of the learned sums, jointly over all plans, on public contexts with fresh noise."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...mechanisms.anchors.slots import SlotDecoder, SlotHead
from ..checkpoints import NOTHING_KEPT, Checkpoints
from ..progress import QUIET, Progress
from .objective import Moved, Objective
from .reply_divergence import Replies
from .training_state import Course, TrainingState

_SAMPLE = 150_000_000
_LOOKS = 100  # steps between two looks at contexts that a training does not see
_LOOK_SEED = 12_345
_REPLIED = 16  # contexts whose replies are looked at
_RUINED = 2.0  # a loss of so many times the lowest is no noise
_LOWERED = 0.3
_CONSTANT = 1e-4  # of the widest channel's deviation


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

    code: int = 192
    slots: int = 32
    hidden: int = 256
    directions: int = 192
    steps: int = 3000
    batch: int = 48
    queries: int = 24
    layers: int = 4
    learning_rate: float = 2e-3
    seed: int = 0


@torch.no_grad()
def leading_directions(points: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """[count, C] orthonormal: the directions in which points [N, C] vary most (by subspace iteration), then any others."""
    few = points[torch.randperm(len(points), generator=generator)[:4096]]
    directions = torch.randn(points.shape[1], count, generator=generator)
    for _ in range(4):
        directions = torch.linalg.qr(few.mT @ (few @ directions) + 1e-6 * directions)[0]
    return directions.mT.contiguous()


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
        scale = units.std(0) if len(units) > 1 else torch.ones(c)
        # a channel that is the same everywhere says nothing: counted in its own deviation, it would overflow half precision
        widest = scale.max().clamp_min(1e-6)
        scale = torch.where(scale < _CONSTANT * widest, widest, scale)

        def normal(*shape: int, scale: float) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * scale

        basis = leading_directions((units - self.center) / scale, min(c, k), generator)
        basis = torch.cat([basis, normal(k - basis.shape[0], c, scale=c**-0.5)]) if k > c else basis
        spread = float(((units - self.center) / scale).square().sum(-1).mean().sqrt().clamp_min(1e-6))
        # by each channel's own deviation: some are a thousand times those of others
        first = basis / scale * (1.2 / spread)
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
        # slots and directions are counted in deviations of their channel
        there = sample.whole[(sample.whole != 0).any(-1)]
        self.deviation = nn.Parameter(there.std(0).clamp_min(1e-6), requires_grad=False)
        self.first = nn.Parameter(rows[position], requires_grad=False)
        self.slots = nn.Parameter(normal(settings.slots, c, scale=0.1))
        self.log_weights = nn.Parameter(
            torch.full((settings.slots,), math.log((contexts.length or rows.shape[0]) / settings.slots))
        )
        self.coefficients = nn.Parameter(
            normal(settings.slots, settings.directions, h + k, scale=0.1 * h**-0.5)
        )
        self.directions = nn.Parameter(normal(settings.directions, c, scale=0.3))
        self.weight_map = nn.Parameter(torch.zeros(settings.slots, h + k))

    def decoder(self) -> SlotDecoder:
        """The shared decoder; it reads the parameters themselves, so gradients flow."""
        return SlotDecoder(
            self.hidden,
            self.coefficients,
            self.directions * self.deviation,
            self.first + self.slots * self.deviation,
            self.weight_map,
            self.log_weights,
        )

    def rate_of(self, parameter: nn.Parameter, usual: float) -> float:
        """The learning rate of a parameter: entries of a map from many channels are small, and steps must be smaller than they."""
        if parameter is self.common_matrix or parameter is self.matrix:
            return min(usual, 0.1 * float(self.common_matrix.detach().square().mean().sqrt()))
        return usual

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


@dataclass(frozen=True, eq=False)
class Watched:
    """Public contexts that a training does not see: what it comes to on them says whether it is well, and when it was best.

    seconds: that a training may take; None: as long as its steps do.
    """

    contexts: PublicContexts
    seconds: float | None = None


class _Best:
    """The best parameters so far, by the loss on contexts that a training does not see; they are kept in its course."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: Callable[[], float], course: Course) -> None:
        self._parameters, self._loss, self._course = parameters, loss, course

    @torch.no_grad()
    def look(self) -> bool:
        """Whether the training is well; where it is not, it is taken back to where it was best."""
        now, course = self._loss(), self._course
        if now < course.lowest:
            course.lowest, course.best = now, [p.detach().clone() for p in self._parameters]
        if now <= _RUINED * course.lowest:
            return True
        self.restore()
        return False

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, kept in zip(self._parameters, self._course.best, strict=True):
            parameter.copy_(kept)


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
    watched: Watched,
    progress: Progress = QUIET,
    kept: Checkpoints = NOTHING_KEPT,
) -> int:
    """Adam with a cosine schedule; every batch is shared by a few plans, whose losses count in proportion to what is attainable.

    The parameters that were best on `watched` stay. A learning rate that ruins them is lowered. Returns how many steps were made.
    """
    looked = watched.contexts
    if looked.replies is not None:  # the host itself runs on each of them
        looked = looked.part(torch.arange(min(_REPLIED, len(looked))))

    affine = objective.affine(trainer.first.detach())

    def spread(
        batch: PublicContexts, chosen: Sequence[int]
    ) -> tuple[torch.Tensor | Moved, torch.Tensor, list[tuple[int, int]]]:
        """Rows and log weights of a batch that is shared by some plans, and how many contexts each of them has."""
        decoder = trainer.decoder()
        # codes read units alone: what else a batch holds is not dealt out
        told = PublicContexts(batch.units, batch.mask, batch.whole[:, :0])
        moves, weights, counts = [], [], []
        for part, plan in zip(torch.arange(len(batch)).chunk(len(chosen)), chosen, strict=False):
            moved, logs = decoder.moves(codes(told.part(part), plan), trainer.head_of(plan))
            moves.append(moved)
            weights.append(logs)
            counts.append((plan, len(part)))
        rows = Moved(decoder.slots, torch.cat(moves), decoder.directions)
        return rows if affine else rows.rows, torch.cat(weights), counts

    def losses(batch: PublicContexts, rows: torch.Tensor | Moved, weights: torch.Tensor) -> torch.Tensor:
        return objective.losses(
            batch.whole,
            rows,
            weights,
            queries=settings.queries,
            layers=settings.layers,
            generator=generator,
            outputs=batch.outputs,
            replies=batch.replies,
        )

    def loss() -> float:
        if not len(looked):
            return 0.0
        before = generator.get_state()
        generator.manual_seed(_LOOK_SEED)
        batch = looked.float()
        rows, weights, _ = spread(batch, plans)
        mean = float(losses(batch, rows, weights).mean())
        generator.set_state(before)
        return mean if math.isfinite(mean) else math.inf

    optimiser = torch.optim.Adam([{"params": [p]} for p in parameters], lr=settings.learning_rate)
    rates = [trainer.rate_of(p, settings.learning_rate) for p in parameters]
    course = Course(dict.fromkeys(plans, 1.0), [p.detach().clone() for p in parameters], math.inf)
    best, state = (
        _Best(parameters, loss, course),
        TrainingState(kept, label, trainer, optimiser, generator),
    )
    state.restore(course)
    if course.over:
        progress.end(label)
        return course.steps
    if not course.steps:
        best.look()
    level = course.level
    share = min(len(plans), 4)
    started = time.monotonic() - course.spent
    every = max(5, min(_LOOKS, settings.steps // 8))
    for step in progress.track(range(course.steps, settings.steps), label):
        done = step / settings.steps
        if watched.seconds is not None:
            done = max(done, (time.monotonic() - started) / max(1e-3, watched.seconds))
            if done >= 1.0:
                break
        if step % every == every - 1 and not best.look():
            course.rate *= _LOWERED
            optimiser.state.clear()
        warm = min(1.0, (step + 1) / min(100, 1 + settings.steps // 4))
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        for group, usual in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = course.rate * usual * (warm * cosine + 5e-3)
        order = torch.randperm(len(plans), generator=generator)[:share].tolist()
        batch = contexts.part(torch.randint(0, len(contexts), (settings.batch,), generator=generator)).float()
        rows, weights, counts = spread(batch, [plans[position] for position in order])
        values = losses(batch, rows, weights)
        total = values.new_zeros(())
        start = 0
        for plan, count in counts:
            plan_loss = values[start : start + count].mean()
            level[plan] = 0.95 * level[plan] + 0.05 * max(float(plan_loss.detach()), 1e-3)
            total = total + plan_loss / level[plan] / len(counts)
            start += count
        optimiser.zero_grad(set_to_none=True)
        total.backward(inputs=list(parameters))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        course.steps, course.spent = step + 1, time.monotonic() - started
        state.keep(course)
    best.look()
    best.restore()
    course.over = True
    state.keep(course)
    return course.steps
