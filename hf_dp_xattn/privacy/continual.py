r"""Continual release of a growing sum: every prefix x_1 + ... + x_t of a stream of integer vectors, t = 1, ..., T, for one charge.

**Mechanism.** A is the T x T matrix of ones on and below the diagonal, so that A x holds the prefix sums. Let L be a lower-triangular
INTEGER matrix without zeros on its diagonal and R = A L^-1. At step t

    y_t = sum_{s <= t} L_ts x_s + z_t,   z_t ~ N_Z(0, sigma^2 I) is released;   sum_{s <= t} R_ts y_s = prefix sum + sum_{s <= t} R_ts z_s

is what is read of it. (Noise R z added to A x would not do: it is correlated, so no discrete Gaussian on the lattice has its law.)

*Formal guarantee.* **Released:** y_1, ..., y_T. **Neighbours:** one unit, which enters at ONE step t*, is replaced, or is there or not; it
changes x_t* by an integer vector d with |d|_2 <= Delta and nothing else. When things arrive is public. **Sensitivity:** c Delta, c the
largest column norm of L. **Noise:** discrete Gaussian. **Theorem:** the T releases together are (c Delta)^2 / (2 sigma^2)-concentrated DP,
even if the stream is chosen adaptively, each x_t after y_1, ..., y_{t-1} have been seen (the matrix mechanism: Denisov, McMahan, Rush,
Smith, Thakurta, arXiv 2202.08312; here on the lattice).

*Proof.* Fix an adversary; b = 0, 1 says which of the two vectors, x or x + d, enters at t*. Given y_1, ..., y_{t-1} the adversary's other
choices are the same for both b, so y_t = w + b L_tt* d + z_t with w fixed, L_tt* d an integer vector, and t* and d fixed from step t* on.
The Renyi divergence of order a of y_t given the past is at most a (L_tt* |d|)^2 / (2 sigma^2) (arXiv 2004.00010, Proposition 5 and Theorem
14), and 0 for t < t*. Given the past up to t* these bounds are numbers, which add up along the chain rule to at most a Delta^2 sum_t
L_tt*^2 / (2 sigma^2) <= a (c Delta)^2 / (2 sigma^2), whatever t* and the past; mixing over pasts keeps the bound (quasi-convexity). QED.

*Two factorisations.* `TreeFactors`: the binary tree (Chan, Shi, Song 2011; Dwork et al. 2010): y_t is the noised sum over the last 2^i
steps, 2^i the largest power of two that divides t; c^2 = floor(log2 T) + 1, and a prefix reads one node for each binary one of t.
`SquareRootFactors`: A = M M, M the Toeplitz matrix of the power series (1 - x)^-1/2 = 1 + x/2 + 3 x^2/8 + ...; L is 2^b M rounded to
integers and R its exact counterpart, so there is no bias (Fichtenberger, Henzinger, Upadhyay, arXiv 2202.11205; Henzinger, Upadhyay,
Upadhyay, arXiv 2211.05006). The worst prefix errs by c max_t |R_t| sigma: about 1.07 + ln(T)/pi times what one release of the sum would,
against up to log2(T) + 1 for the tree; `choose_factors` computes both.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..errors import BudgetExceededError, ConfigError, DPXAttnError
from .accountant import Event, GaussianEvent, gaussian_sigma_squared
from .bits import Entropy, SystemEntropy
from .events import require_integer
from .noise import discrete_gaussian
from .split import gaussian_sigma_squared_beside

MAX_HORIZON = 2**14
MAX_NUMBERS = 2**28  # private and public numbers that a running sum may keep: 2 GiB
_MAX_BITS = 12
_LOSS = 1.001  # rounding L to integers may cost so much of the error
_SENSITIVITY_BITS = 37  # joint sensitivity: with 2^24 units, no sum of the stream reaches 2^62
_DEVIATION_BITS = 39  # the sampler goes up to 2^40
_COARSEST = 2**10  # lattice units of one unit's contribution

_Floats = npt.NDArray[np.float64]


class Stream(Protocol):
    """One run of a mechanism: `encode` at every step, in order, then `decode`."""

    def encode(self, step: int, x: torch.Tensor) -> torch.Tensor:
        """(L x)_step, int64: PRIVATE. Keeps x; step counts from 0."""
        ...

    def decode(self, step: int, y: torch.Tensor) -> torch.Tensor:
        """(R y)_step, float64: post-processing of what was released up to now."""
        ...

    def forget(self) -> None:
        """Drops everything private."""
        ...


class Factors(Protocol):
    """A = R L for one horizon. All of it is public."""

    @property
    def name(self) -> str: ...

    @property
    def horizon(self) -> int: ...

    @property
    def column_norm_squared(self) -> int:
        """c^2: the largest squared column norm of L, an exact integer."""
        ...

    @property
    def row_norms(self) -> _Floats:
        """[T] |R_t|: standard deviation of prefix t in units of sigma."""
        ...

    @property
    def kept(self) -> int:
        """How many vectors a stream keeps in memory."""
        ...

    def stream(self) -> Stream: ...


def largest_error(factors: Factors) -> float:
    """Standard deviation of the worst prefix, in units of the noise that ONE release of the sum would take."""
    return math.sqrt(factors.column_norm_squared) * float(factors.row_norms.max())


# ---- the binary tree -------------------------------------------------------------------------------------------------------------


class _TreeStream:
    def __init__(self) -> None:
        self._private: dict[int, torch.Tensor] = {}
        self._public: dict[int, torch.Tensor] = {}

    def encode(self, step: int, x: torch.Tensor) -> torch.Tensor:
        level = _trailing_zeros(step + 1)
        total = x.clone()
        for lower in range(level):
            total += self._private.pop(lower)
        self._private[level] = total
        return total

    def decode(self, step: int, y: torch.Tensor) -> torch.Tensor:
        level = _trailing_zeros(step + 1)
        for lower in range(level):
            del self._public[lower]
        self._public[level] = y.to(torch.float64)
        return torch.stack(list(self._public.values())).sum(0)

    def forget(self) -> None:
        self._private.clear()


def _trailing_zeros(n: int) -> int:
    return (n & -n).bit_length() - 1


@dataclass(frozen=True)
class TreeFactors:
    """Dyadic sums: L_ts = 1 for t - 2^i < s <= t, 2^i the largest power of two that divides t."""

    horizon: int
    name = "tree"

    @property
    def column_norm_squared(self) -> int:
        """Step 1 is in the nodes that end at 1, 2, 4, ...; no step is in more."""
        return self.horizon.bit_length()

    @property
    def row_norms(self) -> _Floats:
        return np.sqrt([float(t.bit_count()) for t in range(1, self.horizon + 1)])

    @property
    def kept(self) -> int:
        return 2 * self.horizon.bit_length()

    def stream(self) -> Stream:
        return _TreeStream()


# ---- the square root -------------------------------------------------------------------------------------------------------------


class _Rows:
    """A list of vectors in one tensor that doubles."""

    def __init__(self) -> None:
        self._rows: torch.Tensor | None = None

    def put(self, index: int, row: torch.Tensor, horizon: int) -> None:
        if self._rows is None:
            self._rows = row.new_zeros(min(8, horizon), row.shape[0])
        if index >= self._rows.shape[0]:
            more = min(self._rows.shape[0], horizon - self._rows.shape[0])
            self._rows = torch.cat([self._rows, row.new_zeros(more, row.shape[0])])
        self._rows[index] = row

    def combine(self, weights: torch.Tensor) -> torch.Tensor:
        """sum_s weights_s row_s over the first rows."""
        assert self._rows is not None
        return weights @ self._rows[: weights.shape[0]]

    def clear(self) -> None:
        self._rows = None


class _SquareRootStream:
    def __init__(self, factors: SquareRootFactors) -> None:
        self._horizon = factors.horizon
        self._left = torch.tensor(factors.left, dtype=torch.int64)
        self._right = torch.from_numpy(factors.right.copy())
        self._private, self._public = _Rows(), _Rows()

    def encode(self, step: int, x: torch.Tensor) -> torch.Tensor:
        self._private.put(step, x, self._horizon)
        return self._private.combine(self._left[: step + 1].flip(0))

    def decode(self, step: int, y: torch.Tensor) -> torch.Tensor:
        self._public.put(step, y.to(torch.float64), self._horizon)
        return self._public.combine(self._right[: step + 1].flip(0))

    def forget(self) -> None:
        self._private.clear()


def square_root_coefficients(horizon: int) -> _Floats:
    """[T] coefficients of (1 - x)^-1/2: C(2k, k) / 4^k."""
    k = np.arange(1, horizon)
    return np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])


def prefix_inverse(left: Sequence[int]) -> _Floats:
    """[T] coefficients r of 1 / ((1 - x) l(x)): then R L = A for the Toeplitz matrices of r and l."""
    coefficients = np.array(left, dtype=np.float64)
    right = np.empty(len(left))
    for t in range(len(left)):
        right[t] = (1.0 - coefficients[1 : t + 1] @ right[:t][::-1]) / coefficients[0]
    return right


@dataclass(frozen=True, eq=False)
class SquareRootFactors:
    """Toeplitz: L_ts = left[t - s], integers, and R_ts = right[t - s]."""

    left: tuple[int, ...]
    right: _Floats
    name = "square_root"

    @classmethod
    def of(cls, horizon: int, bits: int | None = None) -> SquareRootFactors:
        """left = round(2^bits m); as many bits as leave the largest error within 0.1 % of the real-valued factorisation's."""
        m = square_root_coefficients(horizon)
        ideal = float(np.square(m).sum())
        for b in range(_MAX_BITS + 1) if bits is None else [bits]:
            left = tuple(int(v) for v in np.rint(m * 2.0**b))
            factors = cls(left, prefix_inverse(left))
            if largest_error(factors) <= _LOSS * ideal:
                break
        return factors

    @property
    def horizon(self) -> int:
        return len(self.left)

    @property
    def column_norm_squared(self) -> int:
        """The first column is the longest one."""
        return sum(v * v for v in self.left)

    @property
    def row_norms(self) -> _Floats:
        return np.asarray(np.sqrt(np.cumsum(np.square(self.right))))

    @property
    def kept(self) -> int:
        return 2 * self.horizon

    def stream(self) -> Stream:
        return _SquareRootStream(self)


# ---- the choice ------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def candidates(horizon: int) -> tuple[Factors, ...]:
    """The factorisations for this horizon, the least largest error first."""
    return tuple(sorted((SquareRootFactors.of(horizon), TreeFactors(horizon)), key=largest_error))


def choose_factors(horizon: int, size: int) -> Factors:
    """The factorisation with the least largest error of those whose stream of vectors [size] fits `MAX_NUMBERS`.

    Raises:
        ConfigError: a horizon that is not an integer from 1 to 2^14, or a sum too long to keep.
    """
    if isinstance(horizon, bool) or not isinstance(horizon, int) or not 1 <= horizon <= MAX_HORIZON:
        raise ConfigError(
            f"horizon, the public number of appends, must be an integer from 1 to {MAX_HORIZON}, got {horizon!r}."
        )
    for factors in candidates(horizon):
        if factors.kept * size <= MAX_NUMBERS:
            return factors
    raise ConfigError(
        f"A running sum of {size:,} numbers over {horizon} appends does not fit {MAX_NUMBERS:,} numbers of memory. Lower the horizon, "
        "the degree or projection_dim, or use a calibration."
    )


# ---- the release -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ContinualPlan:
    """A continual release of which everything public is fixed. `event` must be charged, once, before `RunningSum` sees the stream.

    size: length of the vectors. shift: they are rounded to multiples of 2^shift first, so that the sampler can make the noise.
    """

    factors: Factors
    size: int
    shift: int
    sigma_squared: int | Fraction
    event: GaussianEvent

    @classmethod
    def prepare(
        cls,
        *,
        size: int,
        sensitivity: int,
        horizon: int,
        epsilon: float,
        delta: float,
        beside: Sequence[Event] = (),
        factors: Factors | None = None,
    ) -> ContinualPlan:
        """sensitivity: Delta, an integer, of the vector that a unit enters. beside: events that share epsilon and delta.

        Raises:
            ConfigError: a parameter is out of range, or so much noise that the lattice would hold nothing else.
        """
        sensitivity, size = require_integer(sensitivity, "sensitivity"), require_integer(size, "size")
        factors = choose_factors(horizon, size) if factors is None else factors
        per_unit = math.sqrt(gaussian_sigma_squared(epsilon, delta, 2**20)) / 2.0**20
        limit = 2 ** min(_SENSITIVITY_BITS, _DEVIATION_BITS - math.ceil(math.log2(per_unit)))
        shift = 0
        while joint_sensitivity(factors, sensitivity, size, shift) > limit:
            shift += 1
            if sensitivity >> shift < _COARSEST:
                raise ConfigError(
                    f"At epsilon = {epsilon:g} and a horizon of {horizon} the noise is more than the sampler makes at this precision. "
                    "Raise epsilon or lower the horizon."
                )
        joint = joint_sensitivity(factors, sensitivity, size, shift)
        sigma_squared = gaussian_sigma_squared_beside(epsilon, delta, joint, beside)
        return cls(factors, size, shift, sigma_squared, GaussianEvent(joint, sigma_squared))

    @property
    def horizon(self) -> int:
        return self.factors.horizon

    def deviation(self, step: int) -> float:
        """Standard deviation of the noise in each number of the prefix sum after `step` steps, in the stream's own units."""
        return math.sqrt(self.sigma_squared) * float(self.factors.row_norms[step - 1]) * 2.0**self.shift

    def error_bound(self, beta: float) -> float:
        """What no number of no prefix errs by, all T of them together, with probability 1 - beta; in the stream's own units.

        sum R_ts z_s is subgaussian with |R_t| sigma (arXiv 2004.00010, Corollary 17); a union bound over T size numbers; and the rounding.
        """
        tail = math.sqrt(2.0 * math.log(2.0 * self.horizon * self.size / beta))
        rounding = self.horizon * 2.0 ** (self.shift - 1) if self.shift else 0.0
        worst = float(self.factors.row_norms.max()) * math.sqrt(self.sigma_squared) * 2.0**self.shift
        return worst * tail + rounding


def joint_sensitivity(factors: Factors, sensitivity: int, size: int, shift: int) -> int:
    """ceil(c D), D = Delta without a shift, and ceil(Delta / 2^shift + sqrt(size)) with one.

    Rounded numbers of integers a and a + d differ by at most ceil(|d| / 2^shift), and by 0 for d = 0; so |change| <= |d| / 2^shift + 1
    coordinate by coordinate, and the l2 norm of a vector of ones is sqrt(size) (triangle inequality).
    """
    if shift:
        sensitivity = -(-sensitivity // 2**shift) + math.isqrt(size - 1) + 1
    return math.isqrt(factors.column_norm_squared * sensitivity**2 - 1) + 1


class RunningSum:
    """One continual release: `add` a vector at every step, get the noised sum of all of them.

    *Formal guarantee.* The module's, if each unit is in one vector only and changes it by at most the plan's sensitivity. It holds sums
    without noise, which are PRIVATE: it lives in the memory of one process, is never pickled or copied, and drops them after the last step.
    """

    def __init__(self, plan: ContinualPlan, entropy: Entropy | None = None) -> None:
        self.plan = plan
        self.steps = 0
        self._entropy = SystemEntropy() if entropy is None else entropy
        self._stream = plan.factors.stream()
        self._closed = False
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"RunningSum(steps={self.steps} of {self.plan.horizon})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise DPXAttnError("A running sum holds private sums: it is not pickled or copied.")

    def check(self) -> None:
        """Raises BudgetExceededError where no further step is possible."""
        if os.getpid() != self._pid:
            raise DPXAttnError(
                "A running sum does not go on in another process: two runs of one stream would cost twice."
            )
        if self._closed or self.steps >= self.plan.horizon:
            why = "it was closed" if self._closed else f"all {self.plan.horizon} appends are made"
            raise BudgetExceededError(
                f"This growing release takes no more: {why}. What was released serves any number of queries. To go on, open a new one "
                "with a longer horizon, which is charged."
            )

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """x int64 [size] -> noised prefix sum float64 [size] (CPU), in x's own units.

        Raises:
            BudgetExceededError: the horizon is reached. ConfigError: not such a vector. Nothing was released.
        """
        plan = self.plan
        if x.dtype != torch.int64 or list(x.shape) != [plan.size]:
            raise ConfigError(f"Expected int64 [{plan.size}], got {x.dtype} {list(x.shape)}.")
        with self._lock:
            self.check()
            noise = torch.from_numpy(discrete_gaussian(plan.size, plan.sigma_squared, entropy=self._entropy))
            try:
                mixed = self._stream.encode(self.steps, _rounded(x.detach().cpu(), plan.shift))
                self.steps += 1
                released = mixed + noise
                prefix = self._stream.decode(self.steps - 1, released) * 2.0**plan.shift
            except BaseException:
                # x may be in the sum already: going on would let it enter twice
                self._close()
                raise
            if self.steps == plan.horizon:
                self._stream.forget()
            return prefix

    def close(self) -> None:
        """Drops what is private; no further step."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        self._closed = True
        self._stream.forget()


def _rounded(x: torch.Tensor, shift: int) -> torch.Tensor:
    """Nearest multiple of 2^shift, in its units; exact."""
    return (x + (1 << shift - 1)) >> shift if shift else x
