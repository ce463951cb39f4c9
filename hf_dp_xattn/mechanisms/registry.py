"""How each mechanism is made, and what storage must know of it. A new one: a folder, a line in `known_mechanisms.py`, an entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..known_mechanisms import KNOWN
from .anchors.anchors import NO_CALIBRATION, PreparedAnchors
from .base import LayerSpec, Mechanism
from .dptree.dptree import prepare_dptree
from .dptree.tree_structure import DistanceFeatures, DPTreeStructure
from .exact import prepare_exact
from .inputs import LayerRows
from .kernel_sum.features import PositiveRandomFeatures, TaylorFeatures
from .kernel_sum.kernel_sum import prepare_kernel_sum
from .library.library import NO_LIBRARY, PreparedLibrary
from .structure import KernelSumStructure

Prepare = Callable[[DPXAttnConfig, Sequence[LayerSpec], Any], Mechanism[Any]]


@dataclass(frozen=True)
class Registration:
    """One mechanism.

    prepare: from (config, the layers' shapes, a calibration or None), all public.
    structures, features: what storage writes and reads, by the name in the file.
    """

    prepare: Prepare
    structures: Mapping[str, type[KernelSumStructure]] = field(default_factory=dict)
    features: Mapping[str, Any] = field(default_factory=dict)


def _prepare_anchors(config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: Any) -> PreparedAnchors:
    """The calibration holds the plans and decoders; no layer takes part."""
    if calibration is None:
        raise ConfigError(NO_CALIBRATION)
    prepared: PreparedAnchors = calibration.prepare(config)
    return prepared


def _prepare_library(config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: Any) -> PreparedLibrary:
    """The library holds the texts and plans; no layer takes part."""
    if calibration is None:
        raise ConfigError(NO_LIBRARY)
    prepared: PreparedLibrary = calibration.prepare(config)
    return prepared


REGISTRY: dict[str, Registration] = {
    "anchors": Registration(_prepare_anchors),
    "dptree": Registration(prepare_dptree, {"dptree": DPTreeStructure}, {"distance": DistanceFeatures}),
    "kernel_sum": Registration(
        prepare_kernel_sum,
        {"kernel_sum": KernelSumStructure},
        {"positive_random": PositiveRandomFeatures, "taylor": TaylorFeatures},
    ),
    "library": Registration(_prepare_library),
    "none": Registration(prepare_exact),
}
STRUCTURES: dict[str, type[KernelSumStructure]] = {
    k: v for r in REGISTRY.values() for k, v in r.structures.items()
}
FEATURES: dict[str, Any] = {k: v for r in REGISTRY.values() for k, v in r.features.items()}


def prepare_release(
    config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: Any = None
) -> Mechanism[LayerRows]:
    """Decides everything public about a joint release of keys and values over the layers `specs`.

    Raises:
        ConfigError: the calibration does not fit the layers, unit or features, or the mechanism releases something else.
    """
    if not specs:
        raise ConfigError("A release needs at least one layer.")
    of_layers = sorted(name for name, known in KNOWN.items() if known.releases == "layers")
    if config.mechanism not in of_layers:
        raise ConfigError(
            f"mechanism={config.mechanism!r} does not release keys and values; choose one of {', '.join(of_layers)}."
        )
    return REGISTRY[config.mechanism].prepare(config, specs, calibration)
