"""The plan of a library: what releases of text would give at some epsilons. Reads public data only; no ledger, no context."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.library.library import PreparedLibrary
from ...not_covered import PLAN_TEXTS
from ..curves import Curve
from ..plan_report import Plan, PlanPoint, charge_of
from ..release_timing import median_seconds, this_machine
from .text_library import TextLibrary

_NOTES = (
    "distortion: 1 - cosine between a unit and the text that answers it, in the library's metric; 0 is the unit itself, 1 is a text that "
    "says nothing of it",
    "95 %: for one context; from those like the public ones to those of a kind that no public text is of",
    "what leaves is public text, that anyone can read: a text that the library does not hold cannot be released",
    "how many units a context has, their order and where it is cut are public",
    PLAN_TEXTS,
)


def plan_library(
    name: str,
    library: TextLibrary,
    *,
    epsilons: Sequence[float] | None,
    units: int | None,
    want: float | None,
    measure: bool,
) -> Plan:
    """See `dpx.plan`.

    Args:
        name: of the library, for the table.
        epsilons: by default those that it has plans for.
        units: in one context; by default as many as the largest public context had.
        want: a distortion, of which the smallest epsilon is looked for.
        measure: time releases of random codes on this machine.
    """
    curve = Curve.of(
        "distortion",
        ((p.epsilon, p.quality.distortion, p.quality.low, p.quality.high) for p in library.plans),
        higher_is_better=False,
    )
    if curve is None:
        raise ConfigError("The library holds no predicted quality: calibrate again.")
    units = (library.units if units is None else units) if library.unit == "group" else 1
    asked = [p.epsilon for p in library.plans] if epsilons is None else list(epsilons)
    if not asked:
        raise ConfigError("epsilons is empty: name at least one.")
    base = DPXAttnConfig(mechanism="library", unit=library.unit)
    points = tuple(
        _point(base.replace(epsilon=e), library, curve, units, measure) for e in sorted(set(asked))
    )
    judged = min(p.quality.contexts for p in library.plans)
    return Plan(
        calibration=name,
        unit=library.unit,
        neighboring=library.neighboring,
        grouping=library.grouping,
        units=units,
        delta=0.0,
        contexts=library.contexts,
        layers=0,
        heads=0,
        dtype="text",
        exact_kv_bytes=None,
        measured_on=this_machine() if measure else None,
        points=points,
        fvu_curve=curve,
        score_curve=None,
        wanted=() if want is None else (curve.wanted(want),),
        notes=(f"predicted on {judged} public contexts that were held out (of {library.contexts})", *_NOTES),
    )


def _point(config: DPXAttnConfig, library: TextLibrary, curve: Curve, units: int, measure: bool) -> PlanPoint:
    # a context that is one unit in parts: of as many as the largest public one has
    prepared = library.prepare(config, units=1 if library.plan_for(config.epsilon).answers else library.units)
    return PlanPoint(
        **charge_of(config, prepared.events),
        fvu=curve.at(config.epsilon),
        score=None,
        release="texts",
        made_for=library.plan_for(config.epsilon).epsilon,
        meaning=prepared.numbers.clipping,
        noise={"nearest": prepared.likely},
        rows=max(len(shelf.texts) for shelf in prepared.shelves),
        kv_bytes=0,
        seconds=_measure(prepared, units) if measure else None,
    )


def _measure(prepared: PreparedLibrary, units: int) -> float:
    """Median seconds of a release of random codes: order, coins and texts; no encoder, no ledger."""
    grouped = prepared.config.unit == "group"
    count = units if grouped else prepared.answers
    center = prepared.shelves[0].lattice.map.center
    codes = (center + torch.randn(count, len(center), generator=torch.Generator().manual_seed(0))).float()
    return median_seconds(prepared, codes, torch.arange(count) if grouped else None)
