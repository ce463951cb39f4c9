"""Headless Chromium, and the page of examples/app in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """(address, file that gets all output, the process's folder for temporary files)."""
    temporary, log = folder / "tmp", folder / "log.txt"
    temporary.mkdir()
    command = [sys.executable, "examples/app/app.py", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
        assert server.stdout is not None
        try:
            said = []
            for line in server.stdout:
                said.append(line)
                if found := re.match(r"open (http://127\.0\.0\.1:\d+)/? ", line):
                    break
            else:
                raise AssertionError(f"the server stopped: {''.join(said)}{log.read_text()}")
            yield found[1], log, temporary
        finally:
            server.terminate()
            rest, _ = server.communicate(timeout=60)
            log.write_text(log.read_text() + "".join(said) + rest)
