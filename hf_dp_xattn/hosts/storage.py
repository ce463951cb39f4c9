"""Releases on disk: JSON for what a person reads, safetensors for the structures or rows. No pickle, no private row, no ledger name.

Both files have checksums, the JSON's own over its content: a changed digit of a guarantee is noticed. They guard against damage, not
against a publisher who lies.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..artefacts import (
    CardOptions,
    PushOptions,
    card_file,
    card_options,
    dump_document,
    push_with_card,
    read_document,
    seal,
    unseal,
    write_files,
)
from ..config import DPXAttnConfig
from ..errors import ConfigError, ReleaseError
from ..mechanisms.context_rows import ContextRows
from ..mechanisms.registry import FEATURES, STRUCTURES
from ..mechanisms.structure import AttentionStructure, KernelSumStructure
from ..report import Guarantee, PrivacyReport, release_entry
from .fingerprint import SIZE, Fingerprint
from .release import PUSH_MESSAGE
from .released import ReleasedContext
from .terms import Terms, read_terms

if TYPE_CHECKING:
    from .release import Release

JSON_NAME = "dp_xattn_release.json"
TENSORS_NAME = "dp_xattn_release.safetensors"
SCHEMA = "hf_dp_xattn.release/3"
COUNTING = (
    "hf_dp_xattn.release/2"  # its contexts state `charges`, which tell what was released before: left out
)
_KEYS = {"schema", "config", "host", "contexts", "tensors_sha256", "sha256"}
_CONTEXT_KEYS = {"rows", "kind", "guarantee", "guarantee_text", "structures", "fingerprint"}
# shapes: names of dimensions that must agree within a structure; its features fix r
_SHAPES = {
    "sums": (1, "H", "r", "dv + 1"),
    "floor": (1, "H", 1),
    "query_center": ("H", "d"),
    "query_map": ("H", "p", "d"),
    "query_radius": ("H",),
    "key_center": ("H", "d"),
    "value_center": ("H", "dv"),
}


def _damaged(what: str) -> ReleaseError:
    return ReleaseError(
        f"The release cannot be read ({what}); it is damaged, or of another version. Load it anew."
    )


def _check_keys(values: Any, known: set[str], where: str) -> None:
    if not isinstance(values, Mapping) or set(values) != known:
        odd = sorted(set(values) ^ known) if isinstance(values, Mapping) else "no object"
        raise _damaged(f"unknown or missing keys in {where}: {odd}")


def _structure_meta(structure: AttentionStructure) -> dict[str, Any]:
    if not isinstance(structure, KernelSumStructure):
        raise ReleaseError(
            f"{type(structure).__name__} cannot be saved: only released structures are written, and mechanism='none' holds private rows."
        )
    features: Any = structure.features
    kind = next(name for name, cls in STRUCTURES.items() if type(structure) is cls)
    feature_kind = next(name for name, cls in FEATURES.items() if isinstance(features, cls))
    return {"kind": kind, "features": {"kind": feature_kind, **asdict(features)}}


def _build_structure(
    meta: dict[str, Any], tensors: dict[str, torch.Tensor], heads: int, where: str
) -> AttentionStructure:
    _check_keys(meta, {"kind", "features"}, where)
    features = dict(meta["features"])
    kind = features.pop("kind", None)
    if meta["kind"] not in STRUCTURES or kind not in FEATURES:
        raise ReleaseError(
            f"Unknown structure {meta['kind']!r} or features {kind!r} in {where}; upgrade hf_dp_xattn."
        )
    _check_keys(features, {f.name for f in fields(FEATURES[kind])}, f"the features of {where}")
    if any(type(v) is not int or v < 0 for v in features.values()):
        raise _damaged(f"the features of {where}")
    map_ = FEATURES[kind](**features)
    if set(tensors) != {*_SHAPES, "table"}:
        raise _damaged(f"unknown or missing tensors in {where}")
    sizes: dict[str, int] = {"H": heads, "r": map_.size}
    sizes["dv + 1"] = tensors["value_center"].shape[-1] + 1
    for name, dims in _SHAPES.items():
        _check_shape(tensors[name], dims, sizes, f"{name} of {where}")
    if not bool(torch.isfinite(tensors["table"]).all()):
        raise _damaged(f"table of {where}")
    arguments: dict[str, Any] = {**tensors, "features": map_}
    return STRUCTURES[meta["kind"]](**arguments)


def _check_shape(
    tensor: torch.Tensor, dims: tuple[str | int, ...], sizes: dict[str, int], where: str
) -> None:
    """Finite floats of this shape; names that are not in `sizes` yet are bound to what is met."""
    fit = tensor.ndim == len(dims) and all(
        (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) == size
        for dim, size in zip(dims, tensor.shape, strict=False)
    )
    if not fit:
        raise _damaged(f"{where} has shape {list(tensor.shape)}")
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise _damaged(f"{where} holds NaN, or no floats")


@dataclass(frozen=True)
class ReleaseFile:
    """A release as its files hold it, without a host: to be reported, saved and pushed, not served."""

    contexts: tuple[ReleasedContext, ...]
    config: DPXAttnConfig
    terms: Terms

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def guarantees(self) -> tuple[Guarantee, ...]:
        return tuple(c.guarantee for c in self.contexts)

    def save_pretrained(self, directory: str, **card: Unpack[CardOptions]) -> Path:
        """See `Release.save_pretrained`."""
        return save_with_card(self, Path(directory), card)

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """See `Release.push_to_hub`."""
        return push_with_card(
            lambda folder, card: self.save_pretrained(folder, **card), repo_id, options, PUSH_MESSAGE
        )

    def report(self) -> PrivacyReport:
        """What is promised, in the words of the host that made it."""
        layers = self.contexts[0].fingerprint.layers
        return PrivacyReport(
            host=self.terms.host,
            layers=len(layers),
            heads=sum(heads for _, heads, _, _ in layers),
            config=self.config.to_dict(),
            releases=tuple(
                release_entry(f"context {i + 1}", c.guarantee) for i, c in enumerate(self.contexts)
            ),
            public=self.terms.public,
            not_covered=self.terms.not_covered,
            ledger="with whoever made the release",
            warnings=self.terms.warnings,
        )


def load_file(folder: Path) -> ReleaseFile:
    """Reads and checks the two files; raises ReleaseError as `load_release` does."""
    contexts, config, terms = load_release(folder)
    return ReleaseFile(tuple(contexts), config, terms)


def save_with_card(release: Release | ReleaseFile, folder: Path, card: CardOptions) -> Path:
    """Writes the files and the card; returns the folder. Raises ReleaseError, see `check_writable`, before anything is written."""
    from ..cards import release_card

    check_writable(release)
    text = release_card(release, card_options(card))
    save_release(release, folder)
    write_files(folder, card_file(folder, text))
    return folder


def check_writable(release: Release | ReleaseFile) -> None:
    """Raises ReleaseError for what must never be on disk: exact rows, and noise that whoever knows the seed can take off."""
    if not release.config.is_private:
        raise ReleaseError(
            "mechanism='none' keeps the private rows themselves; such a release is never written to disk."
        )
    if not all(c.guarantee.is_private for c in release.contexts):
        raise ReleaseError(
            "The noise of this release came from a seeded generator (for tests): who knows the seed reads the private rows. It is never "
            "written to disk. Protect without `entropy`, and make a new release."
        )


def save_release(release: Release | ReleaseFile, folder: Path) -> None:
    """Writes the two files. Raises ReleaseError, see `check_writable`, before anything is written."""
    check_writable(release)
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
    terms = release.terms
    document = {
        "schema": SCHEMA,
        "config": release.config.to_dict(),
        "host": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(terms).items()},
        "contexts": entries,
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
    }
    write_files(folder, {TENSORS_NAME: blob, JSON_NAME: dump_document(seal(document))})


def read_release_document(folder: Path) -> dict[str, Any]:
    """The JSON, whole and of this schema. Raises ReleaseError."""
    document = read_document(folder / JSON_NAME, ReleaseError)
    if document.get("schema") not in (SCHEMA, COUNTING):
        raise ReleaseError(
            f"This release has schema {document.get('schema')!r}, this package reads {SCHEMA!r}. Upgrade hf_dp_xattn, or save it anew."
        )
    _check_keys(document, _KEYS, JSON_NAME)
    return unseal(document, JSON_NAME, ReleaseError)


def load_release(folder: Path) -> tuple[list[ReleasedContext], DPXAttnConfig, Terms]:
    """Reads and checks the two files.

    Raises:
        ReleaseError: missing, damaged, truncated, of another schema, or of parts that do not fit each other.
    """
    document = read_release_document(folder)
    try:
        blob = (folder / TENSORS_NAME).read_bytes()
    except OSError as error:
        raise ReleaseError(
            f"{TENSORS_NAME} cannot be read ({type(error).__name__}); the release in {folder.name!r} is incomplete."
        ) from None
    if hashlib.sha256(blob).hexdigest() != document["tensors_sha256"]:
        raise ReleaseError(
            f"{TENSORS_NAME} does not have the checksum that {JSON_NAME} states: damaged, truncated, or of another release."
        )
    try:
        config = DPXAttnConfig.from_dict(document["config"])
        _check_keys(document["config"], set(config.to_dict()), "the config")
        _check_keys(document["host"], {f.name for f in fields(Terms)}, "the host")
        terms = read_terms(document["host"])
        tensors = load(blob)
        entries = document["contexts"]
        if document["schema"] == COUNTING:
            entries = [{k: v for k, v in entry.items() if k != "charges"} for entry in entries]
        contexts = [_read_context(i, entry, tensors) for i, entry in enumerate(entries)]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ReleaseError):
            raise
        why = f": {error}" if isinstance(error, ConfigError) else ""
        raise _damaged(type(error).__name__ + why) from None
    if not contexts or tensors:
        raise _damaged("no contexts" if not contexts else "unknown tensors")
    return contexts, config, terms


def _read_context(i: int, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> ReleasedContext:
    """Takes its own tensors out of `tensors`."""
    _check_keys(entry, _CONTEXT_KEYS, f"context {i}")
    _check_keys(entry["fingerprint"], {"layers", "dtype"}, f"the fingerprint of context {i}")
    layers = tuple((str(n), int(h), int(c), int(o)) for n, h, c, o in entry["fingerprint"]["layers"])
    if not layers or entry["kind"] not in ("layers", "context"):
        raise _damaged(f"context {i} is of no known kind, or for no layers")
    if len(entry["structures"]) != (len(layers) if entry["kind"] == "layers" else 0):
        raise ReleaseError("The release names other layers than it holds; it is damaged.")
    if type(entry["rows"]) is not int or entry["rows"] < 1:
        raise _damaged(f"rows of context {i}")
    structures = []
    for j, meta in enumerate(entry["structures"]):
        prefix = f"{i}.{j}."
        own = {n.removeprefix(prefix): tensors.pop(n) for n in sorted(tensors) if n.startswith(prefix)}
        structures.append(_build_structure(meta, own, layers[j][1], f"layer {j} of context {i}"))
    channels = layers[0][2]
    context = None
    if entry["kind"] == "context":
        rows, log_weights = tensors.pop(f"{i}.context.rows"), tensors.pop(f"{i}.context.log_weights")
        sizes: dict[str, int] = {"C": channels}
        _check_shape(rows, ("R", "C"), sizes, f"rows of context {i}")
        _check_shape(log_weights, ("R",), sizes, f"log weights of context {i}")
        if not len(rows):
            raise _damaged(f"context {i} has no rows")
        context = ContextRows(rows.to(torch.float32), log_weights.to(torch.float32))
    public_rows, sketch = tensors.pop(f"{i}.public_rows"), tensors.pop(f"{i}.fingerprint")
    _check_shape(public_rows, ("p", channels), {}, f"public rows of context {i}")
    _check_shape(sketch, (len(layers), 2, SIZE, SIZE), {}, f"fingerprint of context {i}")
    return ReleasedContext(
        structures=tuple(structures),
        guarantee=_read_guarantee(entry, i),
        public_rows=public_rows,
        rows=entry["rows"],
        fingerprint=Fingerprint(layers, sketch, str(entry["fingerprint"]["dtype"])),
        context=context,
    )


def _read_guarantee(entry: dict[str, Any], i: int) -> Guarantee:
    """What is promised, by numbers and in words that agree."""
    values = entry["guarantee"]
    _check_keys(values, {*(f.name for f in fields(Guarantee)), "is_private"}, f"the guarantee of context {i}")
    guarantee = Guarantee.from_dict(values)
    numbers = (
        guarantee.epsilon,
        guarantee.delta,
        guarantee.clip_norm,
        guarantee.sensitivity,
        guarantee.sigma,
    )
    if not all(type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in numbers):
        raise _damaged(f"the numbers of the guarantee of context {i}")
    if guarantee.to_dict() != values or guarantee.sentence() != entry["guarantee_text"]:
        raise _damaged(f"the guarantee of context {i} contradicts itself")
    if not guarantee.is_private:
        raise ReleaseError("This release promises nothing (no noise, or seeded noise): it is not loaded.")
    return guarantee
