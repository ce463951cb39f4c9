"""Whose code a frame runs: installed packages', a host's own, or its caller's."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from hf_dp_xattn.hosts.access import Access
from hf_dp_xattn.hosts.call_stack import HostCode, frames_now, place_of

SOURCE = """
import sys

class Host:
    def run(self):
        return sys._getframe()

class Scheduler:
    def run(self):
        return sys._getframe()

def helper():
    return sys._getframe()

class Derived(Host):
    pass
"""


def module(name: str) -> Any:
    made = types.ModuleType(name)
    exec(compile(SOURCE, f"/somewhere/{name}.py", "exec"), vars(made))
    return made


@pytest.mark.parametrize("name", ["a_project", "__main__"])
def test_a_hosts_own_code_is_its_classes_and_what_stands_beside_them(name: str) -> None:
    made = module(name)
    code = HostCode([made.Derived(), None, "text"])
    assert code.holds(made.Host().run()) and code.holds(made.Derived().run())
    assert not code.holds(made.Scheduler().run())
    assert code.holds(made.helper()) == (name != "__main__")
    assert not HostCode([]).holds(made.helper())
    assert HostCode([made.Scheduler()]).holds(made.Scheduler().run())
    assert not HostCode([]).holds(sys._getframe())


def test_installed_code_is_of_the_host() -> None:
    seen: list[FrameType] = []
    layer = torch.nn.Identity()
    layer.register_forward_hook(lambda *_: seen.extend(frames_now()))
    layer(torch.zeros(1))
    inner = seen[1 : seen.index(sys._getframe())]
    assert inner and all(HostCode([]).holds(f) for f in inner)
    assert HostCode([]).stranger(seen) is seen[0]  # the hook
    assert "test_call_stack.py" in place_of(seen[0])


def through(call: Callable[[], Any]) -> Any:
    """Code that is nobody's but this test's."""
    return call()


def test_a_permission_for_a_hosts_code_ends_where_other_code_runs() -> None:
    access = Access()
    with access.enter("serving", HostCode([])):
        assert access.serving and access.encoding and access.stranger() is None
        assert not through(lambda: access.serving) and not through(lambda: access.encoding)
        assert "test_call_stack.py" in str(through(access.stranger))
        with access.leave():
            assert not access.serving
        assert torch.utils._pytree.tree_map(lambda _: access.serving, [0]) == [False]
        with access.enter("encoding"):
            assert through(lambda: access.encoding) and not through(lambda: access.serving)
    assert not access.serving


def test_no_other_stack_has_the_permission() -> None:
    import contextvars
    import threading

    access, seen = Access(), list[bool]()
    with access.enter("serving", HostCode([])):
        copied = contextvars.copy_context()
        thread = threading.Thread(target=lambda: seen.append(copied.run(getattr, access, "serving")))
        thread.start()
        thread.join()
        assert access.serving
    assert seen == [False]
