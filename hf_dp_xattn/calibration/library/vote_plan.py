"""`VotePlan`: which texts a list of units votes for, with which noise, and how well that does beside answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..stored import CHECKS
from .stored_plan import LibraryQuality


@dataclass(frozen=True, eq=False)
class VotePlan:
    """Votes at one epsilon, for lists of about `units` units.

    share_plus: of epsilon (`PreparedVotes`). dispersion: of the prior (`Reading`). answers: distortion of answers for such lists.
    quality: of the votes. entries [K]: int64, rising. share [K]: how often each stands in public contexts, of sum 1.
    """

    epsilon: float
    units: int
    share_plus: float
    dispersion: float
    answers: float
    quality: LibraryQuality
    entries: torch.Tensor
    share: torch.Tensor

    FIELDS = ("epsilon", "units", "share_plus", "dispersion", "answers")

    @property
    def better(self) -> bool:
        """Whether held-out lists were better served by votes than by answers."""
        return self.quality.distortion < self.answers

    def header(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in self.FIELDS}, "quality": asdict(self.quality)}

    @classmethod
    def read(cls, i: int, numbers: Mapping[str, Any], entries: torch.Tensor, share: torch.Tensor) -> VotePlan:
        where = f"votes {i}"
        CHECKS.keys(numbers, {*cls.FIELDS, "quality"}, where)
        fields = {name: numbers[name] for name in cls.FIELDS}
        CHECKS.keys(numbers["quality"], set(LibraryQuality.__dataclass_fields__), f"the quality of {where}")
        return cls(**fields, quality=LibraryQuality(**numbers["quality"]), entries=entries, share=share)

    def verify(self, i: int, texts: int) -> None:
        where = f"votes {i}"
        CHECKS.number(self.epsilon, f"epsilon of {where}", low=1e-9, high=1e9)
        CHECKS.integer(self.units, f"units of {where}")
        CHECKS.number(self.share_plus, f"share_plus of {where}", low=0.01, high=0.99)
        CHECKS.number(self.dispersion, f"dispersion of {where}", low=1e-6, high=1e6)
        CHECKS.number(self.answers, f"answers of {where}", low=0.0, high=2.0)
        entries, share = self.entries, self.share
        if entries.dtype != torch.int64 or entries.ndim != 1 or not 2 <= len(entries) <= texts:
            CHECKS.refuse(f"entries of {where}")
        if int(entries.min()) < 0 or int(entries.max()) >= texts or not bool((entries.diff() > 0).all()):
            CHECKS.refuse(f"entries of {where} do not rise within the library")
        sound = share.shape == entries.shape and share.is_floating_point() and bool(share.isfinite().all())
        if not sound or not bool((share > 0).all()):
            CHECKS.refuse(f"shares of {where}")
        for name in ("distortion", "low", "high", "exact"):
            CHECKS.number(getattr(self.quality, name), f"{name} of {where}", low=0.0, high=2.0)


def chosen(plans: Sequence[VotePlan], epsilon: float, units: int) -> VotePlan:
    """The plan made for the epsilon nearest to this one (in ratio) and the longest lists that are no longer than `units`, if any."""
    near = min((p.epsilon for p in plans), key=lambda e: max(e / epsilon, epsilon / e))
    near_plans = sorted((p for p in plans if p.epsilon == near), key=lambda p: p.units)
    return max((p for p in near_plans if p.units <= units), key=lambda p: p.units, default=near_plans[0])
