"""Charges of contexts, and the rule by which one more is allowed or refused. Numbers only: where they are kept, `ledger_file.py` says.

*Scope.* What one neighbouring step changes must be the same in all that is composed: unit, relation and (for groups) which rows are a unit.
Charges of one digest that differ in it are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import BudgetExceededError, ConfigError, LedgerError
from ..report import rounded_up
from .accountant import Event, epsilon_of, event_from_dict, needs_delta
from .units import NeighboringRelation, Unit

_TOLERANCE = 1e-9  # covers the outward rounding of `epsilon_of`, nothing else
DIGEST = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}")
_FIELDS = (
    *("id", "digest", "events", "epsilon_before", "epsilon_after", "delta", "number_of_releases", "time"),
    *("note", "unit", "neighboring", "grouping"),
)
REUSE = "Use the release that exists (it serves any number of queries), spend less, or raise it."


@dataclass(frozen=True)
class Budget:
    """What a context may spend in total: epsilon at delta, and (optionally) for which unit and relation.

    Charges under different units or relations do not compose, so a ledger refuses to mix them on one digest.

    Args:
        epsilon: in total, in (0, inf).
        delta: in total, in [0, 1).
        unit: of the guarantee; by default the config's.
        neighboring: its relation; by default the config's.

    Raises:
        ConfigError: a value is out of range, or unknown.

    Example:
        >>> protected = dpx.protect(pipe, epsilon=4.0, calibration=library, budget=dpx.Budget(8.0, 1e-5))
        >>> first = protected.release("a red circle")
        >>> second = protected.release("a red circle", fresh=True)  # both are paid from the one budget
    """

    epsilon: float
    delta: float
    unit: Unit | str | None = None
    neighboring: NeighboringRelation | str | None = None

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{name} of a budget must be a finite number, not {value!r}.")
        if self.epsilon <= 0 or not 0 <= self.delta < 1:
            raise ConfigError("A budget needs epsilon > 0 and delta in [0, 1).")
        try:
            if self.unit is not None:
                object.__setattr__(self, "unit", Unit(self.unit))
            if self.neighboring is not None:
                object.__setattr__(self, "neighboring", NeighboringRelation(self.neighboring))
        except ValueError as error:
            raise ConfigError(f"Unknown unit or neighbouring relation: {error}.") from None

    def scoped(self, unit: str, neighboring: str) -> Budget:
        """This budget for what is released in that unit and relation.

        Args:
            unit: of the releases.
            neighboring: their relation.

        Raises:
            ConfigError: it is for others.
        """
        budget = dataclasses.replace(self, unit=unit, neighboring=neighboring)
        for name, value in (("unit", self.unit), ("neighboring", self.neighboring)):
            if value not in (None, getattr(budget, name)):
                raise ConfigError(
                    f"The budget is for {name}={str(value)!r}, the config releases with {name}={str(getattr(budget, name))!r}, and one "
                    "says nothing about the other. Make them agree, or leave it out of the budget."
                )
        return budget

    def _scope(self) -> tuple[str | None, str | None]:
        return (
            None if self.unit is None else Unit(self.unit).value,
            None if self.neighboring is None else NeighboringRelation(self.neighboring).value,
        )


class Name(NamedTuple):
    """What is charged: a context by its digest; and, of unit="group", how its rows are grouped (`Ledger.grouping`). former: a name of
    before, charged only where the ledger holds charges of it."""

    digest: str
    grouping: str | None = None
    former: bool = False


@dataclass(frozen=True)
class Charge:
    """One charge. `number_of_releases` counts the charges of this context up to and with this one. grouping: of unit="group", which rows
    are a unit (`Ledger.grouping`); None where that is not known, as of what an earlier version charged."""

    id: str
    digest: str
    epsilon_before: float
    epsilon_after: float
    delta: float
    number_of_releases: int
    time: str
    events: tuple[Event, ...] = ()
    note: Mapping[str, Any] = field(default_factory=dict)
    unit: str | None = None
    neighboring: str | None = None
    grouping: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return values | {"events": [e.to_dict() for e in self.events], "note": dict(self.note)}


def charge_from_dict(data: Any) -> Charge:
    """Of `to_dict`. Raises LedgerError, or what an event raises."""
    if not isinstance(data, dict) or set(data) != set(_FIELDS):
        raise LedgerError("A charge in the ledger has unknown or missing fields.")
    if data["grouping"] is not None and not DIGEST.fullmatch(data["grouping"]):
        raise LedgerError("A charge in the ledger has no valid grouping.")
    events = tuple(event_from_dict(e) for e in data["events"])
    if not events or not DIGEST.fullmatch(data["digest"]):
        raise LedgerError("A charge in the ledger has no events or no valid digest.")
    return Charge(**(data | {"events": events}))


def epsilon_at(events: Sequence[Event], delta: float) -> float:
    """Epsilon of events together; inf at delta 0 where they need one."""
    if delta == 0 and needs_delta(events):
        return math.inf
    return epsilon_of(events, delta)


def check_note(note: Mapping[str, Any]) -> dict[str, Any]:
    """A copy. Raises ConfigError unless it is short and plain."""
    for name, value in note.items():
        scalar = value is None or isinstance(value, (str, bool, int, float))
        if not isinstance(name, str) or not scalar or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError("A note maps strings to JSON scalars.")
        if len(name) > 64 or (isinstance(value, str) and len(value) > 200):
            raise ConfigError("A note is short (64 / 200 characters) and public: no private text.")
    return dict(note)


def _assess(
    earlier: Sequence[Charge],
    name: Name,
    events: tuple[Event, ...],
    budget: Budget,
    note: dict[str, Any],
    time: str,
    epsilon: Callable[[tuple[Event, ...]], float],
) -> Charge:
    requested = epsilon(events)
    scope = budget._scope()
    if any((c.unit, c.neighboring) != scope for c in earlier):
        raise ConfigError(
            "This context was charged under another unit or neighbouring relation, and the two do not "
            "compose. Use the release that exists, or release it under the earlier one. (A public text that is only tried out can have "
            "a ledger of its own: ledger=dpx.Ledger().) Nothing was charged."
        )
    grouped = scope[0] == Unit.GROUP.value or name.grouping is not None
    if grouped and any(c.grouping is None or c.grouping != name.grouping for c in earlier):
        raise ConfigError(
            "This context was charged under another grouping of its rows (or in another way of encoding groups apart, or by a version "
            "that did not record it): a unit of the one is not a unit of the other, and the two do not compose. Use the release that "
            "exists, or release it under the earlier grouping. Nothing was charged."
        )
    old = tuple(e for c in earlier for e in c.events)
    spent, after = epsilon(old), epsilon((*old, *events))
    after = max(spent, after)
    if not after <= budget.epsilon * (1 + _TOLERANCE):
        raise BudgetExceededError(
            f"This release would exceed the context's budget: epsilon {rounded_up(spent):g} is spent in "
            f"{len(earlier)} release(s), the new one alone costs {rounded_up(requested):g}, together {rounded_up(after):g}, "
            f"of a budget of {budget.epsilon:.6g} at delta = {budget.delta:.3g}. Nothing was charged. "
            f"{REUSE}"
        )
    id_, delta, count = secrets.token_hex(8), float(budget.delta), len(earlier) + 1
    return Charge(id_, name.digest, spent, after, delta, count, time, events, note, *scope, name.grouping)


def assess_all(
    before: Sequence[Charge],
    names: Sequence[Name],
    events: tuple[Event, ...],
    budget: Budget,
    note: dict[str, Any],
    time: str,
) -> tuple[Charge, ...]:
    """The charges of one release of several names, behind those of `before`.

    Raises:
        BudgetExceededError: beyond the budget of one of them.
        ConfigError: no events, or another scope than earlier charges.
    """
    if not events:
        raise ConfigError("A charge needs at least one event.")
    of: dict[str, list[Charge]] = {name.digest: [] for name in names}
    for charge in before:
        if charge.digest in of:
            of[charge.digest].append(charge)
    # documents of one corpus have mostly spent alike
    epsilon = functools.cache(lambda spent: epsilon_at(spent, budget.delta))
    assessed = []
    for name in names:
        if name.former and not of[name.digest]:
            continue
        assessed.append(_assess(of[name.digest], name, events, budget, note, time, epsilon))
        of[name.digest].append(assessed[-1])
    return tuple(assessed)
