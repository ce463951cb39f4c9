"""What a layer of a denoiser hands to scaled dot-product attention, taken there: whatever stands around it is the host's own code.

A layer's processor (its norms, rotations, gates, projections) runs as ever. The one call of `scaled_dot_product_attention` within it is
answered by us. A layer that makes none, or several, has another kind of attention (sliced, an image prompt beside the text) and fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ...errors import DPXAttnError, ProtectionLostError
from ..access import NO_COPY
from ..accounts import PROTECT_AGAIN

NOT_ONE = (
    "{name} computed its attention {times} times by scaled_dot_product_attention, where it must once: slicing, xformers, another attention "
    f"backend or an image prompt was switched on. Nothing was handed on. Undo that, call dpx.unprotect(pipe), and {PROTECT_AGAIN}."
)


@dataclass(frozen=True)
class Attention:
    """One call. query [B, H, m, d], key [B, H, n, d], value [B, H, n, dv]; mask broadcasts to [B, H, m, n], or None; rest: what else it is
    given."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    rest: dict[str, Any]

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> Attention:
        return cls(query, key, value, attn_mask, {"dropout_p": dropout_p, "is_causal": is_causal, **rest})

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        scale = self.rest.get("scale")
        return float(self.query.shape[-1] ** -0.5 if scale is None else scale)

    def exact(self) -> torch.Tensor:
        """[B, H, m, dv], as the host computes it."""
        return F.scaled_dot_product_attention(
            self.query, self.key, self.value, attn_mask=self.mask, **self.rest
        )

    def row_bias(self) -> torch.Tensor | None:
        """[B, 1 or H, 1, n] that the mask adds to the logits of all queries alike; None where it is of another kind."""
        mask = self.mask
        if self.rest.get("dropout_p") or self.rest.get("is_causal"):
            return None
        if mask is None:
            return self.key.new_zeros(len(self.query), 1, 1, self.key.shape[2])
        if mask.ndim != 4 or mask.shape[2] != 1:
            return None
        mask = mask.expand(len(self.query), -1, -1, self.key.shape[2])
        if mask.dtype == torch.bool:
            return self.key.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        return mask.to(self.key.dtype)

    def select(self, index: torch.Tensor) -> Attention:
        """Of some batch elements."""
        mask = self.mask
        if mask is not None and mask.ndim > 2 and mask.shape[0] == len(self.query):
            mask = mask[index]
        return replace(self, query=self.query[index], key=self.key[index], value=self.value[index], mask=mask)


class Answering(TorchFunctionMode):
    """While it lasts, `answer` stands in for scaled_dot_product_attention in this thread. calls: how often it was asked."""

    def __init__(self, answer: Callable[[Attention], torch.Tensor]) -> None:
        super().__init__()
        self._answer, self.calls = answer, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._answer(Attention.of(*args, **(kwargs or {})))


@contextmanager
def answered(name: str, answer: Callable[[Attention], torch.Tensor]) -> Iterator[None]:
    """`answer` is asked once. name: of the layer. Raises ProtectionLostError where it was not, or more often."""
    with Answering(answer) as mode:
        yield
    if mode.calls != 1:
        raise ProtectionLostError(NOT_ONE.format(name=name, times=mode.calls))


class _Taken(Exception):
    """What was looked for is there."""


def taken(run: Callable[[], Any]) -> Attention:
    """The first call of scaled_dot_product_attention in `run`, which is not finished. Raises ProtectionLostError where there is none."""
    calls: list[Attention] = []

    def take(call: Attention) -> NoReturn:
        calls.append(call)
        raise _Taken

    with Answering(take), suppress(_Taken):
        run()
    if not calls:
        raise ProtectionLostError(NOT_ONE.format(name="A layer", times=0))
    return calls[0]


class ServedForward:
    """Stands in for the forward of one attention layer, by an instance attribute.

    Args:
        name: of the layer.
        module: the layer.
        answer: what its attention gives.
    """

    def __init__(
        self, name: str, module: nn.Module, answer: Callable[[str, Any, Attention], torch.Tensor]
    ) -> None:
        self._name, self._module, self._answer = name, module, answer
        self._before = vars(module).get("forward")
        self.original = module.forward

    def install(self) -> None:
        vars(self._module)["forward"] = self

    def installed(self) -> bool:
        return vars(self._module).get("forward") is self

    def remove(self) -> None:
        if not self.installed():
            return
        del vars(self._module)["forward"]
        if self._before is not None:
            vars(self._module)["forward"] = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        states = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        with answered(self._name, functools.partial(self._answer, self._name, states)):
            return self.original(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(NO_COPY)
