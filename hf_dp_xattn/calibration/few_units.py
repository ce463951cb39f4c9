"""What a calibration predicts for contexts of fewer units than it was fitted to, and where they are too few. Reads public data only."""

from __future__ import annotations

import math

from ..mechanisms.anchors.anchors import nearest_plan
from .anchors.anchors_calibration import AnchorCalibration
from .curves import SCALED, Curve, Estimate

# share of the variance left unexplained, from which on a release of too few units tells nothing
NOTHING = 0.98
NO_RELEASE = 1.0  # that of the public mean
SAME_SIZE = 0.1  # what is predicted for contexts of one size holds near it


def fvu_curve(calibration: AnchorCalibration) -> Curve | None:
    """Its predictions for contexts of the size that it was fitted to. Of a plan that was never tried on contexts of unseen kinds (an older
    file) nothing says that these get more than no release gives."""
    return Curve.of(
        "FVU",
        (
            (p.epsilon, q.fvu, q.low, q.high if p.tried_on_unseen else max(q.high, NO_RELEASE))
            for p in calibration.plans
            for q in (p.quality,)
        ),
        higher_is_better=False,
    )


def score_curve(calibration: AnchorCalibration, name: str) -> Curve | None:
    """One of the publisher's scores, with an interval for ONE context: what it got on average, give or take what tells single contexts
    apart, and what was lost where the calibration had not seen their kind (the spread of scores `NAME` and `NAME, ...`), for a model
    may not have seen it either."""
    family = [s for s in calibration.scores if s.name == name or s.name.startswith(f"{name}, ")]
    points = []
    for s in (s for s in family if s.name == name):
        others = [o.score for o in family if o.epsilon == s.epsilon]
        kind = max(others) - min(others)
        many = math.sqrt(s.contexts)  # what is stored is the interval of their mean
        low, high = (math.hypot(many * side, kind) for side in (s.score - s.low, s.high - s.score))
        points.append((s.epsilon, s.score, s.score - low, s.score + high))
    if all(0.0 <= s.score <= 1.0 for s in family):
        points = [(e, v, max(0.0, low), min(1.0, high)) for e, v, low, high in points]
    return Curve.of(name, points, higher_is_better=True)


def of_units(calibration: AnchorCalibration, curve: Curve, epsilon: float, units: int) -> Estimate:
    """What a curve (of the FVU, or of a score) predicts for a context of so many units.

    A response answers each unit by itself. A sum or a histogram has the same noise whatever is summed, so that u units at epsilon are heard
    about as well as the calibrated U at epsilon * u / U. Below the range that was calibrated, the variance that is explained falls with the
    square of that: what a Wiener filter leaves of a signal that is much weaker than the noise.
    """
    plan = nearest_plan(calibration.plans, epsilon)
    few = calibration.unit != "context" and units < (1.0 - SAME_SIZE) * calibration.units
    if plan.release == "response" or not few:
        return curve.at(epsilon)
    heard = epsilon * units / calibration.units
    first, at_first, *_ = curve.points[0]
    value = curve.at(heard).value  # below the range: that of the smallest calibrated epsilon
    if heard < first and not curve.higher_is_better:
        value = max(at_first, 1.0 - max(0.0, 1.0 - at_first) * (heard / first) ** 2)
    return Estimate(value, None, None, SCALED)


def too_few(calibration: AnchorCalibration, epsilon: float, units: int) -> str | None:
    """Why a release of so few units at epsilon would tell nothing, as far as the calibration can say; or None."""
    curve = fvu_curve(calibration)
    scaled = None if curve is None else of_units(calibration, curve, epsilon, units)
    if scaled is None or scaled.origin != SCALED or not scaled.value >= NOTHING:
        return None
    # fitted to a model's replies, of which an FVU says nothing
    if curve is not None and curve.points[0][1] >= 1.0:
        return None
    return (
        f"{units} units are too few: the noise is made to hide one of them, and hides all of so few (FVU {scaled.value:.3f}, 1 is nothing; "
        f"the calibration was fitted to contexts of {calibration.units})"
    )
