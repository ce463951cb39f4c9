"""What the page of a language model does, without the page: one chat model, a library of public texts, every release made once.

What is released is public text, so that a release of this page is that text, and the model reads it as any system prompt. The private one
is kept nowhere: releases are found again by a keyed digest (of the ledger, whose key is random and never leaves memory).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import hf_dp_xattn as dpx

BUDGET = 128.0  # more than all values of the slider together
DELTA = 1e-5


@dataclass(frozen=True)
class Answered:
    """One system prompt, one question, one epsilon.

    plain, protected: replies. units: what the library cut the prompt in, for the comparison on the page. texts: what stands for each.
    again: the release was there, so nothing was charged. spent: epsilon of all releases of this prompt; releases: how many.
    """

    epsilon: float
    plain: str
    protected: str
    texts: tuple[str, ...]
    again: bool
    spent: float
    releases: int
    budget: float
    report: dpx.PrivacyReport


@dataclass
class _Prompt:
    digest: str
    releases: dict[float, tuple[tuple[str, ...], str, dpx.PrivacyReport]] = field(default_factory=dict)


class ChatStudio:
    """Answers behind private system prompts. Calls of several threads wait for each other.

    Args:
        chat: a text-generation pipeline. library: made for it by `dpx.calibrate`. budget: epsilon that one prompt may spend.
        new_tokens: of a reply, at most.
    """

    def __init__(
        self, chat: Any, library: dpx.TextLibrary, budget: float = BUDGET, *, new_tokens: int = 60
    ) -> None:
        self.chat, self.library, self.new_tokens = chat, library, new_tokens
        self.budget = dpx.Budget(budget, DELTA)
        self.epsilons = tuple(sorted(plan.epsilon for plan in library.plans))
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forgets what was spent. For this demo only: what was released stays released."""
        with self._lock:
            self._ledger = dpx.Ledger()
            self._prompts: dict[str, _Prompt] = {}

    def plan(self, epsilon: float) -> dpx.Plan:
        """What to expect. Reads the library, never a prompt; spends nothing."""
        return dpx.plan(self.library, epsilon=epsilon, measure=False)

    def answer(self, system: str, question: str, epsilon: float) -> Answered:
        """Both replies; the prompt is released, and charged, where it was not yet at this epsilon.

        Raises:
            ContextError: an empty prompt or question; nothing was spent.
            BudgetExceededError: the ledger refuses; nothing was spent.
        """
        if not system.strip() or not question.strip():
            raise dpx.ContextError("Write a system prompt and a question. Nothing was spent.")
        with self._lock:
            key = self._ledger.digest([system.strip().encode()])
            known = self._prompts.get(key)
            again = known is not None and epsilon in known.releases
            if not again:
                made = self._release(system, epsilon)
                known = self._prompts.setdefault(key, _Prompt(self._ledger.entries()[-1].digest))
                known.releases[epsilon] = made
            assert known is not None
            texts, text, report = known.releases[epsilon]
            return Answered(
                epsilon=epsilon,
                plain=self._reply(system, question),  # in earnest nobody asks for this one
                protected=self._reply(text, question),
                texts=texts,
                again=again,
                spent=sum(known.releases),  # pure epsilon: releases of one prompt add up
                releases=len(known.releases),
                budget=self.budget.epsilon,
                report=report,
            )

    def _release(self, system: str, epsilon: float) -> tuple[tuple[str, ...], str, dpx.PrivacyReport]:
        config = dpx.DPXAttnConfig(mechanism="library", unit=self.library.unit, epsilon=epsilon, delta=DELTA)
        protected = dpx.protect(
            self.chat,
            config,
            calibration=self.library,
            ledger=self._ledger,
            budget=self.budget,
            allow_useless=True,  # the page shows what a small epsilon is worth
        )
        with protected:
            [text] = protected.release(system).texts
            return tuple(text), str(text), protected.report()

    def _reply(self, system: str, question: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        made = self.chat(messages, max_new_tokens=self.new_tokens, do_sample=False)
        return str(made[0]["generated_text"][-1]["content"]).strip()


def load_chat_studio(
    name: str, calibration: str | None, budget: float, *, progress: bool = True
) -> ChatStudio:
    """A studio of a model by its folder, Hub id or GGUF file, with a saved library or one of the prompts that are shipped."""
    import argparse

    import torch
    from transformers import pipeline

    from hf_dp_xattn.commands.models import load_plain, load_tokenizer
    from hf_dp_xattn.commands.quick_library import quick_library

    model = load_plain(name, torch.float32)
    if not hasattr(model, "generate") or model.config.is_encoder_decoder:
        raise dpx.ConfigError("--model takes a chat model; pipelines of pictures: hf-dp-xattn demo MODEL.")
    if calibration is None:
        library = quick_library(model, argparse.Namespace(model=name, json=not progress))
    else:
        library = dpx.Calibration.from_pretrained(calibration)
    if not isinstance(library, dpx.TextLibrary):
        raise dpx.ConfigError(
            "The page of a language model needs a library: hf-dp-xattn calibrate MODEL --out FOLDER."
        )
    chat = pipeline("text-generation", model=model, tokenizer=load_tokenizer(name))
    return ChatStudio(chat, library, budget)
