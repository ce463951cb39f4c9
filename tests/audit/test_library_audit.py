"""The audit of `library`: a sound release passes, and each planted bug is caught."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
import torch

from hf_dp_xattn.audit.audit_report import FAIL, PASS, Check
from hf_dp_xattn.audit.empirical import audit_releases, preparer, targets
from hf_dp_xattn.audit.laws import Context, law_of
from hf_dp_xattn.audit.replay import replayed
from hf_dp_xattn.audit.settings import SMALLER
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.mechanisms.library.entry_lattice import lattice_codes
from hf_dp_xattn.mechanisms.library.library import PreparedLibrary, Shelf
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.joint_response import ProductResponse
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
    verdicts, _ = audit(dataclasses.replace(own, shelves=tuple(at(6.0, shelf) for shelf in own.shelves)))
    assert FAIL in verdicts.values()


def at(epsilon: float, shelf: Shelf) -> Shelf:
    """The same list with the odds of another epsilon, and a word that it is still the old one."""
    own = shelf.response
    lax = RankResponse.of(epsilon, own.size, own.near)
    object.__setattr__(lax, "epsilon", own.epsilon)
    return dataclasses.replace(shelf, response=lax)


def whole(epsilon: float = 2.0) -> PreparedLibrary:
    """Contexts that are one unit in three parts, answered together."""
    config = DPXAttnConfig(mechanism="library", unit="context", epsilon=epsilon)
    shelf = prepared().shelves[0]
    sizes, generator = (4, 3, 5), torch.Generator().manual_seed(1)
    width = shelf.lattice.map.width
    shelves = []
    for k in sizes:
        codes = lattice_codes(torch.nn.functional.normalize(torch.randn(k, width, generator=generator)))
        lattice = dataclasses.replace(shelf.lattice, codes=codes)
        shelves.append(Shelf(tuple(f"{i}" for i in range(k)), lattice, RankResponse((k,), (1,), Fraction(2))))
    return PreparedLibrary(config, tuple(shelves), answers=3, joint=ProductResponse.of(epsilon, sizes, 1))


def canary(own: PreparedLibrary) -> list[Context]:
    """Two contexts of which no part has the same nearest entry."""
    near: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for row in torch.randn(200, CHANNELS, generator=torch.Generator().manual_seed(0)):
        found = own.exact(row.expand(3, -1), None)[0]
        if not near or (len(near) == 1 and not bool((found == near[0]).any())):
            near.append(found)
            rows.append(row.expand(3, -1))
    return [Context(r) for r in rows]


def test_parts_answered_together_are_one_unit() -> None:
    own = whole()
    contexts = canary(own)
    views = law_of(own).views(contexts)
    assert views.gap(0, 1) == 1.0
    scores = views.scores(0, 20_000, SeededEntropy(1))
    ratio = scores[:, 0] - scores[:, 1]
    assert float(abs(ratio).max()) <= 2.0 + 1e-9
    # planted bug: each part gets the odds of all of them
    joint = own.joint
    assert joint is not None
    lax = dataclasses.replace(joint)
    object.__setattr__(lax, "odds", round(joint.odds * 2.718**2))
    found = law_of(dataclasses.replace(own, joint=lax)).views(contexts).scores(0, 20_000, SeededEntropy(1))
    assert float(abs(found[:, 0] - found[:, 1]).max()) > 2.0 + 0.5
    assert set(audit(own)[0].values()) == {PASS}
    assert FAIL in audit(dataclasses.replace(own, joint=lax))[0].values()


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
        shelves = tuple(at(epsilon, shelf) for shelf in self.shelves)
        return run(dataclasses.replace(self, shelves=shelves), private, **options)

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
    rows = [encode([f"a rule of {topic}", "a rule of sky"]) for topic in ("tax", "law")]
    views = law_of(own).views([Context(r, torch.arange(2)) for r in rows])
    scores = views.scores(0, 2000, SeededEntropy(1))
    assert scores.shape == (2000, 2)
    assert float(abs(scores[:, 0] - scores[:, 1]).max()) <= 2.0 + 1e-9
    assert views.gap(0, 1) == 1.0 and rows[0].shape[1] == CHANNELS
