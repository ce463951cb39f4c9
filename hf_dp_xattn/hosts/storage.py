"""Releases on disk: JSON for what a person reads, safetensors for the structures or rows. No pickle, no private row, no ledger name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..config import DPXAttnConfig
from ..errors import ConfigError, ReleaseError
from ..mechanisms.anchors.rows import ContextRows
from ..mechanisms.dptree.structure import DistanceFeatures, DPTreeStructure
from ..mechanisms.features import PositiveRandomFeatures, TaylorFeatures
from ..mechanisms.structure import AttentionStructure, KernelSumStructure
from ..report import Guarantee
from .fingerprint import Fingerprint
from .release import ReleasedContext

if TYPE_CHECKING:
    from .release import Release

JSON_NAME = "dp_xattn_release.json"
TENSORS_NAME = "dp_xattn_release.safetensors"
SCHEMA = "hf_dp_xattn.release/1"
_FEATURES: dict[str, Any] = {
    "distance": DistanceFeatures,
    "positive_random": PositiveRandomFeatures,
    "taylor": TaylorFeatures,
}
_STRUCTURES: dict[str, type[KernelSumStructure]] = {
    "dptree": DPTreeStructure,
    "kernel_sum": KernelSumStructure,
}


def _structure_meta(structure: AttentionStructure) -> dict[str, Any]:
    if not isinstance(structure, KernelSumStructure):
        raise ReleaseError(
            f"{type(structure).__name__} cannot be saved: only released structures are written, and mechanism='none' holds private rows."
        )
    features: Any = structure.features
    kind = next(name for name, cls in _STRUCTURES.items() if type(structure) is cls)
    feature_kind = next(name for name, cls in _FEATURES.items() if isinstance(features, cls))
    return {"kind": kind, "features": {"kind": feature_kind, **asdict(features)}}


def _build_structure(meta: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AttentionStructure:
    if meta["kind"] not in _STRUCTURES:
        raise ReleaseError(f"Unknown structure {meta['kind']!r}; upgrade hf_dp_xattn.")
    features = dict(meta["features"])
    arguments: dict[str, Any] = {**tensors, "features": _FEATURES[features.pop("kind")](**features)}
    return _STRUCTURES[meta["kind"]](**arguments)


def save_release(release: Release, folder: Path) -> Path:
    """Writes the two files; returns the folder. Raises ReleaseError for mechanism "none" before anything is written."""
    if not release.config.is_private:
        raise ReleaseError(
            "mechanism='none' keeps the private rows themselves; such a release is never written to disk."
        )
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for i, context in enumerate(release.contexts):
        tensors[f"{i}.public_rows"] = context.public_rows
        tensors[f"{i}.fingerprint"] = context.fingerprint.sketch
        for j, structure in enumerate(context.structures):
            tensors |= {f"{i}.{j}.{name}": t for name, t in structure.tensors().items()}
        if context.context is not None:
            tensors[f"{i}.context.rows"] = context.context.rows
            tensors[f"{i}.context.log_weights"] = context.context.log_weights
        entries.append(
            {
                "rows": context.rows,
                "kind": "layers" if context.context is None else "context",
                "guarantee": context.guarantee.to_dict(),
                "guarantee_text": context.guarantee.sentence(),
                "structures": [_structure_meta(s) for s in context.structures],
                "fingerprint": {
                    "layers": [list(x) for x in context.fingerprint.layers],
                    "dtype": context.fingerprint.dtype,
                },
            }
        )
    blob = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    document = {
        "schema": SCHEMA,
        "config": release.config.to_dict(),
        "contexts": entries,
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS_NAME).write_bytes(blob)
    (folder / JSON_NAME).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    return folder


def load_release(folder: Path) -> tuple[list[ReleasedContext], DPXAttnConfig]:
    """Reads and checks the two files.

    Raises:
        ReleaseError: missing, damaged, truncated, or of another schema.
    """
    for name in (JSON_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            raise ReleaseError(f"No {name} in {folder.name!r}: not a release, or incomplete.")
    blob = (folder / TENSORS_NAME).read_bytes()
    try:
        document = json.loads((folder / JSON_NAME).read_text())
        schema = document["schema"]
    except (ValueError, KeyError, TypeError):
        raise ReleaseError(f"{JSON_NAME} is damaged or truncated.") from None
    if schema != SCHEMA:
        raise ReleaseError(
            f"This release has schema {schema!r}, this package reads {SCHEMA!r}. Upgrade hf_dp_xattn."
        )
    try:
        if hashlib.sha256(blob).hexdigest() != document["tensors_sha256"]:
            raise ReleaseError(
                f"{TENSORS_NAME} does not have the checksum that {JSON_NAME} states: damaged or truncated."
            )
        config = DPXAttnConfig.from_dict(document["config"])
        tensors = load(blob)
        return [_read_context(i, entry, tensors) for i, entry in enumerate(document["contexts"])], config
    except (KeyError, TypeError, ValueError, SafetensorError, ConfigError) as error:
        if isinstance(error, ReleaseError):
            raise
        raise ReleaseError(f"The release cannot be read ({type(error).__name__}); it is damaged.") from None


def _read_context(i: int, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> ReleasedContext:
    structures = []
    for j, meta in enumerate(entry["structures"]):
        prefix = f"{i}.{j}."
        structures.append(
            _build_structure(
                meta, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            )
        )
    layers = tuple((str(n), int(h), int(c), int(o)) for n, h, c, o in entry["fingerprint"]["layers"])
    context = _read_rows(i, tensors, layers[0][2]) if entry.get("kind") == "context" else None
    if len(structures) != (len(layers) if context is None else 0):
        raise ReleaseError("The release names other layers than it holds; it is damaged.")
    return ReleasedContext(
        structures=tuple(structures),
        guarantee=Guarantee.from_dict(entry["guarantee"]),
        public_rows=tensors[f"{i}.public_rows"],
        rows=int(entry["rows"]),
        fingerprint=Fingerprint(layers, tensors[f"{i}.fingerprint"], str(entry["fingerprint"]["dtype"])),
        context=context,
    )


def _read_rows(i: int, tensors: dict[str, torch.Tensor], channels: int) -> ContextRows:
    rows, log_weights = tensors[f"{i}.context.rows"], tensors[f"{i}.context.log_weights"]
    fit = (
        rows.ndim == 2 and rows.shape[1] == channels and log_weights.shape == rows.shape[:1] and len(rows) > 0
    )
    if not fit or not bool(torch.isfinite(rows).all() and torch.isfinite(log_weights).all()):
        raise ReleaseError(
            "The release's rows and weights do not fit each other, or hold NaN; it is damaged."
        )
    return ContextRows(rows.to(torch.float32), log_weights.to(torch.float32))
