"""Public contexts of documents that are encoded apart from each other: pooled units, exact attention over all of their rows, typical rows.

Memory is bounded: a context of thousands of documents is kept as one mean row per document and the attention of the public queries over all
of its rows. The decoder's slots start from *typical rows*: k-means of rows drawn in proportion to the attention that public queries pay to
them (most rows of a document are never looked at, and where attention is peaked a slot that nobody looks at does not learn).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...errors import ConfigError
from ...mechanisms.anchors.sources import pool
from ..progress import QUIET, Progress
from .documents_fit import Documents
from .kmeans import kmeans
from .objective import LayerProbe
from .slot_schedule import slots_for
from .slots_fit import PublicContexts, SlotSettings

TYPICAL_CONTEXTS = 32
DRAWS = 512  # rows of a context that are drawn for the typical ones
SAMPLE = 6144  # public documents that cells are made of
QUERY_CHUNK = 128


@torch.no_grad()
def gather_documents(
    public: Iterable[Sequence[torch.Tensor]],
    count: int,
    probes: Sequence[LayerProbe],
    *,
    seed: int,
    progress: Progress = QUIET,
) -> tuple[PublicContexts, Documents]:
    """Units, outputs and typical rows of public contexts, and some of their documents.

    Args:
        public: each context's documents' rows [rows, C] float16; read once and left behind.
        count: how many contexts there are.
        probes: the layers, with all of their public queries.
        seed: of what is drawn.
        progress: the bar of the calibration.
    """
    generator = torch.Generator().manual_seed(seed)
    means: list[torch.Tensor] = []
    drawn, outputs, normalizers, sample = [], [], [], []
    for documents in progress.track(public, "documents", count):
        rows = torch.cat(list(documents)).float()
        owner = torch.arange(len(documents)).repeat_interleave(torch.tensor([len(d) for d in documents]))
        means.append(pool(rows, "group", owner).half())
        attended = [_exact(p, rows) for p in probes]
        outputs.append([out.half() for out, _, _ in attended])
        if len(means) <= TYPICAL_CONTEXTS:
            seen = torch.stack([mass for _, _, mass in attended]).mean(0)
            drawn.append(rows[torch.multinomial(seen, DRAWS, replacement=True, generator=generator)])
            normalizers.append([level for _, level, _ in attended])
        some = torch.randperm(len(documents), generator=generator)[: -(-SAMPLE // count)]
        sample += [documents[i] for i in some.tolist()]
    units = torch.nn.utils.rnn.pad_sequence(means, batch_first=True)
    counts = torch.tensor([len(m) for m in means])
    slots = slots_for(SlotSettings(), units.shape[1]).slots
    typical = typical_rows(torch.cat(drawn), slots, seed).half()
    contexts = PublicContexts(
        units,
        torch.arange(units.shape[1]) < counts.unsqueeze(1),
        typical.expand(len(means), -1, -1),
        tuple(torch.stack(layer) for layer in zip(*outputs, strict=True)),
    )
    lengths = torch.tensor([len(d) for d in sample])
    return contexts, Documents(
        torch.nn.utils.rnn.pad_sequence(sample, batch_first=True),
        torch.arange(int(lengths.max())) < lengths.unsqueeze(1),
        torch.stack([pool(d.float(), "context", None)[0].float() for d in sample]),
        tuple(torch.stack(layer).mean(0) for layer in zip(*normalizers, strict=True)),
    )


def typical_rows(rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """[count, C] centres of rows [N, C], in which the same row may stand often; rows themselves where they are too few or too alike."""
    try:
        return kmeans(rows, count, seed=seed, per_cell=1)
    except ConfigError:
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]


def _exact(probe: LayerProbe, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of the public queries over all rows [n, C]: outputs [H, m, dv], log normalisers [H, m], the mean weight [n] of each row."""
    key, value = probe.keys_values(rows.unsqueeze(0))
    parts, levels, mass = [], [], torch.zeros(len(rows))
    for q in probe.queries.split(QUERY_CHUNK, dim=1):
        logits = q @ key[0].mT * probe.scale
        weights = torch.softmax(logits, dim=-1)
        parts.append(weights @ value[0])
        levels.append(torch.logsumexp(logits, dim=-1))
        mass += weights.sum((0, 1))
    return torch.cat(parts, dim=1), torch.cat(levels, dim=1), mass / mass.sum()
