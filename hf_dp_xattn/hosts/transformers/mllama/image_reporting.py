"""The privacy report of a protected model whose text reads an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ....report import PrivacyReport
from ...reporting import Spent, build_report

if TYPE_CHECKING:
    from .mllama_handle import ProtectedImageText

NOT_COVERED = (
    "patches: the vision model mixes the patches of all tiles, so unit='row' protects one row of its projected output, never a patch of "
    "the picture, a face or a word in it; unit='context' protects the whole image and costs accordingly",
    "what can be learned from the release at this epsilon, by anyone who sees it or many texts made from it",
    "that an image was repeated: the same pixels read the same release, and a ledger refuses a second one; give each customer a handle and "
    "a ledger of their own",
    "the text: questions about the image, its captions, labels, public images, and anything inside protected.public()",
    "weights: an adapter or a model that was trained on private data reveals it on its own",
    "the release under another name: the ledger counts pixels that were processed otherwise (cropped, resized, projected) as different "
    "contexts",
    "timing, memory, and the number of requests",
    "images that the surrounding program logs, keeps or shows in tracebacks; hooks and logits processors that the operator installs",
)
GROUPS_NOT_COVERED = (
    "which groups stand together: they are protected one by one, and rows of one image, which are encoded together, know of each other",
)


def image_report(
    handle: ProtectedImageText, spent: Sequence[Spent], warnings: tuple[str, ...]
) -> PrivacyReport:
    """As `reporting.build_report`, with what is public and what is not covered here."""
    public = [
        "the model's weights and the shapes of its layers",
        "the aspect ratio of an image: which of its tiles are padding (their rows are left out), and so how many rows it has, follow from "
        "it",
    ]
    if handle.config.unit == "group":
        counted = handle.config.neighboring == "replace_one"
        public.append("which rows form a group" + (", and how many groups there are" if counted else ""))
    if handle.calibration is not None:
        public.append("the calibration")
    public += [
        "the text, that it has an image, and which of its tokens may see it",
        "how tokens are chosen: beams, sampling, lengths, seeds",
    ]
    covered = NOT_COVERED + (GROUPS_NOT_COVERED if handle.config.unit == "group" else ())
    return dataclasses.replace(
        build_report(handle, spent, warnings), public=tuple(public), not_covered=covered
    )
