"""Pipelines whose denoiser updates its rows of text: it is given rows that were released, and a public stand-in for all else."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.audit.leaks import held_fixed
from hf_dp_xattn.hosts.diffusers.rows_encoder import ROOM, SWAPPED, RowsEncoder, repeated
from hf_dp_xattn.mechanisms.context_rows import ContextRows

from ...private_content import PrivateContent
from ...survey.recorder import Record, recording
from ..text.pipelines import call as call_shortened
from ..text.pipelines import tiny_auraflow, tiny_cogvideox, tiny_flux, tiny_qwen, tiny_sd3
from .test_placed_prompts import protect

HOSTS: dict[str, Callable[[], Any]] = {
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "qwen": tiny_qwen,
    "auraflow": tiny_auraflow,
    "cogvideox": tiny_cogvideox,
}
POOLED = {"sd3": 1, "flux": 1}
STEADY = [name for name in HOSTS if name != "qwen"]  # whose prompts have as many rows, however long they are
PROMPTS = "red box", "blue dogs at five"  # of different lengths
SECRETS = "Zanzibar say code 918273", "never speak to Quetzal 564738 monday red blue open"
PUBLIC = [
    f"{a} {b} {c}"
    for a in ("please", "never")
    for b in ("speak", "close", "open")
    for c in ("red", "blue", "code", "monday")
]


def call(pipe: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """With prompts of the usual length, as a release has."""
    usual = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
    return call_shortened(pipe, *args, **{"max_sequence_length": usual, **kwargs})


@pytest.mark.parametrize("kind", HOSTS)
def test_without_noise_the_pipeline_draws_what_it_draws(kind: str) -> None:
    pipe = HOSTS[kind]()
    before = [call(pipe, prompt) for prompt in PROMPTS]
    handle = protect(pipe)
    now = [call(pipe, prompt) for prompt in PROMPTS]
    again = [call(pipe, **handle.release(prompt).inputs()) for prompt in PROMPTS]
    assert len(handle.report().releases) == 2
    assert len(handle.host.encoder.vectors) == POOLED.get(kind, 0)
    for want, got, other in zip(before, now, again, strict=True):
        assert torch.equal(got, other)
        if kind in STEADY:
            assert torch.allclose(want, got, atol=1e-4, rtol=1e-3)
    assert not torch.equal(*now)
    dpx.unprotect(pipe)
    assert torch.equal(call(pipe, PROMPTS[0]), before[0])


def _record(pipe: Any, prompt: str) -> Record:
    """All that models, callbacks and the caller see of one call."""
    with recording(pipe) as record:

        def note(_: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            record.add("callback", tensors)
            return {}

        names = [n for n in type(pipe)._callback_tensor_inputs if n != "latent_image_ids"]
        more = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": names}
        if type(pipe).__name__ == "AuraFlowPipeline":
            more = {}
        record.add("output", call(pipe, prompt, **more))
    return record


def _private(handle: Any, pipe: Any, prompt: str) -> PrivateContent:
    """Text, token ids, rows and pooled vectors of a prompt."""
    encoder = handle.host.encoder
    with handle.encoding(), torch.no_grad():
        outputs, public = encoder._encode(prompt), encoder._encode(ROOM)
    pairs = [
        (t.flatten(0, -2), p.flatten(0, -2))
        for t, p in zip(outputs, public, strict=True)
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.ndim in (2, 3) and t.shape[-1] > 3
    ]
    told = [t[~(t[:, None] == p[None]).all(-1).any(1)] for t, p in pairs]  # the first row may be public
    tokenizers = [t for n, t in pipe.components.items() if n.startswith("tokenizer") and t is not None]
    ids = [torch.tensor(t(prompt).input_ids) for t in tokenizers]
    texts = tuple(
        w for w in prompt.split() if w[0].isupper() or w.isdigit()
    )  # others stand in the vocabulary
    return PrivateContent(texts=texts, ids=tuple(ids), rows=tuple(told))


@pytest.mark.parametrize("kind", HOSTS)
def test_nothing_but_the_release(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of two private prompts with one release: models, callbacks, callers and files see the same bytes, none of them private."""
    pipe = HOSTS[kind]()
    plain = [_record(pipe, prompt) for prompt in SECRETS]
    assert plain[0].difference(plain[1])  # so that a leak would be seen
    handle = protect(pipe)
    call(pipe, "never")  # the first call is tried with public texts
    private = [_private(handle, pipe, prompt) for prompt in SECRETS]
    assert private[0].find(plain[0].bytes())
    seen, files = [], []
    with held_fixed(handle), caplog.at_level(logging.DEBUG):
        for prompt in SECRETS:
            handle.release(prompt)  # here, so that encoders see it outside of the call that is recorded
            seen.append(_record(pipe, prompt))
        for i, _ in enumerate(SECRETS):
            with _without_weights(pipe):
                pipe.save_pretrained(tmp_path / str(i))
            files.append(
                b"".join(f.read_bytes() for f in sorted((tmp_path / str(i)).rglob("*")) if f.is_file())
            )
    assert seen[0].models and not seen[0].difference(seen[1])
    assert len(handle.report().releases) == 3
    blobs = [
        seen[0].bytes(),
        files[0],
        caplog.text.encode(),
        str(handle.report()).encode(),
        repr(handle).encode(),
    ]
    # what "none" releases are the first prompt's own rows: only the second's may be nowhere
    assert not private[1].find(b"\n".join(blobs))
    for text in private[0].texts:
        assert text.encode() not in b"\n".join(blobs)


@contextmanager
def _without_weights(pipe: Any) -> Iterator[None]:
    """Inside, models save nothing: no call writes to weights."""
    with ExitStack() as stack:
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                stack.enter_context(mock.patch.object(part, "save_pretrained", lambda *args, **kwargs: None))
        yield


@pytest.mark.parametrize("kind", ["sd3", "qwen"])
def test_a_planted_leak_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = HOSTS[kind]()
    handle, place = protect(pipe), RowsEncoder.place
    read, kept = RowsEncoder.whole, []

    def keep(*given: Any) -> torch.Tensor:
        kept.append(read(*given))
        return kept[-1]

    monkeypatch.setattr(RowsEncoder, "whole", keep)
    monkeypatch.setattr(RowsEncoder, "place", lambda *given: place(*given) + 1e-3 * kept[-1].mean())
    with held_fixed(handle):
        one, other = (call(pipe, prompt) for prompt in PROMPTS)
    assert not torch.equal(one, other)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd3", "auraflow", "cogvideox")]


@pytest.mark.parametrize("kind", ["flux", "qwen", *SLOW])
@pytest.mark.parametrize("unit", ["row", pytest.param("context", marks=pytest.mark.slow)])
def test_a_calibration_of_public_prompts(kind: str, unit: str, tmp_path: Path) -> None:
    pipe = HOSTS[kind]()
    before = call(pipe, PROMPTS[0])
    config = dpx.DPXAttnConfig(mechanism="anchors", unit=unit)
    made = dpx.calibrate(
        pipe, PUBLIC * 3, config, epsilons=(8.0,), progress=False, anchors=8, steps=2, releases=["sum"]
    )
    assert torch.equal(before, call(pipe, PROMPTS[0]))  # as it was
    assert made.plans[0].worth is not None and made.decoders.fallback is not None  # compared with no release
    made.save_pretrained(tmp_path / "calibration")
    handle = dpx.protect(
        pipe, config, calibration=tmp_path / "calibration", allow_useless=True, ledger=dpx.Ledger()
    )
    one = call(pipe, PROMPTS[0])
    assert bool(one.isfinite().all()) and torch.equal(one, call(pipe, PROMPTS[0]))
    assert len(handle.report().releases) == 1
    with held_fixed(handle):
        assert torch.equal(*(call(pipe, prompt) for prompt in SECRETS))
    release = handle.release(PROMPTS[0])
    assert torch.equal(one, call(pipe, **release.inputs()))
    release.save_pretrained(tmp_path / "release")
    dpx.unprotect(pipe)
    again = dpx.Release.from_pretrained(tmp_path / "release", host=pipe)
    assert torch.equal(one, call(pipe, **again.inputs()))
    dpx.unprotect(pipe)
    other = HOSTS["cogvideox" if kind == "sd3" else "sd3"]()
    with pytest.raises(dpx.ConfigError):
        dpx.protect(other, config, calibration=made, allow_useless=True, ledger=dpx.Ledger())


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("mechanism", ["kernel_sum", "dptree"])
def test_attention_is_refused_by_name(kind: str, mechanism: str) -> None:
    pipe = HOSTS[kind]()
    with pytest.raises(dpx.UnsupportedModelError, match="mechanism='anchors' releases"):
        dpx.protect(
            pipe,
            dpx.DPXAttnConfig(mechanism=mechanism, unit="row"),
            allow_uncalibrated=True,
            ledger=dpx.Ledger(),
        )
    assert dpx.handle_of(pipe) is None
    with pytest.raises(dpx.UnsupportedModelError):
        dpx.calibrate(pipe, PUBLIC, dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row"), progress=False)


@pytest.mark.parametrize("kind", ["flux", "auraflow"])
def test_batches_share_no_release(kind: str) -> None:
    pipe = HOSTS[kind]()
    protect(pipe)
    both = call(pipe, list(PROMPTS), num_images_per_prompt=2)
    assert len(both) == 4 and not torch.equal(both[0], both[2])
    latents = call(pipe, PROMPTS[0], output_type="latent") * 0 + 0.5
    alone = [call(pipe, prompt, latents=latents) for prompt in PROMPTS]
    both = call(pipe, list(PROMPTS), latents=torch.cat([latents] * 2))
    assert torch.allclose(both, torch.cat(alone), atol=1e-4)


def test_private_embeddings_are_released_and_their_pooled_vector_is_not_read() -> None:
    pipe = tiny_flux()
    handle = protect(pipe)
    with handle.encoding(), torch.no_grad():
        rows, pooled, _ = pipe.encode_prompt(PROMPTS[0], None, max_sequence_length=512)
    one = call(pipe, prompt_embeds=rows, pooled_prompt_embeds=pooled)
    assert torch.equal(one, call(pipe, prompt_embeds=rows, pooled_prompt_embeds=-pooled))
    assert not torch.equal(one, call(pipe, PROMPTS[0]))
    assert len(handle.report().releases) == 2
    with pytest.raises(dpx.ContextError, match="Embeddings must be"):
        handle.release(rows[..., 1:])


LOST: dict[str, Callable[[Any], Any]] = {
    "encode_prompt": lambda p: p.encode_prompt("a red circle", None),
    "a text encoder": lambda p: p.text_encoder(torch.zeros(1, 4, dtype=torch.int64)),
    "prompt_2": lambda p: call(p, "red", prompt_2="secret"),
    "pooled alone": lambda p: call(p, "red", pooled_prompt_embeds=torch.zeros(1, 32)),
    "another denoiser": lambda p: p.register_modules(transformer=tiny_flux().transformer),
    "another encode_prompt": lambda p: setattr(p, "encode_prompt", type(p).encode_prompt.__get__(p)),
    "a callback that encodes": lambda p: call(
        p, "red", callback_on_step_end=lambda pipe, *rest: pipe.encode_prompt("secret", None) and {}
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_what_goes_around_fails_closed(what: str) -> None:
    pipe = tiny_flux()
    handle = protect(pipe)
    with pytest.raises(dpx.DPXAttnError):
        LOST[what](pipe)
        call(pipe, "a red circle")
    assert what == "a callback that encodes" or not handle.report().releases


def test_a_call_that_fails_spends_nothing() -> None:
    pipe = tiny_sd3()
    handle = protect(pipe)
    with pytest.raises(ValueError):
        call(pipe, "red box", callback_on_step_end_tensor_inputs=["nothing"])
    alike = mock.patch.object(RowsEncoder, "read", lambda self, text: torch.zeros(4, self.channels))
    with alike, pytest.raises(dpx.UnsupportedModelError, match="no encoded prompt reached"):
        call(pipe, "red box")
    assert not handle.report().releases


def test_units_are_rows_or_whole_prompts() -> None:
    pipe = tiny_flux()
    with pytest.raises(dpx.ConfigError, match="unit='row' or unit='context'"):
        protect(pipe, unit="group")


def test_reports_say_what_is_public_and_that_pooled_vectors_are_rows() -> None:
    for kind in HOSTS:
        pipe = HOSTS[kind]()
        text = str(protect(pipe).report())
        assert ("pooled vector among them" in text) == (kind in POOLED)
        assert ("the number of tokens of a prompt" in text) == (kind not in STEADY)


def test_rows_are_repeated_as_their_weights_say() -> None:
    gen = torch.Generator().manual_seed(0)
    for count in (1, 7, 16, 333):
        rows = torch.arange(12.0).unsqueeze(1)
        logs = 2 * torch.randn(12, generator=gen)
        given = repeated(ContextRows(rows, logs), count)
        shares = torch.softmax(logs.double(), 0) * count
        seen = torch.tensor([int((given == i).sum()) for i in range(12)])
        assert len(given) == count and bool(((seen - shares).abs() < 1).all())
    same = repeated(ContextRows(rows, torch.zeros(12)), 12)
    assert torch.equal(same, rows)


def test_stand_ins_are_of_the_same_words() -> None:
    assert (
        sorted(ROOM.replace(",", "").split()) == sorted(SWAPPED.replace(",", "").split()) and ROOM != SWAPPED
    )
