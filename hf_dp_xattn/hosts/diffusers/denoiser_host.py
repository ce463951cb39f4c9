"""`DenoiserHost`: any pipeline of diffusers whose denoiser reads text by cross-attention, and the ControlNets that stand beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import ConfigError, UnsupportedModelError
from ..accounts import PROTECT_AGAIN
from ..bindings import bind
from ..context import PrivateContext
from ..fingerprint import Fingerprint, fingerprint
from ..guard import Guard
from ..host import Named, Readable
from ..host_words import HostWords, Setting, placed_words
from ..layer import Layer
from ..layer_host import LayerHost
from ..text.prompt_swap import text_encoders
from .architectures import unwrap
from .denoiser_gate import SECOND, Calls, DenoiserGate
from .placed_prompts import PlacedPrompts, prompts_of
from .prompt_encoder import PromptEncoder, method_of
from .text_layers import TextLayer, channels_of, find_text_layers, refuse

DENOISERS = ("unet", "transformer")


def denoiser_of(pipe: Any) -> Any:
    """The model that draws; None where a pipeline has none of a known name."""
    parts = (getattr(pipe, name, None) for name in DENOISERS)
    return next((unwrap(part) for part in parts if isinstance(part, nn.Module)), None)


def models_of(pipe: Any) -> dict[str, Any]:
    """All models of a pipeline that read its encoded prompt, by the prefix of their layers' names: the denoiser's is empty."""
    model = denoiser_of(pipe)
    if model is None:
        raise refuse(pipe, "it has no denoiser (`unet`, `transformer`) whose layers read text")
    models = {"": model}
    beside = unwrap(getattr(pipe, "controlnet", None))
    nets = getattr(beside, "nets", [beside])
    models |= {f"controlnet.{i}.": unwrap(net) for i, net in enumerate(nets) if isinstance(net, nn.Module)}
    second = getattr(pipe, "transformer_2", None)
    if isinstance(second, nn.Module):
        models[SECOND] = unwrap(second)
    return models


class DenoiserHost(LayerHost):
    """Its models are given public text, and their cross-attention reads releases where a prompt was private.

    proven: the prefixes of the models whose layers were found to read what the model reads, at a call with public text.
    """

    adapts_pipelines = True
    undo = f"Undo that change, call dpx.unprotect(pipe), and {PROTECT_AGAIN}."

    def __init__(self, pipe: Any) -> None:
        method_of(pipe)
        self.pipe, self.models = pipe, models_of(pipe)
        self.calls, self.proven = Calls(), set[str]()
        self._projections: dict[Any, Any] = {}  # of models whose layers are patched
        self._patches: list[PlacedPrompts] = []
        self._gates: list[DenoiserGate] = []
        self._encoder: PromptEncoder | None = None
        self._probed: PromptEncoder | None = None
        super().__init__(self.models[""])

    # ---- what it is --------------------------------------------------------------------------------------------------------

    def find_layers(self) -> dict[str, Layer]:
        self._layers = {prefix: find_text_layers(model, prefix) for prefix, model in self.models.items()}
        self.text_layers: dict[str, TextLayer] = {
            n: y for layers in self._layers.values() for n, y in layers.items()
        }
        self._channels = channels_of(self.text_layers)
        self._projections = {m: getattr(m, "encoder_hid_proj", None) for m in self.models.values()}
        return dict(self.text_layers)

    def watched(self) -> list[nn.Module]:
        parts = [part for layer in self.text_layers.values() for part in (*layer.parts(), *layer.path)]
        return list(dict.fromkeys(parts))

    def sketch(self) -> Fingerprint:
        return fingerprint(self.text_layers.values(), self.model.dtype)

    @property
    def channels(self) -> int:
        return self._channels

    @property
    def encoder(self) -> PromptEncoder:
        """Of the pipeline that joined first."""
        assert self._encoder is not None
        return self._encoder

    @property
    def parts(self) -> list[Any]:
        return [*(patch.host for patch in self._patches[:1]), self.model]

    # ---- installing and removing -------------------------------------------------------------------------------------------

    def install(self, guard: Guard, handle: Any) -> None:
        super().install(guard, handle)
        self._gates = [DenoiserGate(self, p, self.models[p], y) for p, y in self._layers.items()]
        for gate in self._gates:
            gate.install()

    def has(self, pipe: Any) -> bool:
        return any(patch.host is pipe for patch in self._patches)

    def side_of(self, pipe: Any, guard: Guard) -> PlacedPrompts:
        models = models_of(pipe)
        if list(models.values()) != list(self.models.values()):
            raise UnsupportedModelError(
                f"{type(pipe).__name__} shares its denoiser with a protected pipeline that has other models beside it (a ControlNet, ...). "
                f"Call dpx.unprotect(pipe) first, and {PROTECT_AGAIN}. Nothing was patched."
            )
        encoder = self.encoder_for(pipe)
        guard.maker.check_text(encoder)
        if self._encoder is None:
            self._encoder = encoder
        return self._placed(pipe, guard, encoder)

    def encoder_for(self, pipe: Any) -> PromptEncoder:
        """What makes rows for its layers. Raises UnsupportedModelError."""
        probed, self._probed = self._probed, None
        if probed is not None and probed.pipe is pipe:
            return probed
        return PromptEncoder(pipe, text_encoders(pipe), self.channels)

    def probe(self) -> None:
        """Makes its own pipeline's encoder, which the next `encoder_for` gives. Raises UnsupportedModelError."""
        self._probed = self.encoder_for(self.pipe)

    def _placed(self, pipe: Any, guard: Guard, encoder: PromptEncoder) -> PlacedPrompts:
        return PlacedPrompts(pipe, self, guard, encoder)

    def join(self, pipe: Any, side: PlacedPrompts, handle: Any) -> None:
        with self.guard.lock:
            self._patches.append(side)
            side.install(handle)

    def remove(self) -> None:
        for patch in self._patches:
            patch.remove()
        for gate in self._gates:
            gate.remove()
        super().remove()

    def lost(self) -> str | None:
        if not self.is_held:
            return "the gate of the denoiser was removed"
        reasons = [*(gate.lost() for gate in self._gates), *(patch.lost() for patch in self._patches)]
        return next((reason for reason in reasons if reason is not None), None)

    def changed(self) -> str | None:
        now = next((models_of(patch.host) for patch in self._patches), self.models)
        if list(now.values()) != list(self.models.values()):
            reason: str | None = "its denoiser or ControlNet was replaced"
        elif any(getattr(m, "encoder_hid_proj", None) is not p for m, p in self._projections.items()):
            reason = "an IP-Adapter (encoder_hid_proj) was loaded"
        else:
            reason = next((why for gate in self._gates if (why := gate.changed()) is not None), None)
        if reason is None:
            return None
        return f"The pipeline was changed after it was protected: {reason}. Call dpx.unprotect(pipe), undo the change, {PROTECT_AGAIN}."

    def forget(self) -> None:
        """What this thread's call has read."""
        for gate in self._gates:
            gate.forget()

    # ---- private contexts, and what is read --------------------------------------------------------------------------------

    def name(self, context: Any, groups: Any = None, **named: Any) -> Named:
        if named:
            raise TypeError(f"A prompt is released without {', '.join(sorted(named))}.")
        if isinstance(groups, str) and groups != "phrases":
            raise ConfigError('`groups` must be integers [n] or "phrases".')
        apart = isinstance(groups, str) or (groups is None and self.guard.config.unit == "group")
        return Named(self.encoder.name(context, phrases=apart), None if apart else groups)

    def weighted(self, texts: Sequence[str], weights: Sequence[float]) -> PrivateContext:
        return self.encoder.weighted(texts, weights, apart=self.guard.config.unit == "group")

    def inputs(self, release: Readable, prompt: str | Sequence[str] | None, **public: Any) -> dict[str, Any]:
        if public or prompt is not None:
            raise ConfigError("Public text beside a release is not supported by this pipeline.")
        tags = self.guard.bindings.add([bind(c, None, c.tag) for c, _ in release.beside(None)])
        return {"prompt": prompts_of(tags)}

    def words(self, setting: Setting) -> HostWords:
        encoder = self._encoder
        masked = encoder is not None and not encoder.padded
        rows = None if encoder is None else encoder.rows
        return placed_words(self.model, setting, rows, masked, bool(encoder and encoder.public_rows))
