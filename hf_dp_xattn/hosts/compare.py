"""`compare`: which of several calibrations serves a host best at an epsilon, by one score of public contexts that none of them has seen."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artefacts.card import table
from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..privacy.ledger import Budget, Ledger
from .accounts import STAYS
from .chosen import read_calibration
from .protect import handle_of, protect

if TYPE_CHECKING:
    from ..calibration.stored import Stored

Score = Callable[[Any, Sequence[Any]], Sequence[float]]
_SURE = 1.96  # standard errors


@dataclass(frozen=True)
class Compared:
    """One calibration at one epsilon. scores: of each context. mean, low, high: with the 95 % interval over contexts."""

    name: str
    epsilon: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return _SURE * float(np.std(self.scores, ddof=1)) / math.sqrt(len(self.scores))


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `dpx.compare` found. str() is a table.

    Args:
        calibrations: by name.
        points: of each calibration at each epsilon.

    Example:
        >>> def score(pipe, contexts):
        ...     return [float(len(c)) for c in contexts]
        >>> found = dpx.compare(pipe, {"a": library, "b": library}, ["a red circle", "a star"], score, epsilons=[8.0])
        >>> found.best(8.0) is library
        True
    """

    calibrations: Mapping[str, Stored]
    points: tuple[Compared, ...]

    def at(self, epsilon: float) -> list[Compared]:
        """The calibrations at one of the epsilons, the best one first; of equal ones the first that was given.

        Args:
            epsilon: one that was compared.

        Raises:
            ConfigError: it was not.
        """
        here = [p for p in self.points if p.epsilon == epsilon]
        if not here:
            known = ", ".join(f"{e:g}" for e in sorted({p.epsilon for p in self.points}))
            raise ConfigError(f"Compared were epsilon {known}, not {epsilon!r}.")
        return sorted(here, key=lambda p: -p.mean)

    def best(self, epsilon: float) -> Stored:
        """The calibration with the largest mean score, for `dpx.protect(host, epsilon=epsilon, calibration=...)`.

        Args:
            epsilon: one that was compared.

        Raises:
            ConfigError: it was not.
        """
        return self.calibrations[self.at(epsilon)[0].name]

    def sure(self, epsilon: float) -> bool:
        """Whether the best one is better than each other one with 95 % confidence, context by context.

        Args:
            epsilon: one that was compared.

        Raises:
            ConfigError: it was not.
        """
        first, *others = self.at(epsilon)
        gains = [np.subtract(first.scores, other.scores) for other in others]
        return all(g.mean() > _SURE * g.std(ddof=1) / math.sqrt(len(g)) for g in gains)

    def __str__(self) -> str:
        rows = []
        for epsilon in sorted({p.epsilon for p in self.points}):
            by_name = {p.name: p for p in self.at(epsilon)}
            best = self.at(epsilon)[0].name
            cells = (f"{by_name[name].mean:.3f} +- {by_name[name].half:.3f}" for name in self.calibrations)
            rows.append((f"{epsilon:g}", *cells, best if self.sure(epsilon) else f"{best} (not sure)"))
        return table(("epsilon", *self.calibrations, "best"), rows)


def compare(
    host: Any,
    calibrations: Mapping[str, Stored | str | os.PathLike[str]],
    public_contexts: Sequence[Any],
    score: Score,
    *,
    epsilons: Sequence[float],
    delta: float = 1e-5,
    encoder: Any = None,
) -> Comparison:
    """Protects a host by each calibration in turn, with public contexts in place of private ones, and scores what it then does.

    Nothing is charged to anybody's ledger, and the host is left as it was. That the choice costs no privacy rests on the contexts: they
    must be PUBLIC. They should not be among those that a calibration was made of.

    Args:
        host: as in `protect`, not protected.
        calibrations: by name, made for one unit and one relation; or their folders or Hub ids.
        public_contexts: 2 or more, as the host takes private ones.
        score: from (the protected host, the contexts) to a number for each context, of which more is better. It runs the host on them.
        epsilons: at which they are compared.
        delta: of the guarantees.
        encoder: mechanism="library" only, as in `protect`.

    Raises:
        ConfigError: fewer than two calibrations or contexts, calibrations for different units, a protected host, or scores that are no
            finite number for each context.

    Example:
        >>> def score(pipe, contexts):
        ...     return [float(pipe(c, num_inference_steps=1, output_type="latent").images.mean()) for c in contexts]
        >>> found = dpx.compare(pipe, {"a": library, "b": library}, ["a red circle", "a star"], score, epsilons=[8.0])
        >>> len(found.at(8.0))
        2
    """
    read = {name: read_calibration(source) for name, source in calibrations.items()}
    loaded = {name: c for name, c in read.items() if c is not None}
    if len(loaded) < 2 or len(loaded) < len(read):
        raise ConfigError("Comparing needs two calibrations or more, each under a name of its own.")
    promised = {
        f"{s['unit']}, {s.get('neighboring', 'replace_one')}"
        for s in (c.config_fields() for c in loaded.values())
    }
    if len(promised) > 1:
        raise ConfigError(
            f"These calibrations promise different things ({'; '.join(sorted(promised))}): compare such as protect the same unit under the "
            "same relation."
        )
    if isinstance(public_contexts, str) or len(public_contexts) < 2 or not epsilons:
        raise ConfigError("Comparing needs a list of two public contexts or more, and an epsilon at least.")
    if handle_of(host) is not None:
        raise ConfigError(f"Compare before `protect`, or after dpx.unprotect(host) ({STAYS}).")
    points = []
    for epsilon in sorted(set(map(float, epsilons))):
        for name, calibration in loaded.items():
            config = DPXAttnConfig(**{**calibration.config_fields(), "epsilon": epsilon, "delta": delta})
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # of large epsilons and of rows: what is protected here is public
                handle = protect(
                    host,
                    config,
                    calibration=calibration,
                    ledger=Ledger(),
                    budget=Budget(1e9, 0.5),  # public contexts may share what is charged by itself
                    encoder=encoder if config.mechanism == "library" else None,
                    allow_useless=True,
                )
                try:
                    scores = score(handle if host is None else host, public_contexts)
                finally:
                    handle.unprotect()
            points.append(Compared(name, epsilon, _checked(scores, len(public_contexts))))
    return Comparison(loaded, tuple(points))


def _checked(scores: Any, count: int) -> tuple[float, ...]:
    """Raises ConfigError unless there is a finite number for each context."""
    try:
        numbers = tuple(float(s) for s in scores)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"`score` must give a finite number for each of {count} contexts.")
    return numbers
