"""`generate` of a protected model, shadowed by an instance attribute: what is private is released before transformers sees it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from ....errors import ConfigError, ContextError
from ...bindings import unique
from ...guard import Guard
from ...placeholder import read_tags
from ...shadows import Shadows
from .. import generating
from ..generating import (
    check_last_steps,
    generation_settings,
    named_arguments,
    refuse_arguments,
    setting,
    while_protected,
)
from ..named_lengths import longest
from .audio_lengths import refuse_lengths, transcribes
from .cross_attention import Calls
from .document_contexts import ENCODER_INPUTS, MAIN_INPUTS, MASK, STATES, TYPES
from .dry_run import dry_run
from .encoder_outputs import PlaceholderOutputs, last_hidden_state

_DOCUMENT = "it reads the document's tokens past the release"
REFUSED: dict[str, str] = {
    **generating.REFUSED,
    "past_key_values": "a cache made elsewhere may hold keys and values of a private context",
    "encoder_repetition_penalty": _DOCUMENT,
    "encoder_no_repeat_ngram_size": _DOCUMENT,
    "return_token_timestamps": "it reads cross-attention weights, which a release does not give",
}
HARMLESS: dict[str, tuple[Any, ...]] = {
    **generating.HARMLESS,
    "encoder_repetition_penalty": (1, 1.0),
    "encoder_no_repeat_ngram_size": (0,),
    "return_token_timestamps": (False,),
}
SWITCHED_OFF = ("encoder_no_repeat_ngram_size",)  # where a model's own settings ask for it (Blenderbot's do)


STEPS = 2  # of a dry run; Whisper's first is the detection of a language


class Generates(Protocol):
    """What `generate` asks of the host. serve: the inputs that stand in place of the encoder's."""

    guard: Guard

    @property
    def model(self) -> Any: ...
    @property
    def calls(self) -> Calls: ...
    def refuse_others(self, inputs: dict[str, Any]) -> None: ...
    def serve(self, inputs: dict[str, Any], copies: int) -> dict[str, Any]: ...


class GenerateShadow(Shadows):
    """Stands in for `model.generate` while the model is protected."""

    def __init__(self, host: Generates) -> None:
        super().__init__(host.model, {"generate": self._generate})
        self._host = host

    def _generate(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        self._host.guard.check_thoroughly()
        if self._host.guard.access.public:
            return original(*bound.args, **bound.kwargs)
        arguments = named_arguments(bound)
        config = generation_settings(self._model, arguments)
        self._check(arguments, config)
        if transcribes(self._model):
            refuse_lengths(arguments, config)
        else:
            refuse_longer(longest(self._model.get_decoder()), arguments, config)
        encoder_inputs = self._encoder_inputs(arguments)
        self._host.refuse_others(arguments)
        if getattr(config, "encoder_no_repeat_ngram_size", None):
            arguments["encoder_no_repeat_ngram_size"] = 0
        copies = 1
        if transcribes(self._model):  # repeats the batch by itself
            asked = arguments.get("num_return_sequences") or getattr(config, "num_return_sequences", None)
            copies, arguments["num_return_sequences"] = asked or 1, 1
        inputs = self._host.serve(encoder_inputs, copies)
        states = inputs[STATES].last_hidden_state
        if self._host.guard.promises.due(unique(read_tags(states))):
            zeros = as_inputs(torch.zeros_like(states), MASK in inputs)
            self._dry_run(STEPS, original, arguments, zeros)
        with while_protected(self._host.guard.check):
            return original(**arguments, **inputs)

    def _dry_run(
        self, steps: int, original: Callable[..., Any], arguments: dict[str, Any], stand_in: dict[str, Any]
    ) -> None:
        public, limit = self._host.guard.public(), self._host.calls.at_most(steps)
        dry_run(public, limit, torch.device(self._model.device), original, arguments, stand_in)

    def _check(self, arguments: dict[str, Any], config: Any) -> None:
        """Raises ConfigError for ways of generating that would go past the release, that are not supported, or fail on the way."""
        refuse_arguments(arguments, config, REFUSED, HARMLESS, SWITCHED_OFF)
        check_last_steps(arguments, config, self._model.get_input_embeddings().num_embeddings)

    def _encoder_inputs(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Takes the encoder's inputs out of `arguments`."""
        inputs = {n: arguments.pop(n) for n in ENCODER_INPUTS if arguments.get(n) is not None}
        for name in (*ENCODER_INPUTS, "inputs"):
            value = arguments.pop(name, None)
            if name == "inputs" and value is not None:
                inputs[self._model.main_input_name] = value
        if not any(n in inputs for n in (*MAIN_INPUTS, STATES)):
            raise ContextError(
                "generate needs a private document: pass release.inputs(), or the encoder's inputs, which are released first."
            )
        return inputs


def refuse_longer(limit: int | None, arguments: Mapping[str, Any], config: Any) -> None:
    """Of a decoder with so many learned positions: what is longer fails at the last of them, behind the charge.

    Raises:
        ConfigError: the shortest text that is asked for is longer. A warning is given where only the longest one is.
    """

    def asked(name: str) -> int:
        value = setting(name, arguments, config)
        return value if isinstance(value, int) else 0

    start = arguments.get("decoder_input_ids")
    begun = start.shape[-1] if isinstance(start, torch.Tensor) and start.ndim == 2 else 1
    most = begun + asked("max_new_tokens") if asked("max_new_tokens") else asked("max_length")
    least = min(max(asked("min_length"), begun + asked("min_new_tokens")), most or math.inf)
    if limit is None or most - 1 <= limit:  # the last token is not read again
        return
    has = f"The decoder has {limit} positions, and max_new_tokens (or max_length) asks for {most} tokens"
    if least - 1 > limit:
        raise ConfigError(
            f"{has}, at least {least}: it would fail on the way. Ask for fewer. Nothing was spent."
        )
    warnings.warn(f"{has}: a longer text than {limit} fails. Ask for fewer.", stacklevel=4)


def read_placeholder(inputs: dict[str, Any]) -> torch.Tensor | None:
    """The placeholder among encoder inputs, or None where they are a private context."""
    states = last_hidden_state(inputs.get(STATES))
    if states is None or states.ndim != 3 or not any(tag is not None for tag in read_tags(states)):
        return None
    if any(n in inputs for n in (*MAIN_INPUTS, TYPES)):
        raise ConfigError("Pass either release.inputs() or a document, not both.")
    check_mask(inputs.get(MASK), states)
    return states


def check_mask(mask: Any, placeholder: torch.Tensor) -> None:
    """Raises ConfigError for a mask over a release: it would have no effect."""
    if mask is None:
        return
    if (
        not isinstance(mask, torch.Tensor)
        or mask.shape != placeholder.shape[:2]
        or not bool((mask == 1).all())
    ):
        raise ConfigError(
            f"A release is read whole: `{MASK}` must be the one that release.inputs() gives, or left out."
        )


def as_inputs(placeholder: torch.Tensor, takes_mask: bool) -> dict[str, Any]:
    """What a model is given in place of its encoder's inputs; new objects, because generate expands them in place."""
    inputs: dict[str, Any] = {STATES: PlaceholderOutputs(last_hidden_state=placeholder)}
    if takes_mask:
        inputs[MASK] = placeholder.new_ones(placeholder.shape[:2], dtype=torch.int64)
    return inputs
