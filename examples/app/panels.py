"""The parts of the page, as HTML. Pictures are embedded, so that none is written to a file; no part quotes the prompt."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image
from shapes.private import DELTA

import hf_dp_xattn as dpx
from app.studio import Drawn
from hf_dp_xattn.privacy.guessing import PRIORS, guess_bound

UNITS = {  # name, what is covered, who an attacker is
    "context": ("Whole prompt", "the whole prompt", "An attacker"),
    "group": ("Phrase", "one phrase", "An attacker who knows the rest of the prompt"),
    "row": ("Row (weak)", "one of the 77 embedding rows", "An attacker who knows the other rows"),
}
ABOUT_UNITS = {
    "context": "Whatever the prompt says is covered at once, and costs accordingly.",
    "group": "The prompt is split at commas, semicolons and “and”; each phrase is covered by itself, not that they stand together. "
    "How many there are is public.",
    "row": "Hardly any protection of a prompt: the other 76 rows are near-copies that carry the scene. Here to show that.",
}
_PRIOR_NAMES = ("1 in 2", "1 in 100", "1 in a million")
_SIZE = 32


def up(epsilon: float) -> str:
    """Two decimals, rounded up: never less than what was spent."""
    return f"{math.ceil(epsilon * 100) / 100:g}"


def at_most(share: float) -> str:
    """A bound in per cent, two significant digits, rounded up."""
    percent = 100 * share
    step = 10.0 ** (math.floor(math.log10(percent)) - 1)
    return f"{min(100.0, math.ceil(percent / step - 1e-9) * step):.3g} %" if percent < 99 else "100 %"


def picture(image: np.ndarray, text: str) -> str:
    """An <img> of its pixels; the style sheet scales it up by nearest neighbour."""
    buffer = io.BytesIO()
    Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(text)}" width="{_SIZE}" height="{_SIZE}">'


def pictures(drawn: Drawn) -> str:
    """The two pictures, and those of all earlier releases of this prompt and unit."""
    if drawn.right is None:
        found = "The attribute reader knows captions of shapes only; look for yourself."
    else:
        found = f"An attribute reader finds {drawn.right[0]} of {drawn.right[1]} named attributes."
    name = f"protected, epsilon {drawn.epsilon:g}"
    strip = "".join(
        f"<figure class='{'dpx-now' if e == drawn.epsilon else ''}'>{picture(p, f'protected, epsilon {e:g}')}"
        f"<figcaption>ε {e:g}</figcaption></figure>"
        for e, p in drawn.strip
    )
    many = len(drawn.strip)
    return f"""<div class="dpx-pair">
<figure>{picture(drawn.plain, "without protection")}<figcaption><b>Without protection</b><br>
Shown for comparison; in real use it is never drawn.</figcaption></figure>
<figure>{picture(drawn.protected, name)}<figcaption><b>Protected, ε = {drawn.epsilon:g}</b><br>{found}</figcaption></figure>
</div>
<div class="dpx-strip" aria-label="all releases of this prompt">{strip}
<p>{"The only release" if many == 1 else f"All {many} releases"} of this prompt under this unit. Whoever sees
{"it" if many == 1 else "them all"} learns what ε = {up(drawn.spent.epsilon)} tells.</p></div>"""


def status(drawn: Drawn) -> str:
    """One line: what this draw did."""
    if drawn.again:
        return status_line(
            "free", "Nothing was charged: this release was there, and a picture from it is free."
        )
    return status_line(
        "charged", f"Released once and charged: ε = {drawn.epsilon:g} for {UNITS[drawn.unit][1]}."
    )


def refusal(message: str) -> str:
    return status_line("refused", escape(message))


def status_line(kind: str, text: str) -> str:
    return f'<p class="dpx-status dpx-{kind}" role="status">{text}</p>'


def expectation(plan: dpx.Plan) -> str:
    """The planner's prediction for one epsilon, from public data alone."""
    [point] = plan.points
    name, what, attacker = UNITS[plan.unit]
    score = "no score was measured" if point.score is None else _percent(point.score.value)
    interval = ""
    if point.score is not None and point.score.low is not None and point.score.high is not None:
        interval = f"{100 * point.score.low:.0f} to {_percent(point.score.high)}"
    guesses = _guesses(f"{attacker} guesses {what} from this release:", [s for _, s in point.guesses])
    return f"""<div class="dpx-card"><h3>What to expect <small>nothing is spent to know this</small></h3>
<p class="dpx-big">ε = {point.epsilon:g}<span>{escape(name)}, δ = {plan.delta:g}</span></p>
<p>The planner predicts <b>{score}</b> of the named attributes right <small>(95 % interval {interval}; unseen combinations)</small>.</p>
{guesses}
<details><summary>What would leave</summary><p>{escape(point.meaning)}.</p></details></div>"""


def _guesses(caption: str, bounds: Sequence[float]) -> str:
    """A table of an attacker's chances before and after, for each of `PRIORS`."""
    rows = "".join(
        f"<tr><td>{name}</td><td>{at_most(bound)}</td></tr>"
        for name, bound in zip(_PRIOR_NAMES, bounds, strict=True)
    )
    return f"<table><caption>{caption}</caption>\n<tr><th>before, with probability</th><th>after, at most</th></tr>{rows}</table>"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def spending(drawn: Drawn) -> str:
    """The ledger's numbers for this prompt."""
    spent = drawn.spent
    _, what, attacker = UNITS[drawn.unit]
    share = min(100.0, 100 * spent.epsilon / spent.budget)
    bounds = [guess_bound(spent.epsilon, DELTA, prior) for prior in PRIORS]
    guesses = _guesses(f"{attacker} guesses {what} from all its releases together:", bounds)
    many = f"{spent.releases} release{'s' if spent.releases > 1 else ''}"
    return f"""<div class="dpx-card"><h3>What this prompt has spent <small>by the ledger</small></h3>
<p class="dpx-big">ε = {up(spent.epsilon)}<span>of {spent.budget:g}, in {many}</span></p>
<div class="dpx-bar" role="img" aria-label="{share:.0f} % of the budget"><i style="width:{share:.1f}%"></i></div>
<p><b>Sliding ε over a really private prompt spends the sum</b>: every new combination of prompt, unit and ε is a release of its own.
Decide on one ε with the planner, release once, and draw from that for ever.</p>
{guesses}{_all_units(drawn)}</div>"""


def _all_units(drawn: Drawn) -> str:
    """What this prompt has spent under every unit."""
    spent = {s.unit: s for s in (drawn.spent, *drawn.others)}
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>ε = {up(spent[u].epsilon) if u in spent else 0}</td>"
        f"<td>{spent[u].releases if u in spent else 0}</td></tr>"
        for u, (name, *_) in UNITS.items()
    )
    table = f"<table><caption>This prompt, under all units:</caption><tr><th>unit</th><th>spent</th><th>releases</th></tr>{rows}</table>"
    if not drawn.others:
        return table
    return (
        f"{table}<p class='dpx-warn'>Charges of different units do not add up, and the ledger refuses to mix them on one context; this "
        "demo keeps one ledger for each so that you can compare. Whoever sees all the pictures has all of them: choose one unit.</p>"
    )


def report(drawn: Drawn) -> str:
    """The privacy report of this release: its guarantee in a sentence, and all of it below."""
    [release] = drawn.report.releases
    return f"""<div class="dpx-card dpx-report"><h3>Privacy report</h3><p>{escape(str(release["guarantee_text"]))}</p>
<p><b>Not covered</b>, among others: a rewording of the prompt is another context, with a budget of its own; that a prompt was
repeated can be seen; what your own program logs.</p>
<details><summary>The report in full</summary><pre>{escape(str(drawn.report))}</pre></details></div>"""
