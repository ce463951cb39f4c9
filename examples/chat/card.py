"""model_cards/chat.md from the numbers of `evaluate.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chat.attacks import Tally

PAGE = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
  - llama
  - synthetic
  - differential-privacy
---

# Chat: a small Llama with measurable system prompts

Written by `python examples/chat/evaluate.py --card`; its numbers are in `docs/chat/evaluation.json`.

A `LlamaForCausalLM` trained from scratch to obey a system prompt, so that the cost of protecting one can be measured: how many replies
are right, and how many of its secrets an attacker reads out. It is no assistant: it knows one form of reply and {words} words.

| part | shape | |
| --- | --- | --- |
| model | `LlamaForCausalLM`, {layers} layers, width {width}, {heads} heads of {size}, {kv} of keys and values | {parameters:.2f} M |
| tokenizer | `PreTrainedTokenizerFast`, one token a word, digits by themselves, with a chat template | {words} tokens |

The folder `examples/chat/model` is {megabytes:.1f} MB of half-precision safetensors; the examples load it in float32.

## System prompts

A public head (BOS, the system role, five fixed words), then private *segments* of 8 to 24 tokens. Most state one of six factors of a
behaviour in a rule or show all of them in an example: the language in which things are presented, opening, address, style of the list,
signature, ending; 18,000 behaviours, of which every fifth was kept from training. Some segments are facts that nothing depends on. A few
carry a secret each: a 6-digit code, or a name of three syllables (of 64,000).

Segments are encoded *apart* (parallel context windows): each attends to the head and to itself, its positions start behind the head; the
user's turns attend to everything and start 64 positions behind the head. The model was trained in this way, so a segment is a group in
the sense of `unit="group"`.

## Training

`python examples/chat/train.py`. A first part of {steps:,} steps: prompts of 3 or 4 segments with one code and one name at first, of
up to 200 segments with several later; three turns in five ask for a secret, one in five of those for one that is not there.
Attention starts from W_q = W_k and W_o ~ W_v^T (the "mimetic" initialisation, arXiv 2305.09828): from a usual initialisation no
secret was copied within 1,000 steps. A second part of {more:,} steps teaches which of several codes is asked for: prompts of 8 to
200 segments with up to four codes, and the first word of a secret weighs six times as much in the loss. Muon and AdamW.
{history}

## Unprotected, held-out behaviours

{prompts} system prompts of {segments} segments ({rows} rows), behaviours that training never saw, {asked} questions and four codes each.

| | |
| --- | --- |
| replies right in full | {whole:.1f} % |
| parts of replies right | {parts:.1f} % |
{extraction}

Intervals are 95 % (Wilson). The wordings include some that training never saw; an attack with several guesses succeeds if one is right.
What protection changes: docs/chat.md.

## Limits

Synthetic language; user turns of a few forms. What it gives away unprotected says nothing of larger models, except that a model which
can use its system prompt can usually be made to tell it.
"""


def write_card(numbers: dict[str, Any], path: Path) -> None:
    rows = []
    for name, (hits, trials) in numbers["extraction"].items():
        low, high = Tally(hits, trials).interval()
        rate = 100 * hits / trials
        rows.append(f"| codes found, {name} | {rate:.0f} % ({100 * low:.0f}-{100 * high:.0f}) |")
    history = numbers.get("history", "")
    shown = {**numbers, "history": f"\n{history}" if history else "", "extraction": "\n".join(rows)}
    path.write_text(PAGE.format(**shown))
