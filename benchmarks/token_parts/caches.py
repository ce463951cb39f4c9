"""Caches of an unprotected decoder-only model that hold n private rows from the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [1, H, n, d]."""


class InPlaceLayer(DynamicLayer):
    """Keys and values in memory that was taken beforehand: a new token is written behind the others, and nothing is copied.

    `DynamicLayer` copies all rows at each token; `StaticLayer` does not, and asks for a mask. This has the costs of neither.
    """

    def __init__(self, rows: Pair, room: int) -> None:
        super().__init__()
        self._buffers = tuple(torch.nn.functional.pad(t, (0, 0, 0, room)) for t in rows)
        self.dtype, self.device = rows[0].dtype, rows[0].device
        self.is_initialized = True
        self._private = rows[0].shape[2]
        self.rewind()

    def rewind(self) -> None:
        """Forgets all but the private rows."""
        self._show(self._private)

    def _show(self, length: int) -> None:
        self.keys, self.values = (b[:, :, :length] for b in self._buffers)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        start = self.get_seq_length()
        self._show(start + key_states.shape[2])
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def release_rows(self) -> Pair:
        """The private rows, which this layer no longer holds: there is memory for one copy only."""
        self.rewind()
        rows = self.keys, self.values
        self.keys = self.values = None
        self._buffers = ()
        return rows


class InPlaceCache(Cache):
    """The fairest opponent: the private rows, and room for the tokens of one question and its answer."""

    def __init__(self, rows: Sequence[Pair] | Any, room: int) -> None:
        super().__init__(layers=[InPlaceLayer(pair, room) for pair in rows])

    def rewind(self) -> None:
        for layer in self.layers:
            layer.rewind()


def dynamic(cache: InPlaceCache) -> Cache:
    """transformers' default cache over the same rows, which it takes away."""
    layers = []
    for layer in cache.layers:
        grown = DynamicLayer()
        grown.keys, grown.values = layer.release_rows()
        grown.dtype, grown.device, grown.is_initialized = grown.keys.dtype, grown.keys.device, True
        layers.append(grown)
    return Cache(layers=layers)
