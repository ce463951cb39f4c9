"""`Driver`: how a host is used from plain texts, by the audit, the benchmark, the demonstration and the command line.

All goes through the public interface. A canary is a tuple of parts: one text (token ids, an image, ...), or, for unit="group", several, of
which each is a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..records import records_of
from .placeholder import CODE_CHANNELS

PARTS = 3  # units of a canary of groups; the last one is what canaries differ in
NOTHING = "Nothing was spent."
LENGTH = "--length is for encoder-decoder models, of which a text is one document."
DECODERS = "--chat and --prefix-bucket are for decoder-only models."
Canary = tuple[Any, ...]
Outputs = list[torch.Tensor]


Runs = dict[str, Callable[[], torch.Tensor]]
STEP, FIRST, ANSWER = "step", "first token", "answer"  # what is timed


@dataclass(frozen=True)
class Timed:
    """what: in words. tokens: of an answer (1: no answers). runs: of a canary and its release (None: unprotected), by name."""

    what: str
    tokens: int
    runs: Callable[[Canary, Any], Runs]


class Driver:
    """A host that is not protected, or one that is.

    Args:
        host: a pipeline or model.
        config, calibration: how it is or would be protected.
        tokenizer: of a model of transformers; None for pipelines, which have their own, and where there is none.
        protect: (driver, config) -> its handle, of a context manager; for trials.
        handle: while it is protected.
        options: of the command line, by their names there: public, begin, chat, prefix_bucket, new_tokens, seed, steps, ...

    kind: in words. foreign: options that it has no use for, by what is said of them. notes: what is to be told about the options.
    """

    kind: ClassVar[str]
    foreign: ClassVar[dict[str, tuple[str, ...]]] = {}
    draws: ClassVar[bool] = False  # pictures, and no texts
    tokenizes: ClassVar[bool] = False  # by the tokenizer beside it
    asks: ClassVar[bool] = False  # whether it answers a public question
    joint: ClassVar[str] = ", "  # between texts that are joined
    layered: ClassVar[bool] = True  # layers read the release; else the host reads released text

    def __init__(
        self,
        host: Any,
        config: DPXAttnConfig,
        calibration: Any = None,
        tokenizer: Any = None,
        *,
        protect: Callable[[Driver, DPXAttnConfig], AbstractContextManager[Any]] | None = None,
        handle: Any = None,
        options: Any = None,
    ) -> None:
        self.host, self.config, self.calibration, self.tokenizer = host, config, calibration, tokenizer
        self.handle, self.options, self._protect = handle, options, protect
        self.notes: list[str] = []

    @contextmanager
    def protected(self, config: DPXAttnConfig | None = None) -> Iterator[Any]:
        """The handle, with a ledger in memory that nobody else has; unprotected at the end."""
        assert self._protect is not None
        with self._protect(self, self.config if config is None else config) as handle:
            self.handle = handle
            try:
                yield handle
            finally:
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

    # ---- texts of the command line -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises ConfigError for options of other kinds of host, before anything is spent."""
        for sentence, names in self.foreign.items():
            used = [f"--{n.replace('_', '-')}" for n in names if is_used(getattr(self.options, n, None))]
            if used:
                raise ConfigError(sentence.format(used=", ".join(used), first=used[0]))

    def check_trial(self) -> None:
        """Raises ConfigError where an audit or a benchmark has nothing to try here."""

    def lines(self, text: str) -> list[str]:
        """The units of a text: its lines, or with another unit all of it."""
        return records_of(text) if self.by_groups else [text]

    def public_contexts(self, texts: list[Any], questions: list[str] | None) -> tuple[Any, dict[str, Any]]:
        """PUBLIC contexts and further options as `calibrate` takes them. texts: of a context each, or lists of its units.

        Raises:
            ConfigError: options or texts that are not for this host.
        """
        raise NotImplementedError

    def release_text(self, text: str) -> Any:
        """Releases one private text; with unit="group", its lines (phrases of a prompt) are the groups."""
        raise NotImplementedError

    def prepare(self, release: Any | None, private: str | None) -> None:
        """Reads and checks all that is public of `generate`, before anything is spent.

        Args:
            release: a saved one, or None.
            private: the text that is to be released, or None.
        """
        raise NotImplementedError

    def draw(self, release: Any) -> list[Any]:
        """Pictures or texts of a release."""
        raise NotImplementedError

    def draw_plain(self, text: str | None) -> list[Any]:
        """What the host makes of a PUBLIC text, or of none, without a protection; nothing where it needs one."""
        raise NotImplementedError

    def timed(self, latents: int | None, new_tokens: int | None) -> Timed:
        """What a benchmark compares, protected and not.

        Args:
            latents: edge of pictures' latents. new_tokens: of an answer.

        Raises:
            ConfigError: nothing is, or an option is for other hosts.
        """
        raise ConfigError("A benchmark has nothing to compare here.")

    # ---- canaries ----------------------------------------------------------------------------------------------------------

    def canaries(self, count: int) -> list[Canary]:
        """Different canaries; those of groups differ in the last part only."""
        parts = self._parts(count + (PARTS - 1 if self.by_groups else 0))
        fixed = tuple(parts[count:])
        return [(*fixed, part) for part in parts[:count]]

    def from_texts(self, texts: Sequence[str]) -> list[Canary]:
        """Canaries of a user's own texts; for groups each is one unit beside others that are the same for all.

        Raises:
            ConfigError: the host takes no text, or has no tokenizer beside it.
        """
        fixed = self.canaries(1)[0][:-1]
        return [(*fixed, part) for part in self._of_texts(texts)]

    def call_inputs(self, canary: Canary) -> dict[str, Any]:
        """What the unprotected host is called with."""
        raise NotImplementedError

    def unprotected(self, canary: Canary) -> dict[str, Any]:
        """The same with all its parts in one text, as one would without a protection."""
        return self.call_inputs(canary)

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
        return self.answer(self.call_inputs(canary))

    def release_alone(self, canary: Canary) -> bool:
        """Releases each token of a canary by itself: what its rows share with the canary's depends on single tokens, as in layers that
        have seen no other token yet, and turns up wherever such a token does. False where rows always know of each other."""
        return False

    def refused(self) -> None:
        """Calls the protected host without a release; must raise."""
        raise NotImplementedError

    # ---- what a leak test does to a protected host -------------------------------------------------------------------------

    def is_blank(self, inputs: dict[str, Any]) -> bool:
        """No number in what stands in for the private rows but the marker's."""
        blank = []
        for value in inputs.values():
            states = getattr(value, "last_hidden_state", value)
            if isinstance(states, torch.Tensor) and states.is_floating_point():
                rest = (states[:, 1:], states[:, 0, CODE_CHANNELS:])
                blank.append(all(bool(part.isnan().all()) for part in rest))
        return bool(blank) and all(blank)

    def lose(self, name: str) -> Callable[[], None]:
        """Takes the protection off one layer; returns what puts it back."""
        raise NotImplementedError

    def ungated(self, inputs: dict[str, Any]) -> Outputs:
        """As `answer`, where the host's gate looks no more."""
        return self.answer(inputs)


def is_used(value: Any) -> bool:
    """Whether an option was given; 0 was."""
    return value is not None and value is not False
