"""From public contexts to an `AnchorCalibration`: candidates for every epsilon, judged on contexts that nothing was fitted to."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.plan import NOT_JUDGED, AnchorPlan, Decoders
from ...mechanisms.anchors.row_sum import RowSum
from ...mechanisms.anchors.slots import SlotDecoder, SlotHead
from ...mechanisms.anchors.sources import AnchorHistogram
from ...privacy.response import RandomizedResponse
from ...privacy.units import NeighboringRelation
from ..checkpoints import NOTHING_KEPT, Checkpoints
from ..progress import QUIET, Progress
from ..public_data import PublicData
from .anchors_calibration import AnchorCalibration
from .cells_fit import Codebook, fit_codebook, fit_tilt, histogram_plan
from .exact_outputs import exact_outputs, worthwhile
from .fallback_fit import fit_fallback
from .held_out import hold_out
from .judge import Judged, Jury
from .kmeans import assign
from .mixed_fit import Compared, means_or_members, with_mixed
from .objective import Objective
from .plan_choice import Guard
from .responses_fit import fit_responses
from .simulated import simulate
from .slot_schedule import MANY
from .slots_fit import (
    PublicContexts,
    SlotSettings,
    SlotTrainer,
    Watched,
    set_code_scale,
    train,
)

__all__ = ["AnchorSettings", "candidates", "fit_anchors", "simulate", "sum_noise"]

MINIMUM_CONTEXTS = 64
GEOMETRY_NOISE = 0.08  # of the auxiliary sum whose codes give the cells of `response`
TRAINING, _ANSWERS, _MEAN = "training", "training answers", "public mean"  # stages
_COMPARING, _CHOOSING = "comparing", "choosing"
_FIRST = 2 / 3  # of the time for training, where answers are trained as well
_TILTED = 1.25  # a tilt is tried where the plain histogram's FVU is no more times the best
_TILT_TIME = 0.5  # of the training's time, for all tilts
_LONG = 256  # rows of a context from which single public rows may stand for a cell


@dataclass(frozen=True)
class AnchorSettings:
    """How a calibration is fitted.

    epsilons: one plan for each. releases: candidates ("mixed" brings "histogram" along). anchors: cells of the histogram's codebook (of
    documents `CELLS` at most); by default as many as the public rows make distinct. rows: cells that stay unmerged when a histogram is
    decoded; by default 48, or a quarter of a long context's rows. validation: public contexts that are held out, at most. seconds: for
    the training of decoders, at most. progress: the bar of the calibration. kept: its checkpoints.
    """

    epsilons: tuple[float, ...] = (8.0,)
    releases: tuple[str, ...] = ("sum", "response", "histogram", "mixed")
    anchors: int | None = None
    rows: int | None = None
    tilt_steps: int = 400
    validation: int = 400
    slots: SlotSettings = field(default_factory=SlotSettings)
    seed: int = 0
    progress: Progress = QUIET
    kept: Checkpoints = NOTHING_KEPT
    seconds: float | None = None


def candidates(config: DPXAttnConfig, settings: AnchorSettings, documents: int = 0) -> tuple[str, ...]:
    """The releases that can give this unit and relation ("mixed" asks for long contexts of one length besides: `fit_anchors`).

    Args:
        config: unit and relation.
        settings: the releases that are asked for.
        documents: how many a context has, where units are documents that a histogram may count.

    Raises:
        ConfigError: none of those asked for can.
    """
    possible = {"sum"}
    if config.neighboring == NeighboringRelation.REPLACE_ONE.value:
        possible.add("response")
    if config.unit == "row":
        possible.add("histogram")
        if config.neighboring == NeighboringRelation.REPLACE_ONE.value:
            possible.add("mixed")
        # one answer for each of many rows: always far behind a sum or a histogram
        possible.discard("response")
    if documents:
        possible.add("histogram")
        if documents >= MANY and "sum" in settings.releases:
            possible.discard("response")
    chosen = tuple(r for r in settings.releases if r in possible)
    if not chosen:
        raise ConfigError(
            f"None of releases={settings.releases} can give unit={config.unit!r}, neighboring={config.neighboring!r}; possible: "
            f"{', '.join(sorted(possible))}."
        )
    return chosen


def fit_anchors(config: DPXAttnConfig, data: PublicData, settings: AnchorSettings) -> AnchorCalibration:
    """Fits every candidate for every epsilon and keeps the best one on held-out public contexts: by FVU, or by the divergence of replies
    where the host's replies count.

    Args:
        config: what a release promises; its epsilon is not looked at.
        data: contexts, host, and documents where there are some.
        settings: what is tried, and for how long.

    Raises:
        ConfigError: too few contexts or distinct rows, or no possible release.
    """
    contexts, objective, documents = data.contexts, data.objective, data.documents
    assert contexts is not None and data.host is not None
    kinds = candidates(config, settings, 0 if documents is None else contexts.units.shape[1])
    if len(contexts) < MINIMUM_CONTEXTS:
        raise ConfigError(
            f"A calibration of anchors needs at least {MINIMUM_CONTEXTS} public contexts, got {len(contexts)}; thousands do better."
        )
    held = hold_out(contexts, settings.validation, settings.seed)
    training, validation = held.training, held.validation
    epsilons = sorted(settings.epsilons)
    kinds = _for_length(kinds, contexts)
    _announce(settings, kinds)
    plans: list[AnchorPlan] = []
    slots: SlotDecoder | None = None
    book: Codebook | None = None
    if {"histogram", "mixed"} & set(kinds):  # first: it is the one that may fail for want of rows
        book = (
            _rows_book(training, objective, settings)
            if documents is None
            else documents.codebook(contexts, training, objective, settings.anchors, settings.seed)
        )
        plans += [histogram_plan(config, book, e, settings.seed) for e in epsilons]
        if documents is None and training.units.shape[1] >= _LONG:
            book = means_or_members(config, book, plans[-1], validation, objective)
    steps = 0
    if "sum" in kinds or "response" in kinds:
        watched = Watched(held.stopping, settings.seconds)
        fitted, slots, steps = _slot_plans(config, training, watched, objective, kinds, epsilons, settings)
        plans += fitted
    fallback = fit_fallback(training, objective, seed=settings.seed, progress=settings.progress)
    decoders = Decoders(slots, None if book is None else book.decoder, None, fallback)
    jury = Jury(config, held, objective, fallback)
    judged = [jury.judge(p, decoders) for p in settings.progress.track(plans, _COMPARING)]
    everyone = torch.ones(len(validation), dtype=torch.bool)

    def best_at(epsilon: float) -> Judged:
        return min(at(epsilon), key=lambda j: jury.ratio(j.measured, everyone))

    def at(epsilon: float) -> list[Judged]:
        return [j for j in judged if j.plan.epsilon == epsilon]

    if book is not None and documents is None:
        for plain in [j.plan for j in judged if j.plan.release == "histogram"]:
            # a tilt takes half a minute and gains some ten per cent: it is fitted where that could decide
            if plain.quality.fvu < _TILTED * best_at(plain.epsilon).plan.quality.fvu:
                judged.append(jury.judge(_with_tilt(config, book, plain, settings), decoders))
    compared: list[Compared] = []
    tried = [at(e) for e in epsilons]
    if book is not None and "mixed" in kinds:
        counted = [p for p in plans if p.release == "histogram"]  # one for each epsilon, without a tilt
        leading = [best_at(e) for e in epsilons]
        chosen, move, compared = with_mixed(jury, book, counted, leading, seed=settings.seed)
        decoders = dataclasses.replace(decoders, move=move)
        tried = [
            [new] if new is not old else judged_plans
            for new, old, judged_plans in zip(chosen, leading, tried, strict=True)
        ]
    guard = Guard(jury, documents)
    best = [
        guard.choose(judged_plans, decoders) for judged_plans in settings.progress.track(tried, _CHOOSING)
    ]
    used = {p.release for p in best}
    return AnchorCalibration(
        unit=config.unit,
        neighboring=config.neighboring,
        grouping=data.grouping,
        channels=contexts.whole.shape[-1],
        contexts=len(contexts),
        units=contexts.mask.shape[1],
        settings=_settings(jury, settings, kinds, book, judged, compared, steps),
        host=data.host,
        plans=tuple(best),
        decoders=Decoders(
            slots if used & {"sum", "response"} else None,
            decoders.cells if used & {"histogram", "mixed"} else None,
            decoders.move if "mixed" in used else None,
            fallback,
        ),
    ).rounded()


def _announce(settings: AnchorSettings, kinds: Sequence[str]) -> None:
    """What takes long, before it begins: the guesses stand until a step of each was timed."""
    bar, seconds = settings.progress, settings.seconds
    answers = "response" in kinds
    if answers or "sum" in kinds:
        most = math.inf if seconds is None else seconds * (_FIRST if answers else 1.0)
        bar.expect(TRAINING, settings.slots.steps, 0.1, most=most, decides=True)
        if answers:
            bar.expect(_ANSWERS, max(1, settings.slots.steps // 2), 0.1, most=most / 2)
    bar.expect(_MEAN, 200, 0.01)
    bar.expect(_COMPARING, len(settings.epsilons) * len(kinds), 1.0)
    bar.expect(_CHOOSING, len(settings.epsilons), 4.0)


def _rows_book(training: PublicContexts, objective: Objective, settings: AnchorSettings) -> Codebook:
    served = max(48, min(2048, training.units.shape[1] // 4)) if settings.rows is None else settings.rows
    return fit_codebook(
        training.units,
        objective,
        settings.anchors,
        served=served,
        seed=settings.seed,
        progress=settings.progress,
    )


def _for_length(kinds: tuple[str, ...], contexts: PublicContexts) -> tuple[str, ...]:
    """Without "mixed" where contexts are short, so that a mean drowns in noise, or of several lengths.

    Raises:
        ConfigError: nothing else was asked for.
    """
    if contexts.units.shape[1] >= _LONG and contexts.outputs is None and bool(contexts.mask.all()):
        return kinds
    rest = tuple(k for k in kinds if k != "mixed")
    if not rest:
        raise ConfigError(
            f"'mixed' is for public contexts of at least {_LONG} rows, all of one length; these have {contexts.units.shape[1]} or "
            "fewer. Use releases=('sum', 'histogram')."
        )
    return rest


def _settings(
    jury: Jury,
    settings: AnchorSettings,
    kinds: Sequence[str],
    book: Codebook | None,
    judged: Sequence[Judged],
    compared: Sequence[Compared],
    steps: int,
) -> dict[str, Any]:
    return {
        "delta": jury.config.delta,
        "releases": list(kinds),
        "anchors": 0 if book is None else len(book.codes),
        "steps": steps,
        "slots": settings.slots.slots,
        "code": settings.slots.code,
        "seed": settings.seed,
        "candidates": [_tried(j) for j in judged],
        "nothing": {k: round(level, 5) for k, level in jury.levels.items()},
        "mixed": [{k: round(v, 4) for k, v in dataclasses.asdict(c).items()} for c in compared],
    }


def _tried(judged: Judged) -> dict[str, Any]:
    plan = judged.plan
    entry = {"epsilon": plan.epsilon, "release": plan.release, "fvu": round(plan.quality.fvu, 4)}
    return entry if judged.divergence is None else {**entry, "divergence": round(judged.divergence, 5)}


def _public_box(contexts: PublicContexts) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and reach [C] of public units: what lies further out is clamped."""
    sample = contexts.sample(2048)
    units = sample.units[sample.mask]
    center = units.mean(0)
    return center, 4.0 * (units - center).abs().amax(0).clamp_min(1e-6)


def _with_tilt(
    config: DPXAttnConfig, book: Codebook, plan: AnchorPlan, settings: AnchorSettings
) -> AnchorPlan:
    release = AnchorHistogram.of(config.replace(epsilon=plan.epsilon), plan, Decoders(None, book.decoder))
    tilt = fit_tilt(
        book,
        release.rates,
        steps=settings.tilt_steps,
        seed=settings.seed,
        progress=settings.progress,
        seconds=None if settings.seconds is None else settings.seconds * _TILT_TIME / len(settings.epsilons),
    )
    return dataclasses.replace(plan, tilt=tilt)


def sum_noise(config: DPXAttnConfig, epsilon: float) -> float:
    """Standard deviation of a learned sum's noise at epsilon, in unit balls."""
    probe = RowSum.from_tensors(torch.zeros(1), torch.ones(1, 1), torch.zeros(1), reach=1.0)
    return probe.prepare(epsilon, config.delta, neighboring=config.neighboring).sigma


def _slot_plans(
    config: DPXAttnConfig,
    training: PublicContexts,
    watched: Watched,
    objective: Objective,
    kinds: Sequence[str],
    epsilons: Sequence[float],
    settings: AnchorSettings,
) -> tuple[list[AnchorPlan], SlotDecoder, int]:
    """Learned sums and responses with the shared slot decoder, and how many steps that took; the encoders of `response` are an auxiliary
    sum's."""
    slots = settings.slots
    passes = slots.steps * slots.batch * min(slots.layers, len(objective.layers)) / len(training)
    if not worthwhile(training, objective, passes):
        return _fit_slots(config, training, (training, objective), watched, kinds, epsilons, settings)
    started = time.monotonic()
    with exact_outputs(training, objective, seed=settings.seed, progress=settings.progress) as aim:
        if watched.seconds is not None:
            left = watched.seconds - (time.monotonic() - started)
            watched = dataclasses.replace(watched, seconds=max(0.3 * watched.seconds, left))
        return _fit_slots(config, training, aim, watched, kinds, epsilons, settings)


def _fit_slots(
    config: DPXAttnConfig,
    training: PublicContexts,
    aim: tuple[PublicContexts, Objective],
    watched: Watched,
    kinds: Sequence[str],
    epsilons: Sequence[float],
    settings: AnchorSettings,
) -> tuple[list[AnchorPlan], SlotDecoder, int]:
    """`_slot_plans`; aim: the contexts as a training reads them, and the objective of their outputs."""
    generator = torch.Generator().manual_seed(settings.seed)
    sums = list(epsilons) if "sum" in kinds else []
    answers = list(epsilons) if "response" in kinds else []
    auxiliary = len(sums)
    total = len(sums) + (1 if answers else 0) + len(answers)
    trainer = SlotTrainer(training, total, settings.slots, generator)
    noise = {i: sum_noise(config, e) for i, e in enumerate(sums)}
    if answers:
        noise[auxiliary] = GEOMETRY_NOISE

    def noised_sum(batch: PublicContexts, plan: int) -> torch.Tensor:
        code = (trainer.clipped(batch.units, plan) * batch.mask.unsqueeze(-1)).sum(1)
        return code + noise[plan] * torch.randn(code.shape, generator=generator)

    sample = training.sample(512)
    for i in noise:
        with torch.no_grad():
            set_code_scale(trainer, i, noised_sum(sample, i))
    trained = [p for p in trainer.parameters() if p.requires_grad]
    first = watched.seconds if not answers or watched.seconds is None else watched.seconds * _FIRST
    steps = train(
        trainer,
        *aim,
        list(noise),
        noised_sum,
        settings.slots,
        parameters=trained,
        label=TRAINING,
        generator=generator,
        progress=settings.progress,
        kept=settings.kept,
        watched=dataclasses.replace(watched, seconds=first),
    )
    alphabets: dict[int, tuple[torch.Tensor, RandomizedResponse]] = {}
    if answers:
        alphabets = fit_responses(trainer, training, auxiliary, answers, settings.seed)

        def answered(batch: PublicContexts, plan: int) -> torch.Tensor:
            stages, response = alphabets[plan]
            with torch.no_grad():
                rest = trainer.clipped(batch.units, auxiliary).flatten(0, 1)
                answers = torch.zeros_like(rest)
                for codes in stages:
                    cells = assign(rest, codes)[0]
                    lie = torch.rand(cells.shape, generator=generator) >= response.truth
                    other = torch.randint(1, len(codes), cells.shape, generator=generator)
                    answers += codes[torch.where(lie, (cells + other) % len(codes), cells)]
                    rest = rest - codes[cells]
                return (answers.view(*batch.mask.shape, -1) * batch.mask.unsqueeze(-1)).sum(1)

        for i in alphabets:
            with torch.no_grad():
                set_code_scale(trainer, i, answered(sample, i))
        train(
            trainer,
            *aim,
            list(alphabets),
            answered,
            # half of the steps: the decoder has been trained on codes without codebooks, and long training forgets unseen combinations
            dataclasses.replace(settings.slots, steps=max(1, settings.slots.steps // 2)),
            parameters=_response_parameters(trainer, shared=not sums),
            label=_ANSWERS,
            generator=generator,
            progress=settings.progress,
            kept=settings.kept,
            watched=watched if first is None else dataclasses.replace(watched, seconds=first / 2),
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

    none = torch.zeros(0, 0, settings.slots.code)
    plans = [plan(i, i, e, "sum", none, noise[i]) for i, e in enumerate(sums)]
    for i, (codes, response) in alphabets.items():
        plans.append(plan(i, auxiliary, answers[i - auxiliary - 1], "response", codes, response.truth))
    shared = trainer.decoder()
    decoder = SlotDecoder(*(getattr(shared, n).detach().clone() for n in SlotDecoder.TENSORS))
    return plans, decoder, steps


def _response_parameters(trainer: SlotTrainer, *, shared: bool) -> list[torch.nn.Parameter]:
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
