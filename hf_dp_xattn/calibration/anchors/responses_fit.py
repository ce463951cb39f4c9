"""Alphabets of `response`: codebooks that each quantise what those before left over, as many and as large as an epsilon can tell apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...errors import ConfigError
from ...privacy.response import RandomizedResponse
from .kmeans import assign, kmeans
from .slots_fit import PublicContexts, SlotTrainer

ALPHABETS = (4, 8, 16, 32, 64, 128, 256, 1024, 4096)
MAX_CODEBOOKS = 6
_CODEBOOK_UNITS = 32_768


@torch.no_grad()
def fit_responses(
    trainer: SlotTrainer, training: PublicContexts, auxiliary: int, epsilons: Sequence[float], seed: int
) -> dict[int, tuple[torch.Tensor, RandomizedResponse]]:
    """For each epsilon the alphabet whose answers leave the least expected squared error of a unit's code, by its plan's number.

    Args:
        trainer: its auxiliary sum's codes are what is quantised.
        training: public contexts.
        auxiliary: the number of that sum.
        epsilons: whose plans come next.
        seed: of the codebooks.

    Raises:
        ConfigError: too few public units.
    """
    flat = torch.cat(
        [
            trainer.clipped(part.units.float(), auxiliary)[part.mask]
            for part in (training.part(i) for i in torch.arange(len(training)).split(512))
        ]
    )
    generator = torch.Generator().manual_seed(seed)
    flat = flat[torch.randperm(len(flat), generator=generator)[:_CODEBOOK_UNITS]]
    seen = _split_by_likeness(flat, seed)
    stacks = {}
    for size in ALPHABETS:
        stages = _residual_codebooks(flat[seen], size, seed)
        if stages:
            stacks[size] = stages
    if not stacks:
        least = min(ALPHABETS)
        raise ConfigError(
            f"Answers for each unit need {4 * least} public units, {math.ceil(1.5 * least)} of them different, and there are {len(flat)}, "
            f"{len(torch.unique(flat, dim=0))} of them different: give more contexts, or releases=('sum',)."
        )
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
        codes = [codes for codes, _ in _residual_codebooks(flat, size, seed, count)]
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
        answered = share * response.truth + (1 - share) * false  # P(answer = s)
        belief = (
            share * (response.truth - false) / answered.clamp_min(1e-30)
        )  # beyond the prior, what answer s says for cell s
        mean = share @ codes
        guess = mean + belief.unsqueeze(1) * (codes - mean)  # posterior mean after each answer
        index = assign(rest, codes)[0]
        # the answer is the truth, or any other cell alike: error of this stage's guess around the true cell's code
        square = (
            guess.square().sum(-1) - 2 * codes @ guess.mT + codes.square().sum(-1, keepdim=True)
        ).clamp_min(0)
        diagonal = square.diagonal()
        per_cell = response.truth * diagonal + false * (square.sum(1) - diagonal)
        error += float(per_cell[index].mean())
        rest = rest - codes[index]
    return error + float(rest.square().sum(-1).mean())
