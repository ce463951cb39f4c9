"""How much an audit does by default. Imports nothing heavy: the command line's help reads it."""

from __future__ import annotations

from ..errors import ConfigError

DRAWS = 10_000  # releases of each neighbour
TRIALS = 2_000  # of the extraction
CANDIDATES = 8
CONFIDENCE = 1 - 1e-6
SMALLER = (4.0, 1.0)  # epsilons at which the same release is audited too


def check_numbers(draws: int, trials: int, confidence: float) -> None:
    """Raises ConfigError where they are out of range."""
    if not 100 <= draws <= 10**8 or not 10 <= trials <= 10**8:
        raise ConfigError("An audit needs 100 to 10^8 draws, and 10 to 10^8 trials of the extraction.")
    if not 0.5 <= confidence < 1:
        raise ConfigError(f"confidence must lie in [0.5, 1), got {confidence!r}.")
