"""Words that several kinds of card use, as functions of plain values. `config`: a config's fields by name, as its `to_dict` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..known_mechanisms import KNOWN
from ..report import NOT_PRIVATE, promise
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


def config_promise(config: Mapping[str, Any]) -> str:
    """What a release under a config promises, in the words of its guarantee."""
    names = ("epsilon", "delta", "unit", "neighboring")
    known = KNOWN[config["mechanism"]]
    return (
        promise(*(config[n] for n in names), texts=known.releases == "texts")
        if known.private
        else NOT_PRIVATE
    )


def price_table(config: Mapping[str, Any]) -> str:
    """Mechanism, epsilon, delta, unit and relation of a config, as a table."""
    private = KNOWN[config["mechanism"]].private
    rows = [
        ("mechanism", f"`{config['mechanism']}`"),
        ("epsilon", f"{config['epsilon']:g}" if private else "none (not private)"),
        ("delta", f"{config['delta']:g}"),
        *unit_rows(config["unit"], config["neighboring"]),
    ]
    return table(("", ""), rows)
