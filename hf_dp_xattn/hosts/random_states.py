"""The process's random numbers, which a trial or a private encoding may not use up."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_kept() -> Iterator[None]:
    """What is drawn inside from torch (on the CPU, and on CUDA once it runs), `random` or numpy's global numbers does not count."""
    plain, numbers = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)
