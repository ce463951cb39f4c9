"""The one shape of all mechanisms: exact integers, noise, decoding.

A `Mechanism` is a release of which everything public is fixed. `exact` turns private data into integers (PRIVATE: sums of the units'
clipped contributions, or the cells that units fall into), `noise` draws for each of them as `parts` says, `decode` is post-processing of
what `noise` gave and of public counts. `Mechanism.run` joins the three and says what is promised. Charging comes before (`events`), the
audit reads `parts` (`audit/laws.py`) and asks for `canaries`. What a growing context sums or collects over its appends
(`growing_release.py`) is a mechanism too, that of `growing`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..known_mechanisms import KNOWN
from ..privacy.accountant import Event, needs_delta
from ..privacy.bits import Entropy, SystemEntropy
from ..privacy.noise import sampling_distance
from ..privacy.units import public_counts
from ..report import Guarantee
from .context_rows import ContextRows
from .inputs import count_units
from .structure import AttentionStructure

PrivateT = TypeVar("PrivateT")
Integers = tuple[torch.Tensor, ...]
Content = tuple[AttentionStructure, ...] | ContextRows | tuple[str, ...]


@dataclass(frozen=True)
class LayerSpec:
    """A layer's public shape: heads, dims of keys and values, the logit scale, and (for hosts) its public weights.

    query_weight, key_weight: [H, d, channels] or None.
    """

    name: str
    heads: int
    key_dim: int
    value_dim: int
    scale: float
    query_weight: torch.Tensor | None = None
    key_weight: torch.Tensor | None = None


class Noise(Protocol):
    """A randomised step on one tensor of exact integers (`privacy/additive.py`, `privacy/response.py`)."""

    def perturb(self, integers: torch.Tensor, entropy: Entropy) -> torch.Tensor:
        """What may leave of `integers`: with noise on each entry, or an answer for each."""
        ...


@dataclass(frozen=True)
class NoisePart:
    """Some consecutive tensors of the exact integers: the noise that each of their entries gets, and what is charged for it.

    tensors: how many they are; None: all of them.
    """

    noise: Noise
    events: tuple[Event, ...]
    tensors: int | None = None


@dataclass(frozen=True)
class State:
    """What is public about released integers.

    rows, units: of how many they are; None where the relation or the unit makes that private.
    deviation: of the noise in a running total, in lattice steps; None: the mechanism's own.
    """

    rows: int | None
    units: int | None
    deviation: float | None = None


@dataclass(frozen=True)
class Summed:
    """What a continual sum adds up: `size` numbers on the lattice 2^-exponent, clipped to norm clip_norm. what: in words. One unit changes
    those of the append that it enters by at most `sensitivity` lattice steps (l2, neighbouring factor included)."""

    size: int
    sensitivity: int
    exponent: int
    clip_norm: float
    what: str


@dataclass(frozen=True)
class GuaranteeNumbers:
    """What a guarantee says of the arithmetic: clipping bound, sensitivity and noise on one scale, and the clipping in words."""

    clip_norm: float
    sensitivity: float
    sigma: float
    clipping: str = ""


@dataclass(frozen=True, eq=False)
class Released:
    """What left: structures (a layer each, batch 1), rows of context space, or public texts; and what is promised about them."""

    content: Content
    guarantee: Guarantee

    @property
    def structures(self) -> tuple[AttentionStructure, ...]:
        """A structure for each layer; none where rows or texts were released."""
        if isinstance(self.content, ContextRows):
            return ()
        return tuple(c for c in self.content if not isinstance(c, str))

    @property
    def context(self) -> ContextRows | None:
        """Rows for all layers; None where something else was released."""
        return self.content if isinstance(self.content, ContextRows) else None

    @property
    def texts(self) -> tuple[str, ...]:
        """Public texts, one for each unit; none where something else was released."""
        return (
            ()
            if isinstance(self.content, ContextRows)
            else tuple(c for c in self.content if isinstance(c, str))
        )


def guarantee_of(
    config: DPXAttnConfig,
    numbers: GuaranteeNumbers,
    rows: int,
    units: int,
    events: Sequence[Event],
    *,
    private_noise: bool,
    calibrated: bool,
) -> Guarantee:
    """The guarantee of one release: the only place in which one is built. events: what is charged."""
    pure = KNOWN[config.mechanism].releases == "texts" and not needs_delta(events)
    counts: dict[str, int | None] = (
        public_counts(config.unit, config.neighboring, rows, units)
        if config.is_private
        else {"rows": rows, "units": rows}
    )
    return Guarantee(
        mechanism=config.mechanism,
        epsilon=config.epsilon if config.is_private else math.inf,
        delta=0.0 if pure else config.delta,
        unit=config.unit,
        neighboring=config.neighboring,
        **counts,
        clip_norm=numbers.clip_norm,
        sensitivity=numbers.sensitivity,
        sigma=numbers.sigma,
        sampling_distance=sampling_distance() if config.is_private else 0.0,
        private_noise=private_noise and config.is_private,
        calibrated=calibrated,
        clipping=numbers.clipping,
    )


class Mechanism(ABC, Generic[PrivateT]):
    """A release of which everything public is fixed. `events` must be charged before `run` touches private data."""

    config: DPXAttnConfig
    warnings: tuple[str, ...] = ()
    calibrated: bool = True
    additive: ClassVar[bool] = False  # `exact` of many units is the sum of `exact` of each

    @property
    @abstractmethod
    def parts(self) -> tuple[NoisePart, ...]:
        """The noise of each tensor of `exact`, in order."""

    @property
    @abstractmethod
    def numbers(self) -> GuaranteeNumbers:
        """For the guarantee."""

    @abstractmethod
    def count(self, private: PrivateT, groups: torch.Tensor | None, *, empty: bool = False) -> int:
        """The number of rows (or texts). empty: there may be none.

        Raises:
            ConfigError, ContextError: bad data or groups; nothing is released.
        """

    @abstractmethod
    def exact(self, private: PrivateT, groups: torch.Tensor | None) -> Integers:
        """Exact integers of `private`. PRIVATE: without noise they must not leave.

        Raises:
            ConfigError, ContextError: bad data or groups.
        """

    @abstractmethod
    def decode(self, noised: Integers, state: State) -> Content:
        """What queries read. Post-processing of noised integers (of their running total, where a context grows) and public counts."""

    @property
    def events(self) -> tuple[Event, ...]:
        """What one release is charged."""
        return tuple(event for part in self.parts for event in part.events)

    def noise(self, exact: Integers, entropy: Entropy) -> Integers:
        """What may leave of `exact`."""
        return perturb(exact, self.parts, entropy)

    def run(
        self, private: PrivateT, *, groups: torch.Tensor | None = None, entropy: Entropy | None = None
    ) -> Released:
        """The release: exact, noise, decode; keeps nothing else of the private data.

        Args:
            private: what the mechanism takes: `LayerRows`, or rows [n, C].
            groups: [n] public group of each row, for unit='group'.
            entropy: noise source; the operating system's by default. A seeded one makes the result NOT private.

        Raises:
            ConfigError, ContextError: bad data or groups; nothing is released.
        """
        entropy = SystemEntropy() if entropy is None else entropy
        rows = self.count(private, groups)
        units = count_units(self.config.unit, rows, groups)
        return self.published(self.noise(self.exact(private, groups), entropy), rows, units, entropy.private)

    def published(self, noised: Integers, rows: int, units: int, private_noise: bool) -> Released:
        """What `run` gives of noised integers. Post-processing. private_noise: not seeded."""
        content = self.decode(noised, self.state(rows, units))
        guarantee = guarantee_of(
            self.config,
            self.numbers,
            rows,
            units,
            self.events,
            private_noise=private_noise,
            calibrated=self.calibrated,
        )
        return Released(content, guarantee)

    def state(self, rows: int, units: int, deviation: float | None = None) -> State:
        """What is public about so many rows and units; of groups no number of rows, which documents that are encoded apart hide."""
        counts = public_counts(self.config.unit, self.config.neighboring, rows, units)
        known = counts["rows"] if self.config.unit == "row" else None
        return State(known, counts["units"], deviation=deviation)

    def growing(self, units: int | None) -> Mechanism[PrivateT]:
        """How it is released as a context grows. units: how many the public contexts of its calibration had.

        Raises:
            ConfigError: it cannot.
        """
        raise ConfigError(
            "A context grows with mechanism='kernel_sum' or 'anchors'; 'dptree' and 'none' release once. Change the mechanism, or leave "
            "out the horizon."
        )

    @property
    def summed(self) -> Summed | None:
        """Where a context grows: what its running sum adds up. None: every unit answers for itself when it is appended, with fresh coins,
        so that T appends of distinct units cost what one does."""
        return None

    def join(self, total: Integers, noised: Integers) -> Integers:
        """All answers so far (`total`; empty at first) and those of one more append. Post-processing."""
        return tuple(map(torch.cat, zip(total, noised, strict=True))) if total else noised

    def at(self, config: DPXAttnConfig) -> Mechanism[PrivateT]:
        """The same kind of release at another epsilon, where a calibration has several.

        Raises:
            ConfigError: it is prepared of the layers' shapes (`registry.prepare_release`), or cannot give the config's guarantee.
        """
        raise ConfigError(f"{type(self).__name__} is prepared of the layers that it is for.")

    def canaries(self, count: int, rows: int, generator: torch.Generator) -> list[PrivateT]:
        """About `count` units of `rows` rows, made of public parameters alone, of which some contribute as unlike as units can. For audits.

        Raises:
            ConfigError: none are known.
        """
        raise ConfigError(f"No canaries are known for {type(self).__name__}.")

    def bystander(self) -> PrivateT:
        """One row in the middle of what is public: the unit beside a canary, the same in both of two neighbours.

        Raises:
            ConfigError: none is known.
        """
        raise ConfigError(f"No canaries are known for {type(self).__name__}.")


def by_tensor(parts: tuple[NoisePart, ...], exact: Integers) -> Iterator[tuple[NoisePart, Integers]]:
    """Each part with its tensors."""
    at = 0
    for part in parts:
        end = len(exact) if part.tensors is None else at + part.tensors
        yield part, exact[at:end]
        at = end


def perturb(exact: Integers, parts: tuple[NoisePart, ...], entropy: Entropy) -> Integers:
    """Each tensor with the noise of its part, in order."""
    return tuple(part.noise.perturb(t, entropy) for part, tensors in by_tensor(parts, exact) for t in tensors)
