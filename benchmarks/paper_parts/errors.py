"""Additive error against n, epsilon, r and the number of bins; relative error against eps_s."""

from __future__ import annotations

from typing import Any

import torch

from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.kernel_sum.features import (
    number_of_monomials,
    taylor_relative_error,
)
from hf_dp_xattn.mechanisms.structure import KernelSumStructure

from .common import (
    KERNEL,
    MECHANISMS,
    NOISELESS,
    TREE,
    Rows,
    Sizes,
    attention_relative_error,
    config,
    fit,
    prepare,
    release,
    root_mean_square,
    rows,
)

DIM = 4
PRECISION = 1e-3  # relative, of the integer lattices


def _noise(data: Rows, mechanism: str, epsilon: float, draws: int, **changes: Any) -> list[float]:
    """Root-mean-square difference of each draw's answers to the answers of the same features without noise."""
    clean = release(data, config(KERNEL, NOISELESS, **changes)).attend(data.query)
    settings = config(mechanism, epsilon, **changes)
    found = []
    for seed in range(draws):
        answers = release(data, settings, seed).attend(data.query)
        found.append(float((answers - clean).double().square().mean().sqrt()))
    return found


def against_rows(sizes: Sizes) -> dict[str, Any]:
    """epsilon = 1, d = dv = 4, degree 2. Slopes where the noise is well below the normaliser: the paper's bound is for that."""
    points = []
    for n in sizes.rows:
        data = rows(n, DIM, DIM)
        points.append({"x": n, **{m: _noise(data, m, 1.0, sizes.draws) for m in MECHANISMS}})
    return _fitted(points, "n")


def against_epsilon(sizes: Sizes) -> dict[str, Any]:
    data = rows(sizes.epsilon_rows, DIM, DIM)
    points = [{"x": e, **{m: _noise(data, m, e, sizes.draws) for m in MECHANISMS}} for e in sizes.epsilons]
    scales = {m: [[_scale(data, m, e)] for e in sizes.epsilons] for m in MECHANISMS}
    own = {m: fit(sizes.epsilons, scales[m])["slope"] for m in MECHANISMS}
    return {**_fitted(points, "epsilon"), "rows": sizes.epsilon_rows, "slopes_of_the_noise": own}


def _scale(data: Rows, mechanism: str, epsilon: float) -> float:
    """Size of the noise that the accountant asks for."""
    few = LayerRows([data.key[:, :2]], [data.value[:, :2]])
    return float(prepare(data, config(mechanism, epsilon)).run(few).guarantee.sigma)


def _fitted(points: list[dict[str, Any]], by: str) -> dict[str, Any]:
    # an answer lies in [0, 1] and an error above 0.1 is no longer linear in the noise of the normaliser
    slopes = {}
    for m in MECHANISMS:
        linear = [p for p in points if root_mean_square(p[m]) < 0.1]
        if len(linear) > 1:
            slopes[m] = {**fit([p["x"] for p in linear], [p[m] for p in linear]), "points": len(linear)}
    return {
        "by": by,
        "points": [{"x": p["x"], **{m: root_mean_square(p[m]) for m in MECHANISMS}} for p in points],
        "slopes": slopes,
    }


def sums_noise(data: Rows, mechanism: str, draws: int, **changes: Any) -> list[float]:
    """Noise of the numerators and the normaliser themselves, in rows: it does not depend on n, so small contexts do."""
    settings = config(mechanism, 1.0, **changes)
    clean = answers(release(data, config(mechanism, NOISELESS, **changes)), data)
    return [
        float((answers(release(data, settings, seed), data) - clean)[..., :-1].square().mean().sqrt())
        for seed in range(draws)
    ]


def answers(structure: KernelSumStructure, data: Rows) -> torch.Tensor:
    """[H, m, dv + 1] float64 numerators and normaliser, before the ratio."""
    mapped = structure.query_map.double() @ data.query[0].double().mT
    sums = structure.sums[0].double()
    return structure.features.query_sums(mapped, structure.table.double(), sums).mT


def against_features(sizes: Sizes) -> dict[str, Any]:
    """epsilon = 1; r grows with the dimension of keys (degree 2), dv = 4; the tree with 64 bins."""
    points = []
    for d in sizes.dims:
        data = rows(64, d, DIM, queries=32)
        noise = {m: sums_noise(data, m, sizes.noise_draws) for m in MECHANISMS}
        points.append({"x": number_of_monomials(d, 2), "d": d, **noise})
    slopes = {m: fit([p["x"] for p in points], [p[m] for p in points]) for m in MECHANISMS}
    return {"points": [_summary(p) for p in points], "slopes": slopes}


def against_bins(sizes: Sizes) -> dict[str, Any]:
    """epsilon = 1, d = dv = 4: what the levels of the trees cost, which squares do not read."""
    data = rows(64, DIM, DIM, queries=32)
    kernel = sums_noise(data, KERNEL, sizes.noise_draws)
    points = [
        {"x": b, TREE: sums_noise(data, TREE, sizes.noise_draws, tree_bins=b), KERNEL: kernel}
        for b in sizes.bins
    ]
    return {"points": [_summary(p) for p in points]}


def _summary(point: dict[str, Any]) -> dict[str, Any]:
    out = {k: root_mean_square(v) if isinstance(v, list) else v for k, v in point.items()}
    return {**out, "factor": out[TREE] / out[KERNEL]}


def poles(bound: float, n: int = 256) -> Rows:
    """Logits at both ends of [-bound, bound] (just within, where nothing is clipped), values that tell the ends apart: the worst case."""
    sign = torch.ones(n)
    sign[n // 2 :] = -1.0
    axis = torch.zeros(DIM)
    axis[0] = (bound * DIM**0.5) ** 0.5 * (1 - 1e-6)
    value = torch.stack([sign > 0, sign < 0], -1).float()
    return Rows((sign[:, None] * axis)[None], value[None], torch.stack([axis, -axis])[None, None])


def relative() -> dict[str, Any]:
    """Without visible noise: the largest relative error of an answer, against the paper's 2 eps_s / (1 - eps_s) (for eps_s < 1)."""
    points = []
    for degree in (1, 2, 3, 4):
        for bound in (0.25, 0.5, 1.0, 1.5):
            eps_s = taylor_relative_error(bound, degree)
            if eps_s >= 1:
                continue
            limit = attention_relative_error(eps_s)
            found = dict.fromkeys(MECHANISMS, 0.0)
            for data in (rows(256, DIM, DIM, queries=256, bound=bound), poles(bound)):
                for m in MECHANISMS:
                    settings = config(m, NOISELESS, degree=degree, logit_bound=bound, tree_bins=1)
                    out = release(data, settings).attend(data.query).double()
                    found[m] = max(found[m], float(((out - data.exact()).abs() / data.exact()).max()))
            points.append({"degree": degree, "bound": bound, "eps_s": eps_s, "limit": limit, **found})
            for m in MECHANISMS:
                if found[m] > limit + PRECISION:
                    raise SystemExit(
                        f"{m}: relative error {found[m]:.3g} above the paper's bound {limit:.3g}: nothing is printed."
                    )
    return {"points": points, "precision": PRECISION}
