"""Extraction attacks on the codes of a system prompt, their success rates, and what (epsilon, delta) allows.

Every attack sees a `Responder` only and ends in guesses for a code that stands in one segment; it succeeds if one of them is right.

*Bound.* The code is uniform over 10^6 values and stands in one unit (a group): with one guess `guess_bound(epsilon, delta, 10^-6)`.
With k guesses: for each value x, P_x(x among the guesses) <= e^epsilon Q(x among the guesses) + delta, for the law Q of the release with
any fixed other value in the unit's place (replace_one). Over x, the Q-probabilities sum to at most k, so the success is at most
k e^epsilon 10^-6 + delta. An attacker who ranks m candidates, the true one among them, has the prior 1 / m.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from chat.language import (
    CODE_QUESTIONS,
    DIRECT,
    FIRST_HALF,
    QUESTIONS,
    SECOND_HALF,
    THINGS,
    UNSEEN_CODE_QUESTIONS,
    Secret,
    SystemPrompt,
    draw_value,
    two_things,
)
from chat.private import Conversation, Responder
from hf_dp_xattn.privacy.guessing import guess_bound

PRIOR = 1e-6
SAMPLES = 16
CANDIDATES = 100
CODES = 4  # of a test prompt, in a segment each


@dataclass(frozen=True)
class Tally:
    """Successes among trials; a trial is one code of one release."""

    hits: int = 0
    trials: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.hits + other.hits, self.trials + other.trials)

    @property
    def rate(self) -> float:
        return self.hits / max(1, self.trials)

    def interval(self, z: float = 1.959964) -> tuple[float, float]:
        """Wilson's score interval, 95 %."""
        n, p = max(1, self.trials), self.rate
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - reach), min(1.0, centre + reach)


def digits(text: str, count: int = 6) -> str:
    """The first `count` digits of a reply, as a secret's value is written; "" if there are fewer."""
    found = [c for c in text if c.isdigit()][:count]
    return " ".join(found) if len(found) == count else ""


def _ask(
    responder: Responder, secrets: list[Secret], questions: tuple[str, ...], *, sample: bool = False
) -> list[bool]:
    asked = [Conversation(q.format(o=s.object)) for s in secrets for q in questions]
    replies = responder.reply(asked, new_tokens=14, sample=sample)
    k = len(questions)
    return [any(digits(r) == s.value for r in replies[i * k : (i + 1) * k]) for i, s in enumerate(secrets)]


def direct(responder: Responder, secrets: list[Secret], rng: np.random.Generator) -> list[bool]:
    return _ask(responder, secrets, (DIRECT,))


def paraphrases(responder: Responder, secrets: list[Secret], rng: np.random.Generator) -> list[bool]:
    """Every wording, those of no training among them: as many guesses."""
    return _ask(responder, secrets, CODE_QUESTIONS[1:] + UNSEEN_CODE_QUESTIONS)


def samples(responder: Responder, secrets: list[Secret], rng: np.random.Generator) -> list[bool]:
    return _ask(responder, secrets, (DIRECT,) * SAMPLES, sample=True)


def completion(responder: Responder, secrets: list[Secret], rng: np.random.Generator) -> list[bool]:
    """The attacker writes the beginning of the reply."""
    asked = [Conversation(DIRECT.format(o=s.object), (), s.prefix) for s in secrets]
    replies = responder.reply(asked, new_tokens=8)
    return [digits(r) == s.value for r, s in zip(replies, secrets, strict=True)]


def several_turns(responder: Responder, secrets: list[Secret], rng: np.random.Generator) -> list[bool]:
    """Small talk, then one half of the code, then the other."""
    talk = []
    for _ in secrets:
        a, b = two_things(rng)
        talk.append(str(rng.choice(QUESTIONS)).format(a=THINGS[a], b=THINGS[b]))
    asked = [Conversation(q) for q in talk]
    answers = responder.reply(asked)
    histories = [((q, a),) for q, a in zip(talk, answers, strict=True)]
    halves = []
    for question in (FIRST_HALF, SECOND_HALF):
        texts = [question.format(o=s.object) for s in secrets]
        found = responder.reply(
            [Conversation(q, h) for q, h in zip(texts, histories, strict=True)], new_tokens=10
        )
        histories = [(*h, (q, a)) for h, q, a in zip(histories, texts, found, strict=True)]
        halves.append([digits(a, 3) for a in found])
    return [f"{a} {b}" == s.value for a, b, s in zip(*halves, secrets, strict=True)]


def ranking(responder: Responder, secrets: list[Secret], rng: np.random.Generator) -> list[bool]:
    """The candidate that the model holds likeliest, among the code and others that are drawn like it."""
    hits = []
    for secret in secrets:
        candidates = {secret.value}
        while len(candidates) < CANDIDATES:
            candidates.add(draw_value("code", rng))
        listed = sorted(candidates)
        begun = Conversation(DIRECT.format(o=secret.object), (), secret.prefix)
        scores = responder.log_likelihood(begun, listed)
        hits.append(listed[int(scores.argmax())] == secret.value)
    return hits


Attack = Callable[[Responder, list[Secret], np.random.Generator], list[bool]]
ATTACKS: dict[str, tuple[Attack, float, int]] = {  # attack, prior of one guess, guesses
    "direct ask": (direct, PRIOR, 1),
    "paraphrases": (paraphrases, PRIOR, len(CODE_QUESTIONS) - 1 + len(UNSEEN_CODE_QUESTIONS)),
    "prefix completion": (completion, PRIOR, 1),
    "multi-turn": (several_turns, PRIOR, 1),
    f"best of {SAMPLES} samples": (samples, PRIOR, SAMPLES),
    f"ranking of {CANDIDATES}": (ranking, 1 / CANDIDATES, 1),
}


def attack(name: str, responder: Responder, prompt: SystemPrompt, rng: np.random.Generator) -> Tally:
    """One attack on every code of a prompt."""
    secrets = [s for s in prompt.secrets if s.kind == "code"]
    hits = ATTACKS[name][0](responder, secrets, rng)
    return Tally(sum(hits), len(hits))


def bound(name: str, epsilon: float, delta: float) -> float:
    """Largest success of an attack on a code inside ONE unit, after an (epsilon, delta)-DP release under replace_one."""
    _, prior, guesses = ATTACKS[name]
    if math.isinf(epsilon):
        return 1.0
    if guesses == 1:
        return guess_bound(epsilon, delta, prior)
    return min(1.0, guesses * math.exp(epsilon) * prior + delta)
