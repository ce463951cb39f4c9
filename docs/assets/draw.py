"""The pictures of docs/concepts.md: `python docs/assets/draw.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

from hf_dp_xattn.privacy.guessing import PRIORS, guess_bound

PRIVATE, NOISED, PUBLIC = "#f4c7c3", "#fff2b3", "#cfe3f7"
LINE = "#444444"


def box(ax: Any, x: float, y: float, text: str, color: str, *, w: float = 2.3, h: float = 1.1) -> None:
    patch = FancyBboxPatch(
        (x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0.04,rounding_size=0.1", fc=color, ec=LINE
    )
    ax.add_patch(patch)
    ax.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": LINE, "lw": 1.2})


def canvas(width: float, height: float, size: tuple[float, float]) -> tuple[Any, Any]:
    figure, ax = plt.subplots(figsize=size)
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.set_aspect("equal")
    ax.axis("off")
    return figure, ax


def flow() -> Any:
    """Context -> contributions -> noise -> release -> every layer, head, step, query."""
    figure, ax = canvas(15, 4.6, (10, 3.1))
    box(ax, 1.4, 3.2, "private context\n(n rows)", PRIVATE)
    box(ax, 4.4, 3.2, "each unit clipped,\nexact integer sum", PRIVATE)
    box(ax, 7.4, 3.2, "+ discrete noise\n= the release", NOISED)
    box(ax, 10.4, 3.2, "decoded rows", NOISED)
    box(ax, 13.5, 3.2, "every layer, head,\nstep, beam, query", PUBLIC)
    box(ax, 4.4, 1.0, "calibration\n(public data only)", PUBLIC)
    box(ax, 13.5, 1.0, "public rows\n(user's words, ...)", PUBLIC)
    box(ax, 7.4, 1.0, "ledger: charged\nbefore the noise", PUBLIC)
    for x in (2.6, 5.6, 8.6, 11.6):
        arrow(ax, (x, 3.2), (x + 0.6, 3.2))
    arrow(ax, (4.4, 1.6), (4.4, 2.6))
    arrow(ax, (7.4, 1.6), (7.4, 2.6))
    arrow(ax, (13.5, 1.6), (13.5, 2.6))
    ax.plot([4.4, 4.4, 10.4], [0.4, 0.1, 0.1], color=LINE, lw=1.2)
    arrow(ax, (10.4, 0.1), (10.4, 2.6))
    ax.plot([5.9, 5.9], [2.3, 4.3], ls="--", color="#b3261e", lw=1.2)
    ax.text(5.8, 4.35, "private", ha="right", color="#b3261e", fontsize=9)
    ax.text(6.0, 4.35, "post-processing of the release", ha="left", color=LINE, fontsize=9)
    return figure


def units() -> Any:
    """What one neighbouring step may change, for one prompt of two phrases."""
    figure, axes = plt.subplots(3, 1, figsize=(9, 3.6))
    titles = (
        'unit = "row": one embedding row of one text',
        'unit = "group": one phrase (document, segment), encoded apart from the others',
        'unit = "context": everything',
    )
    for ax, title, changed, split in zip(
        axes, titles, ([4], range(5, 10), range(10)), (False, True, False), strict=True
    ):
        for i in range(10):
            x = i + (0.5 if split and i >= 5 else 0.0)
            ax.add_patch(plt.Rectangle((x, 0), 0.9, 0.8, fc=PRIVATE if i in changed else PUBLIC, ec=LINE))
        ax.set(xlim=(-0.1, 10.6), ylim=(-0.1, 0.9))
        ax.set_title(title, fontsize=9, loc="left")
        ax.axis("off")
    axes[-1].text(
        0, -0.45, "red: what may be replaced by anything; blue: the same in both neighbours", fontsize=8
    )
    figure.tight_layout()
    return figure


def odds() -> Any:
    """`privacy.guessing.guess_bound` under replace_one at delta = 1e-5."""
    figure, ax = plt.subplots(figsize=(7, 3.8))
    epsilon = np.linspace(0, 16, 321)
    for prior in sorted((*PRIORS, 1e-3), reverse=True):
        bound = [guess_bound(float(e), 1e-5, prior) for e in epsilon]
        ax.plot(epsilon, bound, label=f"{prior:g} before")
    ax.set(xlabel="epsilon", ylabel="at most, after the release", ylim=(0, 1.02), xlim=(0, 16))
    ax.set_title("Probability that a guess of one unit is right (delta = 1e-5, replace_one)", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(title="probability", fontsize=8)
    figure.tight_layout()
    return figure


PICTURES = {"flow": flow, "units": units, "odds": odds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().out
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close("all")


if __name__ == "__main__":
    main()
