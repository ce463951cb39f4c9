"""From how many units on a list votes: decided by held-out public lists, kept on disk, refused where damaged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hf_dp_xattn.calibration.library.library_fit import LibraryOptions, build_library
from hf_dp_xattn.calibration.library.text_library import TextLibrary
from hf_dp_xattn.calibration.library.vote_fit import matched
from hf_dp_xattn.calibration.library.vote_plan import chosen
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.mechanisms.library.library import PreparedLibrary
from hf_dp_xattn.mechanisms.library.votes import PreparedVotes

from ...mechanisms.library.worlds import contexts, encode

GROUPS = DPXAttnConfig(mechanism="library", unit="group", epsilon=1.0)


@pytest.fixture(scope="module")
def library() -> TextLibrary:
    options = LibraryOptions(epsilons=(1.0, 16.0), encoder="toy", progress=False, held_out=0.4)
    return build_library(contexts(count=120, length=5), encode, GROUPS, options)


def test_votes_serve_long_lists_at_a_small_epsilon(library: TextLibrary) -> None:
    assert {(p.epsilon, p.units) for p in library.votes} == {(e, n) for e in (1.0, 16.0) for n in (30, 100)}
    for plan in library.votes:
        assert 0 <= plan.quality.low <= plan.quality.distortion <= plan.quality.high
        assert float(plan.share.sum()) == pytest.approx(1.0, abs=1e-5)
    plan = chosen(library.votes, 1.0, 100)
    assert plan.units == 100 and plan.better and plan.quality.distortion < 0.8 * plan.answers


def test_the_card_tells_both_numbers(library: TextLibrary) -> None:
    plan = library.votes[0]
    row = f"| {plan.epsilon:g} | {plan.units} | {len(plan.entries)} | {plan.quality.distortion:.3f} | {plan.answers:.3f} |"
    assert row in library.described().utility


def test_the_number_of_units_decides(library: TextLibrary) -> None:
    assert isinstance(library.prepare_list(GROUPS, 150), PreparedVotes)
    assert isinstance(library.prepare_list(GROUPS, None), PreparedLibrary)  # what any number of them costs
    assert isinstance(library.prepare_list(GROUPS, 29), PreparedLibrary)  # the order of a short text matters
    assert chosen(library.votes, 1.0, 99).units == 30
    worse = [dataclasses.replace(p, answers=0.0) for p in library.votes]
    assert isinstance(
        dataclasses.replace(library, votes=tuple(worse)).prepare_list(GROUPS, 150), PreparedLibrary
    )


def test_a_private_number_of_units_votes_always(library: TextLibrary) -> None:
    hidden = GROUPS.replace(neighboring="add_or_remove_one")
    own = library.prepare_list(hidden, None)
    assert isinstance(own, PreparedVotes)
    noise = own.histogram.noise
    assert float(noise.rate_plus) == float(noise.rate_minus) == 1.0  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="neighboring"):
        library.prepare(hidden)


def test_they_are_kept(library: TextLibrary, tmp_path: Path) -> None:
    library.save_pretrained(tmp_path)
    loaded = TextLibrary.from_pretrained(tmp_path)
    for one, other in zip(library.votes, loaded.votes, strict=True):
        assert one.header() == other.header()
        assert torch.equal(one.entries, other.entries) and torch.equal(one.share, other.share)


@pytest.mark.parametrize("change", [
    {"share": torch.zeros(2)},
    {"entries": torch.tensor([1, 0])},
    {"units": 0},
    {"dispersion": float("nan")},
])  # fmt: skip
def test_damaged_plans_are_refused(library: TextLibrary, change: dict[str, object]) -> None:
    damaged = dataclasses.replace(library.votes[0], **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="calibrat"):
        dataclasses.replace(library, votes=(damaged,)).verify()


def test_matched_is_the_best_matching() -> None:
    units = torch.nn.functional.normalize(
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1
    )
    assert matched(units, units[[3, 1, 0, 5, 4, 2]]) == pytest.approx(0.0, abs=1e-6)
