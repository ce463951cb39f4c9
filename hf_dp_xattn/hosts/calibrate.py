"""`calibrate`: public statistics of a host's cross-attention, from public prompts, documents, images or prefixes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Pipeline

from ..calibration.calibration_options import EPSILONS, CalibrationOptions
from ..calibration.checkpoints import Checkpoints, digest
from ..calibration.fit import check, fit
from ..calibration.library.metric import Responses
from ..calibration.progress import Progress
from ..calibration.shipped_prompts import public_prompts
from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..known_mechanisms import KNOWN
from .accounts import STAYS
from .calibrate_checks import check_contexts, check_options
from .diffusers.public_prompts import Public
from .host_registry import kind_of, kind_to_protect, model_of
from .protect import handle_of
from .text.public_texts import public_texts
from .text.unit_encoders import parts_of
from .weight_changes import checksum

_REFUSED = {
    **dict.fromkeys(
        ("public_head", "prefix_bucket", "replies"),
        "public_head, prefix_bucket and replies are for decoder-only models.",
    ),
    "questions": "questions are for models that generate text.",
}

# options that do not decide what is made, and those of a library, whose codes have names of their own
_NOT_ASKED = frozenset({"progress", "shown", "kept", "started", "minutes"})
_OF_LIBRARIES = frozenset({"tokenizer", "encoder", "expand", "responses", "processes"})


def _epsilons(epsilons: Any) -> tuple[float, ...]:
    """One number or several. Raises ConfigError where they are not positive numbers."""
    values = (epsilons,) if isinstance(epsilons, (int, float)) else epsilons
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ConfigError(f"epsilons must be positive numbers, got {type(epsilons).__name__}.")
    sequence = tuple(values)
    if not sequence or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and v > 0
        for v in sequence
    ):
        raise ConfigError("epsilons must be positive numbers, one at least.")
    return tuple(map(float, sequence))


def shipped_contexts(host: Any) -> list[Any]:
    """The public prompts of the package for a host. Raises ConfigError where there are none that would do."""
    shipped = "system" if host is None else kind_to_protect(host).shipped
    if shipped is None:
        raise ConfigError(
            "An encoder-decoder model reads documents, and the prompts that are shipped are none: pass public documents like yours."
        )
    return public_prompts(shipped)


def _minutes(minutes: Any) -> float | None:
    """Raises ConfigError where they are not a positive number."""
    if minutes is None:
        return None
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes < math.inf:
        raise ConfigError(f"minutes must be a positive number, got {minutes!r}.")
    return float(minutes)


def calibrate(
    pipe: Any,
    public_contexts: Public | None = None,
    config: DPXAttnConfig | None = None,
    *,
    epsilons: float | Sequence[float] = EPSILONS,
    anchors: int | None = None,
    releases: Sequence[str] = ("sum", "response", "histogram", "mixed"),
    steps: int | None = None,
    minutes: float | None = None,
    grouping: str | None = None,
    memory_mb: int = 2048,
    rank: int = 128,
    query_prompts: int | None = None,
    query_steps: int | None = None,
    queries_per_step: int = 32,
    seed: int = 0,
    progress: bool = True,
    public_head: Any = 0,
    questions: Sequence[Any] | None = None,
    prefix_bucket: int | None = None,
    replies: int = 0,
    tokenizer: Any = None,
    encoder: Any = None,
    folder: str | os.PathLike[str] | None = None,
    expand: bool | int = False,
    responses: Responses | None = None,
    processes: bool = False,
) -> Any:
    """Everything data-dependent that a mechanism reads, fitted to PUBLIC prompts.

    Nothing private may be among `public_contexts`: a calibration is not noised and not counted. The pipeline must not be
    protected; its weights and random state are left alone.

    * `anchors`: codebook, priors, learned sums, decoders, and for each epsilon the release that did best on public contexts that were
      held out. From about 100 to 10^6 public contexts; what does not fit `memory_mb` is left out by a random choice, before encoding.
    * `library`: public texts with their codes, and for each epsilon which of them may answer; nothing is trained. For any host that
      `protect` takes; from some hundred public texts to 10^5. Public contexts are strings, which are cut as `grouping` says, or lists
      of units (strings or token ids).
    * `kernel_sum`: centres, balancing maps, clipping bounds, a sketch basis of `rank` directions, and one plan per epsilon.

    Args:
        pipe: a pipeline of diffusers, a model of transformers, or a text-generation pipeline, whose model is calibrated.
        public_contexts: prompts; lists of phrases for unit="group"; or embeddings [N, n, C] of which all rows are used. For an
            encoder-decoder model: token ids [N, n] cut to one length, or what else its encoder takes, as in `protected.release`; for
            unit="group" a list of contexts, each a batch of documents as `release(..., groups="documents")` takes it. For a Mllama:
            what its image processor gives for images of one number of tiles. For a
            decoder-only model: token ids [N, n] or a list of token id lists; for unit="group", a list of lists of segments.
            None: the prompts that are shipped (`dpx.public_prompts`), for a library of a pipeline or a decoder-only model.
        config: mechanism, unit and relation to fit for; by default `library` with unit="group".
        epsilons: for which there will be plans.
        anchors: cells of the histogram's codebook, at most: as many as the public rows make distinct. By default no more than 4,096.
        releases: candidates of `anchors` ("sum", "response", "histogram", "mixed").
        steps: training steps of the decoder, at most; by default as many as `minutes` allow (3,000 at most). More do better.
        minutes: for all of it, about: training ends in time, and keeps what did best on contexts that it did not see. By default 10 where
            `steps` is not given, else no limit. With `steps` alone a calibration can be made again exactly.
        grouping: how units are encoded, "rows", "phrases" or "context"; by default what the unit says. Of a library: "phrases",
            "sentences", "lines", "segments", "documents" or "context".
        memory_mb: for encoded public contexts, in MiB.
        rank: kernel_sum only; 0 fits geometry and bounds only.
        query_prompts: public runs from which queries are taken; by default 8, or 2 on a host as large as Stable Diffusion's.
        query_steps: of each run; by default 6 denoising steps, or 4 on a large host (16 sampled tokens for a document or prefix).
        queries_per_step: kept of each step.
        seed: of every random choice.
        progress: shows a bar, and first how long it will take.
        public_head: decoder-only models, as in `protected.release`.
        prefix_bucket: decoder-only models, as in `protected.release`.
        questions: token ids of public users' turns (of an encoder-decoder model: of what its decoder's texts start with), whose queries
            (and those of answers that are sampled) the calibration is fitted to; by default only sampled text.
        replies: decoder-only models, `anchors`: how many questions each public prefix is asked, so that the decoder is trained on the
            model's own replies (of up to `query_steps` tokens) as well as on its attention. Each training step then runs the model
            forwards and backwards. What a user sees gains most from this.
        tokenizer: `library` only: of a model that comes without a pipeline.
        encoder: `library` only: what makes the codes in place of the host's own text encoder, as in `protect`.
        folder: keeps what was encoded and trained, so that a run that was broken off is taken up again; as large as the encoded
            public contexts. It may be deleted afterwards.
        expand: `library` only: adds new texts, in which words that stand in the same public texts take each other's place; for phrases of
            one grammar. True: up to 50,000 of them; or how many at most.
        responses: `library` only: what the host does with each of n PUBLIC strings, floats [n, d] (a picture that is begun from the same
            noise, or log-probabilities of a reply). Texts that it treats alike then count as near, so that more answers are told right.

        processes: `library` only: in a job of several processes (accelerate launch, torchrun), each of which calls this with the same
            public contexts: each encodes its share of the texts, and all hold the same library.

    Raises:
        ConfigError: too few contexts, wrong type.
        UnsupportedModelError: not a supported pipeline.

    Example:
        >>> public = [f"a {colour} {shape}" for colour in ("red", "blue", "green", "white") for shape in ("circle", "square")]
        >>> library = dpx.calibrate(pipe, public, epsilons=8.0, progress=False)
        >>> protected = dpx.protect(pipe, epsilon=8.0, calibration=library)
    """
    config = DPXAttnConfig() if config is None else config
    if public_contexts is None:
        if KNOWN[config.mechanism].releases != "texts":
            raise ConfigError(
                "Without public contexts only a library is made: pass texts that resemble the private ones, or "
                "DPXAttnConfig(mechanism='library', unit='group')."
            )
        public_contexts = shipped_contexts(pipe)
    options = CalibrationOptions(
        epsilons=_epsilons(epsilons),
        anchors=anchors,
        releases=(releases,) if isinstance(releases, str) else tuple(releases),
        steps=steps,
        minutes=_minutes(minutes),
        grouping=grouping,
        memory_mb=memory_mb,
        rank=rank,
        query_prompts=query_prompts,
        query_steps=query_steps,
        queries_per_step=queries_per_step,
        seed=seed,
        public_head=public_head,
        questions=list(questions) if isinstance(questions, Iterator) else questions,
        prefix_bucket=prefix_bucket,
        replies=replies,
        tokenizer=tokenizer,
        encoder=encoder,
        expand=expand,
        responses=responses,
        processes=processes,
        shown=progress,
    )
    check_options(options)
    if handle_of(pipe) is not None:
        raise ConfigError(
            "Calibrate before `protect`, or after dpx.unprotect: a protected pipeline has no exact queries. When you protect it again, "
            f"{STAYS}."
        )
    if isinstance(public_contexts, Iterator):
        public_contexts = list(public_contexts)
    if KNOWN[config.mechanism].releases == "texts":
        texts = public_texts(pipe, public_contexts, config, options)
        return fit(config, texts, replace(options, kept=_kept(folder, pipe)))
    if expand is not False or processes or any(o is not None for o in (tokenizer, encoder, responses)):
        raise ConfigError(
            "`tokenizer`, `encoder`, `expand`, `responses` and `processes` are for mechanism='library'."
        )
    check_contexts(public_contexts, config.mechanism)
    if isinstance(pipe, Pipeline):  # of transformers, whose model it is that is calibrated
        pipe = model_of(pipe)
    kind = kind_of(pipe)
    for name, message in _REFUSED.items():
        asked = getattr(options, name)
        if name not in kind.takes and not (asked is None or (isinstance(asked, int) and asked == 0)):
            raise ConfigError(message)
    check(config, options, documents=kind.documents and config.unit == "group")
    with Progress(progress, "calibration") as bar:
        if folder is not None:
            asked = [
                getattr(options, f.name) for f in fields(options) if f.name not in _NOT_ASKED | _OF_LIBRARIES
            ]
            kept = _kept(folder, pipe, config.to_dict(), asked, public_contexts)
            options = replace(options, kept=kept)
        options = replace(options, progress=bar)
        options.announce(config.mechanism)
        with kind.public_data(pipe, public_contexts, config, options) as data:
            return fit(config, data, options)


def _kept(folder: str | os.PathLike[str] | None, host: Any, *made_for: object) -> Checkpoints:
    """Checkpoints of this host's weights and of what else decides the calibration."""
    if folder is None:
        return Checkpoints()
    parts = getattr(host, "components", None)
    components = list(parts.values()) if parts else [parts_of(host)[0] or host]
    modules = [m for m in components if isinstance(m, nn.Module)]
    return Checkpoints(Path(folder), digest(checksum(modules), *made_for))
