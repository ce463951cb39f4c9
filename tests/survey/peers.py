"""diffusers' own tests of Stable Diffusion with `mechanism="none"`: how many that pass unprotected pass protected.

`python -m tests.survey peers --diffusers-source FOLDER`. Tests that need the network, a GPU or expected numbers of real checkpoints fail
unprotected, and do not count.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers

from . import peers_plugin

FILES = (
    "pipelines/stable_diffusion/test_stable_diffusion.py",
    "pipelines/stable_diffusion/test_stable_diffusion_img2img.py",
    "pipelines/stable_diffusion/test_stable_diffusion_inpaint.py",
    "lora/test_lora_layers_sd.py",
)


def outcomes(source: Path, folder: Path, only: list[str] | None, files: tuple[str, ...]) -> dict[str, str]:
    """Test to "passed", or the message that it failed with. only: these tests, protected; else all of the files, unprotected."""
    out = folder / "outcomes.json"
    asked = {peers_plugin.SOURCE: str(source), peers_plugin.OUT: str(out)}
    if only is not None:
        chosen = folder / "only.json"
        chosen.write_text(json.dumps(only), encoding="utf-8")
        asked |= {peers_plugin.ONLY: str(chosen), peers_plugin.PROTECTED: "1"}
    options = ["-q", "--no-header", "--tb=short", "-p", peers_plugin.__name__, "-p", "no:cacheprovider"]
    where = ["-c", os.devnull, f"--rootdir={source}", *(str(source / "tests" / f) for f in files)]
    subprocess.run([sys.executable, "-m", "pytest", *options, *where], env=os.environ | asked, check=False)
    return dict(json.loads(out.read_text(encoding="utf-8")))


def cause(message: str) -> str:
    """One line for all failures of a kind: the error and its first sentence, without numbers and addresses."""
    line = message.strip().splitlines()[0].rsplit("hf_dp_xattn.errors.", 1)[-1] if message.strip() else ""
    return re.sub(r"\b0x[0-9a-f]+|\b\d+(\.\d+)?(e-?\d+)?", "N", line.split(". ")[0])[:200]


def compare(plain: dict[str, str], protected: dict[str, str]) -> dict[str, Any]:
    """How many tests pass unprotected and protected, and the names of those that fail protected, by cause."""
    passing = passed(plain)
    failed = {n: protected.get(n, "not run") for n in passing if protected.get(n) != peers_plugin.PASSED}
    causes: dict[str, list[str]] = {}
    for name, message in failed.items():
        causes.setdefault(cause(message), []).append(name.rsplit("/", 1)[-1])
    return {
        "unprotected": len(passing),
        "protected": len(passing) - len(failed),
        "causes": dict(sorted(causes.items(), key=lambda c: -len(c[1]))),
    }


def passed(found: dict[str, str]) -> list[str]:
    return sorted(name for name, how in found.items() if how == peers_plugin.PASSED)


def write(source: Path, folder: Path) -> None:
    """Runs them, prints what came out and writes it to peers.json of the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        plain = outcomes(source, Path(scratch), None, FILES)
        protected = outcomes(source, Path(scratch), passed(plain), FILES)
    result = {**compare(plain, protected), "files": FILES, "version": f"diffusers {diffusers.__version__}"}
    (folder / "peers.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
