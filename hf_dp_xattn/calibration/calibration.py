"""`Calibration`: everything data-dependent that was computed from PUBLIC contexts only. Saved as safetensors + JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Unpack

from ..artefacts import HubOptions, locate
from ..artefacts.card import table
from ..artefacts.codec import Tensors
from ..config import FEATURES, DPXAttnConfig
from ..errors import ConfigError
from ..mechanisms.base import LayerSpec
from ..mechanisms.inputs import MAX_ROWS
from ..mechanisms.kernel_sum.geometry import HeadGeometry
from ..mechanisms.kernel_sum.sketch import SketchBasis, SketchPlan
from .calibration_card import Described
from .kernel_checks import verify_basis, verify_geometry, verify_norm, verify_plan
from .kinds import load_calibration
from .plan_entry import PlanEntry, sketch_plan
from .stored import CHECKS, CODEC, Stored

# A calibration is made for these fields of the config; epsilon may differ (the nearest plan is used).
BOUND_FIELDS = ("features", "degree", "num_features", "feature_seed", "logit_bound", "unit")


_FIELDS = ("clip_norm", "contexts", "units", "settings")
_GEOMETRY = tuple(f.name for f in fields(HeadGeometry) if f.name != "scale")
_BASIS = tuple(f.name for f in fields(SketchBasis))


@dataclass(frozen=True, repr=False)
class Calibration(Stored):
    """Public geometry, clipping bound, sketch basis and plans for one model's layers (`kernel_sum`). Made by `dpx.calibrate`.

    Nothing in here may depend on a private context: it is not noised and is not counted.

    Args:
        layers: their names.
        geometries: public maps and bounds of each layer's heads.
        settings: the config's fields that it was made for (`BOUND_FIELDS`).
        clip_norm: clipping bound of one unit's contribution.
        contexts: public ones that it was fitted to.
        units: in one context.
        basis: directions in which the sums vary; None: everything is released.
        plans: what is released at each epsilon, where there is a basis.

    Example:
        >>> dpx.Calibration.from_pretrained("no/such/folder")
        Traceback (most recent call last):
        hf_dp_xattn.errors.ConfigError: ...
    """

    mechanism = "kernel_sum"
    KEYS = frozenset({"layers", "scales", "has_basis", "plans", *_FIELDS})

    layers: tuple[str, ...]
    geometries: tuple[HeadGeometry, ...]
    settings: dict[str, Any]
    clip_norm: float
    contexts: int
    units: int
    basis: SketchBasis | None = None
    plans: tuple[PlanEntry, ...] = ()
    _cache: dict[float, SketchPlan] = field(default_factory=dict, repr=False, compare=False)

    @property
    def unit(self) -> str:
        """What it was made for."""
        return str(self.settings["unit"])

    def config_fields(self) -> dict[str, Any]:
        return {"mechanism": self.mechanism, **self.settings}  # it serves both relations

    def check(self, config: DPXAttnConfig, specs: Sequence[LayerSpec]) -> None:
        """Whether it serves this host under this config.

        Args:
            config: what a release promises.
            specs: shapes of the host's layers.

        Raises:
            ConfigError: a number is out of its range, or it was made for other layers or settings.
        """
        self.verify()  # it need not come from a file
        self.check_settings(config, self.settings)
        shapes = [(s.name, s.heads, s.key_dim, s.value_dim) for s in specs]
        fitted = [
            (n, g.heads, g.key_dim, g.value_dim) for n, g in zip(self.layers, self.geometries, strict=True)
        ]
        if shapes != fitted:
            raise ConfigError(
                "The calibration is for another model: layer names or shapes differ. Calibrate for this one."
            )

    def plan(self, config: DPXAttnConfig) -> SketchPlan | None:
        """The sketch to release, or None where there is none (no basis, or n not public).

        Args:
            config: at its epsilon.
        """
        if self.basis is None or not self.plans or config.neighboring != "replace_one":
            return None
        # Any plan is private at any epsilon (the noise is always set for the config); the nearest one is the most useful.
        entry = min(self.plans, key=lambda p: abs(math.log(p.epsilon / config.epsilon)))
        if entry.epsilon not in self._cache:
            self._cache[entry.epsilon] = sketch_plan(entry, self.basis, self.units)
        return self._cache[entry.epsilon]

    def header(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "scales": [g.scale for g in self.geometries],
            **{name: getattr(self, name) for name in _FIELDS},
            "has_basis": self.basis is not None,
            "plans": [{n: getattr(p, n) for n in p.NUMBERS} for p in self.plans],
        }

    def tensors(self) -> Tensors:
        tensors: Tensors = {}
        for i, geometry in enumerate(self.geometries):
            tensors |= {f"geometry.{i}.{k}": v for k, v in geometry.tensors().items()}
        if self.basis is not None:
            for name in _BASIS:
                tensors |= {f"basis.{i}.{name}": t for i, t in enumerate(getattr(self.basis, name))}
        for i, entry in enumerate(self.plans):
            tensors |= {f"plan.{i}.{name}": getattr(entry, name) for name in entry.TENSORS}
        return tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Tensors) -> Calibration:
        layers = tuple(str(name) for name in header["layers"])
        geometries = tuple(
            HeadGeometry(
                scale=CHECKS.number(scale, "a layer's scale", low=0.0),
                **{n: tensors[f"geometry.{i}.{n}"] for n in _GEOMETRY},
            )
            for i, scale in enumerate(header["scales"])
        )
        basis = None
        if header["has_basis"]:
            parts: dict[str, Any] = {
                n: tuple(tensors[f"basis.{i}.{n}"] for i in range(len(layers))) for n in _BASIS
            }
            basis = SketchBasis(**parts)
        plans = tuple(_read_plan(i, numbers, tensors) for i, numbers in enumerate(header["plans"]))
        return cls(
            layers=layers, geometries=geometries, basis=basis, plans=plans, **{n: header[n] for n in _FIELDS}
        )

    def verify(self) -> None:
        CHECKS.keys(self.settings, set(BOUND_FIELDS), "the settings of the calibration")
        DPXAttnConfig(**self.settings)  # each in its range
        if self.settings["features"] not in FEATURES:
            CHECKS.refuse("features")
        verify_norm(self.clip_norm, "clip_norm")
        CHECKS.integer(self.contexts, "contexts")
        CHECKS.integer(self.units, "units", high=MAX_ROWS)
        if not self.layers or len(self.layers) != len(self.geometries):
            CHECKS.refuse("its layers")
        for name, g in zip(self.layers, self.geometries, strict=True):
            verify_geometry(name, g)
        if self.basis is None and self.plans:
            CHECKS.refuse("plans without a basis")
        rank = verify_basis(self.basis, self.geometries) if self.basis is not None else 0
        for plan in self.plans:
            verify_plan(plan, rank)

    def described(self) -> Described:
        fvu = [(f"{p.epsilon:g}", f"{p.predicted_fvu:.3f}") for p in self.plans]
        return Described(
            mechanism=self.mechanism,
            unit=self.settings["unit"],
            neighboring="replace_one",
            contexts=self.contexts,
            units=self.units,
            layers=len(self.layers),
            settings=self.settings,
            utility=f"Predicted on public contexts (FVU):\n\n{table(('epsilon', 'FVU'), fvu)}"
            if fvu
            else None,
        )

    @classmethod
    def from_pretrained(  # the door to all kinds
        cls, name_or_path: str | os.PathLike[str], **options: Unpack[HubOptions]
    ) -> Any:
        """Reads a folder or a Hub repository, of whichever mechanism.

        Args:
            name_or_path: folder or Hub id.
            options: revision, token, subfolder, ... (`artefacts.HubOptions`).

        Raises:
            ConfigError: missing, unknown, damaged or of another schema.
        """
        return load_calibration(locate(name_or_path, CODEC.names, error=ConfigError, **options).folder)


def _read_plan(i: int, numbers: Mapping[str, Any], tensors: Tensors) -> PlanEntry:
    CHECKS.keys(numbers, set(PlanEntry.NUMBERS), f"plan {i}")
    return PlanEntry(**numbers, **{n: tensors[f"plan.{i}.{n}"] for n in PlanEntry.TENSORS})  # type: ignore[arg-type]
