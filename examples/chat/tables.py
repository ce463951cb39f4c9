"""The page and the plots of a sweep's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from chat.attacks import ATTACKS, CODES, PRIOR, Tally, bound

COLOURS = {"group": "#009E73", "row": "#0072B2", "none": "#000000"}  # Okabe and Ito
CODE_ROWS = 7  # rows that a code touches at the least: its digits, and the word after them
TITLES = {"group": "unit = group (a segment)", "row": "unit = row"}

Line = dict[str, Any]


def share(line: Line, key: str = "replies_right") -> tuple[float, float, float]:
    """Mean over prompts and its 95 % bootstrap interval; prompts have a release of their own each."""
    values = np.array(line[key])
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def percent(value: float) -> str:
    """Enough digits to tell a bound from zero."""
    return f"{100 * value:.1f} %" if value >= 0.0995 or value == 0 else f"{100 * value:.2g} %"


def tally(line: Line, name: str) -> Tally:
    return Tally(*line["extraction"][name])


def _rate(line: Line, name: str) -> str:
    found = tally(line, name)
    low, high = found.interval()
    return f"{percent(found.rate)} ({100 * low:.0f}-{100 * high:.0f})"


def _of(lines: list[Line], unit: str, segments: int | None = None) -> list[Line]:
    found = [x for x in lines if x["unit"] == unit and segments in (None, x["segments"])]
    return sorted(found, key=lambda x: (np.inf if x["epsilon"] is None else x["epsilon"], x["segments"]))


def _label(line: Line) -> str:
    return "none (not private)" if line["epsilon"] is None else f"{line['epsilon']:g}"


def behaviour_table(lines: list[Line], sizes: list[int]) -> str:
    """Replies right in full, epsilon and unit down, n across."""
    rows = {s: next(x["rows"] for x in lines if x["segments"] == s) for s in sizes}
    head = ["unit", "epsilon", *(f"n = {rows[s]} rows ({s} segments)" for s in sizes)]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for unit in ("group", "row", "none"):
        for epsilon in sorted({x["epsilon"] for x in _of(lines, unit)}, key=lambda e: e or 0):
            cells = []
            for size in sizes:
                (line,) = [x for x in _of(lines, unit, size) if x["epsilon"] == epsilon]
                mean, low, high = share(line)
                cells.append(f"{100 * mean:.1f} % ({100 * low:.0f}-{100 * high:.0f})")
            name = "none (not private)" if epsilon is None else f"{epsilon:g}"
            out.append("| " + " | ".join([unit if epsilon else "", name, *cells]) + " |")
    return "\n".join(out)


def extraction_table(lines: list[Line], unit: str, segments: int, delta: float) -> str:
    """Attacks down, epsilon across; beside every rate what (epsilon, delta) allows for the unit that the table is about."""
    chosen = _of(lines, unit, segments) + _of(lines, "none", segments)
    out = ["| attack | " + " | ".join(_label(x) for x in chosen) + " |", "|" + "---|" * (len(chosen) + 1)]
    for name in ATTACKS:
        out.append(f"| {name} | " + " | ".join(_rate(x, name) for x in chosen) + " |")
        limits = []
        for line in chosen:
            epsilon = line["epsilon"]
            if epsilon is None:
                limits.append("")
            elif unit == "group":
                limits.append(percent(bound(name, epsilon, delta)))
            else:
                limits.append(percent(bound(name, *several_rows(epsilon, delta))))
        out.append("| at most | " + " | ".join(limits) + " |")
    return "\n".join(out)


def several_rows(epsilon: float, delta: float, rows: int = CODE_ROWS) -> tuple[float, float]:
    """What row-level (epsilon, delta) says of `rows` rows together: (k epsilon, delta sum_i e^(i epsilon)), by the triangle."""
    return rows * epsilon, min(1.0, delta * float(np.exp(np.arange(rows) * min(epsilon, 50.0)).sum()))


def _prompts(lines: list[Line], segments: int | None = None) -> str:
    """How many system prompts were tried, from the fewest of a line to the most."""
    counts = sorted({x["prompts"] for x in lines if segments in (None, x["segments"])})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _tries(lines: list[Line], attack: str) -> int:
    """How many codes an attack was tried on."""
    return max(int(x["extraction"][attack][1]) for x in lines)


def plot_epsilon(lines: list[Line], segments: int, delta: float, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    exact = share(_of(lines, "none", segments)[0])[0]
    left.axhline(100 * exact, color=COLOURS["none"], ls=":", label="none (not private)")
    for unit in ("group", "row"):
        chosen = _of(lines, unit, segments)
        if not chosen:
            continue
        x = [c["epsilon"] for c in chosen]
        y = np.array([share(c) for c in chosen]) * 100
        left.errorbar(
            x,
            y[:, 0],
            yerr=[y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]],
            color=COLOURS[unit],
            marker="o",
            capsize=3,
            label=TITLES[unit],
        )
    left.set(
        xscale="log",
        xlabel=f"epsilon (delta = {delta:g}, replace_one); n = {_prompts(lines, segments)} prompts",
        ylabel="replies right in full, %",
    )
    left.set_ylim(0, 102)
    chosen = _of(lines, "group", segments)
    x = np.array([c["epsilon"] for c in chosen])
    names = ("direct ask", "prefix completion", next(n for n in ATTACKS if n.startswith("ranking")))
    for name, marker, colour in zip(names, "osv", ("#D55E00", "#0072B2", "#CC79A7"), strict=True):
        rates = [max(PRIOR, tally(c, name).rate) for c in chosen]
        right.plot(x, rates, ls="", marker=marker, color=colour, label=name)
        right.plot(x, [bound(name, e, delta) for e in x], color=colour, lw=1)
    right.set(
        xscale="log",
        yscale="log",
        xlabel=f"epsilon, unit = group; n = {_tries(chosen, names[0])} codes",
        ylabel="codes found (none: at $10^{-6}$)\nlines: at most",
    )
    for axis in (left, right):
        axis.set_xticks(x, [f"{e:g}" for e in x])
        axis.minorticks_off()
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_size(lines: list[Line], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.8))
    for epsilon, colour in zip(
        (1.0, 4.0, 8.0, None), ("#D55E00", "#E69F00", "#009E73", "#000000"), strict=True
    ):
        unit = "none" if epsilon is None else "group"
        chosen = sorted(
            (x for x in _of(lines, unit) if x["epsilon"] == epsilon), key=lambda line: line["rows"]
        )
        label = "none (not private)" if epsilon is None else f"epsilon = {epsilon:g}"
        y = [100 * share(c)[0] for c in chosen]
        axis.plot([c["rows"] for c in chosen], y, marker="o", color=colour, label=label)
    axis.set(
        xscale="log",
        xlabel=f"private rows; {_prompts(lines)} prompts each",
        ylabel="replies right in full, %",
        ylim=(0, 102),
    )
    sizes = sorted({x["rows"] for x in lines})
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


PAGE = """# A private system prompt: behaviour and extraction

Written by `python examples/chat/sweep.py`; the numbers are in `chat/results.json`. The model is `model_cards/chat.md`'s, the system
prompts have behaviours that neither its training nor the calibration saw: some 90 % of their segments show one behaviour (language,
opening, address, list style, signature, ending), four segments carry a 6-digit code each, two a name. Each of {prompts} prompts of a size
is released once per line of the table; every segment is encoded apart from the others. The decoder was trained on the model's own replies
behind public prompts of 12 to 150 segments (`examples/chat/calibrate.py`).

## Behaviour

Replies that are right in full, all six factors and both things (95 % bootstrap interval over prompts).
One wrong factor makes all replies of a prompt wrong.

{behaviour}

![behaviour and extraction against epsilon](chat/epsilon.png)

![behaviour against n](chat/size.png)

## Extraction, unit = group

Codes found in the replies of {attacked} of the prompts, n = {rows} rows: share of {trials} codes (95 % Wilson interval). *at most*:
what (epsilon, {delta:g}) allows an attacker who knows all but the code, which stands in one segment. An interval that reaches above the
bound says only that there were few trials; the bound is a theorem and does not rest on them.

{group}
"""
ROW_PAGE = """
## Extraction, unit = row

Here (epsilon, delta) holds for one row. A code stands in {code_rows} rows or more (its digits, and what follows them has seen them), so
*at most* is what the row's guarantee says of {code_rows} rows together: nothing, from epsilon = 2 or so on. That attacks fail here
is a property of this release and these attacks, not a guarantee.

{row}
"""


def summary_table(lines: list[Line], segments: int, delta: float) -> str:
    """README's: unit = group at one size, replies right and two of the attacks beside their bounds."""
    names = ["direct ask", next(n for n in ATTACKS if n.startswith("best of"))]
    head = ["epsilon", "replies right in full", *(x for n in names for x in (f"codes found, {n}", "at most"))]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in _of(lines, "group", segments) + _of(lines, "none", segments):
        mean, low, high = share(line)
        cells = [_label(line), f"{100 * mean:.1f} % ({100 * low:.0f}-{100 * high:.0f})"]
        for name in names:
            epsilon = line["epsilon"]
            cells += [_rate(line, name), "" if epsilon is None else percent(bound(name, epsilon, delta))]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def write_page(results: dict[str, Any], out: Path) -> None:
    """`out`.md beside the folder, its plots, and the README's table (`tools/readme_tables.py` puts it there)."""
    lines, delta = results["lines"], results["delta"]
    sizes = sorted({x["segments"] for x in lines})
    largest = _of(lines, "none", sizes[-1])[0]
    plot_epsilon(lines, sizes[-1], delta, out / "epsilon.png")
    plot_size(lines, out / "size.png")
    (out / "summary.md").write_text(summary_table(lines, sizes[-1], delta) + "\n")
    row = ""
    if _of(lines, "row"):
        table = extraction_table(lines, "row", sizes[-1], delta)
        row = ROW_PAGE.format(row=table, code_rows=CODE_ROWS)
    out.with_suffix(".md").write_text(
        PAGE.format(
            prompts=largest["prompts"],
            behaviour=behaviour_table(lines, sizes),
            rows=largest["rows"],
            trials=tally(largest, "direct ask").trials,
            attacked=tally(largest, "direct ask").trials // CODES,
            delta=delta,
            group=extraction_table(lines, "group", sizes[-1], delta),
        )
        + row
    )
