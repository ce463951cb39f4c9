"""How attention functions of transformers models read a release: shared key heads, capped logits, exact public rows beside it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import DPXAttnError, ProtectionLostError
from ...mechanisms.merge import exact_partial, merge
from ...mechanisms.rows_structure import RowsStructure
from ...mechanisms.structure import AttentionStructure
from ..access import NO_COPY, Access, permitted
from ..tables import LayerTable
from .generating import ThreadCalls

Public = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys [B, H, P, d], values [B, H, P, dv] and bias [B, 1, 1, P] of exact public rows."""


T = TypeVar("T")


class Probing(threading.local, Generic[T]):
    """What this thread's attention function does in place of reading a release, while a probe runs a model. now: None outside of one."""

    now: T | None = None

    @contextmanager
    def __call__(self, state: T) -> Iterator[T]:
        before, self.now = self.now, state
        try:
            yield state
        finally:
            self.now = before


@dataclass(frozen=True)
class LayerState:
    """What the attention function finds on a module.

    calls: the forward that each thread is in. config: the host's own, which names the host's own attention. access: whether what is public
    may pass, never without. padding: zero channels of a head.
    """

    name: str
    calls: ThreadCalls
    config: Any
    access: Access | None = None
    padding: int = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(NO_COPY)


def served(module: nn.Module, attribute: str, refusal: str) -> tuple[LayerState, Any]:
    """A layer, and what it may read in the forward that this thread is in. Raises ProtectionLostError, with that refusal, where it is none
    of ours, in no forward, or in a public one that is not permitted."""
    state: LayerState | None = module.__dict__.get(attribute)
    call = None if state is None else state.calls.current
    if state is None or call is None:
        raise ProtectionLostError(refusal)
    if call.public and (state.access is None or not permitted(state.access)):
        raise ProtectionLostError(refusal)
    return state, call


def host_attention(module: nn.Module, implementation: str) -> Any:
    """The host's own attention function."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def group_queries(query: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, Hq, m, d] -> [B, heads, Hq / heads * m, d]: query heads that share a key head become more queries."""
    batch, query_heads, m, d = query.shape
    return query.reshape(batch, heads, query_heads // heads * m, d)


def ungroup(out: torch.Tensor, query_heads: int, m: int) -> torch.Tensor:
    return out.reshape(out.shape[0], query_heads, m, out.shape[-1])


def read(
    table: LayerTable, query: torch.Tensor, index: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """[B, H, m, dv]: attention of each element to its binding, exact public rows included.

    Kernel sums ignore `softcap`: capping is far from the logits that they keep (`logit_bound`).
    """
    structure, public = _chosen(table, index)
    if public is None and not (softcap is not None and isinstance(structure, RowsStructure)):
        return structure.attend(query)
    return _partial(structure, public, query, scale, softcap)[0].to(query.dtype)


def read_partial(
    table: LayerTable, query: torch.Tensor, index: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `read`, to be merged with other rows: out [B, H, m, dv] and log-sum-exp [B, H, m], float32 or wider."""
    return _partial(*_chosen(table, index), query, scale, softcap)


def _chosen(table: LayerTable, index: torch.Tensor) -> tuple[AttentionStructure, Public | None]:
    """Each element's structure, and its exact public rows."""
    structure, key, value, bias = table.structure, table.public_key, table.public_value, table.public_bias
    assert structure is not None and table.tags is not None
    if len(table.tags) > 1:  # a single one serves the batch by broadcasting
        structure = structure.select(index)
        if key is not None and value is not None and bias is not None:
            key, value, bias = (t.index_select(0, index) for t in (key, value, bias))
    return structure, None if key is None or value is None else (key, value, bias)


def _partial(
    structure: AttentionStructure,
    public: Public | None,
    query: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if softcap is not None and isinstance(structure, RowsStructure):
        out, lse = exact_partial(
            query, structure.key, structure.value, structure.scale, structure.bias, softcap
        )
    else:
        out, lse = structure.partial(query)
    if public is None:
        return out, lse
    key, value, bias = public
    return merge(out, lse, *exact_partial(query, key, value, scale, bias, softcap))
