"""The page's logic, without a browser: what is charged, what is shown, and that nothing shown or kept quotes the prompt."""

from __future__ import annotations

import base64
import io
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hf_dp_xattn as dpx
from hf_dp_xattn.privacy.guessing import guess_bound

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from app import panels  # noqa: E402
from app.studio import DELTA, Studio  # noqa: E402

PROMPT = "a large green star on the right, black background"
SECRET = "zebra quartz on the left, jukebox background"  # no caption of shapes, but text like any other


@pytest.fixture(scope="module")
def loaded() -> Studio:
    return Studio()


@pytest.fixture
def studio(loaded: Studio) -> Iterator[Studio]:
    loaded.reset()
    yield loaded
    loaded.reset()


def test_every_new_epsilon_is_charged_and_the_same_one_again_is_free(studio: Studio) -> None:
    first = studio.draw(PROMPT, "context", 16.0)
    assert not first.again and first.spent.releases == 1
    assert first.spent.epsilon == pytest.approx(16.0, rel=1e-5)
    second = studio.draw(PROMPT, "context", 2.0)
    assert not second.again and second.spent.releases == 2
    assert second.spent.epsilon == pytest.approx(18.0, rel=1e-5)
    again = studio.draw(
        f"  {PROMPT.replace(', ', ',  ')} ", "context", 16.0
    )  # white space is no other prompt
    assert again.again and again.spent == second.spent
    assert np.array_equal(again.protected, first.protected) and np.array_equal(again.plain, first.plain)
    assert [e for e, _ in again.strip] == [2.0, 16.0]
    other = studio.draw("a small blue cross on the left, white background", "context", 16.0)
    assert other.spent.epsilon == pytest.approx(16.0, rel=1e-5) and not other.others


def test_the_report_has_what_was_spent_since(studio: Studio) -> None:
    studio.draw(PROMPT, "context", 16.0)
    studio.draw(PROMPT, "context", 8.0)
    [release] = studio.draw(PROMPT, "context", 16.0).report.releases
    assert release["epsilon"] == 16.0 and release["charges"] == 2
    assert release["spent_epsilon"] == pytest.approx(24.0, rel=1e-5)


def test_units_have_ledgers_of_their_own_and_the_page_says_so(studio: Studio) -> None:
    studio.draw(PROMPT, "context", 8.0)
    by_phrase = studio.draw(PROMPT, "group", 16.0)
    assert by_phrase.spent.unit == "group" and by_phrase.spent.releases == 1
    [other] = by_phrase.others
    assert (other.unit, other.releases) == ("context", 1)
    shown = panels.spending(by_phrase)
    assert "do not add up" in shown and "<td>Whole prompt</td><td>ε = 8</td><td>1</td>" in shown
    assert "<td>Row (weak)</td><td>ε = 0</td><td>0</td>" in shown


def test_over_budget_nothing_is_charged_and_what_was_drawn_stays(loaded: Studio) -> None:
    small = Studio(10.0)
    small.__dict__.update({name: getattr(loaded, name) for name in ("pipeline", "calibrations")})
    before = small.draw(PROMPT, "context", 8.0)
    with pytest.raises(dpx.BudgetExceededError, match="Nothing was charged"):
        small.draw(PROMPT, "context", 4.0)
    after = small.draw(PROMPT, "context", 8.0)
    assert after.again and after.spent == before.spent
    assert dpx.handle_of(small.pipeline) is None


@pytest.mark.parametrize(
    "prompt", ["", "  \n ", "zebra " * 80, "zebra," * 60], ids=["0", "space", "80", "120"]
)
def test_bad_prompts_spend_nothing_and_are_not_quoted(studio: Studio, prompt: str) -> None:
    with pytest.raises(dpx.ContextError, match="Nothing was spent") as caught:
        studio.draw(prompt, "context", 8.0)
    assert "zebra" not in str(caught.value)
    assert not studio._ledgers["context"].entries()


def test_reset_forgets_and_draws_new_noise(studio: Studio) -> None:
    studio.draw(PROMPT, "context", 8.0)
    studio.draw(PROMPT, "context", 4.0)
    studio.reset()
    anew = studio.draw(PROMPT, "context", 8.0)
    assert not anew.again and anew.spent.releases == 1 and len(anew.strip) == 1


def test_concurrent_visitors_are_charged_once_each_and_get_their_own(studio: Studio) -> None:
    jobs = [(PROMPT, "context", 16.0), (PROMPT, "context", 64.0), (PROMPT, "group", 16.0)] * 2
    drawn: dict[int, object] = {}

    def visit(i: int) -> None:
        drawn[i] = studio.draw(*jobs[i])

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == len(jobs)
    assert (
        len(studio._ledgers["context"].entries()) == 10
    )  # two releases, each of token ids (3), their text, and that folded
    charges = studio._ledgers[
        "group"
    ].entries()  # one release, by six names: phrases, token ids (3), text, folded text
    assert [c.number_of_releases for c in charges] == [1] * 6 and len({c.digest for c in charges}) == 6
    for i in range(3):
        assert np.array_equal(drawn[i].protected, drawn[i + 3].protected)  # type: ignore[attr-defined]
        assert drawn[i].again != drawn[i + 3].again  # type: ignore[attr-defined]
    assert dpx.handle_of(studio.pipeline) is None


@pytest.mark.parametrize("unit", ["row", "group", "context"])
def test_nothing_shown_logged_or_kept_quotes_the_prompt(
    studio: Studio, unit: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    drawn = studio.draw(SECRET, unit, 8.0)
    shown = [panels.status(drawn), panels.pictures(drawn), panels.spending(drawn), panels.report(drawn)]
    out, err = capfd.readouterr()
    kept = repr(studio._prompts) + repr([c for ledger in studio._ledgers.values() for c in ledger.entries()])
    for text in (*shown, str(drawn.report), drawn.report.to_json(), out, err, caplog.text, kept):
        for word in ("zebra", "quartz", "jukebox"):
            assert word not in text.lower()
    assert drawn.right is None and drawn.report.releases[0]["guarantee"]["is_private"]


def test_pictures_are_embedded_pixel_for_pixel(studio: Studio) -> None:
    drawn = studio.draw(PROMPT, "context", 64.0)
    shown = panels.pictures(drawn)
    found = [base64.b64decode(d) for d in re.findall(r"data:image/png;base64,([\w+/=]+)", shown)]
    assert len(found) == 3  # both, and the strip
    plain, protected = (np.asarray(Image.open(io.BytesIO(d))) for d in found[:2])
    assert np.array_equal(plain, (drawn.plain * 255).round().astype(np.uint8))
    assert np.array_equal(protected, (drawn.protected * 255).round().astype(np.uint8))
    assert drawn.right is not None and f"{drawn.right[0]} of 5 named attributes" in shown


def test_the_plan_is_the_planners(studio: Studio) -> None:
    for unit in panels.UNITS:
        plan = dpx.plan(studio.calibrations[unit], epsilon=4.0, delta=DELTA, measure=False)
        [point] = plan.points
        shown = panels.expectation(studio.plan(unit, 4.0))
        assert point.score is not None
        assert f"<b>{100 * point.score.value:.0f} %</b>" in shown and "ε = 4" in shown
        for _, success in point.guesses:
            assert panels.at_most(success) in shown
    assert not studio._ledgers["context"].entries()


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0])
@pytest.mark.parametrize("prior", [0.5, 0.01, 1e-6])
def test_bounds_are_never_shown_smaller_than_they_are(epsilon: float, prior: float) -> None:
    bound = guess_bound(epsilon, DELTA, prior)
    shown = float(panels.at_most(bound).removesuffix(" %"))
    assert 100 * bound <= shown * (1 + 1e-12) <= 100 * bound * 1.1 + 1e-12
    assert float(panels.up(epsilon + 1e-9)) >= epsilon + 1e-9


def test_the_page_serves_one_at_a_time_and_offers_no_api(studio: Studio) -> None:
    gradio = pytest.importorskip("gradio", reason="pip install 'hf_dp_xattn[app]'")
    from app.page import build

    page = build(studio)
    assert isinstance(page, gradio.Blocks) and page.analytics_enabled is False
    functions = list(page.fns.values())
    assert functions and all(f.api_visibility == "private" for f in functions)
    drawing = [f for f in functions if f.concurrency_id == "pipeline"]
    assert len(drawing) == 2 and all(f.concurrency_limit == 1 for f in drawing)
    assert not studio._ledgers["context"].entries()  # building it spends nothing
