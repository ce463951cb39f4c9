"""A pipeline whose calls are ours: a call is looked up on the class, so the object is given a class of the same name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import DPXAttnError
from .access import NO_COPY


class SwappedClass:
    """call: in place of the class's own. Copies of the object are refused."""

    def __init__(self, host: Any, call: Callable[..., Any]) -> None:
        self._host = host
        self.original: type[Any] = type(host)
        like = {n: getattr(self.original, n) for n in ("__module__", "__qualname__", "__doc__")}
        own = {**like, "__call__": call, "__reduce_ex__": _no_copy}
        self._own: type[Any] = type(self.original.__name__, (self.original,), own)

    def install(self) -> None:
        self._host.__class__ = self._own

    def remove(self) -> None:
        if type(self._host) is self._own:
            self._host.__class__ = self.original

    def lost(self) -> str | None:
        """That it was replaced, or None."""
        return None if type(self._host) is self._own else f"the call of {self.original.__name__} was replaced"


def _no_copy(host: Any, protocol: Any) -> NoReturn:
    raise DPXAttnError(NO_COPY)
