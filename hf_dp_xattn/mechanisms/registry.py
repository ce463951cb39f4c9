"""How each mechanism of `known_mechanisms.py` is made, and what storage must know of it, out of the mechanism's own module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..known_mechanisms import KNOWN, KnownMechanism
from .base import LayerSpec, Mechanism
from .inputs import LayerRows
from .structure import KernelSumStructure

Prepare = Callable[[DPXAttnConfig, Sequence[LayerSpec], Any], Mechanism[Any]]


@dataclass(frozen=True)
class Registration:
    """One mechanism.

    prepare: from (config, the layers' shapes, a calibration or None), all public.
    structures, features: what storage writes and reads, by the name in the file.
    """

    prepare: Prepare
    structures: Mapping[str, type[KernelSumStructure]]
    features: Mapping[str, Any]


def _registration(known: KnownMechanism) -> Registration:
    module = import_module(f".{known.module}", __package__)
    return Registration(module.prepare, getattr(module, "STRUCTURES", {}), getattr(module, "FEATURES", {}))


REGISTRY = {name: _registration(known) for name, known in KNOWN.items()}
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
