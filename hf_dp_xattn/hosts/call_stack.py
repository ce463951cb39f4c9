"""Frames that run: which of them may be suspended while others go on, and whose code they are."""

from __future__ import annotations

import asyncio
import contextlib
import dis
import inspect
import site
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import accelerate
import diffusers
import torch
import transformers

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_PACKAGES = (torch, diffusers, transformers, accelerate)  # wherever they lie


def frames_now() -> list[FrameType]:
    """The frames that run in this thread, the caller's first; no generator makes the list, which would be one of them."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def suspendable(stack: Sequence[FrameType]) -> frozenset[FrameType]:
    """The frames on the stack that may be suspended while their caller goes on in this very context.

    Not those that contextlib drives: their block is that of a `with` statement of whoever uses them. Nor a task's coroutine and those that
    it awaits, which have a context of their own; a coroutine that is stepped by hand has not, within a task or without.
    """
    awaited = _of_task(stack)
    return frozenset(
        f
        for f in stack
        if (
            f.f_code.co_flags & _GENERATORS or (f.f_code.co_flags & inspect.CO_COROUTINE and f not in awaited)
        )
        and not _of_contextlib(f)
    )


def opener(stack: Sequence[FrameType]) -> FrameType | None:
    """The frame whose `with` statement runs context managers that contextlib drives, if they are the first on the stack."""
    return next((f for f in stack if not _of_contextlib(f)), None)


def _of_task(stack: Sequence[FrameType]) -> set[FrameType]:
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


class HostCode:
    """The code that a host is made of: installed packages, and what defines the host's own classes. All other code is its caller's.

    Args:
        parts: the host and its models, tokenizers and the like, whose classes (and the functions beside these in their modules, but for a
            script's) belong to it, though they are not installed.
    """

    def __init__(self, parts: Iterable[Any]) -> None:
        known = {(c.__module__, c.__qualname__) for part in parts for c in type(part).__mro__}
        self._classes = tuple(known)
        self._modules = frozenset(m for m, _ in known) - {"__main__"}

    def holds(self, frame: FrameType) -> bool:
        """Whether a frame runs code of the host."""
        module, name = frame.f_globals.get("__name__"), frame.f_code.co_qualname
        if _is_installed(frame.f_code.co_filename):
            return True
        if str(module).startswith("torch._inductor."):  # what it has written for a compiled graph
            return True
        if any(module == m and name.startswith(f"{c}.") for m, c in self._classes):
            return True
        beside = frame.f_globals.get(name.partition(".")[0])
        return module in self._modules and callable(beside) and not isinstance(beside, type)

    def stranger(self, frames: Iterable[FrameType]) -> FrameType | None:
        """The first frame that runs other code."""
        return next((f for f in frames if not self.holds(f)), None)


def place_of(frame: FrameType) -> str:
    """Where a frame is, for a message."""
    return f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    paths = [p for n in ("stdlib", "platstdlib", "purelib", "platlib") if (p := sysconfig.get_path(n))]
    paths += [site.getusersitepackages(), str(Path(__file__).parents[1])]
    paths += [str(Path(str(p.__file__)).parent) for p in _PACKAGES]
    return tuple(f"{p}/" for path in paths for p in {path, str(Path(path).resolve())})


@lru_cache(maxsize=4096)
def _is_installed(name: str) -> bool:
    # torch and importlib make code of their own, which has no file
    return name.startswith(("<frozen ", "<eval_with_key>", *_installed()))
