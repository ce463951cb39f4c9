"""Methods of a host that are ours while it is protected: by instance attributes; its call, which is looked up on the class, by a class of
the same name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ..errors import DPXAttnError
from .access import NO_COPY


class SwappedClass:
    """call: in place of the class's own. Copies of the object are refused."""

    def __init__(self, host: Any, call: Callable[..., Any]) -> None:
        self._host = host
        self.original: type[Any] = type(host)
        like = {n: getattr(self.original, n) for n in ("__module__", "__qualname__", "__doc__")}
        namespace = {**like, "__call__": call, "__reduce_ex__": _no_copy}
        self._class: type[Any] = type(self.original.__name__, (self.original,), namespace)

    def install(self) -> None:
        self._host.__class__ = self._class

    def remove(self) -> None:
        if type(self._host) is self._class:
            self._host.__class__ = self.original

    def lost(self) -> str | None:
        """That it was replaced, or None."""
        return (
            None if type(self._host) is self._class else f"the call of {self.original.__name__} was replaced"
        )


def _no_copy(host: Any, protocol: Any) -> NoReturn:
    raise DPXAttnError(NO_COPY)


class Shadows:
    """Stand in for methods of a model, by instance attributes.

    Args:
        model: whose.
        serve: by name, what is called with the original and the bound arguments. A method that the model has not is left out.
        defaults: the arguments are those that were left out, too.
    """

    def __init__(
        self,
        model: Any,
        serve: Mapping[str, Callable[[Callable[..., Any], inspect.BoundArguments], Any]],
        *,
        defaults: bool = False,
    ) -> None:
        self._model, self._serve, self._defaults = model, serve, defaults
        self._shadows: dict[str, Callable[..., Any]] = {}

    def install(self) -> None:
        for name, serve in self._serve.items():
            original = getattr(self._model, name, None)
            if original is not None:
                self._shadows[name] = vars(self._model)[name] = _shadow(original, serve, self._defaults)

    def installed(self) -> bool:
        attributes = vars(self._model)
        return bool(self._shadows) and all(attributes.get(n) is s for n, s in self._shadows.items())

    def remove(self) -> None:
        for name, shadow in self._shadows.items():
            if vars(self._model).get(name) is shadow:
                del vars(self._model)[name]


def _shadow(original: Callable[..., Any], serve: Callable[..., Any], defaults: bool) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def shadow(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if defaults:
            bound.apply_defaults()
        return serve(original, bound)

    return shadow
