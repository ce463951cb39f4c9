"""`Weights`: the weights of a host that its releases must fit, looked at, stamped and sketched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .fingerprint import Fingerprint
from .weight_changes import is_away, stamp, written


@contextmanager
def own_precision(model: Any) -> Iterator[None]:
    """While it lasts, no autocast of the caller's: what is compared is compared in the model's own precision."""
    device = torch.device(model.device).type
    with torch.autocast("cpu" if device == "meta" else device, enabled=False):
        yield


class Weights:
    """Of some modules of a model.

    Args:
        model: whose dtype counts.
        roots: the modules, as they are now.
        take: makes their sketch. It costs calls of their parts, which users' hooks and profilers see.
        kept: the latest sketch serves while nothing shows a change; else it is taken anew at each question.
    """

    def __init__(
        self,
        model: Any,
        roots: Callable[[], Sequence[nn.Module]],
        take: Callable[[], Fingerprint],
        *,
        kept: bool = True,
    ) -> None:
        self._model, self.roots, self._take, self._kept = model, roots, take, kept
        self._changes = 0
        self._due = False
        self._written: object = None
        self._known: tuple[object, Fingerprint] | None = None
        self.look()  # the first look is no change

    def look(self) -> None:
        """Sums them all, and counts a change since the last look: of what is written to a parameter's `.data`, no stamp tells."""
        now = written(self.roots())
        self._due = False
        if now != self._written:
            self._changes, self._written = self._changes + 1, now

    def expect(self) -> None:
        """A call is about to come, which looks: `generate` at its start, a forward by itself by `look_if_due`."""
        self._due = True

    def look_if_due(self) -> None:
        """Once for each `expect`."""
        if self._due:
            self.look()

    def state(self) -> object:
        """Equal as long as neither a look nor a stamp shows a change. Costs no arithmetic."""
        return self._model.dtype, self._changes, stamp(self.roots())

    def current(self) -> Fingerprint:
        """Their sketch. Taken anew where they are offloaded (on meta), which neither a stamp nor a sum shows.

        Raises:
            ConfigError: there are no weights.
        """
        now = self.state()
        if not self._kept or self._known is None or self._known[0] != now or is_away(self.roots()):
            with own_precision(self._model):
                self._known = now, self._take()
        return self._known[1]

    def forget(self) -> None:
        """The next sketch is taken anew."""
        self._known = None
