"""Our events in the words of dp-accounting, which checks the accountant and composes releases of unlike kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from ..errors import ConfigError
from .events import Event, GaussianEvent, LaplaceEvent, TruncatedLaplaceEvent, pure_epsilon


def to_dp_event(
    events: Sequence[Event], *, pure_as: Literal["randomized_response", "discrete_laplace"]
) -> Any:
    """The composition as a `dp_accounting.ComposedDpEvent`, to be accounted by dp-accounting itself.

    Sensitivities already hold the neighbouring factor, so nothing may be doubled again.
    `randomized_response` is for `RdpAccountant(ORDERS, NeighborRel.REPLACE_ONE)` (which treats Gaussian
    events alike under every relation); `discrete_laplace` for
    `PLDAccountant(NeighborRel.ADD_OR_REMOVE_ONE)`, where a `PureEvent` has no counterpart. Raises
    `ConfigError` for an event without counterpart.
    """
    import dp_accounting

    composed: list[Any] = []
    for event in events:
        if isinstance(event, GaussianEvent):
            multiplier = math.sqrt(Fraction(event.sigma_squared) / event.sensitivity**2)
            composed.append(dp_accounting.GaussianDpEvent(multiplier))
        elif isinstance(event, TruncatedLaplaceEvent):
            composed.append(_dp_event_of_truncated(event, pure_as))
        elif pure_as == "randomized_response":
            eps = float(pure_epsilon(event))
            composed.append(dp_accounting.dp_event.RandomizedResponseDpEvent(2 / (1 + math.exp(eps)), 2))
        elif pure_as == "discrete_laplace" and isinstance(event, LaplaceEvent):
            parameter = float(1 / Fraction(event.scale))
            composed.append(dp_accounting.dp_event.DiscreteLaplaceDpEvent(parameter, event.sensitivity))
        else:
            raise ConfigError(f"{type(event).__name__} has no counterpart in dp-accounting as {pure_as!r}.")
    return dp_accounting.ComposedDpEvent(composed)


def _dp_event_of_truncated(event: TruncatedLaplaceEvent, pure_as: str) -> Any:
    """Given the common support: D1/c randomised responses, or a Gaussian where the l2 sensitivity says less."""
    import dp_accounting

    if pure_as != "randomized_response":
        raise ConfigError(f"TruncatedLaplaceEvent has no counterpart in dp-accounting as {pure_as!r}.")
    l1, largest, squared = event.shape
    if squared < l1 * largest:
        return dp_accounting.GaussianDpEvent(math.sqrt(Fraction(event.scale) ** 2 / squared))
    eps = float(largest / Fraction(event.scale))
    one = dp_accounting.dp_event.RandomizedResponseDpEvent(2 / (1 + math.exp(eps)), 2)
    return dp_accounting.SelfComposedDpEvent(one, -(-l1 // largest))
