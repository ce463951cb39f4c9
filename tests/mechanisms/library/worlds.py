"""Small libraries over toy codes: a text's code is a point that its name gives, and no model takes part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from hf_dp_xattn.calibration.library.library_fit import LibraryOptions, build_library
from hf_dp_xattn.calibration.library.text_library import TextLibrary
from hf_dp_xattn.config import DPXAttnConfig

CHANNELS = 6
TOPICS = ("tax", "law", "sea", "sky", "war", "tea")


def encode(texts: Sequence[str]) -> torch.Tensor:
    """[n, 6]: a topic's direction, and a little of the text's own."""
    rows = []
    for text in texts:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        own = np.random.default_rng(seed).normal(size=CHANNELS) * 0.3
        rows.append([own[i] + (3.0 if topic in text else 0.0) for i, topic in enumerate(TOPICS)])
    return torch.tensor(np.array(rows), dtype=torch.float32)


def contexts(count: int = 24, length: int = 4) -> list[list[str]]:
    return [
        [f"rule {(7 * c + 3 * i) % 61} of {TOPICS[(c + i) % 6]}" for i in range(length)] for c in range(count)
    ]


def library(unit: str = "group", epsilons: Sequence[float] = (1.0, 4.0, 16.0)) -> TextLibrary:
    config = DPXAttnConfig(mechanism="library", unit=unit)
    public = contexts() if unit == "group" else [c[0] for c in contexts()]
    return build_library(
        public, encode, config, LibraryOptions(epsilons=epsilons, encoder="toy", progress=False)
    )
