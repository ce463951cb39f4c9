"""The privacy report of a protected encoder-decoder model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ....report import PrivacyReport
from ...reporting import Spent, build_report

if TYPE_CHECKING:
    from .encoder_decoder_handle import ProtectedSeq2Seq

NOT_COVERED = (
    "words: the encoder mixes the rows of a document, so unit='row' protects one row of its output, never a word; unit='context' protects "
    "the whole document and costs accordingly; unit='group' with groups='documents' protects one document of many, end to end, because "
    "each is encoded apart from all others",
    "what can be learned from the release at this epsilon, by anyone who sees it or many texts made from it",
    "that a document was repeated: the same document reads the same release, and a ledger refuses a second one; give each customer a "
    "handle and a ledger of their own",
    "decoder inputs: prompts of the decoder, forced tokens, labels, public documents, and anything inside protected.public()",
    "weights: an adapter or a model that was trained on private data reveals it on its own",
    "the release under another name: the ledger counts token ids, embeddings and hidden states of one document as different contexts",
    "timing, memory, and the number of requests",
    "documents that the surrounding program logs, keeps or shows in tracebacks; hooks and logits processors that the operator installs",
)
GROUPS_NOT_COVERED = (
    "which documents (or groups) stand together: they are protected one by one; groups of rows that were encoded together know of each "
    "other",
)


def seq2seq_report(
    handle: ProtectedSeq2Seq, spent: Sequence[Spent], warnings: tuple[str, ...]
) -> PrivacyReport:
    """As `reporting.build_report`, with what is public and what is not covered here."""
    unit, counted = handle.config.unit, handle.config.neighboring == "replace_one"
    public = ["the model's weights and the shapes of its layers"]
    if counted and unit != "context":
        public.append("the number of rows of a context, with padding and without")
    if unit == "group":
        counts = ", how many groups there are, and how many rows each has"
        public.append("which rows form a group" + (counts if counted else ""))
    if handle.calibration is not None:
        public.append("the calibration")
    public += [
        "decoder inputs and public documents",
        "how tokens are chosen: beams, sampling, lengths, seeds",
    ]
    if getattr(handle.unet.generation_config, "encoder_no_repeat_ngram_size", None):
        warnings += (
            "encoder_no_repeat_ngram_size is switched off: it would read the document past the release.",
        )
    covered = NOT_COVERED + (GROUPS_NOT_COVERED if handle.config.unit == "group" else ())
    return dataclasses.replace(
        build_report(handle, spent, warnings), public=tuple(public), not_covered=covered
    )
