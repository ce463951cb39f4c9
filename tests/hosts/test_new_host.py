"""A whole new kind of host in one file: an adapter, a driver and a `HostKind`; the audit's leak tests pass on it, and see a leak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

import hf_dp_xattn as dpx
from hf_dp_xattn.audit.audit_report import FAIL, PASS
from hf_dp_xattn.audit.leaks import LEAKS, only_the_release
from hf_dp_xattn.audit.subjects import subject_of
from hf_dp_xattn.errors import ProtectionLostError
from hf_dp_xattn.hosts import host_registry
from hf_dp_xattn.hosts.context import from_embeddings
from hf_dp_xattn.hosts.driver import Canary, Driver, Outputs
from hf_dp_xattn.hosts.fingerprint import Fingerprint, fingerprint, sketch_of
from hf_dp_xattn.hosts.host import Named, Readable
from hf_dp_xattn.hosts.host_registry import HostKind
from hf_dp_xattn.hosts.host_words import HostWords, Setting
from hf_dp_xattn.hosts.layer import Layer
from hf_dp_xattn.hosts.layer_host import LayerHost
from hf_dp_xattn.hosts.placeholder import read_tags
from hf_dp_xattn.mechanisms.base import LayerSpec

WIDTH, HEADS, CHANNELS = 16, 2, 24
CONFIG = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="context", epsilon=8.0)


def split(rows: torch.Tensor) -> torch.Tensor:
    return rows.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Reader(nn.Module):
    """Reads a context [B, n, CHANNELS]; table: what it reads in its place."""

    table: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k, self.to_v = (nn.Linear(CHANNELS, WIDTH, bias=False) for _ in range(2))

    def forward(self, states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        query = split(self.to_q(states))
        if self.table is not None:
            out = self.table.structure.attend(query)
        else:
            keys, values = split(self.to_k(context)), split(self.to_v(context))
            out = nn.functional.scaled_dot_product_attention(query, keys, values)
        return states + out.transpose(1, 2).flatten(2)


class Tiny(nn.Module, PyTorchModelHubMixin):
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.readers = nn.ModuleList([Reader(), Reader()])

    def forward(self, states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for reader in self.readers:
            states = reader(states, context)
        return states


class TinyLayer(Layer):
    heads, channels, softcap = HEADS, CHANNELS, None
    key_dim = value_dim = WIDTH // HEADS
    scale = (WIDTH // HEADS) ** -0.5
    module: Any

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    def parts(self) -> list[nn.Module]:
        return [self.module.to_k, self.module.to_v]

    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return split(self.module.to_k(rows)), split(self.module.to_v(rows))

    def sketch(self, dtype: torch.dtype) -> torch.Tensor:
        return sketch_of(self.parts(), dtype)

    def spec(self, dtype: torch.dtype) -> LayerSpec:
        query, key = (
            m.weight.detach().unflatten(0, (HEADS, -1)) for m in (self.module.to_q, self.module.to_k)
        )
        return LayerSpec(self.name, HEADS, self.key_dim, self.value_dim, self.scale, query, key)

    def output_gain(self) -> torch.Tensor:
        return torch.ones(HEADS)


class TinyHost(LayerHost):
    cross: dict[str, TinyLayer]
    _hooks: tuple[Any, ...] | list[Any] = ()

    def find_layers(self) -> dict[str, Layer]:
        self.cross = {n: TinyLayer(n, m) for n, m in self.model.named_modules() if isinstance(m, Reader)}
        return dict(self.cross)

    def watched(self) -> list[nn.Module]:
        return [part for layer in self.layers.values() for part in layer.parts()]

    def sketch(self) -> Fingerprint:
        return fingerprint(self.cross.values(), self.model.dtype)

    @property
    def channels(self) -> int:
        return CHANNELS

    def install(self, guard: Any, handle: Any) -> None:
        super().install(guard, handle)
        self._hooks = [self.model.register_forward_pre_hook(self._gate, with_kwargs=True)]

    def _gate(self, module: Any, args: Any, kwargs: Any) -> None:
        self.guard.check()
        tags = [t for t in read_tags(kwargs["context"]) if t is not None]
        if len(tags) != len(kwargs["context"]):
            raise ProtectionLostError("No release is at hand.")
        for name, table in self.guard.build(tags, "cpu").items():
            self.cross[name].module.table = table

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer in self.cross.values():
            vars(layer.module).pop("table", None)
        super().remove()

    def lost(self) -> str | None:
        gone = [n for n, layer in self.cross.items() if self.model.get_submodule(n) is not layer.module]
        return f"{gone[0]} was replaced" if gone else None

    def name(self, context: Any, groups: Any, **named: Any) -> Named:
        return Named([from_embeddings(context, CHANNELS)], groups)

    def inputs(self, release: Readable, prompt: Any, **public: Any) -> dict[str, Any]:
        tags = self.guard.bind(release.contexts)
        return {**public, "context": self.guard.placeholder(tags, release.contexts[0].rows, "cpu")}

    def words(self, setting: Setting) -> HostWords:
        return HostWords("Tiny", ("the weights",), ("what the release tells",))


class TinyDriver(Driver):
    kind = "tiny"
    states = torch.linspace(-1, 1, 3 * WIDTH).view(1, 3, WIDTH)

    @property
    def serving(self) -> nn.Module:
        model: nn.Module = self.host
        return model

    def _parts(self, count: int) -> list[Any]:
        return list(torch.randn(count, 6, CHANNELS, generator=torch.Generator().manual_seed(0)))

    def release(self, canary: Canary, **options: Any) -> Any:
        return self.handle.release(torch.cat(canary), **options)

    def inputs(self, release: Any) -> dict[str, Any]:
        return dict(release.inputs(states=self.states))

    def is_blank(self, inputs: dict[str, Any]) -> bool:
        return super().is_blank({"context": inputs["context"]})

    def call_inputs(self, canary: Canary) -> dict[str, Any]:
        return {"states": self.states, "context": torch.cat(canary).unsqueeze(0)}

    @torch.no_grad()
    def answer(self, inputs: dict[str, Any]) -> Outputs:
        return [self.host(**inputs)]

    def refused(self) -> None:
        self.host(states=self.states, context=torch.zeros(1, 6, CHANNELS))

    def lose(self, name: str) -> Callable[[], None]:
        parent, index = self.host.readers, int(name.rpartition(".")[2])
        reader, parent[index] = parent[index], Reader()
        return lambda: parent.__setitem__(index, reader)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = HostKind(lambda host: isinstance(host, Tiny), TinyHost, lambda *a: pytest.fail(), TinyDriver)
    monkeypatch.setattr(host_registry, "KINDS", (kind, *host_registry.KINDS))


@pytest.mark.parametrize("check", LEAKS, ids=lambda check: check.__name__)
def test_the_audit_tries_a_host_that_is_only_registered(check: Any) -> None:
    subject = subject_of(Tiny(), CONFIG)
    one, other = subject.canaries(2)
    verdict = check(subject, (one, other))
    assert verdict.verdict == PASS, verdict


def test_a_leak_of_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(Tiny(), CONFIG)
    one, other = subject.canaries(2)
    monkeypatch.setattr(
        TinyDriver, "inputs", lambda self, release: self.call_inputs((one, other)[self.turn()])
    )
    turns = iter((0, 1))
    monkeypatch.setattr(TinyDriver, "turn", lambda self: next(turns), raising=False)
    monkeypatch.setattr(TinyHost, "_gate", lambda *a: None)
    assert only_the_release(subject, (one, other)).verdict == FAIL


def test_a_release_of_it_is_saved_and_loaded(tmp_path: Any) -> None:
    model = Tiny()
    with dpx.protect(model, CONFIG, ledger=dpx.Ledger(), allow_uncalibrated=True) as protected:
        release = protected.release(torch.randn(6, CHANNELS))
        release.save_pretrained(tmp_path)
        with torch.no_grad():
            want = model(**release.inputs(states=TinyDriver.states))
    loaded = dpx.Release.from_pretrained(tmp_path, host=model)
    with torch.no_grad():
        assert torch.equal(model(**loaded.inputs(states=TinyDriver.states)), want)
    dpx.unprotect(model)
