"""`dpx.compare`: two calibrations on the same public contexts, by a score of the user's; nothing is charged, the host is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import hf_dp_xattn as dpx

from ..hosts_tiny import picture, tiny_sd
from .anchor_calibrations import CONFIG, calibration_for
from .text.libraries import PHRASES, library

CONTEXTS = ["a red circle, in snow", "a blue square, at night", "a green star, on wood"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_sd()


@pytest.fixture(scope="module")
def two(pipe: Any) -> dict[str, Any]:
    return {"all": library(pipe), "others": library(pipe, PHRASES[:5])}


def told(host: Any, contexts: Sequence[str]) -> list[float]:
    """How many of a context's phrases the release says."""
    handle = dpx.handle_of(host)
    return [float(sum(t in c for t in handle.release(c).text)) for c in contexts]


def test_the_calibration_that_scores_best_is_named(pipe: Any, two: dict[str, Any], tmp_path: Any) -> None:
    before = picture(pipe, "a red circle")
    two["others"].save_pretrained(tmp_path)
    found = dpx.compare(pipe, {"others": tmp_path, "all": two["all"]}, CONTEXTS, told, epsilons=[90.0, 0.01])
    assert found.best(90.0) is two["all"] and found.sure(90.0)
    assert [p.mean for p in found.at(90.0)] == [2.0, pytest.approx(1.0, abs=0.5)]
    assert {p.epsilon for p in found.points} == {0.01, 90.0} and "all" in str(found)
    assert dpx.handle_of(pipe) is None and (picture(pipe, "a red circle") == before).all()
    with pytest.raises(dpx.ConfigError, match="Compared were"):
        found.best(3.0)
    protected = dpx.protect(pipe, epsilon=90.0, calibration=found.best(90.0), ledger=dpx.Ledger())
    assert protected.config.mechanism == "library"
    dpx.unprotect(pipe)


def test_contexts_may_share_what_is_charged_by_itself(pipe: Any, two: dict[str, Any]) -> None:
    same_account = [CONTEXTS[0], CONTEXTS[0].upper()]
    assert dpx.compare(pipe, two, same_account, told, epsilons=[8.0]).points
    with pytest.raises(dpx.ConfigError, match="a list of two"):
        dpx.compare(pipe, two, CONTEXTS[0], told, epsilons=[8.0])


def test_mechanisms_are_compared_with_each_other(pipe: Any) -> None:
    rows = calibration_for(pipe)
    seen: list[str] = []

    def score(host: Any, contexts: Sequence[str]) -> list[float]:
        seen.append(dpx.handle_of(host).config.mechanism)
        return [float(picture(host, c).mean()) for c in contexts]

    with pytest.raises(dpx.ConfigError, match="different things"):
        dpx.compare(pipe, {"rows": rows, "texts": library(pipe)}, CONTEXTS, score, epsilons=[8.0])
    assert rows.unit == CONFIG.unit and not seen
    whole = calibration_for(pipe, unit="context")
    found = dpx.compare(
        pipe,
        {"anchors": whole, "library": library(pipe, CONTEXTS, "context")},
        CONTEXTS,
        score,
        epsilons=[8.0],
    )
    assert seen == ["anchors", "library"] and len(found.at(8.0)) == 2


def test_what_cannot_be_compared_is_refused(pipe: Any, two: dict[str, Any]) -> None:
    def wrong(host: Any, contexts: Sequence[str]) -> list[float]:
        return [float("nan")] * len(contexts)

    for score in (wrong, lambda host, contexts: [1.0], lambda host, contexts: None):
        with pytest.raises(dpx.ConfigError, match="finite number"):
            dpx.compare(pipe, two, CONTEXTS, score, epsilons=[8.0])
        assert dpx.handle_of(pipe) is None
    with pytest.raises(dpx.ConfigError, match="two calibrations"):
        dpx.compare(pipe, {"one": two["all"]}, CONTEXTS, told, epsilons=[8.0])
    with pytest.raises(dpx.ConfigError, match="two public contexts"):
        dpx.compare(pipe, two, CONTEXTS[:1], told, epsilons=[8.0])
    with (
        dpx.protect(pipe, epsilon=8.0, calibration=two["all"], ledger=dpx.Ledger()),
        pytest.raises(dpx.ConfigError, match="unprotect"),
    ):
        dpx.compare(pipe, two, CONTEXTS, told, epsilons=[8.0])
