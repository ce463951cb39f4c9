"""Codes of texts, by which a library's nearest entry is found: the host's own text encoder, or one of the user's.

Each text is encoded by itself (a batch of one, without padding): its code is a function of that text alone, whatever stands beside it.
Nothing about privacy rests on what the encoder says of a text, on its precision or on its weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import ConfigError, ContextError
from ..diffusers.architectures import unwrap
from ..diffusers.text_side import NO_LENGTH, without_length_warning
from ..private_run import evaluating, opened, private_run
from ..random_states import random_kept

Permit = Callable[[], AbstractContextManager[None]]
BATCH = 32  # public texts of one length that are encoded at once
LONGEST = 2048  # tokens of a text that are read; the rest takes no part in its code
PROBES = "a red apple", "a dog"  # two public texts that begin alike
ALIKE = 0.01  # of a row's norm, within rounding of bfloat16; rows that see two texts differ by far more
SLOTS = ("", "_2", "_3", "_4")  # of a diffusers pipeline's text encoders and tokenizers
OWN = (
    "Pass `encoder`: a function from a list of strings to codes [n, d], or (model, tokenizer) of an encoder of transformers, such as "
    "all-MiniLM-L6-v2."
)


@dataclass(frozen=True, eq=False)
class UnitEncoder:
    """Texts to codes [n, d], float32 on the CPU, each text by itself.

    name: what tells it from other encoders. one: a text's code [d] or [1, d]. permit: opens the host's gates while it runs. many: codes of
    PUBLIC texts in batches, [n, d]; None: one by one as well.
    """

    name: str
    one: Callable[[str], torch.Tensor] = field(repr=False)
    permit: Permit = field(default=nullcontext, repr=False)
    many: Callable[[Sequence[str]], torch.Tensor] | None = field(default=None, repr=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def public(self, texts: Sequence[str]) -> torch.Tensor:
        """Codes of PUBLIC texts: the same but for rounding, and several times faster. Raises ContextError where it fails."""
        with self.permit():
            try:
                if self.many is not None:
                    return self.many(texts).detach().to("cpu", torch.float32)
                return torch.stack([self._code(text) for text in texts])
            except Exception as error:
                raise ContextError(
                    f"The encoder of the library's codes fails on a public text ({type(error).__name__}: {error}). Nothing was spent."
                ) from error

    def trial(self) -> torch.Tensor:
        """The code of a public text, [1, d], made as those of private ones are. Raises ContextError where it fails."""
        return dataclasses.replace(self, many=None).public(PROBES[:1])

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Codes of private texts, whatever they hold: one at which the encoder fails, or that has a code of another length than a public
        text, has the code 0. An error would tell that it is among them; so would a log, a warning, or how many random numbers are gone."""
        length = self._length  # before the gates are open for private texts: it may raise

        def code(text: str) -> torch.Tensor | None:
            with suppress(Exception):
                return self._code(text)
            return None

        with private_run(), random_kept():
            with self.permit():
                codes = [code(text) for text in texts]
            if any(c is None or len(c) != length for c in codes):
                length = self.trial().shape[1]  # raises where it is the encoder that broke, whatever the text
        nothing = torch.zeros(length)
        return torch.stack([nothing if c is None or len(c) != length else c for c in codes])

    @functools.cached_property
    def _length(self) -> int:
        """Of a code."""
        return self.trial().shape[1]

    def _code(self, text: str) -> torch.Tensor:
        return self.one(text).detach().to("cpu", torch.float32).flatten()


def unit_encoder(
    host: Any, tokenizer: Any = None, *, encoder: Any = None, permit: Permit = nullcontext
) -> UnitEncoder:
    """The encoder of a host's library.

    Args:
        host: a pipeline of diffusers or transformers, or a model of transformers.
        tokenizer: of a model; by default the one that lies beside it.
        encoder: in place of the host's own: a function from a list of strings to codes [n, d]; (model, tokenizer) of an encoder; or a
            pipeline of transformers that has both.
        permit: opens the host's gates while its own encoder runs, or a pair with its model.

    Raises:
        ConfigError: the host has no text encoder, or there is no tokenizer for it.
    """
    if isinstance(encoder, UnitEncoder):
        return encoder
    model, words = parts_of(encoder)
    if model is not None and words is not None:
        return _of_tokens(
            model, words, permit if model is parts_of(host)[0] else functools.partial(opened, model)
        )
    if callable(encoder) and model is None:
        return _of_function(encoder)
    if encoder is not None:
        raise ConfigError(f"`encoder` cannot be a {type(encoder).__name__} by itself. {OWN}")
    model, host_tokenizer = parts_of(host)
    if model is None:
        raise ConfigError(f"This host has no text encoder with a tokenizer of its own. {OWN}")
    return _of_tokens(model, tokenizer or host_tokenizer or tokenizer_beside(model), permit)


def parts_of(host: Any) -> tuple[Any, Any]:
    """(model, tokenizer) by which a host reads texts, None where there is none: of a pipeline (of a diffusers one the first text encoder
    that has a tokenizer), of such a pair, or of a model, which has no tokenizer."""
    from diffusers import DiffusionPipeline
    from transformers import Pipeline, PreTrainedModel

    if isinstance(host, tuple) and len(host) == 2:
        return host if isinstance(host[0], PreTrainedModel) else (None, None)
    if isinstance(host, Pipeline):
        return host.model, host.tokenizer
    if isinstance(host, DiffusionPipeline):
        for slot in SLOTS:
            model = unwrap(getattr(host, f"text_encoder{slot}", None))
            words = getattr(host, f"tokenizer{slot}", None)
            if isinstance(model, PreTrainedModel) and callable(words):
                return model, words
        return None, None
    model = unwrap(host)
    return (model, None) if isinstance(model, PreTrainedModel) else (None, None)


def tokenizer_beside(model: Any) -> Any:
    """The tokenizer in the folder (or the cached repository) that a model was loaded from.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path or "", local_files_only=True)
    except (OSError, ValueError):
        raise ConfigError(
            "There is no tokenizer beside this model: pass tokenizer=..., or a text-generation pipeline, which has one."
        ) from None


def _of_function(function: Any) -> UnitEncoder:
    """Of a function of a list of strings, which is given one at a time."""

    def one(text: str) -> torch.Tensor:
        codes = function([text])
        return codes if isinstance(codes, torch.Tensor) else torch.as_tensor(np.asarray(codes))

    return UnitEncoder(str(getattr(function, "__qualname__", type(function).__name__)), one)


def _of_tokens(model: Any, tokenizer: Any, permit: Permit = nullcontext) -> UnitEncoder:
    """The mean of a text's hidden states: of a language model those of its middle layer, of an encoder the last ones. A first row that
    sees nothing of the text (under causal attention that of a start token) is left out; where such a model's tokenizer puts no start token
    there, one is put."""
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    reader = model.get_encoder() if seq2seq else model
    middle = None if seq2seq or not model.can_generate() else _middle_layer(reader)
    limit = token_limit(reader, tokenizer)
    start: list[int] = []

    def ids_of(text: str) -> list[int]:
        with without_length_warning(tokenizer):
            ids = tokenizer(text=text, truncation=True, max_length=limit - len(start)).input_ids
        plain: list[int] = ids[0] if ids and isinstance(ids[0], list) else list(ids)
        return [*start, *plain]

    def states(ids: list[list[int]]) -> torch.Tensor:
        """[n, length, C], of texts of one length."""
        device = next(reader.parameters()).device
        on_meta = device.type == "meta"  # offloaded: its hooks move what it is given
        tensor = torch.tensor(ids, device="cpu" if on_meta else device)
        with evaluating(reader):
            if middle is not None:
                return _stopped(reader, middle, tensor)
            out = reader(input_ids=tensor, attention_mask=torch.ones_like(tensor))
        rows: torch.Tensor = out.last_hidden_state
        return rows

    with torch.no_grad(), permit():
        first = [states([ids_of(text)])[0, 0] for text in PROBES]
    skip = int(_alike(*first))
    if skip and ids_of(PROBES[0])[0] not in tokenizer.all_special_ids:
        start += [_start_token(tokenizer)]

    def one(text: str) -> torch.Tensor:
        ids = ids_of(text)
        if len(ids) <= skip:  # no token of its own: a code like any other
            return torch.zeros_like(first[0])
        return states([ids])[0, skip:].to(torch.float32).mean(0)

    def many(texts: Sequence[str]) -> torch.Tensor:
        ids = [ids_of(text) for text in texts]
        codes = torch.zeros(len(ids), len(first[0]))
        for length in sorted({len(row) for row in ids}):
            if length > skip:
                alike = [i for i, row in enumerate(ids) if len(row) == length]
                for start in range(0, len(alike), BATCH):
                    part = alike[start : start + BATCH]
                    rows = states([ids[i] for i in part])[:, skip:]
                    codes[part] = rows.to(torch.float32).mean(1).cpu()
        return codes

    layer = "mean of the last hidden states" if middle is None else "mean of the middle layer's states"
    return UnitEncoder(f"{type(model).__name__} of {len(first[0])} channels, {layer}", one, permit, many)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two rows are one but for rounding: of texts of two lengths some CPUs add up in another order."""
    return float((one - other).float().norm()) <= ALIKE * float(one.float().norm())


def _start_token(tokenizer: Any) -> int:
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return int(next((token for token in named if token is not None), 0))


def token_limit(model: Any, tokenizer: Any, longest: int | None = None) -> int:
    """How many tokens of a text are read. longest: where that is known, by a pipeline. model: None where there is none."""
    config = getattr(model, "config", None)
    limits = [LONGEST, longest, getattr(config, "max_position_embeddings", None)]
    limits.append(getattr(tokenizer, "model_max_length", None))
    return min(n for n in limits if isinstance(n, int) and 2 < n < NO_LENGTH)


def _middle_layer(model: Any) -> nn.Module | None:
    """Of a language model; None where its layers are not found."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return stacks[0][max(count // 2 - 1, 0)] if stacks else None


class _Stop(BaseException):
    """What is above the layer is not run. No Exception: a model may catch those."""


def _stopped(model: Any, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[1, n, C]: what a layer gives of token ids [1, n]."""
    outputs: list[torch.Tensor] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        raise _Stop

    with _hooked(layer, stop), suppress(_Stop):
        model(input_ids=ids, use_cache=False)
    return outputs[0]


@contextmanager
def _hooked(layer: nn.Module, hook: Any) -> Iterator[None]:
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
