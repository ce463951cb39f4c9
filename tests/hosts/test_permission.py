"""`protected.public()` ends with its block: for other tasks, threads, generators and processes, on each kind of host."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.access import Access

from ..hosts_tiny import CHANNELS, close, latents, tiny_unet
from .kinds import CONFIG, KINDS, Kind

EACH = pytest.mark.parametrize("name", KINDS)


class Setting:
    """A protected host, and what it answered to a private input when it was not."""

    def __init__(self, name: str) -> None:
        self.kind: Kind = KINDS[name]
        self.host = self.kind.make()
        self.want = self.kind.plain(self.host, 1)
        self.handle = dpx.protect(self.host, CONFIG)

    def leaks(self) -> bool:
        return self.kind.leaks(self.host, self.want)

    def open(self) -> bool:
        """Whether what is public passes, as it does inside a block."""
        return close(self.kind.plain(self.host, 1), self.want)


@pytest.fixture
def setting(name: str) -> Iterator[Setting]:
    setting = Setting(name)
    yield setting
    dpx.unprotect(setting.host)


@EACH
def test_a_block_across_await_opens_no_other_task(setting: Setting) -> None:
    async def baseline() -> bool:
        with setting.handle.public():
            await asyncio.sleep(0)
            return setting.open()

    async def main() -> tuple[bool, bool]:
        task = asyncio.create_task(baseline())
        await asyncio.sleep(0)
        return setting.leaks(), await task

    leaked, opened = asyncio.run(main())
    assert opened and not leaked and not setting.leaks()


@EACH
def test_a_suspended_generator_opens_nothing(setting: Setting) -> None:
    def stream() -> Iterator[bool]:
        with setting.handle.public():
            yield setting.open()
            yield setting.open()

    running = stream()
    assert next(running) and not setting.leaks()
    assert next(running) and not setting.leaks()
    assert next(running, None) is None and not setting.leaks()


@EACH
def test_a_generator_stepped_in_two_threads_leaves_nothing_open(setting: Setting) -> None:
    def stream() -> Iterator[None]:
        with setting.handle.public():
            yield

    running = stream()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(next, running).result()
        assert not one.submit(setting.leaks).result() and not other.submit(setting.leaks).result()
        other.submit(next, running, None).result()
        assert not one.submit(setting.leaks).result() and not other.submit(setting.leaks).result()
    assert not setting.leaks()
    with setting.handle.public():
        assert setting.open()


@EACH
def test_a_copied_context_is_closed_with_the_block(setting: Setting) -> None:
    with setting.handle.public():
        copied = contextvars.copy_context()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(copied.run, setting.open).result()  # as asyncio.to_thread does
            assert not pool.submit(setting.leaks).result()
    assert not copied.run(setting.leaks)


@EACH
def test_a_forked_child_is_closed_and_spends_nothing(setting: Setting) -> None:
    """The gates hold in a worker, locks that another thread held are free there, and a ledger in memory does not spend twice."""
    setting.kind.release(setting.handle, 2)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with setting.handle.lock, setting.handle.guard.calling:
            held.set()
            done.wait()

    def child() -> bool:
        with setting.handle.public():
            opened = setting.open()
        with pytest.raises(dpx.DPXAttnError):
            setting.kind.release(setting.handle, 3)
        return opened and not setting.leaks()

    def stale() -> bool:
        return not setting.leaks()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    try:
        assert in_child(child)
        with setting.handle.public():
            pass
        assert in_child(stale)
    finally:
        done.set()
        thread.join()


@EACH
@pytest.mark.parametrize("block", ["public", "encoding"])
def test_a_child_forked_inside_a_block_is_closed(setting: Setting, block: str) -> None:
    """It would never leave its copy of the block, as a worker of a pool that the block's first `submit` made."""
    access = setting.handle.guard.access
    with access.enter(block):
        assert in_child(lambda: not access.public and not access.encoding and not setting.leaks())

        def own() -> bool:
            with setting.handle.public():
                return setting.open()

        assert in_child(own)
        assert getattr(access, block)


def test_a_worker_that_a_block_made_serves_nothing_open_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    access = Access()
    monkeypatch.setattr(
        sys.modules[__name__], "_inherited", access
    )  # no access is pickled: workers inherit it
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        with access.enter("public"):
            assert not pool.submit(_open).result(60)  # forks here
        assert not pool.submit(_open).result(60)


_inherited: Access | None = None


def _open() -> bool:
    return _inherited is None or _inherited.public


def in_child(run: Callable[[], bool]) -> bool:
    """What a forked child finds; False where it fails or hangs."""
    pid = os.fork()
    if not pid:
        signal.alarm(120)
        code = 1
        try:
            code = 0 if run() else 1
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


# ---- what the permission itself is ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def wrapped(access: Access) -> Iterator[None]:
    with access.enter("public"):
        yield


def test_context_managers_around_it_hold_it_open() -> None:
    access = Access()
    with wrapped(access):
        assert access.public and not access.encoding and not Access().public
    with contextlib.ExitStack() as stack:
        stack.enter_context(access.enter("public"))
        stack.enter_context(wrapped(access))
        assert access.public
    assert not access.public
    with access.enter("public"), access.enter("public"):
        pass
    assert not access.public


@pytest.mark.parametrize("enter", [wrapped, lambda access: access.enter("public")])
def test_a_generator_that_uses_one_is_still_a_generator(enter: Any) -> None:
    access = Access()

    def opened(stack: contextlib.ExitStack) -> None:
        stack.enter_context(enter(access))

    def stream() -> Iterator[bool]:
        with contextlib.ExitStack() as stack:
            opened(stack)
            yield access.public

    running = stream()
    assert next(running) and not access.public
    running.close()

    def consumer() -> Iterator[bool]:
        with enter(access):
            for _ in range(2):
                yield all(access.public for _ in range(2))

    assert list(consumer()) == [True, True] and not access.public


def test_an_async_generator_opens_nothing_while_it_is_suspended() -> None:
    access = Access()

    async def stream() -> AsyncIterator[bool]:
        with access.enter("public"):
            await asyncio.sleep(0)
            yield access.public

    @contextlib.asynccontextmanager
    async def manager() -> AsyncIterator[None]:
        with access.enter("public"):
            yield

    async def main() -> None:
        async for inside in stream():
            assert inside and not access.public
        async with manager():
            assert access.public and await asyncio.to_thread(lambda: access.public)
        assert not access.public

    asyncio.run(main())


class Pause:
    def __await__(self) -> Iterator[None]:
        yield


async def baseline(access: Access, awaited: Awaitable[Any]) -> bool:
    with access.enter("public"):
        await awaited
        return access.public


async def outer(access: Access, awaited: Awaitable[Any]) -> bool:
    return await baseline(access, awaited)


@pytest.mark.parametrize("make", [baseline, outer])
@pytest.mark.parametrize("in_task", [False, True])
def test_a_coroutine_that_is_stepped_by_hand_opens_nothing(make: Any, in_task: bool) -> None:
    access = Access()

    def step() -> None:
        running = make(access, Pause())
        running.send(None)
        assert not access.public
        with pytest.raises(StopIteration) as stopped:
            running.send(None)
        assert stopped.value.value and not access.public

    async def within() -> None:
        await asyncio.sleep(0)
        step()
        await asyncio.sleep(0)

    asyncio.run(within()) if in_task else step()


def test_a_block_of_a_task_is_open_for_what_the_task_awaits_and_starts() -> None:
    access = Access()

    class Block:
        """Entered by a coroutine that is gone while the block lasts."""

        async def __aenter__(self) -> None:
            await asyncio.sleep(0)
            self.block = access.enter("public")
            self.block.__enter__()

        async def __aexit__(self, *raised: object) -> None:
            self.block.__exit__(None, None, None)

    async def look() -> bool:
        await asyncio.sleep(0)
        return access.public

    async def inner() -> bool:
        async with Block():
            return access.public and await look() and await asyncio.create_task(look())

    async def main() -> bool:
        return await inner() and await outer(access, asyncio.to_thread(lambda: access.public))

    async def threads() -> bool:
        async with Block():
            return await asyncio.to_thread(lambda: access.public)

    assert asyncio.run(main()) and asyncio.run(threads()) and not access.public


def test_a_dropped_generator_leaves_nothing() -> None:
    access = Access()

    def stream() -> Iterator[None]:
        with access.enter("public"):
            yield

    next(stream())
    assert not access.public


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["kernel_sum"])
def test_a_compiled_unet_asks_at_each_call(mechanism: str) -> None:
    """Compiled graphs have no gate; each of their runs asks the context that it runs in."""
    torch._dynamo.reset()
    unet, rows = tiny_unet(), torch.randn(1, 16, CHANNELS)
    handle = dpx.protect(unet, CONFIG.replace(mechanism=mechanism))
    compiled: Any = torch.compile(unet, backend="eager", fullgraph=True)

    @torch.no_grad()
    def finite() -> bool:
        return bool(compiled(latents(), 5, rows).sample.isfinite().all())

    def stream() -> Iterator[bool]:
        with handle.public():
            yield finite()

    running = stream()
    assert next(running) and not finite()
    with handle.public(), ThreadPoolExecutor(1) as pool:
        assert finite() and not pool.submit(finite).result()
    torch._dynamo.reset()
