"""Contexts unlike all public ones, made of public rows: what a release of them decodes to must not be worse than no release.

A private context may be of a kind that nobody thought of. These stand for it: noise of the rows' mean and deviation, the same with the
rows' covariance, one row again and again, rows of many contexts in one. What they have in common is that each row looks possible, and that
the whole does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ...mechanisms.anchors.sources import pool
from .documents_fit import Documents
from .slots_fit import PublicContexts

CONTEXTS = 64  # of each kind
_NUMBERS = 2**26  # of context space, of all contexts of a kind
_DRAWN = 1024
_DOCUMENT_CONTEXTS = 8


@dataclass(frozen=True, eq=False)
class _Rows:
    """Public rows [N, C] that unlike contexts are made of, their mean and their deviation, and a root [C, r] of their covariance."""

    rows: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor
    root: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, generator: torch.Generator) -> _Rows:
        rows = rows[torch.randperm(len(rows), generator=generator)[:_DRAWN]].float()
        mean = rows.mean(0)
        return cls(rows, mean, rows.std(0), (rows - mean).mT / max(1, len(rows) - 1) ** 0.5)


Maker = Callable[[_Rows, int, torch.Generator], torch.Tensor]


def _noise(public: _Rows, count: int, generator: torch.Generator) -> torch.Tensor:
    return public.mean + public.deviation * torch.randn(count, len(public.mean), generator=generator)


def _covaried(public: _Rows, count: int, generator: torch.Generator) -> torch.Tensor:
    return public.mean + torch.randn(count, public.root.shape[1], generator=generator) @ public.root.mT


def _repeated(public: _Rows, count: int, generator: torch.Generator) -> torch.Tensor:
    return public.rows[torch.randint(len(public.rows), (1,), generator=generator)].expand(count, -1)


def _mixed(public: _Rows, count: int, generator: torch.Generator) -> torch.Tensor:
    return public.rows[torch.randint(len(public.rows), (count,), generator=generator)]


MAKERS: dict[str, Maker] = {
    "noise": _noise,
    "noise of their covariance": _covaried,
    "one row": _repeated,
    "rows of many contexts": _mixed,
}


def unlike_contexts(
    contexts: PublicContexts, public_rows: torch.Tensor, documents: Documents | None, seed: int
) -> Iterator[tuple[str, PublicContexts]]:
    """Each kind, and contexts of it that are of the size of these.

    Args:
        contexts: public ones.
        public_rows: exact ones [p, C] that stand before every context's own.
        documents: where units are documents: some public ones, whose lengths are taken.
        seed: of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    head, units = public_rows.to(torch.float16), contexts.mask.sum(1)
    if documents is None:
        whole = contexts.whole[:, len(head) :]
        there = (whole != 0).any(-1)
        source = _Rows.of(whole[there], generator)
        lengths = torch.maximum(there.sum(1), units)  # of long contexts only a sample of rows is kept
    else:
        source = _Rows.of(documents.rows[documents.mask], generator)
        units = torch.full_like(units, int(units.min()))  # of one length: padding is attended to
        lengths = units * int(documents.mask.sum(1).float().mean().ceil())
    longest = int(lengths.max())
    most = CONTEXTS if documents is None else _DOCUMENT_CONTEXTS
    count = max(4, min(most, len(contexts), _NUMBERS // (longest * head.shape[-1])))
    for name, make in MAKERS.items():
        sequences = [make(source, int(n), generator).half() for n in lengths[:count]]
        pooled = [_units(rows, int(u)) for rows, u in zip(sequences, units[:count], strict=True)]
        yield (
            name,
            PublicContexts(
                torch.nn.utils.rnn.pad_sequence(pooled, batch_first=True),
                torch.arange(max(map(len, pooled))) < units[:count].unsqueeze(1),
                torch.nn.utils.rnn.pad_sequence([torch.cat([head, r]) for r in sequences], batch_first=True),
            ),
        )


def _units(rows: torch.Tensor, count: int) -> torch.Tensor:
    """[count, C]: the rows themselves, or the means of so many stretches of them."""
    if count == len(rows):
        return rows
    return pool(rows.float(), "group", torch.arange(len(rows)) * count // len(rows)).half()
