"""Tables, plots and docs/rag.md from results.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
HEAD = """# Fusion-in-Decoder over a private corpus: answers and extraction

Written by `python examples/rag/sweep.py --out docs/rag` from [results.json](rag/results.json); the model is
`model_cards/rag.md`. A corpus of small documents, encoded apart from each other, is released once; the
decoder reads the release. *Facts*: 16 attributes, each with the value that 65 % of the documents about it state, asked for in
four forms; accuracy is over the model's whole vocabulary (guessing among an attribute's values: 17 %). *Records*: a code (10^6
possible) of a person, in one document only. Private corpora share no pair of facts with the public ones that the model and the
calibrations saw. delta = 1e-5, `replace_one`; in brackets 95 % intervals over corpora.
"""
UNITS = """## Unit: what the bound covers

With `unit="group"` a record stands inside ONE unit, so every guess about it succeeds with probability at most
(e^epsilon p + delta) / (1 - p + e^epsilon p) (`hf_dp_xattn/privacy/guessing.py`), p being the chance without the release. With
`unit="row"` the same number holds for one ROW of the encoder's output; a document has about eight, all of which carry the record,
and together they are protected at eight times epsilon only: for the document the bound says nothing (it is near 1) from epsilon =
2 on. *release* is the attack that shows the difference: it reads the released numbers themselves, knows all other documents and
the wording of the one it is after, and names one of 20 (or 2) codes. All other attacks read the model's outputs.
"""


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if value >= 0.0005 or value == 0 else f"{100 * value:.1e} %"


def _name(epsilon: float | None) -> str:
    return "none (not private)" if epsilon is None else f"{epsilon:g}"


def _series(
    lines: Sequence[dict[str, Any]],
) -> dict[tuple[str, str, int], dict[float | None, dict[str, Any]]]:
    found: dict[tuple[str, str, int], dict[float | None, dict[str, Any]]] = {}
    for x in lines:
        found.setdefault((x["mechanism"], x["unit"], x["documents"]), {})[x["epsilon"]] = x
    return found


def accuracy_table(lines: Sequence[dict[str, Any]], keys: Sequence[tuple[str, str, int]]) -> str:
    """epsilon down, settings across; in brackets the interval."""
    series = _series(lines)
    keys = [k for k in keys if k in series]
    rows = {k: next(iter(series[k].values()))["rows"] for k in keys}
    titles = [f"{m}, {u}, {n:,} documents ({rows[m, u, n]:,} rows)" for m, u, n in keys]
    epsilons = list(dict.fromkeys(x["epsilon"] for x in lines))
    out = ["| epsilon | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for epsilon in epsilons:
        cells = [_name(epsilon)]
        for key in keys:
            x = series[key].get(epsilon)
            cells.append(
                ""
                if x is None
                else f"{100 * x['accuracy']:.1f} % ({100 * x['low']:.0f}-{100 * x['high']:.0f})"
            )
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def extraction_table(results: dict[str, Any], key: tuple[str, str, int]) -> str:
    """Attacks across; every epsilon has what was measured and what is allowed."""
    own = _series(results["lines"])[key]
    bound = {b["epsilon"]: b for b in results["bounds"]}
    names = list(dict.fromkeys(n for x in own.values() for n in x["extraction"]))
    out = ["| epsilon | | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for epsilon, x in own.items():
        cells = [_percent(x["extraction"][n]) if n in x["extraction"] else "" for n in names]
        out.append(f"| {_name(epsilon)} | extracted | " + " | ".join(cells) + " |")
        if epsilon in bound:
            allowed = [_percent(bound[epsilon][n]) for n in names]
            out.append(
                f"| | bound, one {'document' if key[1] == 'group' else 'row'} | " + " | ".join(allowed) + " |"
            )
    return "\n".join(out) + "\n"


def tail(trials: int, successes: int, chance: float) -> float:
    """P(X >= successes), X binomial."""
    return sum(
        math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(successes, trials + 1)
    )


def above_bound(results: dict[str, Any]) -> list[str]:
    """Attacks on unit = group that did better than the bound, and how likely that is by chance at the bound."""
    bound = {b["epsilon"]: b for b in results["bounds"]}
    found = []
    for x in results["lines"]:
        if x["unit"] != "group" or x["epsilon"] is None:
            continue
        for name, rate in x["extraction"].items():
            allowed = bound[x["epsilon"]][name]
            if rate > allowed:
                chance = tail(x["trials"], round(rate * x["trials"]), allowed)
                found.append(
                    f"{x['mechanism']}, {x['documents']:,} documents, epsilon = {x['epsilon']:g}, {name}: "
                    f"{_percent(rate)} of {x['trials']} (bound {_percent(allowed)}, at which as many have probability {chance:.2g})"
                )
    return found


def _corpora(lines: Sequence[dict[str, Any]]) -> str:
    """How many corpora were asked about, from the fewest of a line to the most."""
    counts = sorted({x["corpora"] for x in lines})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def plot_accuracy(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against epsilon (left) and against the number of documents (right)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True, sharey=True)
    series = _series(lines)
    for colour, (key, found) in zip(COLOURS * 2, series.items(), strict=False):
        e = [x for x in found if x is not None]
        style = {"group": "-", "row": "--"}[key[1]]
        left.plot(
            e,
            [100 * found[x]["accuracy"] for x in e],
            style,
            marker="o",
            markersize=4,
            color=colour,
            label=f"{key[0]}, {key[1]}, {key[2]:,}",
        )
    left.set(
        xscale="log",
        xlabel=f"epsilon; n = {_corpora(lines)} corpora",
        ylabel="facts answered right, %",
        ylim=(0, 102),
    )
    left.set_xscale("log", base=2)
    left.legend(fontsize=8)
    sizes = [k for k in series if k[:2] == ("anchors", "group")]
    epsilons = list(next(iter(series.values())))
    for colour, epsilon in zip(COLOURS, epsilons, strict=False):
        points = [(k[2], series[k][epsilon]["accuracy"]) for k in sizes if epsilon in series[k]]
        right.plot(
            [n for n, _ in points],
            [100 * a for _, a in points],
            marker="o",
            color=colour,
            label=_name(epsilon),
        )
    right.set_xscale("log", base=2)
    right.set(xlabel=f"documents (anchors, group); n = {_corpora(lines)} corpora")
    right.legend(title="epsilon", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_extraction(results: dict[str, Any], path: Path) -> None:
    """Ranking attacks against epsilon, beside the bound of one unit."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True, sharey=True)
    bound = results["bounds"]
    series = _series(results["lines"])
    tries = max(x["trials"] for x in results["lines"])
    for panel, unit in zip(axes, ("group", "row"), strict=True):
        panel.plot(
            [b["epsilon"] for b in bound],
            [100 * b["ranking 20"] for b in bound],
            "k:",
            label="bound, one unit",
        )
        keys = [k for k in series if k[1] == unit and k[2] == 256]
        for colour, (key, name) in zip(
            COLOURS, ((k, n) for k in keys for n in ("ranking 20", "release, 20")), strict=False
        ):
            points = [
                (e, x["extraction"][name])
                for e, x in series[key].items()
                if e is not None and name in x["extraction"]
            ]
            if points:
                panel.plot(
                    [e for e, _ in points],
                    [100 * r for _, r in points],
                    marker="o",
                    color=colour,
                    label=f"{key[0]}: {name}",
                )
        panel.axhline(5, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set(title=f"unit = {unit}, 256 documents", xlabel=f"epsilon; n = {tries} codes", ylim=(-2, 102))
        panel.legend(fontsize=8)
    axes[0].set_ylabel("code named among 20 candidates, %")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_page(results: dict[str, Any], folder: Path) -> None:
    """`folder`/*.png, and the page beside the folder."""
    lines = results["lines"]
    keys = list(_series(lines))
    sizes = [k for k in keys if k[:2] == ("anchors", "group")]
    others = [k for k in keys if k[2] == 256]
    plot_accuracy(lines, folder / "accuracy.png")
    plot_extraction(results, folder / "extraction.png")
    parts = [HEAD, "## Facts: anchors, unit = group\n", accuracy_table(lines, sizes)]
    parts += [f"![Accuracy]({folder.name}/accuracy.png)\n"]
    parts += ["## Facts: units and mechanisms, 256 documents\n", accuracy_table(lines, others)]
    parts += [UNITS, f"![Extraction]({folder.name}/extraction.png)\n"]
    for key in keys:
        trials = next(iter(_series(lines)[key].values()))["trials"]
        parts += [
            f"### Extraction: {key[0]}, unit = {key[1]}, {key[2]:,} documents ({trials} records each)\n"
        ]
        parts += [extraction_table(results, key)]
    above = above_bound(results)
    parts += [
        "## Attacks above the bound (unit = group)\n",
        "\n".join(f"* {a}" for a in above) + "\n" if above else "None.\n",
    ]
    (folder.parent / f"{folder.name}.md").write_text("\n".join(parts))
