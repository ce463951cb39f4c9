"""The part of docs/hosts.md on models whose text reads an image; `tests/hosts/transformers/encoder_decoder/table.py` writes the page."""

from __future__ import annotations

from hf_dp_xattn.hosts.transformers.mllama.mllama_probing import find_layers

from .tiny import tiny

SECTION = """
## Mllama (Llama 3.2 Vision): a private image

The image is the private context, the text is public. The same probe as for encoder-decoder models, with the projected output of the vision
model in the encoder's place; the vision model runs for a release only, and the text model receives a placeholder.

| model | context | a cross-attention layer | notes |
|---|---|---|---|
| {title} | pictures | `{where}` | query heads share key heads; keys are normalised |

`release = protected.release(pixel_values=..., aspect_ratio_ids=..., aspect_ratio_mask=...)`, then
`model.generate(**release.inputs(input_ids=ids, attention_mask=mask, cross_attention_mask=seen))`; one release serves any number of texts.
`model.generate(**processor(images=..., text=...))` releases on the way. All mechanisms; `dpx.calibrate(model, images, config)` with public
images of one number of tiles, for unit="row" or "context". Greedy search, beams, sampling, `num_return_sequences`, left padding,
`labels`; text alone runs as ever.

A row is one patch of a tile after the vision model and its projection. The vision model mixes the patches of all tiles, so `unit="row"`
protects no patch of the picture; `unit="context"` protects the image. The aspect ratio is public: which tiles are padding follows from it,
and their rows are left out. All tokens that see the image read the whole release. Tokens before the image see no tile; transformers lets
those attend to every row, padding too, and so does `mechanism="none"`; with a release they read it as all others do. Without a
`cross_attention_mask` (the processor gives one) every token reads the release; sdpa of transformers 5.23 then takes these layers of the
unprotected model for causal ones, eager attention does not.

Refused: several images for one text, masks that show tokens different tiles, public images beside a private one, assisted decoding and
prompt lookup, static caches and compiled generation, prefill in chunks, caches made elsewhere.
"""


def section() -> str:
    model = tiny()
    where = next(iter(find_layers(model)))
    return SECTION.format(title=type(model).__name__, where=where)
