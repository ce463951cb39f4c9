"""`DPAttnProcessor`: diffusers attention that reads a released structure where the text is private."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ...errors import DPXAttnError, ProtectionLostError
from ...mechanisms.merge import exact_partial, merge
from ...mechanisms.rows_structure import RowsStructure, stack_rows
from ..access import NO_COPY, Access, public_allowed
from ..accounts import PROTECT_AGAIN
from ..placeholder import Tag, is_marked, match_tags
from ..recorded_runs import refuse_recording
from ..tables import LayerTable
from .attention_layer import project, split_heads

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


NO_GATE = (
    "A protected layer was run outside of a call of its UNet (by unet.forward, which runs no gate, by itself, or again in a backward pass "
    "after another release was read), and what it was given names no release that it can read. Call the UNet itself, once with one "
    "release from forward to backward."
)


@dataclass(frozen=True)
class Layout:
    """Which batch elements of one tensor are private, as the UNet's gate read it in eager mode; it spares each side the other's work.

    rows, index: the private elements and the active binding of each; public: the other elements. Integer tensors.
    """

    states: weakref.ref[torch.Tensor]
    rows: torch.Tensor
    index: torch.Tensor
    public: torch.Tensor

    @classmethod
    def of(cls, states: torch.Tensor, tags: Sequence[Tag | None], active: Sequence[Tag]) -> Layout:
        """tags: the tag of each batch element (`read_tags`), all of them among the active ones."""
        rows = [i for i, tag in enumerate(tags) if tag is not None]
        others = [i for i, tag in enumerate(tags) if tag is None]
        order = [active.index(tag) for tag in tags if tag is not None]
        tensors = (torch.tensor(x, dtype=torch.int64, device=states.device) for x in (rows, order, others))
        return cls(weakref.ref(states), *tensors)


@dataclass(frozen=True)
class Forward:
    """What the layers may read in one forward, by the name of the layer. layout: None where no element is private.

    joint: what the elements of `layout.states` attend to, all of them; and whether it was made under autocast.
    """

    tables: dict[str, LayerTable]
    layout: Layout | None = None
    joint: dict[str, tuple[RowsStructure | None, bool]] = field(default_factory=dict)


class Forwards(threading.local):
    """The forward of the UNet that this thread is in; no other thread can see or replace it. seen: the tensor (and its state) parsed
    last, a copy of it, and what it gave. pipelines: how many protected calls of a pipeline this thread is in. rewritten: bool [] on the
    device: whether the tensor is another one than the copy, where nobody has waited for the answer."""

    current: Forward | None = None
    seen: tuple[weakref.ref[torch.Tensor], object, torch.Tensor, Forward] | None = None
    pipelines: int = 0
    rewritten: torch.Tensor | None = None


class _Served(threading.local):
    """What a graph without gates reads in this thread: the table that was activated last."""

    table: LayerTable | None = None


class DPAttnProcessor:
    """Replaces `AttnProcessor2_0` on the cross-attention layers of a protected host; `dpx.protect` registers it.

    Batch elements whose text is a placeholder attend to the released structure it names, merged by log-sum-exp with that binding's
    exact public rows. Other elements (the negative prompt) attend exactly, as in `AttnProcessor2_0`. There is no branch on tensor
    values, so `torch.compile(fullgraph=True)` works and denoising steps share one graph. What is not proven fit is NaN: an unknown
    placeholder, a placeholder with a mask, a batch without any placeholder outside `protected.public()`.

    *Formal guarantee.* The output is a function of the release, of public rows and of the image's hidden states; the placeholder holds
    no private content, so nothing is spent here however often it runs.

    Set by hand, without `protect`, it has no release to read and raises `ProtectionLostError` at every call.

    Args:
        name: of its layer.
        forwards: which forward each thread is in, and what it may read.
        access: permissions of the handle.

    Example:
        >>> protected = dpx.protect(pipe, dpx.DPXAttnConfig(mechanism="none"))
        >>> any(isinstance(p, dpx.DPAttnProcessor) for p in pipe.unet.attn_processors.values())
        True
    """

    def __init__(
        self, name: str = "", forwards: Forwards | None = None, access: Access | None = None
    ) -> None:
        self._name = name
        self._forwards = Forwards() if forwards is None else forwards
        self._access = Access() if access is None else access
        self._served = _Served()
        self._latest: LayerTable | None = None  # of whatever thread

    @property
    def table(self) -> LayerTable | None:
        """Outside of the UNet's gate (in a compiled graph, in a layer that is run again for gradients)."""
        current = self._served.table
        return self._latest if current is None else current

    @table.setter
    def table(self, table: LayerTable | None) -> None:
        self._served.table = self._latest = table

    def serve(self, table: LayerTable) -> None:
        """To this thread only.

        Args:
            table: what the layer reads.
        """
        self._served.table = table

    def clear(self) -> None:
        """Forgets the tables of all threads."""
        self._served, self._latest = _Served(), None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(NO_COPY)

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states [B, m, C] or [B, C, h, w], encoder_hidden_states [B, n, C'] -> the shape of hidden_states.

        Raises:
            ProtectionLostError: no release is at hand, or the layer was given no context or an image prompt beside it.
        """
        refuse_recording()
        forward = None if torch.compiler.is_compiling() else self._forwards.current
        table = self.table if forward is None else forward.tables.get(self._name)
        if table is None:
            raise ProtectionLostError(
                "DPAttnProcessor has no release to read. Install it with dpx.protect(pipe, config), not by hand; after a reset of the "
                f"processors call dpx.unprotect(pipe) and {PROTECT_AGAIN}."
            )
        if not isinstance(encoder_hidden_states, torch.Tensor):
            raise ProtectionLostError(
                "DPAttnProcessor needs encoder_hidden_states as one tensor: this layer is used as self-attention, or with an image prompt."
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        input_ndim = hidden_states.ndim
        if input_ndim == 4:
            batch, channel, height, width = hidden_states.shape
            hidden_states = hidden_states.view(batch, channel, height * width).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        if attn.norm_q is not None:
            query = attn.norm_q(query)

        hidden_states = self._attend(attn, table, query, encoder_hidden_states, attention_mask, forward)
        hidden_states = hidden_states.transpose(1, 2).flatten(2).to(query.dtype)
        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        if input_ndim == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(batch, channel, height, width)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _attend(
        self,
        attn: Attention,
        table: LayerTable,
        query: torch.Tensor,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        forward: Forward | None = None,
    ) -> torch.Tensor:
        """[B, H, m, d], private elements from the release and the others exactly."""
        layout = None if forward is None or attention_mask is not None else forward.layout
        if layout is not None and layout.states() is states and table.structure is not None:
            assert forward is not None
            if not torch.is_grad_enabled():
                joint = self._joined(attn, table, layout, states, forward)
                if joint is not None:
                    return joint.attend(query)
            out = torch.empty_like(query)
            out[layout.rows] = self._read(table, query[layout.rows], layout.index).to(query.dtype)
            if len(layout.public):
                out[layout.public] = self._attend_public(
                    attn, query[layout.public], states[layout.public], None
                )
            return out
        marked = is_marked(states)
        # not of NaN: what is not chosen below has a gradient of 0 times it
        plain = torch.where(marked[:, None, None], torch.zeros_like(states), states)
        public = self._attend_public(attn, query, plain, attention_mask)
        private = self._attend_private(table, query, states, attention_mask)
        allowed = marked.any() | self._public_allowed(states)
        beside_a_gate = forward is None and not torch.compiler.is_compiling()
        if beside_a_gate and not self._readable(table, states, marked, allowed):
            raise ProtectionLostError(NO_GATE)
        public = torch.where(allowed, public, torch.full_like(public, torch.nan))
        return torch.where(marked[:, None, None, None], private.to(query.dtype), public)

    @staticmethod
    def _readable(
        table: LayerTable, states: torch.Tensor, marked: torch.Tensor, allowed: torch.Tensor | bool
    ) -> bool:
        """Whether every element names an active release or may pass as public. Waits for the device."""
        if table.tags is None:
            return bool((~marked & allowed).all())
        known = match_tags(states, table.tags.to(states.device)).any(dim=1)
        return bool(((marked & known) | (~marked & allowed)).all())

    def _public_allowed(self, states: torch.Tensor) -> torch.Tensor | bool:
        """Whether a batch without any placeholder may pass; asked of the context that runs this, compiled or not."""
        if torch.compiler.is_compiling():
            return public_allowed(states.detach(), self._access.key)
        return self._access.public

    def _joined(
        self, attn: Attention, table: LayerTable, layout: Layout, states: torch.Tensor, forward: Forward
    ) -> RowsStructure | None:
        """`_join`, made once for all steps: keys and values of public rows are of the precision that they were made in."""
        autocast = torch.is_autocast_enabled(states.device.type)
        known = forward.joint.get(self._name)
        if known is None or (known[0] is not None and known[1] != autocast):
            known = forward.joint[self._name] = self._join(attn, table, layout, states), autocast
        return known[0]

    @staticmethod
    def _join(
        attn: Attention, table: LayerTable, layout: Layout, states: torch.Tensor
    ) -> RowsStructure | None:
        """Rows that were released, and the keys and values of the public elements: one structure of the batch's size for all steps.

        None where something else than rows was released.
        """
        released = table.structure
        if not isinstance(released, RowsStructure) or table.public_key is not None:
            return None
        parts, order = [released.select(layout.index)], layout.rows
        if len(layout.public):
            key, value = project(attn, states[layout.public])
            bias = key.new_zeros(len(key), 1, 1, key.shape[2])
            parts.append(RowsStructure(key, value, bias, released.scale))
            order = torch.cat([order, layout.public])
        return stack_rows(parts).select(order.argsort())

    @staticmethod
    def _attend_public(
        attn: Attention, query: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, H, m, dv]: exact attention to the rows as given. A placeholder's rows are NaN and stay NaN."""
        if attention_mask is not None:
            batch, length, _ = states.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        key, value = project(attn, states)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=0.0, is_causal=False
        )

    @classmethod
    def _attend_private(
        cls, table: LayerTable, query: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, H, m, dv]: attention to the release that each batch element names; NaN where it names none of the active ones.

        Of `states` only the marker is read.
        """
        if table.structure is None or table.tags is None or attention_mask is not None:
            return torch.full_like(query, torch.nan)
        match = match_tags(states, table.tags.to(states.device))
        out = cls._read(table, query, match.to(torch.int64).argmax(dim=1))
        return torch.where(match.any(dim=1)[:, None, None, None], out, torch.full_like(out, torch.nan))

    @staticmethod
    def _read(table: LayerTable, query: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[B, H, m, dv]: attention of each element to the active binding `index` [B], its public rows included."""
        assert table.structure is not None
        structure = table.structure.select(index)
        if table.public_key is None or table.public_value is None or table.public_bias is None:
            return structure.attend(query)
        out, lse = structure.partial(query)
        key, value = table.public_key.index_select(0, index), table.public_value.index_select(0, index)
        out_public, lse_public = exact_partial(
            query, key, value, query.shape[-1] ** -0.5, table.public_bias.index_select(0, index)
        )
        return merge(out, lse, out_public, lse_public)[0]
