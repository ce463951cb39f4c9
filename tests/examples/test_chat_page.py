"""The page of a language model: a prompt is released once at each epsilon, and nothing of it is in what is shown of the release."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
pytest.importorskip("gradio", reason="pip install hf_dp_xattn[app]")
if not (ROOT / "examples/chat/model").is_dir():
    pytest.skip("this checkout lacks examples/chat/model", allow_module_level=True)

SYSTEM = "the name of the assistant here is emma .\nthe code is 1 2 3 4 5 6 ."
QUESTION = "tell me about cat"


@pytest.fixture(scope="module")
def studio() -> Any:
    from app.chat_studio import ChatStudio
    from transformers import pipeline

    chat = pipeline("text-generation", model=str(ROOT / "examples/chat/model"), dtype=torch.float32)
    public = [
        f"the name of the assistant here is {name} .\nrule : every reply opens with the word {word} ."
        for name, word in (("emma", "hey"), ("bob", "sure"))
    ]
    config = dpx.DPXAttnConfig(mechanism="library", unit="group")
    library = dpx.calibrate(chat, public, config, grouping="lines", epsilons=[4.0, 16.0], progress=False)
    return ChatStudio(chat, library, 24.0, new_tokens=8)


def test_a_release_is_made_once_and_what_was_spent_adds_up(studio: Any) -> None:
    studio.reset()
    first = studio.answer(SYSTEM, QUESTION, 16.0)
    assert not first.again and (first.spent, first.releases) == (16.0, 1)
    assert set(first.texts) <= set(studio.library.texts) and len(first.texts) == 2
    again = studio.answer(SYSTEM, "what is the code", 16.0)
    assert again.again and again.texts == first.texts and again.spent == 16.0
    other = studio.answer(SYSTEM, QUESTION, 4.0)
    assert (other.spent, other.releases) == (20.0, 2)
    with pytest.raises(dpx.BudgetExceededError):
        studio.answer(SYSTEM + " ", QUESTION, 5.0)  # the same text; 25 in all
    assert studio.answer(SYSTEM, QUESTION, 4.0).spent == 20.0
    assert studio.chat.model.generate is not None and dpx.handle_of(studio.chat) is None


def test_empty_words_spend_nothing(studio: Any) -> None:
    studio.reset()
    for given in ((" ", QUESTION), (SYSTEM, "")):
        with pytest.raises(dpx.ContextError):
            studio.answer(*given, 16.0)
    assert studio._ledger.entries() == ()


def test_what_is_shown_of_a_release_is_public(studio: Any) -> None:
    from app import chat_page

    studio.reset()
    found = studio.answer(SYSTEM, QUESTION, 16.0)
    shown = chat_page.spending(found, "group") + chat_page.report(found)
    shown += chat_page.replies(found).split("Without protection")[1]
    assert "1 2 3 4 5 6" not in shown and found.texts[0] in shown and "ε = 16" in shown
    assert chat_page.build_chat(studio) is not None
