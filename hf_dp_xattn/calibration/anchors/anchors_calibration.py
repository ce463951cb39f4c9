"""`AnchorCalibration`: public encoder, codebooks, priors and decoders of `anchors`, one plan per epsilon. safetensors + JSON."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from ...artefacts import HubOptions, find_files
from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.anchors import PreparedAnchors, prepare_anchors
from ...mechanisms.anchors.plan import AnchorPlan, Decoders
from ..stored import JSON_NAME, TENSORS_NAME, Shared
from .files import KIND, load_anchors, rounded, save_anchors
from .verify import GROUPINGS, verify_anchors

if TYPE_CHECKING:
    pass

__all__ = [
    "GROUPINGS",
    "JSON_NAME",
    "KIND",
    "TENSORS_NAME",
    "AnchorCalibration",
    "HostIdentity",
    "ScorePoint",
]


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
class AnchorCalibration(Shared):
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

    def _write(self, folder: Path) -> None:
        save_anchors(self, folder)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], **options: Unpack[HubOptions]
    ) -> AnchorCalibration:
        """Reads a folder or a Hub repository (`HubOptions`); raises ConfigError on anything missing, unknown, damaged or of another
        schema."""
        return load_anchors(find_files(name_or_path, (JSON_NAME, TENSORS_NAME), error=ConfigError, **options))

    def rounded(self) -> AnchorCalibration:
        """The calibration as a file would give it back: large tensors in half precision."""
        return rounded(self)

    def verify(self) -> None:
        """Raises ConfigError for parts that do not fit each other: shapes, NaN, numbers out of range, unknown releases, cells that
        repeat."""
        verify_anchors(self)
