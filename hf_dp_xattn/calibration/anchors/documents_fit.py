r"""Histogram of documents: each falls into one public cell by its mean row, and each cell is served as rows of public documents like it.

*Metric.* Two documents are alike when they move the attention outputs alike. Adding a document with rows r to a context of outputs o(q) and
log normalisers l(q) moves o(q), to first order, by its *influence*

    g(q) = sum_r exp(q.k_r - l(q)) (v_r - o(q)),

stacked over layers, heads and public queries, randomly projected (Johnson-Lindenstrauss), brought to about one length (g / (|g| + median
|g|): a few large influences would hide the others), and predicted from the document's mean row by ridge regression. Cells are k-means of
the predictions, so wording that no query reads splits no cell, and documents that no query reads lie close together.

*Rows.* A cell stands for the most attended rows of the public documents nearest to its centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...mechanisms.anchors.cells import CellDecoder
from ...mechanisms.anchors.quantizer import RowQuantizer
from .cells_fit import GRID, Codebook, log_prior
from .kmeans import assign, cells_for, kmeans
from .objective import LayerProbe, Objective
from .slots_fit import PublicContexts

CELLS = 192
QUERIES = 64  # of each layer, for the metric
DIMENSIONS = 64
DOCUMENTS_OF_A_CELL, ROWS_OF_A_DOCUMENT = 8, 2
_SKETCH = 256
_CHUNK = 256
_LARGEST_LOGIT = (
    0.0  # of one row beyond a whole context's normaliser: no document counts for more than a context
)
_RIDGE = 1e-2


@dataclass(frozen=True, eq=False)
class Documents:
    """Public documents: rows [D, L, C], mask [D, L], means [D, C]. normalizers: each layer's mean log normaliser [H, m] over public
    contexts."""

    rows: torch.Tensor
    mask: torch.Tensor
    means: torch.Tensor
    normalizers: tuple[torch.Tensor, ...]

    def codebook(
        self,
        contexts: PublicContexts,
        training: PublicContexts,
        objective: Objective,
        cells: int | None,
        seed: int,
    ) -> Codebook:
        """Cells of these documents.

        Args:
            contexts: all public contexts, whose mean outputs are those of a typical one.
            training: those whose counts make the priors.
            objective: the layers.
            cells: as many, but no more than `CELLS`; None: as many as there are documents for.
            seed: of the fit.

        Raises:
            ConfigError: too few distinct documents for so many cells.
        """
        typical = [o.float().mean(0) for o in contexts.outputs or ()]
        generator = torch.Generator().manual_seed(seed)
        sketch, mass = influences(
            objective.layers, typical, self.normalizers, self.rows, self.mask, generator
        )
        return fit_documents(
            training,
            self.means,
            sketch,
            mass,
            self.rows,
            cells=cells_for(self.means, cells, CELLS, per_cell=1),
            seed=seed,
        )


@torch.no_grad()
def influences(
    probes: Sequence[LayerProbe],
    outputs: Sequence[torch.Tensor],
    normalizers: Sequence[torch.Tensor],
    rows: torch.Tensor,
    mask: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sketched influences [D, S] of documents of rows [D, L, C], mask [D, L], and the attention [D, L] that each row gets.

    outputs [H, m, dv], normalizers [H, m]: of a typical public context, per layer.
    """
    sketch, mass = torch.zeros(len(rows), _SKETCH), torch.zeros(mask.shape)
    for probe, out, normalizer in zip(probes, outputs, normalizers, strict=True):
        pick = torch.randperm(probe.queries.shape[1], generator=generator)[:QUERIES]
        q, o, level = probe.queries[:, pick], out[:, pick].float(), normalizer[:, pick]
        gain = probe.gain.float().sqrt()[:, None, None]
        scale = float((o * gain).square().sum().sqrt().clamp_min(1e-9))
        mix = torch.randn(o.numel(), _SKETCH, generator=generator) / (_SKETCH**0.5 * scale)
        for start in range(0, len(rows), _CHUNK):
            part = slice(start, start + _CHUNK)
            key, value = probe.keys_values(rows[part].float())
            logits = q @ key.mT * probe.scale - level.unsqueeze(-1)  # [D, H, m, L]
            weights = logits.clamp_max(_LARGEST_LOGIT).exp() * mask[part, None, None]
            moved = weights @ value - weights.sum(-1, keepdim=True) * o
            sketch[part] += (moved * gain).flatten(1) @ mix
            mass[part] += weights.sum((1, 2))
    return sketch, mass


@torch.no_grad()
def fit_documents(
    contexts: PublicContexts,
    means: torch.Tensor,
    sketch: torch.Tensor,
    mass: torch.Tensor,
    rows: torch.Tensor,
    *,
    cells: int,
    seed: int,
) -> Codebook:
    """Codebook, priors and served rows, from public documents: their means [D, C], influences [D, S], attention [D, L] and rows [D, L, C].

    Raises:
        ConfigError: too few distinct documents for so many cells.
    """
    center = means.mean(0)
    centred = means - center
    reach = 4.0 * centred.abs().amax(0).clamp_min(1e-6)
    length = torch.linalg.vector_norm(sketch, dim=1, keepdim=True)
    sketch = sketch / (length + length.median()).clamp_min(1e-12)
    ridge = _RIDGE * float(centred.square().mean()) * len(means)
    gram = centred.mT @ centred + ridge * torch.eye(means.shape[1])
    linear = torch.linalg.solve(gram, centred.mT @ (sketch - sketch.mean(0)))
    left, values, _ = torch.linalg.svd(linear, full_matrices=False)
    p = min(DIMENSIONS, len(values))
    matrix = (left[:, :p] * values[:p]).mT.contiguous()
    matrix = matrix / (centred @ matrix.mT).square().sum(-1).mean().sqrt().clamp_min(1e-12)
    points = centred @ matrix.mT
    codes = kmeans(points, cells, seed=seed, per_cell=1)
    quantizer = RowQuantizer.from_tensors(center, matrix.mT, codes, reach=reach)
    n = contexts.units.shape[1]
    support = torch.tensor([v for v in GRID if v <= n], dtype=torch.float32)
    counts = torch.zeros(len(contexts), cells, dtype=torch.uint8)
    for i in range(len(contexts)):
        index = quantizer.cells(contexts.units[i][contexts.mask[i]].float())
        number = torch.bincount(index, minlength=cells)
        counts[i] = (torch.bucketize(number.float(), support, right=True) - 1).to(torch.uint8)
    members = _members(points, codes, mass, rows)
    decoder = CellDecoder(
        members, torch.zeros(cells, dtype=torch.int64), support, log_prior(counts, len(support)), cells
    )
    return Codebook(center, reach, matrix, codes, decoder, counts, members)


def _members(
    points: torch.Tensor, codes: torch.Tensor, mass: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """[m, a, C] the most attended rows of the documents of each cell that lie nearest to its centre (again and again where there are
    few)."""
    cell, distance = assign(points, codes)
    best = mass.topk(ROWS_OF_A_DOCUMENT, dim=1).indices
    attended = rows.float().gather(1, best.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))  # [D, rows, C]
    members = []
    for j in range(len(codes)):
        indices = (cell == j).nonzero()[:, 0]
        if not len(indices):  # a cell that only rounding filled
            indices = (points - codes[j]).square().sum(-1).argmin().unsqueeze(0)
        indices = indices[distance[indices].argsort()]
        # one of many times the same document tells no more than itself
        spread = indices[torch.linspace(0, len(indices) - 1, DOCUMENTS_OF_A_CELL).round().long()]
        members.append(attended[spread].flatten(0, 1))
    return torch.stack(members)
