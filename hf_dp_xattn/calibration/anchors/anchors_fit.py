"""From public contexts to an `AnchorCalibration`: candidates for every epsilon, judged on contexts that nothing was fitted to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.plan import AnchorPlan, Decoders
from ...mechanisms.anchors.slots import SlotDecoder
from ...mechanisms.anchors.sources import AnchorHistogram
from ...privacy.units import NeighboringRelation
from ..checkpoints import NOTHING_KEPT, Checkpoints
from ..progress import QUIET, Progress
from ..public_data import PublicData
from .anchors_calibration import AnchorCalibration
from .attempts import Attempts
from .cells_fit import Codebook, fit_codebook, fit_tilt, histogram_plan
from .fallback_fit import fit_fallback
from .held_out import hold_out
from .judge import Judged, Jury
from .mixed_fit import Compared, means_or_members, with_mixed
from .objective import Objective
from .plan_choice import Guard
from .simulated import simulate
from .slot_plans import ANSWERS, FIRST, TRAINING, SlotFit, slot_plans
from .slot_schedule import MANY
from .slots_fit import PublicContexts, SlotSettings, Watched

__all__ = ["AnchorSettings", "candidates", "fit_anchors", "simulate"]

MINIMUM_CONTEXTS = 64
_MEAN = "public mean"  # stages
_COMPARING, _CHOOSING = "comparing", "choosing"
_COUNTED = ("histogram", "mixed")  # which need one codebook
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
    fallback = fit_fallback(training, objective, seed=settings.seed, progress=settings.progress)
    attempts = Attempts(kinds)
    plans: list[AnchorPlan] = []
    slots: SlotDecoder | None = None
    book: Codebook | None = None
    if {"histogram", "mixed"} & set(kinds):  # first: it is the one that may fail for want of rows
        with attempts.of(*_COUNTED):
            book = (
                _rows_book(training, objective, settings)
                if documents is None
                else documents.codebook(contexts, training, objective, settings.anchors, settings.seed)
            )
            counted = [histogram_plan(config, book, e, settings.seed) for e in epsilons]
            if documents is None and training.units.shape[1] >= _LONG:
                book = means_or_members(config, book, counted[-1], validation, objective)
            plans += counted
    steps = 0
    if "sum" in kinds or "response" in kinds:
        sums, answers = (epsilons if kind in kinds else [] for kind in ("sum", "response"))
        fit = SlotFit(
            config,
            training,
            Watched(held.stopping, settings.seconds),
            objective,
            fallback,
            settings.slots,
            settings.seed,
            settings.progress,
            settings.kept,
        )
        with attempts.of("sum", "response"):
            fitted, slots, steps = slot_plans(fit, sums, answers, attempts)
            plans += fitted
    decoders = Decoders(slots, None if book is None else book.decoder, None, fallback)
    jury = Jury(config, held, objective, fallback)
    judged: list[Judged] = []
    for plan in settings.progress.track(plans, _COMPARING):
        with attempts.of(*(_COUNTED if plan.release in _COUNTED else (plan.release,))):
            judged.append(jury.judge(plan, decoders))
    judged = [j for j in judged if j.plan.release not in attempts.failed]
    everyone = torch.ones(len(validation), dtype=torch.bool)

    def best_at(epsilon: float) -> Judged:
        return min(at(epsilon), key=lambda j: jury.ratio(j.measured, everyone))

    def at(epsilon: float) -> list[Judged]:
        return [j for j in judged if j.plan.epsilon == epsilon]

    plain = [j.plan for j in judged if j.plan.release == "histogram"]  # one for each epsilon, or none
    if book is not None and documents is None:
        for each in plain:
            # a tilt takes half a minute and gains some ten per cent: it is fitted where that could decide
            if each.quality.fvu < _TILTED * best_at(each.epsilon).plan.quality.fvu:
                judged.append(jury.judge(_with_tilt(config, book, each, settings), decoders))
    compared: list[Compared] = []
    tried = [at(e) for e in epsilons]
    if book is not None and plain and "mixed" in attempts:
        leading = [best_at(e) for e in epsilons]
        with attempts.of("mixed"):
            chosen, move, compared = with_mixed(jury, book, plain, leading, seed=settings.seed)
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
        settings=_settings(jury, settings, attempts, book, judged, compared, steps),
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
        most = math.inf if seconds is None else seconds * (FIRST if answers else 1.0)
        bar.expect(TRAINING, settings.slots.steps, 0.1, most=most, decides=True)
        if answers:
            bar.expect(ANSWERS, max(1, settings.slots.steps // 2), 0.1, most=most / 2)
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
    attempts: Attempts,
    book: Codebook | None,
    judged: Sequence[Judged],
    compared: Sequence[Compared],
    steps: int,
) -> dict[str, Any]:
    return {
        "delta": jury.config.delta,
        "releases": attempts.left,
        "left out": attempts.failed,
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
