"""Votes: their law by enumeration under both relations, reading them, growth, and the audit with planted bugs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch

from hf_dp_xattn.audit.audit_report import FAIL, PASS
from hf_dp_xattn.audit.empirical import audit_releases, preparer, targets
from hf_dp_xattn.audit.settings import SMALLER
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.mechanisms.growing_release import grow
from hf_dp_xattn.mechanisms.library.library import Shelf
from hf_dp_xattn.mechanisms.library.votes import PreparedVotes, Reading, posterior_counts, whole_counts
from hf_dp_xattn.privacy.accountant import epsilon_of
from hf_dp_xattn.privacy.additive import GeometricNoise
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.rank_response import RankResponse

from .test_library import lattice
from .worlds import CHANNELS

TEXTS = tuple("abcdefgh")


def votes(
    entries: int = 3,
    epsilon: float = 2.0,
    neighboring: str = "replace_one",
    share_plus: float = 0.7,
    dispersion: float = 0.5,
) -> PreparedVotes:
    config = DPXAttnConfig(mechanism="library", unit="group", epsilon=epsilon, neighboring=neighboring)
    shelf = Shelf(TEXTS[:entries], lattice(entries), RankResponse((entries,), (1,), Fraction(2)))
    reading = Reading(shelf.texts, torch.full((entries,), 1 / entries), dispersion)
    return PreparedVotes.of(config, shelf, reading, share_plus)


def voters(own: PreparedVotes, cells: tuple[int, ...]) -> torch.Tensor:
    """Codes whose nearest entries are these."""
    rows = own.shelves[0].lattice.codes[list(cells)].float() if cells else torch.zeros(0, CHANNELS)
    assert own.shelves[0].lattice.nearest(rows, 1)[:, 0].tolist() == list(cells)
    return rows


def exact(own: PreparedVotes, cells: tuple[int, ...]) -> torch.Tensor:
    (found,) = own.exact(voters(own, cells), torch.arange(len(cells)))
    return found


def log_law(own: PreparedVotes, counts: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """[v]: log-likelihood of noised votes [v, K], normalised."""
    noise = own.histogram.noise
    assert isinstance(noise, GeometricNoise)
    up, down = float(noise.rate_plus), float(noise.rate_minus)
    total = 1 / (1 - math.exp(-up)) + math.exp(-down) / (1 - math.exp(-down))
    return noise.log_weight(seen - counts).sum(1) - len(counts) * math.log(total)


@pytest.mark.parametrize("neighboring", ["replace_one", "add_or_remove_one"])
@pytest.mark.parametrize("share_plus", [0.5, 0.7])
def test_law_by_enumeration(neighboring: str, share_plus: float) -> None:
    """Of all lists of at most three units, all neighbours and all noised votes nearby: epsilon is never passed, and is attained."""
    own = votes(neighboring=neighboring, share_plus=share_plus)
    lists = [c for n in range(4) for c in itertools.combinations_with_replacement(range(3), n)]
    seen = torch.tensor(list(itertools.product(range(-6, 13), repeat=3)))
    laws = {c: log_law(own, exact(own, c), seen) for c in lists if c or neighboring == "add_or_remove_one"}
    worst = 0.0
    for a, b in itertools.permutations(laws, 2):
        left, right = Counter(a) - Counter(b), Counter(b) - Counter(a)
        changed = left.total(), right.total()
        if changed in ({(1, 1)} if neighboring == "replace_one" else {(0, 1), (1, 0)}):
            worst = max(worst, float((laws[a] - laws[b]).abs().max()))
    assert worst == pytest.approx(2.0, rel=1e-9)
    assert float(laws[lists[-1]].exp().sum()) == pytest.approx(1.0, abs=0.1)  # most of it is nearby
    assert epsilon_of(own.events, 0.0) <= 2.0 * (1 + 1e-9)


def test_the_release_has_this_law() -> None:
    """Noise of the release itself, 20,000 times; each frequency within 5.5 deviations (false alarm below 1e-6)."""
    own, draws = votes(epsilon=3.0), 20_000
    noise = own.histogram.noise
    found = Counter(noise.perturb(torch.zeros(draws, dtype=torch.int64), SeededEntropy(1)).tolist())
    for z in range(-4, 6):
        p = math.exp(float(log_law(own, torch.zeros(1), torch.tensor([[z]]))))
        assert abs(found[z] - draws * p) < 5.5 * math.sqrt(draws * p * (1 - p)) + 1


def test_posterior_is_the_naive_one_and_counts_sum_up() -> None:
    noise, mean, r = GeometricNoise(*votes().at(votes().config).parts[0].noise.__dict__.values()), 1.5, 0.5  # type: ignore[attr-defined]
    seen = torch.tensor([-3.0, 0.0, 2.0, 9.0])

    def naive(y: float) -> float:
        pairs = [
            (
                math.exp(math.lgamma(k + r) - math.lgamma(r) - math.lgamma(k + 1))
                * (mean / (mean + r)) ** k
                * math.exp(float(noise.log_weight(torch.tensor([y - k])))),
                k,
            )
            for k in range(80)
        ]
        return sum(w * k for w, k in pairs) / sum(w for w, _ in pairs)

    found = posterior_counts(seen, torch.full((4,), mean), r, noise.log_weight, 50)
    assert found.tolist() == pytest.approx([naive(float(y)) for y in seen], rel=1e-6)
    counts = whole_counts(found, 17)
    assert int(counts.sum()) == 17 and int(counts.min()) >= 0
    assert whole_counts(torch.tensor([0.5, 0.5, 1.0]), 2).tolist() == [1, 0, 1]


def test_many_that_agree_are_told_and_a_list_has_its_length() -> None:
    own = votes(entries=8)
    cells = (2,) * 150 + (5,) * 50
    made = own.run(voters(own, cells), groups=torch.arange(200), entropy=SeededEntropy(3))
    counts = Counter(made.texts)
    assert len(made.texts) == 200 and made.texts[0] == "c"
    assert abs(counts["c"] - 150) < 12 and abs(counts["f"] - 50) < 12
    assert made.guarantee.units == 200 and made.guarantee.epsilon == 2.0
    hidden = votes(entries=8, neighboring="add_or_remove_one")
    released = hidden.run(voters(hidden, cells), groups=torch.arange(200), entropy=SeededEntropy(3))
    assert released.guarantee.units is None and abs(len(released.texts) - 200) < 40
    assert len(hidden.run(voters(hidden, ()), groups=torch.arange(0), entropy=SeededEntropy(0)).texts) >= 1


def test_growing_votes_add_up() -> None:
    own = votes(entries=8, epsilon=8.0)
    release = grow(own, 4).open(SeededEntropy(2))
    for step in range(3):
        cells = (2,) * 40 + (5,) * 20
        state = release.append(voters(own, cells), groups=torch.arange(60) + 60 * step)
    counts = Counter(state.texts)
    assert len(state.texts) == 180 and abs(counts["c"] - 120) < 15 and abs(counts["f"] - 60) < 15
    assert state.guarantee.delta == own.config.delta


def audit(own: PreparedVotes) -> set[str]:
    found = targets(own, own.config, preparer(own, (), None), SMALLER)
    checks, bounds = audit_releases(found, draws=4000, confidence=1 - 1e-7, entropy=SeededEntropy(7))
    assert max(b.low for b in bounds) > 0.5  # it has power
    return {c.verdict for c in checks}


@pytest.mark.parametrize("neighboring", ["replace_one", "add_or_remove_one"])
def test_audit_passes_sound_votes(neighboring: str) -> None:
    assert audit(votes(entries=6, neighboring=neighboring)) == {PASS}


def test_audit_catches_a_unit_that_votes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = PreparedVotes.exact
    monkeypatch.setattr(
        PreparedVotes, "exact", lambda self, rows, groups: (sound(self, torch.cat([rows, rows]), groups)[0],)
    )
    assert FAIL in audit(votes(entries=6))


def test_audit_catches_a_vote_that_depends_on_another_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = PreparedVotes.exact

    def mixed(self: PreparedVotes, rows: torch.Tensor, groups: Any) -> Any:
        return sound(self, rows.flip(0) + rows, groups)  # each unit's code has a part of another one's

    monkeypatch.setattr(PreparedVotes, "exact", mixed)
    assert FAIL in audit(votes(entries=6))


def test_audit_catches_noise_that_is_too_small() -> None:
    own = votes(entries=6)
    noise = GeometricNoise(3 * own.histogram.noise.rate_plus, 3 * own.histogram.noise.rate_minus)  # type: ignore[union-attr]
    assert FAIL in audit(dataclasses.replace(own, histogram=dataclasses.replace(own.histogram, noise=noise)))


def test_bad_input_is_refused() -> None:
    own = votes()
    with pytest.raises(ConfigError, match="a context is one unit"):
        config = DPXAttnConfig(mechanism="library", unit="context")
        PreparedVotes.of(config, own.shelves[0], own.reading, 0.5)
    with pytest.raises(ConfigError, match="a text, a code and a share"):
        PreparedVotes.of(own.config, own.shelves[0], dataclasses.replace(own.reading, texts=("a",)), 0.5)
    with pytest.raises(ContextError, match="ONE code"):
        own.count(torch.eye(CHANNELS)[:2], torch.tensor([0, 0]))
    with pytest.raises(ContextError, match="no rows"):
        own.count(torch.zeros(0, CHANNELS), torch.arange(0))
