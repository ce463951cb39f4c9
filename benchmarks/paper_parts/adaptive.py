"""An adversary that knows the data, sees every answer, and chooses each query to make the error larger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_dp_xattn.mechanisms.dptree import DPTreeSoftmax
from hf_dp_xattn.mechanisms.kernel_sum.features import TaylorFeatures
from hf_dp_xattn.mechanisms.kernel_sum.kernel_sum import PreparedKernelSum
from hf_dp_xattn.privacy.bits import SeededEntropy

from .common import DELTA, KERNEL, NOISELESS, Sizes, config, prepare, release, rows
from .median_of_copies import MedianOfCopies, copies_for, gaussian_uniform_bound, net_size

EPSILON, BETA = 2.0, 1e-6
WIDTH = 0.25  # of the net
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
    """One sum of weighted kernels, numbers in rows: in one coordinate, where the net of the paper's argument can be had, and in four."""
    found = {}
    for d in (1, 4):
        for seed in range(sizes.adversary_seeds):
            for name, (error, bound) in _cases(d, seed).items():
                fixed, worst = attack(error, d, 1.0, sizes.adversary, seed)
                if worst > bound:
                    raise SystemExit(
                        f"{name}: the adversary found {worst:.3g}, above {bound:.3g}: nothing is printed."
                    )
                old = found.get((name, d), {"fixed": 0.0, "adaptive": 0.0})
                found[name, d] = {
                    "fixed": max(old["fixed"], fixed),
                    "adaptive": max(old["adaptive"], worst),
                    "bound": bound,
                }
    return {
        "queries": sizes.adversary[0] * sizes.adversary[1],
        "copies": _copies(1),
        "epsilon": EPSILON,
        "beta": BETA,
        "found": [{"release": name, "coordinates": d, **v} for (name, d), v in found.items()],
        "seeds": sizes.adversary_seeds,
    }


def _copies(d: int) -> int:
    return copies_for(net_size(1.0, WIDTH, d), BETA)


def _cases(d: int, seed: int) -> dict[str, tuple[Error, float]]:
    """Releases with their true error at mapped queries, and the bound for all queries at once."""
    data, features, source = rows(60, d, 1, seed=3), TaylorFeatures(d, 2), SeededEntropy(seed)
    keys, weights = data.key[0], data.value[0, :, 0]
    half = d**-0.25  # from keys and queries to mapped ones
    total = features.key_features(keys.double() * half).mT @ weights.double()

    def tree(epsilon: float, delta: float) -> DPTreeSoftmax:
        return DPTreeSoftmax.init(keys, weights, bins=2, epsilon=epsilon, delta=delta, entropy=source)

    def error_of(released: DPTreeSoftmax | MedianOfCopies) -> Error:
        return lambda y: released.query(y / half)[..., 0] - features.key_features(y) @ total

    one = tree(EPSILON, DELTA)
    prepared = prepare(data, config(KERNEL, EPSILON))
    assert isinstance(prepared, PreparedKernelSum)
    noise = release(data, config(KERNEL, EPSILON), seed).sums - release(data, config(KERNEL, NOISELESS)).sums
    limit = gaussian_uniform_bound(prepared.sigma, features.size, features.key_norm_bound(1.0), BETA)
    cases: dict[str, tuple[Error, float]] = {
        "one release of trees": (error_of(one), one.uniform_error_bound(BETA)),
        "kernel_sum": (lambda y: features.monomials(y) @ noise[0, 0, :, 0].double(), limit),
    }
    if d == 1:
        median = MedianOfCopies.init(tree, copies=_copies(d), epsilon=EPSILON, delta=DELTA)
        member = median.copies[0]
        assert isinstance(member, DPTreeSoftmax)
        within = member.error_bound(0.25) + WIDTH * member.lipschitz_bound(BETA / _copies(d))
        cases["median of copies"] = (error_of(median), within)
    return cases
