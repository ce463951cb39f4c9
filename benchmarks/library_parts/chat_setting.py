"""What the benchmarks of a chat model share: the model, the encoder of codes, the public library, and the held-out private prompts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from prompts.public import Prompt, prompts
from transformers import AutoModel, AutoTokenizer

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.checkpoints import NOTHING_KEPT, Checkpoints
from hf_dp_xattn.calibration.library.library_fit import LibraryOptions, build_library
from hf_dp_xattn.hosts.text.unit_encoders import unit_encoder

from .replies import Replies

CONFIG = dpx.DPXAttnConfig(mechanism="library", unit="group")


@dataclass(frozen=True)
class ChatSetting:
    """encode: texts -> codes, each by itself. private: held-out prompts of 4 to 10 segments. seconds: that the library took."""

    replies: Replies
    encode: Callable[[Sequence[str]], torch.Tensor]
    library: dpx.TextLibrary
    private: list[Prompt]
    seconds: float

    @property
    def about(self) -> dict[str, object]:
        """For a benchmark's numbers: what a run that goes on must have the same."""
        plans = {
            f"{p.epsilon:g}": [*p.described(), round(p.quality.distortion, 3)] for p in self.library.plans
        }
        return {"encoder": self.library.encoder, "texts": len(self.library.texts), "plans": plans}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat", type=Path, required=True, help="GGUF file or folder of a chat model with ChatML"
    )
    parser.add_argument(
        "--encoder", type=Path, help="folder of a sentence encoder; by default the chat model's own states"
    )
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts")
    parser.add_argument(
        "--codes", type=Path, help="folder that keeps codes, so that a run that was broken off goes on"
    )


def load(args: argparse.Namespace, epsilons: Sequence[float]) -> ChatSetting:
    replies = Replies(args.chat)
    parts = (replies.model, replies.tokenizer)
    if args.encoder:
        parts = AutoModel.from_pretrained(args.encoder).eval(), AutoTokenizer.from_pretrained(args.encoder)
    encode = unit_encoder(parts[0], parts[1], encoder=parts)
    public = [list(p.segments) for p in prompts(held_out=False)]
    options = LibraryOptions(
        epsilons=epsilons,
        grouping="segments",
        encoder=encode.name,
        kept=Checkpoints(args.codes) if args.codes else NOTHING_KEPT,
        flatten=0.0 if args.encoder else 0.5,
    )
    begun = time.time()
    library = build_library(public, encode.public, CONFIG, options)
    seconds = time.time() - begun
    private = [p for p in prompts(held_out=True) if 4 <= len(p.segments) <= 10][: args.prompts]
    return ChatSetting(replies, encode, library, private, seconds)
