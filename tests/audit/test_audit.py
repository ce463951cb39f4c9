"""`audit` as a whole: what it reports, what it refuses, and that it leaves the host as it was."""

from __future__ import annotations

import dataclasses
import json

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.audit import AuditReport, Check, audit
from hf_dp_xattn.audit.audit_report import FAIL, LIMITS, PASS
from hf_dp_xattn.audit.leaks import LEAKS

from ..hosts.transformers.encoder_decoder.tiny import tiny as seq2seq
from ..hosts_tiny import picture, tiny_sd, tiny_sdxl
from .hosts import CASES, KERNEL, recordings

FAST = {"draws": 400, "trials": 50}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize(
    "name", ["pipeline anchors", "unet kernel_sum group", "inpaint dptree", "llama anchors", "mllama anchors"]
)
@pytest.mark.slow
def test_a_sound_host_passes(name: str) -> None:
    host, config, calibration = CASES[name]()
    found = audit(host, config, calibration=calibration, **FAST)
    assert found.passed and {c.verdict for c in found.checks} == {PASS}
    assert len(found.checks) == len(LEAKS) + 3 + 3 + 1
    assert dpx.handle_of(host) is None


def test_an_encoder_of_features_takes_contexts_of_the_users_own() -> None:
    model = seq2seq("whisper")
    assert audit(model, KERNEL, contexts=recordings(3), **FAST).passed
    with pytest.raises(dpx.ConfigError, match="input_features"):
        audit(model, KERNEL, **FAST)


def test_the_report_is_text_and_json() -> None:
    host, config, calibration = CASES["bart anchors"]()
    found = audit(host, config, calibration=calibration, **FAST)
    values = json.loads(found.to_json())
    assert values == found.to_dict() and values["passed"] is True
    assert {c["name"]: c["verdict"] for c in values["checks"]} == {c.name: c.verdict for c in found.checks}
    assert all(c.name in str(found) and c.text in str(found) for c in found.checks)
    assert all(line in str(found) for line in (*LIMITS, *found.notes))
    failed = dataclasses.replace(found, checks=(*found.checks, Check("planted", FAIL, "it leaks")))
    assert not failed.passed and "FAIL" in str(failed) and "1 failed" in str(failed)
    assert isinstance(failed, AuditReport) and failed.to_dict()["passed"] is False


def test_the_host_and_the_users_ledger_are_as_before() -> None:
    pipe = tiny_sd()
    before, hooks = picture(pipe, "a dog"), len(pipe.unet._forward_pre_hooks)
    audit(pipe, KERNEL, **FAST)
    assert dpx.handle_of(pipe) is None and len(pipe.unet._forward_pre_hooks) == hooks
    assert bool((picture(pipe, "a dog") == before).all())
    ledger = dpx.Ledger()
    with dpx.protect(pipe, KERNEL, ledger=ledger) as protected:
        with pytest.raises(dpx.ConfigError, match="unprotect"):
            audit(pipe, KERNEL, **FAST)
        assert ledger.entries() == () and protected.active


def test_what_is_refused() -> None:
    pipe = tiny_sd()
    with pytest.raises(dpx.ConfigError, match="nothing to audit"):
        audit(pipe, dpx.DPXAttnConfig(unit="row", mechanism="none"))
    with pytest.raises(dpx.ConfigError, match="DPXAttnConfig"):
        audit(pipe, {"epsilon": 1.0})  # type: ignore[arg-type]
    with pytest.raises(dpx.ConfigError, match="draws"):
        audit(pipe, KERNEL, draws=10)
    with pytest.raises(dpx.ConfigError, match="confidence"):
        audit(pipe, KERNEL, confidence=1.0)
    with pytest.raises(dpx.ConfigError, match="two candidates"):
        audit(pipe, KERNEL, texts=["one"])
    with pytest.raises(dpx.ConfigError, match="no text"):
        audit(pipe.unet, KERNEL, texts=["one", "two"])
    with pytest.raises(dpx.UnsupportedModelError):
        audit(tiny_sdxl(), KERNEL)
    assert dpx.handle_of(pipe) is None
