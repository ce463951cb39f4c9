"""`Subject`: a host as an audit, a benchmark and a demonstration use it: protect, release a canary, answer from it, answer unprotected.

All goes through the public interface. A canary is a tuple of parts: one text (token ids, an image, ...), or, for unit="group", several, of
which each is a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..hosts.placeholder import CODE_CHANNELS
from ..hosts.protect import protect
from ..privacy.ledger import Budget, Ledger

MANY = 1000  # releases that the ledger of an audit of groups has room for
PARTS = 3  # units of a canary of groups; the last one is what canaries differ in
Canary = tuple[Any, ...]
Outputs = list[torch.Tensor]


class Subject:
    """A host that is not protected, and how it would be. handle: while it is protected."""

    kind: ClassVar[str]
    draws: ClassVar[bool] = False  # pictures, and no texts
    joint: ClassVar[str] = ", "  # between texts that are joined
    layered: ClassVar[bool] = True  # layers read the release; else the host reads released text

    def __init__(
        self, host: Any, config: DPXAttnConfig, calibration: Any = None, tokenizer: Any = None
    ) -> None:
        self.host, self.config, self.calibration, self.tokenizer = host, config, calibration, tokenizer
        self.handle: Any = None

    @contextmanager
    def protected(self, config: DPXAttnConfig | None = None) -> Iterator[Any]:
        """The handle, with a ledger in memory that nobody else has; unprotected at the end."""
        chosen = self.config if config is None else config
        # canaries that are groups stand beside the same others, and a document that is released again is charged again
        budget = Budget(MANY * chosen.epsilon, min(0.5, MANY * chosen.delta)) if self.by_groups else None
        self.handle = protect(
            self.host,
            chosen,
            calibration=self.calibration,
            ledger=Ledger(),
            budget=budget,
            allow_useless=True,  # what it gives away is asked here, not what it is worth
            allow_uncalibrated=True,
            allow_large_epsilon=True,
            tokenizer=None if self.layered else self.tokenizer,
        )
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

    def whole(self, texts: Sequence[str]) -> Canary:
        """ONE context of several texts: its units, or joined where the unit is not a group."""
        return tuple(self._of_texts(texts if self.by_groups else [self.joint.join(texts)]))

    def given(self, canary: Canary) -> dict[str, Any]:
        """What the unprotected host is called with."""
        raise NotImplementedError

    def unprotected(self, canary: Canary) -> dict[str, Any]:
        """The same with all its parts in one text, as one would without a protection."""
        return self.given(canary)

    def nothing(self) -> dict[str, Any] | None:
        """The unprotected host's inputs without any context; None where there are none."""
        return None

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
        found = []
        for value in inputs.values():
            states = getattr(value, "last_hidden_state", value)
            if isinstance(states, torch.Tensor) and states.is_floating_point():
                rest = (states[:, 1:], states[:, 0, CODE_CHANNELS:])
                found.append(all(bool(part.isnan().all()) for part in rest))
        return bool(found) and all(found)

    def lose(self, name: str) -> Callable[[], None]:
        """Takes the protection off one layer; returns what puts it back."""
        raise NotImplementedError

    def ungated(self, inputs: dict[str, Any]) -> Outputs:
        """As `answer`, where the host's gate looks no more."""
        return self.answer(inputs)
