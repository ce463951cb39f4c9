"""The audit of hosts that read released text: sound ones pass, and planted bugs are caught."""

from __future__ import annotations

from typing import Any

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.audit import audit
from hf_dp_xattn.audit.audit_report import FAIL, PASS

from ..commands.conftest import word_tokenizer
from ..hosts.transformers.decoder_only.tiny import tiny as decoder
from ..hosts.transformers.encoder_decoder.tiny import tiny as seq2seq
from ..hosts_tiny import tiny_sd

CONFIG = dpx.DPXAttnConfig(mechanism="library", epsilon=2.0, unit="group")
PUBLIC = [f"{a} {b}" for a in ("zebra", "quartz", "jukebox") for b in ("wyvern", "obelisk", "marzipan")]
FAST = {"draws": 400, "trials": 50}


def case(name: str) -> tuple[Any, Any]:
    """(host, tokenizer)."""
    if name == "pipeline":
        return tiny_sd(), None
    return (decoder("llama") if name == "llama" else seq2seq("bart")), word_tokenizer()


def tried(name: str) -> dict[str, str]:
    host, tokenizer = case(name)
    public = (
        PUBLIC if name != "pipeline" else ["a red dog", "a blue cat", "a green bird", "the sea", "a red sea"]
    )
    options = {"epsilons": 2.0, "progress": False, "tokenizer": tokenizer}
    library = dpx.calibrate(host, [[p] for p in public], CONFIG, **options)
    found = audit(host, CONFIG, calibration=library, tokenizer=tokenizer, **FAST)
    assert dpx.handle_of(host) is None
    return {c.name: c.verdict for c in found.checks}


@pytest.mark.parametrize("name", ["pipeline", "llama", "bart"])
def test_a_sound_host_passes(name: str) -> None:
    verdicts = tried(name)
    assert FAIL not in verdicts.values()
    sure = ("nothing but the release", "no release, no answer", "one release per context", "extraction")
    assert {verdicts[check] for check in sure} == {PASS}
    assert verdicts["unprotect restores the host"] == PASS and "a lost layer fails closed" not in verdicts


def test_a_host_that_answers_without_a_release_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dp_xattn.hosts.model_gates import TextGate

    monkeypatch.setattr(TextGate, "_gate", lambda self, module, args: None)
    assert tried("llama")["no release, no answer"] == FAIL


def test_a_private_text_that_travels_beside_the_release_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug puts the private text's length into what the host reads."""
    from hf_dp_xattn.hosts.text.text_guard import TextGuard

    run = TextGuard.run
    kept: list[int] = []

    def leaking(self: Any, prepared: Any, context: Any, *given: Any) -> Any:
        kept.append(sum(map(ord, repr(context.load()[0].tolist()))))
        return run(self, prepared, context, *given)

    from hf_dp_xattn.hosts.text.text_host import TextHost

    inputs = TextHost.inputs

    def more(self: Any, release: Any, prompt: Any, **public: Any) -> Any:
        made = inputs(self, release, prompt, **public)
        if "input_ids" in made:
            made["input_ids"][0, -1] = 4 + kept[-1] % 6
        return made

    monkeypatch.setattr(TextGuard, "run", leaking)
    monkeypatch.setattr(TextHost, "inputs", more)
    assert tried("llama")["nothing but the release"] == FAIL
