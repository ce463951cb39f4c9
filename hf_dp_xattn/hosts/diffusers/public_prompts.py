"""Public prompts of a Stable Diffusion pipeline, encoded in bounded memory, and public denoising runs from which queries are taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...calibration.anchors.anchors_calibration import GROUPINGS
from ...calibration.anchors.objective import Objective
from ...calibration.anchors.slot_schedule import is_large
from ...calibration.anchors.slots_fit import PublicContexts
from ...calibration.calibration_options import CalibrationOptions
from ...calibration.public_data import PublicData, choose_contexts, equal_contexts
from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.sources import pool
from ..calibrate_checks import check_width
from ..identity import host_identity
from ..layer import layer_probes, row_flops
from .architectures import check_pipeline_class, find_layers
from .attention_layer import AttentionLayer, split_heads
from .phrases import split_phrases
from .text_side import TextSide

Public = Sequence[str] | Sequence[Sequence[str]] | torch.Tensor
ENCODER_BATCH = 64


@contextmanager
def public_prompts(
    pipe: Any, public: Public, config: DPXAttnConfig, options: CalibrationOptions
) -> Iterator[PublicData]:
    """What public prompts or embeddings give. See `hosts.calibrate.calibrate`."""
    check_pipeline_class(pipe)
    layers = find_layers(pipe.unet)
    dtype = pipe.unet.dtype
    text = TextSide(pipe)
    flops = row_flops(layers.values())
    large = is_large(flops)
    prompts = (2 if large else 8) if options.query_prompts is None else options.query_prompts
    grouping = options.grouping or {"row": "rows", "group": "phrases", "context": "context"}[config.unit]
    if isinstance(public, torch.Tensor):
        _check_embeddings(public)
        check_width(public, next(iter(layers.values())).channels)
    parts: dict[str, Any]
    if config.mechanism == "anchors":
        contexts, public_rows = gather_contexts(text, public, config.unit, grouping, options)
        shown = contexts.whole[:prompts]
        parts = {
            "contexts": contexts,
            "host": host_identity(layers.values(), dtype, text),
            "row_flops": flops,
            "validation": 128 if large else 400,
        }
    else:
        private, whole = _encode(text, public, options)
        shown, public_rows = torch.stack(whole[:prompts]), whole[0][:0]
        parts = {
            "rows": lambda: private,
            "count": len(private),
            "specs": [layer.spec(dtype) for layer in layers.values()],
        }
    queries = public_queries(pipe, layers, text, shown.to(dtype), options)
    yield PublicData(Objective(layer_probes(layers.values(), queries), public_rows), grouping, **parts)


def _check_embeddings(public: torch.Tensor) -> None:
    finite = public.ndim == 3 and public.is_floating_point() and bool(torch.isfinite(public).all())
    if not finite or not len(public):
        raise ConfigError("Public embeddings must be a finite floating-point tensor [N, n, C].")


@torch.no_grad()
def encode_batches(
    text: TextSide, prompts: Sequence[str], label: str, options: CalibrationOptions
) -> Iterator[torch.Tensor]:
    """[B, length, C] rows of public prompts, in batches (their rounding may depend on each other: they are public)."""
    use_mask = getattr(text.encoder.config, "use_attention_mask", None)
    device = text.pipe._execution_device

    def encode(some: Sequence[str]) -> torch.Tensor:
        ids, masks = zip(*(text.tokenize(p) for p in some), strict=True)
        mask = torch.stack(masks).to(device) if use_mask else None
        rows: torch.Tensor = text.encoder(torch.stack(ids).to(device), attention_mask=mask)[0]
        return rows.cpu()

    batches = [prompts[i : i + ENCODER_BATCH] for i in range(0, len(prompts), ENCODER_BATCH)]
    yield from options.kept.each(batches, label, encode, options.progress)


def gather_contexts(
    text: TextSide, public: Public, unit: str, grouping: str, options: CalibrationOptions
) -> tuple[PublicContexts, torch.Tensor]:
    """The contexts to fit to, and the exact public rows [p, C] that stand beside each of them.

    Args:
        text: the pipeline's text side.
        public: prompts, lists of phrases, or embeddings [N, n, C].
        unit: what one neighbouring step replaces.
        grouping: how units are encoded.
        options: memory, seed and progress.

    Raises:
        ConfigError: a wrong type or shape.
    """
    if unit == "group" and (grouping != "phrases" or isinstance(public, torch.Tensor)):
        raise ConfigError(
            "A calibration of anchors for unit='group' takes prompts that are split into phrases, or lists of phrases (grouping='phrases')."
        )
    if grouping not in GROUPINGS[unit]:
        raise ConfigError(
            f"grouping={grouping!r} does not go with unit={unit!r}; expected one of {GROUPINGS[unit]}."
        )
    if isinstance(public, torch.Tensor):
        chosen = choose_contexts(public, 2 * public[0].numel(), options.memory_mb, options.seed)
        whole = torch.stack(chosen).to("cpu", torch.float16)
        return equal_contexts(whole, unit), whole.new_zeros(0, whole.shape[-1]).float()
    if isinstance(public, str) or not len(public):
        raise ConfigError(
            "public_contexts must be a list of prompts (or of lists of phrases), or embeddings [N, n, C]."
        )
    text.require()
    channels = text.encode(*text.tokenize("")).shape[-1]
    chosen = choose_contexts(public, 2 * text.length * channels, options.memory_mb, options.seed)
    phrases = (
        [split_phrases(c) if isinstance(c, str) else list(c) for c in chosen] if grouping == "phrases" else []
    )
    if grouping != "phrases" and not all(isinstance(c, str) for c in chosen):
        raise ConfigError(
            "Lists of phrases need unit='group' (grouping='phrases'); else public_contexts is a list of prompts."
        )
    prompts = [c if isinstance(c, str) else ", ".join(c) for c in chosen]
    whole = torch.cat([rows.half() for rows in encode_batches(text, prompts, "encoding", options)])
    start = 1 if text.first_row_is_public else 0
    public_rows = text.encode(*text.tokenize(""))[:start].to("cpu", torch.float32)
    if grouping == "phrases":
        return _phrase_units(text, phrases, whole, options), public_rows
    return equal_contexts(whole[:, start:], unit, whole), public_rows


def _phrase_units(
    text: TextSide, phrases: Sequence[Sequence[str]], whole: torch.Tensor, options: CalibrationOptions
) -> PublicContexts:
    """One mean row per phrase; equal phrases are encoded once."""
    distinct = list(dict.fromkeys(p for group in phrases for p in group))
    start = 1 if text.first_row_is_public else 0
    means = [
        pool(rows[start:].float(), "context", None)[0].half()
        for batch in encode_batches(text, distinct, "phrases", options)
        for rows in batch
    ]
    known = dict(zip(distinct, means, strict=True))
    longest = max(len(g) for g in phrases)
    units = torch.zeros(len(phrases), longest, whole.shape[-1], dtype=torch.float16)
    mask = torch.zeros(len(phrases), longest, dtype=torch.bool)
    for i, group in enumerate(phrases):
        for j, phrase in enumerate(group):
            units[i, j], mask[i, j] = known[phrase], True
    return PublicContexts(units, mask, whole)


def _encode(
    text: TextSide, public: Public, options: CalibrationOptions
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(rows that a release would treat as private, whole encodings) of the public contexts."""
    if isinstance(public, torch.Tensor):
        return list(public), list(public)
    if isinstance(public, str) or not len(public) or not all(isinstance(t, str) for t in public):
        raise ConfigError("public_contexts must be a list of prompts or a tensor of embeddings [N, n, C].")
    texts = [t for t in public if isinstance(t, str)]
    whole = list(
        options.kept.each(texts, "encoding", lambda t: text.encode(*text.tokenize(t)), options.progress)
    )
    return [rows[1:] if text.first_row_is_public else rows for rows in whole], whole


@contextmanager
def _capture(
    layers: Iterable[AttentionLayer], per_step: int, seed: int
) -> Iterator[list[list[torch.Tensor]]]:
    """Collects `per_step` queries a call from each layer's `to_q`."""
    gen = torch.Generator().manual_seed(seed)
    hooks, store = [], []
    for layer in layers:
        attn = layer.module
        seen: list[torch.Tensor] = []

        def hook(
            module: Any, args: Any, output: torch.Tensor, attn: Any = attn, seen: list[torch.Tensor] = seen
        ) -> None:
            query = split_heads(output, attn.heads)
            if attn.norm_q is not None:
                query = attn.norm_q(query)
            index = torch.randperm(query.shape[2], generator=gen)[:per_step].to(query.device)
            seen.append(query[:, :, index].transpose(0, 1).flatten(1, 2).to("cpu", torch.float32))

        hooks.append(attn.to_q.register_forward_hook(hook))
        store.append(seen)
    try:
        yield store
    finally:
        for h in hooks:
            h.remove()


@torch.no_grad()
def public_queries(
    pipe: Any,
    layers: dict[str, AttentionLayer],
    text: TextSide,
    embeddings: torch.Tensor,
    options: CalibrationOptions,
) -> list[torch.Tensor]:
    """Queries [H, m, d] of each layer along public denoising runs (guided, from noise), with a scheduler of our own.

    Args:
        pipe: the pipeline.
        layers: its UNet's cross-attention layers.
        text: its text side.
        embeddings: public ones [B, n, C], one run for each.
        options: query_steps (by default 6, on a large host 4), queries_per_step, seed and progress.
    """
    steps = (
        (4 if is_large(row_flops(layers.values())) else 6)
        if options.query_steps is None
        else options.query_steps
    )
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    device, unet = pipe._execution_device, pipe.unet
    scheduler.set_timesteps(steps, device=device)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    gen = torch.Generator().manual_seed(options.seed)
    shape = (len(embeddings), pipe.vae.config.latent_channels, height, width)
    sample = torch.randn(shape, generator=gen).to(device, unet.dtype) * scheduler.init_noise_sigma
    if text.available and embeddings.shape[1] == text.length:
        empty = text.encode(*text.tokenize("")).unsqueeze(0).expand_as(embeddings)
    else:
        empty = torch.zeros_like(embeddings)
    both = torch.cat([empty, embeddings]).to(device, unet.dtype)
    with _capture(layers.values(), options.queries_per_step, options.seed) as store:
        for t in options.progress.track(scheduler.timesteps, "public queries", steps):
            model_input = scheduler.scale_model_input(torch.cat([sample, sample]), t)
            if unet.config.in_channels != model_input.shape[1]:  # inpainting: an empty mask and image
                extra = unet.config.in_channels - model_input.shape[1]
                model_input = torch.cat(
                    [model_input, model_input.new_zeros(model_input.shape[0], extra, height, width)], 1
                )
            uncond, cond = unet(model_input, t, encoder_hidden_states=both).sample.chunk(2)
            sample = scheduler.step(uncond + 3.0 * (cond - uncond), t, sample).prev_sample
    # the unconditional half of each call comes from the empty prompt: its queries are as public as the others
    return [torch.cat(seen, dim=1) for seen in store]
