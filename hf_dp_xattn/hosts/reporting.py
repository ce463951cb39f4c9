"""The privacy report of a protected diffusers host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import DPXAttnConfig
from ..known_mechanisms import KNOWN
from ..privacy.ledger import Budget, Ledger
from ..report import Guarantee, PrivacyReport, release_entry
from .accounts import persistence_of
from .host_words import HostWords
from .worth import ROW

LOCAL = "this report is the operator's own: charges tell what was released before, so do not publish it"


@dataclass(frozen=True)
class Spent:
    """One release: the ledger's (keyed) names of its context and of what it consists of, none for one that was loaded; and what was
    promised. A growing release adds the names of its appends."""

    digests: Sequence[str]
    guarantee: Guarantee


def _entry(ledger: Ledger, name: str, spent: Spent, delta: float) -> dict[str, Any]:
    g = spent.guarantee
    if not spent.digests or not ledger.at_hand:  # loaded, or forked
        return release_entry(name, g)
    if g.mechanism == "none":
        return release_entry(name, g, 0, "unbounded")
    charges, epsilon = ledger.most(spent.digests, g.delta)
    if math.isfinite(epsilon):
        return release_entry(name, g, charges, epsilon)
    # this one is pure, another release of the same context is not
    return release_entry(name, g, *ledger.most(spent.digests, delta), delta)


def _room(config: DPXAttnConfig, budget: Budget) -> str:
    """What a context may spend, in terms of the config's releases."""
    if (budget.epsilon, budget.delta) == (config.epsilon, config.delta):
        return "and each context has the budget for one"
    times = f"{budget.epsilon / config.epsilon:.4g} times that"
    return f"and each context has a budget of epsilon {budget.epsilon:g} at delta {budget.delta:g}, {times}"


def build_report(
    words: HostWords,
    config: DPXAttnConfig,
    heads: Sequence[int],
    ledger: Ledger,
    budget: Budget,
    spent: Sequence[Spent],
    warnings: Sequence[str],
    entries: bool = True,
) -> PrivacyReport:
    """The report; `releases` has one entry per release made or loaded by this handle, in order.

    Args:
        heads: of each layer.
        budget: of a context.
        warnings: of the releases.
        entries: whether releases are listed, which reads the ledger for each.
    """
    names: dict[str, str] = {}
    for s in spent:
        if s.digests:
            names.setdefault(s.digests[0], f"context {len(names) + 1}")
    notes = [*warnings, *words.warnings]
    if any(not s.guarantee.is_private for s in spent) or not config.is_private:
        notes.insert(0, "NOT PRIVATE: at least one release promises nothing, see below.")
    elif config.unit == "row":
        notes.insert(0, ROW)
    texts = KNOWN[config.mechanism].releases == "texts"
    pure = "0 (pure; where a list grows by votes, " if texts else ""
    at = f"delta {pure}{config.delta:g}{')' if texts else ''}"
    each = f"each release spends epsilon {config.epsilon:g} at {at}, {_room(config, budget)}"
    return PrivacyReport(
        host=words.host,
        layers=len(heads),
        heads=sum(heads),
        config=config.to_dict(),
        releases=tuple(
            _entry(ledger, names[s.digests[0]] if s.digests else "loaded", s, budget.delta)
            for s in (spent if entries else ())
        ),
        public=words.public,
        not_covered=words.not_covered,
        ledger=f"{persistence_of(ledger)}; {each}; {LOCAL}",
        warnings=tuple(dict.fromkeys(notes)),
    )
