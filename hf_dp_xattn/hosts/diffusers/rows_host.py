"""`RowsHost`: a pipeline whose denoiser updates its rows of text, or reads them in a way that is not patched: it is given released rows.

The release of a prompt is decoded to rows, which stand in the outputs of `encode_prompt` for a public stand-in: post-processing, and
nothing of the denoiser is patched. All else (masks, text ids, lengths) is the stand-in's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError, UnsupportedModelError
from ...mechanisms.base import LayerSpec
from ...mechanisms.context_rows import ContextRows
from ...mechanisms.structure import ExactStructure
from ..accounts import Settings
from ..fingerprint import SIZE, Fingerprint, fingerprint
from ..guard import Guard
from ..host_words import HostWords, Setting, rows_words
from ..layer import Layer
from ..placeholder import Tag, new_tag
from ..released import ReleasedContext
from ..text.prompt_swap import text_encoders
from .denoiser_gate import Call
from .denoiser_host import DenoiserHost
from .placed_prompts import NOT_REACHED, PlacedPrompts
from .prompt_encoder import PromptEncoder, tensors_of
from .rows_encoder import UNITS, RowsEncoder
from .text_layers import UndoError

MECHANISMS = ("anchors", "none")


class RowsLayer(Layer):
    """The input of the denoiser: a row is its own key and value. module: the denoiser."""

    computes = False

    def __init__(self, model: Any, channels: int) -> None:
        self.name, self.module, self.softcap, self.scale = "encode_prompt", model, None, 1.0
        self.heads, self.key_dim, self.value_dim, self.channels = 1, channels, channels, channels

    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = rows.unsqueeze(1)
        return states, states

    def spec(self, dtype: torch.dtype) -> LayerSpec:
        return LayerSpec(self.name, self.heads, self.key_dim, self.value_dim, self.scale)

    def sketch(self, dtype: torch.dtype) -> torch.Tensor:
        """No weight takes part."""
        return torch.zeros(2, SIZE, SIZE)

    def output_gain(self) -> torch.Tensor:
        return torch.ones(1)


class RowsPrompts(PlacedPrompts):
    """One pipeline that is given released rows."""

    _encoder: RowsEncoder

    def _refuse_compiled(self) -> None:
        return  # a graph reads rows as ever

    def _is_placed(self, where: tuple[int, ...], tensor: torch.Tensor) -> bool:
        return where == self._encoder.where or where in self._encoder.vectors

    def _mark(
        self,
        call: Call,
        tag: Tag,
        tensors: dict[tuple[int, ...], torch.Tensor],
        where: tuple[int, ...],
        element: int,
        tensor: torch.Tensor,
    ) -> None:
        rows = call.rows.get(tag)
        context = self._released(tag) if rows is None else ContextRows(rows, rows.new_zeros(len(rows)))
        tensor[element] = self._encoder.place(context, where, tensors, element)
        call.read = True

    def _released(self, tag: Tag) -> ContextRows:
        (binding,) = self._at.bindings.find([tag])
        self._at.verify([binding.context])
        return rows_of(binding.context)

    def _try(self, original: Callable[..., Any], bound: inspect.BoundArguments, count: int) -> None:
        """The call with rows of public texts, until its denoiser has run. Those of two texts, at first: the denoiser must be told."""
        proven = bool(self._host.proven)
        texts = (self._encoder.stand_in,) if proven else (self._encoder.stand_in, *self._encoder.others)
        seen = [self._reached(original, bound, count, self._encoder.read(text)) for text in texts]
        if None in seen or (not proven and seen[0] == seen[1]):
            raise self._unsupported(NOT_REACHED)
        self._host.proven.update(self._host.models)

    def _reached(
        self, original: Callable[..., Any], bound: inspect.BoundArguments, count: int, rows: torch.Tensor
    ) -> list[Any] | None:
        """Sums of all that the denoiser is given at its first step; None where it is not reached. rows: public."""
        tags = tuple(new_tag() for _ in range(count))
        call = Call(tags, proving=True, rows=dict.fromkeys(tags, rows))
        given: list[Any] = []

        def note(module: Any, args: Any, kwargs: Any) -> None:
            given.append([(w, float(t.double().sum())) for w, t in tensors_of([*args, *kwargs.values()])])

        model = self._host.models[""]
        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            self._rehearsed(original, bound, call, [model])
        finally:
            hook.remove()
        return given[0] if given and call.read else None


class RowsHost(DenoiserHost):
    """Its denoiser is given released rows.

    Args:
        pipe: the pipeline.
        reason: why its attention is not patched.
    """

    def __init__(self, pipe: Any, reason: UnsupportedModelError) -> None:
        self.reason = reason
        self._rows = RowsEncoder(pipe, text_encoders(pipe))
        super().__init__(pipe)

    def find_layers(self) -> dict[str, Layer]:
        self._layers, self.text_layers = {}, {}
        self._channels = self._rows.channels
        self.input = RowsLayer(self.models[""], self._channels)
        return {self.input.name: self.input}

    def watched(self) -> list[torch.nn.Module]:
        return []

    def sketch(self) -> Fingerprint:
        return fingerprint([self.input], self.model.dtype)

    def check_mechanism(self, config: DPXAttnConfig) -> None:
        """Raises UnsupportedModelError, ConfigError where no rows are released."""
        if config.mechanism not in MECHANISMS:
            raise UnsupportedModelError(
                f"{self.reason} mechanism='anchors' releases its encoded prompt as rows (unit='row' or 'context')."
            )
        if config.unit == "group":
            raise ConfigError(UNITS)

    def guarded(self, settings: Settings) -> Guard:
        self.check_mechanism(settings.config)
        return super().guarded(settings)

    def encoder_for(self, pipe: Any) -> RowsEncoder:
        encoder = self._rows if pipe is self._rows.pipe else RowsEncoder(pipe, text_encoders(pipe))
        if encoder.channels != self.channels:
            raise UnsupportedModelError(
                f"{type(pipe).__name__} encodes prompts to other rows than the pipeline that its denoiser was protected with. Nothing was "
                "patched."
            )
        return encoder

    def _placed(self, pipe: Any, guard: Guard, encoder: PromptEncoder) -> PlacedPrompts:
        return RowsPrompts(pipe, self, guard, encoder)

    def words(self, setting: Setting) -> HostWords:
        rows = self._rows
        return rows_words(
            self.model,
            setting,
            rows.rows if rows.padded else None,
            len(rows.vectors),
            bool(rows.public_rows),
        )


def rows_of(released: ReleasedContext) -> ContextRows:
    """The decoded rows of a release; of mechanism "none" the rows themselves."""
    if released.context is not None:
        return released.context
    (structure,) = released.structures
    assert isinstance(structure, ExactStructure)
    rows = structure.value[0, 0]
    return ContextRows(rows, rows.new_zeros(len(rows)))


def placed_host(pipe: Any) -> DenoiserHost:
    """What adapts a pipeline for mechanisms on attention: by its cross-attention; or, where that is not patched, by its rows.

    Raises:
        UnsupportedModelError: neither can be, with the reason of the first.
    """
    try:
        host = DenoiserHost(pipe)
        host.probe()
    except UndoError:
        raise
    except UnsupportedModelError as reason:
        try:
            return RowsHost(pipe, reason)
        except UnsupportedModelError:
            raise reason from None
    return host
