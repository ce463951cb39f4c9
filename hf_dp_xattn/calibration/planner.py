"""The planner: what a release would give, before any budget is spent. Reads a calibration, so public data only; no ledger, no context."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..mechanisms.anchors.anchors import nearest_plan
from ..mechanisms.anchors.plan import AnchorPlan, Decoders
from ..mechanisms.anchors.sources import PreparedAnchors
from ..not_covered import PLAN, PLAN_UNIT
from ..privacy.units import NeighboringRelation, Unit
from .anchors.anchors_calibration import NOTHING, AnchorCalibration
from .calibration import Calibration
from .curves import INTERPOLATED, MEASURED, OUTSIDE, SCALED, Curve, Estimate
from .few_units import SAME_SIZE, fvu_curve, of_units, score_curve, too_few
from .library.library_planner import plan_library
from .library.text_library import TextLibrary
from .plan_report import Plan, PlanPoint, charge_of
from .release_timing import REPEATS, median_seconds, this_machine
from .stored import Stored

__all__ = ["Plan", "PlanPoint", "plan"]

LIBRARY_FROM = 4.0  # epsilon from which on `library` gave more of units that answer for themselves, in benchmarks/library_shapes.py

One = AnchorCalibration | TextLibrary | str | os.PathLike[str]
_HOW = "make one with dpx.calibrate(pipe, public_contexts, dpx.DPXAttnConfig(mechanism='anchors', unit=...))"


def plan(
    calibration: One | Sequence[One],
    *,
    epsilons: Sequence[float] | None = None,
    epsilon: float | None = None,
    unit: str | None = None,
    neighboring: str | None = None,
    n: int | None = None,
    delta: float | None = None,
    want_fvu: float | None = None,
    want_score: float | None = None,
    score: str | None = None,
    layers: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    measure: bool = True,
) -> Plan:
    """Predicts what releases at these epsilons would give: quality, what would leave, what it means for an attacker, and its cost.

    Spends nothing: it reads public calibrations only, and times releases of random rows with seeded noise.

    Args:
        calibration: an `AnchorCalibration`, a folder or Hub id, or several of them, of which the one that fits is used; or ONE
            `TextLibrary`, whose quality is its distortion.
        epsilons: by default those that the calibration has plans for.
        epsilon: one, in the place of several.
        unit: what to protect; by default the calibration's.
        neighboring: the relation; by default the calibration's.
        n: units in one context (rows for unit="row"; phrases, segments or documents for "group"); by default the calibration's. Of fewer
            than it was fitted to less comes through, and the plan says where they are too few.
        delta: by default the calibration's.
        want_fvu: finds the smallest epsilon that is predicted to reach it.
        want_score: likewise, of a score.
        score: which of the publisher's scores; by default the first one.
        layers: names of the layers whose keys and values are counted; by default the calibration's host's.
        dtype: of keys and values; by default the calibration's host's.
        measure: time releases on this machine.

    Raises:
        ConfigError: no calibration fits, several do, or a value is out of range.

    Example:
        >>> print(dpx.plan(calibration, epsilon=8.0, measure=False))
        Plan for ...
    """
    asked = epsilons
    if epsilon is not None:
        if epsilons is not None:
            raise ConfigError("Give epsilon or epsilons, not both.")
        if not isinstance(epsilon, numbers.Real):
            raise ConfigError("epsilon is one number; for several pass epsilons=[...].")
        asked = [epsilon]
    shelf = _library(calibration)
    if shelf is not None:
        _of_library(shelf[1], unit, neighboring, want_score)
        want = None if want_fvu is None else _number("want_fvu", want_fvu, low=0.0)
        return plan_library(*shelf, epsilons=asked, units=n, want=want, measure=measure)
    name, chosen = _choose(calibration, unit, neighboring, n)
    units = chosen.units if n is None else n
    delta = _default_delta(chosen) if delta is None else delta
    fvu = fvu_curve(chosen)
    if fvu is None:
        raise ConfigError("The calibration holds no predicted quality: calibrate again.")
    scores = _score_curve(chosen, score)
    wanted = []
    if want_fvu is not None:
        wanted.append(fvu.wanted(_number("want_fvu", want_fvu, low=0.0)))
    if want_score is not None:
        if scores is None:
            raise ConfigError(
                "The calibration holds no score, so want_score cannot be planned for: its publisher measured none. Use want_fvu."
            )
        wanted.append(scores.wanted(_number("want_score", want_score)))
    sizes, heads = _layers(chosen, layers)
    kind = _dtype(chosen.host.dtype if dtype is None else dtype)
    row_bytes = 2 * sum(sizes) * kind.itemsize  # a key and a value in each layer
    exact = row_bytes * units if chosen.unit == Unit.ROW.value else None
    machine = this_machine() if measure else None
    epsilons = [p.epsilon for p in chosen.plans] if asked is None else list(asked)
    if not epsilons:
        raise ConfigError("epsilons is empty: name at least one.")
    base = DPXAttnConfig(
        mechanism="anchors", unit=chosen.unit, neighboring=chosen.neighboring, delta=delta, epsilon=1.0
    )
    configs = [base.replace(epsilon=e) for e in sorted(set(epsilons))]
    points = tuple(_point(c, chosen, fvu, scores, row_bytes, units, measure) for c in configs)
    return Plan(
        calibration=name,
        unit=chosen.unit,
        neighboring=chosen.neighboring,
        grouping=chosen.grouping,
        units=units,
        delta=delta,
        contexts=chosen.contexts,
        layers=len(sizes),
        heads=heads,
        dtype=str(kind).removeprefix("torch."),
        exact_kv_bytes=exact,
        measured_on=machine,
        points=points,
        fvu_curve=fvu,
        score_curve=scores,
        wanted=tuple(wanted),
        notes=_notes(chosen, points, units, delta, machine),
    )


def _point(
    config: DPXAttnConfig,
    calibration: AnchorCalibration,
    fvu: Curve,
    scores: Curve | None,
    row_bytes: int,
    units: int,
    measure: bool,
) -> PlanPoint:
    prepared = calibration.prepare(config)
    rows = _rows(prepared.plan, prepared.decoders)
    serves, quality = _served(prepared.plan), prepared.plan.quality
    return PlanPoint(
        **charge_of(config, prepared.events),
        fvu=of_units(calibration, fvu, config.epsilon, units)
        if serves is None
        else Estimate(quality.fvu, quality.low, quality.high, MEASURED),  # at any epsilon, of any size
        score=None if scores is None else of_units(calibration, scores, config.epsilon, units),
        release=prepared.plan.release,
        made_for=prepared.plan.epsilon,
        meaning=prepared.leaves.clipping,
        noise=prepared.noise_numbers,
        rows=rows,
        kv_bytes=rows * row_bytes,
        seconds=_measure(prepared, units) if measure else None,
        useless=calibration.useless(config) or too_few(calibration, config.epsilon, units),
        serves=serves,
    )


def _served(plan: AnchorPlan) -> str | None:
    """What every context gets by a plan that is the fall-back."""
    return None if plan.worth is None or plan.worth.weight else NOTHING[plan.worth.against]


def _choose(
    calibrations: One | Sequence[One], unit: str | None, neighboring: str | None, n: int | None
) -> tuple[str, AnchorCalibration]:
    """The one calibration that fits, and its name."""
    for name, value, known in (("unit", unit, Unit), ("neighboring", neighboring, NeighboringRelation)):
        if value is not None and value not in tuple(known):
            raise ConfigError(f"Unknown {name} {value!r}; choose one of {', '.join(known)}.")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ConfigError(f"n must be a positive integer (units in one context), got {n!r}.")
    items: Sequence[One] = (
        [calibrations] if isinstance(calibrations, (Stored, str, os.PathLike)) else list(calibrations)
    )
    loaded = [_load(item, i + 1) for i, item in enumerate(items)]
    fitting = [
        (name, c)
        for name, c in loaded
        if unit in (None, c.unit)
        and neighboring in (None, c.neighboring)
        and (n is None or _covers(c.unit, c.units, n) or (len(loaded) == 1 and n <= c.units))
    ]
    if n is not None and fitting:  # the nearest in size, where several cover it
        nearest = min(abs(c.units - n) for _, c in fitting)
        fitting = [(name, c) for name, c in fitting if abs(c.units - n) == nearest]
    if len(fitting) == 1:
        return fitting[0]
    asked = ", ".join(
        f"{k}={v!r}" for k, v in (("unit", unit), ("neighboring", neighboring), ("n", n)) if v is not None
    )
    there = "; ".join(
        f"{name} (unit={c.unit!r}, neighboring={c.neighboring!r}, n={c.units})" for name, c in loaded
    )
    if fitting:
        raise ConfigError(
            f"{len(fitting)} calibrations fit {asked or 'the request'}: say which by unit, neighboring, n, or give one. There are: {there}."
        )
    raise ConfigError(
        f"No calibration fits {asked or 'the request'}. There are: {there or 'none'}. For another one, {_HOW}."
    )


def _library(calibration: Any) -> tuple[str, TextLibrary] | None:
    """A library and its name, where that is what was given."""
    if isinstance(calibration, (list, tuple)) and len(calibration) == 1:
        calibration = calibration[0]
    if isinstance(calibration, TextLibrary):
        return "library", calibration
    if isinstance(calibration, (str, os.PathLike)):
        loaded = Calibration.from_pretrained(calibration)
        return (
            (Path(calibration).name or str(calibration), loaded) if isinstance(loaded, TextLibrary) else None
        )
    return None


def _of_library(library: TextLibrary, unit: str | None, neighboring: str | None, score: float | None) -> None:
    """Raises ConfigError where a library was not made for what is asked."""
    if unit not in (None, library.unit) or neighboring not in (None, library.neighboring):
        raise ConfigError(
            f"This library is for unit={library.unit!r}, neighboring={library.neighboring!r}: leave both out, or calibrate again."
        )
    if score is not None:
        raise ConfigError(
            "A library holds no score, so want_score cannot be planned for. Use want_fvu (its distortion)."
        )


def _load(item: One, number: int) -> tuple[str, AnchorCalibration]:
    if isinstance(item, AnchorCalibration):
        return f"calibration {number}", item
    if isinstance(item, (str, os.PathLike)):
        return Path(item).name or str(item), AnchorCalibration.from_pretrained(item)
    raise ConfigError(
        f"The planner reads calibrations of mechanism='anchors', or their names; got {type(item).__name__}. To get one, {_HOW}."
    )


def _covers(unit: str, units: int, n: int) -> bool:
    return abs(units - n) <= SAME_SIZE * units if unit == Unit.ROW.value else n <= units


def _default_delta(calibration: AnchorCalibration) -> float:
    return float(calibration.settings.get("delta", DPXAttnConfig().delta))


def _number(name: str, value: Any, *, low: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}.")
    if value < low:
        raise ConfigError(f"{name} must be at least {low:g}, got {value!r}.")
    return float(value)


def _score_curve(calibration: AnchorCalibration, name: str | None) -> Curve | None:
    names = list(dict.fromkeys(s.name for s in calibration.scores))
    if name is not None and name not in names:
        raise ConfigError(f"The calibration has no score {name!r}; it has: {', '.join(names) or 'none'}.")
    if not names:
        return None
    name = names[0] if name is None else name
    return score_curve(calibration, name)


def _layers(calibration: AnchorCalibration, names: Sequence[str] | None) -> tuple[list[int], int]:
    """Channels of the keys (and of the values) of each layer, and the number of heads of all of them."""
    host = calibration.host.layers
    if names is not None:
        unknown = sorted(set(names) - {x[0] for x in host})
        if unknown or not names:
            raise ConfigError(
                f"Unknown layer(s) {', '.join(unknown) or '(none named)'}; the calibration is for {', '.join(x[0] for x in host)}."
            )
        host = tuple(x for x in host if x[0] in set(names))
    return [out for _, _, _, out in host], sum(heads for _, heads, _, _ in host)


def _dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype must name a floating-point type such as 'float16', got {name!r}.")
    return dtype


def _rows(plan: AnchorPlan, decoders: Decoders) -> int:
    """The most rows that a release is decoded to; pruning leaves fewer."""
    drawn = plan.worth is not None and plan.worth.weight < 1 and decoders.fallback is not None
    beside = len(decoders.fallback.rows) if drawn and decoders.fallback is not None else 0
    if plan.release not in ("histogram", "mixed"):
        return beside + (0 if decoders.slots is None else decoders.slots.slots.shape[0])
    if decoders.cells is None:
        return beside
    m, each, _ = decoders.cells.anchors.shape
    heavy = min(m, max(1, decoders.cells.rows // each))
    merged = min(m - heavy, int(decoders.cells.coarse.max()) + 1)
    return beside + heavy * each + merged


def _measure(prepared: PreparedAnchors, units: int) -> float:
    """Median seconds of a release of random rows within the public box: noise, decoding and pruning; no text encoder, no ledger."""
    plan = prepared.plan
    rows = plan.center + plan.reach * (
        2 * torch.rand(units, len(plan.center), generator=torch.Generator().manual_seed(0)) - 1
    )
    groups = torch.arange(units) if prepared.config.unit == Unit.GROUP.value else None
    return median_seconds(prepared, rows, groups)


def _better_answered(calibration: AnchorCalibration, points: Sequence[PlanPoint]) -> tuple[str, ...]:
    """Where `library` does more: units that answer for themselves, a rule that every measurement of both bears out (docs/library.md)."""
    plans = (nearest_plan(calibration.plans, p.epsilon) for p in points)
    alone = sorted({p.epsilon for p in plans if p.release == "response" and p.epsilon >= LIBRARY_FROM})
    if calibration.unit == Unit.ROW.value or not alone:
        return ()
    return (
        f"at epsilon {', '.join(f'{e:g}' for e in alone)} each unit is answered by itself ('response'), by a code that a decoder reads. "
        "Where units are text, mechanism='library' answers them by public texts, which gave more wherever both were measured from epsilon "
        f"{LIBRARY_FROM:g} on (docs/library.md); anchors is for what many units have in common. dpx.compare measures both on public "
        "contexts, and its `best` is to be protected with; a plan advises and does not switch",
    )


def _notes(
    calibration: AnchorCalibration, points: Sequence[PlanPoint], units: int, delta: float, machine: str | None
) -> tuple[str, ...]:
    judged = min(p.quality.contexts for p in calibration.plans)
    notes = [
        f"predicted on {judged} public contexts that nothing was fitted to (of {calibration.contexts}); the interval of the FVU is from "
        "contexts like those to contexts of a kind that no public one is of"
        + ("" if _unseen(calibration) else ", on which this older calibration was never tried: up to 1"),
        *(
            ["the interval of a score is for ONE context, also of a kind that the calibration had not seen"]
            if calibration.scores
            else []
        ),
        "FVU: fraction of the attention outputs' variance left unexplained; 1 is the mean of exact outputs over public contexts, 0 exact "
        "attention",
        *[
            f"= epsilon {p.epsilon:g} gives {p.serves}, whatever the private context says. The FVU is that of the rows which stand for it"
            for p in points
            if p.serves is not None
        ],
        *_of_replies(calibration),
        *_better_answered(calibration, points),
    ]
    notes += [
        f"x epsilon {p.epsilon:g} is not known to be better than no release at all: {p.useless}; dpx.protect refuses it unless "
        "allow_useless=True"
        for p in points
        if p.useless is not None
    ]
    origins = {q.origin for p in points for q in (p.fvu, p.score) if q is not None}
    if INTERPOLATED in origins:
        notes.append(
            "~ interpolated between calibrated epsilons (linear in log epsilon; the interval spans both neighbours')"
        )
    if OUTSIDE in origins:
        notes.append(
            "! outside the calibrated range: the nearest calibrated value is shown and no interval is known"
        )
    if delta != _default_delta(calibration):
        notes.append(
            f"quality was predicted at delta = {_default_delta(calibration):g}; the noise of sums is another at delta = {delta:g}"
        )
    if SCALED in origins:
        notes.append(
            f"< the calibration was fitted to contexts of {calibration.units} units, this plan is for {units}: in the same noise they "
            f"are heard as those are at epsilon * {units} / {calibration.units}; no interval is known"
        )
    elif units != calibration.units:
        notes.append(
            f"quality was predicted for contexts of {calibration.units} units, this plan is for {units}"
        )
    if machine is not None:
        notes.append(
            f"time: measured now on this machine ({machine}), median of {REPEATS} releases of random rows; without the text encoder and "
            "the ledger"
        )
    notes.append("rows, K and V: at most, before pruning; public rows (BOS, negative prompt) come on top")
    notes.append(
        "an attacker's prior: the best guess before the release by one who knows everything else, the other units included; where an "
        "encoder mixes rows, the others may say much about one of them"
    )
    notes += [PLAN_UNIT[calibration.unit], PLAN]
    return tuple(notes)


def _unseen(calibration: AnchorCalibration) -> bool:
    """Whether its plans were tried on contexts of kinds that nothing was fitted to."""
    return all(p.tried_on_unseen for p in calibration.plans)


def _of_replies(calibration: AnchorCalibration) -> list[str]:
    """What a decoder that was trained on replies keeps of them: an FVU says little of it then."""
    measured = [c for c in calibration.settings.get("candidates", ()) if "divergence" in c]
    if not measured:
        return []
    best = {
        e: min(c["divergence"] for c in measured if c["epsilon"] == e)
        for e in sorted({c["epsilon"] for c in measured})
    }
    nothing = calibration.settings.get(
        "nothing", {"rows that do not look at the release": max(c["divergence"] for c in measured)}
    )
    for plan in calibration.plans:  # what is served, not what a decoder would have made
        if plan.worth is not None and _served(plan) is not None and plan.worth.against in nothing:
            best[plan.epsilon] = nothing[plan.worth.against]
    each = ", ".join(f"{value:.2g} at {epsilon:g}" for epsilon, value in best.items())
    beside = " and ".join(f"{level:.2g} for {NOTHING.get(name, name)}" for name, level in nothing.items())
    return [
        "replies: the decoder was trained on the model's own replies to public questions, for which the FVU says little; divergence of the "
        f"next token from the exact model's, in nats, by epsilon: {each} ({beside})"
    ]
