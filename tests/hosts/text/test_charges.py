"""What a release of text is charged is what it spends, whichever way it is answered, and under every name of its content."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.library.library_fit import LibraryOptions, build_library
from hf_dp_xattn.hosts.text.unit_encoders import unit_encoder

WORDS = [f"{size} {colour} {kind}" for size in ("big", "tiny") for colour in ("red", "blue", "green", "pink")
         for kind in ("dog", "cat", "door", "hat", "cup")]  # fmt: skip
SECRET = "an unknown thing"


def codes(texts: list[str]) -> torch.Tensor:
    found = torch.zeros(len(texts), 64)
    for i, text in enumerate(texts):
        for word in text.split():
            found[i, sum(map(ord, word)) % 64] += 1
    return found


def built(unit: str) -> Any:
    contexts = [[WORDS[(i + j * 7) % len(WORDS)] for j in range(150)] for i in range(8)]
    options = LibraryOptions(
        epsilons=(8.0,), progress=False, grouping="lines" if unit == "group" else "phrases"
    )
    made = contexts if unit == "group" else [", ".join(own[:6]) for own in contexts]
    config = dpx.DPXAttnConfig(mechanism="library", epsilon=8.0, unit=unit)
    return build_library(made, unit_encoder(None, encoder=codes), config, options)


@pytest.mark.parametrize("epsilon", [8.0, 40.0, 64.0])
@pytest.mark.parametrize(("unit", "units"), [("group", 1), ("group", 200), ("context", 1), ("context", 5)])
def test_a_release_is_charged_what_it_spends(unit: str, units: int, epsilon: float) -> None:
    library = built(unit)
    config = dpx.DPXAttnConfig(mechanism="library", epsilon=epsilon, unit=unit)
    protected = dpx.protect(None, config, calibration=library, encoder=codes, allow_useless=True)
    spent: list[Any] = []
    run = type(protected.guard).run

    def watched(self: Any, prepared: Any, *arguments: Any) -> Any:
        spent.append(prepared.prepared)
        return run(self, prepared, *arguments)

    protected.guard.run = watched.__get__(protected.guard)
    private = [f"{SECRET} {i}" for i in range(units)]
    protected.release(private if unit == "group" else ", ".join(private))
    (prepared,) = spent
    charges = protected.ledger.entries()
    assert {c.events for c in charges} == {prepared.events}
    assert prepared.config.epsilon == epsilon


def test_votes_are_charged_in_full_beyond_what_an_answer_may_spend() -> None:
    library = built("group")
    assert library.votes
    library = dataclasses.replace(
        library, votes=tuple(dataclasses.replace(p, answers=9.0) for p in library.votes)
    )
    config = dpx.DPXAttnConfig(mechanism="library", epsilon=40.0, unit="group")
    protected = dpx.protect(None, config, calibration=library, encoder=codes, allow_useless=True)
    private = [f"{SECRET} {i}" for i in range(200)]
    protected.release(private)
    with pytest.raises(dpx.BudgetExceededError):
        protected.release(private, fresh=True)


@pytest.mark.parametrize("fault", ["raises", "longer"])
def test_a_text_at_which_the_encoder_fails_is_answered_as_any(fault: str) -> None:
    def touchy(texts: list[str]) -> torch.Tensor:
        if SECRET in texts[0]:
            if fault == "raises":
                raise RuntimeError(f"cannot read {texts}")
            return torch.zeros(1, 65)
        return codes(texts)

    encode = unit_encoder(None, encoder=touchy)
    found = encode([WORDS[0], SECRET])
    assert torch.equal(found, torch.stack([codes(WORDS[:1])[0], torch.zeros(64)]))


def test_an_encoder_that_fails_on_a_public_text_is_refused() -> None:
    encode = unit_encoder(None, encoder=lambda texts: codes(texts)[:, :, None][1:][0])
    for call in (lambda: encode.public(WORDS[:1]), encode.trial, lambda: encode([SECRET])):
        with pytest.raises(dpx.ContextError, match="public"):
            call()


def test_an_encoder_that_changed_since_is_refused_before_the_charge() -> None:
    """An adapter that is loaded after `protect` gives other codes: the budget is not spent for noise."""
    turned = [False]

    def encode(texts: list[str]) -> torch.Tensor:
        return codes(texts).flip(-1) if turned[0] else codes(texts)

    config = dpx.DPXAttnConfig(mechanism="library", epsilon=8.0, unit="group")
    library, ledger = dataclasses.replace(built("group"), encoder="codes"), dpx.Ledger()
    handle = dpx.protect(None, config, calibration=library, encoder=encode, ledger=ledger)
    release = handle.release(WORDS[0])
    before, turned[0] = len(ledger.entries()), True
    assert handle.release(WORDS[0]).text == release.text  # found again
    for context, options in ((WORDS[1], {}), (iter(WORDS * 4), {"groups": "documents"})):
        with pytest.raises(
            dpx.ConfigError, match=r"has changed since this host was protected.*Nothing was spent"
        ):
            handle.release(context, **options)
    assert len(ledger.entries()) == before
    turned[0] = False
    handle.release(WORDS[1])
