"""`UNetHost`: the UNet of Stable Diffusion, and the pipelines that share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError, ReleaseError
from ..accounts import PROTECT_AGAIN
from ..bindings import bind, unique
from ..context import PrivateContext
from ..fingerprint import Fingerprint, fingerprint
from ..guard import Guard, handle_on, mark, unmark
from ..host import Named, Readable
from ..host_words import HostWords, Setting, prompt_words
from ..layer import Layer
from ..layer_host import LayerHost
from ..lengths import HIDDEN
from ..model_gates import TextGate, parts_of
from ..placeholder import Tag, new_tag
from ..tables import LayerTable
from .architectures import changed_reason, find_layers, unwrap
from .copies import CopyGuard
from .harmless import HarmlessCalls
from .phrases import RULE
from .pipelines import PipelinePatch
from .processor import DPAttnProcessor
from .prompt_contexts import name_contexts, name_phrases, name_weighted
from .text_side import TextSide
from .unet_forward import ForwardGate


class UNetHost(LayerHost):
    """Its cross-attention layers are given processors that read releases; a gate on its forward says which."""

    undo = (
        "Undo that change (unload the adapter, unfuse projections), call dpx.unprotect(pipe), "
        f"and {PROTECT_AGAIN}."
    )
    keeps_sketch = False  # a call that reads one tensor at all steps asks once

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self._patches: list[PipelinePatch] = []
        self._gates: list[TextGate] = []
        self.originals: dict[str, Any] = {}
        self._processors: dict[str, DPAttnProcessor] = {}
        self._guards: tuple[Any, ...] = ()

    def find_layers(self) -> dict[str, Layer]:
        self.attentions = find_layers(self.model)
        return dict(self.attentions)

    def watched(self) -> list[nn.Module]:
        return [m for layer in self.attentions.values() for m in (layer.module.to_k, layer.module.to_v)]

    def sketch(self) -> Fingerprint:
        return fingerprint(self.attentions.values(), self.model.dtype)

    @property
    def channels(self) -> int:
        return int(self.model.config.cross_attention_dim)

    @property
    def hidden_length(self) -> int:
        return self.text.length if self.text is not None and self.text.available else HIDDEN

    @property
    def text(self) -> TextSide | None:
        """Of the pipeline that joined first."""
        return self._patches[0].text if self._patches else None

    @property
    def parts(self) -> list[Any]:
        return [*(patch.pipe for patch in self._patches[:1]), self.model]

    @property
    def by_phrases(self) -> bool:
        """Prompts are split into phrases: the calibration's units are."""
        units = getattr(self.guard.calibration, "grouping", None)
        return self.guard.config.unit == "group" and units == "phrases"

    # ---- installing and removing -------------------------------------------------------------------------------------------

    def install(self, guard: Guard, handle: Any) -> None:
        super().install(guard, handle)
        unet = self.model
        self.gate = ForwardGate(self)
        self.originals = {name: layer.module.processor for name, layer in self.attentions.items()}
        self._processors = {
            name: DPAttnProcessor(name, self.gate.forwards, guard.access) for name in self.layers
        }
        current = unet.attn_processors
        unet.set_attn_processor({**current, **{f"{n}.processor": p for n, p in self._processors.items()}})
        self.gate.install()
        harmless = HarmlessCalls(unet, {self.attentions[n].module: p for n, p in self._processors.items()})
        harmless.install()
        self._guards = (harmless, CopyGuard({name: layer.module for name, layer in self.layers.items()}))
        self.activate((), "cpu")

    def has(self, pipe: Any) -> bool:
        return any(patch.pipe is pipe for patch in self._patches)

    def side_of(self, pipe: Any, guard: Guard) -> TextSide:
        side = TextSide(pipe)
        guard.maker.check_text(side)
        return side

    def join(self, pipe: Any, side: TextSide, handle: Any) -> None:
        with self.guard.lock:
            if side.available and all(g.encoder is not unwrap(side.encoder) for g in self._gates):
                encoder = unwrap(side.encoder)
                # the parts too: some libraries call them one by one
                self._gates += [TextGate(part, self.guard.access) for part in parts_of(encoder)]
            patch = PipelinePatch(pipe, self, side)
            self._patches.append(patch)
            patch.install()
            # to be found, whatever becomes of its UNet
            mark(pipe, handle)

    def remove(self) -> None:
        for name, layer in self.attentions.items():
            attn = layer.module
            if isinstance(attn.processor, DPAttnProcessor):  # else the caller chose another one since
                attn.set_processor(self.originals[name])
        parts: tuple[Any, ...] = (self.gate, *self._gates, *self._patches, *self._guards)
        for installed in parts:
            installed.remove()
        for patch in self._patches:
            handle = handle_on(patch.pipe)
            if getattr(handle, "guard", None) is self.guard:
                unmark(patch.pipe, handle)
        for processor in self._processors.values():
            processor.clear()
        super().remove()

    def lost(self) -> str | None:
        if not self.gate.installed() or not self.is_held:
            return "the gate of the UNet was removed"
        if self.model.encoder_hid_proj is not None:
            return "an IP-Adapter (encoder_hid_proj) was loaded"
        replaced = [
            name
            for name, layer in self.attentions.items()
            if layer.module.processor is not self._processors[name]
            or self.model.get_submodule(name) is not layer.module
        ]
        if replaced:
            now = type(self.attentions[replaced[0]].module.processor).__name__
            return f"{len(replaced)} of {len(self.layers)} attention processors were replaced ({replaced[0]} now has {now})"
        if not TextGate.installed(self._gates):
            return "the gate of the text encoder was removed"
        return None

    def changed(self) -> str | None:
        reason = changed_reason(self.model, self.attentions)
        if reason is None:
            return None
        return (
            f"The UNet was changed after it was protected: {reason}. Call dpx.unprotect(pipe), "
            f"undo the change, {PROTECT_AGAIN}."
        )

    # ---- private contexts --------------------------------------------------------------------------------------------------

    def name(self, context: Any, groups: Any, **named: Any) -> Named:
        if named:
            raise TypeError(f"A prompt is released without {', '.join(sorted(named))}.")
        if isinstance(groups, str):
            if groups != "phrases":
                raise ConfigError('`groups` must be integers [n] or "phrases".')
            return Named([name_phrases(context, self.text)], None)
        phrases = groups is None and self.by_phrases
        return Named(name_contexts(context, self.text, self.channels, phrases=phrases), groups)

    def weighted(self, texts: Sequence[str], weights: Sequence[float]) -> PrivateContext:
        return name_weighted(texts, weights, self.text, apart=self.guard.config.unit == "group")

    # ---- what is read ------------------------------------------------------------------------------------------------------

    def inputs(self, release: Readable, prompt: str | Sequence[str] | None, **public: Any) -> dict[str, Any]:
        if public:
            raise ConfigError(
                f"A diffusers host takes a public `prompt` only, got {', '.join(sorted(public))}."
            )
        rows = {c.rows for c in release.contexts}
        if len(rows) != 1:
            raise ReleaseError("Contexts of different lengths cannot be batched; release them one by one.")
        bindings = []
        for context, text in release.beside(prompt):
            if text is None:
                bindings.append(bind(context, None, context.tag))
                continue
            if self.text is None:
                raise ConfigError("This host has no text encoder, so it cannot encode a public prompt.")
            bindings.append(bind(context, self.text.public_rows(text), new_tag()))
        tags = self.guard.bindings.add(bindings)
        device = self.model.device if self.text is None else self.text.pipe._execution_device
        self.activate(tags, device)
        name = "prompt_embeds" if self._patches else "encoder_hidden_states"
        return {name: self.guard.placeholder(tags, rows.pop(), device)}

    def activate(self, tags: Sequence[Tag], device: torch.device | str) -> dict[str, LayerTable]:
        """Makes the bindings readable by the processors: the layers' tables, which a graph without gates reads in this thread as well.
        Raises as `Guard.build` does."""
        with self.guard.lock:
            tables = self.guard.build(unique(tags), device)
            for name, table in tables.items():
                self._processors[name].table = table
            return tables

    def hand_out(self, tables: dict[str, LayerTable]) -> None:
        """Makes them what this thread's compiled layers read."""
        for name, table in tables.items():
            self._processors[name].serve(table)

    def words(self, setting: Setting) -> HostWords:
        text = self.text if self.text is not None and self.text.available else None
        rows, first = (None, False) if text is None else (text.length, text.first_row_is_public)
        return prompt_words(self.model, setting, rows, first, RULE)
