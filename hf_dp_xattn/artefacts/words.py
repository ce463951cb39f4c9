"""Words that several kinds of card use, as functions of plain values. `config`: a config's fields by name, as its `to_dict` gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..known_mechanisms import KNOWN
from ..report import promise
from .card import HERE, CardOptions, table

UNITS = {
    "row": "one row (embedding) of the context; a text encoder mixes its rows, so this is neither a word nor the prompt",
    "group": "one group of rows that was encoded apart from all others (a phrase, a document)",
    "context": "the whole context",
}
ONE_RELEASE = (
    "The guarantee is that of ONE release. Every further release of the same context adds to it; the ledger of who makes them "
    "counts."
)


def name_of(options: CardOptions) -> str:
    """Where the lines that load an artefact find it."""
    return options.get("repo_id") or HERE


def code(*lines: str) -> str:
    """Lines of Python that use the package."""
    return "\n".join(("import hf_dp_xattn as dpx", "", *lines))


def unit_rows(unit: str, neighboring: str) -> list[tuple[str, str]]:
    """The two lines of a table that say what a neighbouring step changes."""
    return [("unit", f"`{unit}`: {UNITS[unit]}"), ("neighbouring relation", f"`{neighboring}`")]


def config_guarantee(config: Mapping[str, Any], lead: str) -> str:
    """What a release under a config promises, its price as a table, and that more releases cost more. lead: what is promised of."""
    names = ("mechanism", "epsilon", "delta", "unit", "neighboring")
    known = KNOWN[config["mechanism"]]
    private = known.private
    pure = (
        " (used where a list grows by votes; any other release is pure epsilon)"
        if known.releases == "texts"
        else ""
    )
    rows = [
        ("mechanism", f"`{config['mechanism']}`"),
        ("epsilon", f"{config['epsilon']:g}" if private else "none (not private)"),
        ("delta", f"{config['delta']:g}{pure}"),
        *unit_rows(config["unit"], config["neighboring"]),
    ]
    said, price = promise(*(config[n] for n in names)), table(("", ""), rows)
    return "\n\n".join((f"{lead} {said}", price, ONE_RELEASE) if private else (f"**{said}**", price))


def release_guarantee(sentences: Sequence[str], *more: str) -> str:
    """What is promised of each context of a release, and that more releases cost more. more: what stands between."""
    numbered = (f"Context {i + 1}: {sentence}" for i, sentence in enumerate(sentences))
    return "\n\n".join([*numbered, *more, ONE_RELEASE])
