"""Stable Diffusion pipelines and bare UNets as subjects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import canaries
from .subject import Canary, Outputs, Subject


class PipelineSubject(Subject):
    """A Stable Diffusion pipeline of diffusers."""

    kind = "pipeline"
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
        return self.handle.release(
            *_whole(canary, self.by_groups), **_numbers(canary, self.by_groups), **options
        )

    def answer(self, inputs: dict[str, Any]) -> Outputs:
        return [self._call(**inputs)]

    def direct(self, canary: Canary) -> Outputs | None:
        if self.by_groups:
            return None
        return [self._call(**self.given(canary))]

    def plain(self, canary: Canary) -> Outputs:
        return [self._call(**self.given(canary))]

    def nothing(self) -> dict[str, Any] | None:
        return {"prompt": ""} if self._has_text else None

    def given(self, canary: Canary) -> dict[str, Any]:
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

    @torch.no_grad()
    def states(self, canary: Canary) -> tuple[torch.Tensor, torch.Tensor]:
        """(negative, own) rows [1, n, C] as the unprotected UNet is given them."""
        if not self._has_text:
            own = torch.cat(canary).unsqueeze(0).to(self.unet.device, self.unet.dtype)
            return torch.zeros_like(own), own
        own, negative = self.host.encode_prompt(", ".join(canary), self.unet.device, 1, True, "")[:2]
        return negative, own

    def _call(self, **given: Any) -> torch.Tensor:
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
        images: torch.Tensor = self.host(**given, **options).images
        return images


class UNetSubject(PipelineSubject):
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

    def given(self, canary: Canary) -> dict[str, Any]:
        return {"encoder_hidden_states": torch.cat(canary).unsqueeze(0)}

    def plain(self, canary: Canary) -> Outputs:
        return self.answer(self.given(canary))


def _embeddings(channels: int, count: int) -> list[torch.Tensor]:
    return [torch.randn(8, channels, generator=torch.Generator().manual_seed(1000 + i)) for i in range(count)]


def _whole(canary: Canary, by_groups: bool) -> tuple[Any, ...]:
    return (torch.cat(canary) if isinstance(canary[0], torch.Tensor) else canary[0],)


def _numbers(canary: Canary, by_groups: bool) -> dict[str, Any]:
    if not by_groups:
        return {}
    lengths = torch.tensor([len(part) for part in canary])
    return {"groups": torch.arange(len(canary)).repeat_interleave(lengths)}
