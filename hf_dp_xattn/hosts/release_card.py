"""The card of a release. Nothing here is said that the release does not say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..artefacts import CardOptions
from ..artefacts.card import Parts, render, table
from ..artefacts.words import code, name_of, release_guarantee
from .released import ReleasedContext
from .terms import Terms

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


def release_card(
    contexts: Sequence[ReleasedContext], mechanism: str, terms: Terms, options: CardOptions
) -> ModelCard:
    """The card: each context with its guarantee; what was charged before is not for publication.

    Args:
        contexts: one or several.
        mechanism: of the release's config.
        terms: of the host that made it.
        options: what only the publisher knows.
    """
    head = ("context", "mechanism", "epsilon", "delta", "unit", "neighbouring relation", "padded rows")
    rows = [_context_row(i + 1, c) for i, c in enumerate(contexts)]
    fingerprint = contexts[0].fingerprint
    host, use = _use(terms.host)
    fits = f"{terms.host} with {len(fingerprint.layers)} layers, checked by their names, shapes and weights (LoRA included)"
    by_layers = contexts[0].context is None
    return render(
        Parts(
            title=f"Released private context{'s' if len(contexts) > 1 else ''} for {terms.host}",
            summary=(
                "A private context, released once with noise by `hf_dp_xattn`: every query reads this release and nothing else. It holds "
                "the noised release and public data; no prompt, no token, no exact private row."
            ),
            code=code(
                f'release = dpx.Release.from_pretrained("{name_of(options)}", host={host})',
                use,
            ),
            guarantee=release_guarantee([c.guarantee.sentence() for c in contexts], table(head, rows)),
            public=terms.public,
            not_covered=terms.not_covered,
            details=table(
                ("", ""),
                [
                    ("fits", fits),
                    ("dtype it was made in", fingerprint.dtype),
                    (
                        "holds",
                        "a noised structure for each layer"
                        if by_layers
                        else "rows of context space that serve all layers",
                    ),
                    *((f"warning {i + 1}", w) for i, w in enumerate(terms.warnings)),
                ],
            ),
            tags=("release", mechanism),
            base_model=terms.base_model,
        ),
        options,
    )


def _context_row(number: int, context: ReleasedContext) -> tuple[Any, ...]:
    g = context.guarantee
    price = f"{g.epsilon:g}", f"{g.delta:g}"
    return number, f"`{g.mechanism}`", *price, f"`{g.unit}`", f"`{g.neighboring}`", context.rows


def _use(host: str) -> tuple[str, str]:
    """What the lines that load a release call the host, and how they serve it."""
    if host.startswith("UNet"):
        return "pipe", "image = pipe(**release.inputs()).images[0]"
    if host.endswith(("ForCausalLM", "LMHeadModel")):
        return "model", "tokens = model.generate(**release.inputs(input_ids=ids))"
    return "model", "tokens = model.generate(**release.inputs())"
