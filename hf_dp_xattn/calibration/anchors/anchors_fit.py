"""From public contexts to an `AnchorCalibration`: candidates for every epsilon, judged on contexts that nothing was fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.anchors import prepare_source
from ...mechanisms.anchors.plan import NOT_JUDGED, AnchorPlan, Decoders
from ...mechanisms.anchors.row_sum import RowSum
from ...mechanisms.anchors.slots import SlotDecoder, SlotHead
from ...mechanisms.anchors.sources import HistogramSource
from ...privacy.response import RandomizedResponse
from ...privacy.units import NeighboringRelation
from ..public_data import PublicData
from .anchors_calibration import AnchorCalibration
from .cells_fit import Codebook, fit_codebook, fit_tilt, histogram_plan
from .judge import Judged, judge, simulate
from .kmeans import assign, kmeans
from .mixed_fit import Compared, means_or_members, with_mixed
from .objective import Objective
from .slot_schedule import MANY
from .slots_fit import (
    PublicContexts,
    SlotSettings,
    SlotTrainer,
    fit_blind_head,
    set_code_scale,
    train,
)

__all__ = ["AnchorSettings", "candidates", "fit_anchors", "simulate", "sum_noise"]

MINIMUM_CONTEXTS = 64
GEOMETRY_NOISE = 0.08  # of the auxiliary sum whose codes give the cells of `response`
ALPHABETS = (4, 8, 16, 32, 64, 128, 256, 1024, 4096)
MAX_CODEBOOKS = 6
_LONG = 256  # rows of a context from which single public rows may stand for a cell
_CODEBOOK_UNITS = 32_768


@dataclass(frozen=True)
class AnchorSettings:
    """How a calibration is fitted.

    epsilons: one plan for each. releases: candidates ("mixed" brings "histogram" along). anchors: cells of the histogram's codebook (of
    documents `CELLS` at most). rows: cells that stay unmerged when a histogram is decoded; by default 48, or a quarter of a long context's
    rows. validation: public contexts that are held out.
    """

    epsilons: tuple[float, ...] = (8.0,)
    releases: tuple[str, ...] = ("sum", "response", "histogram", "mixed")
    anchors: int = 4096
    rows: int | None = None
    tilt_steps: int = 400
    validation: int = 400
    slots: SlotSettings = field(default_factory=SlotSettings)
    seed: int = 0
    progress: bool = True


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
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(settings.seed))
    held = min(settings.validation, len(contexts) // 6)
    training, validation = contexts.part(order[held:]), contexts.part(order[:held])
    epsilons = sorted(settings.epsilons)
    kinds = _for_length(kinds, contexts)
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
    if "sum" in kinds or "response" in kinds:
        fitted, slots = _slot_plans(config, training, objective, kinds, epsilons, settings)
        plans += fitted
    decoders = Decoders(slots, None if book is None else book.decoder)
    judged = [
        judge(p, config, decoders, validation, objective)
        for p in tqdm(plans, desc="validation", disable=not settings.progress, leave=False)
    ]

    def best_at(epsilon: float) -> AnchorPlan:
        return min((j for j in judged if j.plan.epsilon == epsilon), key=lambda j: j.score).plan

    if book is not None and documents is None:
        for plain in [j.plan for j in judged if j.plan.release == "histogram"]:
            # a tilt takes a minute and gains some ten per cent: it is fitted where that could decide
            if plain.quality.fvu < 1.5 * best_at(plain.epsilon).quality.fvu:
                tilted = _with_tilt(config, book, plain, settings)
                judged.append(judge(tilted, config, decoders, validation, objective))
    best = [best_at(e) for e in epsilons]
    compared: list[Compared] = []
    if book is not None and "mixed" in kinds:
        counted = [p for p in plans if p.release == "histogram"]  # one for each epsilon, without a tilt
        best, move, compared = with_mixed(
            config, book, counted, best, training, validation, objective, seed=settings.seed
        )
        decoders = dataclasses.replace(decoders, move=move)
    used = {p.release for p in best}
    calibration = AnchorCalibration(
        unit=config.unit,
        neighboring=config.neighboring,
        grouping=data.grouping,
        channels=contexts.whole.shape[-1],
        contexts=len(contexts),
        units=contexts.mask.shape[1],
        settings=_settings(config, settings, kinds, book, judged, compared),
        host=data.host,
        plans=tuple(best),
        decoders=Decoders(
            slots if used & {"sum", "response"} else None,
            decoders.cells if used & {"histogram", "mixed"} else None,
            decoders.move if "mixed" in used else None,
        ),
    ).rounded()
    calibration.verify()
    return calibration


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
    config: DPXAttnConfig,
    settings: AnchorSettings,
    kinds: Sequence[str],
    book: Codebook | None,
    judged: Sequence[Judged],
    compared: Sequence[Compared],
) -> dict[str, Any]:
    return {
        "delta": config.delta,
        "releases": list(kinds),
        "anchors": 0 if book is None else len(book.codes),
        "steps": settings.slots.steps,
        "slots": settings.slots.slots,
        "code": settings.slots.code,
        "seed": settings.seed,
        "candidates": [_tried(j) for j in judged],
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
    source = prepare_source(plan, config.replace(epsilon=plan.epsilon), Decoders(None, book.decoder))
    assert isinstance(source, HistogramSource)
    tilt = fit_tilt(
        book, source.rates, steps=settings.tilt_steps, seed=settings.seed, progress=settings.progress
    )
    return dataclasses.replace(plan, tilt=tilt)


def sum_noise(config: DPXAttnConfig, epsilon: float) -> float:
    """Standard deviation of a learned sum's noise at epsilon, in unit balls."""
    probe = RowSum.from_tensors(torch.zeros(1), torch.ones(1, 1), torch.zeros(1), reach=1.0)
    return probe.prepare(epsilon, config.delta, unit="row", neighboring=config.neighboring).sigma


def _slot_plans(
    config: DPXAttnConfig,
    training: PublicContexts,
    objective: Objective,
    kinds: Sequence[str],
    epsilons: Sequence[float],
    settings: AnchorSettings,
) -> tuple[list[AnchorPlan], SlotDecoder]:
    """Learned sums and responses with the shared slot decoder; the encoders of `response` are an auxiliary sum's."""
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
    train(
        trainer,
        training,
        objective,
        list(noise),
        noised_sum,
        settings.slots,
        parameters=trained,
        label="decoder",
        generator=generator,
        progress=settings.progress,
    )
    alphabets: dict[int, tuple[torch.Tensor, RandomizedResponse]] = {}
    if answers:
        alphabets = _fit_responses(trainer, training, auxiliary, answers, settings, generator)

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
            training,
            objective,
            list(alphabets),
            answered,
            # half of the steps: the decoder has been trained on codes without codebooks, and long training forgets unseen combinations
            dataclasses.replace(settings.slots, steps=max(1, settings.slots.steps // 2)),
            parameters=_response_parameters(trainer, shared=not sums),
            label="responses",
            generator=generator,
            progress=settings.progress,
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
    # what a small epsilon falls back to where looking at the code makes it worse
    blind = fit_blind_head(decoder, training, objective, settings.slots, progress=settings.progress)
    return plans + [dataclasses.replace(p, head=blind) for p in plans], decoder


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


@torch.no_grad()
def _fit_responses(
    trainer: SlotTrainer,
    training: PublicContexts,
    auxiliary: int,
    epsilons: Sequence[float],
    settings: AnchorSettings,
    generator: torch.Generator,
) -> dict[int, tuple[torch.Tensor, RandomizedResponse]]:
    """For each epsilon the alphabet whose answers leave the least expected squared error of a unit's code."""
    flat = torch.cat(
        [
            trainer.clipped(part.units.float(), auxiliary)[part.mask]
            for part in (training.part(i) for i in torch.arange(len(training)).split(512))
        ]
    )
    generator = torch.Generator().manual_seed(settings.seed)
    flat = flat[torch.randperm(len(flat), generator=generator)[:_CODEBOOK_UNITS]]
    seen = _split_by_likeness(flat, settings.seed)
    stacks = {}
    for size in ALPHABETS:
        stages = _residual_codebooks(flat[seen], size, settings.seed)
        if stages:
            stacks[size] = stages
    if not stacks:
        raise ConfigError(f"Too few public units ({len(flat)}) for randomised response; give more contexts.")
    result = {}
    for offset, epsilon in enumerate(epsilons):
        best: tuple[float, int, int] | None = None
        for size, stages in stacks.items():
            for count in range(1, len(stages) + 1):
                response = RandomizedResponse.of(epsilon / count, size)
                # units like the public ones count as much as units unlike all that the codebooks were fitted to
                error = sum(_left_over(part, stages[:count], response) for part in (flat[seen], flat[~seen]))
                if best is None or error < best[0]:
                    best = (error, size, count)
        assert best is not None
        _, size, count = best
        codes = [codes for codes, _ in _residual_codebooks(flat, size, settings.seed, count)]
        result[auxiliary + 1 + offset] = (torch.stack(codes), RandomizedResponse.of(epsilon / count, size))
    return result


def _split_by_likeness(units: torch.Tensor, seed: int) -> torch.Tensor:
    """bool [N]: all units but those of every eighth small cluster, so that what is held out is unlike what is seen: codebooks must
    serve new combinations of known parts too."""
    clusters = min(400, len(torch.unique(units, dim=0)) // 4)
    centers = _centers(units, clusters, seed) if clusters >= 8 else None
    return (torch.arange(len(units)) if centers is None else assign(units, centers)[0]) % 8 > 0


def _centers(points: torch.Tensor, size: int, seed: int) -> torch.Tensor | None:
    """k-means, or None where the points are too few or too alike for so many cells. A phrase may well have a cell of its own, as long
    as public contexts repeat it."""
    if size * 4 > len(points) or size * 1.5 > len(torch.unique(points, dim=0)):
        return None
    try:
        return kmeans(points, size, seed=seed, per_cell=1)
    except ConfigError:  # distinct by rounding only
        return None


def _residual_codebooks(
    flat: torch.Tensor, size: int, seed: int, count: int = MAX_CODEBOOKS
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(codes [m, K], share of the units in each cell [m]) of codebooks that each quantise what those before left over."""
    stages: list[tuple[torch.Tensor, torch.Tensor]] = []
    rest = flat
    for _ in range(count):
        codes = _centers(rest, size, seed)
        if codes is None:
            break
        index = assign(rest, codes)[0]
        stages.append((codes, torch.bincount(index, minlength=size).float() / len(index)))
        rest = rest - codes[index]
    return stages


def _left_over(
    units: torch.Tensor, stages: Sequence[tuple[torch.Tensor, torch.Tensor]], response: RandomizedResponse
) -> float:
    """Mean squared error of the posterior mean code of these units given the answers, stage errors being independent."""
    rest, error = units, 0.0
    for codes, share in stages:
        false = (1 - response.truth) / (len(codes) - 1)
        told = share * response.truth + (1 - share) * false  # P(answer = s)
        belief = (
            share * (response.truth - false) / told.clamp_min(1e-30)
        )  # beyond the prior, what answer s says for cell s
        mean = share @ codes
        guess = mean + belief.unsqueeze(1) * (codes - mean)  # posterior mean after each answer
        index = assign(rest, codes)[0]
        # the answer is the truth, or any other cell alike: error of this stage's guess around the true cell's code
        square = (
            guess.square().sum(-1) - 2 * codes @ guess.mT + codes.square().sum(-1, keepdim=True)
        ).clamp_min(0)
        own = square.diagonal()
        per_cell = response.truth * own + false * (square.sum(1) - own)
        error += float(per_cell[index].mean())
        rest = rest - codes[index]
    return error + float(rest.square().sum(-1).mean())
