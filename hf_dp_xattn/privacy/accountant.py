"""From noise to (epsilon, delta) and back, rounded so that the number printed is never too small.

Every mechanism of this package ends in one of four events (`privacy/events.py`), all on the integer lattice:

* `GaussianEvent`: x + N_Z(0, sigma^2)^d, x in Z^d of l2 sensitivity Delta. For integer shifts the Renyi
  divergence of the discrete Gaussian is at most that of the continuous one, D_a <= a Delta^2 / (2 sigma^2)
  for every a > 1 (Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", arXiv
  2004.00010, Proposition 5; the multivariate form, Theorem 14, adds over independent coordinates).
* `LaplaceEvent`: x + Lap_Z(t)^d, x in Z^d of l1 sensitivity Delta: pure (Delta / t)-DP, because the mass
  function is proportional to exp(-|z|_1 / t).
* `PureEvent`: any epsilon-DP mechanism (an asymmetric geometric histogram, for one).
* `TruncatedLaplaceEvent`: x + TLap(t, B)^d: approximate DP. Its off_support is taken from delta once; the Renyi curve
  of what is left composes with the others (`privacy/truncated_laplace.py`, steps 1 to 4).

A pure event enters a composition with the Renyi curve of binary randomised response, which dominates every
epsilon-DP mechanism (Kairouz, Oh, Viswanath, "The Composition Theorem for Differential Privacy", arXiv
1311.0776, Theorem 3.1 and Section 6). The curve of the *continuous* Laplace mechanism would be wrong here:
at sensitivity 1 the discrete Laplace mechanism IS randomised response, whose divergences are larger.

Renyi curves add under composition, and for any order a > 1 give, with r = D_a,

    epsilon = r + log(1 - 1/a) - log(a delta) / (a - 1)        (arXiv 2004.00010, Proposition 12)

The minimum over `ORDERS` is returned. These are the formulas of `dp_accounting.rdp`. Releases of unlike kinds are
composed by dp-accounting itself as well (`compose_unlike`), and the larger answer counts; for one kind, where the
composition is one number, the tests compare the two. `ORDERS` holds the default orders of
dp-accounting and more, since the default ones end at 1024 and cannot certify an epsilon below 0.02 at delta
= 1e-12.

*Who may choose what.* The queries may depend on earlier outputs. Where the *noise levels* depend on them
too, the minimum over orders is a valid privacy filter for Gaussian events alone (one number, sum Delta^2 /
(2 sigma^2), orders all of their compositions: Feldman and Zrnic, arXiv 2008.11193, Theorem 4.3) and the
plain sum of epsilons for pure events alone at delta = 0 (Rogers et al., arXiv 1605.08294). For other lists
(a mix of kinds, or unlike pure events at delta > 0) the events must be fixed without looking at outputs, as
a configuration fixes them.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .dp_events import to_dp_event
from .events import (
    Event,
    GaussianEvent,
    LaplaceEvent,
    PureEvent,
    TruncatedLaplaceEvent,
    event_from_dict,
    pure_epsilon,
    require_integer,
)
from .truncated_laplace import off_support

__all__ = [
    "ORDERS",
    "Event",
    "GaussianEvent",
    "LaplaceEvent",
    "PureEvent",
    "TruncatedLaplaceEvent",
    "compose_unlike",
    "epsilon_of",
    "event_from_dict",
    "gaussian_sigma_squared",
    "laplace_scale",
    "needs_delta",
    "plain_epsilon",
    "pure_epsilon",
    "to_dp_event",
]

_Array = npt.NDArray[np.float64]
PAD = 1e-12  # relative to the sum of the absolute values of the terms: > 1000 roundings of float64
_DEFAULT = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]
_GEOMETRIC = 1.0 + np.geomspace(0.0125, 1e6, 920)  # neighbouring orders differ by 2 % in a - 1

ORDERS: tuple[float, ...] = tuple(sorted({float(a) for a in _DEFAULT} | {float(a) for a in _GEOMETRIC}))
"""Renyi orders over which the conversion minimises; any one of them alone would give a valid bound."""

_A = np.array(ORDERS)
_LOG_A, _LOG1M = np.log(_A), np.log1p(-1.0 / _A)


def _up(value: Fraction) -> float:
    """Smallest float >= value."""
    try:
        result = float(value)
    except OverflowError:
        return math.inf
    return result if Fraction(result) >= value else math.nextafter(result, math.inf)


def _next(value: float) -> float:
    return math.nextafter(value * (1 + PAD), math.inf)


def check_epsilon(epsilon: float | Fraction) -> float | Fraction:
    ok = isinstance(epsilon, (float, numbers.Real)) and not isinstance(epsilon, bool)
    if not ok or not math.isfinite(epsilon) or epsilon <= 0:
        raise ConfigError(f"epsilon must be a positive finite number, not {epsilon!r}.")
    return epsilon if isinstance(epsilon, Fraction) else float(epsilon)


def check_delta(delta: float, *, zero: bool) -> float:
    ok = isinstance(delta, numbers.Real) and not isinstance(delta, bool)
    if not ok or not (0 <= delta < 1) or (delta == 0 and not zero):
        hint = "" if zero else " (0 is possible only where every event is pure, not with Gaussian noise)"
        raise ConfigError(f"delta must lie in (0, 1){hint}, not {delta!r}.")
    return float(delta)


@dataclass
class Losses:
    """A composition, sorted by kind; every number rounded up. off: what truncation takes from delta."""

    rho: float = 0.0
    pure: Counter[float] = field(default_factory=Counter)
    truncated: Counter[TruncatedLaplaceEvent] = field(default_factory=Counter)
    off: Fraction = Fraction(0)


def _split(events: Sequence[Event]) -> Losses:
    losses, rho = Losses(), Fraction(0)
    for event, count in Counter(events).items():
        if isinstance(event, GaussianEvent):
            one = _up(Fraction(event.sensitivity**2) / (2 * event.sigma_squared))
            if math.isinf(one):
                losses.rho = math.inf
            else:
                rho += count * Fraction(one)  # a dyadic rational: the sum is exact and its size bounded
        elif isinstance(event, TruncatedLaplaceEvent):
            losses.truncated[event] += count
            losses.off += count * off_support(event)
        else:
            losses.pure[_up(pure_epsilon(event))] += count
    losses.rho = max(losses.rho, _up(rho))
    return losses


def _checked(events: Sequence[Event]) -> tuple[Event, ...]:
    events = tuple(events)
    for event in events:
        if not isinstance(event, (GaussianEvent, LaplaceEvent, PureEvent, TruncatedLaplaceEvent)):
            raise ConfigError(f"Unsupported event {type(event).__name__}: its loss is not known here.")
    return events


def needs_delta(events: Sequence[Event]) -> bool:
    """Whether the composition promises nothing at delta = 0."""
    return any(isinstance(e, (GaussianEvent, TruncatedLaplaceEvent)) for e in events)


def plain_epsilon(events: Sequence[Event]) -> float:
    """Basic composition: the epsilons add (a truncated event's is sensitivity / scale, at delta = its off_support); infinite with a
    Gaussian event."""
    total = Fraction(0)
    for event, count in Counter(_checked(events)).items():
        if isinstance(event, GaussianEvent):
            return math.inf
        if isinstance(event, TruncatedLaplaceEvent):
            one = Fraction(event.sensitivity) / event.scale
        else:
            one = pure_epsilon(event)
        rounded = _up(one)  # a float has a small denominator, so that long sums stay small
        if math.isinf(rounded):
            return math.inf
        total += count * Fraction(rounded)
    return _up(total)


def _rdp_pure(eps: float) -> _Array:
    """Renyi curve of randomised response, log(p^a q^(1-a) + q^a p^(1-a)) / (a - 1), p / q = e^eps.

    Rewritten as eps + log1p(q expm1(-2 eps (a-1))) / (a-1), which does not overflow; capped by the two other
    true bounds eps and a eps^2 / 2 (Bun and Steinke, arXiv 1605.02065, Proposition 3.3).
    """
    if math.isinf(eps):
        return np.full_like(_A, math.inf)
    q = math.exp(-eps) / (1 + math.exp(-eps))
    curve = eps + np.log1p(q * np.expm1(-2 * eps * (_A - 1))) / (_A - 1) + PAD * eps
    with np.errstate(over="ignore"):
        return np.asarray(np.minimum(np.minimum(curve, eps), _A * eps**2 / 2 * (1 + PAD)))


def _rdp_truncated(event: TruncatedLaplaceEvent) -> _Array:
    """min((D1/c) r(c/t), a D2 / (2 t^2)): step 3 of `privacy/truncated_laplace.py`."""
    l1, largest, squared = event.shape
    scale = Fraction(event.scale)
    repeated = _up(Fraction(l1, largest)) * _rdp_pure(_up(largest / scale)) * (1 + PAD)
    return np.asarray(np.minimum(repeated, _A * _up(squared / (2 * scale**2)) * (1 + PAD)))


def renyi_curve(losses: Losses) -> _Array:
    with np.errstate(over="ignore"):
        curve = _A * losses.rho
        for eps, count in sorted(
            losses.pure.items()
        ):  # sorted: the same float whatever the order of the events
            curve = curve + count * _rdp_pure(eps)
        parts = [(e.shape, e.scale, e.bound, n * _rdp_truncated(e)) for e, n in losses.truncated.items()]
        for *_, part in sorted(parts, key=lambda p: p[:3]):
            curve = curve + part
        return np.asarray(curve * (1 + PAD))


def _remaining(delta: float, off: Fraction) -> float | None:
    """What truncation leaves of delta, rounded down; None where it takes more than all of it."""
    left = Fraction(delta) - off
    if left < 0:
        return None
    value = float(left)
    return value if Fraction(value) <= left else math.nextafter(value, 0.0)


def epsilon_of_curve(r: _Array, delta: float) -> float:
    # Bretagnolle-Huber: total variation <= sqrt(1 - exp(-KL)), and KL <= D_a for every a > 1.
    if -math.expm1(-float(r.min())) * (1 + PAD) <= delta**2:
        return 0.0
    tail = (math.log(delta) + _LOG_A) / (_A - 1)
    epsilon = r + _LOG1M - tail + PAD * (r + np.abs(_LOG1M) + np.abs(tail))
    return max(0.0, _next(float(epsilon.min())))


def epsilon_of(events: Sequence[Event], delta: float) -> float:
    """Smallest epsilon that we can certify for the composition of `events` at `delta`; rounded up.

    *Formal guarantee.* The composed releases are (epsilon_of(events, delta), delta)-DP, whatever the order
    of the events and however later queries depend on earlier outputs (see the module's last paragraph for
    noise levels that do). Gaussian events: Proposition 12 of arXiv 2004.00010 over `ORDERS`; without one:
    the smaller of that and the plain sum, which is all there is at delta = 0. Truncated events first take
    their off_support from delta; infinite where delta is less than that. No event: 0.

    Raises `ConfigError` for an unknown event, delta outside [0, 1), or delta = 0 with an event that needs one.
    """
    events = _checked(events)
    delta = check_delta(delta, zero=not needs_delta(events))
    if not events:
        return 0.0
    losses = _split(events)
    left = _remaining(delta, losses.off)
    if left is None:
        return math.inf
    plain = plain_epsilon(events)
    if left == 0 or math.isinf(losses.rho):
        return plain
    composed = epsilon_of_curve(renyi_curve(losses), left)
    kinds = (losses.rho > 0) + bool(losses.pure) + bool(losses.truncated)
    if kinds > 1:
        composed = max(composed, compose_unlike(events, left))
    return min(plain, composed)


def compose_unlike(events: Sequence[Event], delta: float) -> float:
    """dp-accounting's epsilon for a composition of unlike events (Renyi accountant over `ORDERS`, pure events as randomised
    response), rounded up. `delta` is what truncation leaves of it. The answer is infinite where dp-accounting's arithmetic overflows."""
    import dp_accounting

    with np.errstate(all="ignore"):  # its arithmetic underflows, which some programs make an error
        accountant = dp_accounting.rdp.RdpAccountant(ORDERS, dp_accounting.NeighboringRelation.REPLACE_ONE)
        accountant.compose(to_dp_event(events, pure_as="randomized_response"))
        return _next(float(accountant.get_epsilon(delta)))


def gaussian_sigma_squared(epsilon: float, delta: float, sensitivity: int) -> int | Fraction:
    """Smallest variance, up to 1e-6 relative, whose `GaussianEvent` has `epsilon_of(...) <= epsilon`.

    Bisection on rho = sensitivity^2 / (2 sigma^2); the variance is then rounded up to an integer, or below
    2^24 to a multiple of a power of two, and checked forward, so the guarantee is that of `epsilon_of`
    whatever the search did. Raises `ConfigError` for epsilon not positive and finite, delta outside (0, 1),
    sensitivity not a positive integer.
    """
    epsilon = float(check_epsilon(epsilon))
    delta = check_delta(delta, zero=False)
    sensitivity = require_integer(sensitivity, "sensitivity")

    def fits(variance: Fraction) -> bool:
        return epsilon_of([GaussianEvent(sensitivity, variance)], delta) <= epsilon

    rho = largest_passing(lambda rho: epsilon_of_curve(renyi_curve(Losses(rho=rho)), delta) <= epsilon)
    if rho is None:
        raise ConfigError(f"No noise certifies epsilon = {epsilon!r} at delta = {delta!r}; raise one.")
    result = rounded_up(Fraction(sensitivity**2) / (2 * Fraction(rho)), fits)
    return int(result) if result.denominator == 1 else result


def largest_passing(fits: Callable[[float], bool]) -> float | None:
    """The largest number, up to 1e-9 relative, that a decreasing condition lets pass; None where it passes none."""
    low, high = -200.0, 60.0  # logarithms: passes / does not
    if not fits(math.exp(low)):
        return None
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(math.exp(middle)) else (low, middle)
    return math.exp(low)


def rounded_up(target: Fraction, fits: Callable[[Fraction], bool]) -> Fraction:
    """The next integer from `target` on (below 2^24: the next multiple of a power of two) that is certified."""
    shift = max(0, 24 - (target.numerator.bit_length() - target.denominator.bit_length()))
    steps = math.ceil(target * 2**shift)
    while not fits(Fraction(steps, 2**shift)):
        steps += 1  # one step is at most 2^-23 of it
    return Fraction(steps, 2**shift)


def laplace_scale(epsilon: float | Fraction, sensitivity: int) -> Fraction:
    """The scale t = sensitivity / epsilon, an exact rational (of the very float that epsilon is).

    *Formal guarantee.* Discrete Laplace noise of this scale is epsilon-DP for l1 sensitivity `sensitivity`.
    Raises `ConfigError` for epsilon not positive and finite, sensitivity not a positive integer.
    """
    return Fraction(require_integer(sensitivity, "sensitivity")) / Fraction(check_epsilon(epsilon))
