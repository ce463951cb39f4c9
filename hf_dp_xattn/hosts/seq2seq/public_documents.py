"""Public statistics of an encoder-decoder model's cross-attention, from public documents of one length, or contexts of documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ...calibration.anchors.anchors_calibration import AnchorCalibration
from ...calibration.anchors.anchors_fit import candidates, fit_anchors
from ...calibration.anchors.objective import LayerProbe, Objective
from ...calibration.anchors.slots_fit import PublicContexts
from ...calibration.calibration import Calibration
from ...calibration.calibration_options import CalibrationOptions
from ...calibration.kernel_fit import PublicQueries, Rows, fit_calibration
from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.anchors import pool
from ..access import Access
from ..identity import host_identity
from ..public_prompts import choose_contexts, slot_schedule
from ..routing import routed
from ..rows import layer_specs
from .attention import NAME, Serving, serving
from .calibrate_documents import (
    QUERY_ROWS,
    DocumentReader,
    choose,
    fit_documents_of,
    gather_documents,
    slots_for,
)
from .contexts import MASK, STATES, gather
from .encoder import EncoderSide
from .layers import CrossLayer
from .probing import Forward, context_channels, find_layers, run_decoder

ENCODER_BATCH = 16
STARTS = 16  # questions at once
NEEDS = (
    "public_contexts of an encoder-decoder model are what its encoder takes, {what}: token ids [N, n] cut to one length, or rows of its "
    "output [N, n, C]."
)


@torch.no_grad()
def calibrate_seq2seq(
    model: Any, public_contexts: Any, config: DPXAttnConfig, options: CalibrationOptions
) -> Calibration | AnchorCalibration:
    """See `hosts.calibrate.calibrate`. Queries are those of `query_prompts` public documents, over `query_steps` sampled tokens, each
    text started by one of `questions` (decoder ids)."""
    settings = options.anchor_settings()
    if config.mechanism == "anchors" and (config.unit != "group" or "histogram" not in options.releases):
        candidates(config, settings)  # refuses what cannot be before minutes are spent on it
    layers = find_layers(model)
    starts = starts_of(model, options.questions)
    if config.unit == "group":
        return _calibrate_documents(model, public_contexts, config, layers, starts, options)
    whole = _encode(model, public_contexts, options)
    count, sampled, wanted = options.queries_of_texts()
    queries = sample_queries(model, layers, list(whole[:count]), starts, sampled, wanted, options.seed)
    return fit_rows(model, layers, whole, queries, config, options)


def fit_rows(
    model: Any,
    layers: dict[str, CrossLayer],
    whole: torch.Tensor,
    queries: Sequence[torch.Tensor],
    config: DPXAttnConfig,
    options: CalibrationOptions,
) -> Calibration | AnchorCalibration:
    """A calibration from the rows [N, n, C] of public contexts and each layer's public queries [H, m, d]; unit "row" or "context"."""
    untyped: dict[str, Any] = dict(layers)
    gains = [layer.output_gain() for layer in layers.values()]
    if config.mechanism == "anchors":
        schedule = slot_schedule(untyped, whole.shape[1], options.steps, options.seed)
        units = whole
        if config.unit == "context":
            units = torch.stack([pool(rows.float(), "context", None) for rows in whole]).to(whole.dtype)
        contexts = PublicContexts(units, torch.ones(units.shape[:2], dtype=torch.bool), whole)
        probes = [_probe(*parts) for parts in zip(layers.values(), queries, gains, strict=True)]
        with torch.enable_grad():
            return fit_anchors(
                config,
                contexts,
                Objective(probes, torch.zeros(0, whole.shape[-1])),
                host_identity(untyped, model.dtype, None),
                grouping={"row": "rows", "context": "context"}[config.unit],
                epsilons=options.epsilons,
                settings=options.anchor_settings(slots=schedule),
            )

    def contexts_of_layers() -> Iterator[Rows]:
        for rows in whole:
            pairs = [
                layer.project(rows.unsqueeze(0).to(model.device, model.dtype)) for layer in layers.values()
            ]
            yield [k[0] for k, _ in pairs], [v[0] for _, v in pairs]

    return fit_calibration(
        config,
        layer_specs(untyped, model.dtype),
        contexts_of_layers,
        PublicQueries(list(queries), gains),
        count=len(whole),
        epsilons=options.epsilons,
        rank=options.rank,
        progress=options.progress,
    )


def _encode(model: Any, public: Any, options: CalibrationOptions) -> torch.Tensor:
    """[N, n, C] float16: public documents, encoded in batches (their rounding may depend on each other: they are public)."""
    encoder = EncoderSide(model, Access())
    inputs = gather(public)
    encoder.check(inputs)
    name = next(k for k in inputs if k != MASK)
    if MASK in inputs and not bool(inputs[MASK].all()):
        raise ConfigError(NEEDS.format(what="without padding"))
    main = inputs[name]
    if main.ndim < 2 or (name == STATES and main.ndim != 3):
        raise ConfigError(NEEDS.format(what="in one batch"))
    each = 2 * main.shape[1] * context_channels(model)
    main = torch.stack(choose_contexts(main, each, options.memory_mb, options.seed))
    if name == STATES:
        return main.to("cpu", torch.float16)
    parts = [
        encoder.encode_batch({name: part}).to("cpu", torch.float16)
        for part in tqdm(
            main.split(ENCODER_BATCH), desc="encoding", disable=not options.progress, leave=False
        )
    ]
    return torch.cat(parts)


def _calibrate_documents(
    model: Any,
    public: Any,
    config: DPXAttnConfig,
    layers: dict[str, CrossLayer],
    starts: Sequence[torch.Tensor],
    options: CalibrationOptions,
) -> Calibration | AnchorCalibration:
    """Contexts of documents that are encoded apart from each other, each document a unit."""
    untyped: dict[str, Any] = dict(layers)
    count, sampled, wanted = options.queries_of_texts()
    width = wanted * sum(layer.inner_dim for layer in untyped.values())
    chosen = choose(model, public, width, options.memory_mb, options.seed)
    reader = DocumentReader(model, options.memory_mb // 4)
    generator = torch.Generator().manual_seed(options.seed)
    seen = []
    for context in chosen[:count]:
        rows = torch.cat(reader.read(context))
        seen.append(rows[torch.randperm(len(rows), generator=generator)[:QUERY_ROWS]])
    found = sample_queries(model, layers, seen, starts, sampled, wanted, options.seed)
    gains = [layer.output_gain() for layer in layers.values()]
    if config.mechanism == "anchors":
        probes = [_probe(*parts) for parts in zip(layers.values(), found, gains, strict=True)]
        gathered = gather_documents(reader, chosen, probes, seed=options.seed, progress=options.progress)
        contexts = gathered.contexts
        schedule = slot_schedule(untyped, contexts.whole.shape[1], options.steps, options.seed)
        with torch.enable_grad():
            return fit_documents_of(
                config,
                gathered,
                Objective(probes, torch.zeros(0, contexts.whole.shape[-1])),
                host_identity(untyped, model.dtype, None),
                epsilons=options.epsilons,
                settings=options.anchor_settings(slots=slots_for(schedule, contexts.units.shape[1])),
            )
    groups = []
    for context in chosen:
        _, mask, _ = reader.check(context)
        groups.append(torch.arange(len(mask)).repeat_interleave(mask.sum(1)))

    def contexts_of_layers() -> Iterator[Rows]:
        for context in chosen:
            rows = torch.cat(reader.read(context)).unsqueeze(0).to(model.device, model.dtype)
            pairs = [layer.project(rows) for layer in layers.values()]
            yield [k[0] for k, _ in pairs], [v[0] for _, v in pairs]

    return fit_calibration(
        config,
        layer_specs(untyped, model.dtype),
        contexts_of_layers,
        PublicQueries(found, gains),
        count=len(chosen),
        epsilons=options.epsilons,
        rank=options.rank,
        groups=groups,
        progress=options.progress,
    )


def starts_of(model: Any, questions: Sequence[Any] | None) -> list[torch.Tensor]:
    """What public texts of the decoder start with, [m] each: the start token, and a question after it.

    Raises:
        ConfigError: a question is no list of token ids.
    """
    places = [
        (c, n)
        for n in ("decoder_start_token_id", "bos_token_id")
        for c in (model.generation_config, model.config)
    ]
    found = [getattr(c, n, None) for c, n in places]
    start = torch.tensor([next((s for s in found if isinstance(s, int)), 0)])
    if questions is None:
        return [start]
    ids = [torch.as_tensor(q) for q in questions]
    if not ids or any(q.ndim != 1 or not len(q) or q.is_floating_point() for q in ids):
        raise ConfigError("`questions` must be lists of decoder token ids, none of them empty.")
    return [q if int(q[0]) == int(start) else torch.cat([start, q]) for q in ids]


def sample_queries(
    model: Any,
    layers: dict[str, CrossLayer],
    contexts: Sequence[torch.Tensor],
    starts: Sequence[torch.Tensor],
    steps: int,
    count: int,
    seed: int,
    forward: Forward = run_decoder,
) -> list[torch.Tensor]:
    """`count` public queries [H, m, d] of each layer, along tokens that are sampled with a generator of our own after each of `starts`
    (or `STARTS` of them) over each of the contexts [n, C]."""
    generator = torch.Generator().manual_seed(seed)
    state = Serving(queries={layer.module: [] for layer in layers.values()})
    lengths = sorted({len(s) for s in starts})
    with routed((layer.module for layer in layers.values()), NAME), serving(state):
        for i, rows in enumerate(contexts):
            alike = [s for s in starts if len(s) == lengths[i % len(lengths)]]
            order = torch.randperm(len(alike), generator=generator)[:STARTS].tolist()
            ids = torch.stack([alike[j] for j in order]).to(model.device)
            states = rows.to(model.device, model.dtype).expand(len(ids), -1, -1)
            for step in range(steps):
                if step:  # the queries that are kept are those of the whole text
                    for known in state.queries.values():
                        known.pop()
                logits = forward(model, states, ids, use_cache=False).logits[:, -1]
                chances = logits.float().softmax(-1).cpu()
                ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator).to(ids)], dim=1)
    # after a question what counts is where its answer is read: its last word, and the answer's
    first = [lengths[i % len(lengths)] - 1 for i in range(len(contexts))]
    found = []
    for layer in layers.values():
        parts = [
            q.unflatten(2, (-1, at + steps))[..., at:, : q.shape[-1] - layer.padding].flatten(2, 3)
            for q, at in zip(state.queries[layer.module], first, strict=True)
        ]
        flat = torch.cat([q.transpose(0, 1).flatten(1, 2) for q in parts], dim=1)
        keep = torch.randperm(flat.shape[1], generator=generator)[:count]
        found.append(flat[:, keep.to(flat.device)].to("cpu", torch.float32))
    return found


def _probe(layer: CrossLayer, queries: torch.Tensor, gain: torch.Tensor) -> LayerProbe:
    like = next(layer.module.parameters())

    def apply(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = layer.project(rows.to(like.device, like.dtype))
        return key.to("cpu", torch.float32), value.to("cpu", torch.float32)

    return LayerProbe(apply, layer.scale, queries, gain.float())
