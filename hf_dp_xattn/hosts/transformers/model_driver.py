"""Models of transformers, used from plain texts: what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from ...errors import ConfigError
from .. import canaries
from ..driver import ANSWER, FIRST, NOTHING, Canary, Driver, Outputs, Runs, Timed

IDS = 6  # tokens of a canary where there is no tokenizer
NEW_TOKENS = 60  # of a text that the command line writes
PICTURES: dict[str, tuple[str, ...]] = {
    "{used}: for pictures, and this model writes text.": ("steps", "guidance", "height", "width")
}


class ModelDriver(Driver):
    """What models of transformers share.

    new_tokens: how many an answer has. public: inputs beside a release. skip: how many of their tokens stand before a text's answer.
    """

    tokenizes = True
    joint: ClassVar[str] = "\n"
    new_tokens = 2
    public: dict[str, Any]
    skip: int

    @property
    def serving(self) -> torch.nn.Module:
        model: torch.nn.Module = self.host
        return model

    # ---- texts of the command line -----------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Tokens of a text that is drawn, at most."""
        return NEW_TOKENS if self.options.new_tokens is None else int(self.options.new_tokens)

    def begins(self, inputs: dict[str, Any]) -> int:
        """How many tokens the output begins with, which are not printed again."""
        return self.skip

    def draw(self, release: Any) -> list[Any]:
        inputs = release.inputs(**self.public)
        return self._texts(inputs, self.begins(inputs))

    def _texts(self, inputs: dict[str, Any], skip: int) -> list[str]:
        sampling: dict[str, Any] = {"max_new_tokens": self.longest}
        if self.options.seed is not None:
            torch.manual_seed(self.options.seed)
            sampling["do_sample"] = True
        ids = self.host.generate(**inputs, **sampling)
        texts: list[str] = self.tokenizer.batch_decode(ids[:, skip:], skip_special_tokens=True)
        return texts

    def _plain_texts(self, inputs: dict[str, Any], skip: int) -> list[str]:
        with self.handle.public():
            return self._texts({name: ids.to(self.host.device) for name, ids in inputs.items()}, skip)

    # ---- canaries ----------------------------------------------------------------------------------------------------------

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

    def timed(self, latents: int | None, new_tokens: int | None) -> Timed:
        if latents is not None:
            raise ConfigError("--latents is for pipelines of pictures, and this model writes text.")
        tokens = 16 if new_tokens is None else new_tokens
        if not 2 <= tokens <= 10_000:
            raise ConfigError(f"--new-tokens must be 2 to 10,000, got {tokens}.")

        def runs(canary: Canary, release: Any) -> Runs:
            def answer(count: int) -> torch.Tensor:
                self.new_tokens = count
                return self.answer(self.unprotected(canary) if release is None else self.inputs(release))[1]

            return {FIRST: lambda: answer(1), ANSWER: lambda: answer(tokens)}

        return Timed(f"an answer of {tokens} tokens ({self.kind} model, greedy, batch 1)", tokens, runs)

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


def public_words(ids: torch.Tensor) -> torch.Tensor:
    """ids [1, m] of public words. Raises ConfigError where there are none."""
    if not ids.shape[1]:
        raise ConfigError(f"--public holds no words. {NOTHING}")
    return ids
