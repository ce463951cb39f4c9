"""`dpx.plan` of a library: its predictions, the odds of an attacker, and what cannot be asked."""

from __future__ import annotations

from pathlib import Path

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.library.library_fit import LibraryOptions, build_library
from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.privacy.guessing import guess_bound

from ...mechanisms.library.worlds import contexts, encode, library


def test_it_says_what_the_library_predicts() -> None:
    own = library()
    found = dpx.plan(own, want_fvu=0.9, measure=False)
    assert [p.epsilon for p in found.points] == [1.0, 4.0, 16.0]
    assert [p.fvu.value for p in found.points] == [p.quality.distortion for p in own.plans]
    for point in found.points:
        assert point.charged == pytest.approx(point.epsilon) and point.charged <= point.epsilon * (1 + 1e-9)
        assert dict(point.guesses)[0.5] == pytest.approx(guess_bound(point.charged, 0.0, 0.5))
    assert found.wanted[0].epsilon is not None
    for words in ("public texts; nothing was released", "distortion", "texts that may answer"):
        assert words in str(found)
    assert found.to_dict()["points"][0]["kv_bytes"] == 0


def test_contexts_that_are_one_unit_in_parts() -> None:
    config = dpx.DPXAttnConfig(mechanism="library", unit="context", epsilon=6.0)
    options = LibraryOptions(epsilons=(6.0,), grouping="lines", encoder="toy", progress=False)
    found = dpx.plan(build_library(contexts(30, 3), encode, config, options))
    (point,) = found.points
    assert point.charged == pytest.approx(6.0) and len(point.events) == 1 and "together" in point.meaning
    assert (point.seconds or 0) > 0


def test_a_folder_and_times(tmp_path: Path) -> None:
    library(epsilons=(4.0,)).save_pretrained(tmp_path)
    found = dpx.plan(tmp_path, epsilons=[2.0], n=5)
    assert found.units == 5 and (found.points[0].seconds or 0) > 0


def test_what_cannot_be_asked() -> None:
    own = library(epsilons=(4.0,))
    with pytest.raises(ConfigError, match="unit='group'"):
        dpx.plan(own, unit="row", measure=False)
    with pytest.raises(ConfigError, match="no score"):
        dpx.plan(own, want_score=0.5, measure=False)
    with pytest.raises(ConfigError, match="is empty"):
        dpx.plan(own, epsilons=[], measure=False)
