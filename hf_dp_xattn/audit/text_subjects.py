"""Language models of transformers as subjects: encoder-decoder, decoder-only, image-text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ConfigError
from . import canaries
from .subject import Canary, Outputs, Subject

IDS = 6  # tokens of a canary where there is no tokenizer


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

    def lose(self, name: str) -> Callable[[], None]:
        module = self.handle.layers[name].module
        routed, module.config = module.config, self.handle.host.originals[name]
        return lambda: setattr(module, "config", routed)

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

    def given(self, canary: Canary) -> dict[str, Any]:
        if isinstance(canary[0], dict):
            return dict(canary[0])
        longest = max(map(len, canary))
        pad = getattr(self.host.config, "pad_token_id", None) or 0
        ids = torch.full((len(canary), longest), pad)
        mask = torch.zeros_like(ids)
        for i, part in enumerate(canary):
            ids[i, : len(part)], mask[i, : len(part)] = part, 1
        device = self.host.device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def unprotected(self, canary: Canary) -> dict[str, Any]:
        return self.given(canary if isinstance(canary[0], dict) else (torch.cat(canary),))

    def release(self, canary: Canary, **options: Any) -> Any:
        groups = {"groups": "documents"} if self.by_groups else {}
        return self.handle.release(**self.given(canary), **groups, **options)

    def direct(self, canary: Canary) -> Outputs | None:
        return None if self.by_groups else self.answer(self.given(canary))

    def plain(self, canary: Canary) -> Outputs:
        return self.answer(
            self.given(canary[-1:])
        )  # documents that are encoded apart have no unprotected counterpart

    def refused(self) -> None:
        from transformers.modeling_outputs import BaseModelOutput

        rows = torch.zeros(1, 4, self.handle.host.channels, dtype=self.host.dtype, device=self.host.device)
        start = torch.tensor([[self.host.config.decoder_start_token_id or 0]], device=self.host.device)
        self.host(encoder_outputs=BaseModelOutput(last_hidden_state=rows), decoder_input_ids=start)


class DecoderSubject(TransformersSubject):
    """A decoder-only model; contexts are private prefixes, and a public question follows."""

    kind = "decoder-only"
    joint = "\n"
    question: str | None = None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @property
    def _chat(self) -> bool:
        return self.tokenizer is not None and bool(getattr(self.tokenizer, "chat_template", None))

    @functools.cache  # noqa: B019 (a subject lives as long as its host is tried out)
    def public(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(head [h], question [1, m]): public ids before and after the prefix; `question` must be set before."""
        if self.tokenizer is None:
            own = canaries.random_ids(self.host, 1, IDS, seed=1)[0]
            return own[:1], own[1:].unsqueeze(0)
        question = self.question or canaries.texts(self.tokenizer, 1, seed=1)[0]
        if self._chat:
            from ..hosts.transformers.decoder_only.chat import split_chat

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

    def is_blank(self, inputs: dict[str, Any]) -> bool:
        cache = inputs["past_key_values"]
        return all(layer.keys is None or layer.keys.numel() == 0 for layer in cache.layers)

    def release_alone(self, canary: Canary) -> bool:
        tokens = [[token] for token in torch.cat(canary).unique().tolist()]
        self.handle.release(tokens, groups="segments", public_head=self.public()[0])
        return True

    def inputs(self, release: Any) -> dict[str, Any]:
        return dict(release.inputs(input_ids=self.public()[1].to(self.host.device)))

    def given(self, canary: Canary) -> dict[str, Any]:
        head, question = self.public()
        ids = torch.cat([head, *canary, question[0]]).unsqueeze(0).to(self.host.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def nothing(self) -> dict[str, Any] | None:
        head, question = self.public()
        ids = torch.cat([head, question[0]]).unsqueeze(0).to(self.host.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def plain(self, canary: Canary) -> Outputs:
        return self.answer(self.given(canary))

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
            image = {"pixel_values": pixels, "aspect_ratio_ids": ratio, "aspect_ratio_mask": mask}
            found.append({name: tensor.to(self.host.device) for name, tensor in image.items()})
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
        whole = ids.unsqueeze(0).to(self.host.device)
        return {"input_ids": whole, "attention_mask": torch.ones_like(whole)}

    def release(self, canary: Canary, **options: Any) -> Any:
        return self.handle.release(**canary[-1], **options)

    def inputs(self, release: Any) -> dict[str, Any]:
        return dict(release.inputs(**self.text()))

    def given(self, canary: Canary) -> dict[str, Any]:
        return {**canary[-1], **self.text()}

    def direct(self, canary: Canary) -> Outputs | None:
        return self.answer(self.given(canary))

    def plain(self, canary: Canary) -> Outputs:
        return self.answer(self.given(canary))

    def refused(self) -> None:
        self.host(**self.canaries(1)[0][-1], **self.text())
