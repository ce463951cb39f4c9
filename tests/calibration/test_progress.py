"""The one bar of a calibration: an estimate first, and a time left that follows what was measured."""

from __future__ import annotations

import io
from typing import Any

import pytest

from hf_dp_xattn.calibration import progress
from hf_dp_xattn.calibration.progress import Progress, in_words


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_the_time_left_follows_the_clock_and_not_the_guess(clock: list[float]) -> None:
    with Progress(False, "library") as bar:
        bar.expect("encoding", 100, 1.0)
        bar.expect("choosing", 4, 10.0)
        assert bar.seconds_left == 140.0
        clock[0] = 5.0
        bar.step("encoding", 10)  # half a second each
        assert bar.seconds_left == 90 * 0.5 + 40.0
        bar.step("encoding", 40, timed=False)  # were there already
        assert bar.seconds_left == 50 * 0.5 + 40.0
        clock[0] = 100.0
        bar.begin()
        clock[0] = 102.0
        bar.step("choosing")
        assert bar.seconds_left == 50 * 0.5 + 3 * 2.0


def test_the_estimate_comes_first_and_the_bar_never_goes_back(clock: list[float], capsys: Any) -> None:
    with Progress(True, "library") as bar:
        bar._bar.fp = io.StringIO()
        bar.expect("encoding", 100, 4.0)
        shares = []
        for seconds in (4.0, 4.0, 40.0):
            clock[0] += seconds
            bar.step("encoding")
            shares.append(bar._bar.n)
        said = bar._bar.fp.getvalue()
    assert "library: about 7 minutes" in said and said.count("about") == 1
    assert shares == sorted(shares) and 0 < shares[0] < 0.02


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (59, "59 s"), (61, "1 minute"), (360, "6 minutes"), (7800, "2 h 10 min")],
)
def test_in_words(seconds: float, said: str) -> None:
    assert in_words(seconds) == said
