"""The parts of each kind's card. Nothing here is said that the artefact or its report does not say."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from ..artefacts.card import HERE, CardOptions, Parts, render, table
from ..report import Guarantee

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from ..calibration.anchors.anchors_calibration import AnchorCalibration
    from ..calibration.calibration import Calibration
    from ..config import DPXAttnConfig
    from ..hosts.release import Release
    from ..hosts.storage import ReleaseFile
    from ..privacy.ledger import Budget

UNITS = {
    "row": "one row (embedding) of the context; a text encoder mixes its rows, so this is not a word",
    "group": "one group of rows that was encoded apart from all others (a phrase, a document)",
    "context": "the whole context",
}
ONE_RELEASE = (
    "The guarantee is that of ONE release. Every further release of the same context adds to it; the ledger of who makes them "
    "counts."
)
NOT_COVERED = (
    "words: an encoder mixes its rows, so unit='row' protects one row of its output, never a word; unit='context' protects everything at "
    "once and costs accordingly",
    "what can be learned from a release at this epsilon, by anyone who sees it or what is made from it",
    "negative prompts, public prompts, the initial image of img2img; weights and calibrations that were made from private data",
    "further releases of the same context, and the same text under another name (token ids, embeddings): each is charged on its own",
    "timing, memory, the number of requests, and what the surrounding program logs",
    "anything more that `protected.report()` lists for the host at hand",
)
_CALIBRATION = (
    "Made from PUBLIC contexts only: it is neither noised nor counted, and the package cannot check that its publisher kept to it. It "
    "spends no budget."
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


def _name(options: CardOptions) -> str:
    return options.get("repo_id") or HERE


def _code(*lines: str) -> str:
    return "\n".join(("import hf_dp_xattn as dpx", "", *lines))


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
            code=_code(
                f'config = dpx.DPXAttnConfig.from_pretrained("{_name(options)}")',
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


def _qualities(calibration: AnchorCalibration) -> str:
    rows = [
        (f"{p.epsilon:g}", p.release, f"{p.quality.fvu:.3f} ({p.quality.low:.3f} to {p.quality.high:.3f})")
        for p in calibration.plans
    ]
    text = (
        "Predicted on held-out public contexts: the fraction of the attention output's variance that the release leaves unexplained (FVU; "
        f"1 is the public mean alone), with 95 % intervals.\n\n{table(('epsilon', 'release', 'FVU'), rows)}"
    )
    if calibration.scores:
        scores = [
            (
                f"{s.epsilon:g}",
                s.name,
                f"{100 * s.score:.1f} % ({100 * s.low:.0f}-{100 * s.high:.0f})",
                s.contexts,
            )
            for s in calibration.scores
        ]
        head = ("epsilon", "score", "value (95 %)", "public contexts")
        text += f"\n\nMeasured by the publisher on public contexts:\n\n{table(head, scores)}"
    return text


def calibration_card(calibration: Calibration | AnchorCalibration, options: CardOptions) -> ModelCard:
    """The card of a calibration, of either kind."""
    from ..calibration.anchors.anchors_calibration import AnchorCalibration

    settings: dict[str, Any]
    if isinstance(calibration, AnchorCalibration):
        mechanism, unit, relation = "anchors", calibration.unit, calibration.neighboring
        utility: str | None = _qualities(calibration)
        layers, settings = [x[0] for x in calibration.host.layers], calibration.settings
    else:
        mechanism, unit, relation = "kernel_sum", calibration.settings["unit"], "replace_one"
        fvu = [(f"{p.epsilon:g}", f"{p.predicted_fvu:.3f}") for p in calibration.plans]
        utility = f"Predicted on public contexts (FVU):\n\n{table(('epsilon', 'FVU'), fvu)}" if fvu else None
        layers, settings = list(calibration.layers), calibration.settings
    rows = [
        ("public contexts", calibration.contexts),
        ("units in the largest", calibration.units),
        ("cross-attention layers", len(layers)),
        *((f"`{k}`", v) for k, v in settings.items() if isinstance(v, (str, int, float))),
    ]
    return render(
        Parts(
            title=f"Calibration for differentially private attention: {mechanism}, unit = {unit}",
            summary=f"Public statistics that `hf_dp_xattn` needs to release private contexts well. {_CALIBRATION}",
            code=_code(
                f'calibration = dpx.Calibration.from_pretrained("{_name(options)}")',
                f'config = dpx.DPXAttnConfig(mechanism="{mechanism}", epsilon=8.0, delta=1e-5, unit="{unit}", neighboring="{relation}")',
                "protected = dpx.protect(pipe, config, calibration=calibration)",
            ),
            guarantee=(
                "None by itself: it holds no private data. A release made with it is (epsilon, delta)-differentially private as its config "
                "says, whatever this calibration holds; what it holds decides how useful the release is.\n\n"
                + table(
                    ("", ""),
                    [
                        ("mechanism", f"`{mechanism}`"),
                        ("unit", f"`{unit}`: {UNITS[unit]}"),
                        ("neighbouring relation", f"`{relation}`"),
                    ],
                )
            ),
            public=["everything in it"],
            not_covered=(
                "data that was not public when it was made: nothing protects it",
                "other contexts than the public ones: what is predicted here holds for contexts like them",
                "another model or text encoder: it is refused there",
            ),
            utility=utility,
            details=table(("", ""), rows),
            tags=("calibration", mechanism),
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
            code=_code(
                f'release = dpx.Release.from_pretrained("{_name(options)}", host={host})',
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
    calibration: Calibration | AnchorCalibration | None,
    public: tuple[str, ...],
    not_covered: tuple[str, ...],
    options: CardOptions,
) -> ModelCard:
    """The card beside a protected pipeline or model."""
    from ..calibration.anchors.anchors_calibration import AnchorCalibration

    utility = _qualities(calibration) if isinstance(calibration, AnchorCalibration) else None
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
            code=_code(
                f'pipe = dpx.from_pretrained("{_name(options)}")  # the folder above this one',
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
