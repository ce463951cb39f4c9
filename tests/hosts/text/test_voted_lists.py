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
