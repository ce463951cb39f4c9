"""Baselines that release the rows themselves: noised embeddings with a Wiener filter, and k-ary randomised response per row.

Both are (epsilon, delta)-DP for replacing one row, like `anchors` with unit = row: replacing a row moves the clipped embeddings by at most
2 C in l2, or changes one of the independent answers. The Gaussian noise is drawn in floating point: fit for measuring, not for a release.
Everything fitted here comes from public contexts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from shapes.private import config

from hf_dp_xattn.calibration.anchors.cells_fit import fit_codebook
from hf_dp_xattn.calibration.anchors.objective import Objective
from hf_dp_xattn.calibration.anchors.slot_plans import sum_noise
from hf_dp_xattn.mechanisms.anchors.quantizer import RowQuantizer
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.response import RandomizedResponse

CLIP_QUANTILES = (0.1, 0.5, 0.9, 1.0)  # of public rows' distances from their position's mean
JOINT_RANK = 512
JOINT_CONTEXTS = (
    2000  # more contexts would not change the leading directions, and their Gram matrix has to be decomposed
)
_RIDGE = 1e-6


@lru_cache
def gaussian_sigma(epsilon: float) -> float:
    """Standard deviation of the noise per unit of the clipping norm, by the same accountant as the mechanisms'."""
    return sum_noise(config(epsilon), epsilon)


def clip(rows: torch.Tensor, norm: float) -> torch.Tensor:
    """Every row [..., C] scaled to at most `norm`."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows * (norm / length.clamp_min(1e-30)).clamp_max(1.0)


@dataclass(frozen=True)
class Linear:
    """x - mean is estimated as (y - offset) basis gain basis_out^T; per position, or over all of a context's numbers.

    basis [P, D, r] has orthonormal columns, values [P, r] are the clipped rows' variances along them, cross [P, r, D] the covariances
    with the rows themselves.
    """

    offset: torch.Tensor
    basis: torch.Tensor
    values: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def fit(cls, clipped: torch.Tensor, rows: torch.Tensor, rank: int) -> Linear:
        """clipped, rows [N, P, D]: P separate filters of D numbers each; `rows` are centred."""
        count = clipped.shape[0]
        offset = clipped.mean(0)
        centred = (clipped - offset).transpose(0, 1)  # [P, N, D]
        if centred.shape[-1] <= count:
            values, basis = torch.linalg.eigh(centred.mT @ centred / count)
        else:  # more numbers than contexts: the same directions from the smaller Gram matrix
            values, left = torch.linalg.eigh(centred @ centred.mT / count)
            basis = (
                centred.mT
                @ left
                / (values.clamp_min(_RIDGE * float(values.max())) * count).sqrt().unsqueeze(-2)
            )
        values, basis = values[:, -rank:].clamp_min(0), basis[..., -rank:]
        cross = (centred @ basis).mT @ rows.transpose(0, 1) / count
        return cls(offset, basis, values, cross)

    def gain(self, noise: float) -> torch.Tensor:
        """[P, r] weights of the observed directions when each has noise of this standard deviation."""
        floor = _RIDGE * self.values.amax(-1, keepdim=True).clamp_min(_RIDGE)
        return 1.0 / (self.values + floor + noise**2)

    def residual(self, noise: float, total: float) -> float:
        """Expected squared error that is left of a total variance."""
        return total - float((self.cross.square().sum(-1) * self.gain(noise)).sum())

    def estimate(self, observed: torch.Tensor, noise: float) -> torch.Tensor:
        """observed [N, P, D] -> estimates of the centred rows."""
        z = (observed - self.offset).transpose(0, 1) @ self.basis
        return ((z * self.gain(noise).unsqueeze(-2)) @ self.cross).transpose(0, 1)


class WienerFilter:
    """Rows clipped around their position's public mean, Gaussian noise, and the best linear estimate given the noise.

    joint: one filter over all rows of a context, whose leading directions see that its rows repeat each other; else one per position.
    """

    def __init__(self, public: torch.Tensor, *, joint: bool, rank: int = JOINT_RANK) -> None:
        rows = (public[:JOINT_CONTEXTS] if joint else public).float()
        self.mean = rows.mean(0)
        self.joint = joint
        centred = rows - self.mean
        self._total = float(centred.square().sum()) / len(rows)
        lengths = torch.linalg.vector_norm(centred, dim=-1).flatten()
        step = max(1, len(lengths) // 1_000_000)
        chosen = torch.quantile(lengths[::step], torch.tensor(CLIP_QUANTILES)).tolist()
        self.norms = [*chosen[:-1], float(lengths.max())]
        self._filters = [
            Linear.fit(
                self._shape(clip(centred, norm)), self._shape(centred), rank if joint else rows.shape[-1]
            )
            for norm in self.norms
        ]

    def _shape(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.flatten(1).unsqueeze(1) if self.joint else rows

    def choose(self, epsilon: float) -> int:
        """Which clipping norm leaves the least expected error on public rows."""
        sigma = gaussian_sigma(epsilon)
        left = [f.residual(sigma * c, self._total) for f, c in zip(self._filters, self.norms, strict=True)]
        return left.index(min(left))

    def rows(self, private: torch.Tensor, epsilon: float, seed: int) -> torch.Tensor:
        """[N, n, C] -> estimates of the same shape, each row released once."""
        which = self.choose(epsilon)
        noise = gaussian_sigma(epsilon) * self.norms[which]
        generator = torch.Generator().manual_seed(seed)
        clipped = clip(private - self.mean, self.norms[which])
        observed = clipped + noise * torch.randn(private.shape, generator=generator)
        estimate = self._filters[which].estimate(self._shape(observed), noise)
        return self.mean + estimate.reshape(private.shape)


class ResponsePerRow:
    """Each row's cell of a public codebook by k-ary randomised response; the row is its posterior mean given the answer.

    The prior of a cell is its public frequency at the row's position; given the answer s with anchor a_s,
    E[x | s] = w a_s + (1 - w) mean, w = (t - f) p_s / ((t - f) p_s + f), t and f the probabilities of a true and of each false answer.
    """

    def __init__(self, public: torch.Tensor, objective: Objective, cells: int, seed: int = 0) -> None:
        book = fit_codebook(public, objective, cells, seed=seed)
        self.anchors = book.decoder.anchors[:, 0].float()
        self.quantizer = RowQuantizer.from_tensors(book.center, book.matrix.mT, book.codes, reach=book.reach)
        self.cells = cells
        count = torch.zeros(public.shape[1], cells)
        for part in public.split(256):
            index = self.quantizer.cells(part.float().flatten(0, 1)).view(part.shape[:2])
            count += _count(index, cells)
        self.prior = count / count.sum(1, keepdim=True)
        self.mean = self.prior @ self.anchors

    def answers(
        self, cells: torch.Tensor, epsilon: float, seed: int
    ) -> tuple[torch.Tensor, RandomizedResponse]:
        """Randomised answers to the private cells (any shape)."""
        response = RandomizedResponse.of(epsilon, self.cells)
        told = response.draw(cells.flatten().numpy(), SeededEntropy(seed))
        return torch.from_numpy(told).view(cells.shape), response

    def rows(self, private: torch.Tensor, epsilon: float, seed: int) -> torch.Tensor:
        """[N, n, C] -> posterior means of the same shape, each row released once."""
        cells = self.quantizer.cells(private.flatten(0, 1)).view(private.shape[:2])
        told, response = self.answers(cells, epsilon, seed)
        false = (1 - response.truth) / (self.cells - 1)
        prior = self.prior.gather(1, told.T).T  # [N, n]: of the answer, at its position
        belief = (response.truth - false) * prior
        weight = (belief / (belief + false)).unsqueeze(-1)
        return weight * self.anchors[told] + (1 - weight) * self.mean


def _count(index: torch.Tensor, cells: int) -> torch.Tensor:
    """[n, cells]: how often each cell occurs at each position of index [N, n]."""
    n = index.shape[1]
    flat = index + cells * torch.arange(n)
    return torch.bincount(flat.flatten(), minlength=n * cells).view(n, cells).float()
