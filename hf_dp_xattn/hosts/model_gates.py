"""The gates of models that run with a permission only: text encoders, and denoisers that would read what any caller hands them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import DPXAttnError, ProtectionLostError
from .access import NO_COPY, Access
from .recorded_runs import refuse_recording

CLOSED = (
    "The text encoder belongs to a protected pipeline and may not run on its own: its output would enter the UNet as public "
    "rows. Protect every pipeline that shares it (dpx.protect(other_pipe, config)). To encode a PRIVATE text yourself (prompt weighting), "
    "use `with protected.encoding():` and pass the result as prompt_embeds, which is released and charged. Only if this text is public, "
    "use `with protected.public():`."
)
STRANGER = " It was run within a call of the pipeline by code that is not the pipeline's own: {where}."
OUTSIDE = (
    "The {model} of a protected pipeline was run outside of a call of that pipeline. Call the pipeline itself; only with public text, use "
    "`with protected.public():`."
)


_gates: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[TextGate]] = weakref.WeakKeyDictionary()


def accesses_of(modules: Iterable[nn.Module]) -> set[Access]:
    """Of the gates on these modules and on their parts, of whichever hosts."""
    parts = (part for module in modules for part in parts_of(module))
    return {gate.access for part in parts for gate in _gates.get(part, ())}


def parts_of(encoder: nn.Module) -> list[nn.Module]:
    """What of a text encoder is gated: itself and its parts, which some libraries call one by one, down to its layers."""
    found: dict[nn.Module, None] = {}

    def gather(module: nn.Module) -> None:
        if module in found:
            return
        found[module] = None
        for child in module.children():
            if isinstance(module, (nn.ModuleList, nn.Sequential)):
                found[child] = None  # a layer: what is in it reads rows
            else:
                gather(child)

    gather(encoder)
    return list(found)


class TextGate:
    """A forward pre-hook on a text encoder that raises `ProtectionLostError` unless `access` is open in this context.

    Protected hosts may share an encoder: what one of them may encode, the gates of the others let through.
    """

    def __init__(self, encoder: nn.Module, access: Access, message: str = CLOSED) -> None:
        self.encoder = encoder
        self.access, self._message = access, message
        self._hook = self._register()
        self._sharing = _gates.setdefault(encoder, weakref.WeakSet())
        self._sharing.add(self)

    def _register(self) -> Any:
        return self.encoder.register_forward_pre_hook(self._gate)

    # Never traced: under torch.compile it breaks the graph (or, with fullgraph, fails), so the gate stays closed.
    @torch.compiler.disable
    def _gate(self, module: nn.Module, args: Any) -> None:
        self.check()

    def check(self) -> None:
        """Raises ProtectionLostError unless the module may run here and now."""
        refuse_recording()
        if not any(gate.allows() for gate in tuple(self._sharing)):
            where = self.access.stranger()
            raise ProtectionLostError(self._message + ("" if where is None else STRANGER.format(where=where)))

    def allows(self) -> bool:
        return self.access.encoding or self.access.public

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(NO_COPY)

    @staticmethod
    def installed(gates: Iterable[TextGate]) -> bool:
        """Whether all of them are where they were put."""
        return all(gate._hook.id in gate.encoder._forward_pre_hooks for gate in gates)

    def remove(self) -> None:
        self._hook.remove()
        self._sharing.discard(self)


class CallGate(TextGate):
    """Lets a denoiser run within calls of its pipeline only: whoever else hands it embeddings hands it no release.

    A compiled graph asks for the permission whenever it runs. A graph that was made before the gate knows nothing of it: `surround` puts
    the gate around it.
    """

    def __init__(self, model: nn.Module, access: Access) -> None:
        self._key = next(_keys)
        _by_key[self._key] = self
        super().__init__(model, access, OUTSIDE.format(model=type(model).__name__))
        self.surround()

    def _register(self) -> Any:
        return self.encoder.register_forward_pre_hook(self._gate_or_trace, with_kwargs=True)

    def _gate_or_trace(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not torch.compiler.is_compiling():
            self.check()
            return None
        # what the model is given depends on the answer, so that no compiler drops the question
        args = tuple(call_allowed(a, self._key) if isinstance(a, torch.Tensor) else a for a in args)
        return args, {
            n: call_allowed(v, self._key) if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()
        }

    def allows(self) -> bool:
        return self.access.serving or self.access.public

    def surround(self) -> None:
        """Of a model that was compiled in place since."""
        compiled = self.encoder._compiled_call_impl
        if compiled is not None and not isinstance(compiled, _Surrounded):
            self.encoder._compiled_call_impl = _Surrounded(self, compiled)

    def remove(self) -> None:
        compiled = self.encoder._compiled_call_impl
        if isinstance(compiled, _Surrounded) and compiled.gate is self:
            self.encoder._compiled_call_impl = compiled.compiled
        super().remove()


class _Surrounded:
    """A compiled call behind its gate."""

    def __init__(self, gate: CallGate, compiled: Any) -> None:
        self.gate, self.compiled = gate, compiled

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.gate.check()
        return self.compiled(*args, **kwargs)


_keys = itertools.count(1)
_by_key: weakref.WeakValueDictionary[int, CallGate] = weakref.WeakValueDictionary()


@torch.library.custom_op("hf_dp_xattn::call_allowed", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def call_allowed(given: torch.Tensor, key: int) -> torch.Tensor:
    """What a denoiser is given, where it may run. Raises ProtectionLostError elsewhere."""
    gate = _by_key.get(key)
    if gate is not None:  # else it was removed
        gate.check()
    return given.clone()


@call_allowed.register_fake
def _(given: torch.Tensor, key: int) -> torch.Tensor:
    return torch.empty_like(given)


def _pass_on(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return gradient, None


call_allowed.register_autograd(_pass_on)
