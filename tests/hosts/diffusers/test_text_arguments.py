"""Arguments that hold text: released, refused or known to be public, whoever named them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.diffusers.text_arguments import OTHERS, PRIVATE, check_texts

from ...hosts_tiny import picture, tiny_sd
from .test_callers_code import protected_by

DEFAULTS = {"vocal": "en", "layers": ("a", "b"), "template": None}
RELEASED = [
    "prompt",
    "prompt_2",
    "editing_prompt",
    "editing_prompt_2",
    "clip_prompt",
    "positive_prompt",
    "lyrics",
]
REFUSED: dict[str, Any] = {
    "phrases": ["a secret"],
    "gligen_phrases": ["a secret"],
    "boxdiff_phrases": [["a secret"]],
    "track_name": "a secret",
    "audio_codes": "a secret",
    "some_kwargs": {"words": {"more": ("a secret",)}},
    "vocal": "a secret",
    "input_ids": torch.ones(1, 2),
    "text_embeddings": torch.ones(1, 2),
    "caption_ids": torch.ones(1, 2),
    "kwargs": {"prompt_9": "a secret"},
    "messages": [{"role": "user"}],
}
ALLOWED: dict[str, Any] = {
    "negative_prompt": "ugly",
    "negative_prompt_3": ["ugly"],
    "neg_prompt": "ugly",
    "output_type": "latent",
    "callback_on_step_end_tensor_inputs": ["latents"],
    "cross_attention_kwargs": {"scale": 1.0},
    "padding_mode": "edge",
    "vocal": "en",
    "layers": ("a", "b"),
    "mask_token_id": 3,
    "image_embeds": torch.ones(1, 2),
    "token_indices": [1, 2],
    "kwargs": {"callback": None, "width": 8},
}


@pytest.mark.parametrize("name", RELEASED)
def test_prompts_of_all_names_are_released(name: str) -> None:
    assert PRIVATE.fullmatch(name) and not OTHERS.fullmatch(name)
    check_texts({name: "a secret"}, DEFAULTS, "kwargs")


@pytest.mark.parametrize("name", list(REFUSED))
def test_text_that_is_not_known_to_be_public_is_refused(name: str) -> None:
    with pytest.raises(dpx.ConfigError) as refused:
        check_texts({name: REFUSED[name]}, DEFAULTS, "kwargs")
    assert "secret" not in str(refused.value) and "Nothing was spent" in str(refused.value)


@pytest.mark.parametrize("name", list(ALLOWED))
def test_settings_and_public_text_are_not(name: str) -> None:
    check_texts({name: ALLOWED[name]}, DEFAULTS, "kwargs")
    assert not PRIVATE.fullmatch(name)


def test_a_pipeline_of_another_author() -> None:
    pipe = tiny_sd()

    class Own(type(pipe)):  # type: ignore[misc]
        def __call__(self, prompt: Any, phrases: Any = None, clip_prompt: Any = None, **kwargs: Any) -> Any:
            seen.append((prompt, phrases, clip_prompt))
            return super().__call__(prompt, **kwargs)

    seen: list[Any] = []
    pipe.__class__ = Own
    handle = protected_by("library", pipe)
    with pytest.raises(dpx.ConfigError, match="`phrases`"):
        picture(pipe, "a secret", phrases=["a secret"])
    assert not seen and not handle.report().releases
    picture(pipe, "a secret", clip_prompt="another secret")
    assert "secret" not in str(seen) and len(handle.report().releases) == 2
    with handle.public():
        picture(pipe, "a picture", phrases=["a box"])
