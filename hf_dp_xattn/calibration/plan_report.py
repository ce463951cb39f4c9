"""`Plan`: what releases at some epsilons would give, as a table, JSON or a plot. Made from public data only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..privacy.accountant import Event, epsilon_of, needs_delta
from ..privacy.guessing import PRIORS, guess_bound
from ..report import rounded_up
from .curves import INTERPOLATED, OUTSIDE, Curve, Estimate, Wanted


@dataclass(frozen=True)
class PlanPoint:
    """One epsilon. fvu, score: predicted (score: None where the publisher measured none). release: its kind; made_for: the epsilon
    that its decoder was trained for; meaning: what would leave, in words; noise: its numbers. charged: by the ledger's accountant, at
    charged_delta. rows: that every layer would attend to, at most; kv_bytes: of their keys and values. seconds: of one release,
    measured. guesses: (prior, largest probability of guessing one unit afterwards). useless: why it is not known to be better than no
    release, so that `protect` refuses it; None where it is, or was never compared. serves: what stands in the place of all that it would
    be decoded to, where that is so whatever the context says; fvu is of that then.
    """

    epsilon: float
    fvu: Estimate
    score: Estimate | None
    release: str
    made_for: float
    meaning: str
    noise: dict[str, float]
    events: tuple[dict[str, Any], ...]
    charged: float
    charged_delta: float
    rows: int
    kv_bytes: int
    seconds: float | None
    guesses: tuple[tuple[float, float], ...]
    useless: str | None = None
    serves: str | None = None


def charge_of(config: DPXAttnConfig, events: Sequence[Event]) -> dict[str, Any]:
    """The fields of a point that say what a release is charged, by the ledger's accountant, and what that means for an attacker."""
    # a pure release promises the same at delta = 0
    delta = config.delta if needs_delta(events) else 0.0
    charged = epsilon_of(events, delta)
    return {
        "epsilon": config.epsilon,
        "events": tuple(e.to_dict() for e in events),
        "charged": charged,
        "charged_delta": delta,
        "guesses": tuple((p, guess_bound(charged, delta, p, config.neighboring)) for p in PRIORS),
    }


@dataclass(frozen=True)
class Plan:
    """What `dpx.plan` found. str() is a table; to_dict(), to_json(), plot(path).

    Args:
        calibration: its folder or kind.
        unit: what is protected.
        neighboring: the relation.
        grouping: how units are encoded.
        units: in one context (rows, groups or 1).
        delta: of the guarantee.
        contexts: public ones that the calibration was fitted to.
        layers: whose keys and values are counted.
        heads: of these layers.
        dtype: of keys and values.
        exact_kv_bytes: keys and values of exact attention, known for unit="row" only.
        measured_on: where times were taken; None: they were not.
        points: one for each epsilon.
        fvu_curve: predicted fraction of the output's variance that is left unexplained.
        score_curve: predicted score; None where the publisher measured none.
        wanted: the smallest epsilon for each quality that was asked for.
        notes: what to know beside.

    Example:
        >>> found = dpx.plan(calibration, epsilons=[4.0, 8.0], measure=False)
        >>> len(found.points)
        2
    """

    calibration: str
    unit: str
    neighboring: str
    grouping: str
    units: int
    delta: float
    contexts: int
    layers: int
    heads: int
    dtype: str
    exact_kv_bytes: int | None
    measured_on: str | None
    points: tuple[PlanPoint, ...]
    fvu_curve: Curve
    score_curve: Curve | None
    wanted: tuple[Wanted, ...]
    notes: tuple[str, ...]

    @property
    def reached(self) -> bool:
        """Whether every wanted quality is predicted to be reached."""
        return all(w.epsilon is not None for w in self.wanted)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        values = asdict(self)
        values["fvu_curve"] = self.fvu_curve.to_dict()
        values["score_curve"] = None if self.score_curve is None else self.score_curve.to_dict()
        for point in values["points"]:
            point["guesses"] = [{"prior": p, "success": s} for p, s in point["guesses"]]
        values["reached"] = self.reached
        result: dict[str, Any] = json.loads(json.dumps(values))  # tuples become lists, as in the JSON form
        return result

    def to_json(self, **kwargs: Any) -> str:
        """As JSON.

        Args:
            kwargs: for `json.dumps`.
        """
        return json.dumps(self.to_dict(), **{"indent": 2, "sort_keys": True, **kwargs})

    def __str__(self) -> str:
        what = {"row": "one row", "group": "one group", "context": "the context"}[self.unit]
        many = "" if self.unit == "context" else f" of {self.units}"
        host = f"{self.layers} layers, {self.heads} heads, {self.dtype}" if self.layers else "public texts"
        lines = [
            f"Plan for {self.calibration}: {host}; nothing was released or charged",
            f"  protects {what}{many} ({self.neighboring}) at delta = {self.delta:g}; one release serves all layers and steps",
            "",
            *_table(self._header(), [self._row(p) for p in self.points]),
        ]
        if self.exact_kv_bytes is not None:
            lines.append(
                f"  exact attention keeps {self.units} rows, {_bytes(self.exact_kv_bytes)} of K and V"
            )
        if self.wanted:
            lines += ["", "Wanted", *(f"  {w}" for w in self.wanted)]
        prior_names = [f"prior {_prior(p)}" for p in PRIORS]
        odds = [[f"{p.epsilon:g}", *(_percent(s) for _, s in p.guesses)] for p in self.points]
        lines += [
            "",
            f"An attacker who knows all else guesses {what} with a probability of at most",
            *_table(["epsilon", *prior_names], odds),
            "",
            "What would leave, once for each context",
        ]
        for p in self.points:
            events = f"{len(p.events)} event" + ("s" if len(p.events) != 1 else "")
            lines.append(
                f"  epsilon {p.epsilon:g} (charges {events}, epsilon {_up(p.charged)} at delta {p.charged_delta:g}; plan made for "
                f"epsilon {p.made_for:g}): {p.meaning}"
            )
        lines += ["", "Notes", *(f"  - {n}" for n in self.notes)]
        return "\n".join(lines)

    def _header(self) -> list[str]:
        header = ["epsilon", self.fvu_curve.name, "95 %"]
        if self.score_curve is not None:
            header += [self.score_curve.name, "95 %"]
        header += ["release", "rows", "K and V"] if self.layers else ["release", "texts that may answer"]
        return header if self.measured_on is None else [*header, "time"]

    def _row(self, p: PlanPoint) -> list[str]:
        cells = [f"{p.epsilon:g}", *_cells(p.fvu, " =" if p.serves else "")]
        if p.score is not None:
            cells += _cells(p.score)
        release = p.serves or p.release
        release = release if p.useless is None else f"{release} x"
        cells += [release, f"<= {p.rows}", _bytes(p.kv_bytes)] if self.layers else [p.release, str(p.rows)]
        if p.seconds is not None:
            cells.append(f"{1e3 * p.seconds:.3g} ms")
        return cells

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """FVU and score against epsilon with their intervals and what is wanted; the suffix decides the format. Returns the path.

        Args:
            path: of the picture.

        Raises:
            ConfigError: matplotlib is not installed, the format is unknown, or the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ConfigError(
                "A plot needs matplotlib: pip install 'hf_dp_xattn[examples]'. The table and --json do not."
            ) from None
        curves = [self.fvu_curve] + ([] if self.score_curve is None else [self.score_curve])
        figure = Figure(figsize=(5.2 * len(curves), 3.6), layout="constrained")
        axes = figure.subplots(1, len(curves), squeeze=False)[0]
        for ax, curve in zip(axes, curves, strict=True):
            self._draw(ax, curve)
        figure.suptitle(f"{self.calibration}: one {self.unit}, {self.neighboring}, delta = {self.delta:g}")
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise ConfigError(f"The plot could not be written to {path}: {error}.") from None
        return Path(path)

    def _draw(self, ax: Any, curve: Curve) -> None:
        epsilon, value, low, high = zip(*curve.points, strict=True)
        down = [max(0.0, v - x) for v, x in zip(value, low, strict=True)]
        up = [max(0.0, x - v) for v, x in zip(value, high, strict=True)]
        ax.errorbar(epsilon, value, yerr=[down, up], marker="o", capsize=3, label="predicted, 95 % interval")
        asked = [(p.epsilon, p.fvu if curve is self.fvu_curve else p.score) for p in self.points]
        between = [(e, q.value) for e, q in asked if q is not None and q.origin == INTERPOLATED]
        if between:
            ax.plot(*zip(*between, strict=True), "s", label="interpolated")
        for w in self.wanted:
            if w.name == curve.name:
                label = "not reached" if w.epsilon is None else f"epsilon = {w.epsilon:g}"
                ax.axhline(w.target, color="C3", ls="--", label=f"wanted {w.target:g}: {label}")
                if w.epsilon is not None:
                    ax.axvline(w.epsilon, color="C3", ls=":")
        ax.set_xscale("log", base=2)
        ax.set_xticks(epsilon, [f"{e:g}" for e in epsilon])
        ax.set_xlabel("epsilon of one release")
        ax.set_ylabel(curve.name)
        ax.grid(alpha=0.3)
        ax.legend()


def _cells(estimate: Estimate, served: str = "") -> list[str]:
    mark = served + {INTERPOLATED: " ~", OUTSIDE: " !"}.get(estimate.origin, "")
    if estimate.low is None or estimate.high is None:
        return [f"{estimate.value:.3f}{mark}", "unknown"]
    return [f"{estimate.value:.3f}{mark}", f"{estimate.low:.3f} to {estimate.high:.3f}"]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    return [
        "  " + "  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in [header, *rows]
    ]


def _prior(value: float) -> str:
    inverse = round(1 / value)
    return f"1/{inverse}" if inverse < 10_000 else f"10^{round(math.log10(value))}"


def _percent(share: float) -> str:
    """Rounded up, so never less than the bound: three significant digits, or as many as the distance to 100 % needs."""
    left = 100 * (1 - share)
    if left < 1e-4:
        return "100 %"
    percent = 100 * share
    step = 10.0 ** (math.floor(math.log10(min(percent, 10 * left))) - 2)
    return f"{math.ceil(percent / step - 1e-9) * step:.7g} %"


def _up(value: float) -> str:
    return f"{rounded_up(value):g}"


def _bytes(number: int) -> str:
    return f"{number / 1024:.3g} KiB" if number < 2**20 else f"{number / 2**20:.3g} MiB"
