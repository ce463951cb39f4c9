r"""Where the training of learned sums starts: the linear posterior of a context's mean row, in closed form.

Attention to rows that all move by the same d moves by W_v d, whatever the query: the keys' shift is one number for all rows, which a
softmax does not see. So the public mean's rows, moved by what a release says of the context's mean row, are a decoder that needs no
training, and on rows of real encoders most of what a release can say.

*Directions.* With V the values of the layers at the public contexts' mean rows (each layer by its variance, each head by its gain), V = Q
diag(l)^(1/2) E^T: the scores of direction k of a row x are z_k(x) = E_k . (V(x) - V(mean)), uncorrelated over contexts, of variance l_k,
and an error in any of them counts alike.

*Scales.* A sum releases w_k z_k of each row, with w scaled so that rows have a mean square of 1 (they are clipped to the unit ball): sum_k
w_k^2 r_k = 1, r_k the mean square of z_k over rows. With noise of variance c in the mean of n rows (c = sigma^2 / n^2) the linear posterior
leaves l_k c / (l_k w_k^2 + c), and the least sum over k has (water-filling, mu by bisection)

    w_k^2 = max(0, sqrt(c / (mu r_k)) - c / l_k).

*Source:* ours; Wiener filter, and water-filling as for parallel Gaussian channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...mechanisms.anchors.fallback import Fallback
from .objective import Objective
from .slots_fit import PublicContexts, SlotTrainer

_CONTEXTS = 1024
_LEAST = 1e-6  # variance of a score, beside the largest
_ROUNDED = 1e-10  # of the mean square of contexts' means: what rounding alone makes them differ by
_BISECTIONS = 80
_DIRECTION = 0.3  # deviation of a direction's entries in a trainer's units
_QUIET = 0.1  # of its first nonlinear moves, beside those of a trainer that starts anywhere
_CLIPPED = 2.0  # norm of a usual row before it is clipped: what tells most are directions


@dataclass(frozen=True, eq=False)
class LinearStart:
    """Scores of rows, and how far each of them moves a context's rows.

    center [C], forward [K, C]: z(x) = forward (x - center). back [C, K]: the move of a context's mean row that goes with its mean scores.
    spread, energy [K]: mean squares of contexts' mean scores (l), and of single units' (r). units: of a context, the mean number.
    """

    center: torch.Tensor
    forward: torch.Tensor
    back: torch.Tensor
    spread: torch.Tensor
    energy: torch.Tensor
    units: float

    def scaled(self, noise: float | None) -> torch.Tensor:
        """[K, C]: the map of a sum with this noise, as `forward` but with each score by its scale w_k; `_CLIPPED` times for clipping.

        Args:
            noise: standard deviation, in unit balls; None: codes that are told by their nearest cell, so that all scores have one scale.
        """
        if noise is None:
            scale = self.energy.sum().rsqrt().expand(len(self.energy))
        else:
            scale = water_filled(self.spread, self.energy, (noise / self.units) ** 2).sqrt()
        return _CLIPPED * scale.unsqueeze(1) * self.forward

    def scores(self, contexts: PublicContexts) -> torch.Tensor:
        """[N, K] mean scores of each context's units."""
        return (_mean_units(contexts) - self.center) @ self.forward.mT


def water_filled(spread: torch.Tensor, energy: torch.Tensor, noise: float) -> torch.Tensor:
    """[K] squares of scales with sum energy * result = 1 that leave the least of a signal (the module's text).

    Args:
        spread: [K] variances of the signal.
        energy: [K] mean squares of what is summed.
        noise: its variance c in each score's mean.
    """
    spread, energy = spread.double(), energy.double().clamp_min(1e-30)
    least, most = -80.0, 80.0
    for _ in range(_BISECTIONS):
        log_mu = (least + most) / 2
        squares = (
            (noise / energy).sqrt() * torch.tensor(-log_mu / 2).double().exp() - noise / spread
        ).clamp_min(0)
        if float((squares * energy).sum()) > 1.0:
            least = log_mu
        else:
            most = log_mu
    return squares.to(torch.float32)


def fit_linear_start(contexts: PublicContexts, objective: Objective, count: int) -> LinearStart | None:
    """The linear posterior's directions, of public contexts; None where contexts do not differ.

    Args:
        contexts: public ones.
        objective: the layers.
        count: directions, at most.
    """
    some = contexts.sample(_CONTEXTS)
    means = _mean_units(some)
    center = means.mean(0)
    if not float((means - center).square().mean()) > _ROUNDED * float(means.square().mean()):
        return None
    with torch.no_grad():
        each = [v - v.mean(0) for v in _values(objective, means)]
        scales = [float(v.square().sum(1).mean().clamp_min(1e-18).rsqrt()) for v in each]
        centred = torch.cat([v * s for v, s in zip(each, scales, strict=True)], 1)
        squares, left = torch.linalg.eigh((centred @ centred.mT).double())
        squares, left = squares.flip(0).clamp_min(0.0), left.flip(1)
        kept = squares > _LEAST * squares[0]
        # of contexts half as many as they are can be told from chance
        kept[max(1, len(means) // 2) :] = False
        squares, left = squares[kept][:count].float(), left[:, kept][:, :count].float()
        if not len(squares) or not float(squares[0]) > 0:
            return None
        axes = centred.mT @ left / squares.sqrt()  # [S, K]: E
    forward = _pulled_back(objective, center, axes, scales)
    with torch.no_grad():
        scores = (means - center) @ forward.mT
        spread = scores.square().mean(0)
        units = some.units[some.mask]
        energy = ((units - center) @ forward.mT).square().mean(0)
        # scores are uncorrelated where the values are affine, and nearly so where they are not
        moved = _mean_rows(some, means, len(objective.public_rows))
        back = (moved - moved.mean(0)).mT @ scores / (len(scores) * spread.clamp_min(1e-30))
    if not all(bool(torch.isfinite(t).all()) for t in (forward, back, energy)):
        return None
    return LinearStart(center, forward, back, spread, energy, float(contexts.mask.sum(1).float().mean()))


@torch.no_grad()
def start_at(
    trainer: SlotTrainer, start: LinearStart, fallback: Fallback, noise: Mapping[int, float | None]
) -> None:
    """Begins where the linear posterior is: every row of the public mean is moved by what a code says of the mean row.

    Args:
        trainer: as it was made; the gain of each plan waits for its codes (`set_gain`).
        start: directions and scales.
        fallback: the public mean's rows.
        noise: standard deviation of each sum's noise, by its plan; None: as in `LinearStart.scaled`.
    """
    count = _shared(trainer, start)
    maps = torch.zeros(len(noise), *trainer.common_matrix.shape)
    for matrix, deviation in zip(maps, noise.values(), strict=True):
        matrix[:count] = start.scaled(deviation)[:count]
    trainer.common_matrix.copy_(maps.mean(0))
    for plan, matrix in zip(noise, maps, strict=True):
        trainer.matrix[plan] = matrix - trainer.common_matrix
        trainer.bias[plan] = matrix @ (trainer.center - start.center)
    rows = torch.arange(trainer.slots.shape[0]) % len(fallback.rows)
    trainer.first.copy_(fallback.rows[rows])
    trainer.slots.zero_()
    # a row that stands twice weighs half
    trainer.log_weights.copy_(fallback.log_weights[rows] - torch.bincount(rows)[rows].float().log())
    back = start.back.mT[:count] * start.spread[:count].sqrt().unsqueeze(1) / trainer.deviation
    size = back.square().mean(1).sqrt().clamp_min(1e-9) / _DIRECTION
    trainer.directions[:count] = back / size.unsqueeze(1)
    hidden = trainer.common_head.shape[0]
    trainer.coefficients[:, :, :hidden] *= _QUIET
    trainer.coefficients[:, :, hidden:] = 0.0
    which = torch.arange(count)
    trainer.coefficients[:, which, hidden + which] = size


@torch.no_grad()
def set_gain(
    trainer: SlotTrainer, plan: int, start: LinearStart, contexts: PublicContexts, codes: torch.Tensor
) -> None:
    """What a code says of each score, by least squares; after `set_code_scale`.

    Args:
        trainer: that `start_at` was called with.
        plan: its number.
        start: likewise.
        contexts: public ones.
        codes: [N, K] of these, with their noise.
    """
    count = _shared(trainer, start)
    codes = ((codes - trainer.code_center[plan]) / trainer.code_scale[plan])[:, :count]
    scores = start.scores(contexts)[:, :count]
    told = (codes * (scores - scores.mean(0))).mean(0) / codes.square().mean(0).clamp_min(1e-12)
    trainer.gain[plan].zero_()
    trainer.gain[plan, :count] = told.clamp_min(0.0) / start.spread[:count].sqrt().clamp_min(1e-12)


def _shared(trainer: SlotTrainer, start: LinearStart) -> int:
    """Directions that both have."""
    return min(len(start.forward), trainer.common_matrix.shape[0], trainer.directions.shape[0])


def _mean_units(contexts: PublicContexts) -> torch.Tensor:
    mask = contexts.mask.unsqueeze(-1)
    units = contexts.units.float()
    return (units * mask).sum(1) / mask.sum(1).clamp_min(1)


def _mean_rows(contexts: PublicContexts, units: torch.Tensor, public: int) -> torch.Tensor:
    """[N, C] of the rows that are attended to, less the public ones before them; of a sample of rows nothing is known but the units."""
    if contexts.outputs is not None:
        return units
    whole = contexts.whole[:, public:].float()
    there = (whole != 0).any(-1, keepdim=True)
    return (whole * there).sum(1) / there.sum(1).clamp_min(1)


def _values(objective: Objective, rows: torch.Tensor) -> list[torch.Tensor]:
    """Values [N, S] of each layer at rows [N, C], heads by their gain."""
    each = [
        layer.keys_values(rows.unsqueeze(0))[1][0] * layer.gain.float().sqrt()[:, None, None]
        for layer in objective.layers
    ]
    return [value.transpose(0, 1).flatten(1) for value in each]


def _pulled_back(
    objective: Objective, center: torch.Tensor, axes: torch.Tensor, scales: Sequence[float]
) -> torch.Tensor:
    """[K, C]: the gradient at the centre of each combination of scaled values that axes [S, K] name."""
    with torch.enable_grad():
        rows = center.expand(axes.shape[1], -1).clone().requires_grad_()
        values = torch.cat([v * s for v, s in zip(_values(objective, rows), scales, strict=True)], 1)
        (gradient,) = torch.autograd.grad((values * axes.mT).sum(), rows)
    return gradient
