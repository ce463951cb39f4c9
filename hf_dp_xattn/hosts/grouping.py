"""Which rows are a unit: the part of a charge's scope that groups add. Releases under two groupings do not compose.

*Why.* A release under groups of rows bounds what one GROUP does. Another one of the same context under coarser groups bounds more, under
finer ones less: a coarse unit moves every fine unit in it, and the fine release by as many sensitivities. So the ledger must be told.
Two groupings are the same if they cut the same rows in the same way, whatever their labels; and if several groups are encoded apart from
each other in both, or in neither: encoded together, one group's text moves all rows.
"""

from __future__ import annotations

import torch

Grouping = tuple[bytes, ...]
TEXT = b"text"  # what a text's name begins with


def canonical(labels: torch.Tensor) -> torch.Tensor:
    """Labels [n] numbered by first appearance: equal for all labels of one partition."""
    plain = labels.detach().to("cpu", torch.int64)
    _, inverse = torch.unique(plain, return_inverse=True)
    count = int(inverse.max()) + 1 if len(inverse) else 0
    first = torch.full((count,), len(plain)).scatter_reduce(0, inverse, torch.arange(len(plain)), "amin")
    rank = torch.empty_like(first)
    rank[first.argsort()] = torch.arange(count)
    return rank[inverse]


def partition(labels: torch.Tensor, *, apart: bool) -> Grouping:
    """The grouping of rows [n] by labels. apart: each group is encoded by itself."""
    plain = canonical(labels)
    together = not apart or not bool(plain.any())
    return b"rows" if together else b"rows of groups encoded apart", plain.numpy().tobytes()


def one_text(name: Grouping) -> Grouping:
    """One unit: the text of that name, the same on all hosts and in every corpus that it stands in."""
    return b"phrases of a text", *name


def whole(rows: int) -> Grouping:
    """One group of all rows."""
    return partition(torch.zeros(rows, dtype=torch.int64), apart=False)
