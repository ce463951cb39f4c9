"""The two kinds of host: how each is built, how n private rows get into it unprotected, and how they are released."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.fingerprint import fingerprint
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_layers import prefix_fingerprint
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_probing import find_layers as find_decoder_layers
from hf_dp_xattn.hosts.transformers.encoder_decoder.cross_probing import find_layers as find_cross_layers
from token_parts.caches import InPlaceCache, dynamic
from token_parts.calibrations import CONFIG, unfitted

Inputs = Callable[[], dict[str, Any]]
BLOCK = 4096  # rows that differ from each other; longer contexts repeat them


@dataclass(frozen=True)
class Sizes:
    """Of a decoder. key_heads: fewer than heads where query heads share them; inner: width of an MLP; question: tokens."""

    layers: int = 6
    width: int = 512
    heads: int = 8
    key_heads: int = 8
    inner: int = 2048
    vocabulary: int = 32_000
    question: int = 16


def repeated(rows: int, *shape: int, seed: int) -> torch.Tensor:
    """[rows, *shape] float32 numbers, the same ones again every 4,096 rows."""
    block = torch.randn(min(rows, BLOCK), *shape, generator=torch.Generator().manual_seed(seed))
    return block.repeat(-(-rows // len(block)), *(1 for _ in shape))[:rows]


class Host:
    """A random model, and protected copies of it. A private context is n random rows of context space."""

    name: str

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.plain = self._build()
        generator = torch.Generator().manual_seed(3)
        self.question = torch.randint(3, sizes.vocabulary, (1, sizes.question), generator=generator)

    def _model(self) -> Any:
        raise NotImplementedError

    def _build(self) -> Any:
        torch.manual_seed(0)
        model = self._model().eval().requires_grad_(False)
        model.generation_config.eos_token_id = None  # answers are of one length
        return model

    def describe(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.plain.parameters())
        return {"name": self.name, "parameters": parameters, **asdict(self.sizes)}

    def protect(self, mechanism: str) -> Any:
        """The handle of a protected copy."""
        model = self._build()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # "none" is not private, kernel_sum has no calibration: known here
            ledger = dpx.Ledger()  # random contexts, released by each mechanism in turn
            if mechanism != "anchors":
                return dpx.protect(
                    model,
                    dpx.DPXAttnConfig(unit="row", mechanism=mechanism),
                    ledger=ledger,
                    allow_uncalibrated=True,
                )
            return dpx.protect(model, CONFIG, calibration=self._calibration(model), ledger=ledger)

    def _calibration(self, model: Any) -> Any:
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """Of context space."""
        raise NotImplementedError

    def rows(self, n: int) -> torch.Tensor:
        """[n, C] private rows."""
        return repeated(n, self.channels, seed=1)

    def release(self, handle: Any, rows: torch.Tensor) -> dpx.Release:
        """Released as they are, without a run of the model that makes them."""
        raise NotImplementedError

    def protected_inputs(self, release: dpx.Release) -> Inputs:
        raise NotImplementedError

    def exact_inputs(self, n: int, answer: int) -> tuple[Inputs, Callable[[], Inputs] | None]:
        """Inputs of the unprotected model that hold n private rows; where it would use another cache by default, how to get those.

        answer: tokens that one question's answer may have.
        """
        raise NotImplementedError

    def watched(self, model: Any) -> list[nn.Module]:
        """The attention modules that see the context."""
        raise NotImplementedError


class DecoderOnly(Host):
    """A Llama: the private prefix is n tokens, that is keys and values of n positions in every layer."""

    name = "Llama"

    def _model(self) -> Any:
        s = self.sizes
        return tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=s.vocabulary,
                hidden_size=s.width,
                intermediate_size=s.inner,
                num_hidden_layers=s.layers,
                num_attention_heads=s.heads,
                num_key_value_heads=s.key_heads,
                max_position_embeddings=2**20,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )

    def _calibration(self, model: Any) -> Any:
        return unfitted(prefix_fingerprint(model, find_decoder_layers(model)), self.channels)

    @property
    def _head_dim(self) -> int:
        return self.sizes.width // self.sizes.heads

    @property
    def channels(self) -> int:
        return self.sizes.layers * 2 * self.sizes.key_heads * self._head_dim

    def release(self, handle: Any, rows: torch.Tensor) -> dpx.Release:
        """A run of the model over n tokens would take hours for the longest, so its place is taken by these rows."""
        encoder = handle.host.encoder
        encoder.encode = lambda head, segments: (rows, rows[:0])
        try:
            ids = torch.arange(len(rows)) % self.sizes.vocabulary
            release: dpx.Release = handle.release(ids, prefix_bucket=len(rows))
        finally:
            del encoder.encode
        return release

    def protected_inputs(self, release: dpx.Release) -> Inputs:
        return lambda: release.inputs(input_ids=self.question)

    def exact_inputs(self, n: int, answer: int) -> tuple[Inputs, Callable[[], Inputs] | None]:
        heads, width = self.sizes.key_heads, self._head_dim

        def part(layer: int, side: int) -> torch.Tensor:
            block = self.rows(min(n, BLOCK)).view(-1, self.sizes.layers, 2, heads, width)
            block = block[:, layer, side].transpose(0, 1).unsqueeze(0)
            return block.repeat(1, 1, -(-n // BLOCK), 1)[:, :, :n]

        pairs = ((part(i, 0), part(i, 1)) for i in range(self.sizes.layers))
        cache = InPlaceCache(pairs, self.sizes.question + answer)
        mask = torch.ones(1, n + self.sizes.question, dtype=torch.int64)

        def inputs() -> dict[str, Any]:
            cache.rewind()
            return {"input_ids": self.question, "attention_mask": mask, "past_key_values": cache}

        def by_default() -> Inputs:
            grown = dynamic(cache)
            return lambda: {"input_ids": self.question, "attention_mask": mask, "past_key_values": grown}

        return inputs, by_default

    def watched(self, model: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in model.model.layers]


class EncoderDecoder(Host):
    """A BART: n rows of documents that the encoder read apart from each other, as in Fusion-in-Decoder. The question starts the decoder.

    T5 adds a bias of zeros to its cross-attention, which makes its exact attention slower; BART's has none.
    """

    name = "BART"

    def _model(self) -> Any:
        s = self.sizes
        return tf.BartForConditionalGeneration(
            tf.BartConfig(
                vocab_size=s.vocabulary,
                d_model=s.width,
                encoder_layers=1,  # never run
                decoder_layers=s.layers,
                encoder_attention_heads=s.heads,
                decoder_attention_heads=s.heads,
                encoder_ffn_dim=s.inner,
                decoder_ffn_dim=s.inner,
                max_position_embeddings=1024,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                forced_eos_token_id=None,
            )
        )

    def _calibration(self, model: Any) -> Any:
        layers: dict[str, Any] = dict(find_cross_layers(model))
        return unfitted(fingerprint(layers.values(), model.dtype), self.channels)

    @property
    def channels(self) -> int:
        return self.sizes.width

    def release(self, handle: Any, rows: torch.Tensor) -> dpx.Release:
        release: dpx.Release = handle.release(rows)
        return release

    def protected_inputs(self, release: dpx.Release) -> Inputs:
        return lambda: release.inputs(decoder_input_ids=self.question)

    def exact_inputs(self, n: int, answer: int) -> tuple[Inputs, Callable[[], Inputs] | None]:
        rows = self.rows(n).unsqueeze(0)
        return lambda: {
            "encoder_outputs": BaseModelOutput(last_hidden_state=rows),
            "decoder_input_ids": self.question,
        }, None

    def watched(self, model: Any) -> list[nn.Module]:
        return [layer.encoder_attn for layer in model.model.decoder.layers]
