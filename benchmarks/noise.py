"""Seconds for 10^6 samples of discrete noise from the operating system's entropy."""

from __future__ import annotations

import time

from hf_dp_xattn.privacy.noise import discrete_gaussian, discrete_laplace

SAMPLES = 10**6


def measure() -> dict[str, float]:
    """Best of three runs each. (Correctness is the business of tests/privacy/test_noise.py.)"""
    cases = {
        "Gaussian, sigma = 1": lambda: discrete_gaussian(SAMPLES, 1),
        "Gaussian, sigma = 2^10": lambda: discrete_gaussian(SAMPLES, 2**20),
        "Gaussian, sigma = 2^35": lambda: discrete_gaussian(SAMPLES, 2**70),
        "Laplace, scale = 2^10": lambda: discrete_laplace(SAMPLES, 2**10),
    }
    result = {}
    for name, draw in cases.items():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            draw()
            times.append(time.perf_counter() - start)
        result[name] = min(times)
    return result
