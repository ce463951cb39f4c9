"""Public statistics of an encoder-decoder model's cross-attention, from public documents of one length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tqdm.auto import tqdm

from ...calibration.anchors.calibration import AnchorCalibration
from ...calibration.anchors.fit import AnchorSettings, candidates, fit_anchors
from ...calibration.anchors.objective import LayerProbe, Objective
from ...calibration.anchors.slots_fit import PublicContexts
from ...calibration.calibration import Calibration
from ...calibration.fit import PublicQueries, Rows, fit_calibration
from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.release import pool
from ..access import Access
from ..calibrate_anchors import choose_contexts, slot_schedule
from ..identity import host_identity
from ..rows import layer_specs
from .attention import Serving, serving
from .contexts import MASK, STATES, gather
from .encoder import EncoderSide
from .layers import CrossLayer, routed
from .outputs import PlaceholderOutputs
from .probing import context_channels, find_layers

ENCODER_BATCH = 16
NEEDS = (
    "public_contexts of an encoder-decoder model are what its encoder takes, {what}: token ids [N, n] cut to one length, or rows of its "
    "output [N, n, C]."
)


@torch.no_grad()
def calibrate_seq2seq(
    model: Any,
    public_contexts: Any,
    config: DPXAttnConfig,
    *,
    epsilons: Sequence[float],
    anchors: int,
    releases: Sequence[str],
    steps: int | None,
    memory_mb: int,
    rank: int,
    query_prompts: int | None,
    query_steps: int | None,
    queries_per_step: int,
    seed: int,
    progress: bool,
) -> Calibration | AnchorCalibration:
    """See `hosts.calibrate.calibrate`. Queries are those of `query_prompts` public documents, over `query_steps` sampled tokens."""
    if config.unit == "group":
        raise ConfigError("A calibration of an encoder-decoder model is for unit='row' or 'context' so far.")
    settings = AnchorSettings(releases=tuple(releases), anchors=anchors, seed=seed, progress=progress)
    if config.mechanism == "anchors":
        candidates(config, settings)  # refuses what cannot be before minutes are spent on it
    layers = find_layers(model)
    untyped: dict[str, Any] = dict(layers)
    whole = _encode(model, public_contexts, memory_mb, seed, progress)
    chosen = whole[: query_prompts or 8]
    queries = _queries(model, layers, chosen, query_steps or 16, queries_per_step, seed)
    gains = [layer.output_gain() for layer in layers.values()]
    if config.mechanism == "anchors":
        schedule = slot_schedule(untyped, whole.shape[1], steps, seed)
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
                epsilons=epsilons,
                settings=dataclasses.replace(settings, slots=schedule),
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
        PublicQueries(queries, gains),
        count=len(whole),
        epsilons=epsilons,
        rank=rank,
        progress=progress,
    )


def _encode(model: Any, public: Any, memory_mb: int, seed: int, progress: bool) -> torch.Tensor:
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
    main = torch.stack(choose_contexts(main, 2 * main.shape[1] * context_channels(model), memory_mb, seed))
    if name == STATES:
        return main.to("cpu", torch.float16)
    parts = [
        encoder.encode_batch({name: part}).to("cpu", torch.float16)
        for part in tqdm(main.split(ENCODER_BATCH), desc="encoding", disable=not progress, leave=False)
    ]
    return torch.cat(parts)


def _queries(
    model: Any, layers: dict[str, CrossLayer], whole: torch.Tensor, steps: int, per_step: int, seed: int
) -> list[torch.Tensor]:
    """Public queries [H, m, d] of each layer, along tokens that are sampled with a generator of our own."""
    states = PlaceholderOutputs(last_hidden_state=whole.to(model.device, model.dtype))
    places = [
        (c, n)
        for n in ("decoder_start_token_id", "bos_token_id")
        for c in (model.generation_config, model.config)
    ]
    starts = [getattr(c, n, None) for c, n in places]
    start = next((s for s in starts if isinstance(s, int)), 0)
    ids = torch.full((len(whole), 1), start, device=model.device)
    generator = torch.Generator().manual_seed(seed)
    state = Serving(queries={layer.module: [] for layer in layers.values()})
    with ExitStack() as stack, serving(state):
        for layer in layers.values():
            stack.enter_context(routed(layer.module))
        for _ in range(steps):
            logits = model(encoder_outputs=states, decoder_input_ids=ids, use_cache=False).logits[:, -1]
            chances = logits.float().softmax(-1).cpu()
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator).to(ids)], dim=1)
    found = []
    for layer in layers.values():
        last = state.queries[layer.module][-1]  # of the whole text so far
        flat = last[..., : last.shape[-1] - layer.padding].transpose(0, 1).flatten(1, 2)
        keep = torch.randperm(flat.shape[1], generator=generator)[: per_step * steps]
        found.append(flat[:, keep.to(flat.device)].to("cpu", torch.float32))
    return found


def _probe(layer: CrossLayer, queries: torch.Tensor, gain: torch.Tensor) -> LayerProbe:
    like = next(layer.module.parameters())

    def apply(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = layer.project(rows.to(like.device, like.dtype))
        return key.to("cpu", torch.float32), value.to("cpu", torch.float32)

    return LayerProbe(apply, layer.scale, queries, gain.float())
