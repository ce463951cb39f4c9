"""Gates: the text encoder of a protected pipeline runs only for our own encoding, or for what the caller declares public."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import DPXAttnError, ProtectionLostError
from .accounts import STAYS

NO_COPY = (
    "A protected host cannot be pickled or deep-copied: the copy would lose its gates. Save it with save_pretrained (which holds no "
    f"release), or call dpx.unprotect, make the copy, and protect both; {STAYS}."
)
CLOSED = (
    "The text encoder belongs to a protected pipeline and may not run on its own: its output would enter the UNet as public "
    "rows. Protect every pipeline that shares it (dpx.protect(other_pipe, config)). To encode a PRIVATE text yourself (prompt weighting), "
    "use `with protected.encoding():` and pass the result as prompt_embeds, which is released and charged. Only if this text is public, "
    "use `with protected.public():`."
)


class Access(threading.local):
    """What this thread may do: `public` > 0 inside `protected.public()`, `encoding` > 0 while we encode."""

    public = 0
    encoding = 0

    @contextmanager
    def enter(self, what: str) -> Iterator[None]:
        setattr(self, what, getattr(self, what) + 1)
        try:
            yield
        finally:
            setattr(self, what, getattr(self, what) - 1)


class TextGate:
    """A forward pre-hook on a text encoder that raises `ProtectionLostError` unless `access` is open in this thread."""

    def __init__(self, encoder: nn.Module, access: Access, message: str = CLOSED) -> None:
        self.encoder = encoder
        self._access, self._message = access, message
        self._hook = encoder.register_forward_pre_hook(self._gate)

    # Never traced: under torch.compile it breaks the graph (or, with fullgraph, fails), so the gate stays closed.
    @torch.compiler.disable
    def _gate(self, module: nn.Module, args: Any) -> None:
        if not (self._access.encoding or self._access.public):
            raise ProtectionLostError(self._message)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(NO_COPY)

    def installed(self) -> bool:
        return self._hook.id in self.encoder._forward_pre_hooks

    def remove(self) -> None:
        self._hook.remove()
