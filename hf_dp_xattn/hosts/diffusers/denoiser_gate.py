"""The gate of any denoiser: which batch elements read a release, and the proof that its layers read what the model would.

In a call of a protected pipeline the model is given public text alone: the rows of a stand-in, of which those that the pipeline marked are
read from a release by the protected layers: whatever else the model does with its text, it does with public text. Rows without a mark (of
negative prompts) are read as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Protocol

import torch

from ...errors import ProtectionLostError, ReleaseError, UnsupportedModelError
from ...mechanisms.merge import exact_partial, merge
from ...mechanisms.rows_structure import RowsStructure, stack_rows
from ..bindings import unique
from ..guard import Guard
from ..layer import project_rows
from ..model_gates import OUTSIDE
from ..nan import FOUND
from ..placeholder import Tag
from ..recorded_runs import refuse_recording
from ..tables import LayerTable
from ..text.one_step import Reached
from ..weight_changes import refuse_call_adapters
from ..weights import Weights
from .intercepted import Attention, ServedForward
from .prompt_encoder import read_marks, tensors_of
from .text_layers import TextLayer

SCALE = "{name} scales its logits by {now:.4g} here, and by {then:.4g} when it was protected: such layers are not supported."
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 6e-2}  # relative to the largest number of an output
STATES = "encoder_hidden_states"
SECOND = "transformer_2."  # prefix of a denoiser of later steps (Wan 2.2)
CHANGED = "its pipeline changes the encoded prompt before the {model} reads it"
OTHERWISE = "its layers read the text in another way than by their keys and values"
BESIDE = "its layers read other rows (of a picture, or a second encoding) in one sequence with the text's"


@dataclass
class Call:
    """One call of a pipeline in this thread. tags: of each prompt. proving: it is a trial with public text, before a charge.

    rows, shown: of each tag, the public rows [n, C] that stand in for it, and those that their mask shows. read: whether the denoiser
    was given a placeholder. nan: bool [] on the device, whether an output held NaN.
    """

    tags: tuple[Tag, ...]
    proving: bool = False
    rows: dict[Tag, torch.Tensor] = field(default_factory=dict)
    shown: dict[Tag, torch.Tensor] = field(default_factory=dict)
    read: bool = False
    nan: torch.Tensor | None = None

    def look(self, output: Any) -> None:
        """Notes NaN, without waiting for the device."""
        for _, tensor in tensors_of(output):
            if tensor.is_floating_point() and tensor.numel():
                now = tensor.detach().amax().isnan()
                self.nan = now if self.nan is None else self.nan | now.to(self.nan.device)

    def refuse_nan(self) -> None:
        if self.nan is not None and bool(self.nan):
            raise ProtectionLostError(FOUND)


class Calls(threading.local):
    """The call that this thread is in."""

    current: Call | None = None

    @contextmanager
    def enter(self, call: Call | None) -> Iterator[None]:
        """call: None for code of a user that runs within one."""
        before, self.current = self.current, call
        try:
            yield
        finally:
            self.current = before


@dataclass(frozen=True)
class Marked:
    """Which of `size` batch elements read a release: rows, and which active one each, index; public: the others."""

    size: int
    rows: torch.Tensor
    index: torch.Tensor
    public: torch.Tensor

    @classmethod
    def of(cls, tags: Sequence[Tag | None], active: Sequence[Tag], device: torch.device) -> Marked:
        rows = [i for i, tag in enumerate(tags) if tag is not None]
        others = [i for i, tag in enumerate(tags) if tag is None]
        order = [active.index(tag) for tag in tags if tag is not None]
        return cls(
            len(tags), *(torch.tensor(x, dtype=torch.int64, device=device) for x in (rows, order, others))
        )

    def repeated(self, times: int) -> Marked:
        """Where a layer sees each element `times` times in a row (the frames of a video)."""
        if times == 1:
            return self
        more = torch.arange(times, device=self.rows.device)
        each = [(x[:, None] * times + more).flatten() for x in (self.rows, self.public)]
        return Marked(self.size * times, each[0], self.index.repeat_interleave(times), each[1])


@dataclass
class _Forward:
    """What the layers may read in one forward; marked: None where all is public. rows: of text that the model is given. answered: the
    layers that read a release. beside: whether one was given more rows than that."""

    tables: Mapping[str, LayerTable]
    marked: Marked | None = None
    rows: int = 0
    beside: bool = False
    answered: set[str] = field(default_factory=set)


def _copied(value: Any) -> Any:
    """Tuples, lists and mappings of tensors, of which only the containers are copied."""
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(inner) for inner in value)
    return {n: _copied(v) for n, v in value.items()} if isinstance(value, dict) else value


class _Local(threading.local):
    """Of one thread and gate. again: arguments of the model, for the proof; given: with placeholders, as they came."""

    forward: _Forward | None = None
    again: tuple[Any, Any] = ((), {})
    given: tuple[Any, Any] = ((), {})
    seen: tuple[torch.Tensor, int, Call, _Forward, torch.Tensor] | None = None


class ServesDenoisers(Protocol):
    """What a gate asks of its host."""

    guard: Guard
    weights: Weights
    calls: Calls
    proven: set[str]

    @property
    def layers(self) -> Mapping[str, Any]: ...
    @property
    def models(self) -> Mapping[str, Any]: ...


class DenoiserGate:
    """Of one model.

    Args:
        host: whose.
        prefix: of the names of its layers.
        model: the model.
        layers: its own.
    """

    def __init__(
        self, host: ServesDenoisers, prefix: str, model: Any, layers: Mapping[str, TextLayer]
    ) -> None:
        self._host, self.prefix, self.model, self._layers = host, prefix, model, layers
        self._named = list(signature(type(model).forward).parameters)[1:]
        self._local = _Local()
        self._served = [ServedForward(n, layer.module, self._answer) for n, layer in layers.items()]
        self._hooks: list[Any] = []

    def install(self) -> None:
        for served in self._served:
            served.install()
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._behind, always_call=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for served in self._served:
            served.remove()

    def lost(self) -> str | None:
        """What of it is no longer in place. Asked at each forward."""
        known = (self.model._forward_pre_hooks, self.model._forward_hooks)
        if not self._hooks or not all(h.id in k for h, k in zip(self._hooks, known, strict=True)):
            return f"the gate of the {type(self.model).__name__} was removed"
        replaced = next(
            (n for s, n in zip(self._served, self._layers, strict=True) if not s.installed()), None
        )
        return None if replaced is None else f"the attention layer {replaced} was replaced"

    def changed(self) -> str | None:
        """Which layer is no longer part of the model."""
        for name, layer in self._layers.items():
            if self.model.get_submodule(name.removeprefix(self.prefix)) is not layer.module:
                return f"the attention layer {name} was replaced"
        return None

    def forget(self) -> None:
        """What was read last, when a call is over."""
        self._local.seen, self._local.given = None, ((), {})

    # ---- a forward of the model --------------------------------------------------------------------------------------------

    def _before(self, module: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        refuse_recording()
        self._local.forward = None
        call, guard = self._host.calls.current, self._host.guard
        if guard.access.public:
            self._local.forward = _Forward({})
            return None
        if call is None:
            raise ProtectionLostError(OUTSIDE.format(model=type(module).__name__))
        guard.check()
        refuse_call_adapters(self._host.weights.roots())
        arguments = dict(zip(self._named, args, strict=False)) | kwargs
        if call.proving and SECOND in self._host.models and not self.prefix:
            self._local.given = _copied(args), _copied(kwargs)
        self._local.forward, public = self._read(arguments.get(STATES), call)
        if public is not None:
            kwargs, place = dict(kwargs), self._named.index(STATES) if STATES in self._named else len(args)
            if STATES in kwargs:
                kwargs[STATES] = public
            else:
                args = (*args[:place], public, *args[place + 1 :])
        if call.proving:  # models empty lists that they are given
            self._local.again = _copied(args), _copied(kwargs)
        return args, kwargs

    def _read(self, states: Any, call: Call) -> tuple[_Forward, torch.Tensor | None]:
        """What the layers may read, and the public rows that the model is given."""
        if not isinstance(states, torch.Tensor):
            return _Forward({}), None
        seen = self._local.seen
        if seen is not None and seen[0] is states and seen[1:3] == (states._version, call):
            return seen[3], seen[4]
        try:
            tags = read_marks(states)
        except ReleaseError as error:
            if not call.proving:
                raise
            raise self._refuse(CHANGED.format(model=type(self.model).__name__)) from error
        active = unique(tags)
        if not active:
            return _Forward({}), None
        unknown = [t for t in active if t not in call.rows or call.rows[t].numel() != states[0].numel()]
        if unknown:
            raise self._refuse(CHANGED.format(model=type(self.model).__name__))
        public = states.clone()
        for i, tag in enumerate(tags):
            if tag is not None:
                public[i] = call.rows[tag].to(states).reshape(states.shape[1:])
        tables = (
            self._stand_ins(active, call) if call.proving else self._host.guard.build(active, states.device)
        )
        forward = _Forward(tables, Marked.of(tags, active, states.device), states.shape[1])
        call.read = True
        if not states.is_inference():
            self._local.seen = states, states._version, call, forward, public
        return forward, public

    def _behind(self, module: Any, args: Any, output: Any) -> None:
        forward, self._local.forward = self._local.forward, None
        call = self._host.calls.current
        if output is None or call is None or forward is None:  # it failed, or is public
            return
        outputs = output.to_tuple() if hasattr(output, "to_tuple") else output
        call.look(outputs)
        if call.proving and forward.marked is not None:
            self._prove(outputs, forward)
            if not self.prefix:
                self._reach_second()
                raise Reached

    def _reach_second(self) -> None:
        """Proves the denoiser of later steps with what the first one was given: a trial ends at its first step."""
        second, (args, kwargs) = self._host.models.get(SECOND), self._local.given
        if second is not None and SECOND not in self._host.proven:
            second(*args, **kwargs)

    # ---- the proof ---------------------------------------------------------------------------------------------------------

    def _refuse(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"The {type(self.model).__name__} of this pipeline cannot be protected: {reason}. Nothing was spent. With "
            "mechanism='library' every pipeline with a `prompt` can."
        )

    @torch.no_grad()
    def _stand_ins(self, active: Sequence[Tag], call: Call) -> dict[str, LayerTable]:
        """The stand-in's own rows, by way of the layers' projections, as if they had been released."""
        rows = call.shown[active[0]]
        tables = {}
        for name, layer in self._layers.items():
            key, value = project_rows(layer, rows)
            bias = key.new_zeros(1, 1, 1, key.shape[1])
            one = RowsStructure(key[None], value[None], bias, layer.scale)
            tables[name] = LayerTable(
                structure=one.select(torch.zeros(len(active), dtype=torch.int64, device=key.device))
            )
        return tables

    @torch.no_grad()
    def _prove(self, output: Any, forward: _Forward) -> None:
        """That all layers read the release, and that reading what the layers make of the stand-in's rows gives what the model gives."""
        if self.prefix in self._host.proven:
            return
        missing = sorted(set(self._layers) - forward.answered)
        if missing:
            raise self._refuse(f"{len(missing)} of its text layers ({missing[0]}, ...) were not reached")
        args, kwargs = self._local.again
        self._local.forward = _Forward({})
        try:
            exact = self.model.forward(*args, **kwargs)
        finally:
            self._local.forward, self._local.again = None, ((), {})
        exact = exact.to_tuple() if hasattr(exact, "to_tuple") else exact
        for (_, one), (_, other) in zip(tensors_of(output), tensors_of(exact), strict=True):
            if one.is_floating_point() and not self._close(one, other):
                raise self._refuse(BESIDE if forward.beside else OTHERWISE)
        self._host.proven.add(self.prefix)

    @staticmethod
    def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
        most = float(other.abs().amax()) if other.numel() else 0.0
        distance = float((one.float() - other.float()).abs().amax()) if other.numel() else 0.0
        return distance <= TOLERANCE.get(other.dtype, 1e-3) * max(most, 1e-6)

    # ---- what a layer's attention gives ------------------------------------------------------------------------------------

    def _answer(self, name: str, states: Any, call: Attention) -> torch.Tensor:
        forward = self._local.forward
        if forward is None:
            raise ProtectionLostError(OUTSIDE.format(model=type(self.model).__name__))
        if forward.marked is None or states is None:
            return call.exact()
        layer = self._layers[name]
        if abs(call.scale - layer.scale) > 1e-6 * layer.scale:
            raise self._refuse(SCALE.format(name=name, now=call.scale, then=layer.scale))
        times, rest = divmod(len(call.query), forward.marked.size)
        if rest:
            raise self._refuse(f"{name} sees another number of prompts than the model is given")
        forward.answered.add(name)
        forward.beside |= states.shape[1] > forward.rows
        marked = forward.marked.repeated(times)
        joint = self._joint(forward.tables[name], call, marked, layer.added)
        if joint is not None:
            return joint.attend(call.query)
        private = call.select(marked.rows) if len(marked.public) else call
        text = states.shape[1] if layer.added else None
        out = self._private(layer, forward.tables[name], private, marked.index, text).to(call.query.dtype)
        if not len(marked.public):
            return out
        every = out.new_empty(len(call.query), *out.shape[1:])
        every[marked.rows] = out
        every[marked.public] = call.select(marked.public).exact()
        return every

    @staticmethod
    def _joint(table: LayerTable, call: Attention, marked: Marked, added: bool) -> RowsStructure | None:
        """Rows that were released and those of public elements as one structure of the batch's size, so that no query is copied. None where
        something else than rows was released, or stands beside them."""
        released = table.structure
        if added or not isinstance(released, RowsStructure) or table.public_key is not None:
            return None
        if not len(marked.public):
            return released.select(marked.index)
        bias = call.row_bias()
        if bias is None:
            return None
        key, value = call.key[marked.public], call.value[marked.public]
        exact = RowsStructure(key, value, bias[marked.public], released.scale)
        heads = released.bias.expand(-1, bias.shape[1], -1, -1)
        each = replace(released, bias=heads).select(marked.index)
        return stack_rows([each, exact]).select(torch.cat([marked.rows, marked.public]).argsort())

    @staticmethod
    def _private(
        layer: TextLayer, table: LayerTable, call: Attention, index: torch.Tensor, text: int | None
    ) -> torch.Tensor:
        """[B, H, m, dv]: the release, and what stands beside it under one softmax: exact public rows, and the picture's own rows behind
        `text` rows of text."""
        assert table.structure is not None
        structure = table.structure.select(index)
        beside: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        if table.public_key is not None and table.public_value is not None and table.public_bias is not None:
            parts = (table.public_key, table.public_value, table.public_bias)
            key, value, bias = (part.index_select(0, index) for part in parts)
            beside.append((key, value, bias))
        if text is not None and call.key.shape[2] > text:
            beside.append((call.key[:, :, text:], call.value[:, :, text:], None))
        if not beside:
            return structure.attend(call.query)
        out, lse = structure.partial(call.query)
        for keys, values, biases in beside:
            out, lse = merge(out, lse, *exact_partial(call.query, keys, values, layer.scale, biases))
        return out
