"""The privacy report of a protected decoder-only model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ....report import PrivacyReport
from ...reporting import Spent, build_report

if TYPE_CHECKING:
    from .decoder_handle import ProtectedDecoder

NOT_COVERED = (
    "words: in one sequence every token knows of those before it, so unit='row' protects one position's keys and values, never a word; "
    "unit='context' protects the whole prefix and costs accordingly; unit='group' with groups='segments' protects one segment of many, "
    "end to end, because each is encoded apart from all others",
    "what can be learned from the release at this epsilon, by anyone who sees it or many texts made from it",
    "the user's own tokens, the public head, and anything inside protected.public(): they are attended exactly",
    "that a prefix was used before: the same prefix reads the same release, and a ledger refuses a second one",
    "the same text as other tokens: the ledger names a prefix by its private token ids in order, so a prefix with one token more or less, "
    "or with its segments in another order, is another one to it",
    "weights: an adapter or a model that was trained on private data reveals it on its own",
    "timing, memory, the number of requests, and the time that a release takes",
    "prefixes that the surrounding program logs, keeps or shows in tracebacks; hooks and logits processors that the operator installs",
)
GROUPS_NOT_COVERED = (
    "which segments (or groups) stand together: they are protected one by one; groups of tokens of one sequence know of each other",
)


def prefix_report(
    handle: ProtectedDecoder, spent: Sequence[Spent], warnings: tuple[str, ...]
) -> PrivacyReport:
    """As `reporting.build_report`, with what is public and what is not covered here."""
    unit, counted = handle.config.unit, handle.config.neighboring == "replace_one"
    public = [
        "the model's weights and the shapes of its layers",
        "the public head, and the padded length of the prefix (of its longest segment): neighbours share it",
    ]
    if unit == "row" and counted:
        public.append("the number of private tokens")
    if unit == "group":
        public.append(
            "with groups='segments', how many there are (not how long each is)"
            if counted
            else "with groups='segments', nothing more: their number is private too"
        )
        public.append("with groups=[...], which tokens form a group")
    if handle.calibration is not None:
        public.append("the calibration")
    public += ["the user's own tokens", "how tokens are chosen: beams, sampling, lengths, seeds"]
    covered = NOT_COVERED + (GROUPS_NOT_COVERED if unit == "group" else ())
    return dataclasses.replace(
        build_report(handle, spent, warnings), public=tuple(public), not_covered=covered
    )
