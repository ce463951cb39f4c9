"""What was released of one context, as everything behind it sees it: what serves it, keeps it, saves it. No host, no handle."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..errors import ReleaseError
from ..mechanisms.context_rows import ContextRows
from ..mechanisms.structure import AttentionStructure
from ..report import Guarantee
from .fingerprint import FAR, Fingerprint
from .placeholder import Tag, new_tag


@dataclass(frozen=True, eq=False, repr=False)
class ReleasedContext:
    """One context's release, and the exact public rows [p, C] that stand beside it.

    Either a structure (batch 1) per layer, made for the weights that `fingerprint` shows; or `context`: rows of context space, which serve
    all layers, whatever their weights become if the host projects them anew. rows: length of the placeholder, public. tag: names the
    release in placeholders. What the ledger counted stays with the ledger: it tells what was released before.
    """

    structures: tuple[AttentionStructure, ...]
    guarantee: Guarantee
    public_rows: torch.Tensor
    rows: int
    fingerprint: Fingerprint
    context: ContextRows | None = None
    tag: Tag = field(default_factory=new_tag)

    def __repr__(self) -> str:
        g, layers = self.guarantee, len(self.fingerprint.layers)
        return f"ReleasedContext(rows={self.rows}, mechanism={g.mechanism!r}, epsilon={g.epsilon:g}, layers={layers})"

    def misfit(self, current: Fingerprint, *, projected: bool) -> str | None:
        """Why it cannot serve its host with the weights as they are now, or None. projected: the host makes keys and values of rows by
        its present weights."""
        return self.fingerprint.difference(
            current, math.inf if projected and self.context is not None else None
        )

    def foreign(self, current: Fingerprint, *, projected: bool) -> str | None:
        """Why it is not a release for this host, or None; asked once, when it is loaded."""
        return self.fingerprint.difference(current, FAR if projected and self.context is not None else None)


def require_fit(reason: str | None) -> None:
    """Raises ReleaseError where there is a reason (`ReleasedContext.misfit`)."""
    if reason is not None:
        raise ReleaseError(
            f"The release does not fit this model: {reason}. Restore the weights that it was made with (load or unload the LoRA), or "
            "make a new release, which is charged."
        )


@dataclass(frozen=True, eq=False, repr=False)
class Binding:
    """What a placeholder names: a release, and all exact public rows of this call."""

    context: ReleasedContext
    public_rows: torch.Tensor
    tag: Tag
