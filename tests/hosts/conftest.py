"""Fixtures of the host tests."""

from __future__ import annotations

from typing import Any

import pytest

from hf_dp_xattn import DPXAttnConfig

from ..hosts_tiny import tiny_sd


@pytest.fixture
def pipe() -> Any:
    """A fresh tiny StableDiffusionPipeline."""
    return tiny_sd()


@pytest.fixture
def exact() -> DPXAttnConfig:
    return DPXAttnConfig(unit="row", mechanism="none")


@pytest.fixture
def private(request: pytest.FixtureRequest) -> DPXAttnConfig:
    """A real release; small, so that tests are fast. Parametrised indirectly by the mechanism."""
    mechanism = getattr(request, "param", "kernel_sum")
    return DPXAttnConfig(unit="row", mechanism=mechanism, epsilon=8.0, delta=1e-5, degree=1, projection_dim=4)
