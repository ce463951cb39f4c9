"""`Checkpoints`: what a calibration keeps in a folder while it is made, so that one that was broken off goes on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import ConfigError
from .progress import Progress

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]


class CannotKeepError(ConfigError):
    """Checkpoints cannot be written; what was kept before is as it was."""


@dataclass(frozen=True)
class Checkpoints:
    """folder: None: nothing is kept. of: what tells this calibration from others that the folder may hold, as `digest` gives it."""

    folder: Path | None = None
    of: str = ""

    def read(self, name: str) -> Tensors | None:
        """What was kept under a name; None where nothing was, or half a file.

        Args:
            name: within this calibration.
        """
        if self.folder is None:
            return None
        try:
            return load_file(self._path(name))
        except (OSError, SafetensorError):
            return None

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes tensors whole or not at all.

        Args:
            name: within this calibration; what it had before is replaced.
            tensors: what to keep.

        Raises:
            CannotKeepError: the folder cannot be written, or the disk is full.
        """
        if self.folder is None:
            return
        path = self._path(name)
        whole = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: t.detach().contiguous() for k, t in tensors.items()}, whole)
            whole.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                whole.unlink()
            raise CannotKeepError(
                f"What was done so far cannot be kept in {path.parent.name!r} ({error}). Free some space, or choose another folder."
            ) from None

    def each(
        self, items: Sequence[T], stage: str, make: Callable[[T], torch.Tensor], bar: Progress
    ) -> Iterator[torch.Tensor]:
        """One tensor of each item, made or read again, in order.

        Args:
            items: the same ones in every run of this calibration.
            stage: their name.
            make: computes the tensor of one.
            bar: shows them as a stage of this name.
        """
        bar.expect(stage, len(items), 0.0)
        bar.begin()
        for i, item in enumerate(items):
            stored = self.read(f"{stage}-{i}")
            tensors = {"rows": make(item)} if stored is None else stored
            if stored is None:
                self.keep(f"{stage}-{i}", tensors)
            bar.step(stage, timed=stored is None)
            yield tensors["rows"]
            bar.begin()

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{digest(self.of, name)}.safetensors"


NOTHING_KEPT = Checkpoints()


def digest(*values: object) -> str:
    """Of plain values, tensors, and lists and mappings of them: equal values have equal ones.

    Raises:
        TypeError: anything else is among them.
    """
    sha = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            sha.update(f"mapping {len(value)}:".encode())
            for key, part in value.items():
                add(key)
                add(part)
        elif isinstance(value, (list, tuple)):
            sha.update(f"list {len(value)}:".encode())
            for part in value:
                add(part)
        elif value is None or isinstance(value, (str, bytes, bool, int, float)):
            written = repr(value).encode()
            sha.update(f"{type(value).__name__} {len(written)}:".encode() + written)
        elif hasattr(value, "tolist"):  # of numpy
            add(value.tolist())
        else:
            raise TypeError(f"no digest of {type(value).__name__}")

    add(values)
    return sha.hexdigest()[:24]
