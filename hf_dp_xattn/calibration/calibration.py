"""`Calibration`: everything data-dependent that was computed from PUBLIC contexts only. Saved as safetensors + JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..hub import find_files, push_files
from ..mechanisms.contract import LayerSpec
from ..mechanisms.contributions import lattice_exponent
from ..mechanisms.geometry import HeadGeometry
from ..mechanisms.sketch import SketchBasis, SketchPlan
from .anchors.calibration import KIND as ANCHORS
from .anchors.calibration import AnchorCalibration

SCHEMA_VERSION = 1
_JSON = "dp_xattn_calibration.json"
_TENSORS = "dp_xattn_calibration.safetensors"
# A calibration is made for these fields of the config; epsilon may differ (the nearest plan is used).
BOUND_FIELDS = ("features", "degree", "num_features", "feature_seed", "logit_bound", "unit")


@dataclass(frozen=True)
class PlanEntry:
    """The part of a `SketchPlan` that depends on epsilon, and the FVU predicted for it on public contexts."""

    epsilon: float
    delta: float
    clip_norm: float
    weight: torch.Tensor
    center: torch.Tensor
    mean_a: torch.Tensor
    cov_y: torch.Tensor
    cov_zy: torch.Tensor
    predicted_fvu: float

    TENSORS = ("weight", "center", "mean_a", "cov_y", "cov_zy")
    NUMBERS = ("epsilon", "delta", "clip_norm", "predicted_fvu")

    @classmethod
    def from_parts(cls, numbers: dict[str, Any], tensors: dict[str, Any]) -> PlanEntry:
        """Raises TypeError on a missing or unknown part."""
        return cls(**numbers, **tensors)


def sketch_plan(entry: PlanEntry, basis: SketchBasis, units: int) -> SketchPlan:
    """The sketch that a plan entry describes, for contexts of about `units` units."""
    return SketchPlan(
        basis=basis,
        exponent=lattice_exponent(entry.clip_norm),
        clip_norm=entry.clip_norm,
        units=units,
        **{name: getattr(entry, name) for name in PlanEntry.TENSORS},
    )


@dataclass(frozen=True)
class Calibration:
    """Public geometry, clipping bound, sketch basis and plans for one model's layers.

    Nothing in here may depend on a private context: it is not noised and is not counted.
    """

    layers: tuple[str, ...]
    geometries: tuple[HeadGeometry, ...]
    settings: dict[str, Any]
    clip_norm: float
    contexts: int
    units: int
    basis: SketchBasis | None = None
    plans: tuple[PlanEntry, ...] = ()
    _cache: dict[float, SketchPlan] = field(default_factory=dict, repr=False, compare=False)

    def check(self, config: DPXAttnConfig, specs: Sequence[LayerSpec]) -> None:
        """Raises ConfigError unless the calibration was made for these layers and these settings."""
        for name in BOUND_FIELDS:
            if getattr(config, name) != self.settings[name]:
                raise ConfigError(
                    f"The calibration was made with {name}={self.settings[name]!r}, the config says {getattr(config, name)!r}. "
                    "Calibrate again, or change the config."
                )
        shapes = [(s.name, s.heads, s.key_dim, s.value_dim) for s in specs]
        own = [
            (n, g.heads, g.key_dim, g.value_dim) for n, g in zip(self.layers, self.geometries, strict=True)
        ]
        if shapes != own:
            raise ConfigError(
                "The calibration is for another model: layer names or shapes differ. Calibrate for this one."
            )

    def plan(self, config: DPXAttnConfig) -> SketchPlan | None:
        """The sketch to release at config.epsilon, or None where there is none (no basis, or n not public)."""
        if self.basis is None or not self.plans or config.neighboring != "replace_one":
            return None
        # Any plan is private at any epsilon (the noise is always set for the config); the nearest one is the most useful.
        entry = min(self.plans, key=lambda p: abs(math.log(p.epsilon / config.epsilon)))
        if entry.epsilon not in self._cache:
            self._cache[entry.epsilon] = sketch_plan(entry, self.basis, self.units)
        return self._cache[entry.epsilon]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Writes JSON + safetensors (float32/float64, no pickle); returns the folder."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for i, geometry in enumerate(self.geometries):
            tensors.update({f"geometry.{i}.{k}": v for k, v in geometry.tensors().items()})
        if self.basis is not None:
            for name in ("analysis", "synthesis", "mean_sums"):
                tensors.update({f"basis.{i}.{name}": t for i, t in enumerate(getattr(self.basis, name))})
        for i, entry in enumerate(self.plans):
            tensors.update({f"plan.{i}.{name}": getattr(entry, name) for name in PlanEntry.TENSORS})
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / _TENSORS)
        header = {
            "schema_version": SCHEMA_VERSION,
            "layers": list(self.layers),
            "scales": [g.scale for g in self.geometries],
            "settings": self.settings,
            "clip_norm": self.clip_norm,
            "contexts": self.contexts,
            "units": self.units,
            "has_basis": self.basis is not None,
            "plans": [{n: getattr(p, n) for n in PlanEntry.NUMBERS} for p in self.plans],
            "sha256": hashlib.sha256((folder / _TENSORS).read_bytes()).hexdigest(),
        }
        (folder / _JSON).write_text(json.dumps(header, indent=2, sort_keys=True) + "\n")
        return folder

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
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], **hub_kwargs: Any
    ) -> Calibration | AnchorCalibration:
        """Reads a folder or a Hub repository, of whichever mechanism; raises ConfigError on anything missing, unknown, damaged or of
        another schema."""
        folder = find_files(name_or_path, (_JSON, _TENSORS), error=ConfigError, **hub_kwargs)
        try:
            header = json.loads((folder / _JSON).read_text())
            payload = (folder / _TENSORS).read_bytes()
        except (OSError, ValueError) as error:
            raise ConfigError(f"No readable calibration in {folder}: {type(error).__name__}.") from None
        if isinstance(header, dict) and header.get("kind") == ANCHORS:
            return AnchorCalibration.from_folder(folder)
        if not isinstance(header, dict) or header.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(
                f"The calibration in {folder} has another schema version than {SCHEMA_VERSION}; upgrade or redo it."
            )
        if hashlib.sha256(payload).hexdigest() != header.get("sha256"):
            raise ConfigError(
                f"The calibration's tensors in {folder} do not match their checksum: damaged or truncated."
            )
        expected = {
            "schema_version",
            "layers",
            "scales",
            "settings",
            "clip_norm",
            "contexts",
            "units",
            "has_basis",
            "plans",
            "sha256",
        }
        if set(header) != expected:
            raise ConfigError(
                f"Unknown or missing keys in {folder / _JSON}: {sorted(set(header) ^ expected)}."
            )
        try:
            tensors = load_file(folder / _TENSORS)
            names = [f.name for f in dataclasses.fields(HeadGeometry) if f.name != "scale"]
            geometries = tuple(
                HeadGeometry(scale=scale, **{n: tensors[f"geometry.{i}.{n}"] for n in names})
                for i, scale in enumerate(header["scales"])
            )
            basis = None
            if header["has_basis"]:
                count = range(len(header["layers"]))
                basis = SketchBasis(
                    **{
                        n: tuple(tensors[f"basis.{i}.{n}"] for i in count)
                        for n in ("analysis", "synthesis", "mean_sums")
                    }
                )
            plans = tuple(
                PlanEntry.from_parts(numbers, {n: tensors[f"plan.{i}.{n}"] for n in PlanEntry.TENSORS})
                for i, numbers in enumerate(header["plans"])
            )
        except (KeyError, TypeError, SafetensorError) as error:
            raise ConfigError(
                f"The calibration in {folder} is incomplete or damaged ({type(error).__name__})."
            ) from None
        return cls(
            layers=tuple(header["layers"]),
            geometries=geometries,
            settings=header["settings"],
            clip_norm=header["clip_norm"],
            contexts=header["contexts"],
            units=header["units"],
            basis=basis,
            plans=plans,
        )
