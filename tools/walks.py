"""How far a call travels through the package: files entered, and entries from another file, of a prompt and of a release.

`python tools/walks.py` prints, for a picture of two steps from a private prompt and for one release of a private system prompt, how many of
the package's files run and how often control enters one of them from any other file. A number to keep small, not a test.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hf_dp_xattn as dpx  # noqa: E402
from tests.hosts.transformers.decoder_only.tiny import tiny, tokens  # noqa: E402
from tests.hosts_tiny import tiny_sd  # noqa: E402


def walk(run: Callable[[], Any]) -> tuple[int, int]:
    """(files, entries) of the package that `run` passes through."""
    package = str(Path(dpx.__file__).parent)
    entered: dict[str, int] = {}

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        file, caller = frame.f_code.co_filename, frame.f_back
        if file.startswith(package) and (caller is None or caller.f_code.co_filename != file):
            entered[file] = entered.get(file, 0) + 1

    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(entered), sum(entered.values())


def main() -> None:
    warnings.simplefilter("ignore")
    config = dpx.DPXAttnConfig(mechanism="kernel_sum", epsilon=8.0, unit="context")
    pipe = tiny_sd()
    with dpx.protect(pipe, config, ledger=dpx.Ledger(), allow_uncalibrated=True):
        files, entries = walk(lambda: pipe("a red circle", num_inference_steps=2, output_type="np"))
    print(f"pipe(prompt), two steps: {files} files, {entries} entries")
    model = tiny("llama")
    with dpx.protect(model, config, ledger=dpx.Ledger(), allow_uncalibrated=True) as protected:
        files, entries = walk(lambda: protected.release(tokens(12), public_head=1))
    print(f"release of a system prompt: {files} files, {entries} entries")


if __name__ == "__main__":
    main()
