"""What is charged: one event per noised release, exact and in lattice units, with its JSON form."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..errors import ConfigError

__all__ = [
    "Event",
    "GaussianEvent",
    "LaplaceEvent",
    "PureEvent",
    "TruncatedLaplaceEvent",
    "event_from_dict",
    "pure_epsilon",
]

_RATIONAL = re.compile(r"[1-9][0-9]{0,1999}(/[1-9][0-9]{0,1999})?")


def require_integer(value: object, name: str) -> int:
    """A positive int, or `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) <= 0:
        raise ConfigError(f"{name} must be a positive integer (lattice units), not {value!r}.")
    return int(value)


def require_rational(value: object, name: str) -> Fraction:
    """A positive int or Fraction, or `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Rational) or value <= 0:
        raise ConfigError(f"{name} must be a positive int or Fraction (not float), not {value!r}.")
    return Fraction(int(value.numerator), int(value.denominator))


@dataclass(frozen=True)
class GaussianEvent:
    """A discrete Gaussian release: l2 sensitivity (neighbouring factor included), variance; lattice units.

    *Formal guarantee.* sensitivity^2 / (2 sigma_squared)-zCDP; arXiv 2004.00010, Proposition 5 and Theorem
    14. Raises `ConfigError` unless both are positive and exact (int or Fraction).
    """

    sensitivity: int
    sigma_squared: Fraction | int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sensitivity", require_integer(self.sensitivity, "sensitivity"))
        object.__setattr__(self, "sigma_squared", require_rational(self.sigma_squared, "sigma_squared"))

    def to_dict(self) -> dict[str, Any]:
        """JSON form; rationals are strings, so nothing is rounded. Inverse: `event_from_dict`."""
        return {"kind": "gaussian", "sensitivity": self.sensitivity, "sigma_squared": str(self.sigma_squared)}


@dataclass(frozen=True)
class LaplaceEvent:
    """A discrete Laplace release: l1 sensitivity (neighbouring factor included), scale; lattice units.

    *Formal guarantee.* (sensitivity / scale)-DP, delta = 0. Raises `ConfigError` unless both are positive
    and exact.
    """

    sensitivity: int
    scale: Fraction | int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sensitivity", require_integer(self.sensitivity, "sensitivity"))
        object.__setattr__(self, "scale", require_rational(self.scale, "scale"))

    def to_dict(self) -> dict[str, Any]:
        """JSON form; rationals are strings, so nothing is rounded. Inverse: `event_from_dict`."""
        return {"kind": "laplace", "sensitivity": self.sensitivity, "scale": str(self.scale)}


@dataclass(frozen=True)
class PureEvent:
    """A release of any epsilon-DP mechanism. Raises `ConfigError` unless epsilon is positive and exact."""

    epsilon: Fraction | int

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", require_rational(self.epsilon, "epsilon"))

    def to_dict(self) -> dict[str, Any]:
        """JSON form; rationals are strings, so nothing is rounded. Inverse: `event_from_dict`."""
        return {"kind": "pure", "epsilon": str(self.epsilon)}


@dataclass(frozen=True)
class TruncatedLaplaceEvent:
    """A joint release x + Z, x in Z^d, Z independent truncated discrete Laplace; lattice units.

    sensitivity: l1 sensitivity of the whole vector. largest: the most that one coordinate changes. squared: squared l2
    sensitivity. All with the neighbouring factor; the last two follow from the first where they are not given.

    *Formal guarantee.* See `privacy/truncated_laplace.py`: (sensitivity / scale, off_support)-DP, and outside of an event of probability
    off_support a Renyi curve that composes. Raises `ConfigError` unless all is positive and exact, largest <= sensitivity,
    squared <= sensitivity * largest (which holds for every vector) and largest <= bound.
    """

    sensitivity: int
    scale: Fraction | int
    bound: int
    largest: int | None = None
    squared: Fraction | int | None = None

    def __post_init__(self) -> None:
        l1 = require_integer(self.sensitivity, "sensitivity")
        largest = l1 if self.largest is None else require_integer(self.largest, "largest")
        squared = l1 * largest if self.squared is None else require_rational(self.squared, "squared")
        bound = require_integer(self.bound, "bound")
        if not (largest <= l1 and squared <= l1 * largest and largest <= bound):
            raise ConfigError(
                "A truncated Laplace event needs largest <= sensitivity, squared <= sensitivity * largest, largest <= bound."
            )
        for name, value in (("sensitivity", l1), ("largest", largest), ("bound", bound)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "squared", Fraction(squared))
        object.__setattr__(self, "scale", require_rational(self.scale, "scale"))

    @property
    def shape(self) -> tuple[int, int, Fraction]:
        """(l1, largest, squared l2) sensitivities."""
        assert self.largest is not None and self.squared is not None  # set in __post_init__
        return self.sensitivity, self.largest, Fraction(self.squared)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; rationals are strings, so nothing is rounded. Inverse: `event_from_dict`."""
        return {
            "kind": "truncated_laplace",
            "sensitivity": self.sensitivity,
            "largest": self.largest,
            "bound": self.bound,
            "squared": str(self.squared),
            "scale": str(self.scale),
        }


Event = GaussianEvent | LaplaceEvent | PureEvent | TruncatedLaplaceEvent
_INTEGERS = ("sensitivity", "largest", "bound")
_KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "gaussian": (GaussianEvent, ("sensitivity", "sigma_squared")),
    "laplace": (LaplaceEvent, ("sensitivity", "scale")),
    "pure": (PureEvent, ("epsilon",)),
    "truncated_laplace": (TruncatedLaplaceEvent, ("sensitivity", "largest", "bound", "squared", "scale")),
}


def event_from_dict(data: Mapping[str, Any]) -> Event:
    """Inverse of `to_dict`. Unknown kinds, missing, surplus or inexact fields raise `ConfigError`."""
    if not isinstance(data, Mapping):
        raise ConfigError("An event must be a mapping with the key 'kind'.")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"Unknown kind of event; known: {sorted(_KINDS)}. A newer version may know it.")
    cls, fields = _KINDS[kind]
    if set(data) != {"kind", *fields}:
        raise ConfigError(f"An event of kind {kind!r} has exactly the fields {list(fields)}.")
    values: dict[str, Any] = {}
    for field in fields:
        value = data[field]
        if field not in _INTEGERS:
            if not isinstance(value, str) or not _RATIONAL.fullmatch(value):
                raise ConfigError(f"Field {field!r} of a {kind!r} event must be a string like '12' or '7/2'.")
            value = Fraction(value)
        elif value is None:
            raise ConfigError(f"Field {field!r} of a {kind!r} event must be a positive integer.")
        values[field] = value
    event: Event = cls(**values)
    return event


def pure_epsilon(event: LaplaceEvent | PureEvent) -> Fraction:
    """Exact epsilon of a pure event (delta = 0)."""
    if isinstance(event, LaplaceEvent):
        return Fraction(event.sensitivity) / event.scale
    return Fraction(event.epsilon)
