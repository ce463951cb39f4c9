"""What answers at one epsilon, as a library stores it, and what was predicted of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...privacy.joint_response import MAX_PARTS, ProductResponse
from ..stored import CHECKS

_ROUNDING = 1e-6


@dataclass(frozen=True)
class LibraryQuality:
    """Predicted on public contexts that were held out: 1 - cosine between a unit and its answer, in the library's own metric.

    0: the unit itself; 1: nothing is known of it but the public mean. low, high: 95 % interval for one context, also of a kind that no
    public text is of (`library_intervals`). exact: of the nearest entry, without noise. contexts: how many were held out.
    """

    distortion: float
    low: float
    high: float
    exact: float
    contexts: int

    def __post_init__(self) -> None:
        for name in ("distortion", "low", "high", "exact"):
            if -_ROUNDING < getattr(self, name) < 0:  # of a text that is its own entry
                object.__setattr__(self, name, 0.0)


@dataclass(frozen=True)
class JointPlan:
    """Of contexts that are one unit in len(lists) parts: which of the plan's lists answers each part, and `ProductResponse`'s `wrong`."""

    lists: tuple[int, ...]
    wrong: int


@dataclass(frozen=True, eq=False)
class LibraryPlan:
    """What answers at one epsilon.

    answers: 1: each unit by itself; 0: the parts of a context that is one unit, all together as `joint` says, where it has a plan for as
    many; else each by itself at its share of epsilon. lists: int64 [K], which of the library's texts stand on each list, rising. shelves:
    (list, near) for each of the library's places, or one for all; near: how many entries have the large odds.
    """

    epsilon: float
    answers: int
    lists: tuple[torch.Tensor, ...]
    shelves: tuple[tuple[int, int], ...]
    quality: LibraryQuality
    joint: tuple[JointPlan, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many entries each list has."""
        return tuple(map(len, self.lists))

    @property
    def entries(self) -> torch.Tensor:
        """All lists in a row."""
        return torch.cat(self.lists)

    def joint_for(self, parts: int) -> JointPlan | None:
        """How contexts of so many parts are answered together; None where they are not."""
        return next((j for j in self.joint if len(j.lists) == parts), None)

    def header(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon,
            "answers": self.answers,
            "sizes": list(self.sizes),
            "shelves": [list(s) for s in self.shelves],
            "joint": [asdict(j) for j in self.joint],
            "quality": asdict(self.quality),
        }

    def described(self) -> tuple[str, str]:
        """(sizes of the lists, near) for tables."""
        sizes = sorted({len(self.lists[i]) for i, _ in self.shelves})
        sizes = sizes if not self.joint else sorted({len(self.lists[i]) for j in self.joint for i in j.lists})
        near = sorted({t for _, t in self.shelves})
        return _range(sizes), _range(near)


def _range(values: list[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def read_plan(i: int, numbers: Mapping[str, Any], entries: torch.Tensor) -> LibraryPlan:
    """The plan that `header` wrote, with its entries."""
    CHECKS.keys(numbers, {"epsilon", "answers", "sizes", "shelves", "joint", "quality"}, f"plan {i}")
    quality = numbers["quality"]
    CHECKS.keys(quality, set(LibraryQuality.__dataclass_fields__), f"the quality of plan {i}")
    sizes = [CHECKS.integer(k, f"a size of plan {i}") for k in numbers["sizes"]]
    if entries.ndim != 1 or sum(sizes) != len(entries) or not sizes:
        CHECKS.refuse(f"the sizes of plan {i}")
    for joint in numbers["joint"]:
        CHECKS.keys(joint, {"lists", "wrong"}, f"a joint answer of plan {i}")
    return LibraryPlan(
        numbers["epsilon"],
        numbers["answers"],
        tuple(entries.split(sizes)),
        tuple((a, b) for a, b in numbers["shelves"]),
        LibraryQuality(**quality),
        tuple(JointPlan(tuple(j["lists"]), j["wrong"]) for j in numbers["joint"]),
    )


def verify_plan(i: int, plan: LibraryPlan, texts: int, unit: str, shelves: tuple[int, ...]) -> None:
    """Raises ConfigError where a plan does not fit a library of so many texts and places."""
    where = f"plan {i}"
    CHECKS.number(plan.epsilon, f"epsilon of {where}", low=1e-9, high=1e9)
    for entries in plan.lists:
        if entries.dtype != torch.int64 or entries.ndim != 1 or not 1 <= len(entries) <= texts:
            CHECKS.refuse(f"entries of {where}")
        if int(entries.min()) < 0 or int(entries.max()) >= texts or not bool((entries.diff() > 0).all()):
            CHECKS.refuse(f"entries of {where} do not rise within the library")
    if len(plan.shelves) not in shelves:
        CHECKS.refuse(f"shelves of {where}")
    for index, near in plan.shelves:
        size = len(plan.lists[CHECKS.integer(index, f"a list of {where}", low=0, high=len(plan.lists) - 1)])
        CHECKS.integer(near, f"near of {where}", high=size - 1)
    CHECKS.integer(plan.answers, f"answers of {where}", low=0 if unit == "context" else 1, high=1)
    if plan.joint and (unit != "context" or plan.answers):
        CHECKS.refuse(f"{where} answers units together")
    for joint in plan.joint:
        parts = [
            CHECKS.integer(k, f"a list of {where}", low=0, high=len(plan.lists) - 1) for k in joint.lists
        ]
        CHECKS.integer(len(parts), f"parts of {where}", high=MAX_PARTS)
        CHECKS.integer(joint.wrong, f"wrong of {where}", low=0, high=len(parts) - 1)
        ProductResponse.of(plan.epsilon, [len(plan.lists[k]) for k in parts], joint.wrong)
    for name in ("distortion", "low", "high", "exact"):
        CHECKS.number(getattr(plan.quality, name), f"{name} of {where}", low=0.0, high=2.0)
    CHECKS.integer(plan.quality.contexts, f"held-out contexts of {where}")


def spread(values: torch.Tensor) -> tuple[float, float, float]:
    """The mean of [n] values and its 95 % interval."""
    mean = float(values.mean())
    half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 1.0
    return mean, max(0.0, mean - half), min(2.0, mean + half)
