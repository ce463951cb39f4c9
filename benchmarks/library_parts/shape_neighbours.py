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
from shapes.evaluate import GUIDANCE, STEPS, generate, load_pipeline
from shapes.private import PUBLIC_SEED, config, generate_private, load_calibration, prompts
from shapes.reader import load_reader, score
from shapes.scenes import IMAGE_SIZE, Example, heldout_examples, phrases, train_examples
from shapes.tables import interval

import hf_dp_xattn as dpx

from .text_neighbours import token_odds

HELDOUT_SEED = SEED = 7  # the captions and noise of `library_shapes.py`
_PUBLIC = 900


def ways(epsilon: float, captions: int) -> dict[str, Callable[[], dict[str, float]]]:
    """The share of attributes right of each way, with its interval, on the first held-out captions."""
    pipeline = load_pipeline()
    examples = heldout_examples(captions, HELDOUT_SEED)
    private, public = prompts(examples, "group"), train_examples(_PUBLIC, PUBLIC_SEED)

    def responded() -> np.ndarray:
        return generate(pipeline, per_token(pipeline, private, public, epsilon), seed=SEED)

    def summed() -> np.ndarray:
        settings, images = config(epsilon, unit="group", mechanism="kernel_sum"), []
        options: dict[str, Any] = {"allow_uncalibrated": True, "allow_useless": True}
        with dpx.protect(pipeline, settings, ledger=dpx.Ledger(), **options) as protected:
            for i, caption in enumerate(private):
                release = protected.release(caption.split(", "), groups="phrases")
                images.append(
                    pipeline(
                        **release.inputs(),
                        height=IMAGE_SIZE,
                        width=IMAGE_SIZE,
                        num_inference_steps=STEPS,
                        guidance_scale=GUIDANCE,
                        generator=torch.Generator().manual_seed(SEED * 1_000_003 + i),  # as `generate` does
                        output_type="np",
                    ).images
                )
        return np.concatenate(images)

    def coded() -> np.ndarray:
        settings, calibration = config(epsilon, unit="group"), load_calibration("group")
        return generate_private(pipeline, private, settings, calibration, seed=SEED, ledger=dpx.Ledger())[0]

    drawn = {
        "per-token response": responded,
        "kernel_sum, no calibration": summed,
        "anchors": coded,
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
