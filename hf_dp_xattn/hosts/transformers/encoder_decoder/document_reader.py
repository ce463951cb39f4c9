"""Public contexts of documents that an encoder reads apart from each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ....calibration.public_data import choose_contexts
from ....errors import ConfigError
from ...encode_once import EncodeOnce
from .cross_probing import context_channels
from .document_contexts import MASK, STATES, gather
from .document_encoder import EncoderSide

ENCODER_ROWS = 8192
KNOWN = ("input_ids", "inputs_embeds", STATES)
NEEDS = (
    "public_contexts for unit='group' is a list of contexts, each a batch of documents as `protected.release(..., groups='documents')` "
    "takes it: token ids [d, L], or input_ids with attention_mask, or rows of the encoder's output [d, L, C]"
)


class DocumentReader:
    """Encodes public contexts one after the other; keeps the rows of documents of token ids that may come again, `memory_mb` of them."""

    def __init__(self, model: Any, memory_mb: int) -> None:
        self._encoder = EncoderSide(model)
        self._known = EncodeOnce(memory_mb)

    def check(self, context: Any) -> tuple[torch.Tensor, torch.Tensor, str]:
        """(documents, their mask [d, L], the name of the encoder's input).

        Raises:
            ConfigError: not a batch of documents.
        """
        inputs = gather(context)
        self._encoder.check(inputs)
        name = next(k for k in inputs if k != MASK)
        main = inputs[name]
        if name not in KNOWN or main.ndim != (2 if name == "input_ids" else 3) or not len(main):
            raise ConfigError(NEEDS + ".")
        mask = inputs.get(MASK)
        mask = torch.ones(main.shape[:2], dtype=torch.bool) if mask is None else mask.to("cpu", torch.bool)
        if mask.shape != main.shape[:2] or not bool(mask.any(1).all()):
            raise ConfigError(NEEDS + f"; a mask of shape {list(mask.shape)} that leaves a row of each.")
        return main, mask, name

    def read(self, context: Any) -> list[torch.Tensor]:
        """Each document's rows [rows, C], float16 on the CPU."""
        main, mask, name = self.check(context)
        if name == STATES:
            return [d[m].to("cpu", torch.float16) for d, m in zip(main, mask, strict=True)]
        if name != "input_ids":
            return list(self._encode(name, main, mask))
        names = [d[m].numpy().tobytes() for d, m in zip(main.to("cpu", torch.int64), mask, strict=True)]

        def encode(new: list[int]) -> Iterator[torch.Tensor]:
            index = torch.tensor(new)
            return self._encode(name, main[index], mask[index])

        return self._known.rows(names, encode)

    def _encode(self, name: str, main: torch.Tensor, mask: torch.Tensor) -> Iterator[torch.Tensor]:
        """In batches: their rounding may depend on each other, they are public."""
        size = max(1, ENCODER_ROWS // main.shape[1])
        for part, kept in zip(main.split(size), mask.split(size), strict=True):
            states = self._encoder.encode_batch({name: part, MASK: kept.long()}).to("cpu", torch.float16)
            yield from (s[m] for s, m in zip(states, kept, strict=True))


def choose(model: Any, public: Any, width: int, memory_mb: int, seed: int) -> list[Any]:
    """The public contexts to fit to, by the memory that one takes; width: numbers kept beside its units.

    Raises:
        ConfigError: not a list of contexts.
    """
    if isinstance(public, (str, dict)) or not hasattr(public, "__len__") or not len(public):
        raise ConfigError(NEEDS + ".")
    documents = max(len(DocumentReader(model, 0).check(c)[0]) for c in list(public)[:8])
    return choose_contexts(public, 2 * (documents * context_channels(model) + width), memory_mb, seed)
