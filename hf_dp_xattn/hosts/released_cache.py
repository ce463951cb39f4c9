"""Releases by the ledger's name of their context, for as long as their handle is active: what was charged once must be found again.

The latest are in memory. Those before them are set aside in a temporary folder that only this user may read, and that goes with the handle;
what is written is what was released, and could be published. Never written are exact rows (`mechanism="none"`, made again for nothing) and
seeded releases (of tests, kept in memory).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ..errors import ReleaseError
from .placeholder import Tag
from .released import ReleasedContext
from .storage import context_header, context_tensors, read_context

MOST = 256  # releases in memory
Key = tuple[str, str]
"""The ledger's names: of the context, and of how it was encoded and grouped."""


@dataclass(frozen=True)
class _Aside:
    """A release whose tensors are in a file. header: the rest of it, as a saved release's file says it. devices: but for the CPU."""

    file: Path
    header: dict[str, Any]
    tag: Tag
    running: bool
    devices: dict[str, torch.device]


class ReleasedCache:
    """Finds releases again; a `fresh` one takes the place of the one before."""

    def __init__(self) -> None:
        self._latest: OrderedDict[Key, ReleasedContext] = OrderedDict()
        self._aside: dict[Key, _Aside] = {}
        self._kept: dict[Key, ReleasedContext] = {}  # cannot be set aside
        self._folder: tuple[int, Path] | None = None  # of this process: a fork has its own

    def __len__(self) -> int:
        return len({*self._latest, *self._aside, *self._kept})

    def __repr__(self) -> str:
        return f"ReleasedCache({len(self)} releases, {len(self._latest)} in memory)"

    def find(self, keys: Sequence[Key]) -> ReleasedContext | None:
        """The release under the first of these keys that has one.

        Raises:
            ReleaseError: it was set aside, and its file is gone.
        """
        for key in keys:
            released = self._latest.get(key) or self._kept.get(key)
            if released is None and key in self._aside:
                released = _read(self._aside[key])
                self._latest[key] = released
            if released is not None:
                if key in self._latest:
                    self._latest.move_to_end(key)
                self._trim()
                return released
        return None

    def holds(self, keys: Sequence[Key]) -> bool:
        """Whether there is a release under one of these keys."""
        return any(key in known for key in keys for known in (self._latest, self._aside, self._kept))

    def put(self, key: Key, released: ReleasedContext) -> None:
        """Takes in a new release."""
        self._kept.pop(key, None)
        before = self._aside.pop(key, None)
        if before is not None:
            before.file.unlink(missing_ok=True)
        self._latest[key] = released
        self._latest.move_to_end(key)
        self._trim()

    def clear(self) -> None:
        """Forgets all of them, files included."""
        for known in (self._latest, self._aside, self._kept):
            known.clear()
        if self._folder is not None:
            _remove(*self._folder)
            self._folder = None

    def _trim(self) -> None:
        while len(self._latest) > MOST:
            key, released = self._latest.popitem(last=False)
            if key in self._aside or released.guarantee.mechanism == "none":
                continue
            if not released.guarantee.is_private:
                self._kept[key] = released
                continue
            try:
                self._aside[key] = self._write(released)
            except OSError as error:
                self._kept[key] = released
                warnings.warn(
                    f"Releases that were not used lately cannot be set aside ({type(error).__name__} in the temporary folder): they stay "
                    "in memory.",
                    stacklevel=2,
                )

    def _write(self, released: ReleasedContext) -> _Aside:
        file = self._place() / f"{len(self._aside)}-{os.urandom(8).hex()}.safetensors"
        tensors = context_tensors(released)
        devices = {name: t.device for name, t in tensors.items() if t.device.type != "cpu"}
        file.write_bytes(save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}))
        running = released.fingerprint.running
        return _Aside(file, context_header(released), released.tag, running, devices)

    def _place(self) -> Path:
        if self._folder is None or self._folder[0] != os.getpid():
            folder = Path(tempfile.mkdtemp(prefix="hf_dp_xattn-"))  # mode 0700
            self._folder = os.getpid(), folder
            weakref.finalize(self, _remove, os.getpid(), folder)
        return self._folder[1]


def _remove(process: int, folder: Path) -> None:
    if os.getpid() == process:  # a fork leaves its parent's alone
        shutil.rmtree(folder, ignore_errors=True)


def _read(aside: _Aside) -> ReleasedContext:
    try:
        tensors = load(aside.file.read_bytes())
    except OSError as error:
        raise ReleaseError(
            f"A release that was set aside in the temporary folder cannot be read ({type(error).__name__}): was the folder emptied? A new "
            "one (fresh=True) is charged. Nothing was spent."
        ) from None
    tensors = {name: t.to(aside.devices.get(name, "cpu")) for name, t in tensors.items()}

    released = read_context(0, aside.header, tensors)
    fingerprint = dataclasses.replace(released.fingerprint, running=aside.running)
    return dataclasses.replace(released, fingerprint=fingerprint, tag=aside.tag)
