"""What every mechanism checks of the private data that it is given, before anything is computed, and which unit each row is of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError, ContextError
from ..privacy.units import NeighboringRelation

MAX_ROWS = 2**24  # int64 holds 2^24 sums of 2^38
_CHUNK_ENTRIES = 2**24  # float64 entries of the largest temporary: 128 MiB


@dataclass(frozen=True, eq=False, repr=False)
class LayerRows:
    """A context's private keys [H, n, d] and values [H, n, dv], a layer each."""

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]


Private = LayerRows | torch.Tensor  # keys and values, or rows [n, C] of context space


def count_rows(private: Private) -> int:
    """The number of rows; nothing is checked."""
    if isinstance(private, LayerRows):
        return private.keys[0].shape[-2] if len(private.keys) else 0
    return private.shape[0] if private.ndim == 2 else 0


def together(parts: Sequence[Private]) -> Private:
    """The rows of several pieces of one context."""
    if not isinstance(parts[0], LayerRows):
        return torch.cat([rows_of(p) for p in parts])
    pieces = [layers_of(p) for p in parts]
    keys, values = zip(*((p.keys, p.values) for p in pieces), strict=True)
    return LayerRows(
        *([torch.cat(layer, dim=1) for layer in zip(*each, strict=True)] for each in (keys, values))
    )


def layers_of(private: Private) -> LayerRows:
    """Raises ConfigError where rows were given to a mechanism that takes keys and values."""
    if not isinstance(private, LayerRows):
        raise ConfigError("This release takes keys and values: append LayerRows(keys, values), a layer each.")
    return private


def rows_of(private: Private) -> torch.Tensor:
    """Raises ConfigError where keys and values were given to a mechanism that takes rows."""
    if isinstance(private, LayerRows):
        raise ConfigError("This release takes rows of the context [n, C], not keys and values.")
    return private


def may_be_empty(neighboring: str) -> bool:
    """Where the number of rows is private, an empty context must give a release, not an error."""
    return NeighboringRelation(neighboring) is NeighboringRelation.ADD_OR_REMOVE_ONE


def check_context(rows: torch.Tensor, channels: int, *, may_be_empty: bool = False) -> int:
    """The number of rows [n, C]; raises before anything is computed.

    Raises:
        ConfigError: not a float tensor [n, C]. ContextError: no rows, too many rows, NaN or Inf.
    """
    if rows.ndim != 2 or rows.shape[1] != channels or not rows.is_floating_point():
        raise ConfigError(
            f"The context must be a float tensor [n, {channels}] (what to_k and to_v see), got {rows.ndim} "
            f"dimensions of {rows.dtype}."
        )
    n = rows.shape[0]
    if n == 0 and not may_be_empty:
        raise ContextError("The context has no rows (n = 0): there is nothing to release.")
    if n > MAX_ROWS:
        raise ContextError(f"The context has too many rows: at most {MAX_ROWS} can be summed exactly.")
    for part in row_chunks(n, channels):
        if not bool(torch.isfinite(rows[part]).all()):
            raise ContextError("The context's rows hold NaN or Inf; nothing was released.")
    return n


def row_chunks(n: int, width: int) -> Iterator[slice]:
    """Slices of rows of which `width` float64 entries each fit the memory bound; they decide speed, never a result."""
    size = max(1, _CHUNK_ENTRIES // max(1, width))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def check_groups(unit: str, n: int, groups: torch.Tensor | None) -> None:
    """Raises ConfigError when groups are missing, superfluous or of the wrong shape."""
    if unit != "group" and groups is not None:
        raise ConfigError(f"`groups` is only for unit='group', not unit={unit!r}.")
    if unit == "group" and (
        groups is None or groups.ndim != 1 or groups.shape[0] != n or groups.is_floating_point()
    ):
        raise ConfigError("unit='group' needs `groups`: an integer tensor [n] that names each row's group.")


def count_units(unit: str, n: int, groups: torch.Tensor | None) -> int:
    """How many units n rows are of; groups [n] for unit='group'."""
    return n if unit == "row" else 1 if groups is None else int(torch.unique(groups).numel())


def units_of_rows(unit: str, n: int, groups: torch.Tensor | None) -> torch.Tensor | None:
    """[n] int64 (CPU): the unit of each row, in the order of the groups' numbers; None where each row is one."""
    if groups is not None:
        owner: torch.Tensor = torch.unique(groups.cpu(), return_inverse=True)[1]
        return owner
    return torch.zeros(n, dtype=torch.int64) if unit == "context" else None
