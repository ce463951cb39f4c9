"""Figures of docs/paper: one file for each claim."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, NullLocator

from .common import KERNEL, MECHANISMS, TREE

# Okabe and Ito's colours, told apart by colour-blind readers; markers repeat the distinction
STYLES = {
    TREE: ("#D55E00", "s", "dptree"),
    KERNEL: ("#0072B2", "o", "kernel_sum"),
    "trees": ("#E69F00", "v", "dptree, through the trees"),
    "exact": ("#666666", "x", "exact attention (not private)"),
    "anchors": ("#009E73", "^", "anchors"),
    "kernel_sum_small": ("#56B4E9", "D", "kernel_sum, the tree's settings"),
}
AXES = {"n": "rows n", "dv": "channels of a value, d", "r": "features r"}


def _axes(width: int) -> tuple[Any, list[Any]]:
    figure, axes = plt.subplots(1, width, figsize=(4.2 * width, 3.4), squeeze=False, layout="constrained")
    for a in axes[0]:
        a.grid(True, which="major", alpha=0.25)
        a.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _lines(axes: Any, points: Sequence[dict[str, Any]], names: Sequence[str], x: str = "x") -> None:
    for name in names:
        colour, marker, label = STYLES[name]
        kept = [p for p in points if name in p]
        axes.plot(
            [p[x] for p in kept],
            [p[name] for p in kept],
            color=colour,
            marker=marker,
            ms=5,
            lw=1.6,
            label=label,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _ticks(axes, [p[x] for p in points])


def _ticks(axes: Any, values: Sequence[float]) -> None:
    """The measured points themselves, at most five of them."""
    every = -(-len(values) // 5)
    shown = values[::every]
    axes.set_xticks(shown, [f"{v:,g}" if v < 1e4 else f"{v:,.0f}" for v in shown], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _guide(axes: Any, points: Sequence[dict[str, Any]], name: str, slope: float, text: str) -> None:
    """A dotted line of the expected slope through the last point of a series."""
    last, xs = points[-1], [p["x"] for p in points]
    ys = [last[name] * (x / last["x"]) ** slope * 0.55 for x in xs]
    axes.plot(xs, ys, color="#888888", ls=":", lw=1.2, label=text)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def costs(results: dict[str, Any], folder: Path) -> None:
    for part, names, label in (
        ("space", MECHANISMS, "noised numbers released"),
        ("initialisation", MECHANISMS, "CPU seconds of a release"),
        ("queries", ("trees", *MECHANISMS, "exact"), "CPU seconds for {queries:,} queries"),
    ):
        figure, axes = _axes(3)
        for a, by in zip(axes, AXES, strict=True):
            _lines(a, results[part]["points"][by], names)
            a.set_xlabel(AXES[by])
        axes[0].set_ylabel(label.format(**results[part]))
        low, high = (f(a.get_ylim()[i] for a in axes) for i, f in enumerate((min, max)))
        for a in axes:
            a.set_ylim(low, high)
        axes[0].legend(frameon=False, fontsize=8)
        _save(figure, folder / f"{part}.png")


def errors(results: dict[str, Any], folder: Path) -> None:
    figure, axes = _axes(2)
    for a, part, label, text in (
        (axes[0], "error_rows", "rows n", "slope -1"),
        (axes[1], "error_epsilon", "epsilon", "slope -1"),
    ):
        points = results[part]["points"]
        _lines(a, points, MECHANISMS)
        _guide(a, points, KERNEL, -1.0, text)
        a.axhline(0.1, color="#BBBBBB", lw=0.8)
        a.set_xlabel(label)
        a.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("additive error of an answer (RMS)")
    axes[0].set_title("epsilon = 1", fontsize=9)
    axes[1].set_title(f"n = {results['error_epsilon']['rows']:,}", fontsize=9)
    _save(figure, folder / "error.png")
    figure, axes = _axes(2)
    for a, part, label in (
        (axes[0], "error_features", "features r"),
        (axes[1], "error_bins", "bins of a tree"),
    ):
        _lines(a, results[part]["points"], MECHANISMS)
        a.set_xlabel(label)
        a.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("noise of a numerator, in rows (RMS)")
    _save(figure, folder / "noise.png")


def relative(results: dict[str, Any], folder: Path) -> None:
    figure, (a,) = _axes(1)
    points = results["relative"]["points"]
    order = sorted(points, key=lambda p: p["eps_s"])
    a.plot(
        [p["eps_s"] for p in order],
        [p["limit"] for p in order],
        color="#888888",
        ls=":",
        label="2 eps_s / (1 - eps_s)",
    )
    for name in MECHANISMS:
        colour, marker, label = STYLES[name]
        a.plot(
            [p["eps_s"] for p in points],
            [p[name] for p in points],
            ls="",
            color=colour,
            marker=marker,
            ms=5,
            label=label,
        )
    a.set_xscale("log")
    a.set_yscale("log")
    a.set_xlabel("eps_s, relative error of the polynomial")
    a.set_ylabel("largest relative error of an answer")
    a.legend(frameon=False, fontsize=8)
    _save(figure, folder / "relative.png")


def growing(results: dict[str, Any], folder: Path) -> None:
    figure, axes = _axes(1)
    a = axes[0]
    points = results["growing"]["points"]
    x = [p["x"] for p in points]
    for name, colour, marker, label in (
        ("naive", "#666666", "x", "a release at every append"),
        ("tree", "#D55E00", "s", "binary tree"),
        ("square_root", "#0072B2", "o", "square-root factorisation"),
    ):
        a.plot(x, [p[name]["worst_predicted"] for p in points], color=colour, lw=1.6, label=label)
        a.plot(x, [p[name]["mean_measured"] for p in points], color=colour, marker=marker, ms=5, ls="")
    a.plot([], [], color="#000000", lw=1.6, label="lines: worst state, predicted")
    a.plot([], [], color="#000000", marker=".", ls="", label="points: RMS of all states, measured")
    a.set_xscale("log")
    a.set_yscale("log")
    _ticks(a, x)
    a.set_xlabel("appends T")
    a.set_ylabel("error, in noises of one release")
    a.legend(frameon=False, fontsize=7, loc="upper left")
    _save(figure, folder / "growing.png")


def shapes(results: dict[str, Any], folder: Path) -> None:
    found = results["shapes"]
    if "missing" in found:
        return
    figure, axes = _axes(1)
    a = axes[0]
    for name in ("anchors", KERNEL, "kernel_sum_small", TREE):
        colour, marker, label = STYLES[name]
        values = [p[name] for p in found["points"]]
        a.plot(
            [p["x"] for p in found["points"]],
            [v["fvu"] for v in values],
            color=colour,
            marker=marker,
            ms=5,
            label=label,
        )
    a.axhline(found["public_mean"], color="#888888", ls=":", label="public mean, no release")
    a.set_xscale("log")
    a.set_yscale("log")
    _ticks(a, [p["x"] for p in found["points"]])
    a.set_xlabel("epsilon")
    a.set_ylabel("unexplained variance of the outputs")
    a.legend(frameon=False, fontsize=8)
    _save(figure, folder / "shapes.png")


def draw(results: dict[str, Any], folder: Path) -> None:
    """All figures whose results are there."""
    for function, needed in (
        (costs, ("space", "initialisation", "queries")),
        (errors, ("error_rows", "error_epsilon", "error_features", "error_bins")),
        (relative, ("relative",)),
        (growing, ("growing",)),
        (shapes, ("shapes",)),
    ):
        if all(name in results for name in needed):
            function(results, folder)
