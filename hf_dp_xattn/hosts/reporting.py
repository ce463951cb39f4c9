"""The privacy report of a protected diffusers host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..privacy.units import NeighboringRelation
from ..report import Guarantee, PrivacyReport, release_entry
from .accounts import told
from .diffusers.phrases import RULE

if TYPE_CHECKING:
    from .handle import ProtectedPipeline

NOT_COVERED = (
    "words: a text encoder mixes its rows, so unit='row' protects one embedding row, never a word, and a prompt that differs in one word "
    "may differ in every row; unit='context' protects the whole prompt and costs accordingly",
    "what can be learned from the release at this epsilon, by anyone who sees it or many pictures made from it",
    "that a prompt was repeated: the same prompt reads the same release, and a ledger refuses a second one, so two requests can be seen "
    "to be equal; give each customer a handle and a ledger of their own",
    "the initial image and the mask of img2img and inpainting, negative prompts, public prompts, and anything inside protected.public()",
    "weights: a LoRA or a model that was trained on private data (the text encoder's too) reveals it on its own",
    "the release under another name: the ledger counts token ids, embeddings and other encodings of one text as different contexts",
    "timing, memory, and the number of requests; the safety checker sees the finished picture only",
    "prompts that the surrounding program logs, keeps or shows in tracebacks; callbacks and hooks that the operator installs",
)
LOCAL = "this report is the operator's own: charges tell what was released before, so do not publish it"
PHRASES_NOT_COVERED = (
    "which phrases (or groups) stand together: they are protected one by one; correlations between those of one prompt are not, and what a "
    "phrase's position or their number says is public",
)


@dataclass(frozen=True)
class Spent:
    """One release: the ledger's (keyed) names of its context and of what it consists of, none for one that was loaded; and what was
    promised. A growing release adds the names of its appends."""

    digests: list[str]
    guarantee: Guarantee


def _public(handle: ProtectedPipeline) -> tuple[str, ...]:
    text = handle.text
    items = ["the model's weights and the shapes of its layers"]
    counted = handle.config.neighboring == NeighboringRelation.REPLACE_ONE.value
    if counted and handle.config.unit != "context":
        items.append("the number of rows of embeddings")
    if text is not None and text.available:
        items.append(f"the number of rows of a prompt (always {text.length}, padded)")
        if text.first_row_is_public:
            items.append(
                "the first row of a prompt's encoding (BOS: the causal encoder makes it from no word)"
            )
    if handle.config.unit == "group":
        items.append("which rows form a group" + (", and how many groups there are" if counted else ""))
        if text is not None and text.available:
            many = ", and how many there are" if counted else ""
            items.append(f"where a prompt was split into phrases ({RULE}){many}")
    if handle.calibration is not None:
        items.append("the calibration")
    items += ["the negative prompt and public prompts", "guidance, steps, seeds and sizes of the pictures"]
    return tuple(items)


def _entry(handle: ProtectedPipeline, name: str, spent: Spent) -> dict[str, Any]:
    g = spent.guarantee
    if not spent.digests or not handle.ledger.at_hand:  # loaded, or forked
        return release_entry(name, g)
    if g.mechanism == "none":
        return release_entry(name, g, 0, "unbounded")
    return release_entry(name, g, *handle.ledger.most(spent.digests, g.delta))


def build_report(handle: ProtectedPipeline, spent: Sequence[Spent], warnings: Sequence[str]) -> PrivacyReport:
    """The report; `releases` has one entry per release made or loaded by this handle, in order."""
    names: dict[str, str] = {}
    for s in spent:
        if s.digests:
            names.setdefault(s.digests[0], f"context {len(names) + 1}")
    notes = list(warnings)
    if any(not s.guarantee.is_private for s in spent) or not handle.config.is_private:
        notes.insert(0, "NOT PRIVATE: at least one release promises nothing, see below.")
    budget = f"budget per context: epsilon {handle.budget.epsilon:g} at delta {handle.budget.delta:g}"
    return PrivacyReport(
        host=type(handle.unet).__name__,
        layers=len(handle.layers),
        heads=sum(a.heads for a in handle.layers.values()),
        config=handle.config.to_dict(),
        releases=tuple(_entry(handle, names[s.digests[0]] if s.digests else "loaded", s) for s in spent),
        public=_public(handle),
        not_covered=NOT_COVERED + (PHRASES_NOT_COVERED if handle.config.unit == "group" else ()),
        ledger=f"{told(handle.ledger)}; {budget}; {LOCAL}",
        warnings=tuple(dict.fromkeys(notes)),
    )
