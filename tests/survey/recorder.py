"""All that reaches a pipeline's models, its caller and its callbacks in one call, as digests of bytes: two calls can be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn


def flatten(value: Any, where: str = "") -> Iterator[tuple[str, bytes]]:
    """(where, bytes) of each tensor, array, picture, text and number in a nested value."""
    if isinstance(value, torch.Tensor):
        shown = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().reshape(-1))  # of stride 1
        raw = shown.view(torch.uint8).numpy().tobytes()
        yield f"{where}:{tuple(value.shape)}:{value.dtype}", raw
    elif isinstance(value, np.ndarray):
        yield f"{where}:{value.shape}:{value.dtype}", value.tobytes()
    elif isinstance(value, PIL.Image.Image):
        yield f"{where}:{value.size}:{value.mode}", value.tobytes()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        yield f"{where}:{len(value)}", b""
        for i, inner in enumerate(value):
            yield from flatten(inner, f"{where}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from flatten(vars(value), where)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        yield where, repr(value).encode()


@dataclasses.dataclass
class Record:
    """blobs: (where, bytes) in the order in which they were seen. models: how many forwards of models were seen."""

    blobs: list[tuple[str, bytes]] = dataclasses.field(default_factory=list)
    models: int = 0

    def add(self, where: str, value: Any) -> None:
        self.blobs += flatten(value, where)

    def digest(self) -> str:
        made = hashlib.sha256()
        for where, raw in self.blobs:
            made.update(where.encode())
            made.update(raw)
        return made.hexdigest()

    def bytes(self) -> bytes:
        out = io.BytesIO()
        for where, raw in self.blobs:
            out.write(where.encode() + b"\n" + raw + b"\n")
        return out.getvalue()

    def difference(self, other: Record) -> str:
        """The first place at which two calls differ, or nothing."""
        for (where, raw), (there, also) in zip(self.blobs, other.blobs, strict=False):
            if where != there or raw != also:
                return where
        return "" if len(self.blobs) == len(other.blobs) else "how much was seen"


@contextmanager
def recording(pipe: Any) -> Iterator[Record]:
    """Inside, what every model of a pipeline is given and gives back, and what its scheduler's steps are given, is recorded."""
    record, handles = Record(), []
    models = {id(c): (n, c) for n, c in pipe.components.items() if isinstance(c, nn.Module)}
    for name, model in models.values():

        def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            record.models += 1
            record.add(f"into {name}", (args, kwargs))

        def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            record.add(f"out of {name}", output)

        handles += [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
