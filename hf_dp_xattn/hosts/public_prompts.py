"""Calibration of `anchors` for a Stable Diffusion pipeline: public contexts encoded in bounded memory, probes of all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..calibration.anchors.anchors_calibration import GROUPINGS
from ..calibration.anchors.objective import LayerProbe
from ..calibration.anchors.slots_fit import PublicContexts, SlotSettings
from ..errors import ConfigError
from ..mechanisms.anchors.anchors import pool
from .phrases import split_phrases
from .rows import project
from .text import TextSide

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

Public = Sequence[str] | Sequence[Sequence[str]] | torch.Tensor
ENCODER_BATCH = 64
_LARGE = 5e6
_EFFORT = 1.2e13


def choose_contexts(public: Public, bytes_each: int, memory_mb: int, seed: int) -> list[Any]:
    """The public contexts to fit to: all of them, or a random subset that fits the memory; drawn before anything is encoded."""
    room = max(64, int(memory_mb * 2**20 / max(1, bytes_each)))
    if len(public) <= room:
        return list(public)
    order = torch.randperm(len(public), generator=torch.Generator().manual_seed(seed))[:room].tolist()
    return [public[i] for i in sorted(order)]


@torch.no_grad()
def encode_batches(
    text: TextSide, prompts: Sequence[str], label: str, progress: bool
) -> Iterator[torch.Tensor]:
    """[B, length, C] rows of public prompts, in batches (their rounding may depend on each other: they are public)."""
    use_mask = getattr(text.encoder.config, "use_attention_mask", None)
    device = text.pipe._execution_device
    for start in tqdm(range(0, len(prompts), ENCODER_BATCH), desc=label, disable=not progress, leave=False):
        ids, masks = zip(*(text.tokenize(p) for p in prompts[start : start + ENCODER_BATCH]), strict=True)
        mask = torch.stack(masks).to(device) if use_mask else None
        yield text.encoder(torch.stack(ids).to(device), attention_mask=mask)[0].cpu()


def gather_contexts(
    text: TextSide, public: Public, unit: str, grouping: str, *, memory_mb: int, seed: int, progress: bool
) -> tuple[PublicContexts, torch.Tensor]:
    """The contexts to fit to, and the exact public rows [p, C] that stand beside each of them.

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
        if public.ndim != 3 or not public.is_floating_point() or not bool(torch.isfinite(public).all()):
            raise ConfigError("Public embeddings must be a finite floating-point tensor [N, n, C].")
        chosen = choose_contexts(public, 2 * public[0].numel(), memory_mb, seed)
        whole = torch.stack(chosen).to("cpu", torch.float16)
        return _with_units(whole, whole, unit), whole.new_zeros(0, whole.shape[-1]).float()
    if isinstance(public, str) or not len(public):
        raise ConfigError(
            "public_contexts must be a list of prompts (or of lists of phrases), or embeddings [N, n, C]."
        )
    text.require()
    channels = text.encode(*text.tokenize("")).shape[-1]
    chosen = choose_contexts(public, 2 * text.length * channels, memory_mb, seed)
    phrases = (
        [split_phrases(c) if isinstance(c, str) else list(c) for c in chosen] if grouping == "phrases" else []
    )
    if grouping != "phrases" and not all(isinstance(c, str) for c in chosen):
        raise ConfigError(
            "Lists of phrases need unit='group' (grouping='phrases'); else public_contexts is a list of prompts."
        )
    prompts = [c if isinstance(c, str) else ", ".join(c) for c in chosen]
    whole = torch.cat([rows.half() for rows in encode_batches(text, prompts, "encoding", progress)])
    start = 1 if text.first_row_is_public else 0
    public_rows = text.encode(*text.tokenize(""))[:start].to("cpu", torch.float32)
    if grouping == "phrases":
        return _phrase_units(text, phrases, whole, progress), public_rows
    return _with_units(whole[:, start:], whole, unit), public_rows


def _with_units(rows: torch.Tensor, whole: torch.Tensor, unit: str) -> PublicContexts:
    """rows [N, n, C] private ones; a context's unit is its mean row."""
    units = (
        rows
        if unit == "row"
        else torch.stack([pool(r.float(), "context", None) for r in rows]).to(rows.dtype)
    )
    return PublicContexts(units, torch.ones(units.shape[:2], dtype=torch.bool), whole)


def _phrase_units(
    text: TextSide, phrases: Sequence[Sequence[str]], whole: torch.Tensor, progress: bool
) -> PublicContexts:
    """One mean row per phrase; equal phrases are encoded once."""
    distinct = list(dict.fromkeys(p for group in phrases for p in group))
    start = 1 if text.first_row_is_public else 0
    means = [
        pool(rows[start:].float(), "context", None)[0].half()
        for batch in encode_batches(text, distinct, "phrases", progress)
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


def _row_flops(layers: dict[str, Attention]) -> float:
    """Multiplications and additions of one row's keys and values in all layers."""
    return sum(4.0 * a.cross_attention_dim * a.inner_dim for a in layers.values())


def is_large(layers: dict[str, Attention]) -> bool:
    """Whether a training step over all layers, or a public denoising run, takes seconds rather than milliseconds."""
    return _row_flops(layers) > _LARGE


def slot_schedule(layers: dict[str, Attention], rows: int, steps: int | None, seed: int) -> SlotSettings:
    """Batches that this host can afford: large hosts get smaller batches over two layers at a time, and by default fewer steps.

    The default spends about 1.2e13 multiplications and additions, a few minutes on two cores.
    """
    usual = SlotSettings(seed=seed)
    chosen = dataclasses.replace(usual, batch=16, layers=2, slots=48) if is_large(layers) else usual
    # the exact rows pass forward once, the decoded ones forward and back
    passed = chosen.batch * (rows + 3 * chosen.slots)
    flops = passed * _row_flops(layers) * min(chosen.layers, len(layers)) / len(layers)
    affordable = max(200, min(usual.steps, int(_EFFORT / flops)))
    return dataclasses.replace(chosen, steps=affordable if steps is None else steps)


def layer_probes(
    layers: dict[str, Attention], queries: Sequence[torch.Tensor], gains: Sequence[torch.Tensor]
) -> list[LayerProbe]:
    """The layers' own projections, their public queries and gains."""
    probes = []
    for attn, query, gain in zip(layers.values(), queries, gains, strict=True):
        weight: Any = next(attn.to_k.parameters())

        def apply(
            rows: torch.Tensor, attn: Attention = attn, weight: Any = weight
        ) -> tuple[torch.Tensor, torch.Tensor]:
            key, value = project(attn, rows.to(weight.device, weight.dtype))
            return key.to("cpu", torch.float32), value.to("cpu", torch.float32)

        probes.append(LayerProbe(apply, (attn.inner_dim // attn.heads) ** -0.5, query.float(), gain.float()))
    return probes
