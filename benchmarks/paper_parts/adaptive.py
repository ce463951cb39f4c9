"""An adversary that knows the data, sees every answer, and chooses each query to make the error larger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_dp_xattn.mechanisms.dptree import DPTreeSoftmax, MedianOfCopies
from hf_dp_xattn.mechanisms.dptree.adaptive import copies_for, gaussian_uniform_bound, net_size
from hf_dp_xattn.mechanisms.features import TaylorFeatures
from hf_dp_xattn.mechanisms.kernel_sum import PreparedKernelSum
from hf_dp_xattn.privacy.bits import SeededEntropy

from .common import DELTA, KERNEL, NOISELESS, Sizes, config, prepare, release, rows
from .errors import answers

EPSILON, BETA = 2.0, 1e-6
Error = Callable[[torch.Tensor], torch.Tensor]


def into_ball(y: torch.Tensor, radius: float) -> torch.Tensor:
    return y * (radius / y.norm(dim=-1, keepdim=True)).clamp_max(1.0)


def attack(error: Error, dim: int, radius: float, size: tuple[int, int], seed: int) -> tuple[float, float]:
    """(largest error of as many fixed queries, largest that the adversary finds): chains that keep what was worse, steps that adapt."""
    chains, rounds = size
    gen = torch.Generator().manual_seed(seed)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(count, dim, generator=gen, dtype=torch.float64)

    plain = float(error(into_ball(normal(chains * rounds) * radius * 0.6, radius)).abs().max())
    y, step = into_ball(normal(chains) * radius * 0.6, radius), torch.full((chains, 1), radius / 2).double()
    best = error(y).abs()
    for _ in range(rounds - 1):
        other = into_ball(y + step * normal(chains), radius)
        found = error(other).abs()
        better = (found > best).unsqueeze(-1)
        y, best = torch.where(better, other, y), torch.maximum(best, found)
        step = step * torch.where(better, 1.6, 0.85)
    return plain, float(best.max())


def adversary(sizes: Sizes) -> dict[str, Any]:
    """One sum of weighted kernels, numbers in rows; one coordinate, where the net of the paper's argument can be had."""
    d, n, width = 1, 60, 0.25
    data = rows(n, d, 1, seed=3)
    keys, weights = data.key[0], data.value[0, :, 0]
    features = TaylorFeatures(d, 2)
    total = features.key_features(keys.double() * d**-0.25).mT @ weights.double()

    def truth(y: torch.Tensor) -> torch.Tensor:
        return features.key_features(y) @ total

    def tree(epsilon: float, delta: float, source: SeededEntropy) -> DPTreeSoftmax:
        return DPTreeSoftmax.init(keys, weights, bins=2, epsilon=epsilon, delta=delta, entropy=source)

    copies = copies_for(net_size(1.0, width, d), BETA)
    prepared = prepare(data, config(KERNEL, EPSILON))
    assert isinstance(prepared, PreparedKernelSum)
    clean = answers(release(data, config(KERNEL, NOISELESS)), data)
    assert bool(torch.isfinite(clean).all())
    found: dict[str, list[dict[str, float]]] = {
        "one release of trees": [],
        "median of copies": [],
        "kernel_sum": [],
    }
    for seed in range(sizes.adversary_seeds):
        source = SeededEntropy(seed)
        one = tree(EPSILON, DELTA, source)
        median = MedianOfCopies.init(
            lambda e, q, s=source: tree(e, q, s), copies=copies, epsilon=EPSILON, delta=DELTA
        )  # type: ignore[misc]
        member = median.copies[0]
        assert isinstance(member, DPTreeSoftmax)
        within = member.error_bound(0.25) + width * member.lipschitz_bound(BETA / copies)
        noised = (
            release(data, config(KERNEL, EPSILON), seed).sums - release(data, config(KERNEL, NOISELESS)).sums
        )
        limit = gaussian_uniform_bound(prepared.sigma, features.size, features.key_norm_bound(1.0), BETA)

        def kernel(y: torch.Tensor, noised: torch.Tensor = noised) -> torch.Tensor:
            # queries in mapped coordinates, numerators' noise
            return features.monomials(y) @ noised[0, 0, :, 0].double()

        cases: dict[str, tuple[Error, float]] = {
            "one release of trees": (
                lambda y, t=one: t.query(y)[..., 0] - truth(y),
                one.uniform_error_bound(BETA),
            ),  # type: ignore[misc]
            "median of copies": (lambda y, t=median: t.query(y)[..., 0] - truth(y), within),  # type: ignore[misc]
            "kernel_sum": (kernel, limit),
        }
        for name, (error, bound) in cases.items():
            plain, worst = attack(error, d, 1.0, sizes.adversary, seed)
            if worst > bound:
                raise SystemExit(
                    f"{name}: the adversary found {worst:.3g}, above the bound {bound:.3g}: nothing is printed."
                )
            found[name].append({"fixed": plain, "adaptive": worst, "bound": bound})
    return {
        "queries": sizes.adversary[0] * sizes.adversary[1],
        "copies": copies,
        "epsilon": EPSILON,
        "beta": BETA,
        "found": {k: {q: max(r[q] for r in v) for q in v[0]} for k, v in found.items()},
        "seeds": sizes.adversary_seeds,
    }
