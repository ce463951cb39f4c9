"""Public documents of an encoder-decoder model: in one batch of one length, or contexts of documents that are encoded apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from ....calibration.anchors.gather_documents import gather_documents
from ....calibration.anchors.objective import Objective
from ....calibration.calibration_options import CalibrationOptions
from ....calibration.public_data import PublicData, choose_contexts, equal_contexts
from ....config import DPXAttnConfig
from ....errors import ConfigError
from ...calibrate_checks import check_width
from ...identity import host_identity
from ...layer import layer_probes, row_flops
from ..routing import routed
from .cross_attention import NAME, Serving, serving
from .cross_layers import CrossLayer
from .cross_probing import Forward, context_channels, find_layers, run_decoder
from .document_contexts import MASK, STATES, gather
from .document_encoder import EncoderSide
from .document_reader import DocumentReader, choose

QUERY_ROWS = 4096  # rows of a context while public queries are collected
ENCODER_BATCH = 16
STARTS = 16  # questions at once
NEEDS = (
    "public_contexts of an encoder-decoder model are what its encoder takes, {what}: token ids [N, n] cut to one length, or rows of its "
    "output [N, n, C]."
)


@contextmanager
def public_documents(
    model: Any, public: Any, config: DPXAttnConfig, options: CalibrationOptions
) -> Iterator[PublicData]:
    """What public documents give. See `hosts.calibrate.calibrate`; queries are those of texts that are sampled about some of them."""
    with torch.no_grad():
        layers = find_layers(model)
        starts = starts_of(model, options.questions)
        if config.unit == "group":
            data = _documents_data(model, public, config, layers, starts, options)
        else:
            data = rows_data(model, layers, _encode(model, public, options), starts, config, options)
    yield data


def rows_data(
    model: Any,
    layers: dict[str, CrossLayer],
    whole: torch.Tensor,
    starts: Sequence[torch.Tensor],
    config: DPXAttnConfig,
    options: CalibrationOptions,
    forward: Forward = run_decoder,
) -> PublicData:
    """Of rows [N, n, C] of public contexts; unit "row" or "context". starts, forward: see `sample_queries`."""
    queries = sample_queries(model, layers, list(whole[: options.texts]), starts, options, forward)
    objective = _objective(layers, queries, whole.shape[-1])
    grouping = {"row": "rows", "context": "context"}[config.unit]
    shared = _shared(model, layers)
    if config.mechanism == "anchors":
        return PublicData(objective, grouping, contexts=equal_contexts(whole, config.unit), **shared)
    return PublicData(objective, grouping, rows=lambda: whole, count=len(whole), **shared)


def _objective(layers: dict[str, CrossLayer], queries: Sequence[torch.Tensor], channels: int) -> Objective:
    return Objective(layer_probes(layers.values(), queries), torch.zeros(0, channels))


def _shared(model: Any, layers: dict[str, CrossLayer]) -> dict[str, Any]:
    """What is known of the host alone."""
    return {
        "host": host_identity(layers.values(), model.dtype, None),
        "specs": [layer.spec(model.dtype) for layer in layers.values()],
        "row_flops": row_flops(layers.values()),
    }


def _encode(model: Any, public: Any, options: CalibrationOptions) -> torch.Tensor:
    """[N, n, C] float16: public documents, encoded in batches (their rounding may depend on each other: they are public)."""
    encoder = EncoderSide(model)
    inputs = gather(public)
    encoder.check(inputs)
    name = next(k for k in inputs if k != MASK)
    if MASK in inputs and not bool(inputs[MASK].all()):
        raise ConfigError(NEEDS.format(what="without padding"))
    main = inputs[name]
    if main.ndim < 2 or (name == STATES and main.ndim != 3):
        raise ConfigError(NEEDS.format(what="in one batch"))
    if name == STATES:
        check_width(main, context_channels(model))
    each = 2 * main.shape[1] * context_channels(model)
    main = torch.stack(choose_contexts(main, each, options.memory_mb, options.seed))
    if name == STATES:
        return main.to("cpu", torch.float16)

    def encode(part: torch.Tensor) -> torch.Tensor:
        return encoder.encode_batch({name: part}).to("cpu", torch.float16)

    return torch.cat(list(options.kept.each(main.split(ENCODER_BATCH), "encoding", encode, options.progress)))


def _documents_data(
    model: Any,
    public: Any,
    config: DPXAttnConfig,
    layers: dict[str, CrossLayer],
    starts: Sequence[torch.Tensor],
    options: CalibrationOptions,
) -> PublicData:
    """Contexts of documents that are encoded apart from each other, each document a unit."""
    width = options.queries * sum(layer.inner_dim for layer in layers.values())
    chosen = choose(model, public, width, options.memory_mb, options.seed)
    reader = DocumentReader(model, options.memory_mb // 4)
    generator = torch.Generator().manual_seed(options.seed)
    first = [reader.read(context) for context in chosen[: options.texts]]
    shown = []
    for documents in first:
        rows = torch.cat(documents)
        shown.append(rows[torch.randperm(len(rows), generator=generator)[:QUERY_ROWS]])
    queries = sample_queries(model, layers, shown, starts, options)
    objective = _objective(layers, queries, context_channels(model))

    def read() -> Iterator[list[torch.Tensor]]:
        return chain(first, map(reader.read, chosen[len(first) :]))

    shared = _shared(model, layers)
    if config.mechanism == "anchors":
        contexts, some = gather_documents(
            read(), len(chosen), objective.layers, seed=options.seed, progress=options.progress
        )
        return PublicData(objective, "rows", contexts=contexts, documents=some, **shared)
    lengths = (reader.check(context)[1].sum(1) for context in chosen)
    return PublicData(
        objective,
        "rows",
        rows=lambda: map(torch.cat, read()),
        count=len(chosen),
        groups=[torch.arange(len(n)).repeat_interleave(n) for n in lengths],
        **shared,
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
    tokens = [getattr(c, n, None) for c, n in places]
    start = torch.tensor([next((t for t in tokens if isinstance(t, int)), 0)])
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
    options: CalibrationOptions,
    forward: Forward = run_decoder,
) -> list[torch.Tensor]:
    """Public queries [H, m, d] of each layer, along texts that are sampled with a generator of our own.

    Args:
        model: the host.
        layers: its cross-attention layers.
        contexts: public ones [n, C], about each of which texts are sampled.
        starts: token ids that texts start with; `STARTS` of them at most, of one length, for each context.
        options: how many tokens and queries, and the seed.
        forward: runs the host's decoder.
    """
    steps = options.tokens
    generator = torch.Generator().manual_seed(options.seed)
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
    queries = []
    for layer in layers.values():
        parts = [
            q.unflatten(2, (-1, at + steps))[..., at:, : q.shape[-1] - layer.padding].flatten(2, 3)
            for q, at in zip(state.queries[layer.module], first, strict=True)
        ]
        flat = torch.cat([q.transpose(0, 1).flatten(1, 2) for q in parts], dim=1)
        keep = torch.randperm(flat.shape[1], generator=generator)[: options.queries]
        queries.append(flat[:, keep.to(flat.device)].to("cpu", torch.float32))
    return queries
