"""Other ways to pictures of private phrases at the same epsilon of a phrase (replace_one), each in its plain form, for comparison only.

* *Per-token response*: as in `text_neighbours.py`, by the pipeline's own input embeddings and the tokens of public phrases.
* *kernel_sum*, without a calibration; *anchors*, with the calibration that the example ships with.

No language model takes part in a picture, so there is nothing to paraphrase with and no next token to mix (DP-Fusion).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from shapes.evaluate import generate, load_pipeline
from shapes.private import PUBLIC_SEED, config, generate_private, load_calibration, prompts
from shapes.reader import load_reader, score
from shapes.scenes import Example, heldout_examples, phrases, train_examples
from shapes.tables import interval

import hf_dp_xattn as dpx

from .text_neighbours import token_odds

HELDOUT_SEED = 7  # the captions of `library_shapes.py`
_PUBLIC = 900


def ways(epsilon: float, captions: int) -> dict[str, Callable[[], dict[str, float]]]:
    """The share of attributes right of each way, with its interval, on the first held-out captions."""
    pipeline = load_pipeline()
    examples = heldout_examples(captions, HELDOUT_SEED)
    private, public = prompts(examples, "group"), train_examples(_PUBLIC, PUBLIC_SEED)

    def responded() -> np.ndarray:
        return generate(pipeline, per_token(pipeline, private, public, epsilon), seed=7)

    def released(mechanism: str, calibration: Any) -> np.ndarray:
        settings = config(epsilon, unit="group", mechanism=mechanism)
        return generate_private(pipeline, list(private), settings, calibration, seed=7, ledger=dpx.Ledger())[
            0
        ]

    drawn = {
        "per-token response": responded,
        "kernel_sum, no calibration": lambda: released("kernel_sum", None),
        "anchors": lambda: released("anchors", load_calibration("group")),
    }
    return {name: lambda images=images: measured(images(), examples) for name, images in drawn.items()}  # type: ignore[misc]


def per_token(pipeline: Any, captions: Sequence[str], public: Sequence[Example], epsilon: float) -> list[str]:
    """Captions of which each phrase's tokens are replaced by public ones, its epsilon shared among them."""
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    rng = np.random.default_rng(0)

    def ids(phrase: str) -> torch.Tensor:
        return torch.tensor(pipeline.tokenizer(phrase, add_special_tokens=False).input_ids)

    known = [phrase for e in public for phrase in phrases(e.scene, rng)]
    vocabulary = torch.unique(torch.cat([ids(phrase) for phrase in known]))
    torch.manual_seed(0)

    def replaced(phrase: str) -> str:
        odds = token_odds(table, ids(phrase), vocabulary, epsilon)
        return str(pipeline.tokenizer.decode(vocabulary[torch.multinomial(odds, 1)[:, 0]]))

    return [", ".join(replaced(phrase) for phrase in caption.split(", ")) for caption in captions]


def measured(images: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
    scenes = [e.scene for e in examples]
    found = score(images, scenes, load_reader())
    low, high = interval(found.per_image, np.array([scene.n_attributes for scene in scenes]))
    return {"accuracy": round(found.accuracy, 4), "low": round(low, 4), "high": round(high, 4)}
