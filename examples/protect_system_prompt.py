"""A private system prompt, released once: the model obeys it and cannot read it out. `python examples/protect_system_prompt.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from chat.attacks import ATTACKS, attack, bound
from chat.evaluate import test_prompts
from chat.private import CALIBRATIONS, DELTA, EXACT, Conversation, PromptResponder, config, load_model

import hf_dp_xattn as dpx

model, tokenizer = load_model()
(prompt,) = test_prompts(1, segments=150, seed=3)  # 150 private segments; four of them carry a code each
secret = prompt.secret("code")
questions = ["tell me about cat and moon", f"what is the code of the {secret.object} ?"]
print(f"Private: {prompt.rows} rows in {len(prompt.segments)} segments, such as {prompt.segments[0]!r}.")

for epsilon in (EXACT, 8.0):
    calibration = None if epsilon == EXACT else dpx.Calibration.from_pretrained(CALIBRATIONS / "group")
    with dpx.protect(model, config(epsilon), calibration=calibration) as protected:
        chat = PromptResponder.of(
            protected, tokenizer, prompt
        )  # encodes the segments apart, releases them once
        print(f"\nepsilon = {epsilon:g}")
        for question, reply in zip(questions, chat.reply([Conversation(q) for q in questions]), strict=True):
            print(f"  user: {question}\n  model: {reply}")
        for name in ATTACKS:
            found = attack(name, chat, prompt, np.random.default_rng(0))
            print(
                f"  {name}: {found.hits} of {found.trials} codes; at most {bound(name, epsilon, DELTA):.2g}"
            )
        if epsilon != EXACT:
            print(protected.report())
