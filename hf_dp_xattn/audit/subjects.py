"""Hosts as an audit, a benchmark and a demonstration use them: protect, release a canary, answer from the release, answer unprotected.

One class per kind of host. All go through the public interface. A canary is a tuple of parts: one text (token ids, an image, ...),
or, for unit="group", several, of which each is a unit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..hosts.protect import protect
from ..privacy.ledger import Ledger
from . import canaries

PARTS = 3  # units of a canary of groups; the last one is what canaries differ in
IDS = 6  # tokens of a canary where there is no tokenizer
Canary = tuple[Any, ...]
Outputs = list[torch.Tensor]


class Subject:
    """A host that is not protected, and how it would be. handle: while it is protected."""

    kind: ClassVar[str]

    def __init__(
        self, host: Any, config: DPXAttnConfig, calibration: Any = None, tokenizer: Any = None
    ) -> None:
        self.host, self.config, self.calibration, self.tokenizer = host, config, calibration, tokenizer
        self.handle: Any = None

    @contextmanager
    def protected(self, config: DPXAttnConfig | None = None) -> Iterator[Any]:
        """The handle, with a ledger in memory that nobody else has; unprotected at the end."""
        chosen = self.config if config is None else config
        self.handle = protect(self.host, chosen, calibration=self.calibration, ledger=Ledger())
        try:
            yield self.handle
        finally:
            self.handle.unprotect()
            self.handle = None

    @property
    def by_groups(self) -> bool:
        return self.config.unit == "group"

    @property
    def serving(self) -> torch.nn.Module:
        """The model that must not see a private row."""
        raise NotImplementedError

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """All models of the host."""
        return {"model": self.host}

    def canaries(self, count: int) -> list[Canary]:
        """Different canaries; those of groups differ in the last part only."""
        found = self._parts(count + (PARTS - 1 if self.by_groups else 0))
        fixed = tuple(found[count:])
        return [(*fixed, part) for part in found[:count]]

    def from_texts(self, texts: Sequence[str]) -> list[Canary]:
        """Canaries of a user's own texts; for groups each is one unit beside others that are the same for all.

        Raises:
            ConfigError: the host takes no text, or has no tokenizer beside it.
        """
        fixed = self.canaries(1)[0][:-1]
        return [(*fixed, part) for part in self._of_texts(texts)]

    def _parts(self, count: int) -> list[Any]:
        raise NotImplementedError

    def _of_texts(self, texts: Sequence[str]) -> list[Any]:
        raise ConfigError("This host takes no text on its own; leave the texts out.")

    def release(self, canary: Canary, **options: Any) -> Any:
        """Releases it on the protected host."""
        raise NotImplementedError

    def answer(self, inputs: dict[str, Any]) -> Outputs:
        """What the host makes of these inputs; sampling starts from one seed."""
        raise NotImplementedError

    def inputs(self, release: Any) -> dict[str, Any]:
        return dict(release.inputs())

    def direct(self, canary: Canary) -> Outputs | None:
        """The ordinary use of the protected host, where a context is given to it as if it were not; None where there is none."""
        return None

    def plain(self, canary: Canary) -> Outputs:
        """The unprotected host reads the canary itself."""
        raise NotImplementedError

    def shuffled(self, canary: Canary) -> Canary | None:
        """A canary of the same tokens: what its rows share with the canary's depends on single tokens alone, as in layers that see no
        other token yet, and may turn up wherever such a token does. None where rows always know of each other."""
        return None

    def refused(self) -> None:
        """Calls the protected host without a release; must raise."""
        raise NotImplementedError


class PipelineSubject(Subject):
    """A Stable Diffusion pipeline of diffusers."""

    kind = "pipeline"
    steps = 2

    @property
    def unet(self) -> Any:
        return self.host.unet

    @property
    def serving(self) -> torch.nn.Module:
        return self.unet

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
        return [self._call(**self._given(canary))]

    def plain(self, canary: Canary) -> Outputs:
        return [self._call(**self._given(canary))]

    def _given(self, canary: Canary) -> dict[str, Any]:
        if self._has_text:
            return {"prompt": ", ".join(canary)}
        rows = torch.cat(canary).unsqueeze(0)
        return {"prompt_embeds": rows, "negative_prompt_embeds": torch.zeros_like(rows)}

    def refused(self) -> None:
        channels = self.unet.config.cross_attention_dim
        self.unet(
            *self.step_inputs(), torch.zeros(1, 8, channels, dtype=self.unet.dtype, device=self.unet.device)
        )

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

    def plain(self, canary: Canary) -> Outputs:
        return self.answer({"encoder_hidden_states": torch.cat(canary).unsqueeze(0)})


class TransformersSubject(Subject):
    """What models of transformers share. new_tokens: how many an answer has."""

    new_tokens = 2

    @property
    def serving(self) -> torch.nn.Module:
        model: torch.nn.Module = self.host
        return model

    @torch.no_grad()
    def answer(self, inputs: dict[str, Any]) -> Outputs:
        torch.manual_seed(0)
        out: Any = self.host.generate(
            **inputs,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return [out.sequences, torch.stack(tuple(out.scores))]

    def _parts(self, count: int) -> list[Any]:
        if self.tokenizer is None:
            return list(canaries.random_ids(self.host, count, IDS))
        return self._of_texts(canaries.texts(self.tokenizer, count))

    def _of_texts(self, texts: Sequence[str]) -> list[Any]:
        if self.tokenizer is None:
            raise ConfigError("Texts need a tokenizer beside the model.")
        return [torch.tensor(self._encode(t)) for t in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text).input_ids
        return ids


class Seq2SeqSubject(TransformersSubject):
    """An encoder-decoder model; contexts are documents, or what else its encoder takes."""

    kind = "encoder-decoder"

    @property
    def serving(self) -> torch.nn.Module:
        joined = getattr(self.host, "decoder", None)  # EncoderDecoderModel
        decoder: torch.nn.Module = self.host.get_decoder() if joined is None else joined
        return decoder

    @property
    def _reads_text(self) -> bool:
        return bool(self.host.main_input_name == "input_ids")

    def _parts(self, count: int) -> list[Any]:
        if self._reads_text:
            return super()._parts(count)
        raise ConfigError(
            f"This model reads {self.host.main_input_name}: give two contexts of your own, contexts=[...], as mappings of encoder inputs."
        )

    def _given(self, canary: Canary) -> dict[str, Any]:
        if isinstance(canary[0], dict):
            return dict(canary[0])
        longest = max(map(len, canary))
        pad = getattr(self.host.config, "pad_token_id", None) or 0
        ids = torch.full((len(canary), longest), pad)
        mask = torch.zeros_like(ids)
        for i, part in enumerate(canary):
            ids[i, : len(part)], mask[i, : len(part)] = part, 1
        return {"input_ids": ids, "attention_mask": mask}

    def release(self, canary: Canary, **options: Any) -> Any:
        groups = {"groups": "documents"} if self.by_groups else {}
        return self.handle.release(**self._given(canary), **groups, **options)

    def direct(self, canary: Canary) -> Outputs | None:
        return None if self.by_groups else self.answer(self._given(canary))

    def plain(self, canary: Canary) -> Outputs:
        return self.answer(self._given(canary[-1:]))

    def refused(self) -> None:
        from transformers.modeling_outputs import BaseModelOutput

        rows = torch.zeros(1, 4, self.handle.channels, dtype=self.host.dtype, device=self.host.device)
        start = torch.tensor([[self.host.config.decoder_start_token_id or 0]], device=self.host.device)
        self.host(encoder_outputs=BaseModelOutput(last_hidden_state=rows), decoder_input_ids=start)


class DecoderSubject(TransformersSubject):
    """A decoder-only model; contexts are private prefixes, and a public question follows."""

    kind = "decoder-only"
    question: str | None = None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @property
    def _chat(self) -> bool:
        return self.tokenizer is not None and bool(getattr(self.tokenizer, "chat_template", None))

    def public(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(head [h], question [1, m]): public ids before and after the prefix."""
        if self.tokenizer is None:
            own = canaries.random_ids(self.host, 1, IDS, seed=1)[0]
            return own[:1], own[1:].unsqueeze(0)
        question = self.question or canaries.texts(self.tokenizer, 1, seed=1)[0]
        if self._chat:
            from ..hosts.decoder_only.chat import split_chat

            system = {"role": "system", "content": "a"}
            split = split_chat(self.tokenizer, [system, {"role": "user", "content": question}])
            return split.head, split.input_ids
        bos = self.tokenizer.bos_token_id
        head = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
        return head, torch.tensor([self._encode(question)])

    def release(self, canary: Canary, **options: Any) -> Any:
        given: Any = [p.tolist() for p in canary] if self.by_groups else torch.cat(canary)
        groups = {"groups": "segments"} if self.by_groups else {}
        return self.handle.release(given, public_head=self.public()[0], **groups, **options)

    def shuffled(self, canary: Canary) -> Canary | None:
        return tuple(part.flip(0) for part in canary)

    def inputs(self, release: Any) -> dict[str, Any]:
        return dict(release.inputs(input_ids=self.public()[1].to(self.host.device)))

    def plain(self, canary: Canary) -> Outputs:
        head, question = self.public()
        ids = torch.cat([head, *canary, question[0]]).unsqueeze(0).to(self.host.device)
        return self.answer({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def refused(self) -> None:
        self.host(input_ids=self.public()[1].to(self.host.device))


class ImageTextSubject(TransformersSubject):
    """A model whose text reads an image by cross-attention (Mllama); contexts are random images."""

    kind = "image-text"

    @property
    def serving(self) -> torch.nn.Module:
        model: torch.nn.Module = self.host.model.language_model
        return model

    def _parts(self, count: int) -> list[Any]:
        vision = self.host.config.vision_config
        tiles, size = int(vision.max_num_tiles), int(vision.image_size)
        mask = torch.zeros(1, 1, tiles, dtype=torch.int64)
        mask[..., 0] = 1
        found = []
        for i in range(count):
            generator = torch.Generator().manual_seed(i)
            pixels = (
                torch.randn(1, 1, tiles, 3, size, size, generator=generator) * mask[..., None, None, None]
            )
            ratio = torch.ones(1, 1, dtype=torch.int64)
            found.append({"pixel_values": pixels, "aspect_ratio_ids": ratio, "aspect_ratio_mask": mask})
        return found

    def canaries(self, count: int) -> list[Canary]:
        if self.by_groups:
            raise ConfigError(
                "An image's rows have no groups that an audit could choose; audit unit 'row' or 'context'."
            )
        return super().canaries(count)

    def _of_texts(self, texts: Sequence[str]) -> list[Any]:
        return Subject._of_texts(self, texts)

    def text(self) -> dict[str, Any]:
        ids = canaries.random_ids(self.host, 1, IDS, seed=1)[0]
        ids[0] = self.host.config.image_token_index
        return {"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones(1, IDS, dtype=torch.int64)}

    def release(self, canary: Canary, **options: Any) -> Any:
        return self.handle.release(**canary[-1], **options)

    def inputs(self, release: Any) -> dict[str, Any]:
        return dict(release.inputs(**self.text()))

    def direct(self, canary: Canary) -> Outputs | None:
        return self.answer({**canary[-1], **self.text()})

    def plain(self, canary: Canary) -> Outputs:
        return self.answer({**canary[-1], **self.text()})

    def refused(self) -> None:
        self.host(**self.canaries(1)[0][-1], **self.text())


def subject_of(host: Any, config: DPXAttnConfig, calibration: Any = None, tokenizer: Any = None) -> Subject:
    """The subject for a host that is not protected.

    Raises:
        UnsupportedModelError: see `protect`. ConfigError: it is protected already.
    """
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    from ..hosts.architectures import refuse_host
    from ..hosts.decoder_only.probing import is_decoder_only
    from ..hosts.image_text.probing import is_image_text
    from ..hosts.protect import handle_of
    from ..hosts.seq2seq.probing import is_seq2seq

    if handle_of(host) is not None:
        raise ConfigError(
            "This host is protected: call dpx.unprotect(host) first. It is protected here with a ledger of its own, and left "
            "unprotected."
        )
    if isinstance(host, DiffusionPipeline):
        kind: type[Subject] = PipelineSubject
    elif isinstance(host, UNet2DConditionModel):
        kind = UNetSubject
    elif is_seq2seq(host):
        kind = Seq2SeqSubject
    elif is_image_text(host):
        kind = ImageTextSubject
    elif is_decoder_only(host):
        kind = DecoderSubject
    else:
        raise refuse_host(host)
    return kind(host, config, calibration, tokenizer)


def _embeddings(channels: int, count: int) -> list[torch.Tensor]:
    return [torch.randn(8, channels, generator=torch.Generator().manual_seed(1000 + i)) for i in range(count)]


def _whole(canary: Canary, by_groups: bool) -> tuple[Any, ...]:
    return (torch.cat(canary) if isinstance(canary[0], torch.Tensor) else canary[0],)


def _numbers(canary: Canary, by_groups: bool) -> dict[str, Any]:
    if not by_groups:
        return {}
    lengths = torch.tensor([len(part) for part in canary])
    return {"groups": torch.arange(len(canary)).repeat_interleave(lengths)}
