"""What a training aims at, computed once: the exact attention of every public context to some public queries, in half-precision files.

A batch that is drawn again and again would otherwise project all of its exact rows again and again: on a real encoder that is half of a
step. The files are mapped, not read: batches pass through memory.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..progress import QUIET, Progress
from .objective import LayerProbe, Objective
from .slots_fit import PublicContexts

OUTPUTS = "exact outputs"  # the stage's name
BYTES = 2**29  # of all layers' files, at most
_FEWEST_QUERIES = 48
_MOST_QUERIES = 128
_BATCH = 32


def worthwhile(contexts: PublicContexts, objective: Objective, passes: float) -> bool:
    """Whether a training should have the outputs at hand.

    Args:
        contexts: what is trained on.
        objective: the layers.
        passes: how often a training would compute one context's outputs in one layer, at most.
    """
    return (
        contexts.outputs is None
        and passes > 2.0 * len(objective.layers)
        and _queries(contexts, objective) >= _FEWEST_QUERIES
    )


def _queries(contexts: PublicContexts, objective: Objective) -> int:
    """How many of each layer's queries a file has room for."""
    least = min(layer.queries.shape[1] for layer in objective.layers)
    shapes = [
        layer.attend(contexts.whole[:1].float(), layer.queries[:, :1]).numel() for layer in objective.layers
    ]
    return min(least, _MOST_QUERIES, BYTES // (2 * len(contexts) * sum(shapes)))


@contextmanager
def exact_outputs(
    contexts: PublicContexts, objective: Objective, *, seed: int, progress: Progress = QUIET
) -> Iterator[tuple[PublicContexts, Objective]]:
    """The contexts with their outputs, and the objective of those queries; the files are gone afterwards.

    Args:
        contexts: what is trained on.
        objective: the layers, with all of their queries.
        seed: of the choice of queries.
        progress: the bar of the calibration.
    """
    generator = torch.Generator().manual_seed(seed)
    count = _queries(contexts, objective)
    layers = []
    for layer in objective.layers:
        pick = torch.randperm(layer.queries.shape[1], generator=generator)[:count]
        layers.append(dataclasses.replace(layer, queries=layer.queries[:, pick]))
    with tempfile.TemporaryDirectory(prefix="hf-dp-xattn-") as folder:
        outputs = [
            _written(layer, contexts, Path(folder, str(i)))
            for i, layer in enumerate(progress.track(layers, OUTPUTS))
        ]
        # a training with outputs reads none of the rows that they are of
        yield (
            dataclasses.replace(contexts, whole=contexts.whole[:, :1], outputs=tuple(outputs)),
            dataclasses.replace(objective, layers=layers),
        )


@torch.no_grad()
def _written(layer: LayerProbe, contexts: PublicContexts, file: Path) -> torch.Tensor:
    """[N, H, m, dv] of all of the layer's queries, float16, in a file."""
    kept: torch.Tensor | None = None
    for index in torch.arange(len(contexts)).split(_BATCH):
        out = layer.attend(contexts.whole[index].float(), layer.queries).half()
        if kept is None:
            shape = torch.Size((len(contexts), *out.shape[1:]))
            kept = torch.from_file(str(file), shared=True, size=shape.numel(), dtype=torch.float16).view(
                shape
            )
        kept[index] = out
    assert kept is not None
    return kept
