"""From the bindings of one call to the tables that the processors read: stacked structures, keys and values of public and decoded rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ReleaseError
from ..mechanisms.rows_structure import RowsStructure, stack_rows
from ..mechanisms.structure import AttentionStructure, stack
from .fingerprint import Fingerprint
from .layer import Layer, project_rows
from .placeholder import Tag
from .released import Binding


@dataclass(frozen=True)
class LayerTable:
    """What one layer may read in the current call. A is the number of active bindings; all of it is released or public.

    tags: float32 [A, TAG_DIGITS]. structure: the released structures, batch A; None when nothing is active.
    public_key, public_value: [A, H, P, d] exact public rows of each binding, public_bias [A, 1, 1, P]; None where there are none, or
        where they are rows of the structure itself.
    """

    tags: torch.Tensor | None = None
    structure: AttentionStructure | None = None
    public_key: torch.Tensor | None = None
    public_value: torch.Tensor | None = None
    public_bias: torch.Tensor | None = None


MAX_CACHED_ROWS = (
    8  # bindings whose keys and values are kept: about 8 MB each at Stable Diffusion 1.5's sizes
)


class Tables:
    """Builds the layers' tables; keeps keys and values of decoded rows for as long as the weights stay what they are."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        self._layers = layers
        self._cache: OrderedDict[Tag, tuple[RowsStructure, ...]] = OrderedDict()
        self._cached_for: tuple[Fingerprint, torch.device] | None = None

    def build(
        self,
        bindings: Sequence[Binding],
        device: torch.device,
        dtype: torch.dtype,
        current: Fingerprint,
    ) -> dict[str, LayerTable]:
        """One table per layer. `current` is the fingerprint of the weights as they are.

        Raises:
            ReleaseError: the releases cannot stand in one batch.
        """
        if not bindings:
            return dict.fromkeys(self._layers, LayerTable())
        tags = torch.tensor([b.tag for b in bindings], dtype=torch.float32, device=device)
        decoded = {b.context.context is not None for b in bindings}
        if len(decoded) > 1:
            raise ReleaseError(
                "Releases of different mechanisms cannot be batched; call the pipeline once for each."
            )
        if decoded == {True}:
            self._forget(current, device)
            rows = [self._rows(b, device, dtype) for b in bindings]
            return {
                name: LayerTable(tags, stack_rows([r[i] for r in rows]))
                for i, name in enumerate(self._layers)
            }
        return {
            name: _structure_table(i, layer, bindings, tags, device, dtype)
            for i, (name, layer) in enumerate(self._layers.items())
        }

    def clear(self) -> None:
        self._cache.clear()

    def _forget(self, current: Fingerprint, device: torch.device) -> None:
        known = self._cached_for
        if known is None or known[1] != device or not known[0].same(current):
            self.clear()
            self._cached_for = current, device

    def _rows(self, binding: Binding, device: torch.device, dtype: torch.dtype) -> tuple[RowsStructure, ...]:
        """Each layer's keys and values of the exact public rows and of the decoded ones, for one softmax over both."""
        cached = self._cache.get(binding.tag)
        if cached is None:
            context = binding.context.context
            assert context is not None
            exact = binding.public_rows.to(device, dtype)
            rows = torch.cat([exact, context.rows.to(device, dtype)])
            weights = torch.cat([exact.new_zeros(len(exact)), context.log_weights.to(device, dtype)])
            cached = tuple(_project(layer, rows, weights, device) for layer in self._layers.values())
            self._cache[binding.tag] = cached
        self._cache.move_to_end(binding.tag)
        while len(self._cache) > MAX_CACHED_ROWS:
            self._cache.popitem(last=False)
        return cached


def _project(
    layer: Layer, rows: torch.Tensor, log_weights: torch.Tensor, device: torch.device
) -> RowsStructure:
    key, value = (t.unsqueeze(0).to(device) for t in project_rows(layer, rows))
    return RowsStructure(key, value, log_weights.view(1, 1, 1, -1), layer.scale)


def _stack(structures: Sequence[AttentionStructure]) -> AttentionStructure:
    """As `structure.stack`; rows may differ in number."""
    rows = [s for s in structures if isinstance(s, RowsStructure)]
    return stack_rows(rows) if len(rows) == len(structures) else stack(structures)


def _structure_table(
    index: int,
    layer: Layer,
    bindings: Sequence[Binding],
    tags: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> LayerTable:
    """One layer's table with the stacked structures, and keys and values of exact PUBLIC rows."""
    structure = _stack([b.context.structures[index].to(device) for b in bindings])
    longest = max(b.public_rows.shape[0] for b in bindings)
    if longest == 0:
        return LayerTable(tags, structure)
    keys, values, biases = [], [], []
    for b in bindings:
        count = b.public_rows.shape[0]
        padded = torch.nn.functional.pad(b.public_rows, (0, 0, 0, longest - count))
        key, value = project_rows(layer, padded.to(dtype))
        bias = torch.zeros(1, 1, longest, device=device)
        bias[..., count:] = -torch.inf
        keys.append(key.to(device))
        values.append(value.to(device))
        biases.append(bias)
    return LayerTable(tags, structure, torch.stack(keys), torch.stack(values), torch.stack(biases))
