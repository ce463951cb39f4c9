"""`PrefixCache`: what `release.inputs()` passes as `past_key_values`. It holds public tokens only, and the names of releases."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ....errors import ReleaseError
from ...bindings import unique
from ...placeholder import Tag


class OwnTokens(DynamicLayer):
    """One layer's keys and values of the user's own tokens; it reports `offset` positions more, where head and prefix stand."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset

    @property
    def own(self) -> int:
        return 0 if self.keys is None or self.keys.numel() == 0 else int(self.keys.shape[-2])

    def get_seq_length(self) -> int:
        return self.offset + self.own

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.own + query_length, self.offset

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.own:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.own:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.own:
            super().batch_select_indices(indices)


class Reader(Protocol):
    """Who reads what a cache names."""

    active: bool


class ReaderLink:
    """Which reader a cache was made for: kept by copies, not by what is pickled. None: a trial, which nobody leaves."""

    def __init__(self, reader: Reader | None = None) -> None:
        self._reader = None if reader is None else weakref.ref(reader)

    @property
    def gone(self) -> bool:
        """The reader is no longer there, or no longer reads."""
        reader = None if self._reader is None else self._reader()
        return self._reader is not None and (reader is None or not reader.active)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReaderLink:
        return self

    def __reduce__(self) -> tuple[type[ReaderLink], tuple[()]]:
        return ReaderLink, ()


class PrefixCache(Cache):
    """tags: the binding of each batch element; offset: positions of head and prefix, the same for all; layers: how many.

    elastic: set by `generate`, which repeats each batch element (beams, samples) without telling the cache. expected: how many tokens
    the first forward must be given, set by `generate` too. reader: of the releases; None in a trial that releases nothing.
    """

    def __init__(self, tags: Sequence[Tag], offset: int, layers: int, reader: Reader | None = None) -> None:
        super().__init__(layers=[OwnTokens(offset) for _ in range(layers)])
        self.tags = unique(tags)
        self.index = torch.tensor([self.tags.index(tag) for tag in tags])
        self.offset = offset
        self.elastic = False
        self.expected: int | None = None
        self._reader = ReaderLink(reader)

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises ReleaseError where nobody reads the releases any more: the model would answer as if there were no prefix."""
        if self._reader.gone:
            raise ReleaseError(
                "These inputs name a release of a model that was unprotected since, which would answer without its prefix. Protect the "
                "model and call release.inputs(input_ids=ids) again."
            )
        states: tuple[torch.Tensor, torch.Tensor] = super().update(*args, **kwargs)
        return states

    def __repr__(self) -> str:
        return f"PrefixCache(batch={len(self.index)}, releases={len(self.tags)}, offset={self.offset}, own={self.own})"

    @property
    def own(self) -> int:
        """Own tokens so far."""
        first: Any = self.layers[0]
        return int(first.own)

    def fork(self) -> PrefixCache:
        """A cache that grows apart from this one; layers replace their tensors and never write to them."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    def fit(self, batch: int) -> None:
        """Repeats each element where `generate` did."""
        repeats = batch // max(1, len(self.index))
        if self.elastic and self.own == 0 and repeats > 1 and batch == repeats * len(self.index):
            self.index = self.index.repeat_interleave(repeats)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.index = self.index[beam_idx.to(self.index.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.index = self.index.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.index = self.index[indices.to(self.index.device)]
