"""How a host makes its releases: one maker per kind of release, chosen at `protect`. Serving them is another matter (`tables.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.anchors.anchors_calibration import AnchorCalibration
from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..known_mechanisms import KNOWN
from ..mechanisms.anchors.anchors import NO_CALIBRATION
from ..mechanisms.base import Mechanism, Released
from ..mechanisms.inputs import LayerRows, Private
from ..mechanisms.kernel_sum.contributions import unit_rows
from ..mechanisms.registry import prepare_release
from ..privacy.accountant import Event
from ..privacy.bits import Entropy
from .accounts import Settings
from .fingerprint import Fingerprint
from .identity import OTHER_PROJECTIONS, ReadsText, check_layers, check_text, fingerprint_of
from .layer import Layer, in_range, project_apart
from .private_run import private_run

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration


@dataclass(frozen=True)
class Recipe(ABC):
    """A release of which everything public is fixed; `events` must be charged before `run` touches the context."""

    prepared: Mechanism[Any]

    @property
    def events(self) -> tuple[Event, ...]:
        return self.prepared.events

    @abstractmethod
    def private(self, rows: torch.Tensor, groups: torch.Tensor | None) -> Private:
        """Finite private rows [n, C] (or what an encoder made of such) as the mechanism takes them; groups [n]: public. The only way in;
        never raises for what the rows hold."""

    def run(self, rows: torch.Tensor, groups: torch.Tensor | None, entropy: Entropy | None) -> Released:
        """rows [n, C]: private; groups [n]: public."""
        return self.prepared.run(self.private(rows, groups), groups=groups, entropy=entropy)


class Maker(ABC):
    """Makes the releases of one handle."""

    @abstractmethod
    def prepare(self, current: Fingerprint) -> Recipe:
        """Public constants of a release for the weights as they are now. Raises ConfigError where none can be made."""

    def check_text(self, text: ReadsText) -> None:
        """Raises ConfigError where the calibration's rows came from another text encoder."""
        return

    def warnings(self, current: Fingerprint) -> tuple[str, ...]:
        """Of what is made now."""
        return ()


@dataclass(frozen=True)
class LayerRecipe(Recipe):
    """Keys and values of all layers are released together."""

    prepared: Mechanism[LayerRows]
    layers: tuple[Layer, ...]
    dtype: torch.dtype

    def private(self, rows: torch.Tensor, groups: torch.Tensor | None) -> LayerRows:
        """Keys and values [H, n, d] of every layer, of rows [n, C].

        A matrix product may round a row in another way where there are more, fewer or other rows beside it, and nothing would bound that
        change of all other units' contributions: each unit is projected by itself.
        """
        rows = in_range(rows, self.dtype)
        if self.prepared.config.mechanism == "none":  # nothing is summed
            units = [torch.arange(len(rows))]
        else:
            units = unit_rows(self.prepared.config.unit, len(rows), groups)
        with private_run(*(part for layer in self.layers for part in layer.parts())):
            pairs = [project_apart(layer, rows, units) for layer in self.layers]
        return LayerRows([in_range(k, k.dtype) for k, _ in pairs], [in_range(v, v.dtype) for _, v in pairs])


class LayerMaker(Maker):
    """Releases of keys and values: made for the weights as they are, prepared anew when those change."""

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, Layer],
        config: DPXAttnConfig,
        calibration: Calibration | None,
        current: Fingerprint,
    ) -> None:
        self._model, self._layers, self._config, self._calibration = model, layers, config, calibration
        self._prepared = current, self._recipe()

    def _recipe(self) -> LayerRecipe:
        dtype = self._model.dtype
        prepared = prepare_release(
            self._config, [layer.spec(dtype) for layer in self._layers.values()], self._calibration
        )
        return LayerRecipe(prepared, tuple(self._layers.values()), dtype)

    def prepare(self, current: Fingerprint) -> LayerRecipe:
        before, recipe = self._prepared
        if recipe.dtype != self._model.dtype or before.difference(current) is not None:
            recipe = self._recipe()
            self._prepared = current, recipe
        return recipe

    def warnings(self, current: Fingerprint) -> tuple[str, ...]:
        return self._prepared[1].prepared.warnings


@dataclass(frozen=True)
class ContextRecipe(Recipe):
    """The rows themselves are released, once for all layers; no weight of the host takes part."""

    prepared: Mechanism[torch.Tensor]

    def private(self, rows: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
        return in_range(rows, torch.float32)


class ContextMaker(Maker):
    """Releases in context space (`anchors`)."""

    def __init__(
        self, config: DPXAttnConfig, calibration: AnchorCalibration, channels: int, current: Fingerprint
    ) -> None:
        calibration.check(config, channels)
        check_layers(calibration, current)
        self._calibration = calibration
        self._recipe = ContextRecipe(calibration.prepare(config))

    def prepare(self, current: Fingerprint) -> ContextRecipe:
        return self._recipe

    def check_text(self, text: ReadsText) -> None:
        check_text(self._calibration, text)

    def warnings(self, current: Fingerprint) -> tuple[str, ...]:
        moved = fingerprint_of(self._calibration.host).difference(current) is not None
        return (*self._recipe.prepared.warnings, *([OTHER_PROJECTIONS] if moved else []))


class ServingOnly(Maker):
    """No calibration is at hand: releases that were made elsewhere are served, none is made."""

    def prepare(self, current: Fingerprint) -> Recipe:
        raise ConfigError(NO_CALIBRATION)


def choose_maker(model: Any, layers: Mapping[str, Layer], settings: Settings, current: Fingerprint) -> Maker:
    """The maker for `config.mechanism`. Raises ConfigError where the calibration is missing, or for something else."""
    config = settings.config
    calibration: Any = settings.calibration
    releases = KNOWN[config.mechanism].releases
    if calibration is not None and KNOWN[calibration.mechanism].releases != releases:
        raise ConfigError(
            f"This calibration is for mechanism={calibration.mechanism!r}, the config says {config.mechanism!r}: change the config, or "
            "calibrate for it (dpx.calibrate(pipe, public_contexts, config))."
        )
    if releases == "texts":
        raise ConfigError("mechanism='library' releases texts, which are not served by patched layers.")
    if releases == "layers":
        return LayerMaker(model, layers, config, calibration, current)
    if calibration is None and settings.serving_only:
        return ServingOnly()
    if calibration is None:
        raise ConfigError(NO_CALIBRATION)
    channels = next(iter(layers.values())).channels
    return ContextMaker(config, calibration, channels, current)
