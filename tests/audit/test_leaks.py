"""Leak tests of an audit: every kind of host passes, and each planted leak is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_dp_xattn.audit import leaks
from hf_dp_xattn.audit.audit_report import FAIL, NOT_APPLICABLE, PASS
from hf_dp_xattn.audit.leaks import LEAKS
from hf_dp_xattn.audit.spy import Spy
from hf_dp_xattn.hosts import guard as guard_module
from hf_dp_xattn.hosts import releases as releases_module
from hf_dp_xattn.hosts.diffusers.processor import DPAttnProcessor, Forward
from hf_dp_xattn.hosts.diffusers.unet_forward import ForwardGate
from hf_dp_xattn.hosts.driver import Driver
from hf_dp_xattn.hosts.protected import Protected
from hf_dp_xattn.hosts.transformers.decoder_only import prefix_attention as decoder_attention
from hf_dp_xattn.hosts.transformers.encoder_decoder import cross_attention as seq2seq_attention
from hf_dp_xattn.privacy.ledger import Ledger

from .hosts import CASES, case

Check = Callable[[Driver, Any], Any]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run(check: Check, subject: Driver) -> Any:
    one, other = subject.canaries(2)
    return check(subject, (one, other))


@pytest.mark.parametrize("name", CASES)
def test_a_sound_host_passes(name: str) -> None:
    subject = case(name)
    found = {check.__name__: run(check, subject).verdict for check in LEAKS}
    assert set(found.values()) == {PASS}
    assert subject.handle is None


# ---- what is planted, and the check that must see it ------------------------------------------------------------------------------


def kept_rows(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Where the rows of every context go that is released from now on."""
    kept: list[torch.Tensor] = []
    run_one = releases_module.Releases.run

    def keep(self: Any, recipe: Any, context: Any, *rest: Any) -> Any:
        kept.append(context.load()[0])
        return run_one(self, recipe, context, *rest)

    monkeypatch.setattr(releases_module.Releases, "run", keep)
    return kept


def keep_rows_aside(monkeypatch: pytest.MonkeyPatch, subject: Driver) -> None:
    """What is released is kept, and read by what attends."""
    kept = kept_rows(monkeypatch)

    def more() -> Any:
        return 1e-3 * kept[-1][:, 0].double().mean() if kept else torch.zeros(())

    read, partial = seq2seq_attention.read, decoder_attention.read_partial
    attend = DPAttnProcessor._attend
    monkeypatch.setattr(seq2seq_attention, "read", lambda *a: read(*a) + more().float())
    monkeypatch.setattr(
        decoder_attention, "read_partial", lambda *a: (partial(*a)[0] + more().float(), partial(*a)[1])
    )
    monkeypatch.setattr(DPAttnProcessor, "_attend", lambda self, *a: attend(self, *a) + more().float())


def pass_rows_on(monkeypatch: pytest.MonkeyPatch, subject: Driver) -> None:
    """A module of the host is given the private rows."""
    kept = kept_rows(monkeypatch)
    probe = torch.nn.Identity()
    subject.serving.add_module("probe", probe)
    subject.serving.register_forward_pre_hook(lambda *a: None if not kept else (probe(kept[-1]), None)[1])


def numbers_in_the_placeholder(monkeypatch: pytest.MonkeyPatch, subject: Driver) -> None:
    make = guard_module.make_placeholder
    monkeypatch.setattr(guard_module, "make_placeholder", lambda *a: make(*a).nan_to_num(0.25))


def gates_that_never_look(monkeypatch: pytest.MonkeyPatch, subject: Driver) -> None:
    for check in ("check", "check_changes", "check_thoroughly"):
        monkeypatch.setattr(guard_module.Guard, check, lambda self: None)
    monkeypatch.setattr("hf_dp_xattn.hosts.diffusers.pipelines.PipelinePatch.check", lambda self: None)
    monkeypatch.setattr("hf_dp_xattn.hosts.diffusers.pipelines.refuse_nan", lambda image: None)


def an_open_gate(monkeypatch: pytest.MonkeyPatch, subject: Driver) -> None:
    monkeypatch.setattr(ForwardGate, "read", lambda self, a, k: Forward(self._host.guard._built.tables))


def a_free_second_release(monkeypatch: pytest.MonkeyPatch, subject: Driver) -> None:
    charge, seen = Ledger.charge_all, set()

    def once(self: Any, digests: list[str], *rest: Any, **options: Any) -> Any:
        fresh = [d for d in digests if d not in seen]
        seen.update(fresh)
        return charge(self, fresh, *rest, **options)

    monkeypatch.setattr(Ledger, "charge_all", once)
    monkeypatch.setattr(Ledger, "check_all", lambda *a: ())


def no_cache_of_releases(monkeypatch: pytest.MonkeyPatch, subject: Driver) -> None:
    release = releases_module.Releases.make

    def anew(self: Any, contexts: Any, **options: Any) -> Any:
        return release(self, contexts, **{**options, "fresh": True})

    monkeypatch.setattr(releases_module.Releases, "make", anew)
    monkeypatch.setattr(Ledger, "check_all", lambda *a: ())
    monkeypatch.setattr(Ledger, "charge_all", lambda *a, **options: ())


def a_weight_that_stays_changed(monkeypatch: pytest.MonkeyPatch, subject: Driver) -> None:
    unprotect = Protected.unprotect

    def careless(self: Any) -> None:
        unprotect(self)
        next(self.model.parameters()).data.view(-1)[0] += 1e-3

    monkeypatch.setattr(Protected, "unprotect", careless)


def a_hook_that_stays(monkeypatch: pytest.MonkeyPatch, subject: Driver) -> None:
    unprotect = Protected.unprotect

    def careless(self: Any) -> None:
        unprotect(self)
        self.model.register_forward_pre_hook(lambda *a: None)

    monkeypatch.setattr(Protected, "unprotect", careless)


PLANTED = [
    ("pipeline anchors", keep_rows_aside, leaks.only_the_release),
    ("unet kernel_sum", keep_rows_aside, leaks.only_the_release),
    ("bart anchors", keep_rows_aside, leaks.only_the_release),
    ("llama anchors", keep_rows_aside, leaks.only_the_release),
    ("pipeline kernel_sum group", pass_rows_on, leaks.nothing_travels),
    ("bart anchors", pass_rows_on, leaks.nothing_travels),
    ("pipeline anchors", numbers_in_the_placeholder, leaks.nothing_travels),
    ("pipeline anchors", gates_that_never_look, leaks.a_lost_layer),
    ("unet kernel_sum", an_open_gate, leaks.a_lost_layer),
    ("pipeline anchors", a_free_second_release, leaks.one_release),
    ("llama kernel_sum group", a_free_second_release, leaks.one_release),
    ("bart anchors", no_cache_of_releases, leaks.one_release),
    ("pipeline anchors", a_weight_that_stays_changed, leaks.restored),
    ("pipeline anchors", a_hook_that_stays, leaks.restored),
]


@pytest.mark.parametrize(
    ("name", "plant", "check"), PLANTED, ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_what_is_planted_is_named(
    name: str, plant: Any, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = case(name)
    plant(monkeypatch, subject)
    found = run(check, subject)
    assert found.verdict == FAIL and found.text


def test_where_the_host_ignores_its_context_nothing_can_be_shown() -> None:
    subject = case("unet kernel_sum")
    for name, parameter in subject.host.named_parameters():
        if ".attn2.to_out" in name:
            parameter.data.zero_()
    assert run(leaks.only_the_release, subject).verdict == NOT_APPLICABLE


def test_the_search_finds_a_piece_of_a_row_in_any_type() -> None:
    rows = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Identity()
    for seen in (
        rows[2:3],
        rows.half()[:, 8:16],
        torch.cat([torch.zeros(1, 8), rows[:1, 8:16]], 1),
        rows * 1.0000001,
    ):
        spy = Spy(rows)
        with spy.watching(layer):
            layer(seen)
        assert spy.matches == 2  # what goes in, and what comes out
    for other in (rows.flip(1), torch.full_like(rows, torch.nan), torch.zeros(3, 24), rows[:, :7]):
        spy = Spy(rows)
        with spy.watching(layer):
            layer(other)
        assert spy.matches == 0 and spy.tensors == 2
    assert not layer._forward_hooks
