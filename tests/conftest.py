"""Shared settings: few threads (the tests share the machine), no network, and for each test a process's ledger of its own."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from hf_dp_xattn.hosts import protect
from hf_dp_xattn.privacy import default_ledger

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_process_ledger(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As if the test were a process of its own; the command line's ledger, which outlives processes, is in the folder that is returned."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.delenv(default_ledger.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(default_ledger, "_kept", default_ledger._Kept())
    return cache


# As if each test said allow_uncalibrated=True, and that contexts of few units are worth their charge: nearly all are about what a release
# promises, not about what it is good for. From the import on, because some fixtures are of a whole module.
_refusals = {name: getattr(protect, name) for name in ("require_calibration", "enough_units")}
for _name in _refusals:
    setattr(protect, _name, lambda *config, **allowed: None)


@pytest.fixture(autouse=True)
def as_users(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that users' code must pass as it is carry the marker `as_users`."""
    if request.node.get_closest_marker("as_users") is not None:
        for name, refusal in _refusals.items():
            monkeypatch.setattr(protect, name, refusal)
