"""Lists of many units through `protect`: votes where the plan says so, with counts, on disk and in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.library.library_fit import LibraryOptions, build_library

from ...mechanisms.library.worlds import contexts, encode

GROUPS = dpx.DPXAttnConfig(mechanism="library", unit="group", epsilon=1.0)


@pytest.fixture(scope="module")
def library() -> dpx.TextLibrary:
    options = LibraryOptions(
        epsilons=(1.0,), encoder="toy", progress=False, held_out=0.4, grouping="documents"
    )
    return build_library(contexts(count=120, length=5), encode, GROUPS, options)


def protected(library: dpx.TextLibrary, config: dpx.DPXAttnConfig = GROUPS) -> Any:
    return dpx.protect(None, config, calibration=library, encoder=encode, ledger=dpx.Ledger())


def documents(count: int = 200) -> list[str]:
    return [f"private rule {i} of {'tea' if i % 4 else 'war'}" for i in range(count)]


def test_many_documents_are_released_with_counts(library: dpx.TextLibrary, tmp_path: Path) -> None:
    handle = protected(library)
    release = handle.release(documents())
    assert sum(release.counts) == 200 and max(release.counts) > 1
    assert len(release.counts) == len(release.text) == len(set(release.text))
    assert set(release.text) <= set(library.texts)
    topics = {
        t: sum(n for text, n in zip(release.text, release.counts, strict=True) if t in text)
        for t in ("tea", "war")
    }
    assert topics["tea"] > topics["war"] > 20  # 150 and 50 of 200
    assert str(release.text).count("\n") == len(release.text) - 1
    assert handle.report().to_dict()["releases"][0]["counts"] == list(release.counts)
    assert f"released text: {release.text[0]} (x {release.counts[0]})" in str(handle.report())
    assert handle.release(documents()).counts == release.counts  # not charged again
    release.save_pretrained(tmp_path)
    loaded = dpx.Release.from_pretrained(tmp_path, host=None)
    assert loaded.text == release.text and loaded.counts == release.counts


def test_few_units_are_answered(library: dpx.TextLibrary) -> None:
    sixteen = GROUPS.replace(epsilon=16.0)
    release = protected(library, sixteen).release(documents(3))
    assert release.counts == (1, 1, 1) and len(release.text) == 3


def test_a_private_number_of_documents(library: dpx.TextLibrary) -> None:
    handle = protected(library, GROUPS.replace(neighboring="add_or_remove_one"))
    release = handle.release(documents())
    assert release.guarantees[0].units is None and abs(sum(release.counts) - 200) < 80
    assert "and so how many" not in " ".join(handle.report().public)
    assert release.guarantees[0].neighboring == "add_or_remove_one"


def test_a_corpus_that_grows_is_charged_once_for_all_appends(
    library: dpx.TextLibrary, tmp_path: Path
) -> None:
    config = GROUPS.replace(epsilon=4.0)
    handle = protected(library, config)
    release = handle.release(documents(100), horizon=4)
    opened = handle.report().to_dict()["releases"][0]
    assert 3.0 < opened["spent_epsilon"] <= 4.0 and opened["charges"] == 1
    assert opened["delta"] == opened["spent_delta"] == config.delta  # a continual sum of votes is not pure
    assert sum(release.counts) == 100 and max(release.counts) > 1
    assert release.append([f"another tea rule {i}" for i in range(100)]) is release
    assert sum(release.counts) == 200 and len(set(release.text)) == len(release.text)
    (entry,) = handle.report().to_dict()["releases"]
    assert entry["spent_epsilon"] == opened["spent_epsilon"] and entry["charges"] == 1
    assert entry["counts"] == list(release.counts)
    tea = sum(n for text, n in zip(release.text, release.counts, strict=True) if "tea" in text)
    # 175 of 200, and noise of one (epsilon, delta) for all appends. By chance 34 (32 of the library's 188 texts). Over releases it is 104
    # and more (as the machine's rounding chooses the list), with a standard deviation below 3: a false alarm is rarer than 1e-6.
    assert tea > 80
    with pytest.raises(dpx.ContextError, match="in the growing context already"):
        release.append(documents(3))
    release.append(["a last tea rule"]).append(["a very last one"])
    with pytest.raises(dpx.BudgetExceededError, match="all 4 appends are made"):
        release.append(["too late"])
    assert sum(release.counts) == 202
    release.save_pretrained(tmp_path)
    assert dpx.Release.from_pretrained(tmp_path, host=None).counts == release.counts


def test_few_units_that_grow_are_answered_when_they_come(library: dpx.TextLibrary) -> None:
    handle = protected(library, GROUPS.replace(epsilon=16.0))
    release = handle.release(documents(3), horizon=3)
    first = tuple(release.text)
    (entry,) = handle.report().to_dict()["releases"]
    assert entry["delta"] == entry["spent_delta"] == 0.0 and entry["spent_epsilon"] == 16.0
    release.append(["a new tea rule"])
    assert tuple(release.text)[:3] == first and release.counts == (1, 1, 1, 1)


def test_what_cannot_grow_is_refused_and_costs_nothing(library: dpx.TextLibrary) -> None:
    handle = protected(library)
    for wrong in (0, 2.5, 10**9):
        with pytest.raises(dpx.ConfigError):
            handle.release(documents(), horizon=wrong)
    with pytest.raises(dpx.ReleaseError, match="does not grow"):
        handle.release(documents()).append(["more"])
    assert len(handle.report().to_dict()["releases"]) == 1
