"""Guarantees in words and numbers. Never more than what is proven; always what is NOT covered."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .known_mechanisms import KNOWN

ELSEWHERE = "as charged where it was made"  # what a context has spent, where its ledger is not at hand
_SHOWN = 100  # released texts that a printed report quotes
NOT_PRIVATE = "NOT PRIVATE: mechanism='none' is exact attention; nothing is promised."


@dataclass(frozen=True)
class Guarantee:
    """What one release promises.

    Args:
        mechanism: which one released.
        epsilon: of this release; inf for mechanism="none".
        delta: of this release.
        unit: what one neighbouring step changes.
        neighboring: how it changes.
        rows: how many; None where the neighbouring relation makes that private (add_or_remove_one).
        units: how many; None likewise.
        clip_norm: clipping bound of one unit's contribution, in lattice units' common scale.
        sensitivity: l2 sensitivity of the summed contributions, on the same scale.
        sigma: deviation of the noise, on the same scale.
        sampling_distance: statistical distance of the sampler from its law, which delta covers.
        private_noise: False when a seeded sampler was used (tests): then nothing is promised.
        calibrated: whether public statistics took part.
        clipping: what was clipped and how, in words.

    Example:
        >>> release = dpx.protect(pipe, epsilon=8.0, calibration=library).release("a red circle")
        >>> print(release.guarantees[0].sentence())
        (8, 0)-differentially private (pure epsilon: delta = 0) when one phrase, sentence or document (as it was cut) of the ...
    """

    mechanism: str
    epsilon: float
    delta: float
    unit: str
    neighboring: str
    rows: int | None
    units: int | None
    clip_norm: float
    sensitivity: float
    sigma: float
    sampling_distance: float
    private_noise: bool
    calibrated: bool
    clipping: str = ""

    @property
    def is_private(self) -> bool:
        return self.mechanism != "none" and self.private_noise and math.isfinite(self.epsilon)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; epsilon None where nothing is promised."""
        values = asdict(self)
        values["epsilon"] = self.epsilon if math.isfinite(self.epsilon) else None
        return {**values, "is_private": self.is_private}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Guarantee:
        """The reverse of `to_dict`.

        Args:
            values: what it gave.
        """
        known = dict(values)
        known.pop("is_private", None)
        if known.get("epsilon") is None:
            known["epsilon"] = math.inf
        return cls(**known)

    def sentence(self) -> str:
        """What is promised, in one sentence."""
        if self.mechanism != "none" and not self.private_noise:
            return "NOT PRIVATE: the noise came from a seeded generator (for tests); nothing is promised."
        return promise(self.mechanism, self.epsilon, self.delta, self.unit, self.neighboring)


def promise(mechanism: str, epsilon: float, delta: float, unit: str, neighboring: str) -> str:
    """What a release promises, in one sentence."""
    known = KNOWN.get(mechanism)
    if known is not None and not known.private:
        return NOT_PRIVATE
    texts = known is not None and known.releases == "texts"  # its units are texts, not rows
    group = "one phrase, sentence or document (as it was cut)" if texts else "one group of rows"
    changed = {"row": "one row (embedding)", "group": group, "context": "the whole context"}
    change = (
        "replaced by any other"
        if neighboring == "replace_one"
        else "added or removed (its slot filled or left empty)"
    )
    pure = "" if delta else " (pure epsilon: delta = 0)"
    return (
        f"({epsilon:g}, {delta:g})-differentially private{pure} when {changed[unit]} of the private context is {change}; "
        "every query, layer, step and output reads only this release."
    )


def release_entry(
    name: str,
    guarantee: Guarantee,
    charges: int | None = None,
    spent: float | str = ELSEWHERE,
    spent_delta: float | None = None,
) -> dict[str, Any]:
    """One release in a report. charges: None where the ledger that counts is elsewhere. spent_delta: None: the guarantee's."""
    return {
        "name": name,
        "guarantee": guarantee.to_dict(),
        "guarantee_text": guarantee.sentence(),
        "epsilon": guarantee.to_dict()["epsilon"],
        "delta": guarantee.delta,
        "unit": guarantee.unit,
        "neighboring": guarantee.neighboring,
        "charges": charges,
        "spent_epsilon": spent,
        "spent_delta": guarantee.delta if spent_delta is None else spent_delta,
        "details": guarantee.clipping or "exact attention",
    }


def _texts(release: Mapping[str, Any]) -> list[str]:
    """Released texts, each with its count where units voted; of many the first ones."""
    texts = release.get("text", ())
    counts = release.get("counts", [1] * len(texts))
    shown = [
        f"      released text: {text}" + (f" (x {n})" if n != 1 else "")
        for text, n in zip(texts[:_SHOWN], counts[:_SHOWN], strict=True)
    ]
    return [*shown, *([f"      and {len(texts) - _SHOWN} more texts"] if len(texts) > _SHOWN else [])]


def rounded_up(epsilon: float) -> float:
    """For people: four decimals, never less than what was spent (but for rounding at the tenth)."""
    return math.ceil(epsilon * 1e4 - 1e-6) / 1e4 if math.isfinite(epsilon) else epsilon


def _up(value: float | str) -> str:
    """A number with four decimals, rounded up: what is printed is never less than what was spent."""
    return value if isinstance(value, str) else f"{rounded_up(value):.4f}"


@dataclass(frozen=True)
class PrivacyReport:
    """What was promised, spent and left open by a protected host. str(), to_dict(), to_json().

    Args:
        host: class of the model.
        layers: how many read the context.
        heads: of all these layers.
        config: `DPXAttnConfig.to_dict`.
        releases: one entry each (`release_entry`).
        public: what is not protected because it is public.
        not_covered: what the guarantee says nothing about.
        ledger: where charges are kept.
        warnings: what the operator must know, first.

    Example:
        >>> protected = dpx.protect(pipe, epsilon=8.0, calibration=library)
        >>> print(protected.report())
        Privacy report: StableDiffusionPipeline, which reads released text ...
    """

    host: str
    layers: int
    heads: int
    config: dict[str, Any]
    releases: tuple[dict[str, Any], ...] = ()
    public: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()
    ledger: str = ""
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def to_json(self, **kwargs: Any) -> str:
        """As JSON.

        Args:
            kwargs: for `json.dumps`.
        """
        return json.dumps(self.to_dict(), **{"indent": 2, "sort_keys": True, **kwargs})

    def __str__(self) -> str:
        read = f"{self.layers} layers that read the context, {self.heads} heads"
        lines = [f"Privacy report: {self.host}, {read if self.layers else 'which reads released text'}"]
        lines += [f"  {w}" for w in self.warnings]
        if not self.releases:
            lines.append("  nothing has been released yet")
        for i, release in enumerate(self.releases):
            lines.append(f"  release {i + 1} [{release['name']}]: {release['guarantee_text']}")
            spent = f"charges on this context: {release['charges']}, spent in total: epsilon {_up(release['spent_epsilon'])}"
            if release["charges"] is None:
                spent = f"spent on this context: epsilon {release['spent_epsilon']}"
            lines.append(f"      {spent} at delta {release['spent_delta']:g}")
            lines.append(f"      {release['details']}")
            lines += _texts(release)
        lines.append("  public: " + "; ".join(self.public))
        lines.append("  NOT covered:")
        lines += [f"    - {item}" for item in self.not_covered]
        lines.append(f"  ledger: {self.ledger}")
        return "\n".join(lines)
