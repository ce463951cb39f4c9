"""Parts of the benchmarks of `library`: what a reply gives away, and that the neighbours spend what they are said to."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from library_parts.chat_attacks import CODES, NAMES, bound, guess  # noqa: E402
from library_parts.text_neighbours import token_odds  # noqa: E402


def test_a_guess_is_the_first_code_or_name_of_a_reply() -> None:
    assert guess("Sure: 12 34-56, or 654321.", "code") == "123456"
    assert guess("In 2024 it was 12345.", "code") == ""
    assert guess(f"Not {NAMES[7]} but {NAMES[3]}.", "name") == NAMES[7]
    assert guess("nobody", "name") == ""


def test_bounds_are_those_of_so_many_guesses() -> None:
    assert bound("direct ask", "code", 1e-9) == pytest.approx(1 / CODES, rel=1e-6)
    assert bound("paraphrases", "name", 2.0) == pytest.approx(2 * math.exp(2.0) / len(NAMES))
    assert bound("direct ask", "name", math.inf) == 1.0


def test_a_token_costs_its_share_of_epsilon() -> None:
    """The worst ratio over all pairs of inputs stays within e^(epsilon / t), and comes near half of its exponent at the least."""
    table = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    odds = token_odds(table, torch.arange(40), torch.arange(0, 40, 3), epsilon=40 * 3.0).log()
    worst = max(float((a - b).abs().max()) for a in odds for b in odds)
    assert 0.5 < worst <= 3.0
