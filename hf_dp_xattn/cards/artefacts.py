"""The parts of each kind's card. Nothing here is said that the artefact or its report does not say."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from ..artefacts.card import CardOptions, Parts, render, table
from ..artefacts.words import ONE_RELEASE, UNITS, code, name_of
from ..report import Guarantee

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from ..config import DPXAttnConfig
    from ..hosts.release import Release
    from ..hosts.storage import ReleaseFile
    from ..privacy.ledger import Budget

NOT_COVERED = (
    "words: an encoder mixes its rows, so unit='row' protects one row of its output, never a word; unit='context' protects everything at "
    "once and costs accordingly",
    "what can be learned from a release at this epsilon, by anyone who sees it or what is made from it",
    "negative prompts, public prompts, the initial image of img2img; weights and calibrations that were made from private data",
    "further releases of the same context, and the same text under another name (token ids, embeddings): each is charged on its own",
    "timing, memory, the number of requests, and what the surrounding program logs",
    "anything more that `protected.report()` lists for the host at hand",
)


def _promise(config: DPXAttnConfig) -> str:
    return Guarantee(
        mechanism=config.mechanism,
        epsilon=config.epsilon if config.is_private else math.inf,
        delta=config.delta,
        unit=config.unit,
        neighboring=config.neighboring,
        rows=None,
        units=None,
        clip_norm=0.0,
        sensitivity=0.0,
        sigma=0.0,
        sampling_distance=0.0,
        private_noise=config.is_private,
        calibrated=False,
    ).sentence()


def _terms(config: DPXAttnConfig) -> str:
    epsilon = f"{config.epsilon:g}" if config.is_private else "none (not private)"
    rows = [
        ("mechanism", f"`{config.mechanism}`"),
        ("epsilon", epsilon),
        ("delta", f"{config.delta:g}"),
        ("unit", f"`{config.unit}`: {UNITS[config.unit]}"),
        ("neighbouring relation", f"`{config.neighboring}`"),
    ]
    return table(("", ""), rows)


def _public(config: DPXAttnConfig) -> list[str]:
    items = ["the model's weights, the calibration, and this config"]
    if config.neighboring == "replace_one":
        items.append("how many units a context has (or its padded number)")
    if config.unit == "group":
        counted = config.neighboring == "replace_one"
        items.append("which rows form a group" + (", and how many groups there are" if counted else ""))
    return [*items, "negative and public prompts, attention masks, guidance, steps and seeds"]


def config_card(config: DPXAttnConfig, options: CardOptions) -> ModelCard:
    """The card of a config: what a release under it promises."""
    fields = [
        (f"`{f.name}`", getattr(config, f.name), f.metadata["help"]) for f in dataclasses.fields(config)
    ]
    anchors = ", calibration=calibration" if config.mechanism == "anchors" else ""
    return render(
        Parts(
            title="Config for differentially private attention",
            summary="Settings of `hf_dp_xattn`: what is released of a private context, and at which price. It holds no data.",
            code=code(
                f'config = dpx.DPXAttnConfig.from_pretrained("{name_of(options)}")',
                f"protected = dpx.protect(pipe, config{anchors})",
            ),
            guarantee=f"A release under this config is {_promise(config)}\n\n{_terms(config)}\n\n{ONE_RELEASE}"
            if config.is_private
            else f"**{_promise(config)}**\n\n{_terms(config)}",
            public=_public(config),
            not_covered=NOT_COVERED,
            details=table(("setting", "value", "meaning"), fields),
            tags=("config",),
        ),
        options,
    )


def _context_row(i: int, context: Any) -> tuple[Any, ...]:
    g = context.guarantee
    return (
        i + 1,
        f"`{g.mechanism}`",
        f"{g.epsilon:g}",
        f"{g.delta:g}",
        f"`{g.unit}`",
        f"`{g.neighboring}`",
        context.rows,
    )


def _use(host: str) -> tuple[str, str]:
    """What the lines that load a release call the host, and how they serve it."""
    if host.startswith("UNet"):
        return "pipe", "image = pipe(**release.inputs()).images[0]"
    if host.endswith(("ForCausalLM", "LMHeadModel")):
        return "model", "tokens = model.generate(**release.inputs(input_ids=ids))"
    return "model", "tokens = model.generate(**release.inputs())"


def release_card(release: Release | ReleaseFile, options: CardOptions) -> ModelCard:
    """The card of a release: one context or several, each with its guarantee; what was charged before is not for publication."""
    terms = release.terms
    sentences = [f"Context {i + 1}: {c.guarantee.sentence()}" for i, c in enumerate(release.contexts)]
    head = ("context", "mechanism", "epsilon", "delta", "unit", "neighbouring relation", "padded rows")
    rows = [_context_row(i, c) for i, c in enumerate(release.contexts)]
    fingerprint = release.contexts[0].fingerprint
    host, use = _use(terms.host)
    fits = f"{terms.host} with {len(fingerprint.layers)} layers, checked by their names, shapes and weights (LoRA included)"
    kept = (
        "rows of context space that serve all layers"
        if release.contexts[0].context is not None
        else "a noised structure for each layer"
    )
    return render(
        Parts(
            title=f"Released private context{'s' if len(release) > 1 else ''} for {terms.host}",
            summary=(
                "A private context, released once with noise by `hf_dp_xattn`: every query reads this release and nothing else. It holds "
                "the noised release and public data; no prompt, no token, no exact private row."
            ),
            code=code(
                f'release = dpx.Release.from_pretrained("{name_of(options)}", host={host})',
                use,
            ),
            guarantee="\n\n".join([*sentences, table(head, rows), ONE_RELEASE]),
            public=terms.public,
            not_covered=terms.not_covered,
            details=table(
                ("", ""),
                [
                    ("fits", fits),
                    ("dtype it was made in", fingerprint.dtype),
                    ("holds", kept),
                    *((f"warning {i + 1}", w) for i, w in enumerate(terms.warnings)),
                ],
            ),
            tags=("release", release.config.mechanism),
            base_model=terms.base_model,
        ),
        options,
    )


def protection_card(
    config: DPXAttnConfig,
    budget: Budget,
    calibration: Any,
    public: tuple[str, ...],
    not_covered: tuple[str, ...],
    options: CardOptions,
) -> ModelCard:
    """The card beside a protected pipeline or model."""
    of_anchors = calibration is not None and config.mechanism == "anchors"
    utility = calibration.described().utility if of_anchors else None
    rows = [
        ("budget of each context", f"epsilon {budget.epsilon:g} at delta {budget.delta:g}"),
        ("calibration", "none" if calibration is None else "in this folder"),
        ("releases", "none: a release is saved or pushed by itself"),
        ("ledger", "not in here: pass the same one when you load, or what was spent is forgotten"),
    ]
    return render(
        Parts(
            title="Protection of this model",
            summary=(
                "The model in the folder above was saved while `hf_dp_xattn` protected it. Other libraries load it as an ordinary model, "
                "without protection."
            ),
            code=code(
                f'pipe = dpx.from_pretrained("{name_of(options)}")  # the folder above this one',
                "print(dpx.handle_of(pipe).report())",
            ),
            guarantee=f"A release is {_promise(config)}\n\n{_terms(config)}\n\n{ONE_RELEASE}"
            if config.is_private
            else f"**{_promise(config)}**",
            public=public,
            not_covered=not_covered,
            utility=utility,
            details=table(("", ""), rows)
            + "\n\n```json\n"
            + json.dumps(config.to_dict(), indent=2, sort_keys=True)
            + "\n```",
            tags=("protection",),
        ),
        options,
    )
