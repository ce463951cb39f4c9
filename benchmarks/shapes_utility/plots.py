"""Plots of results.json: FVU and attributes against epsilon, FVU against the number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from shapes.tables import PLAIN, PUBLIC

from .fvu import QUERIES
from .methods import title

# Okabe and Ito's colours, told apart by colour-blind readers; markers repeat the distinction
STYLES = {
    "anchors": ("#0072B2", "o"),
    "anchors_like": ("#009E73", "s"),
    "anchors_context": ("#D55E00", "D"),
    "anchors_group": ("#009E73", "s"),
    "kernel_sum": ("#CC79A7", "^"),
    "dptree": ("#000000", "x"),
    "wiener": ("#E69F00", "v"),
    "wiener_joint": ("#8C6D00", "P"),
}
RESPONSES = (("#56B4E9", "<"), ("#5E5E9E", ">"))
QUERY_WORDS = {"other": "queries from other contexts", "own": "the context's own queries"}
_FAR = 5.0
Line = dict[str, Any]


def _style(name: str, responses: Sequence[str]) -> tuple[str, str]:
    if name in STYLES:
        return STYLES[name]
    return RESPONSES[responses.index(name) % len(RESPONSES)]


def _names(lines: Iterable[Line], x: str) -> list[str]:
    """Methods that have a value of x, in the order of the results."""
    return list(dict.fromkeys(v["method"] for v in lines if v[x] is not None))


def _series(
    axes: Any, lines: Sequence[Line], x: str, value: Callable[[Line], tuple[float, float, float]]
) -> list[tuple[float, float, str, str]]:
    """Lines with 95 % intervals; returns (last x, last y, label, colour) of each."""
    names = _names(lines, x)
    responses = [n for n in names if n.startswith("response")]
    ends = []
    for name in names:
        chosen = sorted((v for v in lines if v["method"] == name and v[x] is not None), key=lambda v: v[x])
        at = np.array([v[x] for v in chosen], float)
        y, low, high = np.array([value(v) for v in chosen]).T
        colour, marker = _style(name, responses)
        main = name.startswith("anchors")
        axes.plot(at, y, color=colour, marker=marker, markersize=4, linewidth=2.2 if main else 1.2, zorder=3)
        if main:
            axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        else:
            axes.errorbar(at, y, [y - low, high - y], color=colour, linewidth=0, elinewidth=0.8)
        ends.append((at[-1], y[-1], title(name), colour))
    return ends


def _labels(axes: Any, ends: Sequence[tuple[float, float, str, str]], gap: float) -> None:
    """Names at the lines' right ends, moved apart where they would overlap; gap is a share of the axes' height."""
    to_axes = axes.transAxes.inverted()
    places = sorted(
        (to_axes.transform(axes.transData.transform((x, y)))[1], y, label, c) for x, y, label, c in ends
    )
    heights = [p[0] for p in places]
    for _ in range(500):  # neighbours that are too close push each other apart
        for i in range(len(heights) - 1):
            push = max(0.0, gap - (heights[i + 1] - heights[i])) / 2
            heights[i], heights[i + 1] = max(0.0, heights[i] - push), min(1.0, heights[i + 1] + push)
    for height, (_, _, label, colour) in zip(heights, places, strict=True):
        axes.annotate(
            label, (1.015, height), xycoords="axes fraction", color=colour, fontsize=8.5, va="center"
        )


def _epsilon_axis(axes: Any, lines: Sequence[Line], note: str) -> None:
    ticks = sorted({v["epsilon"] for v in lines if v["epsilon"] is not None})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"epsilon of one release ({note})")
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_fvu(lines: Sequence[Line], queries: str, path: Path, note: str) -> None:
    """FVU against epsilon, both logarithmic. 1 is the public mean; exact attention is 0, below any such axis.

    Methods that stay far above 1 are named with their number instead.
    """
    figure, axes = plt.subplots(figsize=(8.6, 4.6), layout="constrained")
    best = {n: min(v[queries]["fvu"] for v in lines if v["method"] == n) for n in _names(lines, "epsilon")}
    far = {n: b for n, b in best.items() if b > _FAR}
    lines = [v for v in lines if v["method"] not in far]
    ends = _series(axes, lines, "epsilon", lambda v: tuple(v[queries][k] for k in ("fvu", "low", "high")))
    axes.set_yscale("log")
    _epsilon_axis(axes, lines, note)
    axes.axhline(1.0, color="gray", linestyle=":", linewidth=1)
    ends.append((1.0, 1.0, "public mean only", "gray"))
    shown = [v[queries]["fvu"] for v in lines if v["epsilon"] is not None]
    lowest, highest = min(shown), max(1.0, *shown)
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if lowest / 2 <= t <= 2 * highest]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    for name, best_far in far.items():
        axes.annotate(
            f"{title(name)}: {best_far:,.0f} or more, off the plot",
            (0.02, 0.97),
            xycoords="axes fraction",
            color=_style(name, [])[0],
            fontsize=8.5,
            va="top",
        )
    axes.set_ylabel(f"variance left unexplained (FVU)\n{QUERY_WORDS[queries]}")
    _labels(axes, ends, 0.052)
    _save(figure, path)


def plot_attributes(lines: Sequence[Line], path: Path, note: str) -> None:
    """Attributes right against epsilon, with the unprotected pipeline and the public prompt as references."""
    figure, axes = plt.subplots(figsize=(8.6, 4.6), layout="constrained")
    ends = _series(axes, lines, "epsilon", lambda v: tuple(100 * v[k] for k in ("accuracy", "low", "high")))
    _epsilon_axis(axes, lines, note)
    axes.set_ylim(0, 102)
    axes.set_ylabel("attributes right in the picture, %")
    references = {v["method"]: 100 * v["accuracy"] for v in lines if v["unit"] == "row"}
    for name, style in ((PLAIN, "--"), (PUBLIC, ":")):
        if name in references:
            axes.axhline(references[name], color="gray", linestyle=style, linewidth=1)
            ends.append((1.0, references[name], name, "gray"))
    if PLAIN in references and PUBLIC in references:
        halfway = (references[PLAIN] + references[PUBLIC]) / 2
        axes.axhline(halfway, color="gray", linestyle=(0, (1, 4)), linewidth=1)
        ends.append((1.0, halfway, "halfway: “readable”", "gray"))
    _labels(axes, ends, 0.052)
    _save(figure, path)


def _named_by_kind(v: Line) -> Line:
    """Contexts like the public ones are a series of their own."""
    return {**v, "method": f"{v['method']}_like"} if v.get("kind") == "like" else v


def plot_lengths(lines: Sequence[Line], path: Path, note: str) -> None:
    """FVU against n, one panel per epsilon."""
    epsilons = sorted({v["epsilon"] for v in lines if v["epsilon"] is not None})
    figure, panels = plt.subplots(
        1,
        len(epsilons),
        figsize=(3.1 * len(epsilons) + 2.4, 3.8),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, epsilon in zip(panels[0], epsilons, strict=True):
        ends = _series(
            axes,
            [_named_by_kind(v) for v in lines if v["epsilon"] == epsilon],
            "rows",
            lambda v: (v["fvu"], v["low"], v["high"]),
        )
        axes.axhline(1.0, color="gray", linestyle=":", linewidth=1)
        mean = sorted(
            (v["rows"], v["fvu"]) for v in lines if v["method"] == "public_mean" and v.get("kind") != "like"
        )
        if mean:
            axes.plot(*zip(*mean, strict=True), color="gray", linestyle="--", linewidth=1)
            ends.append((*mean[-1], title("public_mean"), "gray"))
        rows = sorted({v["rows"] for v in lines})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(rows, [f"{r:,}" for r in rows])
        axes.minorticks_off()
        axes.set_title(f"epsilon = {epsilon:g}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("rows n")
    values = [v["fvu"] for v in lines if v["epsilon"] is not None]
    ticks = [
        t
        for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
        if min(values) / 2 <= t <= 2 * max(values)
    ]
    panels[0][0].set_yticks(ticks, [f"{t:g}" for t in ticks])
    panels[0][0].minorticks_off()
    panels[0][0].set_ylabel(f"FVU, {QUERY_WORDS['other']}")
    ends.append((1.0, 1.0, "these contexts' own mean", "gray"))
    _labels(panels[0][-1], ends, 0.075)
    figure.suptitle(note, fontsize=9)
    _save(figure, path)


def _most(lines: Sequence[Line], what: str) -> int:
    """How many contexts or captions a line is of, at most."""
    return max(int(v[what]) for v in lines if v.get(what))


def draw_plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot that the results allow."""
    made = []
    delta = next(iter(results.values()))["delta"] if results else 0.0
    note = f"delta = {delta:g}, replace_one, unit = row unless named"
    larger = results.get("d", {})
    if "a" in results:
        lines = [*results["a"]["lines"], *larger.get("fvu", [])]
        for queries in QUERIES:
            made.append(folder / f"fvu_{queries}.png")
            plot_fvu(lines, queries, made[-1], f"{note}; n = {_most(lines, 'contexts')} contexts")
    if "b" in results:
        lines = [*results["b"]["lines"], *larger.get("attributes", [])]
        made.append(folder / "attributes.png")
        plot_attributes(lines, made[-1], f"{note}; n = {_most(lines, 'captions')} captions")
    if "c" in results and any(v["epsilon"] is not None for v in results["c"]["lines"]):
        made.append(folder / "fvu_rows.png")
        plot_lengths(results["c"]["lines"], made[-1], f"delta = {delta:g}, replace_one, unit = row")
    return made
