"""What the placeholders in circulation name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch

from ..errors import ReleaseError
from .placeholder import Tag
from .released import Binding, ReleasedContext

MAX_BINDINGS = 1024


class Bindings:
    """The placeholders that are in circulation: the latest `MAX_BINDINGS`, or all of one call that has more."""

    def __init__(self) -> None:
        self._known: OrderedDict[Tag, Binding] = OrderedDict()

    def add(self, bindings: Iterable[Binding], beside: Iterable[Tag] = ()) -> list[Tag]:
        """Those of one call, whose tags these are; of others, all but those that it names beside them, older ones go first."""
        bindings = list(bindings)
        tags, kept = (
            [b.tag for b in bindings],
            [b for tag in beside if (b := self._known.get(tag)) is not None],
        )
        for binding in (*kept, *bindings):
            self._known[binding.tag] = binding
            self._known.move_to_end(binding.tag)
        while len(self._known) > max(MAX_BINDINGS, len({*tags, *(b.tag for b in kept)})):
            self._known.popitem(last=False)
        return tags

    def find(self, tags: Iterable[Tag]) -> list[Binding]:
        """Raises ReleaseError for a tag that is not in circulation."""
        bindings = [self._known.get(tag) for tag in tags]
        if None in bindings:
            raise ReleaseError(
                "A placeholder names no release of this host: it was made before the last unprotect, by another host, or too long ago. "
                "Call release.inputs() again."
            )
        return [b for b in bindings if b is not None]


def unique(tags: Iterable[Tag | None]) -> tuple[Tag, ...]:
    return tuple(dict.fromkeys(t for t in tags if t is not None))


def bind(context: ReleasedContext, public_rows: torch.Tensor | None, tag: Tag) -> Binding:
    """A binding of a release with its own public rows, and those of a public prompt after them."""
    rows = context.public_rows
    if public_rows is not None:
        rows = torch.cat([rows.to(public_rows.device, public_rows.dtype), public_rows])
    return Binding(context, rows, tag)
