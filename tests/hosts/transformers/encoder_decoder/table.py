"""Writes docs/hosts.md from what the probe finds; a test compares the two.

`python -m tests.hosts.transformers.encoder_decoder.table > docs/hosts.md`"""

from __future__ import annotations

from typing import Any

from hf_dp_xattn.errors import UnsupportedModelError
from hf_dp_xattn.hosts.diffusers.architectures import PIPELINES
from hf_dp_xattn.hosts.transformers.encoder_decoder.cross_layers import CrossLayer
from hf_dp_xattn.hosts.transformers.encoder_decoder.cross_probing import find_layers

from ....survey.tables import section as survey_section
from ..decoder_only.table import section
from ..mllama.table import section as image_section
from .tiny import BUILDERS, REFUSED, tiny

INPUTS = {
    "input_ids": "text",
    "input_features": "speech",
    "input_values": "speech",
    "pixel_values": "pictures",
}
HEAD = """# Hosts

## diffusers

`mechanism="library"`: every pipeline with a `prompt`; those that were run stand at the end of this page, as do all language models.
The other mechanisms serve attention: {pipelines}, their `UNet2DConditionModel`, and any pipeline whose denoiser reads text by
cross-attention: SDXL and its kin, ControlNets, PixArt, Sana, Wan, LTX, Cosmos, AnimateDiff, Kandinsky 3, Lumina, Latte, ... (the table at
the end of this page). Any other is tried by its first call. The pipeline gets a public text (`"a picture"`) in the place of each private
prompt; pooled vectors, masks and token counts are made of that. The denoiser's cross-attention, and a ControlNet's, reads the release in
the place of that text's rows. What stands in for `scaled_dot_product_attention` is ours; projections, norms, rotations and gates around
it are the host's own. Before the first charge the call is tried with the public text: each layer must read, and the model must give the
numbers that it gives by itself; what does not is refused (`UnsupportedModelError`, nothing spent), and so are compiled denoisers,
slicing, `prompt_2`, arguments that change how a prompt is encoded (`clip_skip`, `clean_caption`, a `system_prompt` or template, ...),
public text beside a release, and IP-Adapters (their picture is a second context). Encoders and denoisers run in calls of the pipeline
only, and there for its own code and that of installed packages only: not for a scheduler, progress bar or callback of yours. Where a
pipeline masks or cuts a
prompt's padding, `unit="row"` with `replace_one` makes the number of its tokens public. Calibrations are made by `dpx.calibrate(pipe,
prompts, config)` for unit="row" or "context", of calls of the pipeline itself.

**Released rows.** MMDiT models (SD3, Flux, Qwen-Image, AuraFlow, CogVideoX, ...) update their text rows, so that no cross-attention could
read a release: `kernel_sum` and `dptree` are refused there by name, and so they are of any other pipeline with an `encode_prompt` whose
layers are not patched. `anchors` (unit="row" or "context", `replace_one` or what the calibration gives) works: the release is decoded to
rows, and these stand in what `encode_prompt` gives for a public text, as many as it has, each as often as its weight says. (diffusers'
joint attention takes masks of which rows count, not log weights.) Masks, text ids and lengths are the public text's. A pooled vector
(SD3, Flux) is one more row of the context, in channels of its own: released with the others, at once, under the same budget. Where
prompts have as many rows as tokens (Qwen-Image) pooled vectors would be the public text's, and unit="row" with `replace_one` makes the
number of tokens public. Nothing of the denoiser is patched. Tests of this package run the five that are named; any other is tried by its
first call, and refused where `encode_prompt` gives several sequences of rows. Before the first charge the call is run with two public
texts to its first denoising step, which must be told which one it was. A calibration is fitted to the rows and pooled vectors themselves
(their FVU: public rows ask which rows of a prompt are like them), with the fall-back of all others: the public mean, where the rows are
not known to do better.

What is set before `protect` may be set after it, with the same picture, or is refused at both:
`tests/hosts/test_order.py` tries offload, LoRA, compilation, casts, slicing, fused projections, schedulers, FreeU and IP-Adapters in both
orders. To replace a part (`pipe.unet = ...`) belongs before; after it a call is refused, and says so.

Gradient checkpointing is refused where gradients are taken, and so is a pipeline whose image processor was replaced.
`cross_attention_kwargs={{"scale": s}}` (a LoRA's scale of one call) works on the three Stable Diffusion pipelines, as `set_adapters`
does: a release fits the scale that it was made at, and a prompt drawn at another scale is released, and charged, anew.

## Encoder-decoder models of transformers

Supported is what a probe proves, not what stands in a list: `dpx.protect(model, config)` runs the model on public random numbers, finds
the modules whose attention function sees the encoder's output, and checks that the logits stay the same (with and without the cache)
after that output was replaced by NaN. Any other model is refused with `UnsupportedModelError` and left as it was. This table is what the
probe finds on a tiny model of each architecture (written by `tests/hosts/transformers/encoder_decoder/table.py`); each is tested for
every mechanism: `kernel_sum`, `anchors` (with a calibration), `dptree`, `none`.

| model | context | a cross-attention layer | notes |
|---|---|---|---|
"""
TAIL = """
Refused, because their cross-attention is computed in code of their own: {refused}. Refused too: encoders that need more than token ids
(`UdopForConditionalGeneration`: boxes), that a text changes for those after it (a `dynamic` rotation;
`BigBirdPegasusForConditionalGeneration`: a short one switches it to full attention), and
cross-attention that changes with the number of rows (probed at several hundred).

A private document in `generate` is charged when all that is public has passed: the arguments, and two steps on zeros in the document's
place (a model's forward hooks see these two, once for each release). Logits processors, criteria and streamers of your own are looked at,
not run.

What works: `generate` with greedy search, beams, sampling, `num_return_sequences`, padded batches (masked rows are no rows); the
`automatic-speech-recognition` pipeline (transformers has none left for text: its text2text, summarization and translation pipelines are
gone); `model(**release.inputs(), labels=...)`; `torch.compile` with graph breaks (`fullgraph=False`); `release.inputs(input_ids=...)` puts
a PUBLIC document beside the private one; `protected.release(**tokenizer(documents, ...), groups="documents")` with `unit="group"` encodes
each document apart (Fusion-in-Decoder), so the guarantee for one document is real end to end.

Calibrations (`anchors` needs one, `kernel_sum` gains by one): `dpx.calibrate(model, ids, config)` with public token ids [N, n] cut to one
length (long public texts in pieces), for unit="row" or "context".

What is refused: assisted decoding and prompt lookup, `encoder_no_repeat_ngram_size` and `encoder_repetition_penalty` (they read the
document past the release; where a model's own settings ask for the first, as Blenderbot's do, it is switched off and the report says
so), guidance, static caches and compiled generation (`compile_config`), caches made elsewhere, quantised projections. Of Whisper, what
reads the length of a recording or decodes it again: timestamps of segments and tokens, `return_segments`, `monitor_progress`, several
temperatures and the thresholds that go with them; cut a recording into pieces of at most the model's window. A setting of
`model.generation_config` counts beside a `generation_config` that is passed, as in transformers.
Weights that accelerate offloads are not supported here yet (nor for Mllama; pipelines and decoder-only models are): `protect` or the
release fails, and nothing is spent.

`release(ids, text=...)` (encoder-decoder and decoder-only): the text that the ids are of. It is charged as well, so that the same text
given to another model, or as a string to a pipeline, meets the same account.
"""


def _notes(model: Any, layer: CrossLayer) -> str:
    notes = []
    if layer.scale == 1.0:
        notes.append(
            "logits are not scaled" if model.config.model_type != "whisper" else "queries are scaled before"
        )
    if layer.query_heads != layer.heads:
        notes.append("query heads share key heads")
    if layer.softcap is not None:
        notes.append("capped logits: `kernel_sum` and `dptree` ignore the cap")
    if layer.padding:
        notes.append("padded heads: the padding is not released")
    if layer.bridge is not None:
        notes.append("the encoder's output is projected first (`enc_to_dec_proj`)")
    return "; ".join(notes)


def _row(name: str) -> str:
    model = tiny(name)
    where, layer = next(iter(find_layers(model).items()))
    title = type(model).__name__
    if hasattr(model.config, "decoder") and hasattr(model, "encoder"):
        parts = (type(model.encoder).__name__, type(model.decoder).__name__)
        title += f" ({' to '.join(p.removesuffix('Model').removesuffix('LMHead') for p in parts)})"
    return f"| {title} | {INPUTS[model.main_input_name]} | `{where}` | {_notes(model, layer)} |"


def _refused(name: str) -> str:
    model = tiny(name)
    try:
        find_layers(model)
    except UnsupportedModelError:
        return type(model).__name__
    raise AssertionError(f"{name} is not refused any more")


def table() -> str:
    rows = "\n".join(_row(name) for name in BUILDERS)
    pipelines = ", ".join(f"`{p}`" for p in PIPELINES)
    refused = ", ".join(f"`{_refused(name)}`" for name in REFUSED)
    encoder_decoder = HEAD.format(pipelines=pipelines) + rows + "\n" + TAIL.format(refused=refused)
    return encoder_decoder + image_section() + section() + survey_section()


if __name__ == "__main__":
    print(table(), end="")
