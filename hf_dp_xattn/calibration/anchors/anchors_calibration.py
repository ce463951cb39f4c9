"""`AnchorCalibration`: public encoder, codebooks, priors and decoders of `anchors`, one plan per epsilon. safetensors + JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...artefacts.card import table
from ...artefacts.codec import Tensors
from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.anchors import nearest_plan, prepare_anchors
from ...mechanisms.anchors.cells import CellDecoder, Tilt
from ...mechanisms.anchors.fallback import Fallback, Worth
from ...mechanisms.anchors.likeness import Likeness
from ...mechanisms.anchors.move import RowMove
from ...mechanisms.anchors.plan import AnchorPlan, Decoders, Quality
from ...mechanisms.anchors.slots import SlotDecoder, SlotHead
from ...mechanisms.anchors.sources import PreparedAnchors
from ...privacy.units import NeighboringRelation
from ..calibration_card import Described
from ..stored import CHECKS, CODEC, Stored
from .anchor_checks import verify_plans

GROUPINGS = {"row": ("rows",), "group": ("rows", "phrases", "segments"), "context": ("context",)}
# what is stored in half precision
HALF = ("matrix", "weight", "hidden", "coefficients", "directions", "anchors", "inner", "outer", "cells")
_FIELDS = ("unit", "neighboring", "grouping", "channels", "contexts", "units", "settings")
_PLAN_KEYS = {*AnchorPlan.FIELDS, "quality", "has_head", "has_tilt"}
_MEASURES = {"fvu": "unexplained variance", "divergence": "divergence of replies"}
NOTHING = {"mean": "the public mean", "none": "no context at all"}


@dataclass(frozen=True, eq=False)
class HostIdentity:
    """What tells a host from another one. layers: (name, heads, channels in, channels out); sketch: of their projections; dtype: of
    the weights; probe [n, C]: the text encoder's rows of a fixed public text (empty where the host has none)."""

    layers: tuple[tuple[str, int, int, int], ...]
    sketch: torch.Tensor
    dtype: str
    probe: torch.Tensor


@dataclass(frozen=True)
class ScorePoint:
    """A task score measured on PUBLIC contexts at one epsilon, with its 95 % interval. name: what was scored."""

    name: str
    epsilon: float
    score: float
    low: float
    high: float
    contexts: int


@dataclass(frozen=True, eq=False, repr=False)
class AnchorCalibration(Stored):
    """Everything that `anchors` reads besides the private rows. Nothing in here may depend on a private context.

    unit, neighboring: what it was made for. grouping: "rows", "phrases" or "context", how units were encoded. contexts, units: how many
    public contexts, and the largest number of units in one. settings: how it was made, for the card. scores: task scores that the
    publisher measured on public contexts, for the planner.
    """

    KEYS = frozenset({"kind", "host", "plans", "scores", "has_slots", "cells", *_FIELDS})
    OPTIONAL = frozenset({"has_fallback"})
    KIND = mechanism = "anchors"

    unit: str
    neighboring: str
    grouping: str
    channels: int
    contexts: int
    units: int
    settings: dict[str, Any]
    host: HostIdentity
    plans: tuple[AnchorPlan, ...]
    decoders: Decoders
    scores: tuple[ScorePoint, ...] = ()

    def check(self, config: DPXAttnConfig, channels: int) -> None:
        """Raises ConfigError unless the calibration was made for this unit, relation and number of channels."""
        self.check_settings(config, {"unit": self.unit, "neighboring": self.neighboring})
        if channels != self.channels:
            raise ConfigError(
                f"The calibration is for contexts of {self.channels} channels, this model's have {channels}: it is for another model."
            )
        if config.mechanism != self.KIND:
            raise ConfigError(
                f"This calibration is for mechanism='anchors', the config says {config.mechanism!r}. Calibrate for that."
            )

    def prepare(self, config: DPXAttnConfig) -> PreparedAnchors:
        """What a release at config.epsilon is made of. Raises ConfigError where it cannot give the config's guarantee."""
        self.check(config, self.channels)
        return prepare_anchors(config, self.plans, self.decoders)

    def useless(self, config: DPXAttnConfig) -> str | None:
        worth = nearest_plan(self.plans, config.epsilon).worth
        if worth is None or worth.useful:
            return None
        return (
            f"on held-out public contexts the {_MEASURES[worth.measure]} is {worth.ratio:.3g} times that of {NOTHING[worth.against]} "
            f"(with 95 % confidence no more than {worth.high:.3g} times)"
        )

    def header(self) -> dict[str, Any]:
        cells = self.decoders.cells
        return {
            "kind": self.KIND,
            **{name: getattr(self, name) for name in _FIELDS},
            "host": {"layers": [list(x) for x in self.host.layers], "dtype": self.host.dtype},
            "plans": [
                {
                    **{name: getattr(p, name) for name in AnchorPlan.FIELDS},
                    "quality": dataclasses.asdict(p.quality),
                    "has_head": p.head is not None,
                    "has_tilt": p.tilt is not None,
                    **({} if p.worth is None else {"worth": dataclasses.asdict(p.worth)}),
                    **({} if p.likeness is None else {"has_likeness": True}),
                }
                for p in self.plans
            ],
            "scores": [dataclasses.asdict(s) for s in self.scores],
            "has_slots": self.decoders.slots is not None,
            "cells": None if cells is None else {"rows": cells.rows},
            **({} if self.decoders.fallback is None else {"has_fallback": True}),
        }

    def tensors(self) -> Tensors:
        out: Tensors = {"host.sketch": self.host.sketch, "host.probe": self.host.probe}

        def add(prefix: str, part: Any) -> None:
            if part is not None:
                for name in part.TENSORS:
                    value = getattr(part, name)
                    out[f"{prefix}.{name}"] = value.half() if name in HALF else value

        add("slots", self.decoders.slots)
        add("cells", self.decoders.cells)
        add("move", self.decoders.move)
        add("fallback", self.decoders.fallback)
        for i, plan in enumerate(self.plans):
            add(f"plan.{i}", plan)
            add(f"plan.{i}.head", plan.head)
            add(f"plan.{i}.tilt", plan.tilt)
            add(f"plan.{i}.likeness", plan.likeness)
        return out

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Tensors) -> AnchorCalibration:
        cells = header["cells"]
        # decoders multiply them by each other; `move` works in float64
        tensors = {
            k: v.float() if v.is_floating_point() and not k.startswith("move.") else v
            for k, v in tensors.items()
        }
        CHECKS.keys(header["host"], {"layers", "dtype"}, "the host of the calibration")
        if cells is not None:
            CHECKS.keys(cells, {"rows"}, "the cells of the calibration")
        layers = tuple((str(n), int(h), int(c), int(o)) for n, h, c, o in header["host"]["layers"])
        return cls(
            **{n: header[n] for n in _FIELDS},
            host=HostIdentity(
                layers, tensors["host.sketch"], str(header["host"]["dtype"]), tensors["host.probe"]
            ),
            plans=tuple(_read_plan(i, entry, tensors) for i, entry in enumerate(header["plans"])),
            scores=tuple(ScorePoint(**s) for s in header["scores"]),
            decoders=Decoders(
                _part(SlotDecoder, "slots", tensors) if header["has_slots"] else None,
                None if cells is None else _part(CellDecoder, "cells", tensors, rows=cells["rows"]),
                _part(RowMove, "move", tensors)
                if any(p["release"] == "mixed" for p in header["plans"])
                else None,
                _part(Fallback, "fallback", tensors) if header.get("has_fallback") else None,
            ),
        )

    def rounded(self) -> AnchorCalibration:
        """The calibration as a file would give it back: large tensors in half precision."""
        return self.from_parts(self.header(), self.tensors())

    def verify(self) -> None:
        if self.unit not in GROUPINGS:
            CHECKS.refuse(f"unit is {self.unit!r}")
        if self.grouping not in GROUPINGS[self.unit]:
            raise ConfigError(
                f"The calibration says grouping={self.grouping!r} for unit={self.unit!r}, expected one of "
                f"{GROUPINGS[self.unit]}."
            )
        if self.neighboring not in {r.value for r in NeighboringRelation}:
            CHECKS.refuse(f"neighboring is {self.neighboring!r}")
        for name in ("channels", "contexts", "units"):
            CHECKS.integer(getattr(self, name), name)
        if not isinstance(self.settings, dict):
            CHECKS.refuse("settings is no object")
        if not self.plans:
            raise ConfigError("The calibration holds no plan; calibrate again.")
        host = self.host
        if not host.layers or any(min(heads, out) < 1 for _, heads, _, out in host.layers):
            CHECKS.refuse("its layers")
        if any(channels != self.channels for _, _, channels, _ in host.layers):
            CHECKS.refuse("its layers read other contexts than it is for")
        CHECKS.sizes().fit("host.sketch", host.sketch, len(host.layers), 2, "s", "s")
        CHECKS.sizes().fit("host.probe", host.probe, "n", self.channels)
        verify_plans(self.plans, self.decoders, self.channels)
        for score in self.scores:
            for name in ("epsilon", "score", "low", "high"):
                CHECKS.number(getattr(score, name), f"a score's {name}")
            CHECKS.integer(score.contexts, "a score's contexts")

    def described(self) -> Described:
        rows = [
            (
                f"{p.epsilon:g}",
                p.release,
                f"{p.quality.fvu:.3f} ({p.quality.low:.3f} to {p.quality.high:.3f})",
            )
            for p in self.plans
        ]
        text = (
            "Predicted on held-out public contexts: the fraction of the attention output's variance that the release leaves unexplained "
            f"(FVU; 1 is the public mean alone), with 95 % intervals.\n\n{table(('epsilon', 'release', 'FVU'), rows)}"
        )
        if self.scores:
            scores = [
                (
                    f"{s.epsilon:g}",
                    s.name,
                    f"{100 * s.score:.1f} % ({100 * s.low:.0f}-{100 * s.high:.0f})",
                    s.contexts,
                )
                for s in self.scores
            ]
            head = ("epsilon", "score", "value (95 %)", "public contexts")
            text += f"\n\nMeasured by the publisher on public contexts:\n\n{table(head, scores)}"
        return Described(
            mechanism=self.mechanism,
            unit=self.unit,
            neighboring=self.neighboring,
            contexts=self.contexts,
            units=self.units,
            layers=len(self.host.layers),
            settings=self.settings,
            utility=text,
        )


def _part(kind: Any, prefix: str, tensors: Tensors, **extra: Any) -> Any:
    return kind(**{n: tensors[f"{prefix}.{n}"] for n in kind.TENSORS}, **extra)


def _read_plan(i: int, entry: Mapping[str, Any], tensors: Tensors) -> AnchorPlan:
    CHECKS.keys(entry, _PLAN_KEYS, f"plan {i} of {CODEC.json_name}", optional={"worth", "has_likeness"})
    prefix = f"plan.{i}"
    parts: dict[str, Any] = {n: tensors[f"{prefix}.{n}"] for n in AnchorPlan.TENSORS}
    return AnchorPlan(
        **{n: entry[n] for n in AnchorPlan.FIELDS},
        **parts,
        head=_part(SlotHead, f"{prefix}.head", tensors) if entry["has_head"] else None,
        tilt=_part(Tilt, f"{prefix}.tilt", tensors) if entry["has_tilt"] else None,
        quality=Quality(**entry["quality"]),
        worth=Worth(**entry["worth"]) if "worth" in entry else None,
        likeness=_part(Likeness, f"{prefix}.likeness", tensors) if entry.get("has_likeness") else None,
    )
