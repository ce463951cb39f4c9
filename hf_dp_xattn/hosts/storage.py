"""Releases on disk: the guarantee, config, terms and shapes as JSON, the structures or rows as safetensors.

No private row, no name of the ledger's. What is read is checked part by part, and what a release promises in numbers and in words agrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from ..artefacts import CardOptions
from ..artefacts.checks import Checks
from ..artefacts.codec import Codec, Encoded, Tensors
from ..config import DPXAttnConfig
from ..errors import ReleaseError
from ..known_mechanisms import KNOWN
from ..mechanisms.context_rows import ContextRows
from ..mechanisms.inputs import MAX_ROWS
from ..mechanisms.registry import FEATURES, STRUCTURES
from ..mechanisms.structure import AttentionStructure, KernelSumStructure
from ..report import Guarantee, PrivacyReport, release_entry
from .fingerprint import SIZE, Fingerprint
from .release_card import release_card
from .released import ReleasedContext
from .terms import Terms

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

SCHEMA = "hf_dp_xattn.release/3"
COUNTING = (
    "hf_dp_xattn.release/2"  # its contexts state `charges`, which tell what was released before: left out
)
CHECKS = Checks("release", ReleaseError, "save it anew")
CODEC = Codec(CHECKS, "dp_xattn_release", SCHEMA, older=(COUNTING,))
JSON_NAME, TENSORS_NAME = CODEC.names
_CONTEXT_KEYS = {"rows", "kind", "guarantee", "guarantee_text", "structures", "fingerprint"}
# shapes: names of dimensions that must agree within a structure; its features fix r
_SHAPES: dict[str, tuple[str | int, ...]] = {
    "sums": (1, "H", "r", "dv + 1"),
    "floor": (1, "H", 1),
    "query_center": ("H", "d"),
    "query_map": ("H", "p", "d"),
    "query_radius": ("H",),
    "key_center": ("H", "d"),
    "value_center": ("H", "dv"),
}


@dataclass(frozen=True, eq=False)
class ReleaseFile(Encoded):
    """A release as its files hold it, without a host: to be reported, saved and pushed, not served."""

    WORD = CHECKS.word
    CODEC = CODEC
    KEYS = frozenset({"config", "host", "contexts"})

    contexts: tuple[ReleasedContext, ...]
    config: DPXAttnConfig
    terms: Terms

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def guarantees(self) -> tuple[Guarantee, ...]:
        return tuple(c.guarantee for c in self.contexts)

    def files(self) -> dict[str, bytes]:
        """Raises ReleaseError for what must never be on disk: exact rows, and noise that whoever knows the seed can take off."""
        if not self.config.is_private:
            raise ReleaseError(
                "mechanism='none' keeps the private rows themselves; such a release is never written to disk."
            )
        if not all(g.is_private for g in self.guarantees):
            raise ReleaseError(
                "The noise of this release came from a seeded generator (for tests): who knows the seed reads the private rows. It is "
                "never written to disk. Protect without `entropy`, and make a new release."
            )
        return super().files()

    def header(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "host": asdict(self.terms),
            "contexts": [context_header(c) for c in self.contexts],
        }

    def tensors(self) -> Tensors:
        return {
            f"{i}.{name}": tensor
            for i, context in enumerate(self.contexts)
            for name, tensor in context_tensors(context).items()
        }

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Tensors) -> ReleaseFile:
        config = DPXAttnConfig.from_dict(header["config"])
        CHECKS.keys(header["config"], set(config.to_dict()), "the config")
        entries = header["contexts"]
        if header["schema"] == COUNTING:
            entries = [{k: v for k, v in entry.items() if k != "charges"} for entry in entries]
        contexts = tuple(read_context(i, entry, _part(tensors, i)) for i, entry in enumerate(entries))
        return cls(contexts, config, read_terms(header["host"]))

    def verify(self) -> None:
        if not self.contexts:
            CHECKS.refuse("no contexts")
        for guarantee in self.guarantees:
            check_promise(guarantee, self.config)

    def card(self, options: CardOptions) -> ModelCard:
        return release_card(self.contexts, self.config.mechanism, self.terms, options)

    def report(self) -> PrivacyReport:
        """What is promised, in the words of the host that made it."""
        layers = self.contexts[0].fingerprint.layers
        entries = [release_entry(f"context {i + 1}", c.guarantee) for i, c in enumerate(self.contexts)]
        heads = sum(heads for _, heads, _, _ in layers)
        return self.terms.report(self.config.to_dict(), entries, layers=len(layers), heads=heads)


def read_terms(header: Mapping[str, Any]) -> Terms:
    """What a file says of the host that made the release."""
    CHECKS.keys(header, {f.name for f in fields(Terms)}, "the host")
    base = header["base_model"]
    return Terms(
        host=CHECKS.name(header["host"], "the class of the host"),
        base_model=None if base is None else CHECKS.name(base, "the base model"),
        public=CHECKS.texts(header["public"], "what is public"),
        not_covered=CHECKS.texts(header["not_covered"], "what is not covered"),
        warnings=CHECKS.texts(header["warnings"], "its warnings"),
    )


def _part(tensors: Tensors, number: int) -> Tensors:
    """Those whose names start with a number, by the rest of their names."""
    prefix = f"{number}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def context_header(context: ReleasedContext) -> dict[str, Any]:
    """What the JSON says of one context."""
    return {
        "rows": context.rows,
        "kind": "layers" if context.context is None else "context",
        "guarantee": context.guarantee.to_dict(),
        "guarantee_text": context.guarantee.sentence(),
        "structures": [_structure_header(s) for s in context.structures],
        "fingerprint": {
            "layers": [list(x) for x in context.fingerprint.layers],
            "dtype": context.fingerprint.dtype,
        },
    }


def context_tensors(context: ReleasedContext) -> Tensors:
    """All tensors of one context, by name."""
    tensors = {"public_rows": context.public_rows, "fingerprint": context.fingerprint.sketch}
    for i, structure in enumerate(context.structures):
        tensors |= {f"{i}.{name}": tensor for name, tensor in structure.tensors().items()}
    if context.context is not None:
        tensors["context.rows"] = context.context.rows
        tensors["context.log_weights"] = context.context.log_weights
    return tensors


def _structure_header(structure: AttentionStructure) -> dict[str, Any]:
    if not isinstance(structure, KernelSumStructure):
        raise ReleaseError(
            f"{type(structure).__name__} cannot be saved: only released structures are written, and mechanism='none' holds private rows."
        )
    features: Any = structure.features
    kind = next(name for name, cls in STRUCTURES.items() if type(structure) is cls)
    feature_kind = next(name for name, cls in FEATURES.items() if isinstance(features, cls))
    return {"kind": kind, "features": {"kind": feature_kind, **asdict(features)}}


def _read_structure(
    header: Mapping[str, Any], tensors: Tensors, heads: int, where: str
) -> AttentionStructure:
    CHECKS.keys(header, {"kind", "features"}, where)
    features = dict(header["features"])
    kind = features.pop("kind", None)
    if header["kind"] not in STRUCTURES or kind not in FEATURES:
        raise ReleaseError(
            f"Unknown structure {header['kind']!r} or features {kind!r} in {where}; upgrade hf_dp_xattn."
        )
    CHECKS.keys(features, {f.name for f in fields(FEATURES[kind])}, f"the features of {where}")
    for name, value in features.items():
        CHECKS.integer(value, f"{name} of the features of {where}", low=0)
    features = FEATURES[kind](**features)
    CHECKS.keys(tensors, {*_SHAPES, "table"}, f"the tensors of {where}")
    channels = {"dv + 1": tensors["value_center"].shape[-1] + 1}
    sizes = CHECKS.sizes(H=heads, r=features.size, **channels)
    for name, dims in _SHAPES.items():
        sizes.fit(f"{name} of {where}", tensors[name], *dims, floats=True)
    if not bool(torch.isfinite(tensors["table"]).all()):
        CHECKS.refuse(f"table of {where}")
    arguments: dict[str, Any] = {**tensors, "features": features}
    return STRUCTURES[header["kind"]](**arguments)


def read_context(i: int, header: Mapping[str, Any], tensors: Tensors) -> ReleasedContext:
    """Of `context_header` and `context_tensors`. Raises ReleaseError, or what an odd part makes it raise. i: its number in a message."""
    where = f"context {i}"
    CHECKS.keys(header, _CONTEXT_KEYS, where)
    CHECKS.keys(header["fingerprint"], {"layers", "dtype"}, f"the fingerprint of {where}")
    layers = tuple((str(n), int(h), int(c), int(o)) for n, h, c, o in header["fingerprint"]["layers"])
    if not layers or header["kind"] not in ("layers", "context"):
        CHECKS.refuse(f"{where} is of no known kind, or for no layers")
    if len(header["structures"]) != (len(layers) if header["kind"] == "layers" else 0):
        raise ReleaseError("The release names other layers than it holds; it is damaged.")
    structures = tuple(
        _read_structure(structure, _part(tensors, j), layers[j][1], f"layer {j} of {where}")
        for j, structure in enumerate(header["structures"])
    )
    sizes = CHECKS.sizes(C=layers[0][2])
    context = None
    if header["kind"] == "context":
        rows, log_weights = tensors["context.rows"], tensors["context.log_weights"]
        sizes.fit(f"rows of {where}", rows, "R", "C", floats=True)
        sizes.fit(f"log weights of {where}", log_weights, "R", floats=True)
        if not len(rows):
            CHECKS.refuse(f"{where} has no rows")
        context = ContextRows(rows.to(torch.float32), log_weights.to(torch.float32))
    public_rows, sketch = tensors["public_rows"], tensors["fingerprint"]
    sizes.fit(f"public rows of {where}", public_rows, "p", "C", floats=True)
    sizes.fit(f"fingerprint of {where}", sketch, len(layers), 2, SIZE, SIZE, floats=True)
    return ReleasedContext(
        structures=structures,
        guarantee=read_guarantee(header, where),
        public_rows=public_rows,
        rows=CHECKS.integer(header["rows"], f"rows of {where}", high=MAX_ROWS),
        fingerprint=Fingerprint(layers, sketch, str(header["fingerprint"]["dtype"])),
        context=context,
    )


def check_promise(guarantee: Guarantee, config: DPXAttnConfig) -> None:
    """Raises ReleaseError where a release promises something else than its config says."""
    pure = guarantee.delta == 0.0 and KNOWN[config.mechanism].releases == "texts"
    for name in ("mechanism", "epsilon", "unit", "neighboring", *(() if pure else ("delta",))):
        if getattr(guarantee, name) != getattr(config, name):
            CHECKS.refuse(f"{name} of a guarantee is another one than the config's")


def read_guarantee(header: Mapping[str, Any], where: str) -> Guarantee:
    """What is promised, by numbers and in words that agree."""
    values = header["guarantee"]
    CHECKS.keys(values, {*(f.name for f in fields(Guarantee)), "is_private"}, f"the guarantee of {where}")
    guarantee = Guarantee.from_dict(values)
    for name in ("epsilon", "delta", "clip_norm", "sensitivity", "sigma"):
        CHECKS.number(getattr(guarantee, name), f"{name} of the guarantee of {where}", low=0.0)
    if guarantee.to_dict() != values or guarantee.sentence() != header["guarantee_text"]:
        CHECKS.refuse(f"the guarantee of {where} contradicts itself")
    if not guarantee.is_private:
        raise ReleaseError("This release promises nothing (no noise, or seeded noise): it is not loaded.")
    return guarantee
