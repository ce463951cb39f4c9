"""`ProtectedImageText`: the handle of a protected model whose text reads an image by cross-attention (Mllama)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ....errors import ConfigError, ProtectionLostError, ReleaseError
from ....mechanisms.rows_structure import RowsStructure
from ...bindings import bind, unique
from ...context import PrivateContext
from ...host_words import HostWords, Setting, image_words
from ...locks import locked
from ...placeholder import make_placeholder
from ...recorded_runs import refuse_recording
from ...release import Release
from ...tables import LayerTable
from ..encoder_decoder.cross_attention import Call
from ..encoder_decoder.encoder_decoder_handle import PUBLIC_CALL, ProtectedSeq2Seq
from ..generating import named_arguments
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
from .mllama_probing import PLACEHOLDER_ROWS, STATES, context_channels, find_layers, vision_parts
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


class ProtectedImageText(ProtectedSeq2Seq):
    """A protected Mllama. Made by `dpx.protect`; a context manager that unprotects.

    While it is active, an image that `generate` is given is private: it is released once (charged to the ledger before it is encoded), and
    the text model receives a placeholder in place of the vision model's output. Every beam, sample and step reads the release. Text alone
    runs as ever.

    *Formal guarantee.* Everything that leaves the model about a private image is post-processing of its `Release` and of its public aspect
    ratio, see `report()`. Rows of tiles that are padding are not released. Tokens that see no tile read the release as those do that see
    all (transformers lets them attend to every row); with `mechanism="none"` exactly as in the unprotected model, padding included.
    """

    closed = CLOSED
    _encoder: VisionSide

    def __init__(self, model: Any, *settings: Any, **options: Any) -> None:
        super().__init__(model, *settings, **options)
        self._encoder = VisionSide(model)
        self._generate = ImageGenerateShadow(model, self)

    def _find_layers(self) -> dict[str, Any]:
        self.cross = find_layers(self.model)
        return dict(self.cross)

    @property
    def channels(self) -> int:
        return context_channels(self.model)

    # ---- gates -------------------------------------------------------------------------------------------------------------

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's gate. Raises before anything runs. Once the layers' cache is filled, the placeholder is taken out."""
        refuse_recording()
        if torch.compiler.is_compiling():
            raise ProtectionLostError("A protected Mllama is not supported under torch.compile yet.")
        self._calls.current = None
        self.check()
        self._calls.count()
        self.refuse_checkpointing(module)
        given = named_arguments(inspect.signature(module.forward).bind_partial(*args, **kwargs))
        states, cached = given.get(STATES), self._cached(given.get("past_key_values"))
        call = self._read_call(states)
        if call is None:
            if self.access.public:
                self._calls.current = PUBLIC_CALL
            elif states is not None or given.get(PIXELS) is not None or cached:
                raise ProtectionLostError(NO_RELEASE)
            return None  # text alone: the layers that read images are skipped
        if given.get(PIXELS) is not None:
            raise ConfigError("Pass either release.inputs() or an image, not both.")
        self._calls.current = self._follow(call, given)
        if cached:
            if len(cached) != len(self.cross) or not all(bool(keys.isnan().all()) for keys in cached):
                raise ReleaseError(
                    "past_key_values holds an image that was read outside of this release: start with a new cache."
                )
            given[STATES] = None
        return (), given

    def _cached(self, cache: Any) -> list[torch.Tensor]:
        """The keys that a cache holds for the layers that read images."""
        layers = getattr(cache, "layers", ())
        own = [int(layer.module.layer_idx) for layer in self.cross.values()]  # type: ignore[arg-type]
        keys = [getattr(layers[i], "keys", None) for i in own if i < len(layers)]
        return [k for k in keys if isinstance(k, torch.Tensor) and k.numel()]

    def _follow(self, call: Call, given: dict[str, Any]) -> Call:
        """The call, with what its text tokens may see.

        Raises:
            ConfigError: another number of texts than releases, or a mask that a release cannot follow.
        """
        count, length = _texts(given) or (len(call.index), 0)
        if count != len(call.index):
            raise ConfigError(
                f"Got {count} texts with the inputs of {len(call.index)} release(s): call release.inputs(input_ids=ids) for these texts."
            )
        mask = given.get(MASK)
        if mask is None:
            return call
        contexts = [call.contexts[i] for i in call.index.tolist()]
        check_mask(mask, [c.rows for c in contexts], self._encoder.patches)
        tiles = mask.shape[-1] * self._encoder.patches
        if any(c.guarantee.mechanism != "none" or c.guarantee.rows != tiles for c in contexts):
            return call
        if length and mask.shape[1] != length:  # as the model itself cuts it
            cache = given.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            mask = mask[:, past : past + length]
        return self._exact(call, visible_rows(mask, self._encoder.patches))

    def _exact(self, call: Call, visible: torch.Tensor) -> Call:
        """Exact rows (mechanism "none") under the mask of each token, visible [B, m, n]."""
        hidden = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)
        tables = {}
        for name, table in call.tables.items():
            rows, tags = table.structure, table.tags
            assert isinstance(rows, RowsStructure) and tags is not None
            rows = rows.select(call.index) if len(tags) > 1 else rows
            groups = self.cross[name].query_heads // self.cross[name].heads
            own = F.pad(hidden, (0, rows.bias.shape[-1] - hidden.shape[-1])).repeat(1, groups, 1)
            masked = RowsStructure(
                rows.key, rows.value, rows.bias + own.unsqueeze(1).to(rows.bias), rows.scale
            )
            tables[name] = LayerTable(tags[:1], masked)
        return Call(tables, call.index, contexts=call.contexts)

    # ---- releases ----------------------------------------------------------------------------------------------------------

    def release(
        self,
        context: Any = None,
        *,
        groups: torch.Tensor | Literal["documents"] | str | None = None,
        fresh: bool = False,
        horizon: int | None = None,
        **image_inputs: Any,
    ) -> Release:
        """Releases private images, one budget each. An image that this handle released before is reused and not charged again.

        Args:
            context: rows of the projected vision output [n, C] or [B, n, C]. Or, by name or in one mapping, what the image processor
                gives: pixel_values [B, 1, tiles, channels, height, width], aspect_ratio_ids [B, 1], aspect_ratio_mask [B, 1, tiles], one
                image for each text. Tiles that the mask hides are padding: no rows.
            groups: for `unit="group"`, public: integers [n] that name each row's group.
            fresh: release again with new noise; charged again.

        Raises:
            ContextError, ConfigError: not valid; nothing was spent.
            BudgetExceededError: the ledger refuses; nothing was spent or computed, for no image of the batch.
        """
        if "text" in image_inputs:
            raise ConfigError("An image has no `text`: what is public goes to release.inputs(...).")
        return super().release(context, groups=groups, fresh=fresh, horizon=horizon, **image_inputs)

    def _named(self, context: Any, groups: Any) -> tuple[list[PrivateContext], torch.Tensor | None]:
        if isinstance(groups, str):
            raise ConfigError("`groups` of an image must be integers [n]: its tiles are not encoded apart.")
        inputs = gather(context)
        self._encoder.check(inputs)
        keep = self.config.mechanism == "none"
        side = self._encoder
        named = name_images(inputs, self.channels, side.patches, side.encode, side.trial, keep_padding=keep)
        parts = () if STATES in inputs else vision_parts(self.model)
        return [dataclasses.replace(context, encoder=parts) for context in named], groups

    def _open(self, contexts: Sequence[PrivateContext], groups: torch.Tensor | None, horizon: int) -> Release:
        raise ConfigError("An image does not grow: release it without `horizon`.")

    # ---- placeholders ------------------------------------------------------------------------------------------------------

    @locked
    @torch.no_grad()
    def inputs(
        self, release: Release, prompt: str | Sequence[str] | None = None, **public: Any
    ) -> dict[str, Any]:
        """See `Release.inputs`. input_ids [B, m] (or inputs_embeds), attention_mask, cross_attention_mask: the PUBLIC texts; one release
        serves all of them, or there is one for each. Anything else is passed on.
        """
        self.check_thoroughly()
        if prompt is not None:
            raise ConfigError("A model has no tokenizer: pass the text as input_ids (and attention_mask).")
        if any(public.get(name) is not None for name in IMAGE_INPUTS):
            raise ConfigError("A public image beside a private one is not supported.")
        contexts, texts = release.contexts, _texts(public)
        count = len(contexts) if texts is None else texts[0]
        if len(contexts) not in (1, count):
            raise ConfigError(f"Got {count} texts for {len(contexts)} images.")
        contexts = contexts * (count if len(contexts) == 1 else 1)
        check_mask(public.get(MASK), [c.rows for c in contexts], self._encoder.patches)
        tags = [self._bindings.add(bind(c, None, c.tag)) for c in contexts]
        self._calls.seen = None
        self._build(unique(tags), self.model.device)
        rows, dtype = PLACEHOLDER_ROWS, self.model.dtype
        return {**public, STATES: make_placeholder(tags, rows, self.channels, dtype, self.model.device)}

    def stand_in(self, image: dict[str, Any], text: dict[str, Any]) -> torch.Tensor:
        """What `generate` passes on in place of its image: the placeholder that it was given, or that of a release which is made."""
        self._calls.seen = None
        states = image.get(STATES)
        if is_placeholder(states):
            if PIXELS in image:
                raise ConfigError("Pass either release.inputs() or an image, not both.")
            return states
        contexts, _ = self._named(image, None)
        texts = _texts(text)
        if texts is not None and texts[0] != len(contexts):
            raise ConfigError(f"Got {texts[0]} texts for {len(contexts)} images.")
        check_mask(text.get(MASK), [c.rows for c in contexts], self._encoder.patches)
        return self._promised(contexts)

    def zeros_for(self, states: torch.Tensor, text: dict[str, Any]) -> torch.Tensor:
        """Rows of an image of zeros, as many as the text's mask tells of, in the place of a placeholder."""
        mask = text.get(MASK)
        rows = states.shape[1] if mask is None else mask.shape[-1] * self._encoder.patches
        return states.new_zeros(len(states), rows, states.shape[2])

    # ---- report ------------------------------------------------------------------------------------------------------------

    def words(self) -> HostWords:
        """What is public and what is not covered here."""
        return image_words(self.model, Setting.of(self.config, self.calibration))


def _texts(given: dict[str, Any]) -> tuple[int, int] | None:
    """(number of texts, tokens of each) among named inputs."""
    text = next((given[n] for n in TEXT if given.get(n) is not None), None)
    return None if not isinstance(text, torch.Tensor) or text.ndim < 2 else (text.shape[0], text.shape[1])
