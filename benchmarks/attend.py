"""`attend` against exact attention (torch SDPA) for n = 77 ... 262,144 rows, head dim 64, in one run.

Correctness is checked first: with next to no noise and logits inside the declared range, the structure must agree with
exact attention within the Taylor bound, else no time is printed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
from paper_parts.common import attention_relative_error
from scipy.stats import binom

from hf_dp_xattn import DPXAttnConfig, release_attention
from hf_dp_xattn.mechanisms.kernel_sum.features import taylor_relative_error

ROWS = (77, 256, 1024, 2048, 4096, 16384, 65536, 262144)
HEADS, QUERIES, DIM = 2, 1024, 64


def paired(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> list[tuple[float, float]]:
    """Seconds of two functions that take turns, so that both see the same machine."""
    times = []
    first(), second()
    for _ in range(repeats):
        start = time.perf_counter()
        first()
        between = time.perf_counter()
        second()
        times.append((between - start, time.perf_counter() - between))
    return times


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median of what is measured: order statistics, whatever its distribution."""
    ordered = sorted(values)
    skipped = max(0, int(binom.ppf(0.025, len(ordered), 0.5)) - 1)
    return ordered[skipped], ordered[-1 - skipped]


def inside(shape: tuple[int, ...], gen: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=gen)
    return x / x.norm(dim=-1, keepdim=True) * DIM**0.25


def check(degree: int, gen: torch.Generator) -> float:
    """Relative error against exact attention; raises when it is above the bound."""
    query, key = inside((1, 1, 64, DIM), gen), inside((1, 1, 200, DIM), gen)
    value = torch.rand(1, 1, 200, DIM, generator=gen)
    out = release_attention(
        key, value, DPXAttnConfig(mechanism="kernel_sum", unit="row", epsilon=1e9, degree=degree)
    ).attend(query)
    exact = torch.softmax(query @ key.mT / math.sqrt(DIM), -1) @ value
    error = float(((out - exact).abs() / exact).max())
    bound = attention_relative_error(taylor_relative_error(1.0, degree)) + 1e-3
    if not error <= bound:
        raise SystemExit(f"attend is wrong (relative error {error:.3g} > {bound:.3g}): no times are printed.")
    return error


@torch.no_grad()
def measure(rows: tuple[int, ...] = ROWS, degree: int = 2) -> dict[str, object]:
    """Seconds per call of both, and their ratio, for each n; the structure is the same size at every n."""
    warnings.simplefilter("ignore")
    gen = torch.Generator().manual_seed(0)
    error = check(degree, gen)
    query = torch.randn(1, HEADS, QUERIES, DIM, generator=gen)
    results = []
    for n in rows:
        key = torch.randn(1, HEADS, n, DIM, generator=gen)
        value = torch.randn(1, HEADS, n, DIM, generator=gen)
        start = time.perf_counter()
        structure = release_attention(
            key,
            value,
            DPXAttnConfig(mechanism="kernel_sum", unit="row", degree=degree),
            allow_useless=True,  # times do not depend on it
        ).structure
        release_s = time.perf_counter() - start
        pairs = paired(
            lambda s=structure: s.attend(query),  # type: ignore[misc]
            lambda k=key, v=value: torch.nn.functional.scaled_dot_product_attention(query, k, v),  # type: ignore[misc]
            31 if n <= 16384 else 11,
        )
        ratios = [exact / attend for attend, exact in pairs]
        low, high = median_interval(ratios)
        results.append(
            {
                "n": n,
                "attend_s": median(a for a, _ in pairs),
                "sdpa_s": median(e for _, e in pairs),
                "speedup": median(ratios),
                "low": low,
                "high": high,
                "pairs": len(pairs),
                "release_s": release_s,
            }
        )
    memory = sum(t.numel() * t.element_size() for t in structure.tensors().values())
    return {
        "degree": degree,
        "head_dim": DIM,
        "heads": HEADS,
        "queries": QUERIES,
        "threads": torch.get_num_threads(),
        "relative_error_checked": error,
        "structure_bytes": memory,
        "rows": results,
    }
