"""The encoder's side of a protected model: inputs checked before anything is spent, then encoded one document at a time."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ....errors import ConfigError, ContextError
from ....unquoted import unquoted
from ...content_names import special_ids
from ...context import Trial, plain_bytes
from ...lengths import dimensions
from ...private_run import private_run
from ..named_lengths import longest
from .document_contexts import ENCODER_INPUTS, MAIN_INPUTS, MASK, STATES, TYPES

_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict", "use_cache")  # of a decoder as well


class EncoderSide:
    """Runs the model's encoder, which is closed to all others. kind: in words."""

    kind: ClassVar[str] = "encoder"

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def module(self) -> Any:
        return self._model.get_encoder()

    @property
    def _takes(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of its forward."""
        return inspect.signature(self.module.forward).parameters

    @property
    def _shorten(self) -> Any:
        """The host's own way from a mask over input frames to one over the encoder's rows, or None."""
        parts = (self._model, self._model.base_model, self.module)
        return next((f for p in parts if (f := getattr(p, "_get_feature_vector_attention_mask", None))), None)

    def refuse_others(self, inputs: Mapping[str, Any]) -> None:
        """Raises ConfigError for an argument that the unprotected encoder would use and this one does not: without a word it would have
        no effect."""
        for name in self._takes:
            value = inputs.get(name)
            if name not in (*ENCODER_INPUTS, *_OUTPUTS) and value is not None and value is not False:
                raise ConfigError(
                    f"{name} would be used by the unprotected model's encoder and is not supported on a protected one: leave it out. "
                    "Nothing was spent."
                )

    def _check_types(self, inputs: dict[str, torch.Tensor]) -> None:
        """Leaves out types that are all 0, as they are where none are given."""
        types = inputs[TYPES]
        if types.is_floating_point() or types.is_complex() or types.dtype == torch.bool:
            raise ContextError(f"`{TYPES}` must be integers; nothing was spent.")
        tables = [m for n, m in self.module.named_modules() if n.endswith("token_type_embeddings")]
        known = TYPES in self._takes and len(tables) == 1
        if STATES in inputs or not known:
            raise ConfigError(f"`{TYPES}` means nothing to this encoder, or beside its output: leave it out.")
        if bool(((types < 0) | (types >= tables[0].num_embeddings)).any()):
            raise ContextError(f"`{TYPES}` must lie in [0, {tables[0].num_embeddings}); nothing was spent.")
        if not bool(types.any()):
            del inputs[TYPES]

    def check(self, inputs: dict[str, torch.Tensor]) -> None:
        """Checks token ids and their types, and whether a mask can be told from the encoder's rows; leaves out a mask that hides nothing.

        Raises:
            ContextError: the encoder would fail on them, with a message that may show them; or the mask cannot be followed.
        """
        self._check_kind(inputs)
        if "input_ids" in inputs:
            self._check_ids(inputs["input_ids"])
        if TYPES in inputs:
            self._check_types(inputs)
        features = not {"input_ids", "inputs_embeds", STATES} & set(inputs)
        if not features or MASK not in inputs:
            return
        if self._model.config.model_type == "whisper" or bool(inputs[MASK].all()):
            del inputs[MASK]  # Whisper attends to silence too
        elif self._shorten is None:
            raise ContextError(
                "The mask of this encoder's input cannot be carried over to its output: release the inputs one by one, without padding."
            )

    def _check_kind(self, inputs: dict[str, torch.Tensor]) -> None:
        """Raises ContextError for token ids where a model hears, and the like."""
        known = set(self._takes) & set(MAIN_INPUTS)
        main = next((name for name in inputs if name in MAIN_INPUTS), None)
        if main is not None and known and main not in known:
            raise ContextError(
                f"This model's encoder reads {' or '.join(sorted(known))}, not {main}; nothing was spent."
            )

    def _check_ids(self, ids: torch.Tensor) -> None:
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim not in (1, 2):
            raise ContextError(f"Token ids must be an integer tensor [n] or [B, n], got {dimensions(ids)}.")
        limit = longest(self.module)
        if limit is not None and ids.shape[-1] > limit:
            raise ContextError(
                f"A document has more tokens than this encoder takes ({limit}); nothing was spent."
            )
        size = self.module.get_input_embeddings().num_embeddings
        if bool(((ids < 0) | (ids >= size)).any()):
            raise ContextError(f"Token ids must lie in [0, {size}).")

    def encode(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows [n, C] of encoder inputs of batch 1, and which of them are rows (None: all).

        Each document is encoded by itself, so that no other one can change its rounding.
        """
        rows = self.encode_batch(inputs)[0]
        mask = inputs.get(MASK)
        if mask is None:
            return rows, None
        mask = mask.to(rows.device)
        if mask.shape[1] != len(rows):
            mask = self._shorten(len(rows), mask)
        return rows, mask[0].to(torch.bool)

    def encode_batch(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Rows [B, n, C]: the last hidden state."""
        return unquoted(
            lambda: self._run(inputs),
            lambda kind: ContextError(
                f"The {self.kind} failed on a context ({kind}). Nothing was released; what was charged stays charged."
            ),
        )

    def _run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        device, dtype = self._model.device, self._model.dtype
        cast = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
        if (
            MASK not in cast and "input_ids" in cast
        ):  # else some models warn, once, of a text that begins or ends with padding
            cast |= {MASK: torch.ones_like(cast["input_ids"])} if MASK in self._takes else {}
        with private_run(self.module):
            states: torch.Tensor = self.module(**cast, return_dict=True)[0]
        return states

    def trial(self, inputs: dict[str, torch.Tensor]) -> Trial:
        """The encoding of zeros of the same shapes, under the same mask, which is public."""
        mask = inputs.get(MASK)
        pattern = b"" if mask is None else plain_bytes(mask)
        size = (*((n, tuple(v.shape), v.dtype) for n, v in inputs.items()), pattern)
        zeros = {n: v if n == MASK else torch.zeros_like(v) for n, v in inputs.items()}
        if "input_ids" in zeros:  # an ordinary token: some models count positions without padding
            special = special_ids(self._model)
            zeros["input_ids"] += next(i for i in itertools.count() if i not in special)
        return Trial(size, lambda: self._run(zeros)[0])
