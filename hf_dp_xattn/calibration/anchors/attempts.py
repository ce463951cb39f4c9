"""Fits of several release kinds, of which one that fails does not take the others' work with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ...errors import ConfigError


class Attempts:
    """What is left of the release kinds that were asked for.

    Args:
        kinds: all of them.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self._left = list(dict.fromkeys(kinds))
        self.failed: dict[str, str] = {}

    @property
    def left(self) -> list[str]:
        """Kinds that have not failed."""
        return list(self._left)

    def __contains__(self, kind: str) -> bool:
        return kind in self._left

    @contextmanager
    def of(self, *kinds: str) -> Iterator[None]:
        """What is done for a kind, or for some that need the same: where it fails and there are others, they are left out, with a warning.

        Args:
            kinds: some of them.

        Raises:
            ConfigError, RuntimeError, MemoryError: as they came, where no other kind is left.
        """
        try:
            yield
        except (ConfigError, RuntimeError, MemoryError) as error:
            rest = [k for k in self._left if k not in kinds]
            if not rest:
                raise
            lost = [k for k in self._left if k in kinds]
            self._left = rest
            why = str(error) or type(error).__name__
            self.failed.update(dict.fromkeys(lost, why))
            warnings.warn(
                f"Releases {', '.join(map(repr, lost))} could not be fitted and are left out: {why} What is kept: "
                f"{', '.join(map(repr, rest))}.",
                stacklevel=4,
            )
