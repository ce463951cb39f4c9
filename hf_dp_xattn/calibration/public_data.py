"""`PublicData`: what a host makes of public contexts, and all that a calibration is fitted to. Nothing private may be in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..mechanisms.anchors.sources import pool
from ..mechanisms.base import LayerSpec
from .anchors.anchors_calibration import HostIdentity
from .anchors.documents_fit import Documents
from .anchors.objective import Objective
from .anchors.slots_fit import PublicContexts
from .library.text_library import Encode


@dataclass(frozen=True, eq=False)
class PublicData:
    """Public contexts and the layers that read them.

    Args:
        objective: the layers with their public queries, the exact public rows beside every context, and the host's logits where its
            replies count.
        grouping: how units were encoded, "rows", "phrases", "segments" or "context".
        host: what tells this host from others (`anchors`).
        contexts: units and rows of every context (`anchors`).
        documents: public documents, where units are documents that a histogram may count (`anchors`).
        row_flops: multiplications and additions of one row's keys and values in all layers; 0 where they are parts of a row.
        validation: contexts that are held out, at most (`anchors`).
        specs: shapes of the layers (`kernel_sum`).
        rows: gives each context's private rows [n, C], as often as it is called (`kernel_sum`).
        count: how many contexts `rows` gives.
        groups: [n] the unit of each row, for all contexts or for each (`kernel_sum` with unit="group").
    """

    objective: Objective
    grouping: str
    host: HostIdentity | None = None
    contexts: PublicContexts | None = None
    documents: Documents | None = None
    row_flops: float = 0.0
    validation: int = 400
    specs: Sequence[LayerSpec] = ()
    rows: Callable[[], Iterable[torch.Tensor]] = tuple
    count: int = 0
    groups: torch.Tensor | Sequence[torch.Tensor] | None = None


@dataclass(frozen=True, eq=False)
class PublicTexts:
    """Public contexts as texts (`library`).

    Args:
        units: of each context.
        grouping: how contexts were cut in units.
        encode: n strings -> float codes [n, C], each a function of its string alone.
        encoder: its name.
        flatten: how alike the directions of its codes count (`LibraryOptions`).
    """

    units: Sequence[Sequence[str]]
    grouping: str
    encode: Encode
    encoder: str
    flatten: float


def choose_contexts(public: Any, bytes_each: int, memory_mb: int, seed: int) -> list[Any]:
    """The public contexts to fit to: all of them, or a random subset that fits the memory; drawn before anything is encoded."""
    room = max(64, int(memory_mb * 2**20 / max(1, bytes_each)))
    if len(public) <= room:
        return list(public)
    order = torch.randperm(len(public), generator=torch.Generator().manual_seed(seed))[:room].tolist()
    return [public[i] for i in sorted(order)]


def pooled(rows: torch.Tensor, unit: str, groups: torch.Tensor | None = None) -> torch.Tensor:
    """[n, C] -> [U, C] in the same dtype: what a release treats as one row each."""
    return rows if unit == "row" else pool(rows.float(), unit, groups).to(rows.dtype)


def equal_contexts(rows: torch.Tensor, unit: str, whole: torch.Tensor | None = None) -> PublicContexts:
    """Contexts of one length.

    Args:
        rows: [N, n, C], private ones.
        unit: "row" or "context".
        whole: [N, n', C], those whose attention counts; by default the private ones.
    """
    units = rows if unit == "row" else torch.stack([pooled(r, unit) for r in rows])
    return PublicContexts(
        units, torch.ones(units.shape[:2], dtype=torch.bool), rows if whole is None else whole
    )
