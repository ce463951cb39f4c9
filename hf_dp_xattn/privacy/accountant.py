"""From noise to (epsilon, delta) and back, rounded so that the number printed is never too small.

Every mechanism of this package ends in one of three events, all on the integer lattice:

* `GaussianEvent`: x + N_Z(0, sigma^2)^d, x in Z^d of l2 sensitivity Delta. For integer shifts the Renyi
  divergence of the discrete Gaussian is at most that of the continuous one, D_a <= a Delta^2 / (2 sigma^2)
  for every a > 1 (Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", arXiv
  2004.00010, Proposition 5; the multivariate form, Theorem 14, adds over independent coordinates).
* `LaplaceEvent`: x + Lap_Z(t)^d, x in Z^d of l1 sensitivity Delta: pure (Delta / t)-DP, because the mass
  function is proportional to exp(-|z|_1 / t).
* `PureEvent`: any epsilon-DP mechanism (an asymmetric geometric histogram, for one).

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
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError

_Array = npt.NDArray[np.float64]
_PAD = 1e-12  # relative to the sum of the absolute values of the terms: > 1000 roundings of float64
_DEFAULT = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]
_GEOMETRIC = 1.0 + np.geomspace(0.0125, 1e6, 920)  # neighbouring orders differ by 2 % in a - 1

ORDERS: tuple[float, ...] = tuple(sorted({float(a) for a in _DEFAULT} | {float(a) for a in _GEOMETRIC}))
"""Renyi orders over which the conversion minimises; any one of them alone would give a valid bound."""

_A = np.array(ORDERS)
_LOG_A, _LOG1M = np.log(_A), np.log1p(-1.0 / _A)
_RATIONAL = re.compile(r"[1-9][0-9]{0,1999}(/[1-9][0-9]{0,1999})?")


def _integer(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) <= 0:
        raise ConfigError(f"{name} must be a positive integer (lattice units), not {value!r}.")
    return int(value)


def _rational(value: object, name: str) -> Fraction:
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
        object.__setattr__(self, "sensitivity", _integer(self.sensitivity, "sensitivity"))
        object.__setattr__(self, "sigma_squared", _rational(self.sigma_squared, "sigma_squared"))

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
        object.__setattr__(self, "sensitivity", _integer(self.sensitivity, "sensitivity"))
        object.__setattr__(self, "scale", _rational(self.scale, "scale"))

    def to_dict(self) -> dict[str, Any]:
        """JSON form; rationals are strings, so nothing is rounded. Inverse: `event_from_dict`."""
        return {"kind": "laplace", "sensitivity": self.sensitivity, "scale": str(self.scale)}


@dataclass(frozen=True)
class PureEvent:
    """A release of any epsilon-DP mechanism. Raises `ConfigError` unless epsilon is positive and exact."""

    epsilon: Fraction | int

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", _rational(self.epsilon, "epsilon"))

    def to_dict(self) -> dict[str, Any]:
        """JSON form; rationals are strings, so nothing is rounded. Inverse: `event_from_dict`."""
        return {"kind": "pure", "epsilon": str(self.epsilon)}


Event = GaussianEvent | LaplaceEvent | PureEvent
_KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "gaussian": (GaussianEvent, ("sensitivity", "sigma_squared")),
    "laplace": (LaplaceEvent, ("sensitivity", "scale")),
    "pure": (PureEvent, ("epsilon",)),
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
        if field != "sensitivity":
            if not isinstance(value, str) or not _RATIONAL.fullmatch(value):
                raise ConfigError(f"Field {field!r} of a {kind!r} event must be a string like '12' or '7/2'.")
            value = Fraction(value)
        values[field] = value
    event: Event = cls(**values)
    return event


def _up(value: Fraction) -> float:
    """Smallest float >= value."""
    try:
        result = float(value)
    except OverflowError:
        return math.inf
    return result if Fraction(result) >= value else math.nextafter(result, math.inf)


def _next(value: float) -> float:
    return math.nextafter(value * (1 + _PAD), math.inf)


def _check_epsilon(epsilon: float | Fraction) -> float | Fraction:
    ok = isinstance(epsilon, (float, numbers.Real)) and not isinstance(epsilon, bool)
    if not ok or not math.isfinite(epsilon) or epsilon <= 0:
        raise ConfigError(f"epsilon must be a positive finite number, not {epsilon!r}.")
    return epsilon if isinstance(epsilon, Fraction) else float(epsilon)


def _check_delta(delta: float, *, zero: bool) -> float:
    ok = isinstance(delta, numbers.Real) and not isinstance(delta, bool)
    if not ok or not (0 <= delta < 1) or (delta == 0 and not zero):
        hint = "" if zero else " (0 is possible only where every event is pure, not with Gaussian noise)"
        raise ConfigError(f"delta must lie in (0, 1){hint}, not {delta!r}.")
    return float(delta)


def _split(events: Sequence[Event]) -> tuple[float, Counter[float]]:
    """Total rho of the Gaussian events and the multiset of pure epsilons, each rounded up."""
    rho, pure = Fraction(0), Counter[float]()
    for event, count in Counter(_checked(events)).items():
        if isinstance(event, GaussianEvent):
            one = _up(Fraction(event.sensitivity**2) / (2 * event.sigma_squared))
            if math.isinf(one):
                return math.inf, pure
            rho += count * Fraction(one)  # a dyadic rational: the sum is exact and its size bounded
        else:
            pure[_up(pure_epsilon(event))] += count
    return _up(rho), pure


def _checked(events: Sequence[Event]) -> tuple[Event, ...]:
    events = tuple(events)
    for event in events:
        if not isinstance(event, (GaussianEvent, LaplaceEvent, PureEvent)):
            raise ConfigError(f"Unsupported event {type(event).__name__}: its loss is not known here.")
    return events


def pure_epsilon(event: LaplaceEvent | PureEvent) -> Fraction:
    """Exact epsilon of a pure event (delta = 0)."""
    if isinstance(event, LaplaceEvent):
        return Fraction(event.sensitivity) / event.scale
    return Fraction(event.epsilon)


def _pure_sum(pure: Counter[float]) -> float:
    """Basic composition: the epsilons add."""
    if any(math.isinf(e) for e in pure):
        return math.inf
    return _up(sum((Fraction(e) * n for e, n in pure.items()), Fraction(0)))


def _rdp_pure(eps: float) -> _Array:
    """Renyi curve of randomised response, log(p^a q^(1-a) + q^a p^(1-a)) / (a - 1), p / q = e^eps.

    Rewritten as eps + log1p(q expm1(-2 eps (a-1))) / (a-1), which does not overflow; capped by the two other
    true bounds eps and a eps^2 / 2 (Bun and Steinke, arXiv 1605.02065, Proposition 3.3).
    """
    if math.isinf(eps):
        return np.full_like(_A, math.inf)
    q = math.exp(-eps) / (1 + math.exp(-eps))
    curve = eps + np.log1p(q * np.expm1(-2 * eps * (_A - 1))) / (_A - 1) + _PAD * eps
    with np.errstate(over="ignore"):
        return np.asarray(np.minimum(np.minimum(curve, eps), _A * eps**2 / 2 * (1 + _PAD)))


def _rdp(rho: float, pure: Counter[float]) -> _Array:
    with np.errstate(over="ignore"):
        curve = _A * rho
        for eps, count in sorted(pure.items()):  # sorted: the same float whatever the order of the events
            curve = curve + count * _rdp_pure(eps)
        return curve * (1 + _PAD)


def _epsilon_of_curve(r: _Array, delta: float) -> float:
    # Bretagnolle-Huber: total variation <= sqrt(1 - exp(-KL)), and KL <= D_a for every a > 1.
    if -math.expm1(-float(r.min())) * (1 + _PAD) <= delta**2:
        return 0.0
    tail = (math.log(delta) + _LOG_A) / (_A - 1)
    epsilon = r + _LOG1M - tail + _PAD * (r + np.abs(_LOG1M) + np.abs(tail))
    return max(0.0, _next(float(epsilon.min())))


def epsilon_of(events: Sequence[Event], delta: float) -> float:
    """Smallest epsilon that we can certify for the composition of `events` at `delta`; rounded up.

    *Formal guarantee.* The composed releases are (epsilon_of(events, delta), delta)-DP, whatever the order
    of the events and however later queries depend on earlier outputs (see the module's last paragraph for
    noise levels that do). Gaussian events: Proposition 12 of arXiv 2004.00010 over `ORDERS`; pure events
    alone: the smaller of that and the plain sum, which is all there is at delta = 0. No event: 0.

    Raises `ConfigError` for an unknown event, delta outside [0, 1), or delta = 0 with a Gaussian event.
    """
    events = _checked(events)
    has_gaussian = any(isinstance(e, GaussianEvent) for e in events)
    delta = _check_delta(delta, zero=not has_gaussian)
    if not events:
        return 0.0
    rho, pure = _split(events)
    plain = math.inf if has_gaussian else _pure_sum(pure)
    if delta == 0 or math.isinf(rho):
        return plain
    own = _epsilon_of_curve(_rdp(rho, pure), delta)
    if has_gaussian and pure:
        own = max(own, compose_unlike(events, delta))
    return min(plain, own)


def compose_unlike(events: Sequence[Event], delta: float) -> float:
    """dp-accounting's epsilon for a composition of Gaussian and pure events (Renyi accountant over `ORDERS`, pure events as
    randomised response), rounded up. Its answer is infinite where its own arithmetic overflows."""
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant(ORDERS, dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(to_dp_event(events, pure_as="randomized_response"))
    return _next(float(accountant.get_epsilon(delta)))


def delta_of(events: Sequence[Event], epsilon: float) -> float:
    """Smallest delta that we can certify for the composition of `events` at `epsilon`; rounded up, at most 1.

    *Formal guarantee.* The composed releases are (epsilon, delta_of(events, epsilon))-DP: arXiv 2004.00010,
    Proposition 12, over `ORDERS`; 0 where all events are pure and their epsilons add to no more than
    `epsilon`. Raises `ConfigError` for an unknown event or an epsilon that is not positive and finite.
    """
    epsilon = float(_check_epsilon(epsilon))
    events = _checked(events)
    rho, pure = _split(events)
    if not any(isinstance(e, GaussianEvent) for e in events) and _pure_sum(pure) <= epsilon:
        return 0.0
    r = _rdp(rho, pure)
    if not np.isfinite(r.min()):
        return 1.0
    eps = math.nextafter(epsilon, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (_A - 1) * (r + eps + np.abs(_LOG1M)) + _LOG_A
        log_delta = (_A - 1) * (r - eps + _LOG1M) - _LOG_A + _PAD * scale
    log_delta = np.where(np.isfinite(log_delta), log_delta, math.inf)
    total_variation = math.sqrt(-math.expm1(-float(r.min())))
    exponent = min(0.0, float(log_delta.min()))
    return min(1.0, _next(math.exp(exponent)), _next(total_variation))


def gaussian_sigma_squared(epsilon: float, delta: float, sensitivity: int) -> int | Fraction:
    """Smallest variance, up to 1e-6 relative, whose `GaussianEvent` has `epsilon_of(...) <= epsilon`.

    Bisection on rho = sensitivity^2 / (2 sigma^2); the variance is then rounded up to an integer, or below
    2^24 to a multiple of a power of two, and checked forward, so the guarantee is that of `epsilon_of`
    whatever the search did. Raises `ConfigError` for epsilon not positive and finite, delta outside (0, 1),
    sensitivity not a positive integer.
    """
    epsilon = float(_check_epsilon(epsilon))
    delta = _check_delta(delta, zero=False)
    sensitivity = _integer(sensitivity, "sensitivity")
    none: Counter[float] = Counter()
    low, high = -200.0, 60.0  # log rho: certified / not certified
    if _epsilon_of_curve(_rdp(math.exp(low), none), delta) > epsilon:
        raise ConfigError(f"No noise certifies epsilon = {epsilon!r} at delta = {delta!r}; raise one.")
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _epsilon_of_curve(_rdp(math.exp(middle), none), delta) <= epsilon:
            low = middle
        else:
            high = middle
    target = Fraction(sensitivity**2) / (2 * Fraction(math.exp(low)))
    shift = max(0, 24 - (target.numerator.bit_length() - target.denominator.bit_length()))
    steps = math.ceil(target * 2**shift)
    while epsilon_of([GaussianEvent(sensitivity, Fraction(steps, 2**shift))], delta) > epsilon:
        steps += 1  # one step is at most 2^-23 of the variance
    result = Fraction(steps, 2**shift)
    return int(result) if result.denominator == 1 else result


def laplace_scale(epsilon: float | Fraction, sensitivity: int) -> Fraction:
    """The scale t = sensitivity / epsilon, an exact rational (of the very float that epsilon is).

    *Formal guarantee.* Discrete Laplace noise of this scale is epsilon-DP for l1 sensitivity `sensitivity`.
    Raises `ConfigError` for epsilon not positive and finite, sensitivity not a positive integer.
    """
    return Fraction(_integer(sensitivity, "sensitivity")) / Fraction(_check_epsilon(epsilon))


def with_sampling_distance(epsilon: float, delta: float, eta: float) -> tuple[float, float]:
    """(epsilon, delta + (1 + e^epsilon) eta): what a mechanism with an eta-close sampler guarantees.

    *Formal guarantee.* Let M be (epsilon, delta)-DP and, for every input, M' within total variation eta of
    M. Then P[M'(x) in S] <= P[M(x) in S] + eta <= e^epsilon P[M(x') in S] + delta + eta <= e^epsilon
    (P[M'(x') in S] + eta) + delta + eta, for neighbours x, x' and every event S.

    The result is rounded up and at most 1 (which promises nothing). "DP with probability 1 - p" is eta = p,
    applied to both runs. Raises `ConfigError` for invalid epsilon, delta outside [0, 1), or eta outside [0,
    1].
    """
    epsilon = float(_check_epsilon(epsilon))
    delta = _check_delta(delta, zero=True)
    if isinstance(eta, bool) or not isinstance(eta, numbers.Real) or not 0 <= eta <= 1:
        raise ConfigError(f"eta, a total variation distance, must lie in [0, 1], not {eta!r}.")
    if eta == 0:
        return epsilon, delta
    if epsilon > 700:  # e^epsilon overflows; any eta > 2^-1074 may then be worthless
        return epsilon, 1.0
    return epsilon, min(1.0, _next(delta + _next(float(eta) * (1 + math.exp(epsilon)))))


def to_dp_event(
    events: Sequence[Event], *, pure_as: Literal["randomized_response", "discrete_laplace"]
) -> Any:
    """The composition as a `dp_accounting.ComposedDpEvent`, to be accounted by dp-accounting itself.

    Sensitivities already hold the neighbouring factor, so nothing may be doubled again.
    `randomized_response` is for `RdpAccountant(ORDERS, NeighborRel.REPLACE_ONE)` (which treats Gaussian
    events alike under every relation); `discrete_laplace` for
    `PLDAccountant(NeighborRel.ADD_OR_REMOVE_ONE)`, where a `PureEvent` has no counterpart. Raises
    `ConfigError` for an unknown event or one without counterpart.
    """
    import dp_accounting

    composed: list[Any] = []
    for event in _checked(events):
        if isinstance(event, GaussianEvent):
            multiplier = math.sqrt(Fraction(event.sigma_squared) / event.sensitivity**2)
            composed.append(dp_accounting.GaussianDpEvent(multiplier))
        elif pure_as == "randomized_response":
            eps = float(pure_epsilon(event))
            composed.append(dp_accounting.dp_event.RandomizedResponseDpEvent(2 / (1 + math.exp(eps)), 2))
        elif pure_as == "discrete_laplace" and isinstance(event, LaplaceEvent):
            parameter = float(1 / Fraction(event.scale))
            composed.append(dp_accounting.dp_event.DiscreteLaplaceDpEvent(parameter, event.sensitivity))
        else:
            raise ConfigError(f"{type(event).__name__} has no counterpart in dp-accounting as {pure_as!r}.")
    return dp_accounting.ComposedDpEvent(composed)
