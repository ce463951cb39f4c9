r"""Codebook, priors and tilt of the histogram releases, from public rows.

*Metric.* Two rows are close when all layers see close keys and values: x -> T^T (x - c), T the top directions of the least-squares map from
rows to [Sigma_q^(1/2) k scale ; v / sd(v)] of every layer and head (randomly projected first: Johnson-Lindenstrauss).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from ...config import DPXAttnConfig
from ...mechanisms.anchors.cells import CellDecoder, Tilt
from ...mechanisms.anchors.plan import NOT_JUDGED, AnchorPlan
from ...mechanisms.anchors.quantizer import RowQuantizer
from ...privacy.units import NeighboringRelation
from ..progress import QUIET, Progress
from .kmeans import POINTS_PER_CELL, assign, cells_for, kmeans
from .objective import Objective

_SKETCH = 256
_SAMPLE = 4096
_COARSE = 16
_MOST_CELLS = 4096  # where their number is not asked for
GRID = (
    0,
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    2048,
    4096,
    8192,
)
_MOST_MEMBERS = 32
_MEMBER_BYTES = 2**24
SHARES = (0.5, 0.65, 0.75, 0.85)


@dataclass(frozen=True, eq=False)
class Codebook:
    """center, reach [C], matrix [p, C], codes [m, p], and the decoder; counts: support index [N, m] uint8 of each public context;
    members [m, a, C]: public rows that fell into each cell (its mean, where there are fewer)."""

    center: torch.Tensor
    reach: torch.Tensor
    matrix: torch.Tensor
    codes: torch.Tensor
    decoder: CellDecoder
    counts: torch.Tensor
    members: torch.Tensor


@torch.no_grad()
def row_metric(
    objective: Objective, rows: torch.Tensor, dims: int, generator: torch.Generator
) -> torch.Tensor:
    """[p, C]: the public metric, scaled so that distances add up over layers."""
    sample = rows[torch.randperm(len(rows), generator=generator)[:_SAMPLE]].float()
    center = sample.mean(0)
    sketch = torch.zeros(len(sample), _SKETCH)
    for layer in objective.layers:
        key, value = (x[0] for x in layer.keys_values(sample.unsqueeze(0)))  # [H, n, d]
        q = layer.queries.float()
        q = q - q.mean(1, keepdim=True)
        second = q.mT @ q / q.shape[1]
        eigenvalues, vectors = torch.linalg.eigh(second)
        root = vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(-2)
        gain = layer.gain.float().sqrt()[:, None, None]
        value = (value - value.mean(1, keepdim=True)) * gain
        spread = value.square().sum(-1).mean().sqrt().clamp_min(1e-9)
        share = gain / gain.square().sum().sqrt()
        features = torch.cat([(key @ root) * layer.scale * share, value / spread], -1)
        flat = features.transpose(0, 1).flatten(1)
        mix = torch.randn(flat.shape[1], _SKETCH, generator=generator) / math.sqrt(_SKETCH)
        sketch += (flat - flat.mean(0)) @ mix
    centred = sample - center
    ridge = 1e-4 * float(centred.square().mean()) * len(sample)
    gram = centred.mT @ centred + ridge * torch.eye(centred.shape[1])
    linear = torch.linalg.solve(gram, centred.mT @ sketch)  # [C, S]
    left, values, _ = torch.linalg.svd(linear, full_matrices=False)
    p = min(dims, len(values))
    directions: torch.Tensor = left[:, :p] * values[:p]
    return directions.mT.contiguous()


@torch.no_grad()
def fit_codebook(
    rows: torch.Tensor,
    objective: Objective,
    cells: int | None,
    *,
    served: int = 48,
    dims: int = 64,
    seed: int = 0,
    progress: Progress = QUIET,
) -> Codebook:
    """Cells of public rows [N, n, C], as many as there are rows for where `cells` is None. served: rows that stay unmerged when a release
    is decoded.

    Raises:
        ConfigError: too few distinct rows for so many cells.
    """
    generator = torch.Generator().manual_seed(seed)
    contexts, n, channels = rows.shape
    flat = rows.reshape(-1, channels)
    most = _MOST_CELLS if cells is None else cells
    sample = flat[torch.randperm(len(flat), generator=generator)[: most * POINTS_PER_CELL]].float()
    center = sample.mean(0)
    reach = 4.0 * (sample - center).abs().amax(0).clamp_min(1e-6)
    matrix = row_metric(objective, sample, dims, generator)
    points = (sample - center) @ matrix.mT
    cells = cells_for(points, cells, most)
    codes = kmeans(points, cells, seed=seed, progress=progress)
    quantizer = RowQuantizer.from_tensors(center, matrix.mT, codes, reach=reach)
    support = torch.tensor([v for v in GRID if v <= n], dtype=torch.float32)
    counts = torch.zeros(contexts, cells, dtype=torch.uint8)
    sums, sizes = torch.zeros(cells, channels), torch.zeros(cells)
    block = max(1, 2**20 // n)
    for start in progress.track(range(0, contexts, block), "priors"):
        part = rows[start : start + block].float()
        index = quantizer.cells(part.reshape(-1, channels)).reshape(len(part), n)
        sums.index_add_(0, index.flatten(), part.reshape(-1, channels))
        sizes += torch.bincount(index.flatten(), minlength=cells)
        number = torch.zeros(len(part), cells).scatter_add_(1, index, torch.ones(len(part), n))
        counts[start : start + block] = (torch.bucketize(number, support, right=True) - 1).to(torch.uint8)
    # a cell that only the sample's rounding filled keeps the row nearest to its code
    nearest = sample[assign(codes, points)[0]]
    anchors = torch.where(sizes.unsqueeze(1) > 0, sums / sizes.clamp_min(1).unsqueeze(1), nearest)
    coarse = assign(codes, kmeans(codes, min(_COARSE, max(2, cells // 8)), seed=seed))[0]
    decoder = CellDecoder(anchors.unsqueeze(1), coarse, support, log_prior(counts, len(support)), served)
    return Codebook(center, reach, matrix, codes, decoder, counts, _members(sample, points, codes, anchors))


def _members(
    sample: torch.Tensor, points: torch.Tensor, codes: torch.Tensor, anchors: torch.Tensor
) -> torch.Tensor:
    """[m, a, C]: some public rows of each cell, as many as a shared file can hold."""
    count = max(2, min(_MOST_MEMBERS, _MEMBER_BYTES // (2 * anchors.numel())))
    members = anchors.unsqueeze(1).repeat(1, count, 1)
    index = assign(points, codes)[0]
    order = torch.argsort(index, stable=True)
    starts = torch.searchsorted(index[order], torch.arange(len(codes)))
    rank = torch.arange(len(order)) - starts[index[order]]
    kept = rank < count
    members[index[order][kept], rank[kept]] = sample[order[kept]]
    return members


def log_prior(counts: torch.Tensor, bins: int, strength: float = 2.0) -> torch.Tensor:
    """[m, J] smoothed log frequencies of the count bins [N, m]; every cell borrows `strength` contexts from the average cell."""
    histogram = torch.stack([(counts == j).float().sum(0) for j in range(bins)], -1)
    overall = histogram.sum(0) + 1e-3
    smooth = histogram + strength * overall / overall.sum()
    return torch.log(smooth / smooth.sum(-1, keepdim=True))


def geometric_noise(
    shape: tuple[int, ...], rates: tuple[float, float], generator: torch.Generator
) -> torch.Tensor:
    """Float simulation of the two-sided geometric noise, for training on public data only."""
    draws = []
    for rate in rates:
        u = torch.rand(shape, generator=generator).clamp_min(1e-12)
        draws.append(torch.floor(-torch.log(u) / rate))
    return draws[0] - draws[1]


@torch.no_grad()
def histogram_plan(config: DPXAttnConfig, book: Codebook, epsilon: float, seed: int) -> AnchorPlan:
    """The plan of a histogram of the book's cells at epsilon, without a tilt and not judged yet."""
    symmetric = config.neighboring != NeighboringRelation.REPLACE_ONE.value
    return AnchorPlan(
        epsilon=epsilon,
        release="histogram",
        center=book.center,
        reach=book.reach,
        matrix=book.matrix,
        bias=torch.zeros(book.matrix.shape[0]),
        codes=book.codes.unsqueeze(0),
        bound=1.0,
        share_plus=choose_share(book, epsilon, symmetric=symmetric, seed=seed),
        noise=0.0,
        head=None,
        tilt=None,
        quality=NOT_JUDGED,
    )


def choose_share(book: Codebook, epsilon: float, *, symmetric: bool, seed: int = 0) -> float:
    """e_plus / epsilon with the least posterior log loss of the public counts."""
    if symmetric:
        return 0.5
    generator = torch.Generator().manual_seed(seed)
    bins = book.counts[:64].long()
    losses = {}
    for share in SHARES:
        rates = (epsilon * share, epsilon * (1 - share))
        noised = book.decoder.support[bins] + geometric_noise(tuple(bins.shape), rates, generator)
        posterior = book.decoder.posterior(noised, rates)
        losses[share] = float(-posterior.gather(-1, bins.unsqueeze(-1)).mean())
    return min(losses, key=lambda s: losses[s])


def fit_tilt(
    book: Codebook,
    rates: tuple[float, float],
    *,
    steps: int = 400,
    rank: int = 16,
    width: int = 64,
    batch: int = 32,
    seed: int = 0,
    progress: Progress = QUIET,
    seconds: float | None = None,
) -> Tilt:
    """Trains the joint decoder's tilt on public counts with fresh noise: loss = -log posterior of the true counts.

    seconds: that it may take; None: as long as its steps do.
    """
    generator = torch.Generator().manual_seed(seed)
    m, k = book.codes.shape
    with torch.no_grad():
        trial = book.decoder.support[book.counts[:64].long()]
        noised = trial + geometric_noise(tuple(trial.shape), rates, generator)
        code = book.decoder.posterior(noised, rates).exp() @ book.decoder.support @ book.codes
        scale = code.square().mean().sqrt().clamp_min(1e-6)
    inner = torch.nn.Parameter(torch.randn(width, k, generator=generator) * k**-0.5)
    bias = torch.nn.Parameter(torch.zeros(width))
    outer = torch.nn.Parameter(torch.randn(rank, width, generator=generator) * width**-0.5)
    cells = torch.nn.Parameter(torch.zeros(m, rank))
    parameters = [inner, bias, outer, cells]
    optimiser = torch.optim.Adam(parameters, lr=5e-3)
    tilt = Tilt(inner, bias, outer, cells, scale)
    slope = book.decoder.support.clamp_max(3.0)
    started = time.monotonic()
    for step in progress.track(range(steps), "tilt"):
        done = step / steps
        if seconds is not None:
            done = max(done, (time.monotonic() - started) / max(1e-3, seconds))
            if done >= 1.0:
                break
        for group in optimiser.param_groups:
            group["lr"] = 5e-3 * 0.5 * (1 + math.cos(math.pi * done)) + 1e-5
        index = torch.randint(0, len(book.counts), (batch,), generator=generator)
        bins = book.counts[index].long()
        noised = book.decoder.support[bins] + geometric_noise(tuple(bins.shape), rates, generator)
        with torch.no_grad():
            plain = book.decoder.log_prior + book.decoder.log_likelihood(noised, rates)
            mean = plain.softmax(-1) @ book.decoder.support
        # -log posterior: `CellDecoder.posterior` of the true counts, whose other terms no parameter moves
        shift = tilt.shift(mean @ book.codes)
        tilted = torch.logsumexp(plain + shift.unsqueeze(-1) * slope, dim=-1) - shift * slope[bins]
        loss = tilted.sum(1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return Tilt(inner.detach(), bias.detach(), outer.detach(), cells.detach(), scale)
