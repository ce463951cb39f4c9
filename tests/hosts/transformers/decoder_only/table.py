"""The part of docs/hosts.md on decoder-only models, from what the probe finds (`encoder_decoder/table.py` writes the page)."""

from __future__ import annotations

from typing import Any

from hf_dp_xattn.errors import UnsupportedModelError
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_layers import PrefixLayer
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_probing import find_layers, position_limit

from .tiny import BUILDERS, REFUSED, tiny

HEAD = """
## Decoder-only models of transformers

A private prefix (a system prompt, documents, examples) is released once; the user's own tokens and a public head (BOS, the chat
template's fixed words) are attended exactly, under one softmax with the release. Supported is what a probe proves: the model's logits
must stay the same after its first tokens were taken away and are read from their keys and values alone; of a few tokens, and of several
hundred, beyond every number in its configuration that may be a length (a window, a block, a number of kept tokens) as far as a second of
computing reaches. A model whose attention changes there is refused. A length that is named and not reached is a limit, as a sliding window
is: 2048 positions for `DogeForCausalLM` with its usual `keep_window_size`. Each model is tested with `none`, which gives the tokens of the
unprotected model for greedy search, beams, samples and padded batches, and with a release.

| model | an attention layer | notes |
|---|---|---|
"""
TAIL = """
Refused: {refused} (attention in code of their own, attention sinks, recurrent layers, rotary embeddings that change with the length).

`release = protected.release(ids, public_head=h)` takes token ids; `dpx.split_chat(tokenizer, messages)` finds the head, the private
system prompt and the public rest by the tokenizer's own chat template. Only the first message is private: later system or developer
messages, and the template's `tools` and `documents`, are refused until `public_system=True` declares them public. A template that puts the
system prompt into the last turn (Mistral's older ones) serves conversations of one turn only.

`protected.release(segments, groups="segments", public_head=head)` with `unit="group"` runs each segment by itself, after the head and at
positions that start behind it (parallel context windows), so the guarantee for one segment is real end to end. Tokens of one sequence
know of those before them: `unit="row"` protects one position's keys and values, `unit="context"` the whole prefix.

The user's tokens start behind the head and the prefix's padded length, which is public: the next multiple of 64, or `prefix_bucket`.
What is released: keys and values of all layers together, as attention sees them, after rotary embedding (`kernel_sum`, `dptree`); or rows
of context space, one position's keys and values of all layers side by side (`anchors`).

What works: `generate(**release.inputs(input_ids=ids, attention_mask=mask))` with greedy search, beams, sampling,
`num_return_sequences`, left padding, streamers, and several turns (all tokens so far, or the returned cache and the new ones); direct
calls `model(**release.inputs(input_ids=ids))`; batches with one release or one for each element. Where `release.inputs` is given no
attention_mask it leaves pads out as the unprotected `generate` does: if the model has a pad token that is none of its end tokens.

`torch.compile(model)` and `model.compile()` run with graph breaks: the gate is never traced, and replies are those of the plain call. With
`fullgraph=True` torch raises its own error (`Unsupported`) instead. Weights that accelerate offloads (`cpu_offload`, before or after
`dpx.protect`) work as well; their check below then costs a short run at each use. A calibration needs the weights loaded. The
`text-generation` pipeline works inside `protected.public()` only: it gives `generate` no release.

Calibrations: `dpx.calibrate(model, prefixes, config, public_head=..., questions=...)` with public token ids, or lists of segments for
unit="group", and public questions. With `replies=4` the decoder of `anchors` is trained on what the model itself replies to four public
questions behind each public prefix, and not on its attention alone, and plans are chosen by that: each step then runs the model forwards
and backwards, and it decides how much of a behaviour is left (the chat example).

LoRA through PEFT (`model.add_adapter`): an adapter takes part in what is released. A release holds keys and values of the weights that it
was made with, so that a later change of them is refused (`ReleaseError`), until it is undone or the prefix is released anew. A step of
torch's optimisers shows at the next forward; what is written past torch's own count (an EMA that is copied in, `.data`) at the next
`release`, `inputs` or `generate`, where all weights are summed. A cast is no such change: releases and calibrations of float32 serve a
bfloat16 or float16 model, and the other way round. What tells the two apart are
keys and values of 16 fixed public tokens. In layer l (from 1) they may move by 4 u sqrt(l), where u is the roundoff of the coarser dtype
(2^-8 for bfloat16, 2^-11 for all others): 1.6 % in layer 1 and 6.3 % in layer 16 for bfloat16, an eighth of that for float16; the trained
chat model moves by less than half as much. An adapter that moves no layer further than this is not noticed. Where dtypes differ and a layer
moves further, the error names both dtypes beside the adapter.

What is refused: assisted decoding and prompt lookup, static, offloaded and paged caches (`generate_batch`), compiled generation
(`compile_config`), prefill in chunks, `use_cache=False`, guidance, positions (`position_ids`) or caches made elsewhere, a call without a
release, gradient checkpointing in training, PEFT's prompt learning (LoRA is supported), models that read pictures or sounds as well, and
going beyond a sliding window or a table of learned positions.

Not supported: to go on with a cache that `generate` returned (for a further turn call `release.inputs` with all token ids of the
conversation), and a batch of prefixes whose heads and padded lengths differ (release them with the same `public_head` and
`prefix_bucket`, or call the model once for each).

The prefix is not among `input_ids`. What a setting of `generate` says of all tokens so far it says of the user's own tokens and the reply:
`max_length` and `min_length` do not count the prefix (`max_new_tokens` and `min_new_tokens` mean what they do elsewhere), and for
`repetition_penalty`, `no_repeat_ngram_size` and logits processors of your own no word of the prefix is a repetition. A model warns once.
"""


def _notes(model: Any, layer: PrefixLayer) -> str:
    notes = []
    if layer.query_heads != layer.heads:
        notes.append("query heads share key heads")
    if layer.key_dim != layer.value_dim:
        notes.append("values narrower than keys")
    if layer.softcap is not None:
        notes.append("capped logits: `kernel_sum` and `dptree` ignore the cap")
    limit = position_limit(model)
    if limit is not None:
        sliding = model.config.get_text_config().to_dict().get("sliding_window") is not None
        kind = "within its sliding window" if sliding else "within its learned positions"
        notes.append(f"{kind} only")
    return "; ".join(notes)


def _row(name: str) -> str:
    model = tiny(name)
    where, layer = next(iter(find_layers(model).items()))
    return f"| {type(model).__name__} | `{where}` | {_notes(model, layer)} |"


def _refused(name: str) -> str:
    model = tiny(name)
    try:
        find_layers(model)
    except UnsupportedModelError:
        return f"`{type(model).__name__}`" + (" with dynamic rotation" if name == "llama_dynamic" else "")
    raise AssertionError(f"{name} is not refused any more")


def section() -> str:
    rows = "\n".join(dict.fromkeys(_row(name) for name in BUILDERS))
    return HEAD + rows + "\n" + TAIL.format(refused=", ".join(_refused(name) for name in REFUSED))
