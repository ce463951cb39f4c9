r"""Exact k-ary randomised response: one symbol of a public alphabet, told truthfully most of the time.

*Formal guarantee.* **Released:** R(c) in {0, ..., k - 1} for a private symbol c, P(R = c) = W / (W + (k - 1) D) and P(R = j) = D / (W +
(k - 1) D) for each j != c, with integers W >= D > 0 and W / D <= e^epsilon. **Theorem:** for all c, c', j: P(R(c) = j) / P(R(c') = j) is
one of D / W, 1, W / D, so R is epsilon-DP for replacing the symbol, delta = 0 (Warner 1965; Kairouz, Oh, Viswanath, "Extremal
mechanisms for local differential privacy", arXiv 1407.1338: the most useful one at large epsilon).
**Several symbols** (one per unit, in public slots, each answered with fresh coins): replacing one unit changes one symbol, so the whole
list is epsilon-DP, by parallel composition. The number of units must be public (`replace_one`).
**Exactness:** the draw is one uniform integer below W + (k - 1) D from `bits.uniform_below`, which is exact.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ConfigError
from .accountant import PureEvent
from .bernoulli import exp_neg_bounds
from .bits import Entropy, uniform_below

MAX_ALPHABET = 1 << 20
_UNIT = 1 << 12  # D: resolution of the odds
_CAP = 28 * Fraction(
    693148, 1_000_000
)  # above 28 log 2: odds are capped at 2^28, which still misleads k times in 2^28


def check_odds(odds: int, unit: int, epsilon: Fraction) -> None:
    """Raises ConfigError unless epsilon is a positive Fraction and odds / unit <= e^epsilon, decided exactly.

    high 2^-256 >= e^-epsilon, so odds high <= unit 2^256 is enough. Above 64, all odds that fit are allowed.
    """
    if not isinstance(epsilon, Fraction) or not epsilon > 0:
        raise ConfigError(f"epsilon must be a positive Fraction, got {epsilon!r}.")
    _, high = exp_neg_bounds(min(epsilon, Fraction(64)), 256)
    if odds * high > unit << 256:
        raise ConfigError(
            f"The odds {odds} to {unit} are above e^{float(epsilon):g}: more would be told than is charged. Use `of`."
        )


class Response(ABC):
    """Answers of units from public lists, each a function of one unit and fresh coins."""

    @property
    def together(self) -> int:
        """How many answers one draw gives."""
        return 1

    @property
    @abstractmethod
    def width(self) -> int:
        """How many integers each answer is drawn by."""

    @abstractmethod
    def perturb(self, integers: torch.Tensor, entropy: Entropy) -> torch.Tensor:
        """int64 [m, width], on any device -> answers [m] (CPU)."""

    @abstractmethod
    def log_weights(self, integers: torch.Tensor, answers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """[draws]: log-likelihood of answers [draws, m] of units with these integers [m, width], up to a public number."""


@dataclass(frozen=True)
class RandomizedResponse(Response):
    """k-ary randomised response over `alphabet` symbols; made by `of`. epsilon: what is charged; odds: W.

    Raises:
        ConfigError: W / D is below 1 or above e^epsilon, or a parameter is out of range.
    """

    alphabet: int
    epsilon: Fraction
    odds: int

    def __post_init__(self) -> None:
        if not 2 <= self.alphabet <= MAX_ALPHABET:
            raise ConfigError(f"Randomised response needs 2 to {MAX_ALPHABET} symbols, got {self.alphabet}.")
        if not _UNIT <= self.odds <= _UNIT << 28:
            raise ConfigError(f"The odds must lie between 1 and 2^28 in units of 1/{_UNIT}, got {self.odds}.")
        check_odds(self.odds, _UNIT, self.epsilon)

    @classmethod
    def of(cls, epsilon: float | Fraction, alphabet: int) -> RandomizedResponse:
        """The most truthful response at epsilon (at most about 19.4: a larger one is not used up).

        Raises:
            ConfigError: epsilon is not positive, or the alphabet has fewer than 2 or more than 2^20 symbols.
        """
        if not (epsilon > 0 and math.isfinite(epsilon)):
            raise ConfigError(f"epsilon must be positive and finite, got {epsilon!r}.")
        if not 2 <= alphabet <= MAX_ALPHABET:
            raise ConfigError(f"Randomised response needs 2 to {MAX_ALPHABET} symbols, got {alphabet}.")
        exact = Fraction(epsilon)
        if exact >= _CAP:
            return cls(alphabet, _CAP, _UNIT << 28)
        # e^-epsilon lies within [low, high] 2^-160; the upper end gives the smaller odds, so W / D <= e^epsilon
        _, high = exp_neg_bounds(exact, 160)
        return cls(alphabet, exact, max(_UNIT, (_UNIT << 160) // high))

    @property
    def unit(self) -> int:
        """D, the weight of a symbol that is not the true one."""
        return _UNIT

    @property
    def event(self) -> PureEvent:
        """What is charged."""
        return PureEvent(self.epsilon)

    @property
    def truth(self) -> float:
        """P(R(c) = c)."""
        return self.odds / (self.odds + (self.alphabet - 1) * _UNIT)

    def draw(self, symbols: npt.NDArray[np.int64], entropy: Entropy) -> npt.NDArray[np.int64]:
        """[G] symbols -> [G] answers. The control flow does not depend on the symbols.

        Raises:
            ConfigError: a symbol lies outside the alphabet.
        """
        if symbols.ndim != 1 or (len(symbols) and not 0 <= symbols.min() <= symbols.max() < self.alphabet):
            raise ConfigError(f"Symbols must be integers [G] in [0, {self.alphabet}).")
        total = self.odds + (self.alphabet - 1) * _UNIT
        u = uniform_below(entropy, len(symbols), total)
        # below W: the truth; else the (u - W) // D -th of the other symbols, in their order after c (cyclic)
        other = (symbols + 1 + np.maximum(u - self.odds, 0) // _UNIT) % self.alphabet
        return np.where(u < self.odds, symbols, other).astype(np.int64)

    @property
    def width(self) -> int:
        return 1

    def perturb(self, integers: torch.Tensor, entropy: Entropy) -> torch.Tensor:
        """int64 [G] or [G, 1] symbols, on any device -> answers [G] (CPU)."""
        return torch.from_numpy(self.draw(integers.cpu().numpy().reshape(-1), entropy))

    def log_weights(self, integers: torch.Tensor, answers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        matches = (answers == integers.cpu().numpy().reshape(-1)).sum(1).astype(np.float64)
        total: npt.NDArray[np.float64] = matches * math.log(self.odds / _UNIT)
        return total
