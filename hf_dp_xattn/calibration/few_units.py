"""What a calibration predicts for contexts of fewer units than it was fitted to, and where they are too few. Reads public data only."""

from __future__ import annotations

from ..mechanisms.anchors.anchors import nearest_plan
from .anchors.anchors_calibration import AnchorCalibration
from .curves import SCALED, Curve, Estimate

# share of the variance left unexplained, from which on a release of too few units tells nothing
NOTHING = 0.98
SAME_SIZE = 0.1  # what is predicted for contexts of one size holds near it


def fvu_curve(calibration: AnchorCalibration) -> Curve | None:
    """Its predictions for contexts of the size that it was fitted to."""
    return Curve.of(
        "FVU",
        ((p.epsilon, p.quality.fvu, p.quality.low, p.quality.high) for p in calibration.plans),
        higher_is_better=False,
    )


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
    found = None if curve is None else of_units(calibration, curve, epsilon, units)
    if found is None or found.origin != SCALED or not found.value >= NOTHING:
        return None
    # fitted to a model's replies, of which an FVU says nothing
    if curve is not None and curve.points[0][1] >= 1.0:
        return None
    return (
        f"{units} units are too few: the noise is made to hide one of them, and hides all of so few (FVU {found.value:.3f}, 1 is nothing; "
        f"the calibration was fitted to contexts of {calibration.units})"
    )
