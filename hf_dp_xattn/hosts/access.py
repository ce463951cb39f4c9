"""Who may run what is closed: permissions that end with their block.

A permission belongs to the context (`contextvars`) that opened it and to those that were copied from it meanwhile: another task or thread
does not see it, however the two take turns. It is an object that is marked as ended when its block is left, in whatever thread or
task that happens, so that no copy outlives the block. A generator has no context of its own: what it opens would be seen by its caller
while it is suspended. So the generators that run when a permission is opened must run when it is used. A forked child
inherits open blocks that it never leaves, so a permission serves the process that opened it alone.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

import torch

from .accounts import STAYS
from .call_stack import HostCode, frames_now, opener, place_of, suspendable

NO_COPY = (
    "A protected host cannot be pickled or deep-copied: the copy would lose its gates. Save it with save_pretrained (which holds no "
    f"release), or call dpx.unprotect, make the copy, and protect both; {STAYS}."
)


class _Permission:
    """One entered block. frames: the generators that must be running where it is used. code: whose it is: nothing else may run between
    the block, which `opener` entered, and where it is used; None where anybody may use it."""

    __slots__ = ("_opener", "_process", "code", "frames", "kind", "owner")

    def __init__(self, owner: Access, kind: str, stack: list[FrameType], code: HostCode | None) -> None:
        self.owner, self.kind, self.frames, self.code = owner, kind, suspendable(stack), code
        self._opener = None if code is None else opener(stack)
        self._process: int | None = os.getpid()

    @property
    def live(self) -> bool:
        """Not in a forked child: the block belongs to the parent, which tells nobody when it leaves it."""
        return self._process == os.getpid()

    def serves(self, stack: Sequence[FrameType]) -> bool:
        """Whether it may be used where these frames run, the innermost first."""
        return self.frames <= frozenset(stack) and (self.code is None or self.stranger(stack) is None)

    def stranger(self, stack: Sequence[FrameType]) -> FrameType | None:
        """The first frame of other code since the block was entered; the last of all where it was not entered on this stack."""
        if self.code is None:
            return None
        if self._opener not in stack:
            return stack[-1]
        return self.code.stranger(stack[: stack.index(self._opener)])

    def end(self) -> None:
        self._process, self.frames, self._opener = None, frozenset(), None


_permissions: ContextVar[tuple[_Permission, ...]] = ContextVar("hf_dp_xattn_permissions", default=())


class Access:
    """What the running context may do: `public` inside `protected.public()`, `encoding` while we encode, `serving` while the host runs on
    what is released or public."""

    def __init__(self) -> None:
        self.key = next(_keys)  # names it in compiled graphs
        _known[self.key] = self

    @property
    def public(self) -> bool:
        return self._open("public")

    @property
    def encoding(self) -> bool:
        return self._open("encoding") or self.serving

    @property
    def serving(self) -> bool:
        return self._open("serving")

    def _granted(self, kind: str) -> list[_Permission]:
        return [p for p in _permissions.get() if p.live and p.owner is self and p.kind == kind]

    def _open(self, kind: str) -> bool:
        granted = self._granted(kind)
        if any(not p.frames and p.code is None for p in granted):
            return True
        if not granted:
            return False
        stack = frames_now()
        return any(p.serves(stack) for p in granted)

    def stranger(self) -> str | None:
        """Where the code is that is kept from using an open block for the host's own code; None where there is none."""
        stack = frames_now()
        found = (p.stranger(stack) for p in self._granted("serving"))
        return next((place_of(f) for f in found if f is not None), None)

    @contextmanager
    def enter(self, kind: str, code: HostCode | None = None) -> Iterator[None]:
        """code: who alone may use it, with nobody else's between; None for anybody."""
        permission = _Permission(self, kind, frames_now(), code)
        _permissions.set((*_live(), permission))
        try:
            yield
        finally:
            permission.end()
            _permissions.set(_live())  # of the context that leaves, which need not be the one that entered

    @contextmanager
    def leave(self) -> Iterator[None]:
        """Inside, what was entered before to encode or to serve does not hold: for code of a user that runs within a call."""
        token = _permissions.set(tuple(p for p in _live() if p.owner is not self or p.kind == "public"))
        try:
            yield
        finally:
            _permissions.reset(token)


@torch.compiler.disable
def permitted(access: Access) -> bool:
    """Whether `public` is open as a layer runs. Its gate may have been told so by a call that was interrupted since: torch runs no hook
    after a KeyboardInterrupt, and what the gate noted stays in the thread."""
    return access.public


def _live() -> tuple[_Permission, ...]:
    return tuple(p for p in _permissions.get() if p.live)


_keys = itertools.count(1)
_known: weakref.WeakValueDictionary[int, Access] = weakref.WeakValueDictionary()


@torch.library.custom_op("hf_dp_xattn::public_allowed", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def public_allowed(like: torch.Tensor, key: int) -> torch.Tensor:
    """bool [] on the device of `like`: whether `public` is open here and now. A compiled graph asks anew at each run."""
    access = _known.get(key)
    return torch.tensor(access is not None and access.public, device=like.device)


@public_allowed.register_fake
def _(like: torch.Tensor, key: int) -> torch.Tensor:
    return like.new_empty((), dtype=torch.bool)
