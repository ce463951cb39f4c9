"""One private prompt as `shapes` draws it at several epsilons, for three privacy units."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import hf_dp_xattn as dpx
from shapes.evaluate import generate
from shapes.private import config, generate_private, prompts
from shapes.scenes import Example, heldout_examples
from shapes.tables import draw_strip

EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
PROMPT_SEED = 11


@dataclass(frozen=True)
class Row:
    """One line of pictures. title: beside it. told: what it is, in words. folder: its calibration."""

    title: str
    told: str
    unit: str
    folder: str
    weak: bool = False


ROWS = (
    Row(
        "each phrase",
        "each phrase is protected, its answer is a public phrase (library)",
        "group",
        "library",
    ),
    Row(
        "whole prompt",
        "the whole prompt is protected, public phrases answer its phrases all together (library)",
        "context",
        "library_prompt",
    ),
    Row(
        "one embedding row\n(protects NO prompt)",
        "one embedding row is protected, which protects NO prompt: each row repeats what the others say (anchors)",
        "row",
        "calibrations/row",
        weak=True,
    ),
)


def example() -> Example:
    """The private prompt: the first held-out caption of a fixed seed that names two objects."""
    return next(e for e in heldout_examples(50, PROMPT_SEED) if len(e.scene.objects) == 2)


def label(epsilon: float) -> str:
    return "exact\n(not private)" if np.isinf(epsilon) else f"eps = {epsilon:g}"


def strip(pipeline: Any, path: Path, *, epsilons: Sequence[float] = EPSILONS, quiet: bool = False) -> None:
    """Draws it: of each row the picture of the public prompt alone, one at each epsilon, and the exact one."""
    shown = example()
    rows = []
    bar = tqdm(total=len(ROWS) * (len(epsilons) + 2), desc="pictures", disable=quiet)
    for row in ROWS:
        calibration = dpx.Calibration.from_pretrained(Path(__file__).parent / row.folder)
        text = prompts([shown], "group" if calibration.mechanism == "library" else row.unit)
        pictures = [("public\nprompt only", generate(pipeline, [""], seed=0)[0])]
        bar.update()
        for epsilon in epsilons:
            settings = config(epsilon, unit=row.unit, mechanism=calibration.mechanism)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of rows, and of large epsilons: they are shown for that
                picture, _ = generate_private(pipeline, text, settings, calibration, ledger=dpx.Ledger())
            pictures.append((label(epsilon), picture[0]))
            bar.update()
        pictures.append((label(float("inf")), generate(pipeline, text, seed=0)[0]))
        bar.update()
        rows.append((row.title, pictures))
    bar.close()
    draw_strip(rows, shown.caption, path, weak=[row.title for row in ROWS if row.weak])
