"""Pipelines of pictures and bare UNets, used from plain texts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from ...errors import ConfigError, UnsupportedModelError
from .. import canaries
from ..driver import DECODERS, LENGTH, NOTHING, STEP, Canary, Driver, Outputs, Runs, Timed

_EIGHT = 8  # diffusers takes multiples of it only, whatever the VAE's factor is


class PipelineDriver(Driver):
    """A pipeline of diffusers."""

    kind = "pipeline"
    foreign: ClassVar = {
        "{first} is for decoder-only models.": ("chat", "prefix_bucket"),
        "{first} is for texts, and this is a pipeline of pictures.": ("new_tokens",),
        "{first} is for encoder-decoder models.": ("begin",),
    }
    draws = True
    steps = 2

    @property
    def unet(self) -> Any:
        return self.host.unet

    @property
    def serving(self) -> torch.nn.Module:
        unet: torch.nn.Module = self.unet
        return unet

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return {n: c for n, c in self.host.components.items() if isinstance(c, torch.nn.Module)}

    # ---- texts of the command line -----------------------------------------------------------------------------------------

    def public_contexts(self, texts: list[Any], questions: list[str] | None) -> tuple[Any, dict[str, Any]]:
        if self.options.length is not None:
            raise ConfigError(LENGTH)
        if questions is not None:
            raise ConfigError("--questions is for models of text, encoder-decoder or decoder-only.")
        if self.options.chat or self.options.prefix_bucket is not None:
            raise ConfigError(DECODERS)
        return texts, {}

    def release_text(self, text: str) -> Any:
        return self.handle.release(text, groups="phrases" if self.by_groups else None)

    def check_public(self, text: str) -> None:
        """Refuses public words now, not after the charge."""
        self.handle.text.tokenize(text)

    def prepare(self, release: Any | None, private: str | None) -> None:
        check_pictures(self.host, self.options)
        if self.options.public is not None:
            self.check_public(self.options.public)

    def draw(self, release: Any) -> list[Any]:
        return self._pictures(release.inputs(prompt=self.options.public))

    def draw_plain(self, text: str | None) -> list[Any]:
        with self.handle.public():
            return self._pictures({"prompt": text or ""})

    def _pictures(self, inputs: dict[str, Any]) -> list[Any]:
        options = self.options
        self.host.set_progress_bar_config(disable=options.json)
        named = {
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance,
            "height": options.height,
            "width": options.width,
        }
        if options.seed is not None:
            named["generator"] = torch.Generator().manual_seed(options.seed)
        return list(self.host(**inputs, **{k: v for k, v in named.items() if v is not None}).images)

    # ---- canaries ----------------------------------------------------------------------------------------------------------

    @property
    def _has_text(self) -> bool:
        return self.host.text_encoder is not None and self.host.tokenizer is not None

    def _parts(self, count: int) -> list[Any]:
        if self._has_text:
            return list(canaries.texts(self.host.tokenizer, count))
        return _embeddings(self.unet.config.cross_attention_dim, count)

    def _of_texts(self, texts: Sequence[str]) -> list[Any]:
        if not self._has_text:
            return super()._of_texts(texts)
        return list(texts)

    def release(self, canary: Canary, **options: Any) -> Any:
        if self.by_groups and self._has_text:
            return self.handle.release(list(canary), groups="phrases", **options)
        context = torch.cat(canary) if isinstance(canary[0], torch.Tensor) else canary[0]
        if self.by_groups:
            lengths = torch.tensor([len(part) for part in canary])
            options["groups"] = torch.arange(len(canary)).repeat_interleave(lengths)
        return self.handle.release(context, **options)

    def answer(self, inputs: dict[str, Any]) -> Outputs:
        return [self._call(**inputs)]

    def direct(self, canary: Canary) -> Outputs | None:
        if self.by_groups:
            return None
        return [self._call(**self.call_inputs(canary))]

    def call_inputs(self, canary: Canary) -> dict[str, Any]:
        if self._has_text:
            return {"prompt": ", ".join(canary)}
        rows = torch.cat(canary).unsqueeze(0)
        return {"prompt_embeds": rows, "negative_prompt_embeds": torch.zeros_like(rows)}

    def refused(self) -> None:
        channels = self.unet.config.cross_attention_dim
        self.unet(
            *self.step_inputs(), torch.zeros(1, 8, channels, dtype=self.unet.dtype, device=self.unet.device)
        )

    def lose(self, name: str) -> Callable[[], None]:
        attn = self.handle.layers[name].module
        processor = attn.processor
        attn.set_processor(self.handle.host.originals[name])
        return lambda: attn.set_processor(processor)

    @torch.no_grad()
    def ungated(self, inputs: dict[str, Any]) -> Outputs:
        self.handle.host.gate.remove()
        return [self.unet(*self.step_inputs(), next(iter(inputs.values()))).sample]

    @property
    def edge(self) -> int:
        """Latents' edge of a small picture that every block can halve."""
        least = max(8, 2 ** (len(self.unet.config.block_out_channels) - 1))
        return int(
            min(self.unet.config.sample_size, least)
            if isinstance(self.unet.config.sample_size, int)
            else least
        )

    def step_inputs(self, batch: int = 1, edge: int | None = None) -> tuple[torch.Tensor, int]:
        """(sample, timestep) for one step of the UNet."""
        size = self.edge if edge is None else edge
        shape = (1, int(self.unet.config.in_channels), size, size)
        sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)).repeat(batch, 1, 1, 1)
        return sample.to(self.unet.device, self.unet.dtype), 5

    def timed(self, latents: int | None, new_tokens: int | None) -> Timed:
        if new_tokens is not None:
            raise ConfigError("--new-tokens is for language models, and this is a pipeline of pictures.")
        edge = self.unet.config.sample_size if latents is None else latents
        least = 2 ** (len(self.unet.config.block_out_channels) - 1)
        if not isinstance(edge, int) or edge < least or edge % least:
            raise ConfigError(f"--latents must be a multiple of {least} for this model.")

        def runs(canary: Canary, release: Any) -> Runs:
            negative, prompt = self.states(canary)
            if release is not None:
                prompt = next(iter(self.inputs(release).values()))
            states = torch.cat([negative, prompt])
            sample, step = self.step_inputs(batch=2, edge=edge)
            step_of = torch.no_grad()(lambda: self.unet(sample, step, encoder_hidden_states=states).sample)
            return {STEP: step_of}

        return Timed(f"a denoising step with guidance (batch 2), latents {edge} x {edge}", 1, runs)

    @torch.no_grad()
    def states(self, canary: Canary) -> tuple[torch.Tensor, torch.Tensor]:
        """(negative, prompt) rows [1, n, C] as the unprotected UNet is given them."""
        if not self._has_text:
            rows = torch.cat(canary).unsqueeze(0).to(self.unet.device, self.unet.dtype)
            return torch.zeros_like(rows), rows
        prompt, negative = self.host.encode_prompt(", ".join(canary), self.unet.device, 1, True, "")[:2]
        return negative, prompt

    def _call(self, **inputs: Any) -> torch.Tensor:
        pixels = self.edge * self.host.vae_scale_factor
        known = inspect.signature(type(self.host).__call__).parameters
        options: dict[str, Any] = {"num_inference_steps": self.steps, "output_type": "latent"}
        options["generator"] = torch.Generator().manual_seed(0)
        if "strength" in known:
            options |= {
                "image": torch.linspace(0, 1, 3 * pixels**2).view(1, 3, pixels, pixels),
                "strength": 1.0,
            }
        if "mask_image" in known:
            options["mask_image"] = torch.ones(1, 1, pixels, pixels)
        if "height" in known:
            options |= {"height": pixels, "width": pixels}
        images: torch.Tensor = self.host(**inputs, **options).images
        return images


class PlacedDriver(PipelineDriver):
    """A pipeline whose denoiser is given a public text in the place of a private one."""

    def check_public(self, text: str) -> None:
        raise ConfigError(
            f"--public is not supported by this pipeline with a mechanism on attention. {NOTHING}"
        )

    def check_trial(self) -> None:
        raise UnsupportedModelError(
            f"{type(self.host).__name__} cannot be audited yet with a mechanism on attention: its models are given public text alone. "
            "Audit it with mechanism='library'."
        )


class UNetDriver(PipelineDriver):
    """A bare UNet; contexts are embeddings."""

    kind = "unet"
    _has_text = False

    @property
    def unet(self) -> Any:
        return self.host

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.host}

    @torch.no_grad()
    def answer(self, inputs: dict[str, Any]) -> Outputs:
        return [self.unet(*self.step_inputs(), **inputs).sample]

    def direct(self, canary: Canary) -> Outputs | None:
        return None

    def call_inputs(self, canary: Canary) -> dict[str, Any]:
        return {"encoder_hidden_states": torch.cat(canary).unsqueeze(0)}


def _embeddings(channels: int, count: int) -> list[torch.Tensor]:
    return [torch.randn(8, channels, generator=torch.Generator().manual_seed(1000 + i)) for i in range(count)]


def check_pictures(pipe: Any, options: Any) -> None:
    """What this pipeline can draw.

    Raises:
        ConfigError: it starts from an image; a size that is no multiple of its VAE's factor, or more steps than its scheduler has.
    """
    if "image" in inspect.signature(type(pipe).__call__).parameters:
        raise ConfigError(
            f"{type(pipe).__name__} starts from an image, which the command line does not read: hf-dp-xattn release, and then in Python "
            f"pipe(**release.inputs(), image=...). {NOTHING}"
        )
    factor = math.lcm(_EIGHT, int(pipe.vae_scale_factor))
    for name in ("height", "width", "pixels"):
        value = getattr(options, name, None)
        if value is not None and value % factor:
            raise ConfigError(
                f"--{name} must be a multiple of {factor} for this pipeline, got {value}. {NOTHING}"
            )
    if options.steps is not None:
        try:
            scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
            scheduler.set_timesteps(options.steps)
        except Exception as error:  # each scheduler has bounds of its own
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"--steps {options.steps} does not suit this pipeline's {type(pipe.scheduler).__name__} ({type(error).__name__}: "
                f"{reason}). {NOTHING}"
            ) from None
