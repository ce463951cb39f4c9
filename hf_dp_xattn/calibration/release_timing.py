"""How long releases take on this machine."""

from __future__ import annotations

import platform
import statistics
import time

import torch

from ..mechanisms.base import Mechanism
from ..privacy.bits import SeededEntropy

REPEATS = 3


def this_machine() -> str:
    """In words."""
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s)"


def median_seconds(
    prepared: Mechanism[torch.Tensor], rows: torch.Tensor, groups: torch.Tensor | None
) -> float:
    """Of a release with seeded noise: no encoder, no ledger.

    Args:
        prepared: what releases.
        rows: [n, C] public stand-ins.
        groups: [n] their groups, or None.
    """
    times = []
    for i in range(REPEATS + 1):
        start = time.perf_counter()
        prepared.run(rows, groups=groups, entropy=SeededEntropy(i))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one warms up
