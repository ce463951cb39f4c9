"""Public texts are encoded once: their rows are kept by the texts' token ids as long as they fit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch


class EncodeOnce:
    """Keeps `memory_mb` of rows; forgets them all where more come."""

    def __init__(self, memory_mb: int) -> None:
        self._known: dict[Hashable, torch.Tensor] = {}
        self._room = memory_mb * 2**20
        self._held = 0

    def rows(
        self, names: Sequence[Hashable], encode: Callable[[list[int]], Iterable[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Each text's rows [n, C].

        Args:
            names: what tells the texts apart; equal ones have equal rows.
            encode: gives the rows of the texts at some indices, in their order.
        """
        new = list({n: i for i, n in enumerate(names) if n not in self._known}.values())
        if new:
            self._known |= zip((names[i] for i in new), encode(new), strict=True)
        rows = [self._known[n] for n in names]
        self._held += sum(rows[i].nbytes for i in new)
        if self._held > self._room:
            self._known, self._held = {}, 0
        return rows
