"""Where a unit stands in its context, which is public, and so which shelf of the library answers it.

The first sentence of a prompt is of another kind than its last one, and those of short prompts are not those of long ones. The number of
units and each one's position are public under replace_one, so a choice of entries by both is free of privacy cost.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

PLACES = ("first", "second", "middle", "last")


@dataclass(frozen=True)
class Places:
    """lengths: the longest contexts (in units) of each bucket but the last, rising; empty: all lengths are alike."""

    lengths: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """How many shelves there are."""
        return len(PLACES) * (len(self.lengths) + 1)

    def shelf(self, index: int, count: int) -> int:
        """Of the unit at `index` (from 0) among `count`."""
        place = 0 if index == 0 else 3 if index == count - 1 else 1 if index == 1 else 2
        return self.bucket(count) * len(PLACES) + place

    def bucket(self, count: int) -> int:
        return bisect_left(self.lengths, count)

    def shelves(self, count: int) -> list[int]:
        """Of all units of a context."""
        return [self.shelf(i, count) for i in range(count)]
