"""Who may run what is closed: permissions that end with their block, and the gate of a text encoder that asks for one.

A permission belongs to the context (`contextvars`) that opened it and to those that were copied from it meanwhile: another task or thread
does not see it, however the two take turns. It is an object that is marked as ended when its block is left, in whatever thread or
task that happens, so that no copy outlives the block. A generator has no context of its own: what it opens would be seen by its caller
while it is suspended. So the generators that run when a permission is opened must run when it is used. A forked child
inherits open blocks that it never leaves, so a permission serves the process that opened it alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dis
import inspect
import itertools
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..errors import DPXAttnError, ProtectionLostError
from .accounts import STAYS
from .recorded_runs import refuse_recording

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

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class _Permission:
    """One entered block. frames: the generators that must be running where it is used."""

    __slots__ = ("_process", "frames", "kind", "owner")

    def __init__(self, owner: Access, kind: str, frames: frozenset[FrameType]) -> None:
        self.owner, self.kind, self.frames = owner, kind, frames
        self._process: int | None = os.getpid()

    @property
    def live(self) -> bool:
        """Not in a forked child: the block belongs to the parent, which tells nobody when it leaves it."""
        return self._process == os.getpid()

    def end(self) -> None:
        self._process, self.frames = None, frozenset()


_permissions: ContextVar[tuple[_Permission, ...]] = ContextVar("hf_dp_xattn_permissions", default=())


def _stack() -> list[FrameType]:
    """The frames that run in this thread; no generator makes the list, which would be one of them."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _suspendable() -> frozenset[FrameType]:
    """The frames on the stack that may be suspended while their caller goes on in this very context.

    Not those that contextlib drives: their block is that of a `with` statement of whoever uses them. Nor a task's coroutine and those that
    it awaits, which have a context of their own; a coroutine that is stepped by hand has not, within a task or without.
    """
    stack = _stack()
    awaited = _of_task(stack)
    return frozenset(
        f
        for f in stack
        if (
            f.f_code.co_flags & _GENERATORS or (f.f_code.co_flags & inspect.CO_COROUTINE and f not in awaited)
        )
        and not _of_contextlib(f)
    )


def _of_task(stack: list[FrameType]) -> set[FrameType]:
    """The coroutines on the stack that are suspended with the current task: its own, older ones, and those that await brought."""
    root = _task_frame()
    if root not in stack:
        return set()
    position = stack.index(root)
    awaited = {f for f in stack[:position] if f.f_back is not None and _awaits(f.f_back)}
    return awaited | set(stack[position:])


def _awaits(frame: FrameType) -> bool:
    """Whether it stands at an `await` (or `yield from`): what it called is suspended with it. Anything unknown is not."""
    code, at = frame.f_code.co_code, frame.f_lasti
    while at > 0 and dis.opname[code[at]] == "CACHE":  # inline caches belong to the instruction before them
        at -= 2
    return at >= 0 and dis.opname[code[at]] == "SEND"


def _of_contextlib(frame: FrameType) -> bool:
    return contextlib.__file__ in (f.f_code.co_filename for f in (frame, frame.f_back) if f is not None)


def _task_frame() -> FrameType | None:
    """Where the task of asyncio that runs in this thread has its own coroutine."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no running loop
        return None
    return getattr(task.get_coro(), "cr_frame", None) if task is not None else None


class Access:
    """What the running context may do: `public` inside `protected.public()`, `encoding` while we encode."""

    def __init__(self) -> None:
        self.key = next(_keys)  # names it in compiled graphs
        _known[self.key] = self

    @property
    def public(self) -> bool:
        return self._open("public")

    @property
    def encoding(self) -> bool:
        return self._open("encoding")

    def _open(self, kind: str) -> bool:
        granted = [p for p in _permissions.get() if p.live and p.owner is self and p.kind == kind]
        if any(not p.frames for p in granted):
            return True
        if not granted:
            return False
        running = frozenset(_stack())
        return any(p.frames <= running for p in granted)

    @contextmanager
    def enter(self, kind: str) -> Iterator[None]:
        permission = _Permission(self, kind, _suspendable())
        _permissions.set((*_live(), permission))
        try:
            yield
        finally:
            permission.end()
            _permissions.set(_live())  # of the context that leaves, which need not be the one that entered

    @contextmanager
    def leave(self, kind: str) -> Iterator[None]:
        """Inside, what was entered before does not hold: for code of a user that runs within a call."""
        token = _permissions.set(tuple(p for p in _live() if p.owner is not self or p.kind != kind))
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


_gates: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[TextGate]] = weakref.WeakKeyDictionary()


def accesses_of(modules: Iterable[nn.Module]) -> set[Access]:
    """Of the gates on these modules and on their parts, of whichever hosts."""
    parts = (part for module in modules for part in (module, *module.children()))
    return {gate.access for part in parts for gate in _gates.get(part, ())}


class TextGate:
    """A forward pre-hook on a text encoder that raises `ProtectionLostError` unless `access` is open in this context.

    Protected hosts may share an encoder: what one of them may encode, the gates of the others let through.
    """

    def __init__(self, encoder: nn.Module, access: Access, message: str = CLOSED) -> None:
        self.encoder = encoder
        self.access, self._message = access, message
        self._hook = encoder.register_forward_pre_hook(self._gate)
        self._sharing = _gates.setdefault(encoder, weakref.WeakSet())
        self._sharing.add(self)

    # Never traced: under torch.compile it breaks the graph (or, with fullgraph, fails), so the gate stays closed.
    @torch.compiler.disable
    def _gate(self, module: nn.Module, args: Any) -> None:
        refuse_recording()
        if not any(gate.access.encoding or gate.access.public for gate in tuple(self._sharing)):
            raise ProtectionLostError(self._message)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(NO_COPY)

    @staticmethod
    def installed(gates: Iterable[TextGate]) -> bool:
        """Whether all of them are where they were put."""
        return all(gate._hook.id in gate.encoder._forward_pre_hooks for gate in gates)

    def remove(self) -> None:
        self._hook.remove()
        self._sharing.discard(self)
