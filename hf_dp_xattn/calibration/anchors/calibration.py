"""`AnchorCalibration`: public encoder, codebooks, priors and decoders of `anchors`, one plan per epsilon. safetensors + JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...hub import find_files, push_files
from ...mechanisms.anchors.cells import CellDecoder, Tilt
from ...mechanisms.anchors.plan import RELEASES, AnchorPlan, Decoders, Quality
from ...mechanisms.anchors.release import PreparedAnchors, prepare_anchors
from ...mechanisms.anchors.slots import SlotDecoder, SlotHead

SCHEMA_VERSION = 1
KIND = "anchors"
GROUPINGS = {"row": ("rows",), "group": ("rows", "phrases"), "context": ("context",)}
JSON_NAME = "dp_xattn_calibration.json"
TENSORS_NAME = "dp_xattn_calibration.safetensors"
_HALF = ("matrix", "weight", "hidden", "coefficients", "directions", "anchors", "inner", "outer", "cells")


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


@dataclass(frozen=True, eq=False)
class AnchorCalibration:
    """Everything that `anchors` reads besides the private rows. Nothing in here may depend on a private context.

    unit, neighboring: what it was made for. grouping: "rows", "phrases" or "context", how units were encoded. contexts, units: how many
    public contexts, and the largest number of units in one. settings: how it was made, for the card. scores: task scores that the
    publisher measured on public contexts, for the planner.
    """

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

    mechanism = KIND

    def check(self, config: DPXAttnConfig, channels: int) -> None:
        """Raises ConfigError unless the calibration was made for this unit, relation and number of channels."""
        for name in ("unit", "neighboring"):
            if getattr(config, name) != getattr(self, name):
                raise ConfigError(
                    f"The calibration was made with {name}={getattr(self, name)!r}, the config says {getattr(config, name)!r}. "
                    "Calibrate again, or change the config."
                )
        if channels != self.channels:
            raise ConfigError(
                f"The calibration is for contexts of {self.channels} channels, this model's have {channels}: it is for another model."
            )
        if config.mechanism != KIND:
            raise ConfigError(
                f"This calibration is for mechanism='anchors', the config says {config.mechanism!r}. Calibrate for that."
            )

    def prepare(self, config: DPXAttnConfig) -> PreparedAnchors:
        """What a release at config.epsilon is made of. Raises ConfigError where it cannot give the config's guarantee."""
        self.check(config, self.channels)
        return prepare_anchors(config, self.plans, self.decoders)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Writes JSON + safetensors (no pickle); returns the folder."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        blob = save({k: v.detach().cpu().contiguous().clone() for k, v in self._tensors().items()})
        header = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "unit": self.unit,
            "neighboring": self.neighboring,
            "grouping": self.grouping,
            "channels": self.channels,
            "contexts": self.contexts,
            "units": self.units,
            "settings": self.settings,
            "host": {"layers": [list(x) for x in self.host.layers], "dtype": self.host.dtype},
            "plans": [
                {
                    **{name: getattr(p, name) for name in AnchorPlan.FIELDS},
                    "quality": dataclasses.asdict(p.quality),
                    "has_head": p.head is not None,
                    "has_tilt": p.tilt is not None,
                }
                for p in self.plans
            ],
            "scores": [dataclasses.asdict(s) for s in self.scores],
            "has_slots": self.decoders.slots is not None,
            "cells": None if self.decoders.cells is None else {"rows": self.decoders.cells.rows},
            "sha256": hashlib.sha256(blob).hexdigest(),
        }
        (folder / TENSORS_NAME).write_bytes(blob)
        (folder / JSON_NAME).write_text(json.dumps(header, indent=2, sort_keys=True) + "\n")
        return folder

    def _tensors(self) -> dict[str, torch.Tensor]:
        out = {"host.sketch": self.host.sketch, "host.probe": self.host.probe}

        def add(prefix: str, part: Any) -> None:
            if part is not None:
                for name in part.TENSORS:
                    value = getattr(part, name)
                    out[f"{prefix}.{name}"] = value.half() if name in _HALF else value

        add("slots", self.decoders.slots)
        add("cells", self.decoders.cells)
        for i, plan in enumerate(self.plans):
            add(f"plan.{i}", plan)
            add(f"plan.{i}.head", plan.head)
            add(f"plan.{i}.tilt", plan.tilt)
        return out

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the two files to a Hub repository; returns the commit's address."""
        return push_files(
            self.save_pretrained,
            repo_id,
            message="Upload a DP attention calibration",
            private=private,
            token=token,
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **hub_kwargs: Any) -> AnchorCalibration:
        """Reads a folder or a Hub repository; raises ConfigError on anything missing, unknown, damaged or of another schema."""
        return cls.from_folder(
            find_files(name_or_path, (JSON_NAME, TENSORS_NAME), error=ConfigError, **hub_kwargs)
        )

    @classmethod
    def from_folder(cls, folder: Path) -> AnchorCalibration:
        """Reads and checks the two files; raises ConfigError."""
        try:
            header = json.loads((folder / JSON_NAME).read_text())
            payload = (folder / TENSORS_NAME).read_bytes()
        except (OSError, ValueError) as error:
            raise ConfigError(f"No readable calibration in {folder}: {type(error).__name__}.") from None
        if not isinstance(header, dict) or header.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(
                f"The calibration in {folder} has another schema version than {SCHEMA_VERSION}; upgrade hf_dp_xattn, or calibrate again."
            )
        if header.get("kind") != KIND:
            raise ConfigError(
                f"The calibration in {folder} is of kind {header.get('kind')!r}, expected {KIND!r}."
            )
        if hashlib.sha256(payload).hexdigest() != header.get("sha256"):
            raise ConfigError(
                f"The calibration's tensors in {folder} do not match their checksum: damaged or truncated."
            )
        if set(header) != _KEYS:
            raise ConfigError(
                f"Unknown or missing keys in {folder / JSON_NAME}: {sorted(set(header) ^ _KEYS)}."
            )
        try:
            tensors = {k: v.float() if v.dtype == torch.float16 else v for k, v in load(payload).items()}
            calibration = _read(header, tensors)
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"The calibration in {folder} is incomplete or damaged ({type(error).__name__})."
            ) from None
        calibration.verify()
        return calibration

    def rounded(self) -> AnchorCalibration:
        """The calibration as a file would give it back: large tensors in half precision."""
        tensors = {
            k: v.half().float() if k.split(".")[-1] in _HALF else v for k, v in self._tensors().items()
        }
        return dataclasses.replace(
            self,
            plans=tuple(_plan(p, i, tensors) for i, p in enumerate(self.plans)),
            decoders=_decoders(self.decoders, tensors),
        )

    def verify(self) -> None:
        """Raises ConfigError for parts that do not fit each other: shapes, NaN, unknown releases, cells that repeat."""
        for plan in self.plans:
            k, c = plan.matrix.shape
            sizes = (c == self.channels, len(plan.bias) == k, plan.codes.shape[-1] == k, len(plan.reach) == c)
            finite = all(bool(torch.isfinite(getattr(plan, n)).all()) for n in AnchorPlan.TENSORS)
            if (
                plan.release not in RELEASES
                or not all(sizes)
                or not finite
                or not math.isfinite(plan.epsilon)
            ):
                raise ConfigError(
                    "The calibration's parts do not fit each other, or hold NaN: it is damaged. Calibrate again."
                )
            if any(len(torch.unique(codes, dim=0)) < len(codes) for codes in plan.codes):
                raise ConfigError(
                    f"The codebook for epsilon = {plan.epsilon:g} has repeated cells, of which one is always empty. Calibrate again."
                )
        if not self.plans:
            raise ConfigError("The calibration holds no plan; calibrate again.")
        if self.grouping not in GROUPINGS[self.unit]:
            raise ConfigError(
                f"The calibration says grouping={self.grouping!r} for unit={self.unit!r}, expected one of {GROUPINGS[self.unit]}."
            )


_KEYS = {
    "schema_version",
    "kind",
    "unit",
    "neighboring",
    "grouping",
    "channels",
    "contexts",
    "units",
    "settings",
    "host",
    "plans",
    "scores",
    "has_slots",
    "cells",
    "sha256",
}


def _part(kind: Any, prefix: str, tensors: dict[str, torch.Tensor], **extra: Any) -> Any:
    return kind(**{n: tensors[f"{prefix}.{n}"] for n in kind.TENSORS}, **extra)


def _plan(plan: AnchorPlan, i: int, tensors: dict[str, torch.Tensor]) -> AnchorPlan:
    parts: dict[str, Any] = {n: tensors[f"plan.{i}.{n}"] for n in AnchorPlan.TENSORS}
    return dataclasses.replace(
        plan,
        **parts,
        head=None if plan.head is None else _part(SlotHead, f"plan.{i}.head", tensors),
        tilt=None if plan.tilt is None else _part(Tilt, f"plan.{i}.tilt", tensors),
    )


def _decoders(decoders: Decoders, tensors: dict[str, torch.Tensor]) -> Decoders:
    cells = decoders.cells
    return Decoders(
        None if decoders.slots is None else _part(SlotDecoder, "slots", tensors),
        None if cells is None else _part(CellDecoder, "cells", tensors, rows=cells.rows),
    )


def _read(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AnchorCalibration:
    plans = []
    for i, entry in enumerate(header["plans"]):
        prefix = f"plan.{i}"
        own: dict[str, Any] = {n: tensors[f"{prefix}.{n}"] for n in AnchorPlan.TENSORS}
        plans.append(
            AnchorPlan(
                **{n: entry[n] for n in AnchorPlan.FIELDS},
                **own,
                head=_part(SlotHead, f"{prefix}.head", tensors) if entry["has_head"] else None,
                tilt=_part(Tilt, f"{prefix}.tilt", tensors) if entry["has_tilt"] else None,
                quality=Quality(**entry["quality"]),
            )
        )
    cells = header["cells"]
    layers = tuple((str(n), int(h), int(c), int(o)) for n, h, c, o in header["host"]["layers"])
    return AnchorCalibration(
        **{
            n: header[n]
            for n in ("unit", "neighboring", "grouping", "channels", "contexts", "units", "settings")
        },
        host=HostIdentity(layers, tensors["host.sketch"], header["host"]["dtype"], tensors["host.probe"]),
        plans=tuple(plans),
        scores=tuple(ScorePoint(**s) for s in header["scores"]),
        decoders=Decoders(
            _part(SlotDecoder, "slots", tensors) if header["has_slots"] else None,
            None if cells is None else _part(CellDecoder, "cells", tensors, rows=int(cells["rows"])),
        ),
    )
