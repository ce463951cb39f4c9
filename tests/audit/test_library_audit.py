"""The audit of `library`: a sound release passes, and each planted bug is caught."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hf_dp_xattn.audit.audit_report import FAIL, PASS, Check
from hf_dp_xattn.audit.empirical import audit_releases, preparer, targets
from hf_dp_xattn.audit.laws import Context, law_of
from hf_dp_xattn.audit.replay import replayed
from hf_dp_xattn.audit.settings import SMALLER
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.mechanisms.library.library import PreparedLibrary
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.rank_response import RankResponse

from ..mechanisms.library.worlds import CHANNELS, encode, library

CONFIDENCE = 1 - 1e-7


def prepared(epsilon: float = 2.0) -> PreparedLibrary:
    return library().prepare(DPXAttnConfig(mechanism="library", unit="group", epsilon=epsilon))


def audit(own: PreparedLibrary, draws: int = 4000) -> tuple[dict[str, str], list[float]]:
    found = targets(own, own.config, preparer(own, (), None), SMALLER)
    checks, bounds = audit_releases(found, draws=draws, confidence=CONFIDENCE, entropy=SeededEntropy(7))
    all_checks: list[Check] = checks
    return {c.name: c.verdict for c in all_checks}, [b.low for b in bounds]


def test_a_sound_release_passes_with_power() -> None:
    verdicts, bounds = audit(prepared())
    assert set(verdicts.values()) == {PASS}
    assert 0.8 < max(bounds) <= 2.0


def test_a_response_that_tells_more_than_is_charged_is_caught() -> None:
    own = prepared()
    lax = RankResponse.of(6.0, own.response.size, own.response.near)
    object.__setattr__(lax, "epsilon", own.response.epsilon)  # it says 2, and gives the odds of 6
    verdicts, _ = audit(dataclasses.replace(own, response=lax))
    assert FAIL in verdicts.values()


def test_a_cell_that_depends_on_another_unit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = PreparedLibrary.exact

    def mixed(self: PreparedLibrary, private: torch.Tensor, groups: Any) -> Any:
        return exact(self, private.flip(0) + private, groups)  # each unit's code has a part of another one's

    monkeypatch.setattr(PreparedLibrary, "exact", mixed)
    assert audit(prepared())[0]["sensitivity"] == FAIL


def test_a_profile_that_private_data_choose_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = PreparedLibrary.run

    def chosen(self: PreparedLibrary, private: torch.Tensor, **options: Any) -> Any:
        epsilon = 2.0 if float(private.sum()) > 0 else 1.0
        response = RankResponse.of(epsilon, self.response.size, self.response.near)
        return run(dataclasses.replace(self, response=response), private, **options)

    monkeypatch.setattr(PreparedLibrary, "run", chosen)
    rows = encode(["a rule of tax", "a rule of law"])
    caught = 0
    for sign in (1.0, -1.0):
        own = law_of(prepared())
        for _ in range(60):
            caught += not replayed(own, Context(rows * sign, torch.arange(2)))
    assert caught > 0


def test_scores_are_log_likelihoods() -> None:
    own = prepared()
    rows = [encode([f"a rule of {topic}", "a rule of sky"]) for topic in ("tax", "tea")]
    views = law_of(own).views([Context(r, torch.arange(2)) for r in rows])
    scores = views.scores(0, 2000, SeededEntropy(1))
    assert scores.shape == (2000, 2)
    assert float(abs(scores[:, 0] - scores[:, 1]).max()) <= 2.0 + 1e-9
    assert views.gap(0, 1) == 1.0 and rows[0].shape[1] == CHANNELS
