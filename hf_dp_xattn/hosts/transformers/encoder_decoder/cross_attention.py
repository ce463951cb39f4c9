"""`dp_xattn`: the attention function that cross-attention layers of protected encoder-decoder models are given.

A layer is told by its module's attribute which layer it is, and by the thread's current `Call` which release each batch element reads.
Of the keys and values that its host hands over it reads only that they are NaN: what it attends to comes from the release.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from ....errors import ProtectionLostError
from ....mechanisms.merge import exact_partial
from ...tables import LayerTable
from ..generating import ThreadCalls
from ..reading import Probing, group_queries, host_attention, read, served, ungroup

if TYPE_CHECKING:
    from ...released import ReleasedContext

NAME = "dp_xattn"
LAYER_ATTRIBUTE = "_dp_xattn_layer"
NO_RELEASE = (
    "The attention function 'dp_xattn' has no release to read here. It is set by dpx.protect(model, config), not by hand, and a protected "
    "model is called as a whole (model.generate(**release.inputs()) or model(**release.inputs(), ...)), not by its parts."
)


@dataclass(frozen=True)
class Call:
    """What the layers of one forward may read. tables: one per layer name; index [B]: each batch element's binding; public: inside
    `protected.public()`, where attention is the host's own; contexts: what the bindings were made of."""

    tables: dict[str, LayerTable]
    index: torch.Tensor
    public: bool = False
    contexts: tuple[ReleasedContext, ...] = ()


class DryRunOver(Exception):
    """Ends a dry run (`dry_run.py`) at a forward that is one too many."""


class Calls(ThreadCalls):
    """See `ThreadCalls`. seen: the placeholder (and its state) parsed last, a copy of it, and what it gave. left: forwards that a dry
    run may still make."""

    current: Call | None = None
    seen: tuple[weakref.ref[torch.Tensor], object, torch.Tensor, Call] | None = None
    left: int | None = None

    @contextmanager
    def at_most(self, count: int) -> Iterator[None]:
        """A dry run of so many forwards."""
        before, self.left = self.left, count
        try:
            yield
        finally:
            self.left = before

    def count(self) -> None:
        """A forward begins. Raises DryRunOver where it is one too many."""
        if self.left is None:
            return
        if self.left == 0:
            raise DryRunOver
        self.left -= 1


@dataclass
class Capture:
    """What one module hands to its attention function, while we run it by ourselves. answer: what it is given back, zeros by default."""

    module: nn.Module
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    scaling: float | None = None
    softcap: float | None = None
    calls: int = 0
    answer: torch.Tensor | None = None


@dataclass
class Serving:
    """How a probe answers a layer: from the keys and values it hands over (recorded on the way), or from recorded ones.

    queries: where each module's queries [B, H, m, d] are collected, public ones; H counts key heads.
    """

    recorded: dict[nn.Module, Capture] = field(default_factory=dict)
    replay: bool = False
    queries: dict[nn.Module, list[torch.Tensor]] = field(default_factory=dict)


capturing: Probing[Capture] = Probing()
"""While it lasts, this thread's `dp_xattn` on that module keeps what it is given and returns zeros."""
serving: Probing[Serving] = Probing()
"""While it lasts, this thread's `dp_xattn` is exact attention for the probe of a model."""


def _probe(state: Serving, module: nn.Module, capture: Capture) -> torch.Tensor:
    """Exact attention for the probe: [B, Hq, m, dv]."""
    known = state.recorded.setdefault(module, capture)
    known.calls += 1
    source = known if state.replay else capture
    assert capture.query is not None and source.key is not None and source.value is not None
    query_heads, m = capture.query.shape[1:3]
    grouped = group_queries(capture.query, source.key.shape[1])
    if module in state.queries:
        state.queries[module].append(grouped)
    out, _ = exact_partial(grouped, source.key, source.value, scale_of(capture), softcap=capture.softcap)
    return ungroup(out, query_heads, m).to(capture.query.dtype)


def scale_of(capture: Capture) -> float:
    """The factor of the logits: what the host passes on, or the usual one."""
    assert capture.query is not None
    return float(capture.query.shape[-1] ** -0.5 if capture.scaling is None else capture.scaling)


def dp_xattn(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, m, d] -> ([B, m, H, dv], None). Keys, values and the mask are the placeholder's: only that they are NaN is looked at.

    *Formal guarantee.* The output is a function of the query, the release and public rows; where a layer was given anything else than a
    placeholder (finite keys), it is NaN.

    Raises:
        ProtectionLostError: no release is at hand.
    """
    captured = Capture(module, query, key, value, scaling, softcap)
    capture = capturing.now
    if capture is not None and capture.module is module:
        capture.query, capture.key, capture.value = query, key, value
        capture.scaling, capture.softcap, capture.calls = scaling, softcap, capture.calls + 1
        zeros = query.new_zeros(*query.shape[:3], value.shape[-1])
        answer = zeros if capture.answer is None else capture.answer.to(zeros)
        return answer.transpose(1, 2).contiguous(), None
    if serving.now is not None:
        return _probe(serving.now, module, captured).transpose(1, 2).contiguous(), None
    state, call = served(module, LAYER_ATTRIBUTE, NO_RELEASE)
    if call.public:
        original = host_attention(module, state.config._attn_implementation)
        capped = {} if softcap is None else {"softcap": softcap}
        return original(module, query, key, value, attention_mask, scaling=scaling, **capped, **kwargs)
    table = call.tables[state.name]
    batch, query_heads, m, width = query.shape
    if len(call.index) != batch or key.shape[0] != batch:
        raise ProtectionLostError(
            f"A layer was called with a batch of {batch}, the placeholder has one of {len(call.index)}: pass release.inputs() the "
            "decoder_input_ids, or release as many contexts."
        )
    kept = query[..., : width - state.padding]
    out = read(table, group_queries(kept, key.shape[1]), call.index, scale_of(captured), softcap)
    out = F.pad(ungroup(out, query_heads, m), (0, state.padding))
    placeholder = key[:, :1, -1:, :1].isnan()
    out = torch.where(placeholder, out, torch.full_like(out, torch.nan))
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, dp_xattn)
