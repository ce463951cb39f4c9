"""Attribute accuracy as lines of a table: intervals, Markdown, a plot and a strip of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from shapes.reader import Score
from shapes.scenes import Scene

KINDS = ("place", "shape", "colour", "size", "background")
EXACT = "none (not private)"
PUBLIC = "public prompt only"
PLAIN = "unprotected pipeline"
# colour-blind-safe (Okabe and Ito)
COLOURS = {
    "row": "#0072B2",
    "group": "#009E73",
    "context": "#D55E00",
    "kernel_sum": "#CC79A7",
    "dptree": "#E69F00",
}


def name(epsilon: float) -> str:
    return EXACT if np.isinf(epsilon) else f"{epsilon:g}"


def interval(per_image: np.ndarray, attributes: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval over captions (each with its own release noise) of the share of all attributes."""
    rng = np.random.default_rng(0)
    pick = rng.integers(0, len(per_image), (draws, len(per_image)))
    shares = (per_image * attributes)[pick].sum(1) / attributes[pick].sum(1)
    return float(np.quantile(shares, 0.025)), float(np.quantile(shares, 0.975))


def line(series: str, label: str, result: Score, scenes: Sequence[Scene]) -> dict[str, Any]:
    """One measurement. series: what was protected and how; label: the epsilon, or a baseline's name."""
    low, high = interval(result.per_image, np.array([s.n_attributes for s in scenes]))
    return {
        "series": series,
        "epsilon": label,
        "accuracy": result.accuracy,
        "low": low,
        "high": high,
        "captions": len(scenes),
        **{k: result.by_kind[k] for k in KINDS},
    }


def markdown(lines: Sequence[dict[str, Any]], titles: dict[str, str]) -> str:
    """epsilon down, series across: share of the attributes that are right, with its interval."""
    titles = {s: t for s, t in titles.items() if any(x["series"] == s for x in lines)}
    epsilons = list(dict.fromkeys(x["epsilon"] for x in lines))
    found = {(x["series"], x["epsilon"]): x for x in lines}
    out = ["| epsilon | " + " | ".join(titles.values()) + " |", "|---" * (1 + len(titles)) + "|"]
    for epsilon in epsilons:
        cells = []
        for series in titles:
            x = found.get((series, epsilon))
            cells.append(
                ""
                if x is None
                else f"{100 * x['accuracy']:.1f} % ({100 * x['low']:.0f}-{100 * x['high']:.0f})"
            )
        out.append(f"| {epsilon} | " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def kinds_markdown(lines: Sequence[dict[str, Any]], titles: dict[str, str]) -> str:
    """Every line with its kinds of attributes."""
    out = ["| what | epsilon | all | " + " | ".join(KINDS) + " |", "|---" * (3 + len(KINDS)) + "|"]
    for x in lines:
        values = " | ".join(f"{100 * x[k]:.0f}" for k in KINDS)
        out.append(
            f"| {titles.get(x['series'], x['series'])} | {x['epsilon']} | {100 * x['accuracy']:.1f} % | {values} |"
        )
    return "\n".join(out) + "\n"


def plot(lines: Sequence[dict[str, Any]], titles: dict[str, str], path: Path, caption: str) -> None:
    """Attributes right against epsilon, one line per series, labelled where it ends; the two baselines in grey."""
    figure, axes = plt.subplots(figsize=(7.6, 4.2), constrained_layout=True)
    ends = []
    for series, title in titles.items():
        chosen = [
            (float(x["epsilon"]), x) for x in lines if x["series"] == series and _is_number(x["epsilon"])
        ]
        if not chosen:
            continue
        e = np.array([v for v, _ in chosen])
        y, low, high = (100 * np.array([x[k] for _, x in chosen]) for k in ("accuracy", "low", "high"))
        colour = COLOURS.get(series, "black")
        axes.plot(e, y, marker="o", markersize=4, color=colour)
        axes.fill_between(e, low, high, color=colour, alpha=0.15, linewidth=0)
        ends.append((float(y[-1]), float(e[-1]), title, colour))
    axes.set_xscale("log", base=2)
    ticks = sorted({float(x["epsilon"]) for x in lines if _is_number(x["epsilon"])})
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlim(ticks[0] * 0.9, ticks[-1] * 6)
    for label, style in ((PLAIN, "--"), (PUBLIC, ":")):
        values = [100 * x["accuracy"] for x in lines if x["epsilon"] == label and x["series"] == "row"]
        if values:
            axes.hlines(values[0], *(ticks[0] * 0.9, ticks[-1]), linestyle=style, color="gray", linewidth=1)
            ends.append((values[0], ticks[-1], f"{label}, {values[0]:.0f} %", "gray"))
    ends.sort()
    for (y_end, x_end, title, colour), y_text in zip(ends, _apart([y for y, *_ in ends]), strict=True):
        axes.annotate(title, (x_end, y_end), (x_end * 1.12, y_text), color=colour, fontsize=9, va="center")
    axes.set_ylim(0, 102)
    counted = {int(x["captions"]) for x in lines}
    axes.set_xlabel(
        f"{caption}; n = {' to '.join(str(n) for n in sorted({min(counted), max(counted)}))} captions"
    )
    axes.set_ylabel("attributes right, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _apart(places: Sequence[float], least: float = 5.0, top: float = 100.0) -> list[float]:
    """Rising places of labels, moved up as far as they need to be apart, and down again where they leave the picture."""
    found = list(places)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + least)
    for i in reversed(range(len(found))):
        found[i] = min(found[i], top if i == len(found) - 1 else found[i + 1] - least)
    return found


def _is_number(label: str) -> bool:
    return label.replace(".", "").isdigit()


def draw_strip(
    rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]],
    prompt: str,
    path: Path,
    weak: Sequence[str] = (),
) -> None:
    """Rows of labelled pictures; each row has a title at its left, in red where it is one of `weak`."""
    columns = max(len(pictures) for _, pictures in rows)
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(1.35 * columns, 1.6 * len(rows) + 0.4),
        constrained_layout=True,
        squeeze=False,
    )
    for line_axes, (title, pictures) in zip(axes, rows, strict=True):
        for axis in line_axes:
            axis.set_axis_off()
        for axis, (label, picture) in zip(line_axes, pictures, strict=False):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(label, fontsize=8)
        line_axes[0].text(
            -0.08,
            0.5,
            title,
            rotation=90,
            ha="right",
            va="center",
            fontsize=9,
            color="#B00020" if title in weak else "black",
            transform=line_axes[0].transAxes,
        )
    figure.suptitle(f'private prompt: "{prompt}"', fontsize=9)
    figure.savefig(path, dpi=160)
    plt.close(figure)
