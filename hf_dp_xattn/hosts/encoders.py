"""The states of the encoders that make a handle's private rows: a release found again must be of what the encoder gives NOW.

A context is named by its tokens, and what they are encoded to depends on the encoder's weights: an adapter on it, a textual inversion
loaded anew under its old token, or the text encoder of another pipeline on the same UNet give other rows. Each state that was met has a
number, which selects the release; the ledger's name has none, since the text is the same secret however it is encoded.

*Decided by public weights alone.* Which releases are stale must not depend on what a context says. So ANY change of a table of embeddings
makes all releases of its old state stale, also those without the token that was changed: else a refusal would tell that a prompt holds it.
Rows that were added at a table's end leave them valid, since no earlier token has these numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, ReleaseError
from .fingerprint import DEFAULT_TOLERANCE, TOLERANCE, signs, sketch_of
from .private_run import evaluating
from .weight_changes import checksum, is_away, leaves, own_weights, stamp

SIGNS = 4  # random projections of each row of a weight
CHUNK = 4096  # rows of a weight that are projected at once
SINGLE = (torch.float32, torch.float64)
EXACT = 1e-5  # relative distance of one row that the order of a sum may cause
EXACT_PRODUCT = 1e-4  # of a layer's product, in single precision on one kind of device: fusing an adapter and taking it out again
CAST = {torch.bfloat16: 6e-2, torch.float16: 8e-3}  # of one row that was cast: sixteen units of roundoff
OTHER_STATE = (
    "it is of another state of the encoder (an adapter or a textual inversion was loaded or removed since, its weights were changed, or it "
    "is another pipeline's encoder)"
)
CHANGED = (
    "The encoder has changed since this release was opened (an adapter, a textual inversion, other weights, or another pipeline's): one "
    "release holds rows of one encoder. Restore it, or open a new release, which is charged. Nothing was spent."
)


@dataclass(frozen=True)
class _Weight:
    """product: the layer's answer to fixed signs, its adapters included [SIZE, SIZE]; else projections [r, SIGNS] and norms [r] of rows."""

    product: bool
    values: torch.Tensor
    norms: torch.Tensor
    dtype: torch.dtype
    device: str

    def serves(self, now: _Weight, *, table: bool) -> bool:
        """Whether what was made with this weight is what `now` makes, up to rounding. table: rows may have been added."""
        count = len(self.values)
        fit = len(now.values) == count or (table and len(now.values) > count)
        if self.product != now.product or not fit:
            return False
        distance = torch.linalg.vector_norm(now.values[:count] - self.values, dim=-1)
        if self.product:
            distance, norms = distance.norm(), self.values.norm()
        else:
            norms = self.norms * SIGNS**0.5
        return bool((distance <= self._tolerance(now) * norms).all())  # NaN is another state

    def _tolerance(self, now: _Weight) -> float:
        same = self.dtype == now.dtype
        if not self.product:
            coarser = max(CAST.get(self.dtype, 0.0), CAST.get(now.dtype, 0.0))
            return EXACT if same else max(coarser, EXACT)
        if same and self.device == now.device and self.dtype in SINGLE:
            return EXACT_PRODUCT
        return max(
            TOLERANCE.get(str(d).removeprefix("torch."), DEFAULT_TOLERANCE) for d in (self.dtype, now.dtype)
        )


@dataclass(frozen=True)
class _State:
    weights: dict[str, _Weight]
    tables: frozenset[str]
    settings: tuple[str, ...]

    def serves(self, now: _State) -> bool:
        return (self.weights.keys(), self.settings) == (now.weights.keys(), now.settings) and all(
            weight.serves(now.weights[name], table=name in self.tables)
            for name, weight in self.weights.items()
        )


class Encoders:
    """Numbers the states of the encoders of one handle."""

    def __init__(self) -> None:
        self._states: list[_State] = []
        self._seen: weakref.WeakKeyDictionary[nn.Module, tuple[object, tuple[bytes, ...]]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def met(self) -> tuple[bytes, ...]:
        """The numbers of all states so far."""
        return tuple(str(i).encode() for i in range(len(self._states)))

    def states(self, encoder: Sequence[nn.Module]) -> tuple[bytes, ...]:
        """The numbers of the states whose releases are what this encoder gives now, its own first; one empty one for no encoder.

        Weights are summed at each call, and read only where they changed since.

        Raises:
            ConfigError: they are nowhere to be read. Nothing was spent.
        """
        if not encoder:
            return (b"",)
        now = stamp(encoder), checksum(encoder)
        seen = self._seen.get(encoder[0])
        if seen is None or seen[0] != now or is_away(encoder):
            seen = now, self._number(_read(encoder))
            self._seen[encoder[0]] = seen
        return seen[1]

    def _number(self, now: _State) -> tuple[bytes, ...]:
        numbers = [i for i, state in enumerate(self._states) if state.serves(now)]
        serving = [i for i in numbers if now.serves(self._states[i])]  # no rows were added since
        if not serving:
            self._states.append(now)
            serving = [len(self._states) - 1]
        return tuple(str(i).encode() for i in (*serving, *(i for i in numbers if i not in serving)))

    def check(self, state: bytes, encoder: Sequence[nn.Module]) -> None:
        """Raises ReleaseError unless rows of that state and of this encoder may stand in one release."""
        if state and encoder and state not in self.states(encoder):
            raise ReleaseError(CHANGED)


@torch.inference_mode(False)
@torch.no_grad()
def _read(encoder: Sequence[nn.Module]) -> _State:
    weights: dict[str, _Weight] = {}
    tables: set[str] = set()
    settings = []
    for i, root in enumerate(encoder):
        with evaluating(root):
            for name, module, tensors in leaves(root):
                key = f"{i}.{name}"
                base = getattr(module, "base_layer", module)
                if isinstance(base, nn.Linear):
                    weights[key] = _product(module, base)
                    continue
                if base is not module:
                    settings.append(f"{key} {_adapters(module)}")
                weights |= {f"{key}.{part}": values for part, values in _read_rows(module, tensors)}
                if isinstance(module, nn.Embedding):
                    tables |= {f"{key}.{part}" for part in tensors}
    return _State(weights, frozenset(tables), tuple(settings))


def _adapters(module: Any) -> str:
    names = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
    return str([getattr(module, name, None) for name in names])


def _read_rows(module: nn.Module, tensors: dict[str, torch.Tensor]) -> list[tuple[str, _Weight]]:
    """Of its own weights, offloaded or not. Raises ConfigError where they are nowhere."""
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            tensors = own_weights(module)
            if any(tensor.device.type == "meta" for tensor in tensors.values()):
                raise ConfigError(
                    "The encoder's weights are gone (on meta). Load them again; nothing was spent."
                )
            return [(part, _rows(tensor)) for part, tensor in tensors.items()]
    return [(part, _rows(tensor)) for part, tensor in tensors.items()]


def _product(module: nn.Module, base: nn.Linear) -> _Weight:
    weight = base.weight
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    sketch = sketch_of([module], _computes_in(base) or dtype)[0]
    return _Weight(True, sketch, sketch.new_zeros(0), dtype, weight.device.type)


def _computes_in(base: Any) -> torch.dtype | None:
    """Where diffusers keeps weights in a smaller dtype than it computes in (`apply_layerwise_casting`)."""
    registry = getattr(base, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("layerwise_casting")
    dtype: torch.dtype | None = getattr(hook, "compute_dtype", None)
    return dtype


def _rows(tensor: torch.Tensor) -> _Weight:
    plain = tensor.detach()
    rows = plain.reshape(-1, plain.shape[-1]) if plain.ndim > 1 else plain.reshape(1, -1)
    matrix = signs("row", rows.shape[-1])[:SIGNS].to(rows.device)
    values, norms = [], []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK].to(torch.float32)
        values.append((part @ matrix.mT).cpu())
        norms.append(torch.linalg.vector_norm(part, dim=-1).cpu())
    return _Weight(False, torch.cat(values), torch.cat(norms), tensor.dtype, tensor.device.type)
