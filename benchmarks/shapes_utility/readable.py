"""When a prompt is called readable from its picture; fixed before anything was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Readable:
    """readable: smallest epsilon measured from which on accuracy stays at least halfway from the public to the unprotected one; below: the
    largest measured under it. above_public: smallest epsilon whose interval lies above the public prompt's."""

    readable: float | None
    below: float | None
    above_public: float | None
    largest: float


def find_readable(lines: Sequence[dict[str, Any]], public: dict[str, Any], plain: dict[str, Any]) -> Readable:
    """From one method's accuracies at several epsilons, and the two references."""
    ordered = sorted(lines, key=lambda v: v["epsilon"])
    halfway = (public["accuracy"] + plain["accuracy"]) / 2
    start = len(ordered)
    while start > 0 and ordered[start - 1]["accuracy"] >= halfway:
        start -= 1
    above = [v["epsilon"] for v in ordered if v["low"] > public["high"]]
    return Readable(
        readable=ordered[start]["epsilon"] if start < len(ordered) else None,
        below=ordered[start - 1]["epsilon"] if start > 0 else None,
        above_public=above[0] if above else None,
        largest=ordered[-1]["epsilon"],
    )
