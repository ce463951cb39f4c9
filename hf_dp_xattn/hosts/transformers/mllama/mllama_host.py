"""`MllamaHost`: a model whose text reads an image by cross-attention (Mllama); the image is private."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ....errors import ConfigError, ProtectionLostError, ReleaseError
from ....mechanisms.rows_structure import RowsStructure
from ...context import PrivateContext
from ...host import Named, Readable
from ...host_words import HostWords, Setting, image_words
from ...tables import LayerTable
from ..encoder_decoder.cross_attention import Call
from ..encoder_decoder.encoder_decoder_host import PUBLIC_CALL, EncoderDecoderHost, one_of
from .image_contexts import (
    IMAGE_INPUTS,
    MASK,
    PIXELS,
    check_mask,
    gather,
    is_placeholder,
    name_images,
    visible_rows,
)
from .image_generation import ImageGenerateShadow
from .mllama_probing import STATES, context_channels, find_layers, vision_parts
from .vision import VisionSide

TEXT = ("input_ids", "inputs", "inputs_embeds")
CLOSED = (
    "The vision model belongs to a protected model and may not run on its own: its output would enter the text past a release. Use "
    "model.generate(...), or release = protected.release(...) and model(**release.inputs(input_ids=ids)); if this image is public, use "
    "`with protected.public():`."
)
NO_RELEASE = (
    "This model is protected and was called with an image, or with a cache of one, but without the placeholder of a release. Call "
    "model.generate(...) or pass release.inputs(input_ids=ids) at every step, or declare the image public with `with protected.public():`."
)


class MllamaHost(EncoderDecoderHost):
    """A Mllama: its text model reads images as a decoder reads documents.

    An image that `generate` is given is private: it is released once (charged to the ledger before it is encoded), and the text model
    receives a placeholder in place of the vision model's output. Every beam, sample and step reads the release. Text alone runs as ever.

    *What is public of an image*: its aspect ratio. Rows of tiles that are padding are not released. Tokens that see no tile read the
    release as those do that see all (transformers lets them attend to every row); with `mechanism="none"` exactly as in the unprotected
    model, padding included.
    """

    never_traced = "A protected Mllama is not supported under torch.compile yet."
    closed = CLOSED
    probe = staticmethod(find_layers)
    encoder_side = VisionSide
    generate_shadow = ImageGenerateShadow
    encoder: VisionSide

    @property
    def channels(self) -> int:
        return context_channels(self.model)

    # ---- a forward ---------------------------------------------------------------------------------------------------------

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Once the layers' cache is filled, the placeholder is taken out."""
        inputs = self.begin(module, args, kwargs)
        states, cached = inputs.get(STATES), self._cached(inputs.get("past_key_values"))
        call = self.read_call(states)
        if call is None:
            if self.guard.access.public:
                self.calls.current = PUBLIC_CALL
            elif states is not None or inputs.get(PIXELS) is not None or cached:
                raise ProtectionLostError(NO_RELEASE)
            return None  # text alone: the layers that read images are skipped
        if inputs.get(PIXELS) is not None:
            raise ConfigError("Pass either release.inputs() or an image, not both.")
        self.calls.current = self._follow(call, inputs)
        if cached:
            if len(cached) != len(self.cross) or not all(bool(keys.isnan().all()) for keys in cached):
                raise ReleaseError(
                    "past_key_values holds an image that was read outside of this release: start with a new cache."
                )
            inputs[STATES] = None
        return (), inputs

    def _cached(self, cache: Any) -> list[torch.Tensor]:
        """The keys that a cache holds for the layers that read images."""
        layers = getattr(cache, "layers", ())
        indices = [int(layer.module.layer_idx) for layer in self.cross.values()]  # type: ignore[arg-type]
        keys = [getattr(layers[i], "keys", None) for i in indices if i < len(layers)]
        return [k for k in keys if isinstance(k, torch.Tensor) and k.numel()]

    def _follow(self, call: Call, inputs: dict[str, Any]) -> Call:
        """The call, with what its text tokens may see.

        Raises:
            ConfigError: another number of texts than releases, or a mask that a release cannot follow.
        """
        count, length = _texts(inputs) or (len(call.index), 0)
        if count != len(call.index):
            raise ConfigError(
                f"Got {count} texts with the inputs of {len(call.index)} release(s): call release.inputs(input_ids=ids) for these texts."
            )
        mask = inputs.get(MASK)
        if mask is None:
            return call
        contexts = [call.contexts[i] for i in call.index.tolist()]
        check_mask(mask, [c.rows for c in contexts], self.encoder.patches)
        tiles = mask.shape[-1] * self.encoder.patches
        if any(c.guarantee.mechanism != "none" or c.guarantee.rows != tiles for c in contexts):
            return call
        if length and mask.shape[1] != length:  # as the model itself cuts it
            cache = inputs.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            mask = mask[:, past : past + length]
        return self._exact(call, visible_rows(mask, self.encoder.patches))

    def _exact(self, call: Call, visible: torch.Tensor) -> Call:
        """Exact rows (mechanism "none") under the mask of each token, visible [B, m, n]."""
        hidden = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)
        tables = {}
        for name, table in call.tables.items():
            rows, tags = table.structure, table.tags
            assert isinstance(rows, RowsStructure) and tags is not None
            rows = rows.select(call.index) if len(tags) > 1 else rows
            groups = self.cross[name].query_heads // self.cross[name].heads
            hiding = F.pad(hidden, (0, rows.bias.shape[-1] - hidden.shape[-1])).repeat(1, groups, 1)
            masked = RowsStructure(
                rows.key, rows.value, rows.bias + hiding.unsqueeze(1).to(rows.bias), rows.scale
            )
            tables[name] = LayerTable(tags[:1], masked)
        return Call(tables, call.index, contexts=call.contexts)

    # ---- private contexts --------------------------------------------------------------------------------------------------

    def name(self, context: Any, groups: Any, **image_inputs: Any) -> Named:
        if "text" in image_inputs:
            raise ConfigError("An image has no `text`: what is public goes to release.inputs(...).")
        return self.named(one_of(context, image_inputs), groups)

    def named(self, context: Any, groups: Any) -> Named:
        if isinstance(groups, str):
            raise ConfigError("`groups` of an image must be integers [n]: its tiles are not encoded apart.")
        inputs = gather(context)
        self.encoder.check(inputs)
        keep = self.guard.config.mechanism == "none"
        side = self.encoder
        named = name_images(inputs, self.channels, side.patches, side.encode, side.trial, keep_padding=keep)
        parts = () if STATES in inputs else vision_parts(self.model)
        return Named([dataclasses.replace(context, encoder=parts) for context in named], groups)

    def check_growing(self, contexts: Sequence[PrivateContext]) -> None:
        raise ConfigError("An image does not grow: release it without `horizon`.")

    # ---- what is read ------------------------------------------------------------------------------------------------------

    def inputs(
        self, release: Readable, prompt: str | Sequence[str] | None = None, **public: Any
    ) -> dict[str, Any]:
        """See `Release.inputs`. input_ids [B, m] (or inputs_embeds), attention_mask, cross_attention_mask: the PUBLIC texts; one release
        serves all of them, or there is one for each. Anything else is passed on.
        """
        if prompt is not None:
            raise ConfigError("A model has no tokenizer: pass the text as input_ids (and attention_mask).")
        if any(public.get(name) is not None for name in IMAGE_INPUTS):
            raise ConfigError("A public image beside a private one is not supported.")
        contexts, texts = release.contexts, _texts(public)
        count = len(contexts) if texts is None else texts[0]
        if len(contexts) not in (1, count):
            raise ConfigError(f"Got {count} texts for {len(contexts)} images.")
        contexts = contexts * (count if len(contexts) == 1 else 1)
        check_mask(public.get(MASK), [c.rows for c in contexts], self.encoder.patches)
        return {**public, STATES: self.ready(self.guard.bind(contexts))}

    def stand_in(self, image: dict[str, Any], text: dict[str, Any]) -> torch.Tensor:
        """What `generate` passes on in place of its image: the placeholder that it was given, or that of a release which is made."""
        self.calls.seen = None
        states = image.get(STATES)
        if is_placeholder(states):
            if PIXELS in image:
                raise ConfigError("Pass either release.inputs() or an image, not both.")
            return states
        contexts, _ = self.named(image, None)
        texts = _texts(text)
        if texts is not None and texts[0] != len(contexts):
            raise ConfigError(f"Got {texts[0]} texts for {len(contexts)} images.")
        check_mask(text.get(MASK), [c.rows for c in contexts], self.encoder.patches)
        return self.promised(contexts)

    def zeros_for(self, states: torch.Tensor, text: dict[str, Any]) -> torch.Tensor:
        """Rows of an image of zeros, as many as the text's mask tells of, in the place of a placeholder."""
        mask = text.get(MASK)
        rows = states.shape[1] if mask is None else mask.shape[-1] * self.encoder.patches
        return states.new_zeros(len(states), rows, states.shape[2])

    def words(self, setting: Setting) -> HostWords:
        return image_words(self.model, setting)


def _texts(inputs: dict[str, Any]) -> tuple[int, int] | None:
    """(number of texts, tokens of each) among named inputs."""
    text = next((inputs[n] for n in TEXT if inputs.get(n) is not None), None)
    return None if not isinstance(text, torch.Tensor) or text.ndim < 2 else (text.shape[0], text.shape[1])
