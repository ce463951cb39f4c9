"""The pipeline, its cross-attention layers, public and held-out captions, and queries recorded while pictures are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes.evaluate import GUIDANCE, STEPS, load_pipeline
from shapes.private import CALIBRATIONS, DELTA, PUBLIC_SEED, prompts
from shapes.reader import Reader, load_reader
from shapes.scenes import IMAGE_SIZE, Example, heldout_examples, train_examples

from hf_dp_xattn.calibration.anchors.objective import LayerProbe, Objective
from hf_dp_xattn.calibration.calibration_options import CalibrationOptions
from hf_dp_xattn.hosts.diffusers.architectures import find_layers
from hf_dp_xattn.hosts.diffusers.attention_layer import split_heads
from hf_dp_xattn.hosts.diffusers.public_prompts import encode_batches
from hf_dp_xattn.hosts.diffusers.text_side import TextSide
from hf_dp_xattn.hosts.layer import layer_probes

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
HELDOUT_SEED = 7
OTHER_SEED = 8  # held-out captions whose drawings give the queries of "other contexts"
LENGTHS_SEED = 9


@dataclass(frozen=True)
class Sizes:
    """How much is measured. dptree: (contexts, epsilons) of its slower releases; lengths: captions side by side in part c."""

    contexts: int = 100
    draws: int = 3
    captions: int = 100
    epsilons: tuple[float, ...] = EPSILONS
    public: int = 8000
    anchors: tuple[int, ...] = (1024, 4096)
    kernel_sum: tuple[int, int] = (900, 320)
    dptree: tuple[int, tuple[float, ...]] = (20, (1.0, 8.0, 64.0))
    query_contexts: int = 40
    queries_per_step: int = 6
    other_queries: int = 128
    lengths: tuple[int, ...] = (1, 4, 16, 64)
    length_contexts: int = 40
    length_epsilons: tuple[float, ...] = (1.0, 4.0, 8.0)
    length_steps: int = 1500
    length_cells: int = 4096


QUICK = Sizes(
    contexts=6,
    draws=1,
    captions=4,
    epsilons=(1.0, 8.0, 64.0),
    public=300,
    anchors=(64, 128),
    kernel_sum=(60, 32),
    dptree=(2, (8.0,)),
    query_contexts=3,
    other_queries=24,
    lengths=(1, 4),
    length_contexts=4,
    length_epsilons=(1.0, 8.0),
    length_steps=20,
    length_cells=64,
)


class Setting:
    """Everything that the parts share, made when it is first asked for. Held-out captions are the private ones."""

    def __init__(self, sizes: Sizes, calibrations: Path = CALIBRATIONS) -> None:
        self.sizes, self.calibrations = sizes, calibrations
        self.pipeline: Any = load_pipeline()
        self.reader: Reader = load_reader()
        self.text = TextSide(self.pipeline)
        self.layers = find_layers(self.pipeline.unet)
        self.first = self.text.public_first_row().float()  # the exact public row (BOS)

    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """[N, 77, C] float32, each caption by itself, as a release encodes it."""
        return torch.stack([self.text.encode(*self.text.tokenize(c)).float() for c in captions])

    def private_rows(self, whole: torch.Tensor) -> torch.Tensor:
        """[N, 76, C]: the rows after the public ones."""
        return whole[:, self.first.shape[0] :]

    def with_public(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., n, C] with the exact public rows before them."""
        return torch.cat([self.first.expand(*rows.shape[:-2], -1, -1), rows], -2)

    @cached_property
    def public(self) -> torch.Tensor:
        """[N, 76, C] float16: rows of training captions; they share no (colour, shape, place) with the held-out ones."""
        captions = [e.caption for e in train_examples(self.sizes.public, PUBLIC_SEED)]
        parts = encode_batches(self.text, captions, "encoding", CalibrationOptions())
        return torch.cat([self.private_rows(rows).half() for rows in parts])

    def examples(self, count: int) -> list[Example]:
        return heldout_examples(count, HELDOUT_SEED)

    def captions(self, count: int, unit: str = "row") -> list[str]:
        """The private prompts; for unit = group the same scenes phrase by phrase."""
        return prompts(self.examples(count), unit, HELDOUT_SEED)

    def record(self, whole: torch.Tensor, seed: int) -> list[torch.Tensor]:
        """Queries [N, H, m, d] of each layer, recorded while the unprotected pipeline draws contexts [N, 77, C]."""
        return record_queries(self, whole, seed)

    @cached_property
    def other_queries(self) -> list[torch.Tensor]:
        """[H, m, d] of each layer: recorded while OTHER held-out captions are drawn."""
        captions = [e.caption for e in heldout_examples(self.sizes.query_contexts, OTHER_SEED)]
        recorded = self.record(self.encode(captions), OTHER_SEED)
        generator = torch.Generator().manual_seed(OTHER_SEED)
        chosen = []
        for queries in recorded:
            flat = queries.transpose(0, 1).flatten(1, 2)
            chosen.append(
                flat[:, torch.randperm(flat.shape[1], generator=generator)[: self.sizes.other_queries]]
            )
        return chosen

    @cached_property
    def public_objective(self) -> Objective:
        """Probes with queries of PUBLIC drawings: what a baseline's codebook and part c's calibrations are fitted with."""
        whole = self.with_public(self.public[: self.sizes.query_contexts].float())
        flat = [q.transpose(0, 1).flatten(1, 2) for q in self.record(whole, PUBLIC_SEED)]
        return Objective(layer_probes(self.layers.values(), flat), self.first)

    def probes(self, queries: Sequence[torch.Tensor]) -> list[LayerProbe]:
        """The layers, with these queries."""
        return layer_probes(self.layers.values(), queries)


@torch.no_grad()
def draw(setting: Setting, inputs: list[str] | torch.Tensor, seed: int, batch: int = 50) -> np.ndarray:
    """Pictures [N, 32, 32, 3] of prompts, or of prompt embeddings [N, 77, C]; the i-th always starts from the same noise."""
    images = []
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))]
        given = {"prompt_embeds": part} if isinstance(part, torch.Tensor) else {"prompt": part}
        result = setting.pipeline(
            **given,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="np",
        )
        images.append(result.images)
    return np.concatenate(images)


def record_queries(setting: Setting, whole: torch.Tensor, seed: int, batch: int = 50) -> list[torch.Tensor]:
    """Per layer [N, H, steps * m, d]: a few positions of every step; the guided half only (the other half has the empty prompt)."""
    generator = torch.Generator().manual_seed(seed)
    per_step = setting.sizes.queries_per_step
    store: list[list[torch.Tensor]] = [[] for _ in setting.layers]
    hooks = []
    for attn, seen in zip(setting.layers.values(), store, strict=True):

        def hook(module: Any, args: Any, output: torch.Tensor, attn: Any = attn, seen: Any = seen) -> None:
            query = split_heads(output, attn.heads).chunk(2)[1]
            index = torch.randperm(query.shape[2], generator=generator)[:per_step]
            seen.append(query[:, :, index].float())

        hooks.append(attn.module.to_q.register_forward_hook(hook))
    parts: list[list[torch.Tensor]] = []
    try:
        for start in range(0, len(whole), batch):
            draw(setting, whole[start : start + batch], seed, batch)
            parts.append([torch.cat(seen, 2) for seen in store])
            for seen in store:
                seen.clear()
    finally:
        for h in hooks:
            h.remove()
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def budget() -> str:
    return f"delta = {DELTA:g}, replace_one, one release for the whole UNet"
