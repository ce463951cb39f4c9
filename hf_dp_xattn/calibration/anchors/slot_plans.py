"""Plans of learned sums and of answers: one slot decoder for all of them, trained from the linear posterior on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...config import DPXAttnConfig
from ...mechanisms.anchors.fallback import Fallback
from ...mechanisms.anchors.plan import NOT_JUDGED, AnchorPlan
from ...mechanisms.anchors.row_sum import RowSum
from ...mechanisms.anchors.slots import SlotDecoder, SlotHead
from ...privacy.response import RandomizedResponse
from ..checkpoints import NOTHING_KEPT, Checkpoints
from ..progress import QUIET, Progress
from .attempts import Attempts
from .exact_outputs import exact_outputs, worthwhile
from .kmeans import assign
from .linear_start import fit_linear_start, set_gain, start_at
from .objective import Objective
from .responses_fit import fit_responses
from .slots_fit import PublicContexts, SlotSettings, SlotTrainer, Watched, set_code_scale, train

GEOMETRY_NOISE = 0.08  # of the auxiliary sum whose codes give the cells of `response`
TRAINING, ANSWERS = "training", "training answers"  # stages
FIRST = 2 / 3  # of the time for training, where answers are trained as well


@dataclass(frozen=True, eq=False)
class SlotFit:
    """What the plans that share a slot decoder are fitted with.

    config: what a release promises; its epsilon is not looked at. training, watched: public contexts, and those that a training does not
    see. objective: the layers. fallback: the public mean. settings: sizes and schedule. seed: of every random choice. progress: the bar.
    kept: checkpoints.
    """

    config: DPXAttnConfig
    training: PublicContexts
    watched: Watched
    objective: Objective
    fallback: Fallback
    settings: SlotSettings
    seed: int = 0
    progress: Progress = QUIET
    kept: Checkpoints = NOTHING_KEPT


def sum_noise(config: DPXAttnConfig, epsilon: float) -> float:
    """Standard deviation of a learned sum's noise at epsilon, in unit balls."""
    probe = RowSum.from_tensors(torch.zeros(1), torch.ones(1, 1), torch.zeros(1), reach=1.0)
    return probe.prepare(epsilon, config.delta, neighboring=config.neighboring).sigma


def slot_plans(
    fit: SlotFit, sums: Sequence[float], answers: Sequence[float], attempts: Attempts
) -> tuple[list[AnchorPlan], SlotDecoder, int]:
    """Learned sums and responses with the shared slot decoder, and how many steps that took; the encoders of `response` are an auxiliary
    sum's.

    Args:
        fit: what they are fitted with.
        sums: epsilons of learned sums.
        answers: epsilons of responses.
        attempts: of release kinds: where answers fail, the sums stay.
    """
    slots, training = fit.settings, fit.training
    passes = slots.steps * slots.batch * min(slots.layers, len(fit.objective.layers)) / len(training)
    if not worthwhile(training, fit.objective, passes):
        return _fitted(fit, (training, fit.objective), sums, answers, attempts)
    started = time.monotonic()
    with exact_outputs(training, fit.objective, seed=fit.seed, progress=fit.progress) as aim:
        seconds = fit.watched.seconds
        if seconds is not None:
            left = max(0.3 * seconds, seconds - (time.monotonic() - started))
            fit = dataclasses.replace(fit, watched=dataclasses.replace(fit.watched, seconds=left))
        return _fitted(fit, aim, sums, answers, attempts)


def _fitted(
    fit: SlotFit,
    aim: tuple[PublicContexts, Objective],
    sums: Sequence[float],
    answers: Sequence[float],
    attempts: Attempts,
) -> tuple[list[AnchorPlan], SlotDecoder, int]:
    """`slot_plans`; aim: the contexts as a training reads them, and the objective of their outputs."""
    training, settings = fit.training, fit.settings
    generator = torch.Generator().manual_seed(fit.seed)
    auxiliary = len(sums)
    total = len(sums) + (1 if answers else 0) + len(answers)
    trainer = SlotTrainer(training, total, settings, generator)
    noise = {i: sum_noise(fit.config, e) for i, e in enumerate(sums)}
    if answers:
        noise[auxiliary] = GEOMETRY_NOISE

    def noised_sum(batch: PublicContexts, plan: int) -> torch.Tensor:
        code = (trainer.clipped(batch.units, plan) * batch.mask.unsqueeze(-1)).sum(1)
        return code + noise[plan] * torch.randn(code.shape, generator=generator)

    start = fit_linear_start(training, fit.objective, settings.code)
    if start is not None:
        scales: dict[int, float | None] = dict(noise)
        if answers and training.units.shape[1] == 1:
            # one unit is told by few cells; of several the answers add up, and small scores count for more
            scales[auxiliary] = None
        start_at(trainer, start, fit.fallback, scales)
    sample = training.sample(512)

    def settle(plan: int, codes: torch.Tensor) -> None:
        set_code_scale(trainer, plan, codes)
        if start is not None:
            set_gain(trainer, plan, start, sample, codes)

    for i in noise:
        with torch.no_grad():
            settle(i, noised_sum(sample, i))
    seconds = fit.watched.seconds
    first = seconds if not answers or seconds is None else seconds * FIRST
    steps = train(
        trainer,
        *aim,
        list(noise),
        noised_sum,
        settings,
        parameters=[p for p in trainer.parameters() if p.requires_grad],
        label=TRAINING,
        generator=generator,
        progress=fit.progress,
        kept=fit.kept,
        watched=dataclasses.replace(fit.watched, seconds=first),
    )
    center, reach = _public_box(training)

    def plan(
        index: int, encoder: int, epsilon: float, release: str, codes: torch.Tensor, noise: float
    ) -> AnchorPlan:
        head = trainer.head_of(index)
        # the map was trained around the trainer's centre: move it to the box's
        shift = (center - trainer.center) @ trainer.matrix_of(encoder).mT
        return AnchorPlan(
            epsilon=epsilon,
            release=release,
            center=center,
            reach=reach,
            matrix=trainer.matrix_of(encoder).detach().clone(),
            bias=(trainer.bias[encoder] + shift).detach().clone(),
            codes=codes,
            bound=1.0,
            share_plus=0.5,
            noise=noise,
            head=SlotHead(*(getattr(head, n).detach().clone() for n in SlotHead.TENSORS)),
            tilt=None,
            quality=NOT_JUDGED,
        )

    none = torch.zeros(0, 0, settings.code)
    plans = [plan(i, i, e, "sum", none, noise[i]) for i, e in enumerate(sums)]
    if answers:
        with attempts.of("response"):
            alphabets = fit_responses(trainer, training, auxiliary, answers, fit.seed)
            answered = _Answers(trainer, alphabets, auxiliary, generator)
            for i in alphabets:
                settle(i, answered(sample, i))
            train(
                trainer,
                *aim,
                list(alphabets),
                answered,
                # half of the steps: the decoder has been trained on codes without codebooks, and long training forgets unseen combinations
                dataclasses.replace(settings, steps=max(1, settings.steps // 2)),
                parameters=_answer_parameters(trainer, shared=not sums),
                label=ANSWERS,
                generator=generator,
                progress=fit.progress,
                kept=fit.kept,
                watched=dataclasses.replace(fit.watched, seconds=None if first is None else first / 2),
            )
            plans += [
                plan(i, auxiliary, answers[i - auxiliary - 1], "response", codes, response.truth)
                for i, (codes, response) in alphabets.items()
            ]
    shared = trainer.decoder()
    decoder = SlotDecoder(*(getattr(shared, n).detach().clone() for n in SlotDecoder.TENSORS))
    return plans, decoder, steps


@dataclass(frozen=True, eq=False)
class _Answers:
    """Simulated answers' codes, for a training: (contexts, plan) -> [B, K]."""

    trainer: SlotTrainer
    alphabets: dict[int, tuple[torch.Tensor, RandomizedResponse]]
    auxiliary: int
    generator: torch.Generator

    @torch.no_grad()
    def __call__(self, batch: PublicContexts, plan: int) -> torch.Tensor:
        stages, response = self.alphabets[plan]
        rest = self.trainer.clipped(batch.units, self.auxiliary).flatten(0, 1)
        answers = torch.zeros_like(rest)
        for codes in stages:
            cells = assign(rest, codes)[0]
            lie = torch.rand(cells.shape, generator=self.generator) >= response.truth
            other = torch.randint(1, len(codes), cells.shape, generator=self.generator)
            answers += codes[torch.where(lie, (cells + other) % len(codes), cells)]
            rest = rest - codes[cells]
        return (answers.view(*batch.mask.shape, -1) * batch.mask.unsqueeze(-1)).sum(1)


def _public_box(contexts: PublicContexts) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and reach [C] of public units: what lies further out is clamped."""
    sample = contexts.sample(2048)
    units = sample.units[sample.mask]
    center = units.mean(0)
    return center, 4.0 * (units - center).abs().amax(0).clamp_min(1e-6)


def _answer_parameters(trainer: SlotTrainer, *, shared: bool) -> list[torch.nn.Parameter]:
    """What the training of responses may move: their heads, and the shared decoder where no learned sum relies on it."""
    heads = [trainer.head, trainer.head_bias, trainer.second_bias, trainer.gain]
    decoder = [
        trainer.common_head,
        trainer.hidden,
        trainer.coefficients,
        trainer.directions,
        trainer.slots,
        trainer.weight_map,
        trainer.log_weights,
    ]
    return heads + decoder if shared else heads
