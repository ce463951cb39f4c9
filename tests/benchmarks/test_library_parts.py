"""Parts of the benchmarks of `library`: what a reply gives away, and that the neighbours spend what they are said to."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from library import NONE, QUESTIONS, summaries  # noqa: E402
from library_neighbours import LIBRARY, against  # noqa: E402
from library_parts.chat_attacks import CODES, NAMES, bound, guess  # noqa: E402
from library_parts.shape_neighbours import per_token  # noqa: E402
from library_parts.text_neighbours import token_odds  # noqa: E402
from shapes.evaluate import load_pipeline  # noqa: E402
from shapes.scenes import train_examples  # noqa: E402


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


def test_questions_of_both_kinds_count_alike() -> None:
    first, second = QUESTIONS
    rows = [{first: {NONE: [0.6, 0.5], "x": [0.3, 0.7]}, second: {NONE: [0.2, 0.9], "x": [0.1, 0.9]}}] * 3
    found = summaries(rows)
    assert found[first]["x"]["share"] == found[second]["x"]["share"] == 0.5
    assert found["of both kinds"]["x"]["kl"] == pytest.approx(0.2)
    assert found["of both kinds"][NONE]["same_first_choice"] == pytest.approx(0.7)


def test_library_stands_against_the_best_other_way() -> None:
    kl = {str(i): {NONE: 1.0, "a": 0.8, "b": 0.9, LIBRARY: 0.6} for i in range(4)}
    assert against(kl) == ["On the same prompts `library` less *a*: -0.20 (-0.20 to -0.20)."]
    assert against({"0": {NONE: 1.0, "a": 0.8}}) == []


def test_phrases_stay_as_many_and_are_kept_at_a_huge_epsilon() -> None:
    pipeline, public = load_pipeline(), train_examples(40, 1)
    private = ["a large red star at the top, a small blue cross on the left, pink background"]
    [kept] = per_token(pipeline, private, public, 1e9)
    [noised] = per_token(pipeline, private, public, 8.0)
    assert kept == private[0] and noised != kept
    assert noised.count(", ") == kept.count(", ")
