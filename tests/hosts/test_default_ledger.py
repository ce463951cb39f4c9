"""What was spent is remembered: over `unprotect`, a second host, a host or release that is loaded, a fork, and (in a file) the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn import BudgetExceededError, ConfigError, LedgerError
from hf_dp_xattn.privacy.default_ledger import VARIABLE
from hf_dp_xattn.privacy.noise import SeededEntropy

from ..hosts_tiny import tiny_sd
from .transformers.decoder_only.tiny import tiny as decoder_tiny
from .transformers.encoder_decoder.tiny import documents
from .transformers.encoder_decoder.tiny import tiny as seq2seq_tiny
from .transformers.mllama.tiny import images
from .transformers.mllama.tiny import tiny as image_tiny

TEXT = "a red circle"
HOSTS: dict[str, tuple[Any, Any]] = {
    "pipeline": (tiny_sd, lambda h, **o: h.release(TEXT, **o)),
    "unet": (lambda: tiny_sd().unet, lambda h, **o: h.release(torch.ones(4, 32), **o)),
    "bart": (lambda: seq2seq_tiny("bart"), lambda h, **o: h.release(**documents("bart", 1), **o)),
    "llama": (lambda: decoder_tiny("llama"), lambda h, **o: h.release(torch.arange(4, 9), **o)),
    "mllama": (image_tiny, lambda h, **o: h.release(**images(1), **o)),
}


@pytest.fixture(params=HOSTS)
def kind(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return HOSTS[request.param]


def refused(handle: Any, release: Any) -> None:
    """With nothing spent."""
    before = handle.ledger.entries()
    with pytest.raises(BudgetExceededError):
        release(handle)
    assert handle.ledger.entries() == before


def test_protect_unprotect_protect(kind: tuple[Any, Any], private: dpx.DPXAttnConfig) -> None:
    make, release = kind
    host = make()
    with dpx.protect(host, private) as handle:
        release(handle)
    refused(dpx.protect(host, private), release)


def test_two_hosts(kind: tuple[Any, Any], private: dpx.DPXAttnConfig) -> None:
    make, release = kind
    first, second = (dpx.protect(make(), private) for _ in range(2))
    release(first)
    refused(second, release)
    with dpx.protect(make(), private, ledger=dpx.Ledger()) as own:
        release(own)  # a ledger that was passed counts for itself


def test_a_second_handle_with_another_epsilon_composes(private: dpx.DPXAttnConfig) -> None:
    dpx.protect(tiny_sd(), private.replace(epsilon=2.0)).release(TEXT)
    budget = dpx.Budget(5.0, private.delta)
    second = dpx.protect(tiny_sd(), private.replace(epsilon=3.0), budget=budget)
    second.release(TEXT)  # Gaussian: 2 and 3 together are less than 5
    spent = second.report().to_dict()["releases"][0]["spent_epsilon"]
    assert 3.0 < spent <= 5.0
    third = dpx.protect(tiny_sd(), private.replace(epsilon=3.2))
    refused(
        third, lambda h: h.release(TEXT)
    )  # its own budget of 3.2 is spent, though it has released nothing
    third.release("a blue square")


def test_other_units_are_refused(private: dpx.DPXAttnConfig) -> None:
    dpx.protect(tiny_sd(), private).release(TEXT)
    other = dpx.protect(tiny_sd(), private.replace(unit="context"))
    with pytest.raises(ConfigError, match="unit"):
        other.release(TEXT)


def test_a_host_that_is_loaded(private: dpx.DPXAttnConfig, tmp_path: Path) -> None:
    pipe = tiny_sd()
    with dpx.protect(pipe, private) as handle:
        handle.release(TEXT)
        pipe.save_pretrained(tmp_path)
    refused(dpx.handle_of(dpx.from_pretrained(tmp_path)), lambda h: h.release(TEXT))


def test_seeded_noise_has_no_place_in_the_account(private: dpx.DPXAttnConfig) -> None:
    seeded = dpx.protect(tiny_sd(), private, entropy=SeededEntropy(0))
    seeded.release(TEXT)
    handle = dpx.protect(tiny_sd(), private)
    assert handle.ledger is not seeded.ledger
    handle.release(TEXT)
    assert len(handle.ledger.entries()) > 0


@pytest.mark.parametrize("way", ["release", "prompt", "growing"])
def test_a_host_that_serves_a_loaded_release_makes_none(
    way: str, private: dpx.DPXAttnConfig, tmp_path: Path
) -> None:
    ledger = dpx.Ledger(tmp_path / "ledger.json")
    with dpx.protect(tiny_sd(), private, ledger=ledger) as handle:
        handle.release(TEXT).save_pretrained(str(tmp_path / "r"))
    pipe = tiny_sd()
    release = dpx.Release.from_pretrained(tmp_path / "r", host=pipe)
    serving = dpx.handle_of(pipe)
    ways: dict[str, Any] = {
        "release": lambda: serving.release(TEXT),
        "prompt": lambda: pipe(TEXT, num_inference_steps=1, output_type="latent"),
        "growing": lambda: serving.release(TEXT, horizon=2),
    }
    with pytest.raises(ConfigError, match=r"ledger=dpx\.Ledger\(path\)"):
        ways[way]()
    assert serving.ledger.entries() == ()
    assert pipe(**release.inputs(), num_inference_steps=1, output_type="latent").images.isfinite().all()
    assert "makes no new ones" in serving.report().ledger
    with pytest.raises(ConfigError, match="unprotect"):
        dpx.Release.from_pretrained(tmp_path / "r", host=pipe, ledger=ledger)


def test_it_does_with_the_ledger(
    private: dpx.DPXAttnConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.json"
    with dpx.protect(tiny_sd(), private, ledger=dpx.Ledger(path)) as handle:
        handle.release(TEXT).save_pretrained(str(tmp_path / "r"))
    pipe, same = tiny_sd(), dpx.Ledger(path)
    dpx.Release.from_pretrained(tmp_path / "r", host=pipe, ledger=same)
    refused(dpx.handle_of(pipe), lambda h: h.release(TEXT))
    dpx.handle_of(pipe).release("a blue square")
    dpx.Release.from_pretrained(tmp_path / "r", host=pipe, ledger=same)  # once more: it is the same one
    monkeypatch.setenv(VARIABLE, str(path))
    named = tiny_sd()
    dpx.Release.from_pretrained(tmp_path / "r", host=named)
    refused(dpx.handle_of(named), lambda h: h.release(TEXT))


CHILD = """
import sys, torch, hf_dp_xattn as dpx
from tests.hosts_tiny import tiny_sd
config = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", degree=1, projection_dim=4)
try:
    dpx.protect(tiny_sd(), config, allow_uncalibrated=True).release("a red circle")
    print("released")
except dpx.BudgetExceededError:
    print("refused")
"""


@pytest.mark.slow
def test_the_variable_over_two_processes(tmp_path: Path) -> None:
    environment = {**os.environ, VARIABLE: str(tmp_path / "ledger.json")}
    told = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CHILD],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for _ in range(2)
    ]
    assert told == ["released", "refused"]


def test_the_variable_is_read_once(
    private: dpx.DPXAttnConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_sd()
    with dpx.protect(pipe, private) as handle:
        assert not handle.ledger.persistent
        monkeypatch.setenv(VARIABLE, str(tmp_path / "ledger.json"))
        handle.release(TEXT)
    with pytest.raises(LedgerError, match="two places"):
        dpx.protect(pipe, private)
    assert dpx.handle_of(pipe) is None
    monkeypatch.setenv(VARIABLE, "")
    refused(dpx.protect(pipe, private), lambda h: h.release(TEXT))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_serves_and_releases_nothing(private: dpx.DPXAttnConfig) -> None:
    pipe = tiny_sd()
    handle = dpx.protect(pipe, private)
    handle.release(TEXT)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no assert here: what it says is judged by the parent
        said = []
        try:
            handle.release(TEXT).inputs()
            said.append("served")
            for host in (pipe, tiny_sd()):
                try:
                    dpx.protect(host, private).release("a blue square")
                    said.append("released")
                except LedgerError:
                    said.append("refused")
        finally:
            os.write(write, " ".join(said).encode())
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as file:
        assert file.read() == "served refused refused"


def test_what_the_report_says_is_true(private: dpx.DPXAttnConfig, tmp_path: Path) -> None:
    shared = dpx.protect(tiny_sd(), private)
    own = dpx.protect(tiny_sd(), private, ledger=dpx.Ledger())
    kept = dpx.protect(tiny_sd(), private, ledger=dpx.Ledger(tmp_path / "l"))
    assert "when the process ends" in shared.report().ledger and "dropped" not in shared.report().ledger
    assert "when this ledger is dropped" in own.report().ledger
    assert kept.report().ledger.startswith("persistent")
