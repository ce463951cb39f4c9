"""From the placeholders of one call to the tables that the processors read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import ReleaseError
from ..mechanisms.structure import stack
from .placeholder import Tag
from .processor import LayerTable
from .release import Binding, ReleasedContext
from .rows import project_rows

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

MAX_BINDINGS = 1024


class Bindings:
    """The placeholders that are in circulation, the latest `MAX_BINDINGS` of them."""

    def __init__(self) -> None:
        self._known: OrderedDict[Tag, Binding] = OrderedDict()

    def add(self, binding: Binding) -> Tag:
        self._known[binding.tag] = binding
        self._known.move_to_end(binding.tag)
        while len(self._known) > MAX_BINDINGS:
            self._known.popitem(last=False)
        return binding.tag

    def find(self, tags: Iterable[Tag]) -> list[Binding]:
        """Raises ReleaseError for a tag that is not in circulation."""
        found = [self._known.get(tag) for tag in tags]
        if None in found:
            raise ReleaseError(
                "A placeholder names no release of this host: it was made before the last unprotect, by another host, or too long ago. "
                "Call release.inputs() again."
            )
        return [b for b in found if b is not None]


def build_table(
    layer: int,
    attn: Attention,
    bindings: Sequence[Binding],
    allow_public: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> LayerTable:
    """One layer's table for the active bindings: stacked structures, and keys and values of exact PUBLIC rows."""
    if not bindings:
        return LayerTable(allow_public)
    structure = stack([b.context.structures[layer].to(device) for b in bindings])
    tags = torch.tensor([b.tag for b in bindings], dtype=torch.float32, device=device)
    longest = max(b.public_rows.shape[0] for b in bindings)
    if longest == 0:
        return LayerTable(allow_public, tags, structure)
    keys, values, biases = [], [], []
    for b in bindings:
        count = b.public_rows.shape[0]
        padded = torch.nn.functional.pad(b.public_rows, (0, 0, 0, longest - count))
        key, value = project_rows(attn, padded.to(dtype))
        bias = torch.zeros(1, 1, longest, device=device)
        bias[..., count:] = -torch.inf
        keys.append(key.to(device))
        values.append(value.to(device))
        biases.append(bias)
    return LayerTable(
        allow_public, tags, structure, torch.stack(keys), torch.stack(values), torch.stack(biases)
    )


def unique(tags: Iterable[Tag | None]) -> tuple[Tag, ...]:
    return tuple(dict.fromkeys(t for t in tags if t is not None))


def bind(context: ReleasedContext, public_rows: torch.Tensor | None, tag: Tag) -> Binding:
    """A binding of a release with its own public rows, and those of a public prompt after them."""
    rows = context.public_rows
    if public_rows is not None:
        rows = torch.cat([rows.to(public_rows.device, public_rows.dtype), public_rows])
    return Binding(context, rows, tag)
