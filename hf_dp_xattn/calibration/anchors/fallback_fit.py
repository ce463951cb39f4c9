r"""Rows that stand for the public mean: with them a layer's output is, for every query, the mean of its outputs over public contexts.

No release is read, so nothing else is to be learned than R rows and their log weights. The mean outputs of some public queries are computed
once; the rows are moved until theirs are as close as they get, and the best rows that were met are kept.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ...mechanisms.anchors.fallback import Fallback
from ..progress import QUIET, Progress
from .objective import Objective
from .slots_fit import PublicContexts

ROWS = 32
_CONTEXTS = 256
_QUERIES = 64
_RATE = 3e-2


def _first_rows(contexts: PublicContexts, public: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [R, C] that the fit starts from, one for each stretch of places, and the deviation [C] of rows."""
    sample = contexts.sample(_CONTEXTS).whole
    there = (sample != 0).any(-1, keepdim=True)
    count = there.sum(0)
    mean = (sample * there).sum(0) / count.clamp_min(1)
    spread = sample[there.squeeze(-1)].std(0).clamp_min(1e-6)
    places = (count.squeeze(-1) > 0).nonzero().squeeze(1)
    places = places[public:] if len(places) > public else places
    chosen = places[torch.linspace(0, len(places) - 1, min(ROWS, len(places))).round().long()]
    return mean[chosen], spread


def fit_fallback(
    contexts: PublicContexts,
    objective: Objective,
    *,
    steps: int = 200,
    seed: int = 0,
    progress: Progress = QUIET,
) -> Fallback:
    """The public mean of these contexts as rows.

    Args:
        contexts: public ones.
        objective: the layers.
        steps: of the fit.
        seed: of the choice of queries.
        progress: the bar of the calibration.
    """
    generator = torch.Generator().manual_seed(seed)
    some = contexts.part(torch.arange(min(_CONTEXTS, len(contexts))))
    wanted = []
    with torch.no_grad():
        for i, layer in enumerate(objective.layers):
            pick = torch.randperm(layer.queries.shape[1], generator=generator)[:_QUERIES]
            exact = [
                layer.attend(part.whole.float(), layer.queries[:, pick])
                if part.outputs is None
                else part.outputs[i][:, :, pick].float()
                for part in (some.part(index) for index in torch.arange(len(some)).split(32))
            ]
            out = torch.cat(exact)
            mean = out.mean(0)
            variance = ((out - mean).square().sum((0, 2, 3)) * layer.gain.float()).sum() / len(out)
            wanted.append((pick, mean, variance.clamp_min(1e-12)))
    first, spread = _first_rows(contexts, len(objective.public_rows))
    length = contexts.length or contexts.whole.shape[1]
    moved = nn.Parameter(torch.zeros_like(first))
    logs = nn.Parameter(torch.full((len(first),), math.log(max(1, length) / len(first))))
    optimiser = torch.optim.Adam([moved, logs], lr=_RATE)
    best: tuple[float, Fallback] | None = None
    for step in progress.track(range(steps + 1), "public mean"):
        for group in optimiser.param_groups:
            group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))
        rows = first + moved * spread
        decoded, bias = objective.with_public(rows.unsqueeze(0), logs.unsqueeze(0))
        total = rows.new_zeros(())
        for layer, (pick, mean, variance) in zip(objective.layers, wanted, strict=True):
            error = layer.attend(decoded, layer.queries[:, pick], bias)[0] - mean
            total = total + (error.square().sum((1, 2)) * layer.gain.float()).sum() / variance
        loss = float(total.detach())
        if math.isfinite(loss) and (best is None or loss < best[0]):
            best = loss, Fallback(rows.detach().clone(), logs.detach().clone())
        optimiser.zero_grad(set_to_none=True)
        total.backward(inputs=[moved, logs])
        nn.utils.clip_grad_norm_([moved, logs], 1.0)
        optimiser.step()
    return Fallback(first, logs.detach().clone()) if best is None else best[1]
