"""One handle, several threads: each call gets what it gets alone, each content is charged once, and nothing waits for ever."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from transformers.generation.streamers import BaseStreamer

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts import growing, guard, releases
from hf_dp_xattn.hosts.bindings import Bindings
from hf_dp_xattn.hosts.context import PrivateContext
from hf_dp_xattn.hosts.making import LayerRecipe
from hf_dp_xattn.mechanisms.growing_release import GrowingRelease

from ..hosts_tiny import CHANNELS, close, latents, picture, tiny_img2img, tiny_scheduler, tiny_sd, tiny_unet
from .kinds import CONFIG, KINDS, Kind
from .transformers.decoder_only import tiny as decoder

EACH = pytest.mark.parametrize("name", KINDS)
THREADS = 4
LIMIT = 240.0  # seconds: a deadlock, not a slow machine


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What each returns or raises, started together in threads of their own."""
    barrier = threading.Barrier(len(works))

    def start(work: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return work()
        except Exception as error:
            return error

    pool = ThreadPoolExecutor(len(works))
    try:
        return [f.result(LIMIT) for f in [pool.submit(start, work) for work in works]]
    finally:
        pool.shutdown(wait=False)


def paid(handle: Any) -> int:
    """How many names were charged, each of them once; a context has several (its text, its tokens), charged together."""
    entries = handle.ledger.entries()
    assert set(Counter(c.digest for c in entries).values()) == {1}
    return len(entries)


def paid_alone(kind: Kind) -> int:
    """Names that one context of that kind is charged under, by one thread: its own, and not those of before (`Name.former`)."""
    handle = dpx.protect(kind.make(), CONFIG, ledger=dpx.Ledger())
    kind.release(handle, 1)
    assert handle.releases.spent[0].digests[0] in {c.digest for c in handle.ledger.entries()}
    return paid(handle)


def errors(results: list[Any]) -> list[Exception]:
    return [r for r in results if isinstance(r, Exception)]


# ---- releasing, appending, charging, installing --------------------------------------------------------------------------------


def slow(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """That step, with a pause before and behind it, in which other threads run."""
    original = getattr(owner, name)

    def delayed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        try:
            return original(*args, **kwargs)
        finally:
            time.sleep(0.02)

    monkeypatch.setattr(owner, name, delayed)


STEPS: dict[str, tuple[Any, str] | None] = {
    "as it is": None,
    "naming": (growing, "names_of"),
    "charging": (growing, "charge"),
    "projecting": (LayerRecipe, "private"),
    "entering": (GrowingRelease, "append"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_document_enters_once(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    handle = dpx.protect(pipe, CONFIG)
    release = handle.release("a red circle", horizon=8)
    each = paid(handle)
    where = STEPS[step]
    if where is not None:
        slow(monkeypatch, *where)
    entered: list[Any] = []
    original = GrowingRelease.append
    monkeypatch.setattr(
        GrowingRelease, "append", lambda *args, **kw: entered.append(1) or original(*args, **kw)
    )
    results = at_once(*[lambda: release.append("a blue square")] * THREADS)
    assert len(entered) == 1 and paid(handle) == 2 * each
    assert sorted(type(r).__name__ for r in results) == ["ContextError"] * (THREADS - 1) + ["Release"]


def test_documents_of_several_threads_all_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = dpx.protect(tiny_sd(), CONFIG)
    release = handle.release("a red circle", horizon=THREADS + 1)
    each = paid(handle)
    slow(monkeypatch, GrowingRelease, "append")
    works = [lambda text=f"document {i}": release.append(text) for i in range(THREADS)]
    assert not errors(at_once(*works))
    assert paid(handle) == (THREADS + 1) * each
    with pytest.raises(dpx.BudgetExceededError):
        release.append("one too many")


def test_a_document_that_reenters_on_its_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook of the encoder may call the handle again, in the same thread: the name is taken before anything is computed."""
    pipe = tiny_sd()
    handle = dpx.protect(pipe, CONFIG)
    release = handle.release("a red circle", horizon=8)
    each = paid(handle)
    found: list[Any] = []

    def again(*_: Any) -> None:
        if not found:
            found.append(None)
            with pytest.raises(dpx.ContextError):
                release.append("a blue square")
            found[0] = True

    pipe.text_encoder.register_forward_hook(again)
    release.append("a blue square")
    assert found == [True] and paid(handle) == 2 * each


def test_an_append_that_failed_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is charged stays charged, and enters at the next try, once."""
    pipe = tiny_sd()
    handle = dpx.protect(pipe, CONFIG)
    release = handle.release("a red circle", horizon=8)
    each = paid(handle)
    with monkeypatch.context() as patch:
        patch.setattr(LayerRecipe, "private", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            release.append("a blue square")
    release.append("a blue square")
    with pytest.raises(dpx.ContextError):
        release.append("a blue square")
    assert paid(handle) == 2 * each


RELEASING: dict[str, tuple[Any, str]] = {
    "naming": (releases, "names_of"),
    "asking": (releases, "may_charge"),
    "charging": (releases, "charge"),
    "computing": (releases.Releases, "run"),
    "binding": (Bindings, "add"),
}


@EACH
def test_one_context_is_released_and_charged_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS[name]
    alone = paid_alone(kind)
    handle = dpx.protect(kind.make(), CONFIG, budget=dpx.Budget(100.0, 1e-5))
    for step in RELEASING.values():
        slow(monkeypatch, *step)
    results = at_once(*[lambda: kind.release(handle, 1)] * THREADS)
    assert not errors(results) and paid(handle) == alone
    assert len({r.contexts[0].tag for r in results}) == 1


def test_a_private_call_from_several_threads_is_charged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = paid_alone(KINDS["diffusers"])
    pipe = tiny_sd()
    handle = dpx.protect(pipe, CONFIG, budget=dpx.Budget(100.0, 1e-5))
    slow(monkeypatch, releases, "charge")
    results = at_once(*[lambda: picture(pipe, "a red circle")] * THREADS)
    assert not errors(results) and paid(handle) == alone
    assert all(torch.equal(r, results[0]) for r in results)


@EACH
def test_a_host_protected_by_several_threads_has_one_handle(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = KINDS[name].make()
    want = KINDS[name].plain(host, 1)
    slow(monkeypatch, guard, "choose_maker")
    found = at_once(*[lambda: dpx.protect(host, CONFIG)] * THREADS)
    assert not errors(found) and len({id(h) for h in found}) == 1
    assert not errors(at_once(*[lambda: dpx.unprotect(host)] * THREADS))
    assert torch.equal(KINDS[name].plain(host, 1), want)


# ---- calls ---------------------------------------------------------------------------------------------------------------------


@EACH
def test_threads_get_what_they_get_alone(name: str) -> None:
    """Bitwise, while a third thread makes releases and reads the report."""
    kind = KINDS[name]
    host = kind.make()
    handle = dpx.protect(host, CONFIG)
    releases = [kind.release(handle, seed) for seed in (1, 2)]
    want = [kind.read(host, r) for r in releases]
    assert not torch.equal(*want)

    def read(i: int) -> bool:
        return all(torch.equal(kind.read(host, releases[i]), want[i]) for _ in range(4))

    def other() -> bool:
        for seed in range(3, 8):
            kind.release(handle, seed)
            handle.report()
        return True

    assert at_once(lambda: read(0), lambda: read(1), other) == [True] * 3


def test_a_direct_call_in_another_thread_changes_nothing() -> None:
    """Calls of a bare UNet do not wait for each other: one is made from beginning to end while another one is half done."""
    unet = tiny_unet()
    handle = dpx.protect(unet, CONFIG)
    rows = torch.randn(2, 1, 16, CHANNELS, generator=torch.Generator().manual_seed(3))
    inputs = [handle.release(context).inputs() for context in rows]

    def call(i: int) -> torch.Tensor:
        return unet(latents(), 5, **inputs[i]).sample

    want = [call(0), call(1)]
    assert not close(*want)
    meanwhile: list[torch.Tensor] = []

    def other(*_: Any) -> None:
        half.remove()
        meanwhile.extend(at_once(lambda: call(1)))

    half = unet.mid_block.register_forward_pre_hook(other)
    assert close(call(0), want[0]) and close(meanwhile[0], want[1])


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": tiny_scheduler,
    "PNDM": lambda: PNDMScheduler(skip_prk_steps=True),
    "DPM": DPMSolverMultistepScheduler,
}


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "compiled"), [*((s, False) for s in SCHEDULERS), ("DDIM", True)])
def test_two_prompts_on_one_pipeline(scheduler: str, compiled: bool) -> None:
    """A scheduler keeps the state of a call; a compiled UNet has no gate that could say what is served."""
    pipe = tiny_sd(scheduler=SCHEDULERS[scheduler]())
    dpx.protect(pipe, CONFIG)
    if compiled:
        torch._dynamo.reset()
        pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)

    def draw(i: int) -> torch.Tensor:
        return picture(
            pipe, ("a red circle", "a blue star")[i], num_inference_steps=6, guidance_scale=2.0 + i
        )

    want = [draw(i) for i in (0, 1)]
    works = [lambda i=i: all(torch.equal(draw(i), want[i]) for _ in range(4)) for i in (0, 1)]
    assert at_once(*works) == [True, True]


def test_pipelines_that_share_a_unet_and_a_scheduler() -> None:
    first, second = tiny_sd(scheduler=PNDMScheduler(skip_prk_steps=True)), tiny_img2img()
    second.unet, second.scheduler = first.unet, first.scheduler
    for pipe in (first, second):
        dpx.protect(pipe, CONFIG)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def draw(i: int) -> torch.Tensor:
        if i:
            return picture(second, "a blue star", image=image, strength=1.0, num_inference_steps=5)
        return picture(first, "a red circle", num_inference_steps=5)

    want = [draw(i) for i in (0, 1)]
    works = [lambda i=i: all(torch.equal(draw(i), want[i]) for _ in range(4)) for i in (0, 1)]
    assert at_once(*works) == [True, True]


# ---- nothing waits for ever ----------------------------------------------------------------------------------------------------


def test_a_callback_may_release_draw_and_wait_for_a_thread_that_releases() -> None:
    pipe = tiny_sd()
    handle = dpx.protect(pipe, CONFIG)
    want = picture(pipe, "a red circle")
    seen: list[bool] = []

    def callback(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if not seen:
            seen.append(True)
            inner = picture(pipe, "a blue star")
            handle.release("a green line")
            with ThreadPoolExecutor(1) as pool:
                release = pool.submit(handle.release, "a grey cube").result(LIMIT)
                pool.submit(release.inputs).result(LIMIT)
            assert bool(inner.isfinite().all())
        return values

    got = at_once(lambda: picture(pipe, "a red circle", callback_on_step_end=callback))
    assert not errors(got) and torch.equal(got[0], want) and seen


def test_a_failed_call_leaves_no_lock_and_nothing_served() -> None:
    pipe = tiny_sd()
    handle = dpx.protect(pipe, CONFIG)
    want = picture(pipe, "a red circle")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for where in (pipe.unet.mid_block, pipe.vae.decoder):
        hook = where.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            picture(pipe, "a blue star", output_type="pt")
        hook.remove()
    got = at_once(lambda: picture(pipe, "a red circle"))
    assert not errors(got) and torch.equal(got[0], want)
    at_once(lambda: dpx.unprotect(pipe))
    assert not handle.active


class Queue(BaseStreamer):
    """A streamer whose producer waits for its consumer, token by token."""

    def __init__(self) -> None:
        self.turn, self.taken, self.ended = threading.Semaphore(0), threading.Semaphore(0), False

    def put(self, value: torch.Tensor) -> None:
        self.turn.release()
        assert self.taken.acquire(timeout=LIMIT)

    def end(self) -> None:
        self.ended = True
        self.turn.release()


def test_the_reader_of_a_stream_may_use_the_handle() -> None:
    model = decoder.tiny("llama")
    handle = dpx.protect(model, CONFIG)
    ids = decoder.tokens(4, 50).unsqueeze(0)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4}
    release = handle.release(decoder.tokens(9, 1))
    want = model.generate(**release.inputs(input_ids=ids), **options)
    stream, seeds = Queue(), iter(range(2, 20))

    def consume() -> bool:
        while True:
            assert stream.turn.acquire(timeout=LIMIT)
            if stream.ended:
                return True
            other = handle.release(decoder.tokens(9, next(seeds)))
            model(**other.inputs(input_ids=ids))
            stream.taken.release()

    got, done = at_once(
        lambda: model.generate(**release.inputs(input_ids=ids), **options, streamer=stream), consume
    )
    assert done is True and torch.equal(got, want)


@EACH
def test_a_host_that_is_unprotected_on_the_way_answers_nothing(name: str) -> None:
    """A call that goes on without its protection would read a placeholder, or nothing."""
    kind = KINDS[name]
    host = kind.make()
    release = kind.release(dpx.protect(host, CONFIG), 1)
    model = getattr(host, "unet", host)
    model.register_forward_hook(lambda *_: dpx.unprotect(host))
    with pytest.raises((dpx.ProtectionLostError, dpx.ReleaseError)):  # the latter: a prefix that none reads
        kind.read(host, release)


def test_slow_lets_another_thread_in() -> None:
    """Power: `slow` does let another thread in between, so that the tests above would fail without the lock."""
    order: list[str] = []

    def step(name: str) -> None:
        order.append(name)

    with pytest.MonkeyPatch.context() as patch:
        slow(patch, PrivateContext, "groups")
        context = PrivateContext(2, 2, (b"a",), lambda: (torch.zeros(2, 1), torch.zeros(0, 1)))
        at_once(
            lambda: (step("a in"), context.groups(None, "row"), step("a out")),
            lambda: (step("b in"), context.groups(None, "row"), step("b out")),
        )
    assert sorted(order[:2]) == ["a in", "b in"]
