"""Words that several kinds of card use."""

from __future__ import annotations

from .card import HERE, CardOptions

UNITS = {
    "row": "one row (embedding) of the context; a text encoder mixes its rows, so this is not a word",
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
