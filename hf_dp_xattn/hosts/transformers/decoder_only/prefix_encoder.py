"""From token ids of a prefix to its rows of context space, with the model's own attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ....errors import ContextError
from ....unquoted import unquoted
from ...content_names import special_ids
from ...private_run import private_run
from .prefix_layers import PrefixLayer, rows_of, run_recorded
from .prefix_probing import FixedLimits, position_limit


class PrefixEncoder:
    """Runs the model's body over a prefix and keeps the keys and values that its layers hand to their attention."""

    def __init__(self, model: Any, layers: dict[str, PrefixLayer]) -> None:
        self._model, self._layers = model, layers
        self.special_ids = special_ids(model)
        self._fixed = FixedLimits.of(model)

    @property
    def limit(self) -> int | None:
        return position_limit(self._model, self._fixed)

    def check(self, head: int, slots: int) -> None:
        """Raises ContextError where the model has no position left for a user's token."""
        limit = self.limit
        if limit is not None and head + slots >= limit:
            raise ContextError(
                f"A public head of {head} tokens and a prefix of {slots} positions (padded) leave no room for a user's tokens: this model "
                f"has {limit}. Shorten it, split it into segments, or pass a smaller prefix_bucket; nothing was spent."
            )

    @torch.no_grad()
    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, C]: the rows of tokens [n] at positions 0, 1, ...; one sequence at a time, so that no other can change its rounding."""

        def rows() -> torch.Tensor:
            with private_run(self._model):
                return rows_of(run_recorded(self._model, self._layers, ids.unsqueeze(0)))[0]

        return unquoted(
            rows,
            lambda kind: ContextError(
                f"The model failed on a prefix ({kind}). Nothing was released; what was charged stays charged."
            ),
        )

    def encode(
        self, head: torch.Tensor, segments: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Private rows [n, C] of all segments, and the head's [h, C].

        Each segment is run after the head by itself: its positions start at h, and it attends to the head and itself only.
        """
        h = len(head)
        private = [self.run(torch.cat([head, segment]))[h:] for segment in segments]
        rows = torch.cat(private)
        return rows, self.run(head) if h else rows[:0]
