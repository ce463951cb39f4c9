"""Naive twins of the anchors decoders, and small hand-made plans."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from hf_dp_xattn.mechanisms.anchors.cells import CellDecoder, Tilt
from hf_dp_xattn.mechanisms.anchors.move import RowMove
from hf_dp_xattn.mechanisms.anchors.plan import AnchorPlan, Decoders, Quality
from hf_dp_xattn.mechanisms.anchors.slots import SlotDecoder, SlotHead

CHANNELS, CODE, SLOTS, HIDDEN, DIRECTIONS, CELLS = 12, 6, 5, 16, 4, 20
QUALITY = Quality(0.5, 0.4, 0.6, 10)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slot_decoder(seed: int = 0) -> SlotDecoder:
    g = gen(seed)

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return SlotDecoder(
        r(HIDDEN, HIDDEN),
        r(SLOTS, DIRECTIONS, HIDDEN + CODE),
        r(DIRECTIONS, CHANNELS),
        r(SLOTS, CHANNELS),
        r(SLOTS, HIDDEN + CODE),
        r(SLOTS),
    )


def slot_head(seed: int = 1) -> SlotHead:
    g = gen(seed)
    return SlotHead(
        torch.randn(HIDDEN, CODE, generator=g),
        torch.randn(HIDDEN, generator=g),
        torch.randn(HIDDEN, generator=g),
        torch.randn(CODE, generator=g),
        torch.randn(CODE, generator=g),
        torch.tensor(2.0),
    )


def naive_slots(
    decoder: SlotDecoder, head: SlotHead, code: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One slot after the other."""
    z = (code - head.center) / head.scale
    h = F.gelu(head.weight @ z + head.bias)
    h = torch.cat([F.gelu(decoder.hidden @ h + head.second_bias), head.gain * z])
    rows, weights = [], []
    for r in range(decoder.slots.shape[0]):
        rows.append(decoder.slots[r] + decoder.directions.T @ (decoder.coefficients[r] @ h))
        weights.append(decoder.log_weights[r] + decoder.weight_map[r] @ h)
    return torch.stack(rows), torch.stack(weights)


def cell_decoder(seed: int = 2, per_cell: int = 1, rows: int = 6) -> CellDecoder:
    g = gen(seed)
    support = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    return CellDecoder(
        torch.randn(CELLS, per_cell, CHANNELS, generator=g),
        torch.arange(CELLS) % 3,
        support,
        torch.log_softmax(torch.randn(CELLS, len(support), generator=g) - support, -1),
        rows,
    )


def tilt(seed: int = 3) -> Tilt:
    g = gen(seed)
    return Tilt(
        torch.randn(7, CODE, generator=g),
        torch.randn(7, generator=g),
        torch.randn(4, 7, generator=g),
        torch.randn(CELLS, 4, generator=g),
        torch.tensor(1.5),
    )


def naive_weights(
    decoder: CellDecoder,
    noised: torch.Tensor,
    rates: tuple[float, float],
    codes: torch.Tensor,
    joint: Tilt | None,
) -> list[float]:
    """Posterior means by Bayes' rule, cell by cell in plain Python."""

    def posterior_mean(c: int, shift: float) -> float:
        mass, total = 0.0, 0.0
        for j, v in enumerate(decoder.support.tolist()):
            z = float(noised[c]) - v
            likelihood = math.exp(-rates[0] * z) if z >= 0 else math.exp(rates[1] * z)
            p = math.exp(float(decoder.log_prior[c, j])) * likelihood * math.exp(shift * min(v, 3.0))
            mass, total = mass + p, total + p * v
        return total / mass

    first = [posterior_mean(c, 0.0) for c in range(len(codes))]
    if joint is None:
        return first
    z = sum(w * codes[c] for c, w in enumerate(first))
    delta = joint.cells @ (joint.outer @ F.gelu(joint.inner @ (z / joint.scale) + joint.inner_bias))
    return [posterior_mean(c, float(delta[c])) for c in range(len(codes))]


def plan(
    release: str,
    *,
    seed: int = 4,
    epsilon: float = 4.0,
    joint: bool = False,
    noise: float | None = None,
    stages: int = 1,
) -> AnchorPlan:
    g = gen(seed)
    shape = (0, 0, CODE) if release == "sum" else (stages, CELLS, CODE)
    return AnchorPlan(
        epsilon=epsilon,
        release=release,
        center=torch.randn(CHANNELS, generator=g),
        reach=torch.full((CHANNELS,), 8.0),
        matrix=torch.randn(CODE, CHANNELS, generator=g) * 0.3,
        bias=torch.randn(CODE, generator=g) * 0.1,
        codes=torch.randn(shape, generator=g),
        bound=2.0,
        share_plus=0.75,
        noise={"sum": 2.0, "response": 0.5, "histogram": 0.0, "mixed": 0.0}[release]
        if noise is None
        else noise,
        head=None if release in ("histogram", "mixed") else slot_head(),
        tilt=tilt() if joint else None,
        quality=QUALITY,
    )


def row_move(seed: int = 8) -> RowMove:
    g = gen(seed)
    root = torch.randn(CODE, CODE, generator=g) * 0.1
    return RowMove(
        torch.tensor(0.4),
        torch.randn(CELLS, CODE, generator=g) * 0.3,
        torch.randn(CHANNELS, CODE, generator=g) * 0.05,
        root @ root.mT + 0.01 * torch.eye(CODE),
    )


def naive_shift(move: RowMove, mean_code: torch.Tensor, weights: list[float], noise: float) -> torch.Tensor:
    """Sum by sum, with an explicit inverse."""
    code = sum(w * move.codes[c].double() for c, w in enumerate(weights)) / sum(weights)
    moment = move.moment.double() + noise**2 * torch.eye(CODE, dtype=torch.float64)
    told = torch.linalg.inv(moment) @ (mean_code.double() - code)
    return torch.stack([sum(b * t for b, t in zip(row.double(), told, strict=True)) for row in move.cross])


def decoders(release: str = "") -> Decoders:
    """With a move of the anchors for a plan that uses one."""
    return Decoders(slot_decoder(), cell_decoder(), row_move() if release == "mixed" else None)
