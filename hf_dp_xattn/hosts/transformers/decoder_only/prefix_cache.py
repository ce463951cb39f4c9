"""`PrefixCache`: what `release.inputs()` passes as `past_key_values`. It holds public tokens only, and the names of releases."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ....errors import ReleaseError
from ...bindings import unique
from ...placeholder import Tag

if TYPE_CHECKING:
    from .prefix_attention import Calls


class SuffixTokens(DynamicLayer):
    """One layer's keys and values of the user's own tokens; it reports `offset` positions more, where head and prefix stand."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset

    @property
    def suffix(self) -> int:
        return 0 if self.keys is None or self.keys.numel() == 0 else int(self.keys.shape[-2])

    def get_seq_length(self) -> int:
        return self.offset + self.suffix

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.suffix + query_length, self.offset

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.suffix:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.suffix:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.suffix:
            super().batch_select_indices(indices)


NOT_READ = (
    "These inputs name a release, and the model that was called reads none (it was unprotected since, or is another one than they were "
    "made for): it would answer without its prefix. Protect it and call release.inputs(input_ids=ids) again."
)


class ReaderLink:
    """The calls of the model whose gate read a cache last: kept by copies, not by what is pickled. None: no gate has."""

    def __init__(self, calls: Calls | None = None) -> None:
        self._calls = None if calls is None else weakref.ref(calls)

    def reads(self, cache: PrefixCache) -> bool:
        """Whether the forward that runs in this thread is one that its gate has entered with this cache."""
        calls = None if self._calls is None else self._calls()
        call = None if calls is None else calls.current
        # a compiled graph is not to depend on which cache it is
        return call is not None and (torch.compiler.is_compiling() or call.cache is cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReaderLink:
        return self

    def __reduce__(self) -> tuple[type[ReaderLink], tuple[()]]:
        return ReaderLink, ()


class PrefixCache(Cache):
    """tags: the binding of each batch element; offset: positions of head and prefix, the same for all; layers: how many.

    elastic: set by `generate`, which repeats each batch element (beams, samples) without telling the cache. expected: how many tokens
    the first forward must be given, set by `generate` too. trial: of public rows, which no gate reads.
    """

    def __init__(self, tags: Sequence[Tag], offset: int, layers: int, *, trial: bool = False) -> None:
        super().__init__(layers=[SuffixTokens(offset) for _ in range(layers)])
        self.tags = unique(tags)
        self.index = torch.tensor([self.tags.index(tag) for tag in tags])
        self.offset = offset
        self.elastic = False
        self.expected: int | None = None
        self._trial = trial
        self._reader = ReaderLink()

    def read_by(self, calls: Calls) -> None:
        """The gate of these calls has read what it names."""
        self._reader = ReaderLink(calls)

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises ReleaseError where nobody reads the releases: the model would answer as if there were no prefix."""
        if not (self._trial or self._reader.reads(self)):
            raise ReleaseError(NOT_READ)
        states: tuple[torch.Tensor, torch.Tensor] = super().update(*args, **kwargs)
        return states

    def __repr__(self) -> str:
        return f"PrefixCache(batch={len(self.index)}, releases={len(self.tags)}, offset={self.offset}, suffix={self.suffix})"

    @property
    def suffix(self) -> int:
        """Own tokens so far."""
        first: Any = self.layers[0]
        return int(first.suffix)

    def fork(self) -> PrefixCache:
        """A cache that grows apart from this one; layers replace their tensors and never write to them."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    def fit(self, batch: int) -> None:
        """Repeats each element where `generate` did."""
        repeats = batch // max(1, len(self.index))
        if self.elastic and self.suffix == 0 and repeats > 1 and batch == repeats * len(self.index):
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
