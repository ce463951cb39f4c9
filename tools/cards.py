"""Writes the cards of the shipped calibrations to model_cards/, from their files and docs/shapes/accuracy.json: `python tools/cards.py`."""

from __future__ import annotations

import json
from pathlib import Path

import hf_dp_xattn as dpx
from hf_dp_xattn.artefacts import card_options

ROOT = Path(__file__).resolve().parents[1]
CALIBRATIONS = "examples/shapes/calibrations"
ACCURACY = "docs/shapes/accuracy.json"


def _held_out(unit: str) -> str:
    lines = [x for x in json.loads((ROOT / ACCURACY).read_text())["lines"] if x["series"] == unit]
    rows = [
        f"| {x['epsilon']} | {100 * x['accuracy']:.1f} % ({100 * x['low']:.0f}-{100 * x['high']:.0f}) | {x['captions']} |"
        for x in lines
    ]
    head = ["| epsilon | attributes right (95 %) | captions |", "| --- | --- | --- |"]
    return "\n".join(
        [
            "Measured on held-out captions, whose combinations of colour, shape and place no public caption has "
            "(`python examples/shapes/sweep.py`):",
            "",
            *head,
            *rows,
        ]
    )


def cards() -> dict[str, str]:
    """Their text by the name of their file."""
    out = {}
    for folder in sorted(p for p in (ROOT / CALIBRATIONS).iterdir() if p.is_dir()):
        calibration = dpx.Calibration.from_pretrained(folder)
        options = card_options(
            {
                "license": "apache-2.0",
                "repo_id": f"{CALIBRATIONS}/{folder.name}",
                "utility": _held_out(folder.name),
            }
        )
        out[f"calibration-{folder.name}.md"] = str(calibration.card(options)).rstrip("\n") + "\n"
    return out


if __name__ == "__main__":
    for name, text in cards().items():
        (ROOT / "model_cards" / name).write_text(text)
        print(f"wrote model_cards/{name}")
