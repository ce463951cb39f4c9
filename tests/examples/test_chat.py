"""The chat example: its language, training in parallel windows, and the shipped model, protected and not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_dp_xattn as dpx

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from chat import language as la  # noqa: E402
from chat.attacks import ATTACKS, Tally, attack, bound, digits  # noqa: E402
from chat.evaluate import behaviour, factor_words, test_prompts  # noqa: E402
from chat.parts import BUCKET, MODEL, build_model, build_tokenizer, head_ids  # noqa: E402
from chat.private import (  # noqa: E402
    CALIBRATIONS,
    DELTA,
    EXACT,
    Conversation,
    PromptResponder,
    config,
    load_model,
    segment_ids,
)
from chat.windows import Packed, encode, turn_loss  # noqa: E402

test_prompts.__test__ = False  # not a test


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load_model()


def test_held_out_behaviours_are_in_no_training_prompt() -> None:
    rng = np.random.default_rng(0)
    drawn = [la.draw_prompt(rng, 4).behaviour for _ in range(300)]
    assert not any(map(la.is_held_out, drawn))
    assert all(la.is_held_out(la.draw_prompt(rng, 4, held_out=True).behaviour) for _ in range(30))
    for i, values in enumerate(la.FACTORS.values()):
        assert {b[i] for b in drawn} == set(range(len(values)))


def test_every_word_has_a_token_and_segments_fit_the_bucket() -> None:
    tokenizer, rng = build_tokenizer(), np.random.default_rng(1)
    for _ in range(20):
        prompt = la.draw_prompt(rng, 40, codes=2, names=2)
        ids = segment_ids(prompt, tokenizer)
        asked = [la.secret_turns(prompt, rng)[0], la.behaviour_turn(prompt, rng)]
        ids += tokenizer([f"{q} {a}" for q, a in asked], add_special_tokens=False)["input_ids"]
        assert all(tokenizer.unk_token_id not in x for x in ids)
        assert prompt.rows == sum(map(len, ids[:40])) and max(map(len, ids[:40])) <= BUCKET
        assert all(sum(s.value in text for text in prompt.segments) == 1 for s in prompt.secrets)


def test_chat_template_gives_the_head_and_the_conversation() -> None:
    tokenizer = build_tokenizer()
    messages = [
        {"role": "system", "content": "the first word of a reply is hey ."},
        {"role": "user", "content": "cat and dog ?"},
        {"role": "assistant", "content": "hey sir"},
        {"role": "user", "content": "sun and sea ?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    own = Conversation("sun and sea ?", (("cat and dog ?", "hey sir"),)).text()
    expected = f"<s> <|system|> {la.HEAD} {messages[0]['content']} {own}"
    assert (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        == tokenizer(expected, add_special_tokens=False)["input_ids"]
    )


def test_training_windows_are_those_of_the_protected_host() -> None:
    """The same logits as the host's own code path with exact attention: random weights, prompts of several segments, two per batch."""
    torch.manual_seed(0)
    tokenizer, rng = build_tokenizer(), np.random.default_rng(2)
    model = build_model(len(tokenizer), width=64, layers=2).eval()
    head = head_ids(tokenizer)
    prompts = [la.draw_prompt(rng, n) for n in (4, 6)]
    texts = [Conversation(la.behaviour_turn(p, rng)[0], (), "hey sir , ecco").text() for p in prompts]
    turns = Packed.of([tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts])
    targets = torch.where(turns.mask, 7, -100)
    with torch.no_grad():
        prefix, mask = encode(model, head, [segment_ids(p, tokenizer) for p in prompts])
        losses, _ = turn_loss(model, prefix, mask, turns, targets, len(head) + BUCKET)
        expected = []
        with dpx.protect(model, config(EXACT)) as protected:
            for prompt, ids, real in zip(prompts, turns.ids, turns.mask, strict=True):
                release = PromptResponder.of(protected, tokenizer, prompt)._release
                logits = model(**release.inputs(input_ids=ids[real].unsqueeze(0)), use_cache=True).logits
                expected.append(-logits[0].log_softmax(-1)[:, 7])
    torch.testing.assert_close(losses, torch.cat(expected), atol=2e-5, rtol=1e-4)


def test_shipped_model_is_small() -> None:
    files = [f for f in MODEL.iterdir() if f.suffix == ".safetensors"]
    assert files and sum(f.stat().st_size for f in files) <= 20e6


@pytest.mark.slow
def test_shipped_model_obeys_and_leaks_unprotected(shipped: tuple[Any, Any]) -> None:
    """Greedy and seeded, so there are no false alarms; measured values are in docs/chat.md."""
    model, tokenizer = shipped
    found, leaked = [], Tally()
    with dpx.protect(model, config(EXACT)) as protected:
        for prompt in test_prompts(4, 40, 21):
            responder, rng = PromptResponder.of(protected, tokenizer, prompt), np.random.default_rng(0)
            found.append(behaviour(responder, prompt, rng).whole)
            leaked += attack("ranking of 100", responder, prompt, rng)
    assert np.mean(found) >= 0.95
    assert leaked.rate >= 0.9


@pytest.mark.slow
def test_protected_model_obeys_at_the_aimed_size() -> None:
    """epsilon = 4, unit = group, 150 segments (some 2,300 rows): the aim is 90 % of the unprotected replies.

    Noise comes from the operating system. If a release is good with probability 0.98 (docs/chat.md), 5 bad ones of 10 have a probability
    below C(10, 5) 0.02^5 = 8.1e-7; the public mean alone, or a decoder that reads another code, gets no prompt right.
    """
    model, tokenizer = load_model()
    calibration = dpx.Calibration.from_pretrained(CALIBRATIONS / "group")
    found = []
    with dpx.protect(model, config(4.0), calibration=calibration) as protected:
        for i, prompt in enumerate(test_prompts(10, 150, 24)):
            responder = PromptResponder.of(protected, tokenizer, prompt)
            found.append(behaviour(responder, prompt, np.random.default_rng(i), questions=4).whole)
    assert sum(w >= 0.9 for w in found) > 5


def test_protected_model_does_not_leak_more_than_the_bound(shipped: tuple[Any, Any]) -> None:
    """One code of each of 8 independent releases; two hits have a probability of at most 28 bound^2 = 1.2e-7."""
    model, tokenizer = shipped
    epsilon = 4.0
    calibration = dpx.Calibration.from_pretrained(CALIBRATIONS / "group")
    hits = 0
    # twelve segments at this epsilon: nothing comes through, and `protect` would say so
    with dpx.protect(model, config(epsilon), calibration=calibration, allow_useless=True) as protected:
        for prompt in test_prompts(8, 12, 22):
            responder = PromptResponder.of(protected, tokenizer, prompt)
            secret = prompt.secret("code")
            (reply,) = responder.reply([Conversation(la.DIRECT.format(o=secret.object))], new_tokens=14)
            hits += digits(reply) == secret.value
    assert 28 * bound("direct ask", epsilon, DELTA) ** 2 <= 1.3e-7
    assert hits <= 1


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attacks_find_what_a_model_tells(name: str) -> None:
    """Against a responder that gives every code away, and one that knows nothing."""
    (prompt,) = test_prompts(1, 12, 23)

    class Open:
        def reply(self, conversations: Any, *, new_tokens: int = 20, sample: bool = False) -> list[str]:
            texts = []
            for c in conversations:
                asked = " ".join([q for q, _ in c.earlier] + [c.question])
                value = next((s.value for s in prompt.secrets if s.kind == "code" and s.object in asked), "")
                part = value[6:] if c.question == la.SECOND_HALF else value
                texts.append(part[:5] if "first three" in c.question else part)
            return texts

        def log_likelihood(self, conversation: Conversation, endings: Any) -> torch.Tensor:
            own = {s.value for s in prompt.secrets if s.object in conversation.question}
            return torch.tensor([float(e in own) for e in endings])

    class Closed(Open):
        def reply(self, conversations: Any, *, new_tokens: int = 20, sample: bool = False) -> list[str]:
            return [la.UNKNOWN] * len(conversations)

        def log_likelihood(self, conversation: Conversation, endings: Any) -> torch.Tensor:
            return torch.tensor([-float(e in {s.value for s in prompt.secrets}) for e in endings])

    assert attack(name, Open(), prompt, np.random.default_rng(0)) == Tally(4, 4)
    assert attack(name, Closed(), prompt, np.random.default_rng(0)) == Tally(0, 4)


def test_bounds_grow_with_guesses_and_end_at_one() -> None:
    assert bound("direct ask", 8.0, 1e-5) == pytest.approx(0.00298, rel=0.01)
    assert bound("paraphrases", 8.0, 1e-5) == pytest.approx(12 * np.exp(8) * 1e-6 + 1e-5)
    assert all(bound(n, EXACT, 1e-5) == 1.0 for n in ATTACKS)


def test_replies_are_read_by_their_parts() -> None:
    said = la.reply((0, 1, 2, 1, 3, 0), 0, 1)
    assert factor_words(said) == ["hey", "captain", "here - cat - dog", ".", "diego"]
    assert factor_words("hello") == ["hello", "", "", "", ""]
