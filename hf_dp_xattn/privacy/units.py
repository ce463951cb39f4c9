"""Privacy units and neighbouring relations: what one neighbouring step changes, and what that costs."""

from __future__ import annotations

from enum import StrEnum

from ..errors import ConfigError


class Unit(StrEnum):
    """What one neighbouring step changes."""

    ROW = "row"
    GROUP = "group"
    CONTEXT = "context"


class NeighboringRelation(StrEnum):
    """How it changes: a unit becomes any other one (counts are public), or it appears or disappears.

    On hosts whose shapes show a number of slots (a padded prompt), that number is public under both relations; adding or
    removing a unit fills or empties its slots, and an empty slot contributes nothing.
    """

    REPLACE_ONE = "replace_one"
    ADD_OR_REMOVE_ONE = "add_or_remove_one"


def public_counts(unit: str, neighboring: str, rows: int, units: int) -> dict[str, int | None]:
    """Of `rows` and `units`, the numbers that all neighbours of a context share; None for the others: they may not leave.

    Under add_or_remove_one that is neither. Under replace_one a unit that is the whole context may be replaced by a longer one.
    """
    if NeighboringRelation(neighboring) is not NeighboringRelation.REPLACE_ONE:
        return {"rows": None, "units": None}
    return {"rows": None if unit == Unit.CONTEXT.value else rows, "units": units}


def sensitivity_factor(neighboring: NeighboringRelation | str) -> int:
    """Sensitivity of a sum of contributions of norm <= C, in multiples of C.

    replace_one: 2, since |a - a'| <= |a| + |a'| <= 2 C. add_or_remove_one: 1.

    Raises:
        ValueError: unknown relation.
    """
    return 2 if NeighboringRelation(neighboring) is NeighboringRelation.REPLACE_ONE else 1


def unit_and_relation(unit: str, neighboring: str) -> tuple[Unit, NeighboringRelation]:
    """Raises ConfigError for an unknown unit or neighbouring relation."""
    try:
        return Unit(unit), NeighboringRelation(neighboring)
    except ValueError:
        raise ConfigError(
            f"Unknown unit {unit!r} or neighboring {neighboring!r}; units: {', '.join(Unit)}; relations: "
            f"{', '.join(NeighboringRelation)}."
        ) from None
